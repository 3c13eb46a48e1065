"""Planned looks: what is found where, what is asked for next, and that no record added later changes a finding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from reporting.looks import DEFAULT_LOOKS, Looks, Steps, replay, shares
from reporting.statistics import Shared

MARGIN = 0.3


def drawn(seed: int, arms: int = 4, seeds: int = 20) -> np.ndarray[Any, Any]:
    """Differences of arms with effects around the margin, correlated through the baseline."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0.0, 0.1, 0.3, 0.6], arms) * rng.choice([-1, 1], arms)
    sd = rng.choice([0.08, 0.2, 0.4])
    return truth[:, None] + sd * (rng.normal(size=(arms, seeds)) + 0.5 * rng.normal(size=seeds))


def plan(arms: int = 4, **changed: Any) -> Looks:
    return Looks(DEFAULT_LOOKS, arms, MARGIN, 0.1, "together")._replace(**changed)


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ((5, 8, 12, 20), [0.125, 0.128, 0.212, 0.535]),
        ((5, 10, 20), [0.125, 0.229, 0.646]),
        ((5, 10), [0.354, 0.646]),
        ((7,), [1.0]),
    ],
)
def test_the_shares_of_the_error_add_up_to_one(looks: tuple[int, ...], expected: list[float]) -> None:
    assert shares(looks) == pytest.approx(expected, abs=6e-4)
    assert shares(looks).sum() == pytest.approx(1)


def by_hand(differences: np.ndarray[Any, Any], looks: Looks) -> list[tuple[str, int]]:
    """The rule as one would write it down for a single table, with scipy's own tests."""
    found: dict[int, tuple[str, int]] = {}
    before = 0
    for n in looks.at:
        w = (n / looks.at[-1]) ** 1.5 - (before / looks.at[-1]) ** 1.5
        before = n
        here = [a for a in range(len(differences)) if a not in found]
        p = {a: stats.ttest_1samp(differences[a, :n], 0).pvalue / w for a in here}
        while True:
            r = sum(name in ("helps", "hurts") for name, _ in found.values())
            new = [a for a in here if a not in found and p[a] <= 0.05 / (looks.family - r)]
            if not new:
                break
            found |= {a: ("helps" if differences[a, :n].mean() > 0 else "hurts", n) for a in new}
        for a in here:
            d = differences[a, :n]
            one_sided = [
                stats.ttest_1samp(d, bound, alternative=side).pvalue
                for bound, side in ((MARGIN, "less"), (-MARGIN, "greater"))
            ]
            if a not in found and max(one_sided) / w <= 0.05 / looks.family:
                found[a] = "no difference", n
    return [found.get(a, ("undecided", looks.at[-1])) for a in range(len(differences))]


def test_many_tables_at_once_find_what_each_does_by_hand() -> None:
    tables = np.stack([drawn(seed) for seed in range(60)])
    looks = plan(futility=0.0)
    steps = replay(tables, looks)
    found = [
        [(str(f).partition(" by ")[0], int(n)) for f, n in zip(*row, strict=True)]
        for row in zip(steps.found, steps.seeds, strict=True)
    ]
    assert found == [by_hand(table, looks) for table in tables]
    names = {name for row in found for name, _ in row}
    assert names == {"helps", "hurts", "no difference", "undecided"}, "the tables show every finding"
    one = replay(tables[7], looks)
    for name in Steps._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(steps, name)[7])


def test_the_interval_is_the_repeated_one_of_the_look_that_decided() -> None:
    d = np.full((1, 20), 0.5) + np.linspace(-0.1, 0.1, 20)
    d[0, 5:] = -9.0  # seeds after the decision are not used
    steps = replay(d, plan(1))
    share = (5 / 20) ** 1.5
    interval = stats.ttest_1samp(d[0, :5], 0).confidence_interval(1 - 0.05 * share)
    assert (steps.found[0], steps.seeds[0], steps.number[0]) == ("helps by more", 5, 1)
    assert (steps.low[0], steps.high[0]) == pytest.approx((interval.low, interval.high))
    assert steps.p[0] == pytest.approx(stats.ttest_1samp(d[0, :5], 0).pvalue / share)
    assert steps.runs == 10


@pytest.mark.parametrize("order", ["together", "by chance"])
def test_records_that_come_later_change_no_finding(order: Any) -> None:
    """However the seeds come in: what has ended stays, at its look, with its numbers."""
    for seed in range(25):
        d, rng = drawn(seed), np.random.default_rng(seed)
        looks, settled = plan(order=order), np.zeros(4)
        before = replay(d, looks, settled)
        while (settled < 20).any():
            settled = np.minimum(settled + rng.integers(0, 5, 4), 20)
            now = replay(np.where(np.arange(20) < settled[:, None], d, np.nan), looks, settled)
            ended = ~np.isin(before.found, ["undecided", "waiting"])
            for name in ("found", "seeds", "low", "high", "p"):
                np.testing.assert_array_equal(getattr(now, name)[ended], getattr(before, name)[ended])
            before = now
        np.testing.assert_array_equal(now.found, replay(d, looks).found)


@pytest.mark.parametrize("order", ["together", "by chance"])
def test_whoever_runs_what_is_asked_for_ends_where_all_seeds_would_have(order: Any) -> None:
    for seed in range(15):
        d, settled = drawn(seed), np.zeros(4)
        while (wanted := (steps := replay(d, plan(order=order), settled)).wanted).any():
            assert (wanted > settled)[wanted > 0].all()
            settled = np.maximum(settled, wanted)
        whole = replay(d, plan(order=order))
        np.testing.assert_array_equal(steps.found, whole.found)
        np.testing.assert_array_equal(settled, whole.seeds), "no seed more than the rule asked for"


