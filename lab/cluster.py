"""Jobs of SLURM, through submitit: each composes its configuration on its own node, and survives preemption."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig, open_dict

from crucible.command_line import option
from crucible.handover import received
from crucible.options import ConfigError, read_options
from crucible.run import RunDirectory
from lab.executors import outcome_of
from lab.planning import Planned
from lab.processes import MAIN

SAVE_S = 90.0  # that a run has to save its state in
KILL_WAIT_S = 600.0


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


class ClusterJob:
    """One command on a node. A warning of SLURM ends it in good order and queues it again.

    Args:
        command: the process.
        environment: added to the node's; SLURM's own variables are kept from it, as they would be taken for
            those of a run whose ranks SLURM starts.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = command, dict(environment)

    def __call__(self) -> int:
        """The command's exit status."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
        self._process = subprocess.Popen(
            self.command, env={**inherited, **self.environment}, start_new_session=True
        )
        self._terminated = False
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            status = self._process.wait()
            if (
                self._terminated
            ):  # cancelled or preempted: SLURM kills this process; returning would be success
                time.sleep(KILL_WAIT_S)
            return status
        except KeyboardInterrupt:
            self._end()
            return 128 + signal.SIGINT
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _terminate(self, number: int, frame: Any) -> None:
        self._terminated = True
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + SAVE_S
        while time.monotonic() < deadline and not self._has_ended():
            time.sleep(0.05)

    def _has_ended(self) -> bool:
        # in a signal's handler Popen.wait would not see it: the wait that the signal interrupts has its lock
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True

    def checkpoint(self) -> Any:
        """Called by submitit on preemption or timeout: what is queued instead."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(ClusterJob(self.command, self.environment))


class ClusterHandle:
    """A job that has been submitted."""

    def __init__(self, job: Any, record: Path, planned: Planned) -> None:
        self._job, self._record, self._planned = job, record, planned

    def ended(self, timeout: float) -> bool:
        if self._job.done():
            return True
        time.sleep(timeout)
        return False

    def outcome(self) -> tuple[str, str]:
        try:
            content = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = str(self._job.state).lower()
            return (
                "failed",
                f"its job {self._job.job_id} ended ({state}); {self._job.paths.stderr} may say why",
            )
        if content["run"] is None:
            return "failed", content["reason"]
        run = RunDirectory(content["run"])  # on a node with another device it is another run than was planned
        if self._planned.job is not None:
            self._planned.job = replace(self._planned.job, run=run)
        return outcome_of(run, content["status"])

    def signal(self, number: int) -> None:
        self._job.cancel(check=False)


class ClusterExecutor:
    """Submits each job on its own, so many in the queue at once.

    Args:
        options: the `cluster` node of the configuration.
        trainer: options of the runs' trainer.

    Raises:
        ConfigError: for options that submitit does not take, or where it is not installed.
    """

    def __init__(self, options: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        for name in options:
            if name not in ClusterOptions.__dataclass_fields__:
                raise ConfigError(f"cluster.{name}: no such option", see="cli_configs/sweep/submitit.yaml")
        self._options = read_options(ClusterOptions, options, prefix="cluster")
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("sweep=submitit needs the extra: pip install -e '.[sweeps]'", see="README.md")
        if trainer["num_nodes"] > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer['num_nodes']}: a job of a sweep has one node; start the run by srun",
                see="docs/sweeps.md",
            )
        self.slots = self._options.jobs_at_once
        self._submitted = 0
        self._executor: Any = None

    def as_checked_here(self, composed: DictConfig) -> DictConfig:
        """A machine without a GPU cannot say what its nodes can: what depends on the device is left to them."""
        if self._options.executor == "slurm" and not torch.cuda.is_available():
            with open_dict(composed):
                composed.trainer.update(accelerator="auto", devices=1, precision=None, sync_batchnorm=None)
        return composed

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
            executor.update_parameters(
                **{k: v for k, v in {**parameters, **o.parameters}.items() if v is not None}
            )
        except (NameError, TypeError, RuntimeError) as error:
            raise ConfigError(f"cluster: {' '.join(str(error).split())}") from error
        return executor

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> ClusterHandle:
        folder = Path(facts["folder"])
        if self._executor is None:
            self._executor = self._start(folder)
        self._submitted += 1
        record = folder / "jobs" / f"{self._submitted}.json"
        record.parent.mkdir(exist_ok=True)
        told = replace(received(), sweep=dict(facts), record=str(record), trial=planned.trial)
        named = [o for o in planned.overrides if not o.startswith("arm=")] + [option("arm", planned.arm)]
        job = self._executor.submit(ClusterJob([sys.executable, str(MAIN), *named], told.environment()))
        return ClusterHandle(job, record, planned)
