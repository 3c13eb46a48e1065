"""Who started this process, and which rank of its run it is.

Several processes train one run where Crucible itself starts them (it tells them by the hand-over), or where torchrun,
srun, or another launcher does. One variable of a launcher alone counts for nothing: it is left over from something
else. What srun starts is known when the run is: one run's ranks, or a run for each task.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crucible.handover import pass_on, received
from crucible.options import ConfigError

_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what each launcher of ranks sets
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on SLURM's own: the batch script, an interactive shell
_PORTS = 15000, 20000  # first, and how many: those of a step of SLURM, where nobody names one


def job_here() -> str:
    """What a cluster calls the job that this process is of, for the reader; empty for none."""
    own = os.environ
    if job := own.get("SLURM_JOB_ID"):
        array = own.get("SLURM_ARRAY_JOB_ID")
        return f"SLURM job {array}_{own.get('SLURM_ARRAY_TASK_ID')}" if array else f"SLURM job {job}"
    if job := own.get("RAY_JOB_ID"):  # Ray sets it for its workers
        return f"Ray job {job}"
    return received().job


@dataclass(frozen=True)
class Launch:
    """What started this process.

    Attributes:
        by: `nodes`: the user, by hand on each node of several, where Crucible starts the ranks of the node.
        rank: of this process in its run; of `nodes`, the node's number.
        local_rank: on this machine.
        node_rank: of the machine.
        world: the run's processes; 0 where the configuration says it.
    """

    by: Literal["nobody", "crucible", "torchrun", "srun", "another launcher", "nodes"] = "nobody"
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world: int = 1

    @property
    def starts_the_ranks(self) -> bool:
        """Whether something else than Crucible has started all processes of the run."""
        return self.by in ("torchrun", "srun", "another launcher")


def launch() -> Launch:
    """What started this process, by its environment."""
    told = received()
    if told.place is not None:
        return Launch("crucible", *told.place)
    if told.alone:
        return Launch()
    if not told.does_the_work:  # the process that started this one for the work was none of several
        found = _by_torchrun() or _by_srun() or _by_another()
        if found is not None:
            return found
    node = _number("NODE_RANK")
    if node is not None and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Launch("nodes", node, 0, node, 0)
    return Launch()


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _by_torchrun() -> Launch | None:
    return _of_the_set("torchrun") if "TORCHELASTIC_RUN_ID" in os.environ else None


def _by_another() -> Launch | None:
    found = _of_the_set("another launcher")
    return found if found is not None and found.world > 1 else None


def _of_the_set(by: Literal["torchrun", "another launcher"]) -> Launch | None:
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or world is None or not os.environ.keys() >= set(_SET):
        return None
    local = _number("LOCAL_RANK")
    return Launch(by, rank, rank if local is None else local, _number("GROUP_RANK") or 0, world)


def _by_srun() -> Launch | None:
    """In a batch script or an interactive shell the variables are there as well, but no step of srun's."""
    step, rank = _number("SLURM_STEP_ID"), _number("SLURM_PROCID")
    tasks = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1
    if step is None or step >= _FIRST_SPECIAL_STEP or rank is None or tasks < 2:
        return None
    return Launch("srun", rank, _number("SLURM_LOCALID") or 0, _number("SLURM_NODEID") or 0, tasks)


def settle(trainer: Mapping[str, Any], wanted: int) -> None:
    """Hold what started this process against the processes that a run asks for.

    Args:
        trainer: the options of the run's trainer.
        wanted: the processes that they ask for.

    Raises:
        ConfigError: where they do not fit.
    """
    found = launch()
    if found.by == "srun" and wanted == 1:  # each task a run of its own
        pass_on(alone=True)
    elif found.starts_the_ranks and found.world != wanted:
        asked = f"trainer.devices={trainer['devices']}, trainer.num_nodes={trainer['num_nodes']}"
        told = f"{found.by} started {found.world} processes"
        way_on = ""
        if found.by == "another launcher":
            told = f"{', '.join(_shown(_SET))} in the environment are those of one of {found.world} processes"
            way_on = f"; where no launcher set them: env -u {' -u '.join(_SET)} python main.py ..."
        raise ConfigError(f"{asked}: {told}, these options ask for {wanted}{way_on}")
    elif found.by == "nodes" and trainer["num_nodes"] == 1:
        pass_on(alone=True)
    elif found.by == "nobody" and trainer["num_nodes"] > 1:
        raise ConfigError(
            f"trainer.num_nodes={trainer['num_nodes']}: nothing has started the other nodes; start it by srun or "
            "torchrun, or on each node with NODE_RANK, MASTER_ADDR and MASTER_PORT",
            "docs/clusters.md",
        )


def left_over() -> list[str]:
    """The variables of a launcher, as `NAME=VALUE`, that say something of a rank and count for nothing here."""
    if launch().by != "nobody" or received().does_the_work:
        return []
    named = [name for name in _RANKS if os.environ.get(name, "") not in ("", "0")]
    return _shown([*named, *(["WORLD_SIZE"] if os.environ.get("WORLD_SIZE", "") not in ("", "1") else [])])


def _shown(names: tuple[str, ...] | list[str]) -> list[str]:
    return [f"{name}={os.environ[name]}" for name in names]


def token() -> str:
    """What the processes of one launch have in common, and no other launch has."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
             "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")  # fmt: skip
    return "/".join(os.environ.get(n, "") for n in names)


def meeting_point() -> tuple[str, int]:
    """Address and port at which the ranks of a launch meet, where they have not been told one."""
    address = os.environ.get("MASTER_ADDR")
    if (port := _number("MASTER_PORT")) is None:
        job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
        port = _PORTS[0] + (job * 31 + step) % _PORTS[1]
    if address is None:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
        address = _first_of(nodes)
    return address, port


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _first_of(nodes: str) -> str:
    """The first of a list of hosts as SLURM writes it: `node[03-07,9],other`."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    number, _, tail = rest.partition("]")
    return head + number.replace("-", ",").split(",")[0] + tail.split(",")[0]
