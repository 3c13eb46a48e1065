"""The runs of one data set compared with its baseline: pairs, verdicts, costs beside gains, two techniques together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crucible.options import ConfigError
from reporting import statistics as s
from reporting.arms import (
    Arm,
    Plan,
    Settings,
    by_setting,
    check_versions,
    choose_baseline,
    first_sweep,
    name_arms,
    plan_of,
    said_of_the_data,
    settings_of,
    sort_into_arms,
)
from reporting.contents import with_contents
from reporting.looks import Looks, replay
from reporting.records import Run, Sweep, Unit
from reporting.request import SEE, Metric, Request


class Step(NamedTuple):
    """Where an arm stands among its planned looks.

    Attributes:
        found: as `reporting.looks.Steps` names it; what is final and what is not, see `ended`.
        look: of which number, from 1; 0: before the first.
        looks: all planned ones, in seeds.
        family: the number of techniques planned.
        units: the planned seeds of its look; before the first look those of that.
        p, p_none: over all looks and techniques.
        chance: of a decision at a later look.
        wanted: seeds up to which it is asked to go now; 0: it has all that is asked for.
        runs: that the plan has asked for so far, the baseline's included.
        closed: the arm's seeds were decided upon by something else, another metric say, so that none follow for this.
    """

    found: str
    look: int
    looks: tuple[int, ...]
    family: int
    units: frozenset[Unit]
    p: float
    p_none: float
    chance: float
    wanted: int
    runs: int
    closed: bool = False

    @property
    def ended(self) -> bool:
        """Whether it is final: nothing that is run later changes it."""
        return self.found not in ("undecided", "waiting")

    @property
    def final(self) -> bool:
        """Whether it has ended with something that its numbers say, which runs that diverge later leave as it is."""
        return self.ended and self.found not in ("unstable", "cannot say")

    @property
    def seeds(self) -> int:
        """Planned, of its look."""
        return self.looks[self.look - 1] if self.look else 0


@dataclass
class Comparison:
    """A technique against the baseline, pair by pair. Differences are technique minus baseline, as logged."""

    arm: str
    differences: NDArray[np.float64]
    seeds: int  # of the arm, or of the baseline where it has fewer: what is looked at
    share: float  # of the error, which this look may spend
    t: s.PairedT
    p_flip: float
    ratio: s.PairedT  # of training times, exponentiated
    images: s.PairedT | None  # the interval for new images
    p_mcnemar: float
    correlation: float
    p_holm: float = math.nan  # corrected for techniques and looks
    p_none: float = math.nan  # that the effect is smaller than the margin, corrected likewise
    detectable: tuple[float, float] = (math.nan, math.nan)  # at the verdict's level, and alone
    finding: str = ""
    verdict: str = ""
    cost: str = ""
    step: Step | None = None  # where several looks are planned
    later: int = 0  # pairs beyond the step's look, which are not used

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.differences)

    @property
    def level(self) -> float:
        """The interval covers 1 less this."""
        return s.ALPHA * self.share


@dataclass
class Together:
    """Two techniques and both at once."""

    both: str
    one: str
    other: str
    n: int
    interaction: s.Interaction
    text: str


@dataclass
class Table:
    """The arms of one data set, and each technique against the baseline."""

    data: str
    metric: Metric
    baseline: str
    arms: dict[str, Arm]
    plan: Plan
    settings: Settings
    comparisons: list[Comparison] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    rivals: frozenset[str] = frozenset()  # arms that are the baseline trained for longer
    shared: s.Shared | None = None  # the variance of a difference, pooled over the arms
    follows: bool = True  # a sweep's looks are read as it read them: its metric, of the last epoch's weights
    floor: float = math.nan  # sd of one run's accuracy that the test set's size alone brings
    examples: int = 0
    robustness: Any = None  # `reporting.robustness.Robustness`, where its runs were tested under corruptions
    elsewhere: Sequence[
        Any
    ] = ()  # `reporting.elsewhere.Elsewhere`, of each other data set that they were tested on
    mechanism: Any = None  # `reporting.mechanism.Mechanism`, where its runs were measured

    @property
    def tested(self) -> list[Comparison]:
        """The comparisons with a p value."""
        return [c for c in self.comparisons if not math.isnan(c.t.p) and c.arm not in self.rivals]

    @property
    def family(self) -> int:
        """The number of techniques that p values are corrected for.

        Never fewer because runs diverged, or because a planned technique got no more seeds.
        """
        diverged = [
            c
            for c in self.comparisons
            if math.isnan(c.t.p) and c.arm not in self.rivals and self.arms[c.arm].diverged
        ]
        return max(len(self.tested) + len(diverged), self.plan.techniques, 1)


def compare(runs: Sequence[Run], request: Request) -> list[Table]:
    """A table for each setting among the runs: a data set, or a data set and a network (`reporting.arms.by_setting`).

    Raises:
        ConfigError: where there are several arms and none is the baseline.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.data].append(run)
    settings: dict[str, list[Run]] = {}
    for data, group in sorted(groups.items()):
        settings |= by_setting(data, with_contents(group), request)
    return [_table(name, group, request) for name, group in settings.items()]


