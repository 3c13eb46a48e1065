"""Sweeps: arms and seeds in one line become runs, each a process of its own that reads its recorded config.

Plan, show, run, add the rivals of equal time, say what failed. Planning composes and checks every job, so that
what is finished, held by another machine, lost or impossible is known before anything starts. The same command
again, here or on another machine with the same file system, goes on with what is left.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from crucible.command_line import command, option, typed_here
from crucible.configuration import select
from crucible.console import lasting, print_table, say
from crucible.files import write_atomically
from crucible.handover import pass_on
from crucible.liveness import this_process
from crucible.masking import masked_in
from crucible.metrics import headline
from crucible.options import ConfigError, read_options
from crucible.run import RunDirectory
from lab.cluster import ClusterExecutor
from lab.config import SWEEP_OPTIONS
from lab.deciding import Deciding, refuse_without
from lab.executors import Executor, LocalExecutor, Work
from lab.experiment import Examiner, Job
from lab.planning import (
    NO_RUN,
    SEE,
    TO_RUN,
    Compose,
    Measured,
    Planned,
    SweepOptions,
    carried_by_runs,
    examine,
    expand,
    plan,
)
from lab.processes import run_command
from lab.ray_engine import RayExecutor
from lab.search import search
from reporting.arms import ranges
from reporting.statistics import RULE, SAME_COST, paired_t

WAIT_S = 5.0


_COLUMNS = {
    "new": "new", "resume": "to resume", "retry": "to retry", "finished": "finished", "held": "elsewhere",
    "failed": "failed", "refused": "refused", "impossible": "impossible", "same": "same run",
}  # fmt: skip


def print_plan(
    planned: Sequence[Planned],
    options: SweepOptions,
    measured: Measured,
    executor: Executor,
    todo: Sequence[Planned] | None = None,
) -> None:
    """Print what will run, in which state everything is, and how long it will take.

    Args:
        planned: all jobs.
        options: of the sweep.
        measured: knows how long runs take.
        executor: runs them.
        todo: what is to run now; None: all that can.
    """
    states = [s for s in _COLUMNS if any(one.state == s for one in planned)]
    rows: list[list[str]] = []
    by_arm: dict[str, list[Planned]] = defaultdict(list)
    for one in planned:
        by_arm[one.arm].append(one)
    for arm, group in by_arm.items():
        counts = Counter(one.state for one in group)
        times = [measured.seconds(one) for one in group if one.state in TO_RUN]
        known = [t for t in times if t is not None]
        rows.append(
            [
                arm,
                ranges(sorted({one.unit[0] for one in group if one.job})),
                *(str(counts[s] or "") for s in states),
                "" if not times else lasting(sum(known)) if len(known) == len(times) else "?",
            ]
        )
    print_table(["arm", "seeds", *(_COLUMNS[s] for s in states), "time"], rows, words=("arm",))
    todo = [one for one in planned if one.state in TO_RUN] if todo is None else todo
    seconds = [measured.seconds(one) for one in todo]
    known = [s for s in seconds if s is not None]
    at_once = max(1, min(executor.slots, len(todo)))
    if not todo:
        duration = "nothing is left to run"
    elif len(known) < len(todo):
        duration = "how long is unknown until one of its kind has finished"
    else:
        duration = f"about {lasting(sum(known) / at_once)} as runs of their kind took"
    say(f"{len(todo)} of {count(planned)} runs to do, {executor.describe()}: {duration}")
    sizes = [measured.bytes(one) for one in todo if one.state == "new"]
    if options.dry_run and sizes:
        known = [s for s in sizes if s is not None]
        unknown = len(sizes) - len(known)
        disk = (
            f"about {sum(known) / 2**20:.0f} MiB" if known else "unknown until one of its kind has finished"
        )
        say(f"disk: {disk}" + (f", and {unknown} runs of unknown size" if known and unknown else ""))
    if options.equal_time:
        say("then, for each arm whose steps take longer, the baseline trained for as long")
    for one in planned:
        if one.reason:
            say(f"{_COLUMNS[one.state]}: {one.name()}: {one.reason}")
    sys.stdout.flush()


def count(planned: Sequence[Planned]) -> int:
    """How many runs they are."""
    return sum(one.state not in NO_RUN for one in planned)


# The sweep


def sweep(compose: Compose, overrides: Sequence[Override]) -> int:
    """Run what `python main.py -m OVERRIDES` asks for; the exit status.

    Raises:
        ConfigError: for what cannot be planned.
        SystemExit: with 128 + the signal's number, where one ended it.
    """
    pass_on(alone=True)  # a sweep is none of several ranks, whatever started it
    fixed = [o.input_line for o in overrides if not o.is_sweep_override() and o.input_line]
    composed = compose(fixed)
    _leave_to_the_command(compose, fixed, composed)
    values = OmegaConf.to_container(OmegaConf.masked_copy(composed, list(SWEEP_OPTIONS)), resolve=True)
    assert isinstance(values, dict)
    options = read_options(SweepOptions, values, prefix="")  # type: ignore[arg-type]
    if not str(composed.hydra.launcher._target_).endswith(".BasicLauncher"):
        raise ConfigError(
            "hydra/launcher: a sweep has n_jobs=N, sweep=joblib, sweep=submitit or sweep=ray instead", see=SEE
        )
    if composed["task"] == "tune":
        return _tune_each(overrides, options, values)  # type: ignore[arg-type]
    executor = _executor(options, composed)
    if (
        any(o.get_key_element() == "trainer.devices" and o.is_sweep_override() for o in overrides)
        and executor.slots > 1
    ):
        raise ConfigError(
            "trainer.devices: runs at once have equally many devices; sweep it with n_jobs=1", see=SEE
        )
    if values["search"] is not None and options.until is not None:
        raise ConfigError(
            "until=decided: a search has no looks; search first, then decide over seeds", see=SEE
        )
    if options.until is None:
        refuse_without(options)
    if values["search"] is not None:
        return search(compose, overrides, options, values["search"], executor)
    if (options.equal_time or options.until) and options.baseline is None:
        options = replace(options, baseline="baseline")

    def checked_here(overrides: Sequence[str]) -> DictConfig:
        return executor.as_checked_here(compose(overrides))

    measured, deciding = Measured(), None
    if options.until is not None:
        deciding = Deciding.prepare(checked_here, overrides, options, composed, _of_the_job)
        asked, planned = deciding.asked(), deciding.planned
        print_plan(planned, options, measured, executor, [one for one in asked if one.state in TO_RUN])
        for line in deciding.describe():
            say(line)
    else:
        grid = expand(overrides, options.design)
        grid = grid._replace(jobs=[_of_the_job(one) for one in grid.jobs])
        planned = plan(checked_here, grid, options)
        print_plan(planned, options, measured, executor)
    if options.dry_run:
        return 0
    if deciding is not None:
        deciding.record()
    facts = deciding.facts if deciding else {}
    record = Record(Path(composed.hydra.sweep.dir), options, planned, facts, executor.slots)
    failures = Sweep(checked_here, options, executor, measured, record, deciding).run(planned)
    return 1 if failures else 0


_NOT_OF_TUNING = ("n_jobs", "cluster", "ray", "search", "until", "equal_time")


def _tune_each(overrides: Sequence[Override], options: SweepOptions, values: Mapping[str, Any]) -> int:
    """The range test of each job, one after the other, each in a process of its own; the worst status."""
    for name in _NOT_OF_TUNING:
        if values[name] not in (None, False, 1):
            raise ConfigError(
                f"{name}={values[name]}: task=tune makes one test after the other, here", see="docs/use.md"
            )
    worst = 0
    for job in expand(overrides, options.design).jobs:
        typed = _of_the_job(job)
        say(command(*typed))
        if not options.dry_run:
            worst = max(worst, run_command(typed))
    return worst


def _of_the_job(overrides: Sequence[str]) -> list[str]:
    return [o for o in overrides if _option(o) not in SWEEP_OPTIONS]


def _option(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0].split(".")[0]


def _leave_to_the_command(compose: Compose, fixed: list[str], composed: DictConfig) -> None:
    """An engine or a search is asked for by the command, not by what cli_configs/local says of this machine's."""
    given = [name for name in ("cluster", "ray", "search") if composed[name] is not None]
    if not given:
        return
    try:
        elsewhere = compose([*(o for o in fixed if not o.startswith("local=")), "local=[]"])
    except ConfigCompositionException as error:
        if "Could not override 'local'" in str(error):
            return  # this machine says nothing
        raise
    with open_dict(composed):
        composed.update({name: None for name in given if elsewhere[name] is None})


