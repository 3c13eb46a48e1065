"""Several settings (data sets, networks) of one report: does a technique help in general, and how much does it vary?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from reporting import statistics as s
from reporting.arms import is_owned, usual
from reporting.comparison import Comparison, Table
from reporting.request import Metric

Floats = NDArray[np.float64]
FEWEST = 3  # settings: two say nothing about a third


class Combined(NamedTuple):
    """Effects in several settings as one; floats, or arrays over the leading axes.

    Attributes:
        t: their mean and its interval; k - 1 degrees of freedom.
        tau: sd of the true effects between settings.
        i2: share of the variance of the measured effects that is not their errors', 0 to 1.
        q: Cochran's.
        p: that all settings have one effect.
        low, high: of the effect that another setting, measured alike, would show.
    """

    t: s.PairedT
    tau: Any
    i2: Any
    q: Any
    p: Any
    low: Any
    high: Any


def combine(
    effects: ArrayLike, errors: ArrayLike, freedom: ArrayLike = np.inf, alpha: float = s.ALPHA
) -> Combined:
    """The mean effect over settings, each a draw from those that there are, and how far they differ.

    Each setting counts alike: weights by precision leave the mean to the settings measured best, and the usual
    interval then covers down to 80 of 100 (benchmarks/results/settings_simulation.md). The variance between settings
    is that of Hedges and Olkin, `tau^2 = max(0, s^2 - v)`, s^2 the variance of the effects, v the mean of the squared
    errors. The interval is that of Hartung, Knapp, Sidik and Jonkman: Student's t with k - 1 degrees of freedom on
    the residual variance (IntHout 2014, doi:10.1186/1471-2288-14-25), never less than the errors alone bring (the ad
    hoc correction q >= 1: Roever 2015, doi:10.1186/s12874-015-0091-1), so `error^2 = (tau^2 + v) / k`. Another
    setting lies in `mean +- t_(k-1) sqrt((tau^2 + v) (1 + 1/k))`. Cochran's Q takes the errors for known, and with
    few seeds finds differences too often; p is that of Welch's test (doi:10.1093/biomet/38.3-4.330), which allows for
    that.

    Args:
        effects: (..., k), k at least 2.
        errors: their standard errors, (..., k), positive.
        freedom: degrees of freedom of each error.
        alpha: intervals cover 1 less this.
    """
    y, v = np.asarray(effects, dtype=np.float64), np.asarray(errors, dtype=np.float64) ** 2
    k = y.shape[-1]
    mean, spread, noise = y.mean(-1), y.var(-1, ddof=1), v.mean(-1)
    tau2 = np.maximum(0.0, spread - noise)
    error = np.sqrt((tau2 + noise) / k)
    critical = float(stats.t.ppf(1 - alpha / 2, k - 1))
    half, reach = critical * error, critical * np.sqrt((tau2 + noise) * (1 + 1 / k))
    p = 2 * stats.t.sf(np.abs(mean) / error, k - 1)
    t = s.PairedT(mean, np.sqrt(spread), mean - half, mean + half, p, error, np.full_like(mean, k - 1)[()])
    q, p_differ = _welch(y, 1 / v, np.broadcast_to(np.asarray(freedom, dtype=np.float64), y.shape))
    return Combined(t, np.sqrt(tau2), tau2 / (tau2 + noise), q, p_differ, mean - reach, mean + reach)


def _welch(y: Floats, w: Floats, freedom: Floats) -> tuple[Any, Any]:
    """Cochran's Q, and the p of Welch's test that all are equal."""
    k = y.shape[-1]
    share = w / w.sum(-1, keepdims=True)
    q = (w * (y - (share * y).sum(-1, keepdims=True)) ** 2).sum(-1)
    spread = np.maximum(((1 - share) ** 2 / freedom).sum(-1), 1e-12)  # of errors that are known: next to none
    f = q / (k - 1) / (1 + 2 * (k - 2) / (k**2 - 1) * spread)
    return q, stats.f.sf(f, k - 1, (k**2 - 1) / (3 * spread))


@dataclass
class General:
    """A technique over all settings that it was tried in.

    Attributes:
        arm: its name.
        used: by setting, the comparisons that count.
        without: by setting, the verdicts of those that do not.
        combined: None below 2 settings.
        p_holm, p_none: corrected for the number of techniques; NaN where nothing is said.
        finding, verdict: in the words of the tables.
    """

    arm: str
    used: dict[str, Comparison]
    without: dict[str, str]
    combined: Combined | None = None
    p_holm: float = math.nan
    p_none: float = math.nan
    finding: str = "cannot say"
    verdict: str = ""


@dataclass
class InGeneral:
    """The techniques that at least two settings have.

    Attributes:
        settings: the names of the tables.
        metric: of them all.
        margin: as logged; None: none, or not the same everywhere.
        family: the number of techniques that p values are corrected for.
        techniques: in the order of the tables.
        remarks: for the reader.
    """

    settings: Sequence[str]
    metric: Metric
    margin: float | None
    family: int
    techniques: list[General] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def in_general(tables: Sequence[Table]) -> InGeneral | None:
    """The summary over the tables; None where no technique is in two of them, or their units are not one."""
    names = [
        name
        for name in dict.fromkeys(c.arm for table in tables for c in table.comparisons)
        if sum(name in {c.arm for c in t.comparisons if name not in t.rivals} for t in tables) > 1
    ]
    if not names:
        return None
    metric, margins = tables[0].metric, {table.plan.margin for table in tables}
    family = max(len(names), *(table.family for table in tables))
    found = InGeneral([t.data for t in tables], metric, margins.pop() if len(margins) == 1 else None, family)
    if not metric.is_fraction:
        found.remarks.append(
            f"{metric.name} has another scale in each setting, so that no mean over settings is taken; "
            "metric=test/acc has one."
        )
        return found
    if margins:
        found.remarks.append("The settings have different margins: none is held against their mean.")
    found.techniques = [_general(name, tables) for name in names]
    found.remarks += [text for name in names if (text := _unlike(name, tables))]
    _judge(found)
    return found


def _general(name: str, tables: Sequence[Table]) -> General:
    used, without = {}, {}
    for table in tables:
        for c in table.comparisons:
            if c.arm != name or c.arm in table.rivals:
                continue
            if c.finding in ("unstable", "cannot say", "waiting") or not c.t.error > 0:
                without[table.data] = c.verdict
            else:
                used[table.data] = c
    one = General(name, used, without)
    if len(used) > 1:
        effects, errors, freedom = (
            np.array([getattr(c.t, what) for c in used.values()], dtype=np.float64)
            for what in ("mean", "error", "freedom")
        )
        one.combined = combine(effects, errors, freedom)
    return one


def _unlike(name: str, tables: Sequence[Table]) -> str:
    """What of a technique's own options is not the same in all settings; empty: nothing."""
    having = [table for table in tables if name in table.arms and name not in table.rivals]
    own = {option for table in having for run in table.arms[name].all_runs for option in run.owned}
    values: dict[str, dict[str, str]] = {}
    for table in having:
        for option, value in usual(table.arms[name]).items():
            if is_owned(option, own):
                values.setdefault(option, {})[table.data] = value
    differing = [
        f"{option} ({'; '.join(f'{data}: {value}' for data, value in there.items())})"
        for option, there in sorted(values.items())
        if len(set(there.values())) > 1
    ]
    if not differing:
        return ""
    shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    return f"{name} is not the same in all settings: {shown}"


