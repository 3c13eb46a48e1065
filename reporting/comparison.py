"""Arms, pairs and verdicts: the runs of one data set compared with its baseline."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crucible.configuration import is_semantic
from crucible.options import ConfigError
from reporting import statistics as s
from reporting.records import Run, Sweep, Unit
from reporting.request import DEFAULT_MARGIN, SEE, Metric, Request


@dataclass
class Arm:
    """The runs of one arm by (seed, fold): those that count, and those that diverged or lack the metric."""

    name: str
    runs: dict[Unit, Run] = field(default_factory=dict)
    diverged: list[Run] = field(default_factory=list)
    incomplete: list[Run] = field(default_factory=list)

    @property
    def values(self) -> NDArray[np.float64]:
        """The metric of the runs that count, as logged, by seed."""
        return np.array([run.value for _, run in sorted(self.runs.items())], dtype=np.float64)

    @property
    def all_runs(self) -> list[Run]:
        """Runs that ended, diverged or not."""
        return [*self.runs.values(), *self.diverged, *self.incomplete]

    @property
    def techniques(self) -> frozenset[str]:
        return next((run.techniques for run in self.all_runs), frozenset())

    def spread(self) -> dict[str, float]:
        """Mean, sd, median, min and max of the runs that count, as logged; NaN where there are none."""
        values = self.values
        if not len(values):
            return dict.fromkeys(("mean", "sd", "median", "min", "max"), math.nan)
        return {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
            "median": float(np.median(values)),
            "min": float(values.min()),
            "max": float(values.max()),
        }

    def costs(self) -> dict[str, float]:
        """Seconds of training, images a second, images seen and MiB at the peak: means over the runs that count."""
        runs = list(self.runs.values())
        seen = (r.seconds * r.images_per_s if r.seconds and r.images_per_s else None for r in runs)
        return {
            "time_s": _mean(r.seconds for r in runs),
            "images_per_s": _mean(r.images_per_s for r in runs),
            "images": _mean(seen),
            "memory_mb": _mean(r.memory_mb for r in runs),
        }


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v]
    return sum(known) / len(known) if known else math.nan


class Plan(NamedTuple):
    """What was fixed before the runs: margin as logged (None: none), planned seeds, level of each look."""

    margin: float | None
    seeds: tuple[int, ...]
    level: float
    remarks: tuple[str, ...]


@dataclass
class Comparison:
    """A technique against the baseline, pair by pair. Differences are technique minus baseline, as logged."""

    arm: str
    differences: NDArray[np.float64]
    t: s.PairedT
    p_flip: float
    ratio: s.PairedT  # of training times, exponentiated
    images: s.PairedT | None  # the interval for new images
    p_mcnemar: float
    correlation: float
    p_holm: float = math.nan
    detectable: tuple[float, float] = (math.nan, math.nan)  # at the verdict's level, and alone
    finding: str = ""
    verdict: str = ""
    cost: str = ""

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.differences)


@dataclass
class Together:
    """Two techniques and both at once (each beside the techniques of `beside`)."""

    both: str
    one: str
    other: str
    n: int
    interaction: s.Interaction
    text: str


@dataclass
class Settings:
    """Options of the arms: those that differ between arms, and those that are the same everywhere."""

    differing: dict[str, dict[str, str]]  # option -> arm -> value
    equal: dict[str, str]


@dataclass
class Table:
    """The arms of one data set, each technique against the baseline, and what to look at."""

    data: str
    metric: Metric
    baseline: str
    arms: dict[str, Arm]
    plan: Plan
    settings: Settings
    warnings: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rivals: frozenset[str] = frozenset()  # arms that are the baseline trained for longer
    floor: float = math.nan  # sd of one run's accuracy that the test set's size alone brings
    examples: int = 0


def compare(runs: Sequence[Run], request: Request) -> list[Table]:
    """A table for each data set among the runs.

    Raises:
        ConfigError: where there are several arms and none is the baseline.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.data].append(run)
    return [_table(data, group, request) for data, group in sorted(groups.items())]


