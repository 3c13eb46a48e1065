"""Report on thousands of run directories: seconds and peak memory, against 20 s and 1 GB.

    python benchmarks/report_speed.py --out benchmarks/results/report_speed.md

The run directories are synthetic: images of fixed difficulty, arms of known effect, seeds that share a part
of their luck; with learning curves, logit statistics and per-image correctness as real runs record them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paired import provenance, report  # noqa: E402

BINS = 15


def write_runs(
    root: Path,
    effects: Mapping[str, float],
    seeds: Sequence[int],
    *,
    data: str = "cifar10",
    epochs: int = 100,
    images: int = 10_000,
    accuracy: float = 0.94,
    time_ratios: Mapping[str, float] | None = None,
) -> None:
    """Run directories of every arm and seed below `root/data`.

    Args:
        effects: arm -> its true effect on the accuracy; techniques are the arm's name split at `+`.
        seeds: of each arm.
        epochs: rows of metrics.csv.
        images: test images; 0: no correctness is recorded.
        accuracy: the baseline's.
        time_ratios: arm -> training time relative to the baseline's; 1 where not given.
    """
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=max(images, 1000))
    luck = {seed: 0.01 * rng.normal() for seed in seeds}
    config = yaml.safe_load((ROOT / "cli_configs" / "train.yaml").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("defaults", "hydra")}
    config["data"] = {**config["data"], "num_classes": 10, "task": "classification"}
    for a, (arm, effect) in enumerate(effects.items()):
        for seed in seeds:
            # a threshold on difficulty plus luck of the seed and of the run with each image
            limit = _quantile(accuracy + effect) * 1.1 + luck[seed] + 0.01 * rng.normal()
            hit = difficulty + 0.46 * rng.normal(size=len(difficulty)) < limit
            folder = root / data / f"{a:08x}-s{seed}"
            ratio = (time_ratios or {}).get(arm, 1.0)
            _write_run(
                folder,
                arm,
                seed,
                hit,
                epochs,
                500 * ratio * (1 + 0.01 * rng.normal()),
                config,
                rng,
                images > 0,
            )


def _quantile(p: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(p))


def _write_run(
    folder: Path,
    arm: str,
    seed: int,
    hit: Any,
    epochs: int,
    seconds: float,
    config: Any,
    rng: Any,
    bits: bool,
) -> None:
    (folder / "plots").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    techniques = [t for t in arm.split("+") if t != "baseline"]
    config = {**config, "seed": seed, "exp_dir": str(folder.parent.parent)}
    config["model"] = {**config["model"], "seed": seed, **dict.fromkeys(techniques, True)}
    config["data"] = {
        **config["data"],
        "module": {**config["data"]["module"], "seed": seed, "name": folder.parent.name},
    }
    config["techniques"] = {t: {f"model.{t}": True} for t in techniques}
    (folder / "config.yaml").write_text(
        yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8"
    )
    overrides = [
        f"technique=[{','.join(techniques)}]" if techniques else "technique=baseline",
        f"seed={seed}",
    ]
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    accuracy, done = float(hit.mean()), np.arange(1, epochs + 1) / epochs
    curve = (
        accuracy - 0.5 * (1 - done) ** 2 * np.exp(-3 * done) + 0.004 * (1 - done) * rng.normal(size=epochs)
    )
    columns = {
        "epoch": np.arange(epochs), "step": np.arange(1, epochs + 1) * 390, "train/loss": 0.01 + 2 * np.exp(-5 * done),
        "train/acc": curve + 0.03 * done, "logits/norm": 3 + 6 * done + 0.1 * rng.normal(size=epochs),
        "logits/mean": 0.2 + 0.1 * done, "logits/max": 2 + 5 * done, "logits/var": 1 + 4 * done,
        "val/loss": 2 * (1 - curve), "val/acc": curve, "val/ece": 0.1 * (1 - curve), "lr": 0.1 * (1 - done),
        "time/epoch_s": np.full(epochs, seconds / epochs), "time/images_per_s": np.full(epochs, 5e4 * epochs / seconds),
    }  # fmt: skip
    rows = [
        ",".join(columns),
        *(",".join(f"{v:.17g}" for v in row) for row in zip(*columns.values(), strict=True)),
    ]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    confidence = np.clip(0.55 + 0.45 * rng.beta(5, 1, size=len(hit)), 0, 1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    blocks = [
        np.bincount(bins, w, minlength=BINS) for w in (np.ones(len(hit)), confidence, hit.astype(float))
    ]
    final = {
        "train/loss": 0.02,
        "val/acc": float(curve[-1]),
        "test/acc": accuracy,
        "test/loss": 3 * (1 - accuracy),
    }
    final["test/ece"] = float(abs(blocks[1] - blocks[2]).sum() / len(hit))
    if bits:
        np.savez(
            folder / "test_correct.npz", correct=np.packbits(hit), count=np.int64(len(hit)),
            samples=np.str_("synthetic"), calibration=np.stack(blocks),
        )  # fmt: skip
    summary = {
        "schema": 1, "status": "finished", "reason": "", "run_id": folder.name, "seed": seed, "arm": arm,
        "techniques": techniques, "final": final, "best": {"val/acc": float(curve.max()), "epoch": epochs - 1},
        "data": folder.parent.name, "started": 1.0e9 + seed, "heartbeat": 1.0e9, "parameters": 11_173_962,
        "device": "synthetic", "devices": 1, "precision": "32-true", "versions": {"torch": "2"},
        "git": {"commit": "0" * 40, "dirty": False}, "epochs": epochs, "steps": 390 * epochs,
        "wall_time_s": round(seconds, 2), "images_per_s": round(5e4 * epochs / seconds, 1),
        "peak_memory_mb": 2000.0 + 10 * rng.normal(), "ended": 1.0e9,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def measure(folder: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and peak memory in MiB of `python report.py` as a process of its own."""
    command = [sys.executable, str(ROOT / "report.py"), f"runs={folder}", f"out={folder.parent / 'report'}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, computing, after.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    effects = {
        "baseline": 0.0,
        **{f"technique{i:02d}": 0.0005 * (i % 9 - 4) for i in range(1, arguments.arms)},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        write_runs(folder, effects, range(arguments.seeds), epochs=arguments.epochs)
        measured = [measure(folder) for _ in range(arguments.repeats)]
        page = Path(place) / "report" / "report.html"
        size = page.stat().st_size / 2**20
    seconds, computing, memory = (max(column) for column in zip(*measured, strict=True))
    runs = arguments.arms * arguments.seeds
    text = f"""# Report of {runs:,} run directories

`python report.py` over {arguments.arms} arms of {arguments.seeds} seeds with {arguments.epochs} epochs each and the
correctness of 10,000 test images a run: reading, statistics, plots and pages, as a process of its own. The slowest
of {arguments.repeats} counts.

{provenance()}
| | measured | limit |
| --- | --- | --- |
| seconds (all: {", ".join(f"{m[0]:.1f}" for m in measured)}) | {seconds:.1f} | 20 |
| of it computing, CPU seconds | {computing:.1f} | - |
| peak memory, MiB | {memory:.0f} | 1024 |
| size of report.html, MiB | {size:.1f} | - |"""
    report(text, arguments.out)


if __name__ == "__main__":
    main()