def test_arms_wait_for_each_other_at_a_look() -> None:
    steps = replay(drawn(3), plan(), settled=[5, 5, 4, 20])
    assert list(steps.found) == ["waiting"] * 4 and list(steps.wanted) == [0, 0, 5, 0]


def test_a_diverged_arm_ends_there_and_stays_in_the_family() -> None:
    d = np.stack([drawn(1)[0], np.full(20, 0.4) + np.linspace(-0.3, 0.3, 20)])
    diverged = [7, np.inf]
    steps = replay(d, plan(2), diverged=diverged)
    assert (steps.found[0], steps.seeds[0]) in {("unstable", 8), (replay(d, plan(2)).found[0], 5)}
    late = replay(np.full((1, 20), 0.01) * np.arange(20), plan(1, futility=0), settled=[3], diverged=[3])
    assert (late.found[0], late.seeds[0], late.wanted[0]) == ("unstable", 5, 0), (
        "the look's other runs are not needed"
    )
    alone, both = (replay(d[1:], plan(k)) for k in (1, 2))
    assert both.p[0] == pytest.approx(2 * alone.p[0])


def test_differences_that_do_not_vary_say_nothing_and_get_no_more_seeds() -> None:
    steps = replay(np.full((1, 20), 0.25), plan(1))
    assert (steps.found[0], steps.seeds[0]) == ("cannot say", 5)


def test_missing_pairs_are_dropped_and_the_freedom_is_that_of_those_there() -> None:
    d = drawn(5, 1)
    d[0, [1, 3]] = np.nan
    steps = replay(d, plan(1, at=(5, 6)), settled=[5])
    pairs = d[0, [0, 2, 4]]
    share = (5 / 6) ** 1.5
    assert steps.pairs[0] == 3
    assert steps.p[0] == pytest.approx(min(1, stats.ttest_1samp(pairs, 0).pvalue / share))
    d[0, 2] = np.nan
    assert np.isnan(replay(d, plan(1, at=(5, 6)), settled=[5]).low[0]), "of two pairs nothing is said"


def test_without_a_margin_nothing_is_said_about_the_size() -> None:
    steps = replay(drawn(2), plan(margin=None))
    assert not np.char.find(steps.found, "by").clip(0).any() and "no difference" not in steps.found
    assert np.isnan(steps.p_none).all()


def test_an_arm_is_stopped_where_a_decision_is_unlikely() -> None:
    """The chance is that of many later looks drawn from what is seen: flat prior, own sd."""
    d = np.random.default_rng(4).normal(0.0, 0.6, (1, 20))
    looks = plan(1, at=(10, 20))
    steps = replay(d, looks, settled=[10])
    mean, sd = d[0, :10].mean(), d[0, :10].std(ddof=1)
    rng = np.random.default_rng(0)
    later = mean + sd * np.sqrt(1 / 10 - 1 / 20) * rng.standard_t(9, 200_000)
    share, error = 1 - 0.5**1.5, sd / np.sqrt(20)
    t = stats.t(19)
    decides = (np.abs(later) > t.isf(0.05 * share / 2) * error) | (
        np.abs(later) < MARGIN - t.isf(0.05 * share) * error
    )
    assert steps.chance[0] == pytest.approx(decides.mean(), abs=0.003)
    assert steps.found[0] == ("stopped" if steps.chance[0] < 0.1 else "undecided")
    level = 4 * (d - mean)
    stopped = replay(level, looks)
    assert (stopped.found[0], stopped.seeds[0]) == ("stopped", 10) and 0.02 < stopped.chance[0] < 0.1
    assert replay(level, looks._replace(futility=0.0)).seeds[0] == 20


def test_a_budget_goes_to_the_arm_with_the_highest_chance_per_run() -> None:
    rng = np.random.default_rng(2)
    d = np.stack([0.12 + rng.normal(0, 0.25, 20), 0.33 + rng.normal(0, 0.25, 20)])
    looks = plan(2, order="by chance", at=(5, 10, 20), futility=0.0)
    first = replay(d, looks, settled=[5, 5])
    rates = []
    for arm in range(2):  # seen from one arm alone, a decision at the next looks costs 5 and 15 runs of each
        one = replay(d[[arm]], looks, settled=[5])
        assert one.wanted[0] == 10 and one.found[0] == "undecided"
        rates.append(one.chance[0])
    chosen = int(np.argmax(first.wanted))
    assert first.wanted[1 - chosen] == 0 and rates[chosen] >= rates[1 - chosen]
    assert first.runs == 15, "two arms and the baseline"
    ended = replay(d, looks, budget_runs=25)
    assert ended.runs == 25 and ended.exhausted and ended.seeds[chosen] == 10
    assert not replay(d, looks, budget_runs=200).exhausted


def test_a_moderated_variance_is_that_of_the_pooled_one_with_two_degrees_more() -> None:
    d, pooled = drawn(6, 3), Shared(0.04, 8)
    steps = replay(d, plan(3), shared=pooled, settled=5)
    variance = (2 * 0.04 + 4 * d[:, :5].var(axis=1, ddof=1)) / 6
    np.testing.assert_allclose(steps.error, np.sqrt(variance / 5))
    assert (steps.freedom == 6).all()
