"""Sweeps: arms and seeds in one line become runs, each a process of its own that reads its recorded config.

Plan, show, run, add the rivals of equal time, say what failed. Planning composes and checks every job, so that
what is finished, held by another machine, lost or impossible is known before anything starts. The same command
again, here or on another machine with the same file system, goes on with what is left.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from crucible import jobs
from crucible.command_line import describe
from crucible.config import SWEEP_OPTIONS
from crucible.executors import Executor, LocalExecutor, Work
from crucible.jobs import Job
from crucible.options import ConfigError, read_options
from crucible.run import RunDirectory, write_atomically

SEE = "docs/sweeps.md"
UNITS = ("seed", "data.module.fold")  # what arms are paired by
WAIT_S = 5.0
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
    n_jobs: Annotated[int | Literal["auto"], "[1, inf)", "runs at once on this machine"] = 1


# Planning


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
    """

    overrides: list[str]
    differing: list[str]
    job: Job | None
    state: str
    reason: str = ""

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


TO_RUN = ("new", "resume", "retry")
NO_RUN = ("impossible", "same")


def examine(compose: Compose, overrides: list[str], swept: Sequence[str], options: SweepOptions) -> Planned:
    """What one job is, and what state its run is in."""
    differing = [o for o in overrides if o.lstrip("+").split("=", 1)[0] in swept]
    try:
        job = jobs.examine(compose(overrides), overrides, swept)
    except Exception as error:
        message, _ = describe(error)
        return Planned(overrides, differing, None, "refused", message or f"{type(error).__name__}: {error}")
    planned = Planned(overrides, differing, job, "new")
    look(planned, options)
    return planned


def look(planned: Planned, options: SweepOptions) -> None:
    """Set the state by the run's directory, now."""
    assert planned.job is not None
    run, fresh = planned.job.run, planned.job.config["fresh"]
    state, summary = run.state(), run.summary()
    failed = state == "unfinished" and summary.get("status") == "failed"
    planned.reason = ""
    if state == "running":
        planned.state, planned.reason = "held", f"in progress {run.holder()}"
    elif state == "absent" or fresh:
        planned.state = "new"
    elif state == "finished":
        planned.state = "finished"
    elif failed:
        planned.state, planned.reason = (
            "retry" if options.retry_failed else "failed",
            str(summary.get("reason")),
        )
    else:
        planned.state = "resume"


def plan(compose: Compose, grid: Grid, options: SweepOptions) -> list[Planned]:
    """All jobs examined. What is the same run as an earlier job is said to be, and pairs that cannot be are.

    Raises:
        ConfigError: where none can run, for one and the same reason.
    """
    planned: list[Planned] = []
    runs: dict[Path, Planned] = {}
    for overrides in grid.jobs:
        one = examine(compose, overrides, grid.swept, options)
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


# How long, how much


class Measured:
    """Seconds a step and bytes of the finished runs beside a job's: of its own arm, else of its kind."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[dict[str, Any]]] = {}

    def _finished(self, job: Job) -> list[dict[str, Any]]:
        folder = job.run.path.parent
        if folder not in self._folders:
            runs = [RunDirectory(file.parent) for file in folder.glob("*/summary.json")]
            found = [{**run.summary(), "path": run.path} for run in runs]
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
        done = planned.job.run.summary().get("steps", 0) if planned.state in ("resume", "retry") else 0
        a_step = statistics.fmean(s["elapsed_s"] / s["steps"] for s in finished)
        return a_step * max(planned.job.steps - done, 0)

    def bytes(self, planned: Planned) -> float | None:
        """Disk that a new run's directory will take."""
        assert planned.job is not None
        finished = self._finished(planned.job)
        sizes = [_size(s["path"]) for s in finished[:5]]
        return statistics.fmean(sizes) if sizes else None


def _size(folder: Path) -> int:
    files = {(s.st_dev, s.st_ino): s.st_size for s in (f.stat() for f in folder.rglob("*") if f.is_file())}
    return sum(files.values())  # best.ckpt may be a second name of last.ckpt


