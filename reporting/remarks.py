"""What a table of arms deserves to be told in words: what a reader should look at, and how far its numbers reach."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from reporting import statistics as s
from reporting.arms import as_text, first_sweep, is_owned, is_setting, unit_name
from reporting.comparison import Comparison, Table, family_of, is_copied, members


def warnings(table: Table) -> list[str]:
    """What to look at before the verdicts are believed: runs, differences, seeds, settings, circumstances."""
    return [
        *_repeated(table),
        *_of_the_runs(table),
        *(w for c in table.comparisons for w in _of_a_difference(c, table)),
        *_of_the_seeds(table),
        *_unplanned_looks(table),
        *_planned_against_another(table),
        *_differing_within(table),
        *_also_differing(table),
        *_circumstances(table),
    ]


def before_more_seeds(table: Table) -> list[str]:
    """What of it is to be looked at before a sweep spends more seeds: runs, differences, spreads."""
    return [
        *_outliers(table),
        *(w for c in table.comparisons for w in _of_a_difference(c, table)),
        *_of_the_seeds(table),
    ]


def _repeated(table: Table) -> Iterable[str]:
    for name, arm in sorted(table.arms.items()):
        counted = {run.unit: run for run in arm.recorded}
        for unit in sorted({run.unit for run in arm.superseded}):
            others = [run.path.name for run in arm.superseded if run.unit == unit]
            yield (
                f"{name}, {unit_name(unit)}: {len(others) + 1} runs; {counted[unit].path.name} counts, "
                f"not {', '.join(others)}"
            )


def _outliers(table: Table) -> Iterable[str]:
    """Runs that diverged, or lie far from their arm."""
    arms = list(table.arms.values())
    for arm in arms:
        for run in arm.diverged:
            yield f"{arm.name}, {unit_name(run.unit)} diverged: {run.diverged} ({run.path.name})"
    for arm, distances in zip(arms, s.outlying([a.values for a in arms]), strict=True):
        for unit, distance in zip(sorted(arm.runs), distances, strict=True):
            if distance > s.OUTLIER_SD:
                where = arm.runs[unit].path.name
                sds = f"{distance:.0f} sd"
                yield f"{arm.name}, {unit_name(unit)} lies {sds} from its arm's median: look at this run ({where})"


def _of_the_runs(table: Table) -> Iterable[str]:
    """Runs and counts that a reader should go to."""
    yield from _outliers(table)
    for arm in table.arms.values():
        for run in arm.dropped:
            yield f"{arm.name}, {unit_name(run.unit)}: the sweep went on without this run ({run.path.name})"
        for run in arm.incomplete:
            why = f": {run.remark}" if run.remark else ""
            yield f"{arm.name}, {unit_name(run.unit)} has no {table.metric.name} ({run.path.name}){why}"
        for run in arm.runs.values():
            for remark in filter(None, (run.remark, run.nonfinite, run.unreadable, run.ended_early)):
                yield f"{arm.name}, {unit_name(run.unit)}: {remark} ({run.path.name})"
    if any(run.ended_early for arm in table.arms.values() for run in arm.runs.values()):
        yield "runs ended early, so lengths differ: a difference between arms is also one of training time"
    with_few_runs = [f"{arm.name} ({len(arm.runs)})" for arm in table.arms.values() if len(arm.runs) < 5]
    if with_few_runs:
        yield f"fewer than 5 runs: {', '.join(with_few_runs)}"
    base = table.arms[table.baseline]
    # more are not asked for
    at_look = {
        c.arm: c.step.units if c.step.look else frozenset() for c in table.comparisons if c.step is not None
    }
    for arm in table.arms.values():
        here, there = (set(a.runs) & at_look.get(arm.name, set(a.runs)) for a in (arm, base))
        without = sorted(here - there), sorted(there - here)
        for units, has, lacks in ((without[0], arm, base), (without[1], base, arm)):
            if units:
                listed = ", ".join(map(unit_name, units))
                yield f"missing pair: {has.name} has {listed}, {lacks.name} has not; not in the difference"
    if len({unit[1] for arm in table.arms.values() for unit in arm.runs}) > 1:
        yield "folds share training data, so their differences are not independent: intervals are too narrow"


def _of_a_difference(c: Comparison, table: Table) -> Iterable[str]:
    metric = table.metric
    if is_copied(c.differences, table.arms[table.baseline]):
        yield f"{c.arm}: every pair differs by the same {metric.formatted(float(c.t.mean), signed=True)}: copied runs?"
    median = float(np.median(c.differences)) if c.n else 0.0
    if c.n >= 3 and c.t.mean * median < 0:
        yield f"{c.arm}: mean and median of the differences have opposite signs; look at the single runs"
    if not math.isnan(c.p_flip + c.t.p) and (c.p_flip < s.ALPHA) != (c.t.p < s.ALPHA):
        yield f"{c.arm}: sign-flip test (p {c.p_flip:.3f}) and t test (p {c.t.p:.3f}) disagree about 0.05"


def _run_sd(table: Table) -> tuple[float, int]:
    """The sd of one run, pooled over the arms, and its degrees of freedom."""
    groups = [arm.values for arm in table.arms.values() if len(arm.runs) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def _of_the_seeds(table: Table) -> Iterable[str]:
    for arm in table.arms.values():
        # two seeds may well have as many test images right, but not the same losses too
        if len(arm.runs) > 1 and len({tuple(sorted(run.final.items())) for run in arm.runs.values()}) == 1:
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
        first = first_sweep(table.arms[c.arm].all_runs)
        if c.step is not None or first is None or not first.planned or c.n in first.planned or c.n < 3:
            continue
        planned = " or ".join(map(str, first.planned))
        when = "before the last" if c.n < max(first.planned) else "after the last"
        yield (
            f"{c.arm}: unplanned look: {c.n} pairs, planned were {planned} ({when}); looking until something "
            "is significant finds it too often (10 of 100 times with 3 to 5 seeds, 17 with 3 to 10)"
        )


def _planned_against_another(table: Table) -> Iterable[str]:
    """Arms whose looks were planned against another baseline than the table's."""
    found: dict[str, list[str]] = defaultdict(list)
    for arm in table.arms.values():
        own = first_sweep(arm.all_runs)
        if arm.name in (table.baseline, *table.rivals) or own is None or own.decides is None:
            continue
        if not members(own, table.arms, table.baseline):
            there = members(own, table.arms).get(own.baseline or "baseline")
            found[f"baseline={there}" if there else "a report of its runs alone"].append(arm.name)
    for way, names in found.items():
        whose, who = ("their looks were", "them") if len(names) > 1 else ("its looks were", "it")
        yield (
            f"{', '.join(names)}: {whose} planned against another baseline than {table.baseline}, against which "
            f"nothing was planned for {who}; {way} shows what was decided"
        )