def _table(data: str, runs: Sequence[Run], request: Request) -> Table:
    check_versions(runs)
    runs = name_arms(runs)
    arms = sort_into_arms(runs)
    baseline = choose_baseline(data, arms, runs, request)
    arms = {baseline: arms[baseline], **arms}
    plan, settings = plan_of(runs, request), settings_of(arms, baseline)
    plan = plan._replace(remarks=(*plan.remarks, *said_of_the_data(arms, baseline)))
    rivals = _rival_arms(arms, baseline, runs)
    table = Table(
        data, request.metric, baseline, arms, plan, settings, rivals=rivals, follows=not request.best
    )
    return _filled(table, runs, request)


def rescored(table: Table, values: Mapping[Path, float], request: Request, margin: float | None) -> Table:
    """The same arms compared by other values of their runs; a run without one is incomplete.

    Args:
        table: of the report's metric.
        values: by the run's folder.
        request: with the metric that these are values of.
        margin: in its unit.
    """
    arms = {}
    for arm in table.arms.values():
        scored = {u: replace(r, value=values.get(r.path), correctness=None) for u, r in arm.runs.items()}
        incomplete = [*arm.incomplete, *(r for r in scored.values() if r.value is None)]
        arms[arm.name] = replace(
            arm, runs={u: r for u, r in scored.items() if r.value is not None}, incomplete=incomplete
        )
    plan = table.plan._replace(margin=margin, remarks=())
    again = Table(
        table.data,
        request.metric,
        table.baseline,
        arms,
        plan,
        table.settings,
        rivals=table.rivals,
        follows=False,
    )
    return _filled(again, [r for arm in arms.values() for r in arm.all_runs], request)


def _filled(table: Table, runs: Sequence[Run], request: Request) -> Table:
    """The table with its comparisons."""
    arms, baseline, plan = table.arms, table.baseline, table.plan
    _noise_floor(table)
    table.shared = _pooled(table)
    moderate = _moderating(table, request)
    base = arms[baseline]
    steps = _steps(table, moderate)
    table.comparisons = [
        _pair(arm, base, plan, moderate, steps.get(arm.name)) for arm in arms.values() if arm is not base
    ]
    found = _findings(table)
    for c in table.comparisons:
        _judge(c, table, request, found.get(c.arm, "undecided"))
    _label_costs(table, runs)
    table.together = list(_interactions(table, request))
    return table


def _noise_floor(table: Table) -> None:
    counts = [r.correctness.examples for a in table.arms.values() for r in a.runs.values() if r.correctness]
    base = table.arms[table.baseline].values
    if counts and len(base) and len(set(counts)) == 1:
        table.examples = counts[0]
        table.floor = s.noise_floor(float(1 - base.mean()), counts[0])


# Pairs