def clock(seconds: float) -> str:
    """A duration for the reader."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


_COLUMNS = {
    "new": "new", "resume": "to resume", "retry": "to retry", "finished": "finished", "held": "elsewhere",
    "failed": "failed", "refused": "refused", "impossible": "impossible", "same": "same run",
}  # fmt: skip


def show(planned: Sequence[Planned], options: SweepOptions, measured: Measured, executor: Executor) -> None:
    """Print what will run, in which state everything is, and how long it will take."""
    states = [s for s in _COLUMNS if any(one.state == s for one in planned)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("seeds", *(_COLUMNS[s] for s in states), "time"):
        table.add_column(name, justify="right")
    by_arm: dict[str, list[Planned]] = defaultdict(list)
    for one in planned:
        by_arm[one.arm].append(one)
    for arm, group in by_arm.items():
        counts = Counter(one.state for one in group)
        times = [measured.seconds(one) for one in group if one.state in TO_RUN]
        known = [t for t in times if t is not None]
        table.add_row(
            arm,
            _ranges(sorted({one.unit[0] for one in group if one.job})),
            *(str(counts[s] or "") for s in states),
            "" if not times else clock(sum(known)) if len(known) == len(times) else "?",
        )
    console = Console(highlight=False, markup=False, width=max(100, Console().width))
    console.print(table)
    todo = [one for one in planned if one.state in TO_RUN]
    seconds = [measured.seconds(one) for one in todo]
    known = [s for s in seconds if s is not None]
    at_once = max(1, min(executor.slots, len(todo)))
    if not todo:
        duration = "nothing is left to run"
    elif len(known) < len(todo):
        duration = "how long is unknown until one of its kind has finished"
    else:
        duration = f"about {clock(sum(known) / at_once)} as runs of their kind took"
    print(f"{len(todo)} of {count(planned)} runs to do, {executor.describe()}: {duration}")
    sizes = [measured.bytes(one) for one in todo if one.state == "new"]
    if options.dry_run and sizes:
        known = [s for s in sizes if s is not None]
        unknown = len(sizes) - len(known)
        disk = (
            f"about {sum(known) / 2**20:.0f} MiB" if known else "unknown until one of its kind has finished"
        )
        print(f"disk: {disk}" + (f", and {unknown} runs of unknown size" if known and unknown else ""))
    if options.equal_time:
        print("then, for each arm whose steps take longer, the baseline trained for as long")
    for one in planned:
        if one.reason:
            print(f"{_COLUMNS[one.state]}: {one.name()}: {one.reason}")
    sys.stdout.flush()


def count(planned: Sequence[Planned]) -> int:
    """How many runs they are."""
    return sum(one.state not in NO_RUN for one in planned)


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


# The sweep


def sweep(compose: Compose, overrides: Sequence[Override]) -> None:
    """Run what `python main.py -m OVERRIDES` asks for.

    Raises:
        ConfigError: for what cannot be planned.
        SystemExit: with 128 + the signal's number, where one ended it.
    """
    fixed = [o.input_line for o in overrides if not o.is_sweep_override() and o.input_line]
    composed = compose(fixed)
    values = OmegaConf.to_container(OmegaConf.masked_copy(composed, list(SWEEP_OPTIONS)), resolve=True)
    assert isinstance(values, dict)
    options = read_options(SweepOptions, values, prefix="")  # type: ignore[arg-type]
    if not str(composed.hydra.launcher._target_).endswith(".BasicLauncher"):
        raise ConfigError(
            "hydra/launcher: a sweep has n_jobs=N, sweep=joblib or sweep=submitit instead", see=SEE
        )
    executor = _executor(options, composed)
    if values["search"] is not None:
        from crucible.search import search

        search(compose, overrides, options, values["search"], executor)
        return
    grid = expand(overrides, options.design)
    job_overrides = [[o for o in one if _option(o) not in SWEEP_OPTIONS] for one in grid.jobs]
    if options.equal_time and options.baseline is None:
        options = replace(options, baseline="baseline")
    if "trainer.devices" in grid.swept and executor.slots > 1:
        raise ConfigError(
            "trainer.devices: runs at once have equally many devices; sweep it with n_jobs=1", see=SEE
        )

    def checked_here(overrides: Sequence[str]) -> DictConfig:
        return executor.as_checked_here(compose(overrides))

    planned = plan(checked_here, grid._replace(jobs=job_overrides), options)
    jobs.forget()
    measured = Measured()
    show(planned, options, measured, executor)
    if options.dry_run:
        return
    record = Record(Path(composed.hydra.sweep.dir), options, planned)
    failures = Sweep(checked_here, options, executor, measured, record).run(planned)
    jobs.note_status(1 if failures else 0)


def _option(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0].split(".")[0]


def _executor(options: SweepOptions, composed: DictConfig) -> Executor:
    trainer = OmegaConf.to_container(composed.trainer, resolve=True)
    if composed.cluster is None:
        return LocalExecutor(options.n_jobs, trainer)  # type: ignore[arg-type]
    from crucible.cluster import ClusterExecutor

    if options.n_jobs != 1:
        raise ConfigError(
            f"n_jobs={options.n_jobs} is of this machine; SLURM's is cluster.jobs_at_once", see=SEE
        )
    return ClusterExecutor(OmegaConf.to_container(composed.cluster, resolve=True), trainer)  # type: ignore[arg-type]


class Record:
    """`sweep.json`: what was planned before the runs, and what became of it; for the report.

    Args:
        folder: of the sweep; another name where it is taken.
        options: of the sweep.
        planned: its jobs.
    """

    def __init__(self, folder: Path, options: SweepOptions, planned: Sequence[Planned]) -> None:
        folder = folder.expanduser().resolve()
        for number in itertools.count(1):
            self.folder = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        units = {one.unit for one in planned if one.job}
        self.facts = {
            "folder": str(self.folder), "design": options.design or "as typed", "baseline": options.baseline,
            "margin_points": options.margin_points, "planned_seeds": options.planned_seeds or len(units),
            "created": time.time(),
        }  # fmt: skip
        self._planned = planned
        self.rivals: dict[str, str] = {}
        self.write()

    def write(self) -> None:
        """Write it as it stands."""
        runs: list[dict[str, Any]] = []
        for one in self._planned:
            runs.append(
                {"arm": one.arm, "state": one.state, "reason": one.reason, "overrides": one.overrides}
            )
            if one.job is not None:
                seed, fold = one.unit
                runs[-1] |= {"run": str(one.job.run.path), "seed": seed, "fold": fold}
        content = {
            **self.facts,
            "command": shlex.join(["python", "main.py", *sys.argv[1:]]),
            "arms": list(dict.fromkeys(one.arm for one in self._planned if one.job)),
            "rivals": self.rivals,
            "runs": runs,
        }
        write_atomically(self.folder / "sweep.json", json.dumps(content, indent=2) + "\n")


@dataclass
class Sweep:
    """A planned sweep at work."""

    compose: Compose
    options: SweepOptions
    executor: Executor
    measured: Measured
    record: Record

    def run(self, planned: list[Planned]) -> int:
        """Run everything; how many of the jobs failed.

        Raises:
            SystemExit: where a signal ended it.
        """
        self._all = planned
        self._work([one for one in planned if one.state in TO_RUN])
        self._others(wait=self.options.equal_time)
        if self.options.equal_time:
            found = rivals(self.compose, planned, self.options)
            added: list[Planned] = []
            for arm, group in found.items():
                self.record.rivals[arm] = group[0].arm
                paths = {one.job.run.path for one in added if one.job}  # arms of one ratio share a rival
                added += [one for one in group if one.job is None or one.job.run.path not in paths]
            planned.extend(added)
            self.record.write()
            if added:
                print("\nthe baseline, trained for as long as the slower arms take")
                show(added, replace(self.options, equal_time=False), self.measured, self.executor)
                self._work([one for one in added if one.state in TO_RUN])
                self._others(wait=False)
        return self._report()

    def _others(self, wait: bool) -> None:
        """What became of the runs that were in progress elsewhere; those lost there are run here.

        Args:
            wait: for their end: all machines are to measure the same step times.
        """
        told = False
        while held := [one for one in self._all if one.state == "held"]:
            for one in held:
                look(one, self.options)
            self._work([one for one in held if one.state in TO_RUN])
            left = [one for one in held if one.state == "held"]
            if not wait or not left:
                return
            if not told:
                print(f"waiting for {len(left)} runs that are in progress elsewhere", flush=True)
                told = True
            time.sleep(WAIT_S)

    def _work(self, todo: Sequence[Planned]) -> None:
        self._todo = todo
        work = Work(self.executor, self.record.facts, self._ended)
        work.run(self._still_to_do(todo))
        if work.received:
            finished = sum(one.state == "finished" for one in self._all)
            print(
                f"\nstopped: {finished} of {count(self._all)} runs are finished; the same command goes on from here"
            )
            raise SystemExit(128 + work.received[0])

    def _still_to_do(self, todo: Sequence[Planned]) -> Iterator[Planned]:
        """Other machines may have come first."""
        for number, planned in enumerate(todo, 1):
            if not (planned.job and planned.job.config["fresh"]):
                look(planned, self.options)
            if planned.state in TO_RUN:
                print(f"\n[{number}/{len(todo)}] {planned.name()}", flush=True)
                yield planned
            else:
                self._ended(planned)

    def _ended(self, planned: Planned) -> None:
        assert planned.job is not None
        self.record.write()
        self.measured.forget()
        run = planned.job.run
        values = jobs.few(run.summary().get("final", {})) if planned.state == "finished" else planned.reason
        words = {"held": "left alone", "finished": "finished"}.get(planned.state, planned.state)
        times = [self.measured.seconds(one) for one in self._todo if one.state in TO_RUN]
        left = [t for t in times if t is not None]  # the run that has just ended is one of their kind
        remaining = f"; {len(times)} to do, about {clock(sum(left) / self.executor.slots)}" if left else ""
        print(f"{planned.name()}: {words} ({values}){remaining}", flush=True)

    def _report(self) -> int:
        counts = Counter(one.state for one in self._all)
        print(
            f"\nsweep: {counts['finished']} of {count(self._all)} runs are finished  ->  {self.record.folder}"
        )
        if counts["held"]:
            print(f"{counts['held']} are in progress elsewhere and were left alone:")
            for one in self._all:
                if one.state == "held":
                    print(f"  {one.name()}: {one.reason}")
        failures = [one for one in self._all if one.state not in ("finished", "held", *NO_RUN)]
        if failures:
            print(f"\n{len(failures)} of the sweep's jobs did not finish:", file=sys.stderr)
            for one in failures:
                where = f"  ({one.job.run.path})" if one.job else ""
                print(f"  {one.name()}: {one.reason or one.state}{where}", file=sys.stderr)
            if any(one.state == "failed" for one in failures):
                print(
                    "retry_failed=true runs those that failed again, from their last state", file=sys.stderr
                )
        return len(failures)


# The honest rival of a slower arm


def rivals(compose: Compose, planned: Sequence[Planned], options: SweepOptions) -> dict[str, list[Planned]]:
    """For each arm whose steps take longer than the baseline's: the baseline trained for as long.

    The ratio is the geometric mean over the pairs of runs on the same device; one that an earlier sweep of the
    same arms used is kept, so that later seeds join its runs.
    """
    from reporting.statistics import SAME_COST  # imports scipy

    finished: dict[str, dict[tuple[int, int], tuple[Job, list[str]]]] = defaultdict(dict)
    for one in planned:
        if one.job is not None and one.state == "finished":
            finished[one.arm][one.unit] = one.job, one.overrides
    base = finished.pop(str(options.baseline), {})
    found: dict[str, list[Planned]] = {}
    for arm, runs in finished.items():
        times = step_time_ratio([(base[u][0].run, job.run) for u, (job, _) in runs.items() if u in base])
        if times is None or times.low <= SAME_COST:
            continue
        sample, _ = next(iter(base.values()))
        ratio = _earlier_ratio(sample, arm) or round(times.ratio, 2)
        group = []
        for job, overrides in base.values():
            name = f"{options.baseline}_x{ratio:.2f}"
            name = name if re.fullmatch(r"[\w.+-]+", name) else f"'{name}'"
            stretched = [*overrides, *stretch(job.config, ratio), f"arm={name}"]
            rival = examine(compose, stretched, (), options)
            if rival.job is not None:
                of = {"rival_of": arm, "rival_base": sample.facts["identity"], "ratio": ratio}
                rival = replace(rival, job=replace(rival.job, facts={**rival.job.facts, **of}))
            group.append(rival)
        found[arm] = group
    return found


class StepTimes(NamedTuple):
    """Geometric mean of ratios of seconds a step, and the lower end of its 95% interval."""

    ratio: float
    low: float  # of fewer than 3 pairs the ratio itself


def step_time_ratio(pairs: Sequence[tuple[RunDirectory, RunDirectory]]) -> StepTimes | None:
    """How much longer an arm's steps take, from pairs (baseline, arm); None without a pair on one device."""
    from reporting.statistics import paired_t  # imports scipy

    logs = []
    for pair in pairs:
        base, arm = (run.summary() for run in pair)
        if base.get("device") == arm.get("device") and base.get("wall_time_s") and arm.get("wall_time_s"):
            logs.append(
                math.log(arm["wall_time_s"] / arm["steps"]) - math.log(base["wall_time_s"] / base["steps"])
            )
    if not logs:
        return None
    mean = statistics.fmean(logs)
    low = float(paired_t(logs).low) if len(logs) > 2 else mean
    return StepTimes(math.exp(mean), math.exp(low))


