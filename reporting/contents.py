"""What a run's data and files are: a report compares content, wherever it lies."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from crucible.configuration import is_semantic
from reporting.records import Run

DATA = "data"  # the setting that tells apart data of one name
_DATA_FILES = tuple(
    f"data.module.{name}" for name in ("csv_file", "train_shards", "val_shards", "test_shards")
)
# options whose path is no part of a run's identity, but what it leads to is
FILES = frozenset({
    "model.init_from", "ckpt_path", *_DATA_FILES,
    "data.module.train_transforms.pipeline_file", "data.module.test_transforms.pipeline_file",
})  # fmt: skip


def with_contents(runs: Sequence[Run]) -> list[Run]:
    """The runs of one data set with settings that are equal where contents are.

    Where it was not the same data for all of them, a setting `data` has the fingerprint. A run without one agrees with
    any: it counts with its sweep's runs, else with those whose files have the same names, else with most. Options that
    name a file have its name in place of its path: one name for one recorded fingerprint, and names of their own for
    several. Files of which each seed has its own go by what their names have in common.
    """
    known = Counter(run.data_fingerprint for run in runs if run.data_fingerprint)
    near: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for key in _kin(run) if run.data_fingerprint else ():
            near[key][run.data_fingerprint] += 1

    def data_of(run: Run) -> str:
        among = next((near[key] for key in _kin(run) if key in near), known)
        return run.data_fingerprint or among.most_common(1)[0][0]

    left_out = frozenset(_DATA_FILES if known else ())  # the fingerprint stands for them
    paths = {
        run.path: {n: v for n, v in run.settings.items() if n not in left_out and _is_path(n, v, run)}
        for run in runs
    }
    named: dict[Path, dict[str, str]] = {run.path: {} for run in runs}
    options = sorted({option for found in paths.values() for option in found})
    for option in options:
        of_option = [(run, base_name(paths[run.path][option])) for run in runs if option in paths[run.path]]
        for path, name in _names(option, of_option).items():
            named[path][option] = name
    none = {option: None for option in options if option in FILES}

    def settings_of(run: Run) -> dict[str, Any]:
        others = {n: v for n, v in run.settings.items() if n not in FILES}
        return others | none | named[run.path] | ({DATA: data_of(run)[:8]} if len(known) > 1 else {})

    return [replace(run, settings=settings_of(run), files=frozenset(named[run.path])) for run in runs]


def _kin(run: Run) -> list[Hashable]:
    """What runs of the same data have in common, the surest first."""
    sweep = None if run.sweep is None else (run.sweep.created, run.sweep.folder)
    files = tuple(base_name(run.settings.get(option)) for option in _DATA_FILES)
    return [key for key in (sweep, files) if key is not None and any(key)]


def _is_path(name: str, value: Any, run: Run) -> bool:
    if name in FILES or name in run.contents:
        return value is not None
    return isinstance(value, str) and bool(re.search(r"(^|@)[/~]", value)) and is_semantic(name)


def base_name(value: Any) -> str:
    """Of a path, or of several; of a run's checkpoint with the run's."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(base_name, value))
    parts = PurePath("" if value is None else str(value)).parts
    return (
        f"{parts[-3]}:{parts[-1]}" if len(parts) > 2 and parts[-2] == "checkpoints" else "".join(parts[-1:])
    )


def _names(option: str, found: Sequence[tuple[Run, str]]) -> dict[Path, str]:
    """What the file that an option names is called, by run."""
    named = _of_a_seed(found)
    rest = [one for one in found if one[0].path not in named]
    first: dict[str, str] = {}  # content -> what it was first called
    contents: dict[str, set[str]] = defaultdict(set)  # of a name
    for run, name in sorted(rest, key=lambda one: (one[0].started, one[0].path.name)):
        if content := run.contents.get(option):
            first.setdefault(content, name)
            contents[name].add(content)
    times = Counter(first.values())
    for run, name in rest:
        content = run.contents.get(option, "")
        if not content and len(contents[name]) == 1:
            (content,) = contents[name]
        called = first.get(content, name)
        named[run.path] = f"{called}@{content[-8:]}" if content and times[called] > 1 else called
    return named


def _of_a_seed(found: Sequence[tuple[Run, str]]) -> dict[Path, str]:
    """The names of files of which each seed has its own, by run, with a star for the seed.

    So are files whose names differ in the run's seed alone, and those of one arm of one sweep.
    """
    starred = {run.path: _starred(name, run.unit[0]) for run, name in found}
    alike: dict[Hashable, set[str]] = defaultdict(set)
    for run, name in found:
        alike[starred[run.path]].add(name)
        if run.sweep is not None:
            alike[run.sweep.created, run.sweep.folder, run.arm].add(name)
    own = {}
    for run, _ in found:
        mates = alike[run.sweep.created, run.sweep.folder, run.arm] if run.sweep is not None else set()
        if len(alike[starred[run.path]]) > 1:
            own[run.path] = starred[run.path]
        elif len(mates) > 1:
            own[run.path] = min(re.sub("[0-9]+", "*", name) for name in mates)
    return own


def _starred(name: str, seed: int) -> str:
    return re.sub(rf"(?<![0-9a-zA-Z])(s|seed)?{seed}(?![0-9a-zA-Z])", r"\1*", name)


def identified(run: Run) -> bool:
    """Whether its identity is its arm's: not a fold's, not one by a file of the seed's own or by a path as typed."""
    by_more = ("*" in str(run.settings[n]) or (n not in FILES and n not in run.contents) for n in run.files)
    return bool(run.identity) and not (run.unit[1] or run.recognised or any(by_more))


def differ_unsaid(run: Run, other: Run) -> bool:
    """Whether two runs whose settings are equal are of two arms: their identities differ, and not by the code's doing.

    The code may explain it only where it was not the same, and where what all their files contained is recorded.
    """
    if not (identified(run) and identified(other)) or run.identity == other.identity:
        return False
    recorded = all(name in one.contents for one in (run, other) for name in one.files)
    return not recorded or (_code(run) == _code(other) and bool(run.commit) and not run.dirty)


def _code(run: Run) -> tuple[Any, ...]:
    return run.commit, run.dirty, run.corrected, run.versions


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
