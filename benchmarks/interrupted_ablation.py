"""An ablation whose machine dies twice: is any run lost, is any done twice, does any number change?

Every process of the sweep is killed (SIGKILL), twice, in the middle of a training; the same command then finishes it.
Each run that was cut off is repeated in one piece elsewhere, and its numbers are compared bit for bit.

    python benchmarks/interrupted_ablation.py --out benchmarks/results/interrupted_ablation.md
    python report.py runs=experiments/interrupted
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from crashes import kill_family  # noqa: E402
from paired import provenance, report  # noqa: E402

EPOCHS = 8
ABLATION = [
    "sweep=ablation", "technique=baseline,powergrad,label_smoothing,mixup,sam,online_norm,ema,[powergrad,mixup]",
    "seed=range(5)", "model=cifar_resnet", "model.depth=8", f"trainer.max_epochs={EPOCHS}", "equal_time=true",
    "margin_points=1", "planned_seeds=5", "n_jobs=2", "logger.wandb=null",
]  # fmt: skip


@dataclass
class Record:
    """What a run's folder says: `starts` of the process, and the `epochs` in its table, in order."""

    status: str
    starts: int
    resumes: int
    epochs: list[int]

    @classmethod
    def read(cls, run: Path) -> Record:
        log = (run / "main.log").read_text().splitlines() if (run / "main.log").exists() else []
        table = run / "metrics.csv"
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        return cls(
            status=json.loads((run / "summary.json").read_text())["status"],
            starts=sum(" INFO run: " in line for line in log),
            resumes=sum(" INFO resumes: " in line for line in log),
            epochs=[int(row["epoch"]) for row in rows],
        )


def records(folder: Path) -> dict[str, Record]:
    """By the run's name."""
    return {file.parent.name: Record.read(file.parent) for file in sorted(folder.glob("*/*/summary.json"))}


def is_time(runs: Mapping[str, Record], finished: int) -> bool:
    """Whether so many runs are finished, and another has 2 epochs or more but not all."""
    done = sum(run.status == "finished" for run in runs.values())
    return done >= finished and any(
        run.status != "finished" and 2 <= len(run.epochs) < EPOCHS - 1 for run in runs.values()
    )


def numbers(run: Path) -> dict[str, float]:
    """The final numbers that do not depend on the machine's speed."""
    final = json.loads((run / "summary.json").read_text())["final"]
    return {name: value for name, value in final.items() if not name.startswith("time/")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="experiments/interrupted", help="of the runs; new or empty")
    parser.add_argument(
        "--kill-at", type=int, nargs="+", default=[6, 17], help="finished runs, and one half done"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = ROOT / arguments.folder
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--folder {folder} is not empty")
    os.environ["OMP_NUM_THREADS"] = "1"

    command = [sys.executable, "main.py", "-m", *ABLATION, f"exp_dir={arguments.folder}"]
    stages: list[tuple[str, dict[str, Record]]] = []
    for finished in [*arguments.kill_at, None]:
        sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while sweep.poll() is None and not (finished is not None and is_time(records(folder), finished)):
            time.sleep(0.2)
        if finished is not None and sweep.returncode is not None:
            raise SystemExit(f"the sweep ended before --kill-at {finished}")
        if finished is not None:
            kill_family(sweep.pid)
        status = sweep.wait()
        what = "SIGKILL" if finished is not None else f"the end, exit status {status}"
        stages.append((what, records(folder)))

    planned = json.loads(max(folder.glob("sweeps/*/sweep.json")).read_text())["runs"]
    ended = stages[-1][1]
    lost = [one["run"] for one in planned if ended[Path(one["run"]).name].status != "finished"]
    twice = [
        name
        for i, (_, before) in enumerate(stages[:-1])
        for name, run in before.items()
        if run.status == "finished" and stages[i + 1][1][name].starts != run.starts
    ]
    broken = [name for name, run in ended.items() if run.epochs != list(range(len(run.epochs)))]

    cut = [name for name, run in ended.items() if run.starts > 1]
    rows, differing = [], []
    for name in cut:
        run = next(folder.glob(f"*/{name}"))
        overrides = yaml.safe_load((run / "overrides.yaml").read_text())
        elsewhere = f"{arguments.folder}_in_one_piece"
        again = [sys.executable, "main.py", *overrides, f"exp_dir={elsewhere}"]
        subprocess.run(again, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        same = numbers(run) == numbers(next((ROOT / elsewhere).glob(f"*/{name}")))
        differing += [] if same else [name]
        states = [stage[name] for _, stage in stages if name in stage]
        known = [len(state.epochs) for state in states if state.status != "finished"]
        arm = json.loads((run / "summary.json").read_text())["arm"]
        rows.append(
            f"| {name} | {arm} | {ended[name].starts} | {ended[name].resumes} | {', '.join(map(str, known))} "
            f"| {len(ended[name].epochs)}, each once | {'equal' if same else 'DIFFERENT'} |"
        )

    lines = [
        "# An ablation that was killed twice",
        "",
        f"    python main.py -m {shlex.join(ABLATION)}",
        "",
        "8 arms of 5 seeds on the embedded digits, and the baseline trained for as long as the slower arms. All its",
        f"processes got SIGKILL {len(arguments.kill_at)} times; the same command, given again, went on.",
        "",
        provenance(),
        "| at | finished | cut off | not begun |",
        "| --- | ---: | ---: | ---: |",
    ]
    for what, stage in stages:
        count = Counter(run.status == "finished" for run in stage.values())
        lines.append(f"| {what} | {count[True]} | {count[False]} | {len(planned) - count.total()} |")
    lines += [
        "",
        f"Runs lost: {len(lost)}. Finished runs that were started again: {len(twice)}. Runs with an epoch missing",
        f"or recorded twice: {len(broken)}. Runs that were started once: {len(ended) - len(cut)} of {len(ended)}.",
        "",
        "Those that were cut off, and the same run in one piece:",
        "",
        "| run | arm | started | resumed | epochs done when killed | epochs recorded | final numbers, bit for bit |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        *rows,
    ]
    report("\n".join(lines), arguments.out)
    if lost or twice or broken or differing:
        raise SystemExit(f"lost {lost}, twice {twice}, broken {broken}, differing {differing}")


if __name__ == "__main__":
    main()