def _earlier_ratio(sample: Job, arm: str) -> float | None:
    identities = set()
    for file in sorted(sample.run.path.parent.glob("*/summary.json")):
        summary = RunDirectory(file.parent).summary()
        if summary.get("rival_of") == arm and summary.get("rival_base") == sample.facts["identity"]:
            identities.add(summary["ratio"])
    return identities.pop() if len(identities) == 1 else None


_EPOCHS = ("warmstart", "cooldown", "lr_milestones", "lr_step_size", "lr_restarts")  # of the schedule


def stretch(config: Mapping[str, Any], ratio: float) -> list[str]:
    """The overrides that make a run `ratio` times as long, its schedule stretched with it."""
    trainer, model = config["trainer"], config["model"]
    bounds = {
        f"trainer.{name}": trainer[name] for name in ("max_epochs", "max_steps") if (trainer[name] or -1) > 0
    }
    longer = {name: max(1, round(value * ratio)) for name, value in bounds.items()}
    for name in _EPOCHS:
        value = model.get(name)
        if isinstance(value, list):
            longer[f"model.{name}"] = [round(v * ratio, 3) for v in value]  # type: ignore[assignment]
        elif value:
            longer[f"model.{name}"] = round(value * ratio, 3)
    return [f"{name}={value}" for name, value in longer.items()]