def _table(data: str, runs: Sequence[Run], request: Request) -> Table:
    arms, repeated = _sort_into_arms(runs)
    baseline = _choose_baseline(data, arms, runs, request)
    ordered = {baseline: arms[baseline], **arms}
    plan = _plan(runs, request)
    settings = _settings(ordered, baseline)
    rivals = _rival_arms(ordered, baseline, runs)
    table = Table(data, request.metric, baseline, ordered, plan, settings, rivals=rivals)
    _noise_floor(table)
    shared = _pooled(table)
    base = table.arms[baseline]
    moderate = _moderating(table, request, shared)
    table.comparisons = [_pair(arm, base, plan, moderate) for arm in table.arms.values() if arm is not base]
    testable = [c for c in table.comparisons if not math.isnan(c.t.p) and c.arm not in rivals]
    for c, p in zip(testable, s.holm([c.t.p for c in testable]), strict=True):
        c.p_holm = float(p)
    for c in table.comparisons:
        _judge(c, table, request, shared, len(testable))
    _label_costs(table, runs)
    table.together = list(_interactions(table))
    table.warnings = [
        *repeated,
        *_remarks(table),
        *(w for c in table.comparisons for w in _difference_warnings(c, table)),
        *_seed_warnings(table),
        *_unplanned_looks(table),
        *_differing_within(table),
        *_also_differing(table),
        *_circumstances(runs),
    ]
    table.notes = list(_notes(table, testable, shared))
    return table


