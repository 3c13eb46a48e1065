"""What a sweep would do: arms and seeds in one line become jobs, each examined, with the state its run is in.

What is finished, held by another machine, lost or impossible is known before anything starts.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crucible.command_line import describe
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.trust import judge
from lab.config import SWEEP_OPTIONS
from lab.experiment import Examiner, Job, attempt_of, passes
from lab.recorded import completed

SEE = "docs/sweeps.md"
UNITS = ("seed", "data.module.fold")  # what arms are paired by
Compose = Callable[[Sequence[str]], DictConfig]


@dataclass(frozen=True)
class SweepOptions:
    """What a multirun does with its jobs."""

    design: Annotated[
        Literal["one_at_a_time", "pairs", "leave_one_out"] | None, "of the techniques swept; null: as typed"
    ] = None
    dry_run: Annotated[bool, "print what would run, how long and how much disk, and stop"] = False
    retry_failed: Annotated[bool, "run again, from their last state, those that failed"] = False
    baseline: Annotated[str | None, "the arm that the others are compared with"] = None
    equal_time: Annotated[bool, "for each slower arm also the baseline trained for as long"] = False
    margin_points: Annotated[float | None, "(0, 100)", "differences below do not matter"] = 0.3
    planned_seeds: Annotated[int | list[int] | None, "[1, inf)", "seeds planned, or a list of looks"] = None
    until: Annotated[
        Literal["decided"] | None,
        "run only the seeds that the plan's looks ask for; null: all that are swept",
    ] = None
    looks: Annotated[list[int] | None, "[3, inf)", "planned numbers of seeds; null: 5, 8, 12 and 20"] = None
    decided_by: Annotated[str | None, "the metric that decides; null: test/acc"] = None
    budget_hours: Annotated[float | None, "(0, inf)", "of the runs of all looks, added up"] = None
    budget_runs: Annotated[int | None, "[1, inf)", "of all looks, the baseline's too"] = None
    drop_failed: Annotated[bool, "go on without the pairs of runs that failed"] = False
    n_jobs: Annotated[int | Literal["auto"], "[1, inf)", "runs at once on this machine"] = 1


class Grid(NamedTuple):
    """The jobs of a sweep as overrides, arms innermost; `swept` differ between them."""

    jobs: list[list[str]]
    swept: list[str]
    generated: bool  # by a design, which may make pairs that cannot be


def expand(overrides: Sequence[Override], design: str | None) -> Grid:
    """Every combination of what the overrides sweep; techniques combined by the design.

    All arms of a seed come before the next seed, so that a sweep cut short is a comparison already.

    Raises:
        ConfigError: for a sweep without steps, or a design without techniques.
    """
    axes: dict[str, list[str]] = {}
    swept: list[str] = []
    for override in overrides:
        name = override.get_key_element()
        if name.lstrip("+").split(".")[0] in SWEEP_OPTIONS and override.is_sweep_override():
            raise ConfigError(f"{name} is an option of the sweep itself and takes one value", see=SEE)
        if not override.is_sweep_override():
            axes[name] = [str(override.input_line)]
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{name}: an interval has no end of values; sweep=optuna searches it, a grid takes a list",
                see=SEE,
            )
        axes[name] = [f"{name}={value}" for value in override.sweep_string_iterator()]
        swept.append(name.lstrip("+"))
    if design is not None:
        choices = [choice.partition("=")[2] for choice in axes.get("technique", [])]
        axes["technique"] = [f"technique={arm}" for arm in combine(choices, design)]
        swept.append("technique")
    order = sorted(axes, key=lambda name: UNITS.index(name) if name in UNITS else len(UNITS))
    return Grid(
        [list(job) for job in itertools.product(*(axes[name] for name in order))], swept, design is not None
    )


def combine(choices: Sequence[str], design: str) -> list[str]:
    """The values of `technique=` that a design makes of the techniques named in `choices`.

    `one_at_a_time`: none, and each alone; `pairs`: and each pair; `leave_one_out`: none, all together, and
    all without each one.
    """
    named = [name.strip() for choice in choices for name in choice.strip("[]'\"").split(",")]
    factors = [name for name in dict.fromkeys(named) if name not in ("", "baseline")]
    needed = 1 if design == "one_at_a_time" else 2
    if len(factors) < needed:
        raise ConfigError(
            f"design={design} needs technique=A,B,... with at least {needed} techniques", see=SEE
        )
    arms: list[tuple[str, ...]] = [()]
    if design == "leave_one_out":
        arms += [tuple(factors), *itertools.combinations(factors, len(factors) - 1)]
    else:
        arms += [(factor,) for factor in factors]
        arms += itertools.combinations(factors, 2) if design == "pairs" else []
    return [f"[{','.join(arm)}]" if arm else "baseline" for arm in dict.fromkeys(arms)]


@dataclass
class Planned:
    """A job of the sweep, and what is to become or became of it.

    Args:
        overrides: what makes it, as one command.
        differing: those of them that the sweep sweeps.
        job: what can be run; None where it was refused.
        state: `new`, `resume`, `retry`, `finished`, `held`, `failed`, `interrupted`, `refused`, `impossible`,
            `same`.
        reason: why it is not finished.
        trial: the trial of a search that it is.
        errand: how the names of its job's files begin, where that is on another machine.
        ended_here: state and reason of the run's end without a result, where this sweep has run it: it is not run
            again.
        seen: the last attempt at the run when its state was looked at first; what other processes have attempted
            since is not this sweep's to put aside or to retry.
    """

    overrides: list[str]
    differing: list[str]
    job: Job | None
    state: str
    reason: str = ""
    trial: dict[str, Any] | None = None
    errand: str = ""
    ended_here: tuple[str, str] | None = None
    seen: tuple[Any, ...] | None = None

    @property
    def arm(self) -> str:
        return str(self.job.facts["arm"]) if self.job else " ".join(self.differing)

    @property
    def unit(self) -> tuple[int, int]:
        """Seed and fold."""
        assert self.job is not None
        return int(self.job.config["seed"]), int(self.job.config["data"]["module"].get("fold") or 0)

    def name(self) -> str:
        """For the reader."""
        if self.job is None:
            return " ".join(self.differing)
        seed, fold = self.unit
        return f"{self.arm}, seed {seed}" + (f", fold {fold}" if fold else "")

    def refresh(self, options: SweepOptions) -> None:
        """Set the state by the run's directory, now."""
        assert self.job is not None
        run = self.job.run
        state, summary, attempt = run.state(), run.known(), attempt_of(run)
        first, self.seen = self.seen is None, self.seen or attempt
        ours = first or attempt == self.seen
        if self.job.config["fresh"] and not ours:  # it is as fresh as this sweep would make it
            self.job = replace(self.job, config={**self.job.config, "fresh": False})
        self.reason = ""
        if state == "running":
            self.state, self.reason = "held", f"in progress {run.holder()}"
        elif state == "absent" or self.job.config["fresh"]:
            self.state = "new"
        elif state == "finished":
            self.state = "finished"
        elif summary.get("status") == "failed":
            self.state = "retry" if options.retry_failed and ours else "failed"
            self.reason = str(summary.get("reason"))
        else:
            self.state = "resume"
        if self.state in TO_RUN and self.ended_here is not None:
            self.state, self.reason = self.ended_here
        if self.state in TO_RUN:
            self.seen = attempt

    def record(self, facts: Mapping[str, Any]) -> RunDirectory:
        """Record the run, as it was when its state was set.

        Args:
            facts: what the summary says of the sweep.

        Raises:
            Held, Changed: where another process has come first.
        """
        assert self.job is not None
        return replace(self.job, facts={**self.job.facts, "sweep": carried_by_runs(facts)}).record(self.seen)


