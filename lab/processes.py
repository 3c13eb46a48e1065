"""A recorded run in a process, and a process group, of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from crucible.command_line import option
from crucible.handover import received
from crucible.liveness import stopping_signals, this_process
from crucible.memory import ended_by, kills
from crucible.run import RunDirectory
from lab.ranks import clear_away, last_word
from lab.warm import Cold, Started, WarmParent

MAIN = Path(__file__).resolve().parent.parent / "main.py"
HELD = 75  # exit status of a job whose run another live process holds


class Process:
    """A recorded run in a process (and a process group) of its own, which ends when this process does.

    Attributes:
        unsaid: after `outcome`, why the run did not go on, where no process of it could say so.

    Args:
        run: recorded.
        environment: added to this process's.
        trial: the trial of a search that the run is.
        output: where the process's lines go; None: where ours go.
        warm: starts the process where it can; without one, or where it cannot, the start is a real one.
        typed: the options beside `run=RUN`.
    """

    def __init__(
        self,
        run: RunDirectory,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
        trial: Mapping[str, Any] | None = None,
        warm: WarmParent | None = None,
        typed: Sequence[str] = (),
    ) -> None:
        self.run, self.unsaid = run, ""
        self._stopped, self._ranks, self._kills = False, secrets.token_hex(4), kills()
        told = replace(
            received(), does_the_work=True, started=time.time(), trial=dict(trial) if trial else None,
            parent=this_process(), ranks=self._ranks, place=None,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(output.open("ab")) if output else None
            everything = {**os.environ, **(environment or {}), **told.environment()}
            self._process = _started([str(MAIN), option("run", run.path), *typed], everything, stream, warm)

    def signal(self, number: int) -> None:
        """Hand a signal on to the run and its ranks."""
        self._stopped = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # a warm parent may not have told us yet of its end
                os.killpg(self._process.pid, number)

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, after waiting for at most `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def outcome(self) -> int:
        """Clean up after its end, record a death that it could not record itself; the exit status."""
        _end_group(self._process.pid)
        run, status = self.run, self._process.wait()
        if run.state() == "running":  # another process holds it; a warm parent that has died cannot say so
            return HELD
        summary = run.summary()
        outcome = summary.get("status")
        if outcome not in ("finished", "interrupted", "pruned") and status != HELD:
            cause = last_word(run, self._ranks)
            reason = cause.reason if cause else summary.get("reason") if outcome == "failed" else ""
            killed = status == -signal.SIGKILL or (cause is not None and cause.killed)
            if not reason:
                reason = self.unsaid = self._death(status)
            ended, reason = (
                ("interrupted", "stopped")
                if self._stopped
                else ("interrupted" if killed else "failed", reason)
            )
            run.update_summary(status=ended, reason=reason, ended=time.time())
            run.release(self._process.pid)
        clear_away(run, self._ranks)
        return status if status >= 0 else 128 - status

    def _death(self, status: int) -> str:
        """Of a process that could not record it."""
        several = (self.run.path / f"ranks.{self._ranks}").is_dir()
        who = "rank 0" if several else "its process"
        if status < 0:
            return f"{who}: {ended_by(-status, self._kills)}"
        return f"{who} ended with status {status}; {self.run.path / 'main.log'} may say why"


def run_command(arguments: Sequence[str]) -> int:
    """Run `main.py ARGUMENTS` in a process (and group) of its own, which ends when this one does; its status."""
    told = replace(received(), parent=this_process(), place=None)
    process = _started([str(MAIN), *arguments], {**os.environ, **told.environment()}, None, None)

    def stop(number: int) -> None:
        raise SystemExit(128 + number)

    try:
        with on_signals(stop):
            status = process.wait()
    finally:
        _end_group(process.pid)
    return status if status >= 0 else 128 - status


def _started(
    arguments: list[str], environment: dict[str, str], stream: BinaryIO | None, warm: WarmParent | None
) -> subprocess.Popen[bytes] | Started:
    if warm is not None:
        with contextlib.suppress(Cold):
            output = stream.fileno() if stream else None
            return warm.start(arguments, environment, output, output)
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, start_new_session=True,
        stdout=stream, stderr=subprocess.STDOUT if stream else None,
    )  # fmt: skip


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Let `handle` have the signals that stop a run."""
    previous = {n: signal.signal(n, lambda number, frame: handle(number)) for n in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_group(group: int) -> None:
    """No rank outlives its run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