def _sort_into_arms(runs: Sequence[Run]) -> tuple[dict[str, Arm], list[str]]:
    by_arm: dict[str, dict[Unit, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_arm[run.arm][run.unit].append(run)
    arms, repeated = {}, []
    for name, units in sorted(by_arm.items()):
        arm = arms[name] = Arm(name)
        for unit, same in sorted(units.items()):
            run = max(same, key=lambda r: (r.started, r.path.name))
            if len(same) > 1:
                others = ", ".join(r.path.name for r in same if r is not run)
                repeated.append(
                    f"{name}, {unit_name(unit)}: {len(same)} runs; {run.path.name} counts, not {others}"
                )
            if run.diverged:
                arm.diverged.append(run)
            elif run.value is None:
                arm.incomplete.append(run)
            else:
                arm.runs[unit] = run
    return arms, repeated


def _choose_baseline(data: str, arms: Mapping[str, Arm], runs: Sequence[Run], request: Request) -> str:
    """As asked for, else as the first sweep recorded it, else the arm `baseline`, else the only arm."""
    first = _first_sweep(runs)
    recorded = first.baseline if first is not None and not request.baseline_given else None
    for name in (recorded, request.baseline):
        if name is not None and name in arms:
            return name
    if len(arms) > 1 or request.baseline_given:
        asked = (
            f"baseline={request.baseline}: no such arm" if request.baseline_given else "baseline is missing"
        )
        raise ConfigError(f"{asked} in {data}; choose one of: {', '.join(arms)}", see=SEE)
    return next(iter(arms))


def unit_name(unit: Unit) -> str:
    """`seed 3`, or `seed 3 fold 1`."""
    return f"seed {unit[0]}" + (f" fold {unit[1]}" if unit[1] else "")


# What was fixed before the runs


def _first_sweep(runs: Iterable[Run]) -> Sweep | None:
    """The earliest: only what it fixed was fixed before anything was seen."""
    sweeps = [run.sweep for run in runs if run.sweep is not None]
    return min(sweeps, key=lambda w: (w.created, w.folder), default=None)


def _plan(runs: Sequence[Run], request: Request) -> Plan:
    metric = request.metric
    sweeps = {run.sweep.folder: run.sweep for run in runs if run.sweep is not None}
    first = _first_sweep(runs)
    recorded = first.margin_points if first and metric.default_margin is not None else None
    remarks = []
    if request.margin is not None:
        margin: float | None = request.margin
        asked = f"{metric.formatted(request.margin)} points"
        if recorded is None:
            remarks.append(f"The margin of {asked} was asked for now; no sweep recorded one before its runs.")
        elif not math.isclose(recorded / metric.scale, request.margin):
            remarks.append(
                f"This report was asked for a margin of {asked}; the sweep fixed {recorded:.2f} points before "
                "its runs. A margin chosen after a look at the results proves nothing."
            )
    elif recorded is not None:
        margin = recorded / metric.scale
    else:
        margin = metric.default_margin
        if margin is not None:
            remarks.append(
                f"No sweep recorded a margin before its runs; {DEFAULT_MARGIN:.2f} points is the default."
            )
    if len({w.margin_points for w in sweeps.values()}) > 1 and recorded is not None:
        listed = ", ".join(
            sorted(f"{w.margin_points:.2f}" for w in sweeps.values() if w.margin_points is not None)
        )
        remarks.append(
            f"The runs come from sweeps with different margins ({listed}); the first sweep's counts."
        )
    if any(run.sweep is None for run in runs) and first is not None:
        outside = sum(run.sweep is None for run in runs)
        remarks.append(f"{outside} of {len(runs)} runs belong to no recorded sweep.")
    planned = tuple(sorted(set(first.planned))) if first else ()
    return Plan(margin, planned, s.ladder_level(planned) if len(planned) > 1 else s.ALPHA, tuple(remarks))


# Pairs


def _pairs(arm: Arm, base: Arm) -> list[tuple[Run, Run]]:
    return [(arm.runs[u], base.runs[u]) for u in sorted(set(arm.runs) & set(base.runs))]


def _pair(arm: Arm, base: Arm, plan: Plan, moderate: s.Shared | None) -> Comparison:
    pairs = _pairs(arm, base)
    mine, theirs = (np.array([p[i].value for p in pairs], dtype=np.float64) for i in (0, 1))
    differences = mine - theirs
    t = s.paired_t(differences, plan.level, moderate)
    if _copied(differences, base):
        t = t._replace(low=math.nan, high=math.nan, p=math.nan)
    logs = [math.log(a.seconds / b.seconds) for a, b in pairs if a.seconds and b.seconds]
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
            images = s.new_images(technique, baseline, plan.level)
    varies = len(pairs) >= 10 and mine.std() > 0 and theirs.std() > 0
    return Comparison(
        arm=arm.name,
        differences=differences,
        t=t,
        p_flip=s.sign_flip_p(differences),
        ratio=ratio,
        images=images,
        p_mcnemar=p_mcnemar,
        correlation=float(np.corrcoef(mine, theirs)[0, 1]) if varies else math.nan,
    )


def _copied(differences: NDArray[np.float64], base: Arm) -> bool:
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


def _moderating(table: Table, request: Request, shared: s.Shared | None) -> s.Shared | None:
    if not request.shared_variance:
        return None
    if shared is None or len(table.arms) < 4:
        raise ConfigError(
            f"variance=shared needs 3 techniques or more with 2 common seeds or more; {table.data} has not",
            see=SEE,
        )
    return shared


# Verdicts


def _judge(c: Comparison, table: Table, request: Request, shared: s.Shared | None, techniques: int) -> None:
    """Set finding, verdict and detectable effect: the first rule that holds."""
    if c.arm in table.rivals:
        c.finding, c.verdict = "rival", "no technique: the baseline trained for longer, to measure costs by"
        return
    if c.n >= 3 and not math.isnan(c.t.low):
        sd = math.sqrt(shared.variance) if shared else float(c.t.sd)
        alphas = (table.plan.level / max(1, techniques), table.plan.level)
        c.detectable = tuple(s.detectable_effect(c.n, a) * sd for a in alphas)  # type: ignore[assignment]
    c.finding, c.verdict = _verdict(c, table, request, shared, techniques)


def _verdict(
    c: Comparison, table: Table, request: Request, shared: s.Shared | None, techniques: int
) -> tuple[str, str]:
    arm, base = table.arms[c.arm], table.arms[table.baseline]
    metric, margin = table.metric, table.plan.margin
    for who in (arm, base):
        if who.diverged:
            whose = "" if who is arm else f" {base.name}"
            return "unstable", f"unstable: {len(who.diverged)} of {len(who.all_runs)}{whose} runs diverged"
    pairs = f"{c.n} pair{'' if c.n == 1 else 's'}"
    if selected_on_scored(table, request.best):
        return "cannot say", f"cannot say (selected on {metric.split})"
    if arm.incomplete or base.incomplete:
        return "cannot say", f"cannot say ({metric.name} is not in all runs)"
    if _copied(c.differences, base):
        return "cannot say", f"cannot say ({pairs}, all with the same difference)"
    if c.n < 3:
        return "cannot say", f"cannot say ({pairs})"
    bounds = sorted((metric.sign * float(c.t.low), metric.sign * float(c.t.high)))
    finding = s.findings(bounds[0], bounds[1], c.p_holm, margin, table.plan.level)
    shown = "" if margin is None else f"{metric.formatted(margin)}{metric.unit}"
    if finding == "no difference":
        return finding, f"no difference larger than {shown}"
    if finding != "undecided":
        return finding, f"{finding} than {shown}" if " by " in finding else finding
    low, high = (metric.formatted(float(bound), signed=True) for bound in (c.t.low, c.t.high))
    text = f"undecided: between {low} and {high}{metric.unit}"
    if c.t.low > 0 or c.t.high < 0:
        text += f" (excludes 0 alone, not after correction for {techniques})"
    return finding, text + _more_seeds(c, table, shared, techniques)


def selected_on_scored(table: Table, best: bool) -> bool:
    """Whether the scored weights were chosen by the split that scores them."""
    if not best:
        return False
    if table.metric.split == "val":
        return True
    splits = {r.settings.get("data.module.val_split") for a in table.arms.values() for r in a.all_runs}
    return table.metric.split == "test" and "test" in splits


def _more_seeds(c: Comparison, table: Table, shared: s.Shared | None, techniques: int) -> str:
    margin = table.plan.margin
    if margin is None or shared is None or shared.variance == 0:
        return ""
    more = s.more_seeds(c.n, margin, shared, table.plan.level / techniques)
    if more.about is None:
        return f"; not resolvable at {table.metric.formatted(margin)}{table.metric.unit} (over {s.MOST_SEEDS} seeds)"
    if techniques == 1 and c.n < 5:  # one sd of so few pairs says next to nothing
        return f"; about {more.about} more seeds (between 5 and 40)"
    high = f"over {s.MOST_SEEDS - c.n}" if more.high is None else str(more.high)
    return f"; about {more.about} more seeds ({more.low} to {high})"


# Cost beside gain


def _label_costs(table: Table, runs: Sequence[Run]) -> None:
    """*free*, *pays*, *dominated*, else *trade-off open*; only where there is a verdict and a time ratio."""
    rivals = {c.arm: rival for c in table.comparisons if (rival := _rival(c, table, runs)) is not None}
    tests = {arm: _against(table.arms[arm], table.arms[rival], table) for arm, rival in rivals.items()}
    testable = {arm: t for arm, t in tests.items() if not math.isnan(t.p)}
    corrected = dict(zip(testable, s.holm([t.p for t in testable.values()]), strict=True))
    for c in table.comparisons:
        if c.finding in ("unstable", "cannot say", "rival") or math.isnan(c.ratio.low):
            continue
        helps = c.finding.startswith("helps")
        beats = c.arm in corrected and corrected[c.arm] < table.plan.level and testable[c.arm].mean > 0
        if helps and c.ratio.high <= s.SAME_COST:
            c.cost = "free"
        elif helps and beats:
            c.cost = f"pays (beats {rivals[c.arm]})"
        elif c.finding.startswith(("hurts", "no difference")) and c.ratio.low > s.SAME_COST:
            c.cost = "dominated"
        else:
            c.cost = "trade-off open"


def _rival_arms(arms: Iterable[str], baseline: str, runs: Sequence[Run]) -> frozenset[str]:
    """The arms that a sweep recorded as such, or that have such a name."""
    recorded = {name for r in runs if r.sweep is not None for name in r.sweep.rivals.values()}
    return frozenset(a for a in arms if a in recorded or _times_longer(a, baseline) is not None)


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
    return s.paired_t(table.metric.sign * np.array(values), table.plan.level)


# Two techniques together


def _interactions(table: Table) -> Iterable[Together]:
    """Every arm with both of two techniques, where the arms with one each and with neither are there too."""
    by_techniques = {
        arm.techniques: arm for arm in table.arms.values() if arm.name == "+".join(sorted(arm.techniques))
    }
    base = table.arms[table.baseline]
    by_techniques.setdefault(base.techniques, base)
    error = (lambda a: 1 - a) if table.metric.higher_is_better else (lambda a: a)
    for techniques, both in sorted(by_techniques.items(), key=lambda item: item[1].name):
        for x, y in combinations(sorted(techniques), 2):
            others = [by_techniques.get(techniques - without) for without in ({y}, {x}, {x, y})]
            if any(arm is None for arm in others):
                continue
            arms = [both, *(arm for arm in others if arm is not None)]
            units = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
            values = [np.array([arm.runs[u].value for u in units], dtype=np.float64) for arm in arms]
            if not units:
                continue
            found = s.interaction(values, error, table.metric.sign)
            text = found.finding
            if text == "adds up":
                half = max(abs(found.points.low), abs(found.points.high))
                text = f"adds up within ±{table.metric.formatted(half)}{table.metric.unit}"
            elif text == "cannot say":
                text = f"cannot say ({len(units)} seed{'' if len(units) == 1 else 's'})"
            yield Together(both.name, arms[1].name, arms[2].name, len(units), found, text)


# The settings of the arms


def _counts(name: str) -> bool:
    """Whether an option is one of the arm's settings; the fold is what arms are paired by."""
    return is_semantic(name) and name != "data.module.fold"


def _usual(arm: Arm) -> dict[str, str]:
    """Each option's most frequent value in the arm, as text."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in arm.all_runs:
        for name, value in run.settings.items():
            counts[name][_text(value)] += 1
    return {
        name: seen.most_common(1)[0][0]
        for name, seen in counts.items()
        if is_semantic(name) and name != "data.module.fold"
    }


def _text(value: Any) -> str:
    """As one would write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _settings(arms: Mapping[str, Arm], baseline: str) -> Settings:
    usual = {arm.name: _usual(arm) for arm in arms.values()}
    differing, equal = {}, {}
    for name in sorted({name for values in usual.values() for name in values}):
        known = {usual[arm][name] for arm in arms if name in usual[arm]}
        off = (
            known.pop() if known in ({"null"}, {"false"}) else "absent"
        )  # what an option was before there was one
        values = {arm: usual[arm].get(name, off) for arm in arms}
        if len(set(values.values())) > 1:
            differing[name] = values
        else:
            equal[name] = values[baseline]
    return Settings(differing, equal)


# Remarks


def _remarks(table: Table) -> Iterable[str]:
    """Runs and counts that a reader should go to."""
    for arm in table.arms.values():
        for run in arm.diverged:
            yield f"{arm.name}, {unit_name(run.unit)} diverged: {run.diverged} ({run.path.name})"
        for run in arm.incomplete:
            yield f"{arm.name}, {unit_name(run.unit)} has no {table.metric.name} ({run.path.name})"
        for run in arm.runs.values():
            if run.remark:
                yield f"{arm.name}, {unit_name(run.unit)}: {run.remark} ({run.path.name})"
    with_few_runs = [f"{arm.name} ({len(arm.runs)})" for arm in table.arms.values() if len(arm.runs) < 5]
    if with_few_runs:
        yield f"fewer than 5 runs: {', '.join(with_few_runs)}"
    base = table.arms[table.baseline]
    for arm in table.arms.values():
        without = sorted(set(arm.runs) - set(base.runs)), sorted(set(base.runs) - set(arm.runs))
        for units, there, lacks in ((without[0], arm, base), (without[1], base, arm)):
            if units:
                listed = ", ".join(map(unit_name, units))
                yield f"missing pair: {there.name} has {listed}, {lacks.name} has not; not in the difference"
    arms = list(table.arms.values())
    for arm, distances in zip(arms, s.outlying([a.values for a in arms]), strict=True):
        for unit, distance in zip(sorted(arm.runs), distances, strict=True):
            if distance > s.OUTLIER_SD:
                where = arm.runs[unit].path.name
                sds = f"{distance:.0f} sd"
                yield f"{arm.name}, {unit_name(unit)} lies {sds} from its arm's median: look at this run ({where})"
    if len({unit[1] for arm in arms for unit in arm.runs}) > 1:
        yield "folds share training data, so their differences are not independent: intervals are too narrow"


def _difference_warnings(c: Comparison, table: Table) -> Iterable[str]:
    metric = table.metric
    if _copied(c.differences, table.arms[table.baseline]):
        yield f"{c.arm}: every pair differs by the same {metric.formatted(float(c.t.mean), signed=True)}: copied runs?"
    median = float(np.median(c.differences)) if c.n else 0.0
    if c.n >= 3 and c.t.mean * median < 0:
        yield f"{c.arm}: mean and median of the differences have opposite signs; look at the single runs"
    if not math.isnan(c.p_flip + c.t.p) and (c.p_flip < s.ALPHA) != (c.t.p < s.ALPHA):
        yield f"{c.arm}: sign-flip test (p {c.p_flip:.3f}) and t test (p {c.t.p:.3f}) disagree about 0.05"


def _noise_floor(table: Table) -> None:
    counts = [r.correctness.examples for a in table.arms.values() for r in a.runs.values() if r.correctness]
    base = table.arms[table.baseline].values
    if counts and len(base) and len(set(counts)) == 1:
        table.examples = counts[0]
        table.floor = s.noise_floor(float(1 - base.mean()), counts[0])


def _run_sd(table: Table) -> tuple[float, int]:
    """The sd of one run, pooled over the arms, and its degrees of freedom."""
    groups = [arm.values for arm in table.arms.values() if len(arm.runs) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def _seed_warnings(table: Table) -> Iterable[str]:
    for arm in table.arms.values():
        if len(arm.runs) > 1 and len(set(arm.values.tolist())) == 1:
            yield f"{arm.name}: all seeds have the same {table.metric.name}; is the seed used?"
    sd, freedom = _run_sd(table)
    if math.isnan(table.floor) or freedom < 4:
        return
    shown, floor = (table.metric.formatted(v) for v in (sd, table.floor))
    if 0 < sd < 0.5 * table.floor:
        yield f"seeds hardly vary: sd {shown} of one run, noise floor {floor}; is the seed used?"
    elif sd > 1.5 * table.floor:
        yield f"training itself is unstable: sd {shown} of one run, noise floor {floor}"


def _unplanned_looks(table: Table) -> Iterable[str]:
    for c in table.comparisons:
        first = _first_sweep(table.arms[c.arm].all_runs)
        if first is None or not first.planned or c.n in first.planned or c.n < 3:
            continue
        planned = " or ".join(map(str, first.planned))
        when = "before the last" if c.n < max(first.planned) else "after the last"
        yield (
            f"{c.arm}: unplanned look: {c.n} pairs, planned were {planned} ({when}); looking until something "
            "is significant finds it too often (10 of 100 times with 3 to 5 seeds, 17 with 3 to 10)"
        )


def _differing_within(table: Table) -> Iterable[str]:
    for arm in table.arms.values():
        runs = arm.all_runs
        for name in sorted({n for r in runs for n in r.settings}):
            values = {r.path: _text(r.settings.get(name)) for r in runs}
            if len(set(values.values())) == 1 or not _counts(name):
                continue
            units: dict[str, list[str]] = defaultdict(list)
            for r in runs:
                units[values[r.path]].append(unit_name(r.unit))
            listed = "; ".join(f"{value}: {', '.join(who)}" for value, who in units.items())
            yield f"{arm.name}: its runs differ in {name} ({listed})"


def _also_differing(table: Table) -> Iterable[str]:
    """Options, other than those that make the arm, in which an arm differs from the baseline."""
    base_owned = {n for r in table.arms[table.baseline].runs.values() for n in r.owned}
    for arm in table.arms.values():
        owned = base_owned | {n for r in arm.runs.values() for n in r.owned}
        found = [
            f"{name} ({values[arm.name]}, {table.baseline} {values[table.baseline]})"
            for name, values in table.settings.differing.items()
            if values[arm.name] != values[table.baseline]
            and not any(name == own or name.startswith(f"{own}.") for own in owned)
        ]
        if found and arm.name not in table.rivals:
            yield f"{arm.name} differs from {table.baseline} also in {', '.join(found)}"


def _circumstances(runs: Sequence[Run]) -> Iterable[str]:
    commits, devices = ({getattr(r, what) for r in runs} - {""} for what in ("commit", "device"))
    if len(commits) > 1:
        yield f"runs come from {len(commits)} commits of the code: {', '.join(sorted(commits))}"
    if any(r.dirty for r in runs):
        yield "the code had uncommitted changes when some of the runs were made"
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        yield f"runs come from different devices ({names}): time ratios compare these too"


def _notes(table: Table, testable: Sequence[Comparison], shared: s.Shared | None) -> Iterable[str]:
    metric, level = table.metric, table.plan.level
    if not math.isnan(table.floor):
        sd, freedom = _run_sd(table)
        known = f"; one run's sd here is {metric.formatted(sd)}" if freedom else ""
        yield (
            f"Noise floor: {table.examples} test images alone make one run's accuracy vary with an sd of "
            f"{metric.formatted(table.floor)} points{known}. One difference between two runs is known to at best "
            f"±{metric.formatted(2.8 * table.floor)} points."
        )
    for c in table.comparisons:
        if not math.isnan(c.p_mcnemar):
            yield (
                f"{c.arm}: McNemar's p is {c.p_mcnemar:.3f}: whether these two networks differ, not whether the "
                "technique helps."
            )
    if not testable:
        return
    k, n = len(testable), min(c.n for c in testable)
    note = f"Each interval covers its own truth {100 * (1 - level):.3g}% of the time"
    if k > 1:
        note += (
            f"; among {k}, one or more miss in about {100 * (1 - (1 - level) ** k):.0f} of 100 such tables"
        )
    yield note + ". They say what holds on this test set, over seeds."
    if any(c.images is not None for c in table.comparisons):
        yield "The interval for new images says what holds for other images of the same kind."
    if len(table.plan.seeds) > 1:
        looks = ", ".join(map(str, table.plan.seeds))
        yield f"Looks were planned at {looks} seeds: each is held to {level:.4f}, all together err in 5 of 100."
    if shared is not None and n > 1:
        sd = math.sqrt(shared.variance)
        corrected, alone = (s.detectable_effect(n, a) * sd for a in (level / k, level))
        yield (
            f"With {n} pairs and {k} technique{'' if k == 1 else 's'} this design finds effects above "
            f"{metric.formatted(corrected)}{metric.unit} 4 times in 5"
            + (f" (one technique alone: {metric.formatted(alone)}{metric.unit})." if k > 1 else ".")
        )
    if any(c.finding.startswith(("helps", "hurts")) and c.n <= 5 for c in testable):
        yield "Effects that are significant with 5 pairs or fewer tend to be overstated, by 1.3 to 2 times."
