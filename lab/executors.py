"""Where the jobs of a sweep run: processes of this machine, as many at once as it has room for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from omegaconf import DictConfig, open_dict

from crucible.command_line import option
from crucible.handover import received
from crucible.machine import core_count, device_count, device_kind
from crucible.options import ConfigError, read_options
from crucible.run import Damaged, Held, RunDirectory
from lab.experiment import Changed
from lab.planning import SEE, TO_RUN, Planned, SweepOptions, carried_by_runs
from lab.processes import HELD, MAIN, Process, on_signals
from lab.remote import RemoteJob, read_record
from lab.warm import THREADS, Cold, WarmParent

POLL_S = 0.05
Options = TypeVar("Options")


class Handle(Protocol):
    """A job that has been started."""

    def ended(self, timeout: float) -> bool:
        """Whether it has ended, after waiting at most `timeout` seconds."""

    def outcome(self) -> tuple[str, str]:
        """State and reason, after its end."""

    def signal(self, number: int) -> None:
        """Ask it to stop."""


class Executor(Protocol):
    """Where jobs run, and how many at once."""

    slots: int

    def as_checked_here(self, composed: DictConfig) -> DictConfig:
        """The configuration as the planning machine can check it."""

    def describe(self) -> str:
        """In a few words."""

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> Handle:
        """Start a job.

        Raises:
            Held: where its run is held by a live process.
            Changed: where another process has run it since its state was looked at.
        """


OF_ONE_RUN = (Damaged, PermissionError)  # errors of its folder, which stop no other run of a sweep


def outcome_of(run: RunDirectory, status: int) -> tuple[str, str]:
    """State and reason of a run whose process has ended."""
    if status == HELD:
        return "held", f"in progress {run.holder()}"
    summary = run.known()
    return str(summary.get("status", "failed")), str(summary.get("reason", ""))


def options_of(cls: type[Options], node: Mapping[str, Any], name: str, see: str) -> Options:
    """An engine's options.

    Args:
        cls: says what they are.
        node: as composed, under `name`.
        see: the file that states them.

    Raises:
        ConfigError: for one that is unknown or wrong.
    """
    for key in node:
        if key not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            raise ConfigError(f"{name}.{key}: no such option", see=see)
    return read_options(cls, node, prefix=name)


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """A job elsewhere has one machine, and there the devices that its engine gives it.

    Raises:
        ConfigError: where its trainer asks for more machines, or names devices.
    """
    if trainer["num_nodes"] > 1:
        raise ConfigError(
            f"trainer.num_nodes={trainer['num_nodes']}: a job of a sweep has one node; start the run by srun",
            SEE,
        )
    devices = trainer["devices"]
    if isinstance(devices, list) or "," in str(devices):
        named = str(devices).replace(" ", "")
        raise ConfigError(
            f"trainer.devices={named}: a job elsewhere gets devices of its own, whichever are free; give their "
            f"number (trainer.devices={device_count(trainer)})", SEE,
        )  # fmt: skip


def left_to_the_node(composed: DictConfig) -> DictConfig:
    """The configuration without what depends on the device: a machine without a GPU cannot say what others can."""
    if not torch.cuda.is_available():
        with open_dict(composed):
            composed.trainer.update(accelerator="auto", devices=1, precision=None, sync_batchnorm=None)
    return composed


class Errand:
    """A job on another machine: what it is told, and what it says in return, over a shared file system.

    Args:
        planned: what it is to run.
        facts: of the sweep.
        number: among the jobs that this process starts.
    """

    def __init__(self, planned: Planned, facts: Mapping[str, Any], number: int) -> None:
        self._planned = planned
        folder = Path(facts["folder"]) / "jobs"
        folder.mkdir(exist_ok=True)
        # processes that share a search share its folder
        self.record = folder / f"{planned.errand}{number}-{socket.gethostname()}-{os.getpid()}.json"
        told = replace(received(), sweep=carried_by_runs(facts), record=str(self.record), trial=planned.trial)
        named = [o for o in planned.overrides if not o.startswith("arm=")] + [option("arm", planned.arm)]
        self._command, self._environment = [sys.executable, str(MAIN), *named], told.environment()

    @property
    def log(self) -> str:
        """Where its lines go, if its engine keeps none."""
        return str(self.record.with_suffix(".log"))

    def job(self, save_s: float, again: bool = False) -> RemoteJob:
        """What to run there; it has `save_s` seconds to save its state in."""
        return RemoteJob(self._command, self._environment, str(self.record), save_s, HELD, again)

    def outcome(self, state: str, reason: str) -> tuple[str, str]:
        """State and reason of the job after its end.

        Args:
            state, reason: what it was if it could not say so itself.
        """
        freshly_listed(self.record.parent)
        told = read_record(self.record)
        if told.get("run") is None:
            return state, told.get("reason") or reason
        run = RunDirectory(told["run"])  # on a node with another device it is another run than was planned
        if self._planned.job is not None:
            self._planned.job = replace(self._planned.job, run=run)
        if told["status"] is None and run.summary().get("status") not in (
            "finished",
            "interrupted",
            "pruned",
        ):
            run.update_summary(status=state, reason=reason, ended=time.time())
        return outcome_of(run, told["status"] or 0)


def freshly_listed(folder: Path) -> None:
    """Let a network file system look what is in the folder now."""
    with contextlib.suppress(OSError):
        folder.chmod(folder.stat().st_mode)


class LocalHandle:
    """A run in a process of its own on this machine."""

    def __init__(self, run: RunDirectory, process: Process) -> None:
        self._run, self._process = run, process

    def ended(self, timeout: float) -> bool:
        return self._process.ended(timeout)

    def outcome(self) -> tuple[str, str]:
        return outcome_of(self._run, self._process.outcome())

    def signal(self, number: int) -> None:
        self._process.signal(number)


class LocalExecutor:
    """Runs on this machine, `n_jobs` at once, each with GPUs of its own where there are enough.

    Args:
        n_jobs: runs at once; `auto`: as many as the GPUs make room for, 1 without a GPU.
        trainer: options of the runs' trainer.

    Raises:
        ConfigError: where the runs name their devices.
    """

    def __init__(self, n_jobs: int | Literal["auto"], trainer: Mapping[str, Any]) -> None:
        self._each = device_count(trainer)
        self._asked = False
        self._warm: WarmParent | None = None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
        self._gpus = [gpu for gpu in gpus if gpu] if device_kind(trainer["accelerator"]) == "cuda" else []
        self.slots = max(1, len(self._gpus) // self._each) if n_jobs == "auto" else n_jobs
        if self.slots > 1 and self._gpus and not isinstance(trainer["devices"], int):
            raise ConfigError(
                f"trainer.devices={trainer['devices']}: with n_jobs={n_jobs} each run gets GPUs of its own; "
                "give their number", SEE,
            )  # fmt: skip

    def as_checked_here(self, composed: DictConfig) -> DictConfig:
        return composed

    def describe(self) -> str:
        if self.slots == 1:
            return "one after the other"
        shared = len(self._gpus) < self.slots * self._each
        where = f" sharing {len(self._gpus)} GPUs (their times are no measure of cost)" if shared else ""
        return f"{self.slots} at once{where if self._gpus else ''}"

    def _environment(self, slot: int) -> dict[str, str]:
        if self.slots == 1:
            return {}
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, core_count() // self.slots)))
        mine = [
            self._gpus[(slot * self._each + i) % len(self._gpus)] for i in range(self._each) if self._gpus
        ]
        return {"OMP_NUM_THREADS": threads} | (
            {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(mine))} if mine else {}
        )

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> LocalHandle:
        run = planned.record(facts)
        output = run.path / "console.log" if self.slots > 1 else None
        environment = self._environment(slot)
        process = Process(run, environment, output, planned.trial, self._warm_parent(environment))
        return LocalHandle(run, process)

    def _warm_parent(self, environment: Mapping[str, str]) -> WarmParent | None:
        """What starts this sweep's jobs. It is asked for with the first one, which would have to load as much."""
        if not self._asked:
            self._asked = True
            threads = {name: value for name, value in environment.items() if name == THREADS}
            with contextlib.suppress(Cold):
                self._warm = WarmParent({**os.environ, **threads})
        return self._warm


