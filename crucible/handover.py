"""What a process is told by the one that started it, in one environment variable; its own children inherit it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

VARIABLE = "CRUCIBLE"


@dataclass(frozen=True)
class HandOver:
    """From parent to child process.

    Attributes:
        tracebacks: the user wants them (HYDRA_FULL_ERROR=1); None: nobody has looked yet.
        does_the_work: this process is the run's own, which starts no other for it.
        started: seconds since the epoch at which the process was asked for; its imports take seconds.
        resume: the training state that all ranks of the run start from; empty: none; None: rank 0 decides.
        sweep: what the summary of a sweep's job says of the sweep.
        record: where a job on another machine says which run it was and how it ended.
        trial: the trial of a search that the run is.
        user_dir: the folder of the user's own code that was typed; its modules may be followed.
        typed: `option=module.Class` that were typed and lie elsewhere; they may be followed too.
        parent: the process that this one does not outlive, as `crucible.liveness` describes it.
        ranks: the name under which the ranks of this start of a run know one another.
        place: rank in the run, on the machine, the machine's number, and how many processes the run has; of the
            ranks that Crucible starts.
        alone: this process is none of several, whatever a launcher's variables say.
        job: what a cluster calls the job that this process is of.
    """

    tracebacks: bool | None = None
    does_the_work: bool = False
    started: float | None = None
    resume: str | None = None
    sweep: dict[str, Any] | None = None
    record: str | None = None
    trial: dict[str, Any] | None = None
    user_dir: str | None = None
    typed: list[str] = field(default_factory=list)
    parent: dict[str, Any] | None = None
    ranks: str = ""
    place: list[int] | None = None
    alone: bool = False
    job: str = ""

    def environment(self) -> dict[str, str]:
        """The variable, for the environment of a process."""
        return {VARIABLE: json.dumps(asdict(self))}


def received() -> HandOver:
    """What this process was told; nothing, for the one that the user started."""
    text = os.environ.get(VARIABLE)
    return HandOver(**json.loads(text)) if text else HandOver()


def pass_on(**values: Any) -> None:
    """Let the processes that this one starts know `values` as well."""
    os.environ.update(replace(received(), **values).environment())
