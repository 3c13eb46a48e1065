"""The floors of the house: a file imports its own floor or a lower one, at its top, and no circle closes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

# from the ground up
FLOORS = (
    ("crucible",),
    ("augmentation", "losses", "norms", "optimizers", "callbacks"),
    ("datasets", "models"),
    (
        "reporting",
        "lab.recorded",
        "lab.config",
        "lab.build",
        "lab.use",
        "lab.summary",
        "lab.speed",
        "lab.teachers",
        "lab.states",
        "lab.experiment",
        "lab.given",
    ),
    ("lab.scoring", "lab.packing", "lab.calibration", "lab.tuning"),
    ("lab.robustness", "lab.card", "lab.mechanism"),
    ("lab.export",),
    ("lab.tasks",),
    ("lab.warm", "lab.ranks", "lab.processes", "lab.remote", "lab.jobs"),
    (
        "lab.planning",
        "lab.deciding",
        "lab.executors",
        "lab.cluster",
        "lab.ray_engine",
        "lab.search",
        "lab.sweeps",
    ),
    ("docs", "hydra_plugins", "main", "report"),
)
LATE = {
    ("callbacks/pruning.py", "optuna"): "optional",
    ("lab/search.py", "optuna"): "optional",
    ("augmentation/policies/albumentations.py", "albumentations"): "optional",
    ("lab/cluster.py", "submitit"): "optional",
    ("lab/ray_engine.py", "ray"): "optional",
    ("lab/remote.py", "submitit"): "only on the node of a job that submitit started",
    ("crucible/loggers.py", "wandb"): "a second, and only where a report goes to W&B",
    ("crucible/loggers.py", "mlflow"): "optional",
    ("lab/use.py", "pandas"): "a quarter of a second that only notebooks need",
    ("crucible/command_line.py", "hydra"): "report.py explains its errors without Hydra",
    ("lab/teachers.py", "timm"): "a second, only where a teacher is timm's",
    ("optimizers/__init__.py", "timm"): "only for optimizers and layers of timm's",
    ("optimizers/groups.py", "timm"): "only for networks of timm's",
    ("crucible/pictures.py", "simplejpeg"): "optional",
    ("crucible/metrics.py", "torch"): "types; the report reads the table of metrics without torch",
    ("crucible/metrics.py", "torchmetrics"): "five seconds that the report does not need",
    ("reporting/files.py", "pandas"): "only for results.csv",
    ("datasets/packed.py", "lmdb"): "optional",
    ("datasets/shards.py", "pyarrow"): "optional",
    ("datasets/shards.py", "fsspec"): "optional",
    ("lab/export.py", "onnxruntime"): "optional",
}
LATE_OURS = {
    "crucible/__init__.py": "load_run is offered on the ground for notebooks",
    "lab/build.py": "types; load_run builds a network without the data sets",
    "crucible/metrics.py": "the calibration error is a torchmetrics metric, which the report does not need",
    "norms/online.py": "its kernels need Triton, which is not everywhere, and only GPUs need them",
    "main.py": "--help and typing errors do not wait for torch",
    "report.py": "--help does not wait for NumPy",
    "hydra_plugins/crucible_sweepers/__init__.py": "Hydra loads its plugins for every command",
}


class Import(NamedTuple):
    """One imported module, or name of a module."""

    file: str
    line: int
    module: str
    late: bool

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ROOMS = {name.partition(".")[0] for floor in FLOORS for name in floor} | {"lab"}
FILES = [
    f for room in sorted(ROOMS) for f in (*ROOT.glob(f"{room}.py"), *sorted(ROOT.glob(f"{room}/**/*.py")))
]
MODULES = {module_of(file): file.relative_to(ROOT).as_posix() for file in FILES}


@cache
def imports() -> list[Import]:
    return [found for module, file in MODULES.items() for found in _imports_of(module, file)]


def _imports_of(module: str, file: str) -> Iterator[Import]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in full]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, late=node not in tree.body)


def floor_of(module: str) -> int | None:
    """The floor's number from the ground; None where the module is not ours."""
    for number, floor in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in floor):
            return number
    return None


def test_every_file_is_on_a_floor() -> None:
    homeless = [file for module, file in MODULES.items() if floor_of(module) is None and module != "lab"]
    assert not homeless, "name them in FLOORS"


def test_a_file_imports_its_own_floor_or_a_lower_one() -> None:
    floors = {file: floor_of(module) or 0 for module, file in MODULES.items()}
    wrong = [
        i.where for i in imports() if (floor_of(i.module) or 0) > floors[i.file] and i.file not in LATE_OURS
    ]
    assert not wrong


def test_no_file_imports_tests_or_benchmarks() -> None:
    assert not [i.where for i in imports() if i.module.partition(".")[0] in ("tests", "benchmarks")]


def test_imports_stand_at_the_top_but_those_that_are_late_on_purpose() -> None:
    late = [i for i in imports() if i.late]
    ours = [i for i in late if i.module.partition(".")[0] in ROOMS]
    assert {i.file for i in ours} == LATE_OURS.keys(), [i.where for i in ours]
    others = [i for i in late if i not in ours]
    unlisted = [i.where for i in others if (i.file, i.module.partition(".")[0]) not in LATE]
    assert not unlisted, "move them to the top"
    gone = LATE.keys() - {(i.file, i.module.partition(".")[0]) for i in others}
    assert not gone, "no longer late: take them off the list"
    assert len(LATE) <= 21


def test_no_circle_closes() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for i in imports():
        if not i.late and i.module in MODULES:
            graph[module_of(ROOT / i.file)].add(i.module)
    list(TopologicalSorter(graph).static_order())  # raises CycleError and names the circle


@pytest.mark.parametrize("module", ["main", "report"])
def test_an_entry_defers_all_that_is_heavy(module: str) -> None:
    """What `--help` waits for: an entry's own top, and what that imports in turn."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [i.module for i in imports() if not i.late and i.file == MODULES.get(name)]
    assert not {name.partition(".")[0] for name in seen} & {"torch", "lightning", "numpy", "pandas", "wandb"}
