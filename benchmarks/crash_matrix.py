"""Runs that are killed: before each of their file operations, and at random moments. What is lost?

Each trial kills a run (SIGKILL to all its processes), gives the same command again, and compares what the folder then
holds, file by file, with the same run in one piece: weights, optimizer, averages, counters, tables, summaries.

    python benchmarks/crash_matrix.py --out benchmarks/results/crash_matrix.md
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from conftest import Command  # noqa: E402
from crashes import CONFIGURATIONS, TINY, contents, killed_after, killed_before, only_run, operations  # noqa: E402
from paired import provenance, report  # noqa: E402

from lab.warm import WarmParent  # noqa: E402

WALKED = ["plain", "ema, every step", "swa", "only the last kept"]  # in one process, operation by operation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--walk", nargs="*", default=WALKED, choices=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began, failures, warm = time.monotonic(), [], WarmParent()
    scratch = Path(tempfile.mkdtemp(prefix="crashes"))
    start = partial(Command, scratch, warm=warm)
    assert start(*TINY, "trainer.max_epochs=2", f"exp_dir={scratch / 'teacher'}").outcome().status == 0
    teacher = str(only_run(scratch / "teacher"))

    def options(name: str) -> list[str]:
        return [*TINY, *(o.replace("TEACHER", teacher) for o in CONFIGURATIONS[name])]

    lines = ["## Before each file operation", "", "| configuration | operations | killed | resumed alike |",
             "| --- | ---: | ---: | ---: |"]  # fmt: skip
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name in arguments.walk:
        folder = scratch / "whole"
        run, done = operations(start, folder, options(name))
        whole, alike = contents(run), 0
        shutil.rmtree(folder)
        for number, operation in enumerate(done, 1):
            folder = scratch / "trial"
            found = killed_before(start, folder, options(name), number, whole)
            alike += not found
            kinds[operation][0] += 1
            kinds[operation][1] += not found
            if found:
                failures.append(f"{name}, before {number} ({operation}): {'; '.join(found[:4])}")
                print(failures[-1], flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        lines.append(f"| {name} | {len(done)} | {len(done)} | {alike} |")
        print(lines[-1], flush=True)
    lines += ["", "| operation | killed before it | resumed alike |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {killed} | {alike} |" for kind, (killed, alike) in sorted(kinds.items())]

    lines += ["", "## At random moments", "", "| configuration | killed | at its end before | resumed alike |",
              "| --- | ---: | ---: | ---: |"]  # fmt: skip
    draw = random.Random(arguments.seed)
    each = -(-arguments.random // len(CONFIGURATIONS))
    for name in CONFIGURATIONS if arguments.random else ():
        folder, since = scratch / "whole", time.monotonic()
        outcome = start(*options(name), f"exp_dir={folder}").outcome()
        assert outcome.status == 0, outcome.err
        lasted = time.monotonic() - since
        whole, killed, ended, alike = contents(only_run(folder)), 0, 0, 0
        shutil.rmtree(folder)
        while killed < each:
            folder, moment = scratch / "trial", draw.uniform(0.02, 1.0) * lasted
            found = killed_after(start, folder, options(name), moment, whole)
            if found is None:
                ended += 1
            else:
                killed += 1
                alike += not found
                if found:
                    failures.append(f"{name}, after {moment:.2f} s: {'; '.join(found[:4])}")
                    print(failures[-1], flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        lines.append(f"| {name} | {killed} | {ended} | {alike} |")
        print(lines[-1], flush=True)
    warm.close()
    shutil.rmtree(scratch, ignore_errors=True)
    head = [
        "# Killed and resumed",
        "",
        "    " + " ".join(["python", "benchmarks/crash_matrix.py"]),
        "",
        provenance(),
    ]
    lines += ["", f"{(time.monotonic() - began) / 60:.0f} minutes."]
    lines += ["", "What differed:", "", *(f"- {failure}" for failure in failures)] if failures else []
    report("\n".join([*head, *lines]), arguments.out)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
