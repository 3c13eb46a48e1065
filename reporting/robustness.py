"""Robustness beside accuracy and calibration: the arms' tests under corruptions, paired by seed as all else is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crucible.robustness import ALEXNET_ERRORS
from reporting import statistics as s
from reporting.arms import Arm
from reporting.comparison import Table, pairs_of
from reporting.records import Robustness, Run

# what is shown: title, part of the record, name there
_COLUMNS = (
    ("acc", "clean", "acc"),
    ("corrupted acc", "averages", "acc_corrupted"),
    ("ece", "clean", "ece"),
    ("corrupted ece", "averages", "ece_corrupted"),
    ("mCE", "averages", "mce"),
)


class Value(NamedTuple):
    """A mean over an arm's tested runs, and its paired difference to the baseline; in percent, NaN for none."""

    mean: float
    difference: float
    low: float
    high: float


class Robust(NamedTuple):
    """What the report says of the corruptions of a data set.

    Attributes:
        titles: of the values of an arm.
        arms: arm, its number of tested runs, and a value for each title.
        untested: the runs that count and have no whole record of these weights and this version of the corruptions.
        by_corruption: corruption, and the mean accuracy of each arm of `shown`.
        shown: the arms with tested runs.
    """

    titles: Sequence[str]
    arms: Sequence[tuple[str, int, Sequence[Value]]]
    untested: Sequence[Run]
    by_corruption: Sequence[tuple[str, Sequence[float]]]
    shown: Sequence[str]


def robustness_of(table: Table) -> Robust | None:
    """The tests under corruptions of a table's runs; None where there is none."""
    runs = [run for arm in table.arms.values() for _, run in sorted(arm.runs.items())]
    version = max((r.robustness.version for r in runs if r.robustness is not None), default=None)
    tested = {
        r.path: r.robustness for r in runs if r.robustness is not None and r.robustness.version == version
    }
    if not tested:
        return None
    columns = [c for c in _COLUMNS if c[2] != "mce" or all("mce" in r.averages for r in tested.values())]
    base = table.arms[table.baseline]
    rows = []
    for arm in table.arms.values():
        values = [_value(arm, base, table, tested, part, name) for _, part, name in columns]
        rows.append((arm.name, sum(r.path in tested for r in arm.runs.values()), values))
    shown = {
        arm.name: known
        for arm in table.arms.values()
        if (known := [tested[r.path] for r in arm.runs.values() if r.path in tested])
    }
    by_corruption = [
        (name, [_mean([r.accuracies[name] for r in known]) for known in shown.values()])
        for name in ALEXNET_ERRORS
    ]
    titles = [title for title, _, _ in columns]
    return Robust(titles, rows, [r for r in runs if r.path not in tested], by_corruption, list(shown))


def _value(
    arm: Arm, base: Arm, table: Table, tested: Mapping[Path, Robustness], part: str, name: str
) -> Value:
    def percent(run: Run) -> float:
        return 100 * float(getattr(tested[run.path], part)[name])

    mean = _mean([percent(run) / 100 for run in arm.runs.values() if run.path in tested])
    if arm is base:
        return Value(mean, math.nan, math.nan, math.nan)
    pairs = [(a, b) for a, b in pairs_of(arm, base) if a.path in tested and b.path in tested]
    seeds = max(
        len(pairs), min(len(arm.all_runs), len(base.all_runs))
    )  # what is looked at, as in the other tables
    t = s.paired_t(np.array([percent(a) - percent(b) for a, b in pairs]), table.plan.level(seeds))
    return Value(mean, float(t.mean), float(t.low), float(t.high))


def _mean(fractions: Sequence[float]) -> float:
    return 100 * sum(fractions) / len(fractions) if fractions else math.nan
