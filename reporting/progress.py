"""Runs and sweeps under way, from their records: what runs where, how far it is, what is left, when it will end."""

from __future__ import annotations

import csv
import heapq
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crucible.cells import text_of
from crucible.liveness import lives
from crucible.run import STEP_COLUMNS, RunDirectory
from reporting.arms import Arm, sort_into_arms
from reporting.comparison import Step, steps_of_sweep
from reporting.records import LeftOut, Run, Sweep, parse_config, read_sweep
from reporting.request import Metric

UNDER_WAY = "running"
FAILED = ("failed", "lost", "unreadable")
Curves = Mapping[str, Mapping[int, float]]  # column -> epoch -> value


class Facts(NamedTuple):
    """What a run of a sweep is, as its plan says, whether it has begun or not."""

    path: Path
    arm: str
    seed: int
    kind: str
    passes: float
    steps: float  # NaN: not known


@dataclass(frozen=True)
class AtWork:
    """A run that a live process holds.

    Attributes:
        where: host and process; the cluster's job; GPUs.
        since: seconds since the epoch at which this part of it began.
        epochs: that have ended.
        of: all; NaN where the configuration has no end.
        share: of all steps, 0 to 1; NaN where not known.
        left: seconds; NaN where not known.
        curves: of metrics.csv so far.
    """

    path: Path
    data: str
    arm: str
    seed: int
    where: str
    device: str
    since: float
    epochs: int
    of: float
    share: float
    left: float
    images_per_s: float
    curves: Curves


@dataclass(frozen=True)
class AtSweep:
    """A sweep that is at work: a live process of it is known, or one of its runs is under way.

    Attributes:
        runs: that it has planned so far.
        slots: runs at once.
    """

    folder: Path
    runs: Sequence[Facts]
    slots: int


@dataclass(frozen=True)
class Look:
    """Where a sweep of `until=decided` stands.

    Attributes:
        sweep: its plan.
        seeds: of the next look; 0: no arm asks for more.
        number: of that look, from 1.
        wanted: the arms that it will read.
        ended, asked: runs of that look.
        steps: of all arms.
    """

    sweep: Sweep
    seeds: int
    number: int
    wanted: Sequence[str]
    ended: int
    asked: int
    steps: Mapping[str, Step]


@dataclass(frozen=True)
class Progress:
    """All of it, at one moment.

    Attributes:
        waiting: runs of the sweeps at work that have not begun or were interrupted.
        failed: with their arm and seed, where these are known.
        end: seconds since the epoch at which what is known to be asked for will have ended; NaN: cannot be said.
        workers: runs at once.
        counted: that have ended.
    """

    time: float
    running: Sequence[AtWork]
    sweeps: Sequence[AtSweep]
    waiting: Sequence[Facts]
    failed: Sequence[tuple[LeftOut, str]]
    looks: Sequence[Look]
    end: float
    workers: int
    counted: int


def progress_of(runs: Sequence[Run], left_out: Sequence[LeftOut], folders: Sequence[Path]) -> Progress:
    """What the records say now.

    Args:
        runs: that have ended.
        left_out: the others that have a folder.
        folders: which were asked for; sweeps are recorded in or beside them.
    """
    now = time.time()
    alive = {one.path.resolve() for one in left_out if one.status == UNDER_WAY}
    records = _sweep_records(
        [*folders, *(r.path.parent.parent for r in runs), *(p.parent.parent for p in alive)]
    )
    planned = {facts.path: facts for sweep, _ in records for facts in sweep.runs}
    sweeps = [sweep for sweep, record in records if _is_at_work(sweep, record, alive)]
    paces = _Paces(runs)
    for path in alive:
        paces.add(path)
    running = [_at_work(path, planned.get(path), paces, now) for path in sorted(alive)]
    ended = {run.path.resolve() for run in runs}
    failed = {one.path.resolve(): one for one in left_out if one.status in FAILED}
    asked = {facts.path: facts for sweep in sweeps for facts in sweep.runs}
    waiting = [f for path, f in asked.items() if path not in ended | alive | failed.keys()]
    workers = max(len(running), sum(sweep.slots for sweep in sweeps if sweep.slots), 1 if waiting else 0)
    left = [one.left for one in running], [paces.seconds(facts) for facts in waiting]
    return Progress(
        time=now,
        running=running,
        sweeps=sweeps,
        waiting=waiting,
        failed=[(one, _name(path, planned.get(path))) for path, one in sorted(failed.items())],
        looks=[_look(sweep, runs) for sweep in _deciding(runs, records)],
        end=now + _makespan(*left, workers),
        workers=workers,
        counted=len(runs),
    )


