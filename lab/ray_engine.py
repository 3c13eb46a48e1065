"""Tasks of Ray, for machines without SLURM: each composes its configuration on its node, with GPUs of its own.

Ray finds the room, and notices a machine that is lost: its runs go on elsewhere, from their last states. What a task
does on its node is `lab/remote.py`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig

from crucible.console import say
from crucible.liveness import stopping_signals
from crucible.options import ConfigError
from lab.executors import Errand, check_trainer, left_to_the_node, options_of
from lab.planning import Planned
from lab.remote import SAVE_S, watched

SEE = "cli_configs/sweep/ray.yaml"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_IMPORT_WARNING": "1",
}  # fmt: skip
OF_A_MACHINE = ("RAY_", "SLURM_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # not handed on to another


@dataclass(frozen=True)
class RayOptions:
    """What a task asks Ray for."""

    address: Annotated[
        str | None, "HOST:PORT, auto; null: RAY_ADDRESS or this machine's cluster, else one of its own"
    ] = None
    gpus: Annotated[
        int | float | None, "[0, inf)", "of a run; null: trainer.devices, or none in a cluster without GPUs"
    ] = None
    cpus: Annotated[int | float, "[0, inf)", "of a run"] = 1
    jobs_at_once: Annotated[int, "[1, inf)", "waiting or running"] = 64
    restarts: Annotated[int, "[0, inf)", "of a run whose machine was lost"] = 3
    resources: Annotated[dict[str, Any], "further ones of Ray"] = field(default_factory=dict)


class RayHandle:
    """A task that has been submitted, again where its machine was lost.

    Args:
        executor: submits it.
        errand: what it was told.
        name: of the run, for the reader.
    """

    def __init__(self, executor: RayExecutor, errand: Errand, name: str) -> None:
        self._executor, self._errand, self._name = executor, errand, name
        self._restarts = 0
        self._asked: int | None = None  # the signal that is to be handed on
        self._stopped = False
        self._end = "failed", "it ended without a word"
        self._task = executor.submit(errand, again=False)

    def ended(self, timeout: float) -> bool:
        ray = self._executor.ray
        if self._asked is not None:
            ray.cancel(self._task, force=self._asked == signal.SIGKILL)
            self._asked = None
        if not ray.wait([self._task], timeout=timeout)[0]:
            return False
        try:
            status = ray.get(self._task)
            self._end = "failed", f"its process ended with status {status}; {self._errand.log} may say why"
        except ray.exceptions.TaskCancelledError:
            self._end = "interrupted", "stopped"
        except ray.exceptions.RayTaskError as error:
            self._end = "failed", _last_line(error)
        except ray.exceptions.RayError as error:
            return not self._goes_on(error)
        if self._stopped:
            self._end = "interrupted", "stopped"
        return True

    def _goes_on(self, error: Exception) -> bool:
        """Whether the run of a machine, or worker, that was lost was started elsewhere."""
        why = f"its machine was lost ({type(error).__name__})"
        self._end = "interrupted", f"{why}; {self._errand.log} may say more"
        if self._stopped or self._restarts == self._executor.options.restarts:
            return False
        if not self._executor.has_room():
            self._end = "interrupted", f"{why}, and no other has {self._executor.needs()}"
            return False
        self._restarts += 1
        count = f"{self._restarts} of {self._executor.options.restarts}"
        say(f"{self._name}: {why}; it goes on elsewhere ({count})")
        self._task = self._executor.submit(self._errand, again=True)
        return True

    def outcome(self) -> tuple[str, str]:
        return self._errand.outcome(*self._end)

    def signal(self, number: int) -> None:
        self._stopped = True
        self._asked = number  # `ended` hands it on: a signal's handler may have interrupted Ray itself


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _knock(address: str | None) -> None:
    """Ray itself asks for minutes at an address where nobody is.

    Raises:
        OSError: where nobody is.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


class RayExecutor:
    """Submits each run as a task; Ray queues those for which there is no room.

    Args:
        options: the `ray` node of the configuration.
        trainer: options of the runs' trainer.

    Raises:
        ConfigError: for options or a trainer that cannot be, or where Ray is not installed.
    """

    ray: Any

    def __init__(self, options: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        self.options = options_of(RayOptions, options, "ray", SEE)
        check_trainer(trainer)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("sweep=ray needs the extra: pip install -e '.[ray]'", see="README.md")
        self._trainer = trainer
        self.slots = self.options.jobs_at_once
        self._submitted = 0
        self._gpus: float | None = None  # None: not connected yet

    def as_checked_here(self, composed: DictConfig) -> DictConfig:
        return left_to_the_node(composed)

    def describe(self) -> str:
        return "tasks of Ray"

    def _connect(self) -> None:
        """Find the cluster or start one.

        Raises:
            ConfigError: where none answers, or none of its machines has what a run needs.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        handlers = {number: signal.getsignal(number) for number in stopping_signals()}
        address = self.options.address
        try:
            _knock(address)
            ray.init(
                address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except Exception as error:
            raise ConfigError(
                f"ray.address={address or 'null'}: {_last_line(error)[:300]}; `ray start --head` starts a cluster, "
                "ray.address=local one of this sweep's own", see=SEE,
            ) from error  # fmt: skip
        finally:
            for number, handler in handlers.items():  # Ray puts one of its own in place of SIGTERM's
                signal.signal(number, handler)
        self.ray = ray
        self._gpus = self._gpus_of_a_run()
        self._submit = ray.remote(watched).options(
            max_retries=0,
            num_cpus=self.options.cpus,
            num_gpus=self._gpus,
            resources=self.options.resources or None,
        )
        if not self.has_room():
            has = {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU")}
            raise ConfigError(
                f"ray.gpus={self.options.gpus}, ray.cpus={self.options.cpus}: no machine of the cluster has "
                f"{self.needs()}; all of them have {has or 'nothing'}", see=SEE,
            )  # fmt: skip

    def _gpus_of_a_run(self) -> float:
        if self.options.gpus is not None:
            return self.options.gpus
        if self._trainer["accelerator"] == "cpu" or not self.ray.cluster_resources().get("GPU"):
            return 0
        devices = str(self._trainer["devices"])
        return int(devices) if devices.isdigit() else 1

    def needs(self) -> str:
        """What a run asks for, in words."""
        wanted = {"GPU": self._gpus, "CPU": self.options.cpus, **self.options.resources}
        return " and ".join(f"{value} {name}" for name, value in wanted.items() if value)

    def has_room(self) -> bool:
        """Whether there is a machine that a run fits on, busy or not."""
        wanted = {"GPU": self._gpus, "CPU": self.options.cpus, **self.options.resources}
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return any(all(node.get(name, 0) >= (value or 0) for name, value in wanted.items()) for node in alive)

    def submit(self, errand: Errand, again: bool) -> Any:
        """Hand a run to Ray; its task."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_MACHINE)}
        return self._submit.remote(errand.job(SAVE_S, again), errand.log, str(Path.cwd()), environment)

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> RayHandle:
        if self._gpus is None:
            self._connect()
        self._submitted += 1
        return RayHandle(self, Errand(planned, facts, self._submitted), planned.name())
