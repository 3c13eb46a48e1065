"""Jobs of SLURM, through submitit: each composes its configuration on its own node, and survives preemption.

What a job does on its node, and when it is warned, is `lab/remote.py`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig

from crucible.console import say
from crucible.masking import masked_in
from crucible.options import ConfigError
from lab.executors import (
    Errand,
    Handle,
    check_trainer,
    freshly_listed,
    left_to_the_node,
    options_of,
)
from lab.planning import Planned
from lab.remote import SAVE_S, WARNING, ClusterJob

SEE = "cli_configs/sweep/submitit.yaml"
LOOK_S = 1.0  # between two looks at a job's files
ASK_S = (2.0, 60.0)  # between two questions to SLURM: soon after a change, and later
GONE_AFTER = 3  # answers by which a job is over
FILES_AFTER = 15  # of one that ended well: its files may take a while over a network
RESTARTS = 1000
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
FROM_OUTSIDE = ENDED - {"COMPLETED", "FAILED"}  # nothing that the run did; the same command goes on


@dataclass(frozen=True)
class ClusterOptions:
    """What a job asks the cluster for."""

    executor: Annotated[Literal["slurm", "local"], "local: processes here, for trying"] = "slurm"
    partition: str | None = None
    timeout_min: Annotated[int, "[1, inf)", "of a job, which goes on in the next one"] = 1440
    cpus_per_task: Annotated[int, "[1, inf)"] = 8
    gpus_per_node: Annotated[int, "[0, inf)"] = 1
    mem_gb: Annotated[int | float, "(0, inf)"] = 32
    jobs_at_once: Annotated[int, "[1, inf)", "in the queue or running"] = 64
    signal_delay_s: Annotated[int, "[1, inf)", "before the end of its time a job is warned"] = 120
    parameters: Annotated[dict[str, Any], "further ones of submitit"] = field(default_factory=dict)


@dataclass
class Seen:
    """A job of the queue.

    Attributes:
        state, reason: SLURM's words; empty: it was not there yet.
        unseen: answers in a row by which it had ended or was unknown.
    """

    name: str
    state: str = ""
    reason: str = ""
    unseen: int = 0


class Queue:
    """What SLURM says of a sweep's jobs: all in one question, asked seldom, and without accounting.

    A job that ends as it should is known by its files at once; this is for those that do not.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Seen] = {}
        self._asked = -math.inf
        self._silent_since: float | None = None
        self.hurry()

    def hurry(self) -> None:
        """Something is about to change: ask often for a while."""
        self._changed = time.monotonic()

    def add(self, number: str, name: str) -> None:
        """A job that has been submitted, and the run's name for the reader."""
        self._jobs[number] = Seen(name)
        self.hurry()

    def has_lost(self, number: str) -> bool:
        """Whether the job has ended or vanished, by several answers: one is wrong while a job is queued again."""
        self._ask()
        seen = self._jobs[number]
        return seen.unseen >= (FILES_AFTER if seen.state == "COMPLETED" else GONE_AFTER)

    def remove(self, number: str) -> Seen:
        """What was last seen of a job that has ended; accounting is asked only for one that SLURM has forgotten."""
        seen = self._jobs.pop(number)
        if seen.unseen and seen.state not in ENDED:
            command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={number}"]
            status, said = _ask_slurm([*command, "--format=State,ExitCode"])
            last = said.strip().rpartition("\n")[2] if status == 0 else ""
            seen.state, _, seen.reason = last.partition("|")
        return seen

    def _ask(self) -> None:
        now = time.monotonic()
        if now - self._asked < min(max(ASK_S[0], (now - self._changed) / 10), ASK_S[1]):
            return
        command = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%A|%T|%r"]
        status, said = _ask_slurm(command)
        self._asked = time.monotonic()
        if status != 0:
            if self._silent_since is None:
                self._silent_since = now
                text = " ".join(said.split())
                say(f"SLURM does not answer ({text[:200]}); waiting for it")
            return
        self._silent_since = None
        answers = dict(line.split("|", 1) for line in said.splitlines() if "|" in line)
        for number, seen in self._jobs.items():
            before = seen.state, seen.reason
            if number in answers:
                seen.state, _, seen.reason = answers[number].partition("|")
            gone = number not in answers or seen.state in ENDED
            seen.unseen = seen.unseen + 1 if gone else 0
            if (seen.state, seen.reason) != before:
                self.hurry()
                self._say(number, seen, before[0])

    def _say(self, number: str, seen: Seen, before: str) -> None:
        held = seen.state == "PENDING" and "held" in seen.reason.lower()
        if held:
            say(
                f"{seen.name}: SLURM holds job {number} ({seen.reason}): scontrol release {number}",
            )
        elif seen.state == "PENDING" and before not in ("PENDING", ""):
            say(f"{seen.name}: job {number} is queued again ({seen.reason})")