def _pairs(arm: Arm, base: Arm) -> list[tuple[Run, Run]]:
    return [(arm.runs[u], base.runs[u]) for u in sorted(set(arm.runs) & set(base.runs))]


def _pair(arm: Arm, base: Arm, plan: Plan, moderate: s.Shared | None, step: Step | None = None) -> Comparison:
    pairs, later = _pairs(arm, base), 0
    seeds = max(len(pairs), min(len(arm.all_runs), len(base.all_runs)))
    share = plan.share(seeds)
    if step is not None:
        at_look = [pair for pair in pairs if pair[0].unit in step.units]
        pairs, later = at_look, len(pairs) - len(at_look)
        seeds = min(sum(run.unit in step.units for run in of.all_runs) for of in (arm, base))
        share = s.share_of(step.seeds, step.looks) if step.look else share
    level = s.ALPHA * share
    mine, theirs = (np.array([p[i].value for p in pairs], dtype=np.float64) for i in (0, 1))
    differences = mine - theirs
    t = s.paired_t(differences, level, moderate)
    if is_copied(differences, base) or (step is not None and not step.look):
        t = t._replace(low=math.nan, high=math.nan, p=math.nan)
    logs = [
        math.log(a.seconds / b.seconds)
        for a, b in pairs
        if a.seconds and b.seconds and a.compiled == b.compiled
    ]
    ratio = s.paired_t(logs)
    ratio = ratio._replace(**{k: float(np.exp(getattr(ratio, k))) for k in ("mean", "low", "high")})
    images, p_mcnemar = None, math.nan
    right = [(a.correctness, b.correctness) for a, b in pairs]
    known = [(a, b) for a, b in right if a is not None and b is not None and a.samples == b.samples]
    if known and len(known) == len(pairs) and len({a.samples for a, _ in known}) == 1:
        technique, baseline = (np.stack([pair[i].unpack() for pair in known]) for i in (0, 1))
        if len(pairs) == 1:
            p_mcnemar = s.mcnemar(technique[0], baseline[0])
        elif not math.isnan(t.low):
            images = s.new_images(technique, baseline, level)
    varies = len(pairs) >= 10 and mine.std() > 0 and theirs.std() > 0
    return Comparison(
        arm=arm.name,
        differences=differences,
        seeds=seeds,
        share=share,
        t=t,
        p_flip=s.sign_flip_p(differences),
        ratio=ratio,
        images=images,
        p_mcnemar=p_mcnemar,
        correlation=float(np.corrcoef(mine, theirs)[0, 1]) if varies else math.nan,
        step=step,
        later=later,
    )


def is_copied(differences: NDArray[np.float64], base: Arm) -> bool:
    """Whether all pairs differ by the same, as copies of runs do."""
    if len(differences) < 2:
        return False
    return bool(differences.std(ddof=1) <= s.COPIED * np.abs(base.values).max())


def _pooled(table: Table) -> s.Shared | None:
    arms = [arm for arm in table.arms.values() if len(arm.runs) > 1]
    common = sorted(set.intersection(*(set(a.runs) for a in arms))) if arms else []
    if not common:
        return None
    values = np.array([[arm.runs[u].value for u in common] for arm in arms], dtype=np.float64)
    return s.pooled_difference(values)


def _moderating(table: Table, request: Request) -> s.Shared | None:
    if not request.shared_variance:
        return None
    if table.shared is None or len(table.arms) < 4:
        raise ConfigError(
            f"variance=shared needs 3 techniques or more with 2 common seeds or more; {table.data} has not",
            see=SEE,
        )
    return table.shared


# Planned looks


