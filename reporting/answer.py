"""What was found, in one paragraph made from a table by rule: compared, helps, hurts, no difference, open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from reporting.arms import ranges
from reporting.comparison import Comparison, Table, more_seeds
from reporting.general import FEWEST, General, InGeneral, more_settings
from reporting.remarks import percent
from reporting.request import Request

NAMED = 6  # arms of one kind that the paragraph names
BASICS = {
    "network": "model._target_",
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "batch size": "data.module.batch_size",
    "optimizer": "model.optimizer",
    "learning rate": "model.lr",
}


def basics(table: Table, arm: str) -> dict[str, str]:
    """What an arm was trained with, by the names of `BASICS`; without what is not limited or not recorded."""
    found = {}
    for name, option in BASICS.items():
        differing = table.settings.differing.get(option)
        value = table.settings.equal.get(option) if differing is None else differing[arm]
        if value not in (None, "null", "absent", "-1"):
            found[name] = value.rpartition(".")[2] if name == "network" else value
    return found


def varying(table: Table) -> list[str]:
    """The names of `BASICS` in which arms differ."""
    return [name for name, option in BASICS.items() if option in table.settings.differing]


class Answer(NamedTuple):
    """A paragraph: what was compared, and by kind what was found."""

    compared: str
    found: Sequence[tuple[str, str]]


def answer(table: Table, request: Request) -> Answer:
    """The paragraph of one table."""
    kinds: dict[str, list[Comparison]] = {}
    for c in table.comparisons:
        kinds.setdefault(_kind(c), []).append(c)
    margin = table.plan.margin
    at_most = "" if margin is None else f" larger than {table.metric.formatted(margin)}{table.metric.unit}"
    found = []
    for kind, title, told in (
        ("helps", "Helps", _effect),
        ("hurts", "Hurts", _effect),
        ("no difference", f"No difference{at_most}", _interval),
        ("untold", "No verdict", _verdict),
    ):
        if arms := kinds.get(kind):
            sign = -table.metric.sign if kind == "helps" else table.metric.sign
            arms = sorted(arms, key=lambda c: sign * float(c.t.mean)) if kind in ("helps", "hurts") else arms
            found.append((title, _listed([told(c, table) for c in arms])))
    if kinds.keys() - {"helps", "rival"} and "helps" not in kinds:
        found.insert(0, ("Helps", "no technique is found to"))
    if arms := kinds.get("open"):
        found.insert(len(found) - ("untold" in kinds), ("Open", _open(arms, table)))
    if (under := under_corruptions(table)) is not None and under.comparisons:
        found.append(
            (
                f"Under corruptions ({under.metric.name})",
                _listed([_under(c, under) for c in under.comparisons]),
            )
        )
    return Answer(" ".join(_compared(table, request)), found)


def under_corruptions(table: Table) -> Table | None:
    """The arms compared by their accuracy under corruptions; None where they have not been tested so."""
    tables: Sequence[Table] = table.robustness.tables if table.robustness else ()
    return next((t for t in tables if t.metric.base == "acc_corrupted"), None)


def _under(c: Comparison, table: Table) -> str:
    word = c.finding.split(" ")[0]
    if word in ("helps", "hurts"):
        return f"{c.arm} {word} by {_shown(c, table)}"
    if c.finding == "no difference":
        return f"{c.arm}, {c.verdict} ({table.metric.formatted_interval(float(c.t.low), float(c.t.high))})"
    return f"{c.arm}, {c.verdict}"


def _listed(parts: Sequence[str]) -> str:
    more = f"; and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return f"{'; '.join(parts[:NAMED])}{more}"


def _open(arms: Sequence[Comparison], table: Table) -> str:
    """The undecided, those of one prospect together."""
    by_prospect: dict[str, list[Comparison]] = {}
    for c in arms:
        by_prospect.setdefault("" if c.step is not None else more_seeds(c, table), []).append(c)
    parts = []
    for prospect, group in by_prospect.items():
        if group[0].step is not None:
            parts.append(_listed([_verdict(c, table) for c in group]))
            continue
        listed = _listed([f"{c.arm}, between {_bounds(c, table)}" for c in group])
        each = "for each " if len(group) > 1 else ""
        parts.append(listed + prospect.replace("; ", f"; {each}", 1))
    return "; ".join(parts)


def _bounds(c: Comparison, table: Table) -> str:
    low, high = (table.metric.formatted(float(bound), True) for bound in (c.t.low, c.t.high))
    return f"{low} and {high}{table.metric.unit}"


def _kind(c: Comparison) -> str:
    word = c.finding.split(" ")[0]
    if word in ("helps", "hurts"):
        return word
    if c.finding == "rival":
        return "rival"
    if c.finding in ("unstable", "cannot say"):
        return "untold"
    return "no difference" if word == "no" else "open"


def _compared(table: Table, request: Request) -> Iterable[str]:
    metric, plan, base = table.metric, table.plan, table.arms[table.baseline]
    techniques = [c.arm for c in table.comparisons if c.arm not in table.rivals]
    shown = ", ".join(techniques[:NAMED]) + (
        f" and {len(techniques) - NAMED} more" if techniques[NAMED:] else ""
    )
    against = f"{shown} against {table.baseline}" if techniques else table.baseline
    scored = "of the weights that were best on validation" if request.best else "of the last epoch"
    better = "higher" if metric.higher_is_better else "lower"
    measured = f"{metric.name}{' in %' if metric.is_fraction else ''} {scored} ({better} is better)"
    yield f"{against}, by {measured}; {', '.join(_trained_with(table))}."
    runs = base.all_runs
    seeds, folds = sorted({r.unit[0] for r in runs}), sorted({r.unit[1] for r in runs})
    design = [f"seeds {ranges(seeds)} of {table.baseline}" if seeds else f"no run of {table.baseline}"]
    if folds not in ([], [0]):
        design.append(f"folds {ranges(folds)}")
    if counts := sorted({c.n for c in table.comparisons if c.arm not in table.rivals}):
        design.append(f"{_span(counts)} pair{'' if counts == [1] else 's'} an arm")
    if plan.seeds:
        kind = "looks planned at" if len(plan.seeds) > 1 else "planned seeds"
        design.append(f"{kind} {', '.join(map(str, plan.seeds))}")
    if table.comparisons:
        shown = "no margin" if plan.margin is None else f"margin {metric.formatted(plan.margin)}{metric.unit}"
        design.append(shown)
    if request.shared_variance:
        design.append("variance shared by the arms (moderated)")
    level = base.spread()
    if not math.isnan(level["mean"]):
        sd = "" if math.isnan(level["sd"]) else f", sd of a run {metric.formatted(level['sd'])}"
        design.append(
            f"{table.baseline} has {metric.formatted(level['mean'])}{'%' if metric.is_fraction else ''}{sd}"
        )
    yield f"{_capital('; '.join(design))}."


def _trained_with(table: Table) -> Iterable[str]:
    """Data, network, length, batch, rate: the baseline's, and where arms differ theirs."""
    own = basics(table, table.baseline)
    parameters = next((r.parameters for r in table.arms[table.baseline].all_runs if r.parameters), None)
    yield f"data {table.data}"
    for name, value in own.items():
        size = f" ({_count(parameters)} parameters)" if name == "network" and parameters else ""
        text = f"{value} {name}{size}" if name in ("epochs", "steps") else f"{name} {value}{size}"
        if name in varying(table):
            others = {arm: basics(table, arm).get(name, "-") for arm in table.arms}
            others = {arm: v for arm, v in others.items() if v != value}
            listed = [f"{arm}: {v}" for arm, v in list(others.items())[:NAMED]]
            listed += [f"and {len(others) - NAMED} arms with others"] if len(others) > NAMED else []
            text += f" ({', '.join(listed)})"
        yield text
        if name == "network":
            yield from _typed_of_the_model(table)


