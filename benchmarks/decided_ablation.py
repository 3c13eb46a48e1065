"""An ablation that decides for itself how many seeds each arm gets, and is killed on the way.

Every process of the sweep is killed (SIGKILL) behind its first look, in the middle of the runs to the second; the same
command, given again, goes on. The looks, as printed before and after, must agree, and no run may be made twice.

    python benchmarks/decided_ablation.py --out benchmarks/results/decided_ablation.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from crashes import kill_family  # noqa: E402
from interrupted_ablation import Record, records  # noqa: E402
from paired import provenance, report  # noqa: E402

from reporting.comparison import compare  # noqa: E402
from reporting.records import read_runs  # noqa: E402
from reporting.request import read_arguments  # noqa: E402

EPOCHS = 4
ABLATION = [
    "sweep=ablation", "technique=baseline,mixup,label_smoothing,powergrad", "until=decided", "looks=[4,6,9]",
    "margin_points=1", "model=cifar_resnet", "model.depth=8", f"trainer.max_epochs={EPOCHS}", "n_jobs=2",
    "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false",
]  # fmt: skip


def looks_in(text: str) -> dict[str, str]:
    """What a sweep printed: each look, and what it said of each technique there."""
    found: dict[str, str] = {}
    look = ""
    for line in text.splitlines():
        if line.startswith("look at "):
            look = line
        elif look and (said := re.match(r"  (\w+): (.*)", line)) and not line.startswith("  look at this"):
            found[f"{look.split(',')[0]}: {said[1]}"] = said[2]
        elif not line.startswith("  "):
            look = ""
    return found


def in_the_middle(runs: dict[str, Record], first: int) -> bool:
    """Whether the first look is over and a run to the second is half done."""
    finished = sum(run.status == "finished" for run in runs.values())
    return finished > first and any(
        run.status != "finished" and 1 <= len(run.epochs) < EPOCHS for run in runs.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="experiments/decided", help="of the runs; new or empty")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = ROOT / arguments.folder
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--folder {folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "main.py", "-m", *ABLATION, f"exp_dir={arguments.folder}"]
    said, states = [], []
    for kill in (True, False):
        log = folder / f"console-{len(said)}.txt"
        with log.open("w") as stream:
            sweep = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
            while sweep.poll() is None and not (kill and in_the_middle(records(folder), 4 * 4)):
                time.sleep(0.1)
            if kill and sweep.returncode is not None:
                raise SystemExit(f"the sweep ended before it could be killed: {log}")
            if kill:
                kill_family(sweep.pid)
            status = sweep.wait()
        said.append(looks_in(log.read_text()))
        states.append(records(folder))
    if status:
        raise SystemExit(f"exit status {status}: {log}")
    before, after = states
    cut = [name for name, run in before.items() if run.status != "finished"]
    twice = [
        name for name, run in before.items() if run.status == "finished" and after[name].starts != run.starts
    ]
    differing = [key for key, text in said[0].items() if said[1].get(key) != text]

    request = read_arguments([f"runs={folder}", f"out={folder / 'report'}"])
    (table,) = compare(read_runs(request)[0], request)
    rows = []
    for c in table.comparisons:
        difference, interval = (
            table.metric.formatted(float(c.t.mean), True),
            table.metric.formatted_interval(c.t.low, c.t.high),
        )
        runs = len(table.arms[c.arm].all_runs)
        rows.append(f"| {c.arm} | {runs} | {difference} | {interval} | {c.verdict} |")
    total = len(after)
    plan = json.loads(next(folder.glob("sweeps/plan-*.json")).read_text())
    most = plan["planned_seeds"][-1] * len(plan["arms"])
    looked = [
        f"| {key} | {'killed behind it' if key in said[0] else ''} | {text} |"
        for key, text in said[1].items()
    ]
    lines = [
        "# An ablation until it is decided, killed once",
        "",
        f"    python main.py -m {shlex.join(ABLATION)}",
        "",
        "The embedded digits, a small network, few epochs: it shows that the sweep does what it says, and finds out "
        "nothing\nabout the techniques. All its processes got SIGKILL behind the first look; the same command went on.",
        "",
        provenance(),
        f"{total} runs of at most {most}; cut off by the kill: {len(cut)}, resumed: "
        f"{sum(after[name].resumes for name in cut)}; finished runs that were started again: {len(twice)}; looks told "
        f"otherwise after the kill: {len(differing)}.",
        "",
        "| technique | runs | diff, points | repeated interval | verdict |",
        "| --- | ---: | ---: | --- | --- |",
        *rows,
        "",
        "What each look said; those before the kill were read again from the records:",
        "",
        "| look | | said |",
        "| --- | --- | --- |",
        *looked,
    ]
    report("\n".join(lines), arguments.out)
    if twice or differing or not said[0]:
        raise SystemExit(f"twice {twice}, differing {differing}, looks before the kill {list(said[0])}")


if __name__ == "__main__":
    main()
