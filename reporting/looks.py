"""Seeds until it is decided: the rule that reads planned looks, as a replay of records.

A plan fixes, before the first run, at which numbers of seeds the differences are looked at (`Looks`). `replay` goes
through the looks in their order and says of each arm what was found, where, and which seeds are asked for next. It is
a function of the stored differences alone, and runs that are added never change a step that was taken before: so a
sweep that was killed, several machines that share one, and the report all come to the same findings.

The level of a look is its share of the error (`shares`); within a look Holm's correction holds (Tamhane et al. 2021,
Statistics in Medicine 40:5333), the intervals are repeated ones (Jennison and Turnbull 1991), and the sizes of both
errors are simulated in benchmarks/looks_simulation.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from reporting.statistics import ALPHA, COPIED, Shared, looks_of, share_of

DEFAULT_LOOKS = (5, 8, 12, 20)
FUTILITY = 0.1  # an arm whose chance of a decision at any later look is lower gets no more seeds
FEWEST = 3  # pairs that an arm is judged from

Floats = NDArray[np.float64]
Order = Literal["together", "by chance", "as they come"]


class Looks(NamedTuple):
    """What was planned before the first run.

    Attributes:
        at: numbers of seeds, ascending.
        family: the number of techniques K; it never falls.
        margin: differences below it do not matter; None: there is none.
        futility: below this chance of a decision an arm is stopped; 0: never.
        order: of the arms from one look to the next. `together`: all that are open, when all of them have the
            seeds; `by chance`: one at a time, that with the highest chance of a decision per run (a budget);
            `as they come`: each when it has the seeds.
    """

    at: tuple[int, ...]
    family: int
    margin: float | None = None
    futility: float = 0.0
    order: Order = "as they come"


class Steps(NamedTuple):
    """What a replay found: arrays (..., K), but for `runs` and `exhausted` (...).

    Attributes:
        found: `helps`, `helps by more`, `helps by less` (than the margin), the same of `hurts`, `no difference`,
            `stopped` (a decision is unlikely), `unstable` (a run diverged), `cannot say` (differences do not vary, or
            too few pairs are left in a plan that stops arms), `undecided`, `waiting` (before the first look).
        seeds: planned seeds of the look that this was found at; 0 before the first.
        number: of that look, from 1; 0 before the first.
        pairs: that existed there.
        mean, sd, error, freedom: of the differences of those pairs.
        share: of the error, of that look.
        low, high: the repeated interval, at `1 - ALPHA * share`: covers 95 of 100 truths whatever made the arm stop.
        p: over all looks and techniques, to be held against ALPHA.
        p_none: the same, that the effect is smaller than the margin; NaN without one.
        chance: of a decision at a later look, as seen from there.
        wanted: planned seeds up to which the arm is asked to go now; 0: it has all that is asked for.
        runs: asked for so far, the baseline's included.
        exhausted: whether the budget ended it.
    """

    found: Any
    seeds: Any
    number: Any
    pairs: Any
    mean: Any
    sd: Any
    error: Any
    freedom: Any
    share: Any
    low: Any
    high: Any
    p: Any
    p_none: Any
    chance: Any
    wanted: Any
    runs: Any
    exhausted: Any


def shares(looks: Iterable[int]) -> Floats:
    """The share of the error that each look may spend: (n_k / N)^1.5 - (n_(k-1) / N)^1.5. They add up to 1."""
    at = looks_of(looks)
    return np.array([share_of(look, at) for look in at])


_OPEN, _HELPS, _HURTS, _NONE, _STOPPED, _UNSTABLE, _STUCK = range(7)
_NAMES = np.array(["undecided", "helps", "hurts", "no difference", "stopped", "unstable", "cannot say"])


def replay(
    differences: ArrayLike,
    looks: Looks,
    settled: ArrayLike | None = None,
    diverged: ArrayLike | None = None,
    shared: Shared | None = None,
    budget_runs: int | None = None,
) -> Steps:
    """Go through the planned looks of one table, or of many at once.

    At a look of n seeds, of share w, with p of the two-sided paired t and p_none of the one-sided test against the
    margin: an arm *helps* or *hurts* if p / w <= ALPHA / (K - r), r arms having done so; makes *no difference* larger
    than the margin if p_none / w <= ALPHA / K; else is *stopped* if a decision at any later look has a chance below
    `looks.futility`. A finding is final; what ended gets no more seeds.

    Args:
        differences: (..., K, N) technique minus baseline in the good direction, in the order of the planned seeds;
            NaN where a pair is missing.
        looks: the plan.
        settled: (..., K) seeds of which it is known what became of both runs, from the first on; None: all.
        diverged: (..., K) the number of the first seed, from 1, whose run diverged; inf or None: none did.
        shared: moderates the variances (`variance=shared`).
        budget_runs: of techniques and baseline; at the first step beyond it the replay ends.
    """
    d = np.asarray(differences, dtype=np.float64)
    lead, (arms, _) = d.shape[:-2], d.shape[-2:]
    walk = _Walk(
        d.reshape(-1, *d.shape[-2:]),
        looks,
        _flat(settled, lead, arms, d.shape[-1]),
        _flat(diverged, lead, arms, np.inf),
        shared,
        budget_runs,
    )
    while walk.advance():
        pass
    steps = walk.steps()
    return Steps(*(np.reshape(v, lead + v.shape[1:])[()] for v in steps))


def _flat(values: ArrayLike | None, lead: tuple[int, ...], arms: int, default: float) -> Floats:
    given = default if values is None else np.asarray(values, dtype=np.float64)
    return np.broadcast_to(given, (*lead, arms)).reshape(-1, arms)


class _Walk:
    """Many tables on their way through the looks; (tables, arms) each, (looks, tables, arms) what each look shows."""

    def __init__(
        self,
        d: Floats,
        looks: Looks,
        settled: Floats,
        diverged: Floats,
        shared: Shared | None,
        budget_runs: int | None,
    ) -> None:
        self.plan, self.settled, self.diverged, self.budget = looks, settled, diverged, budget_runs
        self.at, self.shares = np.array(looks.at), shares(looks.at)
        self.family = max(looks.family, d.shape[1])
        shape = d.shape[:2]
        at_look = [_moments(d[..., :n], shared) for n in looks.at]
        self.pairs, self.mean, self.sd, self.error, self.freedom = (
            np.array(v) for v in zip(*at_look, strict=True)
        )
        self.place = np.full(shape, -1)
        self.found = np.zeros(shape, dtype=np.int8)
        self.q, self.q_none, self.left = (np.full(shape, np.nan) for _ in range(3))
        self.chances = np.zeros((len(looks.at), *shape))  # of a decision by each later look
        self.halted = np.zeros(shape[0], dtype=np.bool_)
        self.exhausted = np.zeros(shape[0], dtype=np.bool_)
        self.wanted = np.zeros(shape, dtype=np.int64)

    def _seeds(self, place: Any) -> Any:
        return np.where(place < 0, 0, self.at[np.maximum(place, 0)])

    def _here(self, of_looks: Any) -> Any:
        """What each arm's own look shows."""
        return np.take_along_axis(of_looks, np.maximum(self.place, 0)[None], axis=0)[0]

    @property
    def _rejected(self) -> Any:
        return ((self.found == _HELPS) | (self.found == _HURTS)).sum(axis=1, keepdims=True)

    def advance(self) -> bool:
        """Take the next step of every table that has what it needs; whether any had."""
        following = self.place + 1
        go = self._next() & ~self.halted[:, None]
        target = self.at[np.minimum(following, len(self.at) - 1)]
        ready = (self.settled >= target) | (self.diverged <= target)
        if self.budget is not None:
            over = go.any(axis=1) & (self._runs(np.where(go, following, self.place)) > self.budget)
            self.exhausted |= over
            self.halted |= over
            go &= ~over[:, None]
        if self.plan.order == "as they come":
            moving = go & ready
        else:
            complete = (ready | ~go).all(axis=1)
            self.wanted = np.where(go & ~complete[:, None] & ~ready, target, self.wanted)
            self.halted |= ~complete
            moving = go & complete[:, None]
        if not moving.any():
            return False
        self.place = np.where(moving, following, self.place)
        self._judge(moving)
        return True

    def _next(self) -> Any:
        """The arms that are to go to their next look."""
        can = (self.found == _OPEN) & (self.place + 1 < len(self.at))
        if self.plan.order != "by chance":
            return can
        first = can & (self.place < 0)
        base = self._seeds(self.place).max(axis=1, keepdims=True)
        own, best = self._seeds(self.place), np.full(can.shape, -1.0)
        for look, seeds in enumerate(self.at):
            runs = seeds - own + np.maximum(0, seeds - base)
            later = can & (look > self.place)
            rate = np.divide(self.chances[look], runs, out=np.full(can.shape, -1.0), where=later)
            best = np.maximum(best, rate)
        chosen = np.zeros(can.shape, dtype=np.bool_)
        np.put_along_axis(chosen, best.argmax(axis=1)[:, None], True, axis=1)
        return np.where(first.any(axis=1, keepdims=True), first, chosen & can)

    def _runs(self, place: Any) -> Any:
        seeds = self._seeds(place)
        return seeds.sum(axis=1) + seeds.max(axis=1)

    def _judge(self, moving: Any) -> None:
        pairs, mean, error = self._here(self.pairs), self._here(self.mean), self._here(self.error)
        self.found[moving & (self.diverged <= self._seeds(self.place))] = _UNSTABLE
        if self.plan.futility:  # runs are started for it: one that loses most of them gets no more
            self.found[moving & (self.found == _OPEN) & (pairs < FEWEST)] = _STUCK
        varies = self._here(self.sd) > COPIED * np.abs(mean)
        enough = moving & (self.found == _OPEN) & (pairs >= FEWEST)
        self.found[enough & ~varies] = _STUCK
        judged = enough & varies
        share = self.shares[np.maximum(self.place, 0)]
        t, freedom = np.abs(mean[judged]) / error[judged], self._here(self.freedom)[judged]
        self.q[judged] = 2 * stdtr(freedom, -t) / share[judged]
        if self.plan.margin is not None:
            self.q_none[judged] = stdtr(freedom, t - self.plan.margin / error[judged]) / share[judged]
        while True:  # Holm: the bar falls with each rejection, so again until none follows
            rejected = self._rejected
            left = np.maximum(1, self.family - rejected)
            new = (self.found == _OPEN) & (self.q <= ALPHA / left)
            if not new.any():
                break
            self.left = np.where(new, left, self.left)
            self.found = np.where(new, np.where(mean > 0, _HELPS, _HURTS), self.found).astype(np.int8)
        self.found[judged & (self.found == _OPEN) & (self.q_none <= ALPHA / self.family)] = _NONE
        self._look_ahead(judged & (self.found == _OPEN))
        ended = (self.found != _OPEN) & np.isnan(self.left)
        self.left = np.where(ended, np.maximum(1, self.family - self._rejected), self.left)

    def _look_ahead(self, of: Any) -> None:
        """Stop the arms that are unlikely to be decided later."""
        table, _ = np.nonzero(of)
        place, pairs, mean = self.place[of], self._here(self.pairs)[of], self._here(self.mean)[of]
        sd, left = self._here(self.sd)[of], np.maximum(1, self.family - self._rejected[table, 0])
        best, any_later = np.zeros(len(place)), place < len(self.at) - 1
        self.chances[:, of] = 0.0
        for look in range(1, len(self.at)):
            later = look > place
            if not later.any():
                continue
            size = pairs[later] + self.at[look] - self.at[place[later]]
            seen = mean[later], sd[later], pairs[later]
            odds = chance(*seen, size, self.shares[look], left[later], self.family, self.plan.margin)
            best[later] = np.maximum(best[later], odds)
            rows = self.chances[look, of]
            rows[later] = odds
            self.chances[look, of] = rows
        stop = np.zeros(of.shape, dtype=np.bool_)
        stop[of] = any_later & (best < self.plan.futility)
        self.found[stop] = _STOPPED

    def steps(self) -> Steps:
        """What was found."""
        began = self.place >= 0
        mean, error, freedom = (
            np.where(began, self._here(v), np.nan) for v in (self.mean, self.error, self.freedom)
        )
        share = np.where(began, self.shares[np.maximum(self.place, 0)], np.nan)
        judged = ~np.isnan(self.q)
        half = np.where(judged, _critical(ALPHA * share, freedom) * error, np.nan)
        left = np.where(np.isnan(self.left), np.maximum(1, self.family - self._rejected), self.left)
        found = np.where(began, _NAMES[self.found], "waiting").astype("U16")
        declared = (self.found == _HELPS) | (self.found == _HURTS)
        if self.plan.margin is not None and declared.any():
            d = declared
            beyond = np.abs(mean[d]) - _critical(ALPHA * share[d] / left[d], freedom[d]) * error[d]
            within = self.q_none[d] <= ALPHA / self.family
            suffix = np.where(beyond > self.plan.margin, " by more", np.where(within, " by less", ""))
            found[d] = np.char.add(found[d], suffix)
        return Steps(
            found=found,
            seeds=self._seeds(self.place),
            number=self.place + 1,
            pairs=np.where(began, self._here(self.pairs), 0),
            mean=mean,
            sd=np.where(began, self._here(self.sd), np.nan),
            error=error,
            freedom=freedom,
            share=share,
            low=mean - half,
            high=mean + half,
            p=np.minimum(1.0, left * self.q),
            p_none=np.minimum(1.0, self.family * self.q_none),
            chance=self.chances.max(axis=0),
            wanted=self.wanted,
            runs=self._runs(self.place),
            exhausted=self.exhausted,
        )


