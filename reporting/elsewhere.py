"""Tests of the runs on other data, or of their own read otherwise (views, a temperature), compared likewise."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crucible.metrics import find_metric
from reporting.arms import unit_name
from reporting.comparison import Table
from reporting.records import Run
from reporting.request import Metric, Request
from reporting.robustness import compared_by, preferred_weights


class Kind(NamedTuple):
    """Tests that can be compared: of the same weights on the same images, read alike."""

    name: str  # of the folder
    how: str  # it was read, in words; empty: as the run reads its own
    weights: str  # best, last
    data: str  # fingerprint
    samples: int


@dataclass
class Elsewhere:
    """The tests of one kind.

    Attributes:
        kind: what was tested, and how.
        table: the arms, compared by the value that these tests gave them.
        tests: how many runs have one.
        without: the runs that have none, as the report names them.
    """

    kind: Kind
    table: Table
    tests: int
    without: Sequence[str]


def elsewhere_of(table: Table, request: Request) -> list[Elsewhere]:
    """The tests that at least two runs of the table have, by the name of the data.

    Of weights those that the report scores come first; the others count where these have no such test.
    """
    runs = [(arm, run) for arm in table.arms.values() for run in arm.runs.values()]
    found: dict[Kind, dict[Path, Mapping[str, float]]] = defaultdict(dict)
    for _, run in runs:
        for kind, metrics in _tests_of(run, table.data):
            found[kind][run.path] = metrics
    shown: list[Elsewhere] = []
    seen: set[tuple[str, str, str]] = set()
    order = preferred_weights(request)
    for kind in sorted(found, key=lambda k: (k.name, k.how, order.index(k.weights), -len(found[k]))):
        same = (kind.name, kind.how, kind.data)
        metric = _metric(table, found[kind].values())
        if same in seen or metric is None or len(found[kind]) < 2:
            continue
        seen.add(same)
        values = {path: v[metric.name] for path, v in found[kind].items() if metric.name in v}
        compared = replace(compared_by(table, metric, values, request), data=_named(table.data, kind))
        without = [f"{arm.name}, {unit_name(run.unit)}" for arm, run in runs if run.path not in values]
        shown.append(Elsewhere(kind, compared, len(values), without))
    return shown


def _named(data: str, kind: Kind) -> str:
    return f"{data} on {kind.name}" + (f" ({kind.how})" if kind.how else "")


def _tests_of(run: Run, own: str) -> list[tuple[Kind, dict[str, float]]]:
    """The records in `RUN/tests`; one that cannot be read is made anew by the test that wrote it."""
    found = []
    for file in sorted(run.path.glob("tests/*/test.json")):
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            how = [*record.get("tta", ()), *(["calibrated"] if record.get("calibration") else [])]
            kind = Kind(
                name=Path(record["folder"]).name if record["folder"] else own,
                how=", ".join(how),
                weights=Path(record["checkpoint"]).stem,
                data=str(record["data"]),
                samples=int(record["samples"]),
            )
            values = {str(n): float(v) for n, v in record["metrics"].items()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue
        if kind.weights in ("best", "last"):
            found.append((kind, values))
    return found


def _metric(table: Table, tests: Any) -> Metric | None:
    """The report's metric, of the test split; where no test has it, accuracy or the loss."""
    logged = {name for values in tests for name in values}
    wanted = (f"test/{table.metric.base}", "test/acc", "test/loss")
    return next((Metric(n) for n in wanted if n in logged and find_metric(n) is not None), None)