def _differing_within(table: Table) -> Iterable[str]:
    for arm in table.arms.values():
        runs = arm.all_runs
        for name in sorted({n for r in runs for n in r.settings}):
            values = {r.path: as_text(r.settings.get(name)) for r in runs}
            if len(set(values.values())) == 1 or not is_setting(name):
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
            if values[arm.name] != values[table.baseline] and not is_owned(name, owned)
        ]
        if found and arm.name not in table.rivals:
            yield f"{arm.name} differs from {table.baseline} also in {', '.join(found)}"


def _circumstances(table: Table) -> Iterable[str]:
    runs = [r for arm in table.arms.values() for r in (*arm.all_runs, *arm.superseded)]
    commits, devices = ({getattr(r, what) for r in runs} - {""} for what in ("commit", "device"))
    if len(commits) > 1:
        yield f"runs come from {len(commits)} commits of the code: {', '.join(sorted(commits))}"
    if any(r.dirty for r in runs):
        yield "the code had uncommitted changes when some of the runs were made"
    compiled = sorted({arm.name for arm in table.arms.values() if any(r.compiled for r in arm.runs.values())})
    if compiled and not all(r.compiled for arm in table.arms.values() for r in arm.runs.values()):
        yield f"some runs were compiled ({', '.join(compiled)}), others not: these share no time ratio"
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        yield f"runs come from different devices ({names}): time ratios compare these too"