@dataclass
class Work:
    """Runs jobs, as many at once as the executor has room for, until there are no more or a signal comes.

    Args:
        executor: where they run.
        facts: what the summaries say of the sweep.
        ended: told of each job that has ended.
        refresh: sets the state of a job anew, by its run.
    """

    executor: Executor
    facts: Mapping[str, Any]
    ended: Callable[[Planned], None]
    refresh: Callable[[Planned], None] = lambda planned: planned.refresh(SweepOptions())
    received: list[int] = field(default_factory=list)
    _running: dict[int, tuple[Planned, Handle]] = field(default_factory=dict)

    def run(self, following: Iterator[Planned]) -> None:
        """Run what `following` gives; it is asked when there is room."""
        exhausted = False
        with on_signals(self._stop):
            while self._running or not (exhausted or self.received):
                free = [slot for slot in range(self.executor.slots) if slot not in self._running]
                if free and not exhausted and not self.received:
                    planned = next(following, None)
                    exhausted = planned is None
                    if planned is not None:
                        self._begin(planned, free[0])
                    continue
                for slot, (planned, handle) in list(self._running.items()):
                    if handle.ended(POLL_S):
                        try:
                            planned.state, planned.reason = handle.outcome()
                        except OF_ONE_RUN as error:
                            planned.state, planned.reason = "failed", str(error)
                        if planned.state not in ("finished", "held"):
                            planned.ended_here = planned.state, planned.reason
                        del self._running[slot]
                        self.ended(planned)

    def _begin(self, planned: Planned, slot: int) -> None:
        try:
            handle = self.executor.start(planned, slot, self.facts)
        except Held as error:
            planned.state, planned.reason = "held", str(error)
            self.ended(planned)
            return
        except OF_ONE_RUN as error:
            planned.state, planned.reason = planned.ended_here = "failed", str(error)
            self.ended(planned)
            return
        except Changed:
            self.refresh(planned)
            if planned.state in TO_RUN:
                self._begin(planned, slot)
            else:
                self.ended(planned)
            return
        self._running[slot] = planned, handle
        for number in self.received[-1:]:  # it came while the process was being started
            handle.signal(number)

    def _stop(self, number: int) -> None:
        """The first signal is handed on, and each run saves its state; the second one ends them at once."""
        self.received.append(number)
        for _, handle in self._running.values():
            handle.signal(number if len(self.received) == 1 else signal.SIGKILL)