def _typed_of_the_model(table: Table) -> Iterable[str]:
    """What was typed of the model beside the `BASICS` (`model.norm=none` is another network), alike in all arms.

    Of paths, the last part: a page may be published.
    """
    typed = (
        o.lstrip("+").partition("=")[0] for r in table.arms[table.baseline].all_runs for o in r.overrides
    )
    equal = table.settings.equal
    options = [
        o for o in dict.fromkeys(typed) if o.startswith("model.") and o not in BASICS.values() and o in equal
    ]
    for option in options[:NAMED]:
        folder, _, value = equal[option].rpartition("/")
        yield f"{option}={'.../' if folder else ''}{value}"
    if options[NAMED:]:
        yield f"{len(options) - NAMED} more of the model"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith(("seeds ", "no run")) else text


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _effect(c: Comparison, table: Table) -> str:
    metric = table.metric
    parts = [f"{c.arm} by {_shown(c, table)}"]
    if size := c.finding.partition(" ")[2]:
        margin = "" if table.plan.margin is None else f"{metric.formatted(table.plan.margin)}{metric.unit}"
        parts[0] += f", {size} than {margin}"
    return ", ".join([*parts, *_cost(c, table)])


def _shown(c: Comparison, table: Table) -> str:
    metric = table.metric
    interval = f"{percent(c)} interval {metric.formatted_interval(float(c.t.low), float(c.t.high))}"
    return f"{metric.formatted(float(c.t.mean), True)}{metric.unit} ({interval})"


