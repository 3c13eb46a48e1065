"""Accuracy and calibration under corruptions, beside those on clean images: read from the runs, compared like these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crucible.command_line import command
from crucible.command_line import option as as_typed
from crucible.options import ConfigError
from crucible.robustness import ALEXNET_ERRORS, SEVERITIES
from reporting.arms import Arm, unit_name
from reporting.comparison import Table, rescored
from reporting.records import UNDER_CORRUPTIONS, Run, Tested
from reporting.request import Metric, Request


@dataclass
class Robustness:
    """The table of corruptions of a data set's runs.

    Attributes:
        weights: whose tests these are, `best` or `last`.
        samples: test images a cell.
        tests: of each run.
        tables: each mean over corruptions, compared as the report's own metric is.
        without: the runs that have no such test, as the report names them.
        remarks: what a reader should know.
    """

    weights: str
    samples: int
    tests: Mapping[Path, Tested]
    tables: Sequence[Table]
    without: Sequence[str]
    remarks: Sequence[str]

    def mean(self, arm: Arm, name: str) -> float:
        """Of the arm's runs, of a value of their tests; NaN where there is none."""
        return _mean(t.values[name] for t in self._of(arm) if name in t.values)

    def by_corruption(self, arm: Arm, corruption: str) -> float:
        """Mean accuracy of the arm's runs over the severities of a corruption."""
        return _mean(t.cells[corruption][s]["acc"] for t in self._of(arm) for s in SEVERITIES)

    def _of(self, arm: Arm) -> Iterable[Tested]:
        return (self.tests[run.path] for run in arm.runs.values() if run.path in self.tests)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def robustness_of(table: Table, request: Request) -> Robustness | None:
    """The tests under corruptions of the table's runs; None where no run has one.

    Only tests with all 15 x 5 cells count, of one kind of weights, on equal images: those that the report scores,
    where a run has them, else the others, which is said.
    """
    counted = [(arm, run) for arm in table.arms.values() for run in arm.runs.values()]
    weights = next(
        (w for w in preferred_weights(request) if any(w in run.tested for _, run in counted)), None
    )
    if weights is None:
        return None
    remarks = []
    if weights != preferred_weights(request)[0]:
        scored = "last epoch's" if weights == "best" else "best"
        remarks.append(
            f"These are tests of the {weights} weights, clean accuracy included; the {scored} ones, which this report "
            "scores, have none."
        )
    kinds = Counter(run.tested[weights].kind for _, run in counted if weights in run.tested)
    kind = kinds.most_common(1)[0][0]
    tests = {
        run.path: run.tested[weights]
        for _, run in counted
        if weights in run.tested and run.tested[weights].kind == kind
    }
    if len(kinds) > 1:
        remarks.append(
            f"{len(kinds)} kinds of tests differ in their images or in the corruptions; most have the one shown."
        )
    without = [f"{arm.name}, {unit_name(run.unit)}" for arm, run in counted if run.path not in tests]
    tables = []
    for name in UNDER_CORRUPTIONS:
        values = {path: test.values[name] for path, test in tests.items() if name in test.values}
        if values:
            tables.append(compared_by(table, Metric(f"test/{name}"), values, request))
    samples = next(iter(tests.values())).samples
    return Robustness(weights, samples, tests, tables, without, remarks)


def preferred_weights(request: Request) -> tuple[str, str]:
    """Whose tests are shown: of the weights that the report scores, else of the others."""
    return ("best", "last") if request.best else ("last", "best")


def compared_by(table: Table, metric: Metric, values: Mapping[Path, float], request: Request) -> Table:
    """The table's arms compared by values of another metric of their runs, as the report compares by its own."""
    margin = table.plan.margin if metric.default_margin is not None and table.metric.is_fraction else None
    asked = replace(request, metric=metric)
    try:
        return rescored(table, values, asked, margin)
    except ConfigError:  # too few of the arms have tests for one variance
        return rescored(table, values, replace(asked, shared_variance=False), margin)


def to_test(runs: Sequence[Run]) -> str:
    """The command that tests these runs under all corruptions."""
    return for_each(runs, "task=test", "data.module.corruption=all")


def for_each(runs: Sequence[Run], *options: str) -> str:
    """The command that does the same with each of these runs."""
    folders = sorted({str(run.path.parent) for run in runs})
    pattern = f"{folders[0]}/*" if len(folders) == 1 else ",".join(f"{f}/*" for f in folders)
    return command(as_typed("run", pattern), options[0], "each=true", *options[1:])


def corruptions() -> tuple[str, ...]:
    """The fifteen, in the order of their publication."""
    return tuple(ALEXNET_ERRORS)