def _ask_slurm(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output, or what it said instead, of one of SLURM's commands."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


class ClusterHandle:
    """A job that has been submitted.

    Args:
        job: submitit's.
        errand: what it was told.
        queue: SLURM's; None: submitit's processes on this machine.
    """

    def __init__(self, job: Any, errand: Errand, queue: Queue | None) -> None:
        self._job, self._errand, self._queue = job, errand, queue
        self._stopped = False
        self._looked = -math.inf

    def ended(self, timeout: float) -> bool:
        if time.monotonic() - self._looked > LOOK_S and self._has_ended():
            return True
        time.sleep(timeout)
        return False

    def _has_ended(self) -> bool:
        self._looked = time.monotonic()
        if self._queue is None:
            return bool(self._job.done())
        freshly_listed(self._job.paths.folder)
        return self._job.paths.result_pickle.exists() or self._queue.has_lost(self._job.job_id)

    def outcome(self) -> tuple[str, str]:
        number = self._job.job_id
        seen = self._queue.remove(number) if self._queue else Seen("", str(self._job.state).upper())
        words = f" as {seen.state}" if seen.state else " unknown to SLURM"
        why = f" ({seen.reason})" if seen.reason not in ("", "None") else ""
        reason = f"its job {number} ended{words}{why}; {self._job.paths.stderr} may say why"
        from_outside = self._stopped or any(seen.state.startswith(state) for state in FROM_OUTSIDE)
        return self._errand.outcome("interrupted" if from_outside else "failed", reason)

    def signal(self, number: int) -> None:
        self._stopped = True
        if self._queue is not None:
            self._queue.hurry()
        self._job.cancel(check=False)


class Refused:
    """A job that could not be submitted."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def ended(self, timeout: float) -> bool:
        return True

    def outcome(self) -> tuple[str, str]:
        return "failed", self._reason

    def signal(self, number: int) -> None:
        """There is nothing to stop."""


class ClusterExecutor:
    """Submits each job on its own, so many in the queue at once.

    Args:
        options: the `cluster` node of the configuration.
        trainer: options of the runs' trainer.

    Raises:
        ConfigError: for options that submitit does not take, a trainer that a job cannot have, or where it is not
            installed.
    """

    def __init__(self, options: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        self._options = options_of(ClusterOptions, options, "cluster", SEE)
        check_trainer(trainer)
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("sweep=submitit needs the extra: pip install -e '.[sweeps]'", see="README.md")
        o = self._options
        if o.executor == "slurm" and o.signal_delay_s >= 60 * o.timeout_min:
            raise ConfigError(
                f"cluster.signal_delay_s={o.signal_delay_s}: a job of cluster.timeout_min={o.timeout_min} would be "
                f"warned before it has begun; less than {60 * o.timeout_min} s", see=SEE,
            )  # fmt: skip
        self.slots = o.jobs_at_once
        self._queue = Queue() if o.executor == "slurm" else None
        self._save_s = max(o.signal_delay_s - 15.0, o.signal_delay_s / 2) if self._queue else SAVE_S
        self._submitted = 0
        self._executor: Any = None

    def as_checked_here(self, composed: DictConfig) -> DictConfig:
        return left_to_the_node(composed) if self._options.executor == "slurm" else composed

    def describe(self) -> str:
        return f"jobs of {'SLURM' if self._options.executor == 'slurm' else 'this machine'}"

    def _start(self, folder: Path) -> Any:
        import submitit

        o = self._options
        try:
            executor = submitit.AutoExecutor(
                folder / "submitit", cluster=o.executor, slurm_max_num_timeout=1000
            )
            parameters: dict[str, Any] = {"timeout_min": o.timeout_min, "name": "crucible"}
            if o.executor == "slurm":
                parameters |= {
                    "cpus_per_task": o.cpus_per_task, "gpus_per_node": o.gpus_per_node, "mem_gb": o.mem_gb,
                    "slurm_partition": o.partition, "slurm_signal_delay_s": o.signal_delay_s,
                }  # fmt: skip
            parameters |= o.parameters
            if o.executor == "slurm":
                more, end = (
                    parameters.get(f"slurm_{name}") for name in ("additional_parameters", "teardown")
                )
                # some clusters queue nothing again unless asked to
                parameters["slurm_additional_parameters"] = {"requeue": True, **(more or {})}
                parameters["slurm_teardown"] = _requeue_what_died_early(end or [])
            executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
        except (NameError, TypeError, RuntimeError) as error:
            raise ConfigError(f"cluster: {' '.join(str(error).split())}") from error
        return executor

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> Handle:
        if self._executor is None:
            self._executor = self._start(Path(facts["folder"]))
        hide_secrets(Path(facts["folder"]) / "submitit", planned.trial)
        self._submitted += 1
        errand = Errand(planned, facts, self._submitted)
        try:
            job = self._executor.submit(ClusterJob(errand.job(self._save_s)))
        except RuntimeError as error:  # submitit's, with what sbatch said
            lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
            return Refused(f"could not be submitted: {lines[-1] if lines else ' '.join(str(error).split())}")
        if self._queue is not None:
            self._queue.add(job.job_id, planned.name())
        return ClusterHandle(job, errand, self._queue)


def hide_secrets(folder: Path, trial: Mapping[str, Any] | None) -> None:
    """Keep others out of submitit's folder where its pickles tell a job the password of a search's database."""
    if masked_in(trial) != trial:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def _requeue_what_died_early(teardown: Sequence[str]) -> list[str]:
    """The end of the job's script: a warning before the job could take it killed Python, and is no failure.

    Args:
        teardown: the user's own lines.
    """
    warning = getattr(signal, f"SIG{os.environ.get(WARNING, 'USR2')}")
    early = " ".join(f'[ "$crucible_status" = {128 + number} ] ||' for number in (warning, signal.SIGTERM))
    return [
        "crucible_status=$?",
        *teardown,
        f'if {{ {early} false; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {RESTARTS} ] &&',
        '   scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$crucible_status"',
    ]