def _interval(c: Comparison, table: Table) -> str:
    interval = table.metric.formatted_interval(float(c.t.low), float(c.t.high))
    return ", ".join([f"{c.arm} ({interval})", *_cost(c, table)])


def _cost(c: Comparison, table: Table) -> Iterable[str]:
    if not math.isnan(c.ratio.mean):
        known = not math.isnan(c.ratio.low)
        yield f"time x{c.ratio.mean:.2f}" + (f" ({c.ratio.low:.2f} to {c.ratio.high:.2f})" if known else "")
    mine, others = (table.arms[name].costs()["memory_mb"] for name in (c.arm, table.baseline))
    if not math.isnan(mine / others):
        yield f"memory x{mine / others:.2f}"
    if c.cost:
        yield c.cost


def _verdict(c: Comparison, table: Table) -> str:
    text = c.verdict.removeprefix("undecided: ")
    if c.finding == "cannot say" and c.n < 3 and text == f"cannot say ({c.n} pair{'' if c.n == 1 else 's'})":
        text += "; a verdict takes 3 pairs at least"
    return f"{c.arm}, {text}"


# Several settings


def answer_in_general(found: InGeneral) -> Answer:
    """The paragraph of all settings together."""
    compared = f"{len(found.settings)} settings: {'; '.join(found.settings)}."
    told = []
    for title, words in (
        ("Helps in general", ("helps",)),
        ("Hurts in general", ("hurts",)),
        ("No difference in general", ("no",)),
        ("Open", ("undecided",)),
        ("No verdict", ("unstable",)),
    ):
        if group := [one for one in found.techniques if one.finding.split(" ")[0] in words]:
            texts = [_in_general(one, found) for one in group]
            told.append((title, _by_prospect(group, found) if title == "Open" else _listed(texts)))
    if told and not told[0][0].startswith("Helps"):
        told.insert(0, ("Helps in general", "no technique is found to"))
    if few := [one for one in found.techniques if one.finding == "cannot say"]:
        title = f"Too few settings to say whether it helps in general, which takes {FEWEST}"
        told.append((title, _listed([_each(one, found) for one in few])))
    return Answer(" ".join([compared, *found.remarks]), told)


def _in_general(one: General, found: InGeneral) -> str:
    metric = found.metric
    if one.combined is None or one.finding == "unstable":
        return f"{one.arm}, {one.verdict}"
    t, each = one.combined.t, [float(c.t.mean) for c in one.used.values()]
    text = (
        f"{one.arm}, {metric.formatted(float(t.mean), True)}{metric.unit} (95% interval "
        f"{metric.formatted_interval(float(t.low), float(t.high))}) over {len(each)} settings, in which it has "
        f"{metric.formatted_interval(min(each), max(each))}; another setting, measured alike, would show "
        f"{metric.formatted_interval(float(one.combined.low), float(one.combined.high))}"
    )
    if size := one.finding.partition(" ")[2] if one.finding.startswith(("helps", "hurts")) else "":
        text += f"; {size} than {metric.formatted(found.margin or math.nan)}{metric.unit}"
    if one.combined.p <= 0.05:
        text += f"; the settings differ (p {float(one.combined.p):.3f})"
    return text


def _by_prospect(group: Sequence[General], found: InGeneral) -> str:
    """The undecided, those that would take as many settings together."""
    metric, by_prospect = found.metric, dict[str, list[str]]()
    for one in group:
        assert one.combined is not None
        low, high = (metric.formatted(float(b), True) for b in (one.combined.t.low, one.combined.t.high))
        text = f"{one.arm}, between {low} and {high}{metric.unit}"
        by_prospect.setdefault(more_settings(one, found), []).append(text)
    parts = []
    for prospect, texts in by_prospect.items():
        each = "for each " if len(texts) > 1 else ""
        parts.append(_listed(texts) + (f"; {each}{prospect}" if prospect else ""))
    return "; ".join(parts)


def _each(one: General, found: InGeneral) -> str:
    shown = [f"{found.metric.formatted(float(c.t.mean), True)} ({data})" for data, c in one.used.items()]
    return f"{one.arm} {', '.join(shown) or 'has no verdict anywhere'}"
