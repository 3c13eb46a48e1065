"""Claim: the jobs of a sweep start from a warm parent in a fraction of the time of a real start.

Recorded runs of a small network on digits (one epoch), each in a process of its own, warm and real starts in turn:
    python benchmarks/process_starts.py --pairs 10 --out benchmarks/results/process_starts.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir  # noqa: E402
from paired import provenance, ratio_interval, report  # noqa: E402

from lab.experiment import Examiner  # noqa: E402
from lab.processes import Process  # noqa: E402
from lab.warm import Started, WarmParent  # noqa: E402

RUN = [
    "data=digits", "model=cifar_resnet", "model.depth=8", "trainer.max_epochs=1", "logger.wandb=null",
    "callbacks.plots=null", "trainer.enable_progress_bar=false",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    examiner, times = Examiner(), {"warm": [], "real": []}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        parent = WarmParent()

        def seconds(kind: str, seed: int) -> float:
            overrides = [*RUN, f"seed={seed}", f"exp_dir={folder}/{kind}"]
            with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
                job = examiner.examine(compose("train", overrides), overrides)
            run = job.record()
            start = time.perf_counter()
            process = Process(run, output=run.path / "console.log", warm=parent if kind == "warm" else None)
            while not process.ended(60):
                pass
            taken = time.perf_counter() - start
            assert isinstance(process._process, Started) == (kind == "warm"), (
                "the start was of the other kind"
            )
            assert process.outcome() == 0, (run.path / "console.log").read_text()
            return taken

        seconds("warm", 10_000)
        first = time.perf_counter() - began
        for pair in range(arguments.pairs):
            for kind in ("warm", "real") if pair % 2 else ("real", "warm"):
                times[kind].append(seconds(kind, pair))
        parent.close()
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ratio = ratio_interval(times["warm"], times["real"])
    report(
        "# Starts of a sweep's jobs\n\n"
        f"{provenance()}- Workload: `{' '.join(RUN)}`, {arguments.pairs} pairs of whole runs\n\n"
        "| start | seconds a run, median |\n| --- | ---: |\n"
        f"| real | {medians['real']:.2f} |\n| from a warm parent | {medians['warm']:.2f} |\n\n"
        f"Warm / real: {ratio} (median of pairs, 95 % interval). The parent and its first run: {first:.1f} s.",
        arguments.out,
    )


if __name__ == "__main__":
    main()