def _steps(table: Table, moderate: s.Shared | None) -> dict[str, Step]:
    """Where the arms stand for which several looks are planned: those of one sweep together."""
    groups: dict[Any, list[str]] = defaultdict(list)
    sweeps: dict[Any, Sweep] = {}
    others = []
    for arm in table.arms.values():
        if arm.name in (table.baseline, *table.rivals):
            continue
        own = first_sweep(arm.recorded)
        if (
            own is not None
            and own.decides is not None
            and table.follows
            and own.decides.metric == table.metric.name
            and arm.name in members(own, table.arms, table.baseline).values()
        ):
            sweeps[own.plan] = own
            groups[own.plan].append(arm.name)
        else:
            others.append(arm)
    found: dict[str, Step] = {}
    for key, names in groups.items():
        sweep = sweeps[key]
        held = members(sweep, table.arms, table.baseline)
        arms = {planned: table.arms[name] for planned, name in held.items()}
        steps = steps_of_sweep(
            sweep, arms, sweep.baseline or "baseline", table.metric.sign, table.plan.margin, moderate
        )
        found |= {held[planned]: step for planned, step in steps.items() if held.get(planned) in names}
    if others and len(table.plan.seeds) > 1:
        found |= _as_they_come(table, others, moderate)
    return found


def members(sweep: Sweep, arms: Mapping[str, Arm], baseline: str | None = None) -> dict[str, str]:
    """Which arms a plan's are, by its names for them; none where its baseline is not this one (None: any).

    See `Sweep.arm_of`.
    """
    found: dict[str, str] = {}
    for arm in arms.values():
        for run in arm.recorded:
            if (planned := sweep.arm_of(run)) is not None:
                found.setdefault(planned, arm.name)
    return found if baseline in (None, found.get(sweep.baseline or "baseline")) else {}


def steps_of_sweep(
    sweep: Sweep,
    arms: Mapping[str, Arm],
    baseline: str,
    sign: int,
    margin: float | None,
    moderate: s.Shared | None = None,
) -> dict[str, Step]:
    """Where each technique of a sweep of `until=decided` stands; those that have no run yet, too.

    Args:
        sweep: what was planned.
        arms: by name.
        baseline: its name.
        sign: +1 where a higher metric is better, else -1.
        margin: as logged.
        moderate: `variance=shared`.
    """
    assert sweep.decides is not None
    tried = {name: arms.get(name, Arm(name)) for name in sorted(sweep.techniques)}
    looks = Looks(sweep.planned, len(tried), margin, sweep.decides.futility, sweep.decides.order)
    units = [sweep.units] * len(tried)
    return _replayed(tried, arms.get(baseline, Arm(baseline)), units, looks, sign, moderate)


def _as_they_come(table: Table, arms: Sequence[Arm], moderate: s.Shared | None) -> dict[str, Step]:
    """Where each of these arms stands that no sweep leads: it is read when it and the baseline have the seeds."""
    looks = Looks(table.plan.seeds, max(len(arms), table.plan.techniques), table.plan.margin)
    units = [_planned_units(arm, table, looks.at[-1]) for arm in arms]
    base, sign = table.arms[table.baseline], table.metric.sign
    found = _replayed({arm.name: arm for arm in arms}, base, units, looks, sign, moderate)
    led = {
        arm.name for arm in arms if (own := first_sweep(arm.recorded)) is not None and own.decides is not None
    }
    return {name: step._replace(closed=name in led) for name, step in found.items()}


def _planned_units(arm: Arm, table: Table, count: int) -> list[Unit]:
    """The first seeds of an arm in the order in which they were planned.

    That of the records of its sweeps, or of the baseline's where it has none; after these as they are numbered from the
    table's first on, whether there is a run or not: what is still at work must not let a later seed take its place.
    """
    sweeps: dict[tuple[float, str], Sweep] = {}
    for of in (arm, table.arms[table.baseline]):
        own = [run.sweep for run in of.recorded if run.sweep is not None and run.sweep.units]
        sweeps = sweeps or {(sweep.created, sweep.folder): sweep for sweep in own}
    listed = [unit for _, sweep in sorted(sweeps.items()) for unit in sweep.units]
    seeds, folds = zip(*(run.unit for one in table.arms.values() for run in one.recorded), strict=True)
    following = range(min(seeds), min(seeds) + len(listed) + count)
    numbered = [(seed, fold) for seed in following for fold in sorted(set(folds))]
    return list(dict.fromkeys([*listed, *numbered]))[:count]