def notes(table: Table) -> Iterable[str]:
    """What the numbers of the table say, and what they do not."""
    metric, tested, shared = table.metric, table.tested, table.shared
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
    if not tested:
        return
    yield _rule(table)
    k, few = len(tested), min(tested, key=lambda c: c.n)
    levels = sorted({c.level for c in tested})
    covered = " or ".join(f"{100 * (1 - level):.3g}%" for level in levels)
    note = f"Each interval covers its own truth {covered} of the time"
    if k > 1:
        missed = 1 - math.prod(1 - c.level for c in tested)
        note += f"; among {k}, one or more miss in about {100 * missed:.0f} of 100 such tables"
    yield note + ". They say what holds on this test set, over seeds."
    if any(c.images is not None for c in table.comparisons):
        yield "The interval for new images says what holds for other images of the same kind."
    if any(c.images is not None and math.isnan(c.images.low) for c in table.comparisons):
        yield (
            "*Not estimable*: the seeds vary more than the images do, and so few of them cannot tell the images' share."
        )
    yield from _of_the_looks(table)
    if shared is not None and few.n > 1:
        sd, level, of = math.sqrt(shared.variance), few.level, family_of(few, table)
        corrected, alone = (s.detectable_effect(few.n, a) * sd for a in (level / of, level))
        yield (
            f"With {few.n} pairs and {of} technique{'' if of == 1 else 's'} this design finds effects above "
            f"{metric.formatted(corrected)}{metric.unit} 4 times in 5"
            + (f" (one technique alone: {metric.formatted(alone)}{metric.unit})." if of > 1 else ".")
        )
    if any(c.finding.startswith(("helps", "hurts")) and c.n <= 5 for c in tested):
        yield "Effects that are significant with 5 pairs or fewer tend to be overstated, by 1.3 to 2 times."


def _of_the_looks(table: Table) -> Iterable[str]:
    """What several planned looks mean for what is printed."""
    stepped = [c for c in table.comparisons if c.step is not None]
    for looks in sorted({c.step.looks for c in stepped if c.step is not None}):
        *before, last = looks
        shares = ", ".join(f"{n} ({s.share_of(n, looks):.3f})" for n in looks)
        yield (
            f"Looks planned at {', '.join(map(str, before))} and {last} seeds. Seeds beyond {last} can change no "
            f"finding. Each look may spend this share of the error of 5 in 100: {shares}; p over all looks and "
            "margin p are corrected for it."
        )
    for c in stepped:
        step = c.step
        if step is None or not step.look or step.look == len(step.looks) or math.isnan(c.t.low):
            continue
        if not step.ended:
            continue
        metric, plain = table.metric, s.paired_t(c.differences)
        wider = float((c.t.high - c.t.low) / (plain.high - plain.low))
        interval = f"{metric.formatted(float(c.t.low), True)} to {metric.formatted(float(c.t.high), True)}"
        text = (
            f"{c.arm}: {metric.formatted(float(c.t.mean), True)} ({interval}){metric.unit}. The interval allows for "
            "stopping early: over all ways a comparison can end it holds at least 95 times in 100, and at "
            f"{step.seeds} seeds it is {wider:.1f} times as wide as for {step.seeds} seeds fixed beforehand."
        )
        if step.found.startswith(("helps", "hurts")):
            word = step.found.split()[0]
            text += f" An early *{word}* was read because the difference looked large: expect a true one nearer 0."
        yield text


def percent(c: Comparison) -> str:
    """What the comparison's interval covers, as text."""
    return f"{100 * (1 - c.level):.3g}%"


def sd_of_detectable(table: Table) -> str:
    """Of which sd the detectable effects are; empty where there are none."""
    if all(math.isnan(c.detectable[0]) for c in table.comparisons):
        return ""
    metric, shared = table.metric, table.shared
    if shared is None:
        return " Both from each arm's own sd of the paired differences."
    sd = f"{metric.formatted(math.sqrt(shared.variance))}{metric.unit}"
    freedom = f"{shared.freedom} degrees of freedom"
    return f" Both from an sd of a paired difference of {sd}, pooled over all arms ({freedom})."


def _rule(table: Table) -> str:
    """Which rule judged the table, and whether it is that by which its runs were planned."""
    counts = sorted({family_of(c, table) for c in table.tested})
    family = f"{' or '.join(map(str, counts))} technique{'' if counts == [1] else 's'}"
    rule = (
        f"Judged by rule {s.RULE}: *helps* and *hurts* by Holm's correction, *no difference larger than* and *by less "
        f"than* the margin by a one-sided test against it, both corrected for {family} and for all planned looks."
    )
    if table.plan.rule == 2 and len(table.plan.seeds) > 1:
        rule += (
            " These runs were planned under rule 2, which read each arm at the seeds that it had: there a later look "
            "could take a finding back, and seeds between two looks counted."
        )
    if table.plan.rule == 1:
        rule += (
            " These runs were planned under rule 1, which said *no difference* where the interval lay within the "
            "margin, uncorrected, and held each look to one level: a report written then may say it of arms that are "
            "undecided here."
        )
    return rule