def _executor(options: SweepOptions, composed: DictConfig) -> Executor:
    trainer = OmegaConf.to_container(composed.trainer, resolve=True)
    elsewhere: dict[str, Callable[..., Executor]] = {"cluster": ClusterExecutor, "ray": RayExecutor}
    asked = [name for name in elsewhere if composed[name] is not None]
    if not asked:
        return LocalExecutor(options.n_jobs, trainer)  # type: ignore[arg-type]
    if len(asked) > 1:
        raise ConfigError("sweep=[submitit,ray]: a sweep has one engine; name one of them", see=SEE)
    if options.n_jobs != 1:
        raise ConfigError(
            f"n_jobs={options.n_jobs} is of this machine; that of sweep={'ray' if asked == ['ray'] else 'submitit'} "
            f"is {asked[0]}.jobs_at_once", see=SEE,
        )  # fmt: skip
    return elsewhere[asked[0]](OmegaConf.to_container(composed[asked[0]], resolve=True), trainer)


class Record:
    """`sweep.json`: what was planned before the runs, and what became of it; for the report.

    Args:
        folder: of the sweep; another name where it is taken.
        options: of the sweep.
        planned: its jobs.
        plan: of `until=decided`; else empty.
        slots: runs at once.
    """

    def __init__(
        self,
        folder: Path,
        options: SweepOptions,
        planned: Sequence[Planned],
        plan: Mapping[str, Any],
        slots: int,
    ) -> None:
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
            "created": time.time(), "rule": RULE, **plan,
        }  # fmt: skip
        self._planned = planned
        self._by = {"process": this_process(), "slots": slots}
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
                runs[-1] |= {
                    "run": os.path.relpath(one.job.run.path, self.folder),
                    "seed": seed,
                    "fold": fold,
                }
                runs[-1] |= {name: one.job.facts.get(name) for name in ("kind", "passes")}
                runs[-1] |= {"steps": one.job.steps if math.isfinite(one.job.steps) else None}
        content = {
            **carried_by_runs(self.facts),
            **self._by,
            "command": command(*typed_here()),
            "arms": list(dict.fromkeys(one.arm for one in self._planned if one.job)),
            "rivals": self.rivals,
            "runs": runs,
        }
        write_atomically(self.folder / "sweep.json", json.dumps(masked_in(content), indent=2) + "\n")


