"""The report's statistics: functions of plain arrays, vectorised over leading axes.

Why these and no others (paired t rather than a bootstrap, Holm rather than Dunnett) is in docs/report.md;
that they hold what they promise is simulated in benchmarks/report_simulation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 50
SAME_COST = 1.05  # time ratios up to here cost nothing
COPIED = 1e-9
FLIP_FROM, FLIP_EXACT_TO = 8, 16
OUTLIER_SD = 6.0
# of the verdicts; 1: the interval inside the margin, one level for all looks; 2: planned looks, each arm at the seeds
# that it happens to have
RULE = 3

Floats = NDArray[np.float64]


class PairedT(NamedTuple):
    """Student's t over differences: floats, or arrays over the leading axes.

    `error` is the standard error of the mean, `freedom` its degrees of freedom.
    """

    mean: Any
    sd: Any
    low: Any
    high: Any
    p: Any
    error: Any = math.nan
    freedom: Any = math.nan

    def times(self, sign: int) -> PairedT:
        """Of the differences times +1 or -1."""
        if sign > 0:
            return self
        return self._replace(mean=-self.mean, low=-self.high, high=-self.low)


class Shared(NamedTuple):
    """The variance of a paired difference, pooled over arms, and its degrees of freedom."""

    variance: float
    freedom: int


def paired_t(differences: ArrayLike, alpha: ArrayLike = ALPHA, shared: Shared | None = None) -> PairedT:
    """Mean of the differences with its `1 - alpha` interval, and the two-sided p of Student's paired t.

    NaN for what the differences cannot tell: nothing from none; interval and p only from three on (of two
    the interval is 18 sd wide), and not where they do not vary.

    Args:
        differences: (..., n).
        alpha: the interval covers `1 - alpha`; one, or one for each mean.
        shared: moderate the variance towards this one, with two more degrees of freedom.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = d.shape[-1]
    nothing = np.full(d.shape[:-1], np.nan)[()]
    if n == 0:
        return PairedT(*(nothing,) * 7)
    mean = d.mean(axis=-1)
    if n == 1:
        return PairedT(mean, *(nothing,) * 6)
    own = d.var(axis=-1, ddof=1)
    sd = np.sqrt(own)
    if n == 2:
        return PairedT(mean, sd, *(nothing,) * 5)
    variance, freedom = own, n - 1
    if shared is not None:
        variance, freedom = (2 * shared.variance + (n - 1) * own) / (n + 1), n + 1
    error = np.where(sd > 0, np.sqrt(variance / n), np.nan)[()]
    half = stats.t.ppf(1 - np.asarray(alpha) / 2, freedom) * error
    p = 2 * stats.t.sf(np.abs(mean) / error, freedom)
    return PairedT(mean, sd, mean - half, mean + half, p, error, np.full(d.shape[:-1], freedom)[()])


def holm(p_values: ArrayLike, family: int | None = None) -> Floats:
    """Holm's step-down correction over the last axis: the family-wise error stays at the p values' level.

    Args:
        p_values: (..., K).
        family: of how many hypotheses these are the ones that can be tested; K where it is less.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=-1)
    most = max(p.shape[-1], family or 0)
    steps = np.take_along_axis(p, order, axis=-1) * (most - np.arange(p.shape[-1]))
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1)
    return corrected


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p of the sign-flip test, from 8 differences on; exact to 16, then 65,536 random flips."""
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n < FLIP_FROM:
        return math.nan
    if n <= FLIP_EXACT_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, size=(2**FLIP_EXACT_TO, n))
    return float((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).mean())


# Findings: what the differences, the margin and the plan allow to say


def looks_of(planned: Iterable[int]) -> tuple[int, ...]:
    """The planned looks (numbers of seeds) in their order."""
    return tuple(sorted(set(planned)))


def share_of(seeds: int, planned: Iterable[int]) -> float:
    """The share of the error that a look at so many seeds may spend; the shares of the planned looks add up to 1.

    1 where at most one look is planned. A look between two planned ones spends what has come due since the one
    before it; one after the last has the last one's share.
    """
    looks = looks_of(planned)
    if len(looks) < 2:
        return 1.0
    reached = max(1, min(seeds, looks[-1]))
    before = max((look for look in looks if look < reached), default=0)
    return float((reached / looks[-1]) ** 1.5 - (before / looks[-1]) ** 1.5)


class Findings(NamedTuple):
    """What may be said of each arm: text, and the p values for it, to be held against 0.05.

    `p` is corrected for the number of techniques, `p_none` (that the effect is smaller than the
    margin) as well; NaN without a margin.
    """

    found: Any
    p: Floats
    p_none: Floats