def _name(path: Path, facts: Facts | None) -> str:
    """Arm and seed of a run, as far as they are known."""
    if facts is not None:
        return f"{facts.arm}, seed {facts.seed}"
    known = RunDirectory(path).known()
    return f"{known['arm']}, seed {known['seed']}" if {"arm", "seed"} <= known.keys() else path.name


def _makespan(running: Sequence[float], waiting: Sequence[float], workers: int) -> float:
    """Seconds until all have ended, `workers` at once in this order; NaN where one's time is not known."""
    if any(map(math.isnan, (*running, *waiting))) or not (running or waiting):
        return math.nan
    free = [*running, *[0.0] * (workers - len(running))]
    heapq.heapify(free)
    for seconds in waiting:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


class _Pace(NamedTuple):
    folder: Path
    identity: str
    kind: str
    passes: float
    step_s: float


class _Paces:
    """Seconds a step: of finished runs of a run's own arm, else of its kind by the technique's passes, else of those
    that are under way."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._known: tuple[list[_Pace], list[_Pace]] = ([], [])  # of finished runs, of others
        for run in runs:
            if run.elapsed and run.steps and not run.diverged:
                self._known[0].append(
                    _pace(run.path.resolve(), run.kind, run.passes, run.elapsed / run.steps)
                )

    def add(self, path: Path) -> None:
        """That of a run which is under way, once it has recorded steps."""
        known = RunDirectory(path).known()
        elapsed, steps = _positive(known.get("elapsed_s")), _positive(known.get("steps"))
        if not math.isnan(elapsed / steps):
            passes = _positive(known.get("passes"))
            self._known[1].append(
                _pace(path, str(known.get("kind")), 1.0 if math.isnan(passes) else passes, elapsed / steps)
            )

    def of(self, path: Path, kind: str, passes: float) -> float:
        """Of a run at `path`, begun or not; NaN where nothing of its kind is known."""
        identity = path.name.rpartition("-")[0]
        for known in self._known:
            beside = [p for p in known if p.folder == path.parent]
            own = [p.step_s for p in beside if p.identity == identity]
            if steps := own or [p.step_s * passes / p.passes for p in beside if p.kind == kind]:
                return statistics.fmean(steps)
        return math.nan

    def seconds(self, facts: Facts) -> float:
        """That a run will take which has not begun."""
        return self.of(facts.path, facts.kind, facts.passes) * facts.steps


def _pace(path: Path, kind: str, passes: float, step_s: float) -> _Pace:
    return _Pace(path.parent, path.name.rpartition("-")[0], kind, passes, step_s)


def _at_work(path: Path, facts: Facts | None, paces: _Paces, now: float) -> AtWork:
    run = RunDirectory(path)
    summary, claim = run.known(), run.read_claim()
    trainer = (config_of(path).get("trainer")) or {}
    most, bound = (_positive(trainer.get(name)) for name in ("max_epochs", "max_steps"))
    epochs, steps = int(summary.get("epochs") or 0), int(summary.get("steps") or 0)
    a_epoch = steps / epochs if epochs else math.nan
    whole = min((n for n in (most * a_epoch, bound) if not math.isnan(n)), default=math.nan)
    if facts is not None and not math.isnan(facts.steps):
        whole = facts.steps
    since = float(claim.get("since") or summary.get("started") or now)
    elapsed, seen = _positive(summary.get("elapsed_s")), float(summary.get("heartbeat") or now)
    done = max(steps, _last_step(path))
    pace = (
        elapsed / steps if steps else paces.of(path, str(summary.get("kind")), summary.get("passes") or 1.0)
    )
    left = pace * whole - (elapsed + now - seen if steps else now - since)
    known = summary.get("arm", "?"), int(summary.get("seed") or 0)
    where = [f"{claim.get('host', '?')}, process {claim.get('pid', '?')}"]
    where += [str(claim["job"])] if claim.get("job") else []
    device = str(summary.get("device") or "")
    device += f", GPU {claim['gpus']}" if claim.get("gpus") else ""
    if (count := summary.get("devices") or 1) > 1:
        device = f"{count} x {device}"
    return AtWork(
        path=path,
        data=str(summary.get("data") or path.parent.name),
        arm=str(known[0]),
        seed=known[1],
        where="; ".join(where),
        device=device,
        since=since,
        epochs=epochs,
        of=most if math.isnan(bound) or math.isnan(a_epoch) else math.ceil(whole / a_epoch),
        share=min(1.0, done / whole) if whole > 0 else math.nan,
        left=left if math.isnan(left) else max(0.0, left),
        images_per_s=float(summary.get("images_per_s") or math.nan),
        curves=curves_of(path),
    )


def _positive(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else math.nan


def config_of(path: Path) -> Mapping[str, Any]:
    """A run's configuration; empty where it cannot be read."""
    try:
        config = parse_config((path / "config.yaml").read_text(encoding="utf-8"))
    except Exception:  # it is being written
        return {}
    return config if isinstance(config, dict) else {}