@dataclass
class Sweep:
    """A planned sweep at work."""

    compose: Compose
    options: SweepOptions
    executor: Executor
    measured: Measured
    record: Record
    deciding: Deciding | None = None

    def run(self, planned: list[Planned]) -> int:
        """Run everything; how many of the jobs failed.

        Raises:
            SystemExit: where a signal ended it.
        """
        self._all = planned
        paused = False
        if self.deciding is not None:
            paused = not self._decide(self.deciding)
        else:
            self._work([one for one in planned if one.state in TO_RUN])
            self._others(wait=self.options.equal_time)
        if self.options.equal_time and not paused:
            found = rivals(self.compose, planned, self.options)
            added: list[Planned] = []
            for arm, group in found.items():
                self.record.rivals[arm] = group[0].arm
                paths = {one.job.run.path for one in added if one.job}  # arms of one ratio share a rival
                added += [one for one in group if one.job is None or one.job.run.path not in paths]
            planned.extend(added)
            self.record.write()
            if not found:
                say(f"\nequal_time: no baseline is trained for longer: {why_none(planned, self.options)}")
            if added:
                say("\nthe baseline, trained for as long as the slower arms take")
                print_plan(added, replace(self.options, equal_time=False), self.measured, self.executor)
                self._work([one for one in added if one.state in TO_RUN])
                self._others(wait=False)
        return self._report()

    def _decide(self, deciding: Deciding) -> bool:
        """Run what the looks ask for, each run once, until they ask for no more; False: it has no result."""
        told = False
        while asked := deciding.asked():
            todo = [one for one in asked if one.state in TO_RUN]
            held = sum(one.state == "held" for one in asked)
            if todo:
                arms = ", ".join(dict.fromkeys(one.arm for one in todo))
                say(f"\n{len(todo)} runs to the next look: {arms}")
                self.record.write()
                self._work(todo)
            elif held:
                if not told:
                    say(f"waiting for {held} runs that are in progress elsewhere")
                    told = True
                time.sleep(WAIT_S)
            else:
                self.record.write()
                self._pause(asked)
                return False
        self.record.write()
        say(deciding.ending())
        return True

    @staticmethod
    def _pause(asked: Sequence[Planned]) -> None:
        """Say which runs of a look have no result, and what can be done about it."""
        print("\npaused before the next look: these runs of it have no result", file=sys.stderr)
        for one in asked:
            print(f"  {one.name()}: {one.reason or one.state}", file=sys.stderr)
        status = [one.job.run.known().get("status") for one in asked if one.job is not None]
        if any(one.state != "failed" for one in asked) or None in status:
            print("the same command goes on with what was interrupted, or never began", file=sys.stderr)
        if "failed" in status:
            print("retry_failed=true runs what failed again, from its last state", file=sys.stderr)
        if "failed" in status or "finished" in status:
            print("drop_failed=true goes on without the pairs of what failed, for good", file=sys.stderr)

    def _others(self, wait: bool) -> None:
        """What became of the runs that were in progress elsewhere; those lost there are run here.

        Args:
            wait: for their end: all machines are to measure the same step times.
        """
        told = False
        while held := [one for one in self._all if one.state == "held"]:
            for one in held:
                one.refresh(self.options)
            self._work([one for one in held if one.state in TO_RUN])
            left = [one for one in held if one.state == "held"]
            if not wait or not left:
                return
            if not told:
                say(f"waiting for {len(left)} runs that are in progress elsewhere")
                told = True
            time.sleep(WAIT_S)

    def _work(self, todo: Sequence[Planned]) -> None:
        self._todo = todo
        refresh = functools.partial(Planned.refresh, options=self.options)
        work = Work(self.executor, self.record.facts, self._ended, refresh)
        work.run(self._still_to_do(todo))
        if work.received:
            finished = sum(one.state == "finished" for one in self._all)
            say(
                f"\nstopped: {finished} of {count(self._all)} runs are finished; the same command goes on from here"
            )
            raise SystemExit(128 + work.received[0])

    def _still_to_do(self, todo: Sequence[Planned]) -> Iterator[Planned]:
        """Other machines may have come first."""
        for number, planned in enumerate(todo, 1):
            planned.refresh(self.options)
            if planned.state in TO_RUN:
                say(f"\n[{number}/{len(todo)}] {planned.name()}")
                yield planned
            else:
                self._ended(planned)

    def _ended(self, planned: Planned) -> None:
        assert planned.job is not None
        self.record.write()
        self.measured.forget()
        run = planned.job.run
        values = headline(run.known().get("final", {})) if planned.state == "finished" else planned.reason
        words = {"held": "left alone", "finished": "finished"}.get(planned.state, planned.state)
        times = [self.measured.seconds(one) for one in self._todo if one.state in TO_RUN]
        left = [t for t in times if t is not None]  # the run that has just ended is one of their kind
        remaining = f"; {len(times)} to do, about {lasting(sum(left) / self.executor.slots)}" if left else ""
        say(f"{planned.name()}: {words} ({values}){remaining}")

    def _report(self) -> int:
        counts = Counter(one.state for one in self._all)
        say(
            f"\nsweep: {counts['finished']} of {count(self._all)} runs are finished  ->  {self.record.folder}"
        )
        if counts["held"]:
            say(f"{counts['held']} are in progress elsewhere and were left alone:")
            for one in self._all:
                if one.state == "held":
                    say(f"  {one.name()}: {one.reason}")
        failures = [
            one
            for one in self._all
            if one.state not in ("finished", "held", *NO_RUN)
            and not (one.job and one.job.run.known().get("dropped"))
        ]
        if failures:
            print(f"\n{len(failures)} of the sweep's jobs did not finish:", file=sys.stderr)
            for one in failures:
                where = f"  ({one.job.run.path})" if one.job else ""
                print(f"  {one.name()}: {one.reason or one.state}{where}", file=sys.stderr)
            if any(one.job is not None and one.job.run.known().get("status") == "failed" for one in failures):
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
    finished: dict[str, dict[tuple[int, int], tuple[Job, list[str]]]] = defaultdict(dict)
    for one in planned:
        if one.job is not None and one.state == "finished":
            finished[one.arm][one.unit] = one.job, one.overrides
    base = finished.pop(str(options.baseline), {})
    found: dict[str, list[Planned]] = {}
    examiner = Examiner()
    for arm, runs in finished.items():
        times = step_time_ratio([(base[u][0].run, job.run) for u, (job, _) in runs.items() if u in base])
        if times is None or times.low <= SAME_COST:
            continue
        sample, _ = next(iter(base.values()))
        ratio = _earlier_ratio(sample, arm) or round(times.ratio, 2)
        group = []
        for job, overrides in (base[unit] for unit in sorted(base) if unit in runs):
            name = f"{options.baseline}_x{ratio:.2f}"
            alike = f"model.compile={str(job.config['model']['compile'] or False).lower()}"
            stretched = [*overrides, *stretch(job.config, ratio), alike, option("arm", name)]
            rival = examine(examiner, compose, stretched, (), options)
            if rival.job is not None:
                of = {"rival_of": arm, "rival_base": sample.facts["identity"], "ratio": ratio}
                rival = replace(rival, job=replace(rival.job, facts={**rival.job.facts, **of}))
            group.append(rival)
        found[arm] = group
    return found


