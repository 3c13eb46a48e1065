"""What is said of a run whose record is damaged, and what happens: each file, each damage, each command.

PYTHONPATH=.:tests python tests/damage.py > benchmarks/results/damaged_records.md
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import TINY, Outcome, runs_in
from hydra.core.global_hydra import GlobalHydra

import main
import report
from crucible import load_run
from crucible.options import ConfigError
from crucible.run import LOST_AFTER_S

STATE = [*TINY, "trainer.max_epochs=2", "data.module.num_samples=64"]
FILES = ("summary.json", "config.yaml", "overrides.yaml", "metrics.csv", "claim", "old claim", "test.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(bytes(range(256))),
    "a list": lambda file: file.write_text("[1, 2]\n"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "unreadable": lambda file: file.chmod(0),
}


class Case(NamedTuple):
    """One cell of the table."""

    file: str
    damage: str
    command: str


def cases() -> Iterator[Case]:
    """All cells that can be seen: root reads everything."""
    for file in FILES:
        for damage in DAMAGES:
            if damage != "unreadable" or os.geteuid():
                yield from (Case(file, damage, command) for command in COMMANDS)


def make_run(folder: Path) -> Path:
    """A finished and tested run."""
    folder.mkdir()
    for arguments in (lambda: STATE, lambda: [f"run={runs_in(folder)[0]}", "task=test"]):
        done = main_in_process(folder, *arguments())
        assert done.status == 0, done.err
    return runs_in(folder)[0]


def damaged(made: Path, folder: Path, case: Case) -> Path:
    """A copy of the run with one file damaged; a file that a finished run has not is made first."""
    run = folder / "experiments" / "synthetic" / made.name
    shutil.rmtree(folder / "experiments", ignore_errors=True)
    shutil.copytree(made, run)
    file = run / case.file.removeprefix("old ")
    if file.name == "claim":
        file.write_text('{"host": "another", "pid": 1, "since": 1.0}')
    DAMAGES[case.damage](file)
    if case.file == "old claim":
        then = time.time() - LOST_AFTER_S - 1
        os.utime(file, (then, then))
    return run


def _in_process(call: Callable[[], int]) -> Outcome:
    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    GlobalHydra.instance().clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = call()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for logger in logging.Logger.manager.loggerDict.values():
                logger.disabled = False  # type: ignore[union-attr]  # Hydra switches off those it finds
    return Outcome(status, out.getvalue(), err.getvalue())


def main_in_process(folder: Path, *arguments: str) -> Outcome:
    """`python main.py ARGUMENTS`, typed in a folder."""
    before, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        with contextlib.chdir(folder):
            return _in_process(main.main)
    finally:
        sys.argv = before


def done(folder: Path, *arguments: str) -> str:
    """What a command that succeeds prints."""
    outcome = main_in_process(folder, *arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out


def refused(folder: Path, *arguments: str) -> str:
    """The one line that a command is refused with."""
    outcome = main_in_process(folder, *arguments)
    assert outcome.status == 2, outcome.out
    (line,) = outcome.err.splitlines()
    return line


def _report(run: Path) -> Outcome:
    best = ["checkpoint=best"] if (run / "test.json").exists() else []
    return _in_process(
        lambda: report.main([f"runs={run.parent}", f"out={run.parent.parent / 'report'}", *best])
    )


def _load(run: Path) -> Outcome:
    try:
        load_run(run)
    except ConfigError as error:
        return Outcome(2, "", f"error: {error}\n")
    return Outcome(0, "", "")


COMMANDS: dict[str, Callable[[Path], Outcome]] = {
    "run=RUN": lambda run: main_in_process(run.parent, f"run={run}"),
    "task=test": lambda run: main_in_process(run.parent, f"run={run}", "task=test"),
    "task=predict": lambda run: main_in_process(run.parent, f"run={run}", "task=predict"),
    "the same command": lambda run: main_in_process(run.parents[2], *STATE),
    "report.py": _report,
    "load_run": _load,
}


def outcome(made: Path, folder: Path, case: Case) -> Outcome:
    """What a command comes to on a copy of the run that is damaged."""
    run = damaged(made, folder, case)
    done = COMMANDS[case.command](run)
    out, err = (text.replace(str(run), "RUN").replace(str(folder), "DIR") for text in (done.out, done.err))
    return Outcome(done.status, out, err)


def problem(case: Case, done: Outcome) -> str:
    """What is wrong with what was said; empty: one line that names the file and a way on, or it went on."""
    errors = [line for line in done.err.splitlines() if line.strip() and "Warning" not in line]
    if "Traceback" in done.out + done.err:
        return "a traceback"
    if done.status == 0:
        return ""
    file = case.file.removeprefix("old ")
    if len(errors) != 1 or not errors[0].startswith("error: "):
        return f"not one line: {errors}"
    if file not in errors[0] or ";" not in errors[0]:
        return f"no file or no way on: {errors[0]}"
    return ""


def said(case: Case, done: Outcome) -> str:
    """In a cell of the table: the error, or the notes."""
    if done.status:
        return done.err.strip().splitlines()[-1]
    file = case.file.removeprefix("old ")
    text = done.out if case.command != "report.py" else " ".join(done.out.split())
    lines = [line for line in text.splitlines() if line.startswith("note: ")]
    if case.command == "report.py":
        at = text.find(f"{file} ")
        lines = [text[at : at + 110] + "..."] if at >= 0 else []
    notes = "; ".join(line.removeprefix("note: RUN: ") for line in lines)
    return f"goes on: {notes}" if notes else "goes on"


HEAD = """\
# Damaged records: what is said, and what happens

`PYTHONPATH=.:tests python tests/damage.py`, {date}. One file of a finished and tested run of two epochs is damaged;
then each command is typed. RUN is its folder. An old claim is one whose heart stopped over two minutes ago. Where root
makes the table, it has no rows of files that may not be read.
"""


def table() -> Iterator[str]:
    """The whole table in Markdown, line by line."""
    yield HEAD.format(date=time.strftime("%Y-%m-%d"))
    wrong, every = 0, list(cases())
    with tempfile.TemporaryDirectory() as folder:
        made = make_run(Path(folder) / "made")
        for file in FILES:
            yield f"## {file}\n\n| damage | command | status | what is said |\n| --- | --- | --- | --- |"
            for case in (c for c in every if c.file == file):
                done = outcome(made, Path(folder) / "here", case)
                wrong += bool(found := problem(case, done))
                cell = (f"WRONG: {found}" if found else said(case, done)).replace("|", "\\|")
                yield f"| {case.damage} | {case.command} | {done.status} | {cell} |"
            yield ""
    yield f"{len(every)} cells, {wrong} of them a traceback or a riddle."


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
