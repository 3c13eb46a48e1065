"""What the techniques did to the networks: the runs' records of `task=mechanism`, and which images each got right.

It describes. There are no verdicts: nothing here was planned, and of a dozen measures one stands out by chance.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reporting import statistics as s
from reporting.arms import Arm, unit_name
from reporting.comparison import Table
from reporting.records import Run
from reporting.request import Request
from reporting.robustness import for_each

MEASURES = {
    "loss_train": "loss, train", "loss_val": "loss, val", "logit_norm": "logit norm",
    "max_probability": "max probability", "ece": "ece, test", "gradient_train": "gradient, train",
    "gradient_val": "gradient, val", "gradient_gap": "gradient gap", "gradient_cosine": "gradient cosine",
    "sharpness": "sharpness", "flips": "flips, %", "flips_to_baseline": "flips to baseline, %",
}  # fmt: skip


class Spread(NamedTuple):
    """Over the runs of an arm; `n` of them, or of their pairs."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Mechanism:
    """What was measured of a table's runs.

    Attributes:
        measures: those of `MEASURES` that any run has.
        spreads: of each arm, by measure.
        differences: of each arm to the baseline, paired by seed, by measure; uncorrected 95% intervals.
        measured: runs with a record.
        samples: of the training and the validation split that were measured.
        loss: by name.
        without: the runs that have none, as the report names them.
        remarks: what could not be measured, and of how many runs.
    """

    measures: Sequence[str]
    spreads: Mapping[str, Mapping[str, Spread]]
    differences: Mapping[str, Mapping[str, s.PairedT]]
    measured: int
    samples: tuple[int, int]
    loss: str
    without: Sequence[str]
    remarks: Sequence[str]


class _Record(NamedTuple):
    kind: str  # equal for records that can be compared
    values: Mapping[str, float]
    remarks: Sequence[str]
    samples: tuple[int, int]
    loss: str


def mechanism_of(table: Table, request: Request) -> Mechanism | None:
    """The records of the runs that count, of the weights that the report scores; None where no run has one.

    Of records that were measured otherwise, most count.
    """
    name = "mechanism_best.json" if request.best else "mechanism.json"
    counted = [(arm, run) for arm in table.arms.values() for run in arm.runs.values()]
    found = {run.path: record for _, run in counted if (record := _read(run.path / name)) is not None}
    if not found:
        return None
    kinds = Counter(record.kind for record in found.values())
    kind = kinds.most_common(1)[0][0]
    records = {path: record for path, record in found.items() if record.kind == kind}
    remarks = [
        f"{len(kinds)} kinds of measurements differ in data, samples or version; most have the one shown."
    ]
    remarks = remarks if len(kinds) > 1 else []
    for remark, count in Counter(r for record in records.values() for r in record.remarks).items():
        remarks.append(f"{count} run{'' if count == 1 else 's'}: {remark}.")
    by_path = {run.path: run for _, run in counted}
    values = {path: {**record.values, **_ece(by_path[path])} for path, record in records.items()}
    base = table.arms[table.baseline]
    spreads: dict[str, dict[str, Spread]] = {}
    differences: dict[str, dict[str, s.PairedT]] = {}
    for arm in table.arms.values():
        own = {unit: values[run.path] for unit, run in arm.runs.items() if run.path in values}
        spreads[arm.name] = {
            m: _spread([v[m] for v in own.values() if m in v])
            for m in MEASURES
            if any(m in v for v in own.values())
        } | _flips(arm, base)
        if arm is base:
            continue
        differences[arm.name] = {}
        theirs = {unit: values[run.path] for unit, run in base.runs.items() if run.path in values}
        for m in MEASURES:
            units = sorted(u for u in own.keys() & theirs.keys() if m in own[u] and m in theirs[u])
            if units:
                differences[arm.name][m] = s.paired_t(np.array([own[u][m] - theirs[u][m] for u in units]))
    any_record = next(iter(records.values()))
    return Mechanism(
        measures=[m for m in MEASURES if any(m in of for of in spreads.values())],
        spreads=spreads,
        differences=differences,
        measured=len(records),
        samples=any_record.samples,
        loss=any_record.loss,
        without=[f"{arm.name}, {unit_name(run.unit)}" for arm, run in counted if run.path not in records],
        remarks=remarks,
    )


def to_measure(runs: Sequence[Run]) -> str:
    """The command that measures these runs; those that are measured are not again."""
    return for_each(runs, "task=mechanism")


def _read(file: Path) -> _Record | None:
    """A record; None where there is none that can be read: the task makes it anew."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        samples = int(record["samples"]["train"]), int(record["samples"]["val"])
        return _Record(
            kind=json.dumps([record[n] for n in ("version", "data", "samples", "loss", "tolerance")]),
            values={str(n): float(v) for n, v in record["values"].items()},
            remarks=[str(r) for r in record["remarks"]],
            samples=samples,
            loss=str(record["loss"]),
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _spread(values: Sequence[float]) -> Spread:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)) if len(values) else math.nan, sd, len(values))


def _ece(run: Run) -> dict[str, float]:
    """The calibration error on the test set, of the bins that the run's test recorded."""
    if run.correctness is None:
        return {}
    count, confidence, hits = run.correctness.calibration
    return {"ece": float(np.abs(confidence - hits).sum() / count.sum())} if count.sum() else {}


# Which images a run gets right


def _flips(arm: Arm, base: Arm) -> dict[str, Spread]:
    """The share of test images, in percent, that one of two runs has right and the other wrong.

    Within the arm over all pairs of its seeds (their sd is over pairs that share runs: no standard error); to the
    baseline over the pairs of one seed. Churn of predictions (Fard et al., NeurIPS 2016; arXiv 2103.04514) is at least
    that: two runs may be wrong differently.
    """
    own, theirs = _bits(arm), _bits(base)
    found = {}
    if len(own) > 1:
        bits, count = np.stack([b for _, b in sorted(own.items())]).astype(np.float32), len(own)
        differing = bits @ (1 - bits).T
        shares = 100 * (differing + differing.T)[np.triu_indices(count, 1)] / bits.shape[1]
        found["flips"] = Spread(
            float(shares.mean()), float(shares.std(ddof=1)) if count > 2 else math.nan, len(shares)
        )
    units = sorted(own.keys() & theirs.keys())
    if arm is not base and units and _images(arm) == _images(base):
        shares = np.array([100 * float((own[u] != theirs[u]).mean()) for u in units])
        found["flips_to_baseline"] = _spread(shares.tolist())
    return found


def _images(arm: Arm) -> tuple[str, int] | None:
    """Which, and how many, most of an arm's runs were tested on."""
    kinds = Counter(
        (r.correctness.samples, r.correctness.examples) for r in arm.runs.values() if r.correctness
    )
    return kinds.most_common(1)[0][0] if kinds else None


def _bits(arm: Arm) -> dict[tuple[int, int], NDArray[np.bool_]]:
    """Of the runs of an arm that were tested on the same images, by seed and fold."""
    known = {unit: run.correctness for unit, run in arm.runs.items() if run.correctness}
    return {unit: c.unpack() for unit, c in known.items() if (c.samples, c.examples) == _images(arm)}