def _last_step(path: Path) -> int:
    """The last row of steps.csv, which grows within an epoch; 0 where there is none."""
    try:
        with (path / "steps.csv").open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 400))
            row = stream.read().decode().split("\n")[-2].split(",")
        return int(float(row[STEP_COLUMNS.index("step")]))
    except (OSError, ValueError, IndexError):
        return 0


def curves_of(path: Path) -> Curves:
    """The columns of metrics.csv that have values."""
    try:
        with (path / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        names = [name for name in rows[0] if name is not None]
        return {
            text_of(name): {int(row["epoch"]): float(row[name]) for row in rows if row.get(name)}
            for name in names
        }
    except (OSError, ValueError, KeyError, IndexError, csv.Error):
        return {}


# Sweeps


def sweep_files(folders: Iterable[Path]) -> list[Path]:
    """The records of sweeps in the folders or beside them, and the plans of `until=decided`."""
    places = dict.fromkeys(p for folder in folders for p in (folder.resolve(), folder.resolve().parent))
    return [
        file for place in places for pattern in ("*/sweep.json", "plan-*.json")
        for file in sorted((place / "sweeps").glob(pattern))
    ]  # fmt: skip


_Recorded = tuple[AtSweep, Mapping[str, Any]]  # and what was recorded


def _sweep_records(folders: Iterable[Path]) -> list[_Recorded]:
    found = []
    for file in sweep_files(folders):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            listed = [r for r in record.get("runs") or () if r.get("run")]
            facts = [
                Facts(_from(file.parent, r["run"]), str(r["arm"]), int(r["seed"]), str(r.get("kind")),
                      float(r.get("passes") or 1.0), _positive(r.get("steps"))) for r in listed
            ]  # fmt: skip
            found.append((AtSweep(file.parent, facts, int(record.get("slots") or 0)), record))
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue  # it is being written
    return found


def _from(folder: Path, path: str) -> Path:
    """A run's folder, as the record of its sweep in `folder` names it; one of before names it from the root."""
    return Path(os.path.normpath(folder / path))


def _is_at_work(sweep: AtSweep, record: Mapping[str, Any], alive: set[Path]) -> bool:
    """By its process; where that is another machine's, by its runs."""
    process = record.get("process")
    told = lives(process) if isinstance(process, dict) else None
    return bool(sweep.runs) and (any(f.path in alive for f in sweep.runs) if told is None else told)


def _deciding(runs: Sequence[Run], records: Sequence[_Recorded]) -> list[Sweep]:
    """The plans of `until=decided` among the records, each once."""
    plans: dict[Any, Sweep] = {}
    sweeps = [run.sweep for run in runs if run.sweep is not None]
    for _, record in records:
        try:
            sweeps.append(read_sweep(record, ""))
        except (TypeError, ValueError, KeyError, AttributeError):
            continue
    for sweep in sweeps:
        if sweep.decides is not None:
            plans.setdefault(sweep.plan, sweep)
    return list(plans.values())


def _look(sweep: Sweep, runs: Sequence[Run]) -> Look:
    decides = sweep.decides
    assert decides is not None
    baseline, metric = sweep.baseline or "baseline", Metric(decides.metric)
    names = {baseline, *sweep.techniques}
    of_plan = ((r, name) for r in runs if (name := sweep.arm_of(r)) is not None)
    own = [replace(r.scored_by(metric), arm=name) for r, name in of_plan]
    arms: Mapping[str, Arm] = sort_into_arms(own)
    margin = None if sweep.margin_points is None else sweep.margin_points / metric.scale
    steps = steps_of_sweep(sweep, arms, baseline, metric.sign, margin)
    seeds = max((step.wanted for step in steps.values()), default=0)
    together = decides.order == "together"  # then arms that have their seeds wait for the others
    wanted = [arm for arm, step in steps.items() if step.wanted or (seeds and together and not step.ended)]
    units = [(seed, decides.fold) for seed in decides.seeds[:seeds]]
    ended = {arm: {r.unit for r in arms[arm].recorded} if arm in arms else set() for arm in names}
    of_look = (baseline, *wanted)
    number = next((k for k, n in enumerate(sweep.planned, 1) if n >= seeds), len(sweep.planned))
    return Look(
        sweep=sweep,
        seeds=seeds,
        number=number,
        wanted=wanted,
        ended=sum(unit in ended[arm] for arm in of_look for unit in units),
        asked=len(of_look) * len(units),
        steps=steps,
    )
