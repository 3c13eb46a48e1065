"""The simulation of planned looks in a tiny form, and that it would notice."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.looks_simulation import MARGIN, Outcome, fixed, simulate
from benchmarks.looks_simulation import draw as drawn
from benchmarks.report_simulation import TRUTHS
from reporting import looks as rule
from reporting.looks import DEFAULT_LOOKS, FUTILITY, Looks


def outcome(name: str, arms: int, spread: float) -> Outcome:
    plan = Looks(DEFAULT_LOOKS, arms, MARGIN, FUTILITY, "together")
    return simulate(TRUTHS[name](arms), plan, spread, 1200, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["none", "one 0, the rest just beyond"])
def test_wrong_findings_and_missed_truths_are_as_rare_as_promised(name: str) -> None:
    got = outcome(name, 3, 0.25)
    assert got.helps.value <= 0.05 + 3 * got.helps.error
    assert got.wrong.value <= 0.06 + 3 * got.wrong.error
    assert got.coverage.value >= 0.95 - 3 * got.coverage.error
    assert got.decided.value > 0.5 and got.runs < 4 * 20


def test_the_whole_error_at_every_look_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "shares", lambda looks: np.ones(len(tuple(looks))))
    got = outcome("none", 3, 0.25)
    assert got.helps.value > 0.05 + 3 * got.helps.error
    assert got.coverage.value < 0.95 - 3 * got.coverage.error or got.wrong.value > 0.06 + 3 * got.wrong.error


def test_a_fixed_design_is_judged_at_the_levels_of_the_looks() -> None:
    d = drawn([0.0, 0.6], 20, 0.25, 0.5, 500, np.random.default_rng(1))
    assert fixed(d, 5) < fixed(d, 10) < fixed(d, 20) > 0.9