def carried_by_runs(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's facts as its runs' summaries have them: its folder by name, for runs are moved, and published."""
    return {**facts, "folder": Path(facts["folder"]).name}


TO_RUN = ("new", "resume", "retry")
NO_RUN = ("impossible", "same")


def examine(
    examiner: Examiner, compose: Compose, overrides: list[str], swept: Sequence[str], options: SweepOptions
) -> Planned:
    """What one job is, and what state its run is in."""
    differing = [o for o in overrides if o.lstrip("+").split("=", 1)[0] in swept]
    try:
        job = examiner.examine_job(compose, overrides, swept)
    except Exception as error:
        message, _ = describe(error)
        return Planned(overrides, differing, None, "refused", message or f"{type(error).__name__}: {error}")
    planned = Planned(overrides, differing, job, "new")
    planned.refresh(options)
    return planned


SHOWN_AFTER_S, SAID_EVERY_S = 1.5, 15.0


def shown(jobs: Sequence[list[str]]) -> Iterator[list[str]]:
    """The jobs, with a bar that says how many of them have been looked at; where there is no terminal, lines."""
    start = said = time.monotonic()
    console = Console(stderr=True)
    columns = TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=len(jobs))
    try:
        for number, job in enumerate(jobs):
            yield job
            now = time.monotonic()
            if console.is_terminal:
                bar.update(task, completed=number + 1)
                if now - start > SHOWN_AFTER_S:
                    bar.start()
            elif now - said > SAID_EVERY_S:
                said = now
                print(f"planning: {number + 1} of {len(jobs)} jobs", file=sys.stderr, flush=True)
    finally:
        bar.stop()


def plan(compose: Compose, grid: Grid, options: SweepOptions) -> list[Planned]:
    """All jobs examined. What is the same run as an earlier job is said to be, and pairs that cannot be are.

    Raises:
        ConfigError: where none can run, for one and the same reason.
    """
    planned: list[Planned] = []
    runs: dict[Path, Planned] = {}
    examiner = Examiner()
    for one in _compiled_alike(
        [examine(examiner, compose, overrides, grid.swept, options) for overrides in shown(grid.jobs)],
        lambda overrides: examine(examiner, compose, overrides, grid.swept, options),
    ):
        overrides = one.overrides
        if one.job is None:
            together = any(o.startswith("technique=[") and "," in o for o in overrides)
            one.state = "impossible" if grid.generated and together else "refused"
        elif (first := runs.setdefault(one.job.run.path, one)) is not one:
            one.job, one.state, one.reason = None, "same", f"the run of {first.name()}"
        planned.append(one)
    reasons = {one.reason for one in planned}
    if not runs and len(reasons) == 1:
        raise ConfigError(reasons.pop())
    if options.baseline is not None and options.baseline not in (
        arms := {one.arm: 0 for one in planned if one.job}
    ):
        raise ConfigError(
            f"baseline={options.baseline}: no arm of that name; there are {', '.join(arms)} "
            "(technique=baseline,... adds one)", SEE,
        )  # fmt: skip
    return planned


def _compiled_alike(
    planned: list[Planned], examine_again: Callable[[list[str]], Planned]
) -> Iterator[Planned]:
    """The jobs; where `compile=null` came out on for some and off for others, off for all: their times compare."""

    def automatic(one: Planned) -> bool:
        return one.job is not None and any(w.startswith("compile ") for w in one.job.facts["resolved"])

    differ = len({one.job.config["model"]["compile"] for one in planned if one.job and automatic(one)}) > 1
    for one in planned:
        compiled = automatic(one) and one.job is not None and one.job.config["model"]["compile"]
        yield examine_again([*one.overrides, "model.compile=false"]) if differ and compiled else one


class Measured:
    """Seconds a step and bytes of the finished runs beside a job's: of its own arm, else of its kind."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[dict[str, Any]]] = {}

    def _finished(self, job: Job) -> list[dict[str, Any]]:
        folder = job.run.path.parent
        if folder not in self._folders:
            runs = [RunDirectory(file.parent) for file in folder.glob("*/summary.json")]
            found = [{**run.known(), "path": run.path} for run in runs]
            self._folders[folder] = [
                s for s in found if s.get("status") == "finished" and s.get("steps") and s.get("elapsed_s")
            ]
        kind = [s for s in self._folders[folder] if s.get("kind") == job.facts["kind"]]
        return [s for s in kind if s.get("identity") == job.facts["identity"]] or kind

    def forget(self) -> None:
        """Read again at the next question."""
        self._folders.clear()

    def seconds(self, planned: Planned) -> float | None:
        """What is left of a job will take; None where nothing of its kind has finished."""
        assert planned.job is not None
        finished = self._finished(planned.job)
        if not finished or not math.isfinite(planned.job.steps):
            return None
        done = planned.job.run.known().get("steps", 0) if planned.state in ("resume", "retry") else 0
        own = planned.job.facts["identity"]
        mine = planned.job.facts.get("passes", 1.0)
        a_step = statistics.fmean(
            s["elapsed_s"] / s["steps"] * (1 if s.get("identity") == own else mine / _passes(s))
            for s in finished
        )
        return a_step * max(planned.job.steps - done, 0)

    def bytes(self, planned: Planned) -> float | None:
        """Disk that a new run's directory will take."""
        assert planned.job is not None
        finished = self._finished(planned.job)
        sizes = [_size(s["path"]) for s in finished[:5]]
        return statistics.fmean(sizes) if sizes else None


def _passes(summary: dict[str, Any]) -> float:
    """Of a finished run's step; of runs from before that was recorded the configuration tells."""
    if "passes" in summary:
        return float(summary["passes"])
    config = RunDirectory(summary["path"]).config()
    if "model" not in config:
        return 1.0
    try:
        judge({"model": config["model"]}, f"run={summary['path']}")  # it may be of other people's code
    except ConfigError:
        return 1.0
    return passes(completed(config))


def _size(folder: Path) -> int:
    files = {(s.st_dev, s.st_ino): s.st_size for s in (f.stat() for f in folder.rglob("*") if f.is_file())}
    return sum(files.values())  # best.ckpt may be a second name of last.ckpt