def findings(t: PairedT, margin: float | None, family: int | None = None) -> Findings:
    """The verdicts that follow from the numbers of one look alone, as text without the margin's value.

    `helps`, `helps by more`, `helps by less`, the same of `hurts`, `no difference`, `undecided`. Of K arms, an arm
    helps or hurts at 0.05 / (K - r), with r the arms that do already; it makes no difference larger than the
    margin, or helps by less, by a one-sided test against the margin at 0.025 / K. So false findings stay below 6 of
    100 tables whatever the effects are: an arm's effect is not both 0 and beyond the margin.

    Args:
        t: of the differences in the good direction (positive is better), (..., K).
        margin: differences below it do not matter; None: there is none, and nothing is said about it.
        family: the number of techniques, where some of them cannot be tested now.
    """
    d = math.nan if margin is None else margin  # comparisons with NaN are false: rules with a margin are off
    mean, error = np.asarray(t.mean, dtype=np.float64), np.asarray(t.error, dtype=np.float64)
    arms = max(mean.shape[-1], family or 0)
    q = np.asarray(t.p, dtype=np.float64)
    p = holm(q, arms)
    none = stats.t.sf((d - np.abs(mean)) / error, t.freedom)
    more = 2 * stats.t.sf((np.abs(mean) - d) / error, t.freedom)
    left = arms - np.argsort(np.argsort(q, axis=-1), axis=-1)  # K - r, where the arm's turn comes
    p_none = np.minimum(none * arms * 2, 1.0)
    significant, better, within = p <= ALPHA, mean > 0, p_none <= ALPHA
    beyond = more * left <= ALPHA
    rules = [
        (significant & better & beyond, "helps by more"),
        (significant & ~better & beyond, "hurts by more"),
        (significant & better & within, "helps by less"),
        (significant & ~better & within, "hurts by less"),
        (significant & better, "helps"),
        (significant & ~better, "hurts"),
        (within, "no difference"),
    ]
    found = np.select([rule for rule, _ in rules], [name for _, name in rules], default="undecided")
    return Findings(found, p, p_none)


# Planning: power, needed seeds, detectable effects


@lru_cache(maxsize=4096)
def _chi(freedom: int) -> Floats:
    """2,000 equally likely values of a chi over the root of its degrees of freedom."""
    return np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)


def power(effect: float, n: int, alpha: float) -> float:
    """The chance that a two-sided paired t over `n` pairs finds an effect of so many sd of the difference.

    The noncentral t as a normal over a chi: accurate to 0.001, and finite for any effect, which scipy's
    `nct` is not.
    """
    critical = stats.t.ppf(1 - alpha / 2, n - 1) * _chi(n - 1)
    shift = effect * math.sqrt(n)
    return float((stats.norm.cdf(shift - critical) + stats.norm.cdf(-shift - critical)).mean())


@lru_cache(maxsize=4096)
def needed_pairs(effect: float, alpha: float) -> int | None:
    """The fewest pairs that find the effect (in sd of the difference) 4 times in 5; None above 50."""
    return next((n for n in range(2, MOST_SEEDS + 1) if power(effect, n, alpha) >= POWER), None)


@lru_cache(maxsize=4096)
def detectable_effect(n: int, alpha: float) -> float:
    """The effect (in sd of the difference) that `n` pairs find 4 times in 5."""
    return float(brentq(lambda effect: power(effect, n, alpha) - POWER, 0.0, 1e4 / alpha))


def pooled_difference(values: Floats) -> Shared | None:
    """The variance of a paired difference from all arms together: the two-way (arm, seed) residual.

    For planning, and for `variance=shared`. None where there are fewer than two arms or seeds.

    Args:
        values: (arms, seeds).
    """
    if min(values.shape) < 2:
        return None
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    return Shared(2 * float((residual**2).sum()) / freedom, freedom)


class MoreSeeds(NamedTuple):
    """Seeds to add: about so many, between `low` and `high` (None: beyond what is worth planning)."""

    about: int | None
    low: int
    high: int | None


def more_seeds(n: int, margin: float, shared: Shared, alpha: float) -> MoreSeeds:
    """How many more pairs find a difference of `margin` 4 times in 5; the range is 80% of the true sd's."""
    sd = math.sqrt(shared.variance)
    spread = [sd * math.sqrt(shared.freedom / stats.chi2.ppf(q, shared.freedom)) for q in (0.9, 0.1)]
    fewest, most = (needed_pairs(margin / s, alpha) for s in spread)
    needed = needed_pairs(margin / sd, alpha)
    if needed is None:
        return MoreSeeds(None, 0, None)
    about = needed - n if needed > n else n
    low = min(about, max(1, (fewest or needed) - n))
    return MoreSeeds(about, low, None if most is None else max(about, most - n))