def _replayed(
    arms: Mapping[str, Arm],
    base: Arm,
    units: Sequence[Sequence[Unit]],
    looks: Looks,
    sign: int,
    moderate: s.Shared | None,
) -> dict[str, Step]:
    """Where each arm stands, read no further than it is known what became of its planned seeds and the baseline's.

    Args:
        arms: techniques, by the name that they are asked for by.
        base: the baseline.
        units: each arm's, in the order planned.
        looks: the plan.
        sign: +1 where a higher metric is better, else -1.
        moderate: `variance=shared`.
    """
    d = np.full((len(arms), max(looks.at[-1], *map(len, units))), np.nan)
    settled, wrecked = [], np.full(len(arms), np.inf)
    without = {run.unit for run in base.dropped}
    for i, (arm, planned) in enumerate(zip(arms.values(), units, strict=True)):
        dropped, diverged = ({run.unit for run in runs} for runs in (arm.dropped, arm.diverged))
        known = [
            (unit in arm.runs or unit in dropped or unit in diverged)
            and (unit in base.runs or unit in without)
            for unit in planned
        ]
        settled.append(known.index(False) if False in known else len(planned))
        wrecked[i] = next((j for j, unit in enumerate(planned, 1) if unit in diverged), np.inf)
        for j, unit in enumerate(planned):
            if unit in arm.runs and unit in base.runs:
                d[i, j] = sign * ((arm.runs[unit].value or 0.0) - (base.runs[unit].value or 0.0))
    steps = replay(d, looks, settled, wrecked, moderate)
    return {
        name: Step(
            found=str(steps.found[i]),
            look=int(steps.number[i]),
            looks=looks.at,
            family=looks.family,
            units=frozenset(units[i][: steps.seeds[i] or looks.at[0]]),
            p=float(steps.p[i]),
            p_none=float(steps.p_none[i]),
            chance=float(steps.chance[i]),
            wanted=int(steps.wanted[i]),
            runs=int(steps.runs),
        )
        for i, name in enumerate(arms)
    }


# Verdicts


def _findings(table: Table) -> dict[str, str]:
    """What the numbers of each tested arm say; their corrected p values are set."""
    for c in table.comparisons:
        if c.step is not None:
            c.p_holm, c.p_none = c.step.p, c.step.p_none
    found = {c.arm: c.step.found for c in table.comparisons if c.step is not None}
    tested = [c for c in table.tested if c.step is None]
    if not tested:
        return found
    columns = zip(*(c.t.times(table.metric.sign) for c in tested), strict=True)
    t = s.PairedT(*(np.array(column, dtype=np.float64) for column in columns))
    at_once = s.findings(t, table.plan.margin, table.family)
    for c, p, p_none in zip(tested, at_once.p, at_once.p_none, strict=True):
        c.p_holm, c.p_none = float(p), float(p_none)
    return found | {c.arm: str(finding) for c, finding in zip(tested, at_once.found, strict=True)}


def _judge(c: Comparison, table: Table, request: Request, finding: str) -> None:
    """Set finding, verdict and detectable effect: the first rule that holds.

    Args:
        finding: what the numbers alone say.
    """
    if c.arm in table.rivals:
        c.finding, c.verdict = "rival", "no technique: the baseline trained for longer, to measure costs by"
        return
    if c.n >= 3 and not math.isnan(c.t.low):
        sd = math.sqrt(table.shared.variance) if table.shared else float(c.t.sd)
        alphas = (c.level / family_of(c, table), c.level)
        c.detectable = tuple(s.detectable_effect(c.n, a) * sd for a in alphas)  # type: ignore[assignment]
    c.finding, c.verdict = _verdict(c, table, request, finding)


