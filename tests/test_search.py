"""Searches: the space that is typed, and what becomes of a trial that this process does not run to its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY, Outcome
from hydra.core.override_parser.overrides_parser import OverridesParser

from lab.search import space

pytest.importorskip("optuna", reason="no Optuna here: pip install -e '.[sweeps]'")

# the space


def swept(value: str) -> tuple[Any, ...]:
    """Kind, least and greatest value, and step or scale of what Optuna is given for a typed value."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna cuts an end off that is not on a step, with a warning
        (found,) = space(OverridesParser.create().parse_overrides([f"a.b={value}"])).values()
    if hasattr(found, "choices"):
        return tuple(found.choices)
    return type(found).__name__[:3], found.low, found.high, "log" if found.log else found.step


SPACES = {
    "range(1, 10, 2)": ("Int", 1, 9, 2),
    "range(10, 1, -2)": ("Int", 2, 10, 2),
    "range(5)": ("Int", 0, 4, 1),
    "range(1e-05, 1e-04, 1e-05)": ("Flo", 1e-05, 9e-05, 1e-05),
    "range(0, 1e-05, 1e-06)": ("Flo", 0.0, 9e-06, 1e-06),
    "range(0, 0.9, 0.3)": ("Flo", 0.0, 0.6, 0.3),
    "range(1.0, 4)": ("Flo", 1.0, 3.0, 1.0),
    "interval(1, 3)": ("Flo", 1.0, 3.0, None),
    "int(interval(1, 3))": ("Int", 1, 3, 1),
    "tag(log, interval(1e-05, 1))": ("Flo", 1e-05, 1.0, "log"),
    "1e-5,1e-4": ("1e-05", "0.0001"),
    "shuffle(range(1))": ("0",),
}


@pytest.mark.parametrize("value", SPACES)
def test_a_space_has_the_numbers_that_were_typed(value: str) -> None:
    assert swept(value) == SPACES[value]


NO_SPACES = {
    "range(5, 1)": "range(start, stop, step)",
    "range(1, 5, 0)": "range(start, stop, step)",
    "range(1.0, 5, -1)": "range(start, stop, step)",
    "shuffle(range(5, 1))": "range(start, stop, step)",
    "range(0, nan)": "finite",
    "interval(10, 1)": "the smaller one first",
    "interval(0, inf)": "finite",
    "tag(log, interval(0, 1))": "above 0",
    "tag(log, interval(-1, 1))": "above 0",
    "tag(lgo, interval(1, 2))": "tag(log, interval(0.001, 0.1))",
    "tag(log, range(1, 9))": "tag(log, interval(0.001, 0.1))",
}


@pytest.mark.parametrize("value", NO_SPACES)
def test_a_space_without_values_is_refused_in_one_line(cli: Callable[..., Outcome], value: str) -> None:
    outcome = cli("-m", "sweep=optuna", f"model.lr={value}", *TINY)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert f"model.lr={value}: " in outcome.err and NO_SPACES[value] in outcome.err


def test_a_pattern_that_no_name_has_is_refused_in_one_line(cli: Callable[..., Outcome]) -> None:
    outcome = cli("-m", "sweep=optuna", "technique=glob(zzz*)", *TINY)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert "technique=glob(zzz*): " in outcome.err