def _judge(found: InGeneral) -> None:
    """Findings and verdicts, by the rules of the tables."""
    metric = found.metric
    told = []
    for one in found.techniques:
        unstable = [data for data, verdict in one.without.items() if verdict.startswith("unstable")]
        if unstable:
            one.finding, one.verdict = "unstable", f"unstable in {', '.join(unstable)}"
        elif len(one.used) < FEWEST:
            count = f"{len(one.used)} setting{'' if len(one.used) == 1 else 's'}"
            one.verdict = f"cannot say ({count}; it takes {FEWEST} at least)"
        else:
            told.append(one)
    if not told:
        return
    columns = zip(*(one.combined.t.times(metric.sign) for one in told if one.combined), strict=True)
    t = s.PairedT(*(np.array(column, dtype=np.float64) for column in columns))
    findings = s.findings(t, found.margin, found.family)
    shown = "" if found.margin is None else f"{metric.formatted(found.margin)}{metric.unit}"
    for one, finding, p, p_none in zip(told, findings.found, findings.p, findings.p_none, strict=True):
        assert one.combined is not None
        one.finding, one.p_holm, one.p_none = str(finding), float(p), float(p_none)
        if one.finding == "no difference":
            one.verdict = f"no difference larger than {shown} in general"
        elif one.finding == "undecided":
            one.verdict = f"undecided in general{_alone(one, found)}"
            if prospect := more_settings(one, found):
                one.verdict += f"; {prospect}"
        else:
            word, _, size = one.finding.partition(" ")
            one.verdict = f"{word} in general{f' {size} than {shown}' if size else ''}"


def _alone(one: General, found: InGeneral) -> str:
    assert one.combined is not None
    t = one.combined.t
    excludes = found.family > 1 and (t.low > 0 or t.high < 0)
    return f" (excludes 0 alone, not after correction for {found.family})" if excludes else ""


def more_settings(one: General, found: InGeneral) -> str:
    """How many more settings would find a difference of the margin 4 times in 5; empty where there is no margin."""
    if found.margin is None or one.combined is None:
        return ""
    sd = float(one.combined.t.error) * math.sqrt(len(one.used))  # of a setting's effect, its error included
    needed = s.needed_pairs(found.margin / sd, s.ALPHA / found.family)
    if needed is None:
        return f"it would take more than {s.MOST_SEEDS} settings with as many seeds"
    more = max(needed - len(one.used), 1)
    return f"about {more} more setting{'' if more == 1 else 's'} with as many seeds"
