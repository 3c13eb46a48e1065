"""What a run's data and files are: a report compares content, wherever it lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from reporting.records import Run

DATA = "data"  # the setting that tells apart data of one name
_DATA_FILES = tuple(
    f"data.module.{name}" for name in ("csv_file", "train_shards", "val_shards", "test_shards")
)


def with_contents(runs: Sequence[Run]) -> list[Run]:
    """The runs of one data set with a setting `data` where it was not the same data for all of them.

    A run without a recorded fingerprint agrees with any: it counts with its sweep's runs, else with those whose files
    have the same names, else with most.
    """
    known = Counter(run.data_fingerprint for run in runs if run.data_fingerprint)
    if len(known) < 2:
        return list(runs)
    near: dict[Hashable, Counter[str]] = {}
    for run in runs:
        for key in _kin(run) if run.data_fingerprint else ():
            near.setdefault(key, Counter())[run.data_fingerprint] += 1

    def data_of(run: Run) -> str:
        among = next((near[key] for key in _kin(run) if key in near), known)
        return run.data_fingerprint or among.most_common(1)[0][0]

    return [replace(run, settings={**run.settings, DATA: data_of(run)[:8]}) for run in runs]


def _kin(run: Run) -> list[Hashable]:
    """What runs of the same data have in common, the surest first."""
    sweep = None if run.sweep is None else (run.sweep.created, run.sweep.folder)
    files = tuple(base_name(run.settings.get(option)) for option in _DATA_FILES)
    return [key for key in (sweep, files) if key is not None and any(key)]


def base_name(value: Any) -> str:
    """Of a path, or of several."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(base_name, value))
    return "" if value is None else PurePath(str(value)).name


def by_data(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that may be paired: of the same data, or of data that one sweep set out to compare.

    Returns:
        what the data are called, and the runs; one part of no name where all are of the same.
    """
    planned: dict[Hashable, set[str]] = {}
    for run in runs:
        key = run.path if run.sweep is None else (run.sweep.created, run.sweep.folder)
        planned.setdefault(key, set()).add(str(run.settings.get(DATA, "")))
    parts: list[set[str]] = []
    for together in planned.values():
        joined = [part for part in parts if part & together]
        parts = [part for part in parts if not part & together] + [together.union(*joined)]
    if len(parts) < 2:
        return [("", list(runs))]
    found = [(", ".join(sorted(part)), part) for part in parts]
    return [(name, [r for r in runs if r.settings.get(DATA) in part]) for name, part in sorted(found)]