# Two techniques together


class Interaction(NamedTuple):
    """Both together minus each alone plus neither, in the good direction, in points and in -log(error)."""

    points: PairedT
    logs: PairedT
    best_single: PairedT
    finding: str


def interaction(
    values: Sequence[Floats], error: Callable[[Floats], Floats], sign: int, alpha: float = ALPHA
) -> Interaction:
    """Whether two techniques help each other, by seed.

    Techniques that each take a tenth off the error lose in points without any interaction; so `synergy` and
    `conflict` are said only where the intervals in points and in log error exclude 0 on the same side.

    Args:
        values: the metric with both techniques, with one, with the other, with neither; (n,) each.
        error: maps the metric to an error above 0, lower is better.
        sign: +1 where a higher metric is better, else -1.
        alpha: the intervals cover `1 - alpha`.
    """
    both, one, other, neither = values
    points = paired_t(sign * (both - one - other + neither), alpha)
    errors = [error(a) for a in values]
    if all((e > 0).all() for e in errors):
        b, o, t, n = (-np.log(e) for e in errors)
        logs = paired_t(b - o - t + n, alpha)
    else:
        logs = paired_t(np.empty(0))
    best = one if sign * (one.mean() - other.mean()) >= 0 else other
    together = paired_t(sign * (both - best), alpha)
    if not math.isfinite(points.low):
        finding = "cannot say"
    elif points.low > 0 and logs.low > 0:
        finding = "synergy"
    elif points.high < 0 and logs.high < 0:
        finding = "conflict"
    else:
        finding = "adds up"
    return Interaction(points, logs, together, finding)


# Single examples


def noise_floor(error: float, examples: int) -> float:
    """The sd of one run's accuracy that the test set's size alone brings (arXiv 2304.01910)."""
    return math.sqrt(error / (2 * examples))


def new_images(technique: NDArray[np.bool_], baseline: NDArray[np.bool_], alpha: float = ALPHA) -> PairedT:
    """The mean difference in accuracy with an interval for new images of the same kind.

    The runs' variance, plus that of the images: the variance over images of the mean over seeds of the
    difference, less what the seeds themselves bring to it. Where nothing is left of it, so few seeds cannot tell the
    images' share: interval and p are NaN, not estimable.

    Args:
        technique: (n, N) whether run s was right on image i, paired by seed with `baseline`.
        baseline: (n, N).
    """
    n, images = technique.shape
    over_runs = technique.mean(axis=1) - baseline.mean(axis=1)
    plain = paired_t(over_runs, alpha)
    if not math.isfinite(plain.low):
        return plain
    # of 0/1 values: sums of d and of d^2 over seeds are enough, and small integers
    d = technique.astype(np.int8) - baseline.astype(np.int8)
    total, squares = d.sum(axis=0, dtype=np.int32), np.abs(d).sum(axis=0, dtype=np.int32)
    within = ((squares - total**2 / n) / (n - 1)).mean()
    image_variance = max(0.0, float((total / n).var(ddof=1) - within / n))
    if not image_variance:
        return plain._replace(low=math.nan, high=math.nan, p=math.nan)
    error = math.sqrt(float(plain.sd) ** 2 / n + image_variance / images)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(plain.mean) / error, n - 1))
    return PairedT(plain.mean, plain.sd, plain.mean - half, plain.mean + half, p, error, n - 1)


def mcnemar(technique: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> float:
    """Exact p of McNemar's test of two networks on the same images, (N,) each: not of the technique."""
    gained, lost = int((technique & ~baseline).sum()), int((~technique & baseline).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def outlying(arms: Sequence[Floats]) -> list[Floats]:
    """Each value's distance from its arm's median, in sd pooled over the arms (from median deviations).

    NaN for arms of fewer than three values, and where nothing varies.
    """
    distances = [np.abs(a - np.median(a)) if len(a) >= 3 else np.full(len(a), np.nan) for a in arms]
    # of an odd number of values one is the median itself, which says nothing of the spread
    kept = [np.sort(d)[len(d) % 2 :] for d in distances if len(d) >= 3]
    spread = 1.4826 * float(np.median(np.concatenate(kept))) if kept else 0.0
    return [d / spread if spread > 0 else np.full(len(d), np.nan) for d in distances]
