"""A sweep's job on another machine: one command, which saves its state when it is asked to stop, and leaves nothing.

Both engines of several machines (`lab/cluster.py`, `lab/ray_engine.py`) run their jobs by it. It imports nothing heavy,
so that only milliseconds pass before it can be warned. `python -m lab.remote` is the job of a process that may be
killed: it ends with what stands at the other end of its standard input.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crucible.files import write_atomically
from crucible.handover import VARIABLE, HandOver
from crucible.launch import job_here
from crucible.liveness import stopping_signals
from crucible.run import HEARTBEAT_S, LOST_AFTER_S, RunDirectory

POLL_S = 0.05
SAVE_S = 90.0  # that a run has to save its state in, where nothing says for how long it may
AGAIN_S = 5.0  # between two looks at a run that a lost machine seems to hold


@dataclass(frozen=True)
class RemoteJob:
    """One command on a node.

    Args:
        command: it composes a run and trains it.
        environment: added to the node's; variables of SLURM and submitit are kept from it, as they would be taken
            for those of a run whose ranks SLURM starts.
        record: where the command says which run it is and how it ended.
        save_s: seconds that it has to save its state in.
        held: its status in the record where another process holds the run.
        again: it was started before, on a machine that was lost: a run that this machine seems to hold is waited for.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    record: str
    save_s: float
    held: int
    again: bool = False

    def run(self, stopping: Callable[[], bool]) -> int:
        """Run it to its end, or until it has saved its state after `stopping` came true; its exit status.

        What it could not record itself, as it was killed, is recorded.
        """
        deadline = time.monotonic() + LOST_AFTER_S + 2 * HEARTBEAT_S
        while True:
            Path(self.record).unlink(missing_ok=True)  # one of before would be taken for this one's
            status = self._run(stopping)
            if not (self.again and self.was_held()) or time.monotonic() > deadline:
                return status
            until = time.monotonic() + AGAIN_S
            while time.monotonic() < until:
                if stopping():
                    return status
                time.sleep(POLL_S)

    def was_held(self) -> bool:
        """Whether it left its run to the process that holds it."""
        return read_record(Path(self.record)).get("status") == self.held

    def _run(self, stopping: Callable[[], bool]) -> int:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
        environment = {**inherited, **self.environment}
        told = HandOver(**json.loads(environment.get(VARIABLE) or "{}"))
        named = replace(told, job=job_here()).environment()  # the variables that say it are kept from the run
        process = subprocess.Popen(
            self.command,
            env={**environment, **named},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = math.inf
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if stopping() and deadline == math.inf:
                    deadline = time.monotonic() + self.save_s
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                time.sleep(POLL_S)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        self._account_for(process.pid, status, stopping())
        return status

    def _account_for(self, pid: int, status: int, stopped: bool) -> None:
        """Record the end of a process that was killed before it could."""
        told = read_record(Path(self.record))
        if told.get("status") is not None:
            return
        run = RunDirectory(told["run"]) if told.get("run") else None
        killed = status == -signal.SIGKILL  # from outside, for memory most often: nothing that the run did
        by = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        by += " (as it is done for memory)" if killed else ""
        reason = "stopped" if stopped else f"its process {by} on {os.uname().nodename}"
        if run is not None:
            if run.known().get("status") not in ("finished", "interrupted", "pruned"):
                run.update_summary(
                    status="interrupted" if stopped or killed else "failed", reason=reason, ended=time.time()
                )
            run.release(pid)
        content = {
            "run": told.get("run"),
            "status": status if status >= 0 else 128 - status,
            "reason": reason,
        }
        write_atomically(Path(self.record), json.dumps(content))


def read_record(file: Path) -> dict[str, Any]:
    """What a job has said so far: `run`, `status` (None: it has begun) and `reason`; empty before its run is known."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# SLURM, by submitit

WARNING = "SUBMITIT_PREEMPT_SIGNAL"  # submitit's own variable


class ClusterJob:
    """What submitit calls on the node. A warning of SLURM ends the job in good order and queues it again."""

    def __init__(self, job: RemoteJob) -> None:
        self.job = job

    def __call__(self) -> int:
        """The command's exit status.

        Raises:
            SystemExit: where the job goes on in another one, or was cancelled: SLURM says the rest.
        """
        received: list[int] = []

        def note(number: int, frame: Any) -> None:  # what takes time is done by the loop that waits
            received.append(number)

        warning = getattr(signal, f"SIG{os.environ.get(WARNING, 'USR2')}")
        submitits = signal.getsignal(warning)
        for number in (warning, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
        again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        status = replace(self.job, again=again).run(lambda: bool(received))
        ended_by_itself = 0 <= status < 128 and not self.job.was_held()
        if not received or ended_by_itself or received[0] == signal.SIGINT:
            return status
        if warning in received or _goes_on_running():
            assert callable(submitits)
            submitits(warning, None)  # queues what `checkpoint` returns, and exits
        raise SystemExit(128 + received[0])  # a return would be a success

    def checkpoint(self) -> Any:
        """Called by submitit: what is queued instead of this job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(ClusterJob(self.job))


def _goes_on_running() -> bool:
    """Whether SLURM has no other end in mind for this job: it was asked to make room, within a time of grace."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    shown = subprocess.run(
        ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, check=False
    )
    return "JobState=RUNNING" in shown.stdout


# Ray


def watched(job: RemoteJob, log: str, folder: str, environment: Mapping[str, str]) -> int:
    """What a worker of Ray runs; the command's exit status. The command ends with the worker, however that ends.

    Args:
        job: to run.
        log: where its lines go.
        folder: where it is run.
        environment: of the sweep; what this machine has set itself holds.
    """
    told = {**environment, **os.environ, "PYTHONPATH": environment["PYTHONPATH"]}
    with (
        Path(log).open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "lab.remote"], cwd=folder, env=told, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(f"{json.dumps(asdict(job))}\n")
        process.stdin.flush()
        try:
            while process.poll() is None:  # a cancel arrives between two steps of the interpreter
                time.sleep(POLL_S)
        finally:
            process.stdin.close()
            process.wait()  # it saves its state, for as long as it may
    return process.returncode


def main() -> int:
    """Run the job that the first line of standard input describes, until it ends or the input does."""
    job = RemoteJob(**json.loads(sys.stdin.readline()))
    stops: list[int] = []
    for number in stopping_signals():
        signal.signal(number, lambda number, frame: stops.append(number))

    def watch() -> None:
        sys.stdin.read()
        stops.append(signal.SIGHUP)

    threading.Thread(target=watch, daemon=True).start()
    status = job.run(lambda: bool(stops))
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