def _moments(d: Floats, shared: Shared | None) -> tuple[Any, ...]:
    """Pairs, mean, sd, standard error and degrees of freedom over the last axis; NaN where there are too few."""
    there = np.isfinite(d)
    n = there.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, d, 0.0).sum(axis=-1) / n
        variance = (np.where(there, d - mean[..., None], 0.0) ** 2).sum(axis=-1) / np.where(
            n > 1, n - 1, np.nan
        )
        used, freedom = variance, n - 1.0
        if shared is not None:
            used, freedom = (2 * shared.variance + (n - 1) * variance) / (n + 1), n + 1.0
        return n, mean, np.sqrt(variance), np.sqrt(used / n), freedom


def _critical(level: Any, freedom: Any) -> Any:
    """Of the two-sided t; the few that differ are worked out once."""
    pairs = np.stack([np.ravel(level), np.ravel(freedom)]).astype(np.float64)
    different, back = np.unique(np.nan_to_num(pairs, nan=0.0), axis=1, return_inverse=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return stdtrit(different[1], 1 - different[0] / 2)[np.ravel(back)].reshape(np.shape(level))


def chance(
    mean: Floats,
    sd: Floats,
    n: Any,
    size: Any,
    share: float,
    left: Any,
    family: int,
    margin: float | None,
) -> Floats:
    """The chance that a look at `size` pairs decides, seen from `n`: a flat prior of the mean, the sd as it is.

    The mean at the look is the one seen plus a t of n - 1 degrees of freedom times `sd sqrt(1 / n - 1 / size)`; it
    decides where it lies far from 0, or near enough to it for *no difference*.

    Args:
        mean, sd: of the differences, (M,).
        n, size: pairs now and then, (M,).
        share: of the error, of that look.
        left: K - r, (M,).
        family: K.
        margin: None: there is none.
    """
    error, spread = sd / np.sqrt(size), sd * np.sqrt(1 / n - 1 / size)
    far = _critical(ALPHA * share / left, size - 1.0) * error
    near = np.full(np.shape(mean), -np.inf)
    if margin is not None:
        level = 2 * ALPHA * share / family  # of a one-sided test
        near = np.minimum(far, margin - _critical(np.full(np.shape(mean), level), size - 1.0) * error)

    def below(x: Any) -> Any:
        return stdtr(n - 1.0, (x - mean) / spread)

    decided = 1 - below(far) + below(-far)
    inside = near > 0
    between = np.zeros(np.shape(mean))
    if inside.any():
        m, s, f = mean[inside], spread[inside], n[inside] - 1.0
        between[inside] = stdtr(f, (near[inside] - m) / s) - stdtr(f, (-near[inside] - m) / s)
    return np.asarray(decided + between)