def _verdict(c: Comparison, table: Table, request: Request, finding: str) -> tuple[str, str]:
    arm, base = table.arms[c.arm], table.arms[table.baseline]
    metric, margin = table.metric, table.plan.margin
    final = c.step is not None and c.step.final
    if (unfit := _unfit((arm, base), final, table, request)) is not None:
        return unfit
    if c.step is not None and final:
        return _at_a_look(c, c.step, table)
    pairs = f"{c.n} pair{'' if c.n == 1 else 's'}"
    if c.step is not None and not c.step.look:
        return "waiting", f"no look yet: {c.seeds} of {c.step.looks[0]} seeds" + _unused(c)
    if c.n < 3 and not is_copied(c.differences, base):
        return "cannot say", f"cannot say ({pairs})"
    if is_copied(c.differences, base) or (c.step is not None and c.step.found == "cannot say"):
        return "cannot say", f"cannot say ({pairs}, all with the same difference)"
    if c.step is not None:
        return _at_a_look(c, c.step, table)
    shown = "" if margin is None else f"{metric.formatted(margin)}{metric.unit}"
    if finding == "no difference":
        return finding, f"no difference larger than {shown}"
    if finding != "undecided":
        return finding, f"{finding} than {shown}" if " by " in finding else finding
    low, high = (metric.formatted(float(bound), signed=True) for bound in (c.t.low, c.t.high))
    text = f"undecided: between {low} and {high}{metric.unit}{_alone(c, table)}"
    return finding, text + more_seeds(c, table)


def _unfit(arms: Sequence[Arm], final: bool, table: Table, request: Request) -> tuple[str, str] | None:
    """Why nothing is said of these arms, whatever their numbers: finding and verdict; None: they may be judged.

    Args:
        arms: the one that is judged, then those that it is held against.
        final: it was found at a planned look, so that it does not matter what became of later seeds.
        table: theirs.
        request: of the report.
    """
    selected = _selected_on_scored(table, request.best)
    if final and not selected:
        return None
    for arm in arms:
        if arm.diverged:
            whose = "" if arm is arms[0] else f" {arm.name}"
            return "unstable", f"unstable: {len(arm.diverged)} of {len(arm.all_runs)}{whose} runs diverged"
    if selected:
        return "cannot say", f"cannot say (selected on {table.metric.split})"
    if any(arm.incomplete for arm in arms):
        return "cannot say", f"cannot say ({table.metric.name} is not in all runs)"
    return None


def family_of(c: Comparison, table: Table) -> int:
    """The number of techniques that a comparison is corrected for."""
    return table.family if c.step is None else c.step.family


def _alone(c: Comparison, table: Table) -> str:
    """What an undecided arm's interval would say if there were no other arm."""
    margin, correction = table.plan.margin, f"alone, not after correction for {family_of(c, table)})"
    if c.t.low > 0 or c.t.high < 0:
        return f" (excludes 0 {correction}"
    if margin is not None and -margin < c.t.low and c.t.high < margin:
        return f" (within ±{table.metric.formatted(margin)}{table.metric.unit} {correction}"
    return ""


def _at_a_look(c: Comparison, step: Step, table: Table) -> tuple[str, str]:
    """The verdict of the last look that was reached."""
    metric, margin, last = table.metric, table.plan.margin, step.looks[-1]
    shown = "" if margin is None else f"{metric.formatted(margin)}{metric.unit}"
    low, high = (metric.formatted(float(bound), signed=True) for bound in (c.t.low, c.t.high))
    between = f"between {low} and {high}{metric.unit}{_alone(c, table)}"
    where = f"look {step.look} of {len(step.looks)}, {step.seeds} seeds"
    if step.found == "stopped":
        text = f"stopped at {step.seeds} seeds: {between}; chance of a decision by {last} seeds {step.chance:.0%}"
    elif step.found == "undecided" and step.look == len(step.looks):
        text = f"undecided at the last look ({step.seeds} seeds): {between}"
    elif step.found == "undecided" and step.closed:
        text = f"undecided: {between} ({where})"
    elif step.found == "undecided":
        following = step.looks[step.look]
        ahead = f"next look at {following} seeds (chance of a decision {step.chance:.0%})"
        text = f"undecided: {between} ({where}); {ahead}"
    elif step.found == "no difference":
        text = f"no difference larger than {shown} ({where}, p over all looks {formatted_p(step.p_none)})"
    else:
        size = f"{step.found} than {shown}" if " by " in step.found else step.found
        text = f"{size} ({where}, p over all looks {formatted_p(step.p)})"
    return step.found, text + _unused(c)