def why_none(planned: Sequence[Planned], options: SweepOptions) -> str:
    """Why `rivals` found none, for the reader."""
    ended = {
        (one.arm, one.unit): one.job.run for one in planned if one.job is not None and one.state == "finished"
    }
    arms = dict.fromkeys(arm for arm, _ in ended if arm != options.baseline)
    measured, without = [], []
    for arm in arms:
        units = [unit for name, unit in ended if name == arm and (options.baseline, unit) in ended]
        times = step_time_ratio([(ended[str(options.baseline), u], ended[arm, u]) for u in units])
        if times is None:
            without.append(arm)
        else:
            measured.append(f"{arm} {times.ratio:.2f} (at least {times.low:.2f})")
    parts = (
        [f"no arm's steps surely take over {SAME_COST} times as long: {', '.join(measured)}"]
        if measured
        else []
    )
    if without:
        parts.append(f"no pair of finished runs on one device, compiled alike, of {', '.join(without)}")
    return "; ".join(parts) or f"no arm but {options.baseline} has finished"


class StepTimes(NamedTuple):
    """Geometric mean of ratios of seconds a step, and the lower end of its 95% interval."""

    ratio: float
    low: float  # of fewer than 3 pairs the ratio itself


def step_time_ratio(pairs: Sequence[tuple[RunDirectory, RunDirectory]]) -> StepTimes | None:
    """How much longer an arm's steps take, from pairs (baseline, arm).

    None without a pair on one device of which both or neither are compiled.
    """
    logs = []
    for pair in pairs:
        base, arm = (run.known() for run in pair)
        if len({select(run.config(), "model.compile") or False for run in pair}) > 1:
            continue
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
        summary = RunDirectory(file.parent).known()
        if summary.get("rival_of") == arm and summary.get("rival_base") == sample.facts["identity"]:
            identities.add(summary["ratio"])
    return identities.pop() if len(identities) == 1 else None


_EPOCHS = (
    "warmstart",
    "cooldown",
    "lr_milestones",
    "lr_step_size",
    "lr_restarts",
    "lr_ahead",
)  # of the schedule


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
            longer[f"model.{name}"] = [round(v * ratio, 3) for v in value]
        elif value:
            longer[f"model.{name}"] = round(value * ratio, 3)
    return [f"{name}={value}" for name, value in longer.items()]