def _unused(c: Comparison) -> str:
    return f"; {c.later} later seed{'' if c.later == 1 else 's'} not used" if c.later else ""


def formatted_p(p: float) -> str:
    """A p value as the report shows it."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _selected_on_scored(table: Table, best: bool) -> bool:
    """Whether the scored weights were chosen by the split that scores them."""
    if not best:
        return False
    if table.metric.split == "val":
        return True
    splits = {r.settings.get("data.module.val_split") for a in table.arms.values() for r in a.all_runs}
    return table.metric.split == "test" and "test" in splits


def more_seeds(c: Comparison, table: Table) -> str:
    """What an undecided arm would take; empty where that cannot be told."""
    margin, shared, techniques = table.plan.margin, table.shared, table.family
    if margin is None or shared is None or shared.variance == 0:
        return ""
    more = s.more_seeds(c.n, margin, shared, s.ALPHA / techniques)
    if more.about is None:
        shown = f"{table.metric.formatted(margin)}{table.metric.unit}"
        return f"; not resolvable at {shown}: it would take more than {s.MOST_SEEDS} seeds"
    if techniques == 1 and c.n < 5:  # one sd of so few pairs says next to nothing
        return f"; about {more.about} more seeds (between 5 and 40)"
    high = f"more than {s.MOST_SEEDS - c.n}" if more.high is None else str(more.high)
    return f"; about {more.about} more seeds ({more.low} to {high})"


# Cost beside gain


def _label_costs(table: Table, runs: Sequence[Run]) -> None:
    """*free*, *pays*, *dominated*, else *trade-off open*; only where there is a verdict and a time ratio."""
    rivals = {c.arm: rival for c in table.comparisons if (rival := _rival(c, table, runs)) is not None}
    tests = {arm: _against(table.arms[arm], table.arms[rival], table) for arm, rival in rivals.items()}
    testable = {arm: t for arm, t in tests.items() if not math.isnan(t.p)}
    shares = {c.arm: c.share for c in table.comparisons}
    p_values = s.holm([t.p / shares[arm] for arm, t in testable.items()])
    corrected = dict(zip(testable, p_values, strict=True))
    for c in table.comparisons:
        if c.finding in ("unstable", "cannot say", "rival", "waiting") or math.isnan(c.ratio.low):
            continue
        helps = c.finding.startswith("helps")
        beats = c.arm in corrected and corrected[c.arm] <= s.ALPHA and testable[c.arm].mean > 0
        if helps and c.ratio.high <= s.SAME_COST:
            c.cost = "free"
        elif helps and beats:
            c.cost = f"pays (beats {rivals[c.arm]})"
        elif c.finding.startswith(("hurts", "no difference")) and c.ratio.low > s.SAME_COST:
            c.cost = "dominated"
        else:
            c.cost = "trade-off open"


def _rival_arms(arms: Iterable[str], baseline: str, runs: Sequence[Run]) -> frozenset[str]:
    """The arms that a sweep recorded as such (with what was added to their names), or that have such a name."""
    recorded = {name for r in runs if r.sweep is not None for name in r.sweep.rivals.values()}
    named = {a for a in arms if any(a == name or a.startswith(f"{name} ") for name in recorded)}
    return frozenset(named | {a for a in arms if _times_longer(a, baseline) is not None})


def _times_longer(arm: str, baseline: str) -> float | None:
    """2.03 for the arm `baseline_x2.03`."""
    longer = re.fullmatch(re.escape(baseline) + r"[ _]x(\d+(?:\.\d+)?)", arm)
    return float(longer[1]) if longer else None


def _rival(c: Comparison, table: Table, runs: Sequence[Run]) -> str | None:
    """The baseline that was trained for as long as this arm takes, where there is one."""
    recorded = [r.sweep.rivals[c.arm] for r in runs if r.sweep is not None and c.arm in r.sweep.rivals]
    if recorded:
        return recorded[-1] if recorded[-1] in table.arms else None
    best = None
    for name in table.rivals:
        times = _times_longer(name, table.baseline)
        if times is not None:
            off = abs(math.log(times / c.ratio.mean)) if c.ratio.mean > 0 else math.inf
            best = min(best or (math.inf, ""), (off, name))
    return best[1] if best is not None and best[0] < math.log(1.1) else None


def _against(arm: Arm, rival: Arm, table: Table) -> s.PairedT:
    """Differences in the good direction."""
    values = [(a.value or 0.0) - (b.value or 0.0) for a, b in _pairs(arm, rival)]
    return s.paired_t(table.metric.sign * np.array(values))


# Two techniques together


def _interactions(table: Table, request: Request) -> Iterable[Together]:
    """Every arm with both of two techniques, where the arms with one each and with neither are there too."""
    by_techniques = {
        arm.techniques: arm for arm in table.arms.values() if arm.name == "+".join(sorted(arm.techniques))
    }
    base = table.arms[table.baseline]
    by_techniques.setdefault(base.techniques, base)
    for techniques, both in sorted(by_techniques.items(), key=lambda item: item[1].name):
        for x, y in combinations(sorted(techniques), 2):
            others = [by_techniques.get(techniques - without) for without in ({y}, {x}, {x, y})]
            arms = [both, *(arm for arm in others if arm is not None)]
            if len(arms) == 4 and (found := _together(arms, table, request)) is not None:
                yield found


def _together(arms: Sequence[Arm], table: Table, request: Request) -> Together | None:
    """What is to be said of two techniques at once, by the rules that each is judged by; None: they share no seed.

    Args:
        arms: with both, with one, with the other, with neither. Where looks were planned, the earliest at which one of
            them stands is read.
        table: theirs.
        request: of the report.
    """
    names = {arm.name for arm in arms}
    steps = [c.step for c in table.comparisons if c.arm in names and c.step is not None]
    units = sorted(set.intersection(*(set(arm.runs) for arm in arms), *(set(step.units) for step in steps)))
    if not units:
        return None
    level, first = table.plan.level(len(units)), min(steps, key=lambda step: step.seeds, default=None)
    if first is not None and first.look:
        level = s.ALPHA * s.share_of(first.seeds, first.looks)
    values = [np.array([arm.runs[u].value for u in units], dtype=np.float64) for arm in arms]
    error = (lambda a: 1 - a) if table.metric.higher_is_better else (lambda a: a)
    found = s.interaction(values, error, table.metric.sign, level)
    both, one, other, neither = values
    seeds = f"{len(units)} seed{'' if len(units) == 1 else 's'}"
    final = first is not None and all(step.final for step in steps)
    if (unfit := _unfit(arms, final, table, request)) is not None:
        finding, text = unfit
    elif first is not None and not first.look:
        finding, text = "waiting", f"no look yet: {len(units)} of {first.looks[0]} seeds"
        parts = {name: getattr(found, name) for name in ("points", "logs", "best_single")}
        found = found._replace(**{n: t._replace(low=math.nan, high=math.nan) for n, t in parts.items()})
    elif any(
        is_copied(d, arms[3])
        for d in (both - neither, one - neither, other - neither, both - one - other + neither)
    ):
        finding, text = "cannot say", f"cannot say ({seeds}, all with the same difference)"
    elif (finding := found.finding) == "adds up":
        half = max(abs(found.points.low), abs(found.points.high))
        text = f"adds up within ±{table.metric.formatted(half)}{table.metric.unit}"
    else:
        text = f"cannot say ({seeds})" if finding == "cannot say" else finding
    found = found._replace(finding=finding)
    return Together(arms[0].name, arms[1].name, arms[2].name, len(units), found, text)
