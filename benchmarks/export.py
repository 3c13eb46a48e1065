"""Every network family and every norm as a file of each format: its size, how far it is from the network, seconds.

PYTHONPATH=tests python benchmarks/export.py --threads 2 --missing --out benchmarks/results/export.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from paired import provenance, report
from small_models import FAMILIES, SIZE, small
from torch import Tensor

from crucible.options import ConfigError
from lab.build import build_model
from lab.export import KINDS, export_model
from lab.use import Transform
from models.base_model import BaseModel
from models.exported import ExportOptions
from models.views import Views
from norms.convert import NORMS

POLICIES = {
    2: {
        "_target_": "augmentation.policies.cifar.TestTransform",
        "size": SIZE,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    },
    1: {"_target_": "augmentation.policies.default.IdentityTransform"},
    3: {"_target_": "augmentation.policies.default.IdentityTransform"},
}
WHOLE = ExportOptions(normalize=True, layout="NHWC", softmax=True)


class Case(NamedTuple):
    """A row: its name, how its network is asked for, and what becomes part of the graph."""

    name: str
    family: str
    overrides: tuple[str, ...] = ()
    options: ExportOptions = ExportOptions()
    views: Views = Views()


def cases() -> Iterator[Case]:
    """Every family; every norm, dimension and option on a small ResNet."""
    for family in FAMILIES:
        yield Case(family, family)
    for norm in NORMS:
        yield Case(f"resnet, model.norm={norm}", "resnet", (f"model.norm={norm}",))
    for dim in (1, 3):
        yield Case(f"resnet, {dim}-D", "resnet", (f"model.input_dim={dim}",))
    yield Case("resnet, regression", "resnet", ("model.task=regression", "model.metrics=[mse]"))
    yield Case(
        "resnet: normalize, flip, NHWC, temperature, softmax", "resnet", (), WHOLE, Views(("flip",), 1.5)
    )
    yield Case("resnet: half", "resnet", (), ExportOptions(half=True))


def built(case: Case) -> tuple[Callable[[], BaseModel], BaseModel, Transform, Tensor]:
    """How its model is made, one whose outputs differ from sample to sample, what its input goes through, and input."""
    config = small(case.family)
    config["model"] |= {name.removeprefix("model."): value for name, value in _values(case.overrides)}
    dim = config["model"]["input_dim"]

    def fresh() -> BaseModel:
        return build_model(config, load=False, compile=False).eval()

    torch.manual_seed(0)
    model, transform = fresh(), Transform(POLICIES[dim], dim, 3)
    shape = (16, 3, *[SIZE if dim == 2 else 16] * dim)
    stored = torch.randint(256, shape, dtype=torch.uint8) if dim == 2 else torch.randn(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a head or branch that begins at zero
                parameter.normal_(0, 0.1)
        model.train()
        for _ in range(5):  # the norms' statistics
            model(transform.batch(stored))
    return fresh, model.eval(), transform, stored


def _values(overrides: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for override in overrides:
        name, _, value = override.partition("=")
        yield name, int(value) if value.isdigit() else ["mse"] if value == "[mse]" else value


def cell(case: Case, kind: str, folder: Path) -> str:
    """Megabytes, largest difference as a share of the largest output, seconds; or why not."""
    if kind == "safetensors" and case.options == WHOLE:
        return "weights alone"
    try:
        fresh, model, transform, stored = built(case)
        began = time.perf_counter()
        made = export_model(
            kind, model, transform, stored, folder / f"a{KINDS[kind].suffix}", options=case.options, views=case.views,
            fresh=fresh,
        )  # fmt: skip
    except ConfigError as error:
        return f"refused: {' '.join(str(error).split())}".replace("|", "\\|")
    difference = made.difference
    share = difference.largest / max(difference.scale, 1e-30)
    return f"{made.size / 1e6:.2f}, {share:.0e}, {time.perf_counter() - began:.1f}"


def _rows(page: Path | None) -> dict[str, str]:
    """The rows of a page, by the name that they begin with."""
    lines = page.read_text().splitlines() if page is not None and page.is_file() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="rows whose name holds this text; the others of the page stay")
    parser.add_argument("--missing", action="store_true", help="rows that the page lacks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = _rows(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if (arguments.only or "") not in case.name or (arguments.missing and case.name in known):
                continue
            cells = [cell(case, kind, Path(folder)) for kind in KINDS]
            known[case.name] = f"| {' | '.join([case.name, *cells])} |"
            print(known[case.name], file=sys.stderr, flush=True)
            if arguments.out is not None:  # what is there when somebody ends it
                arguments.out.write_text(_page(known) + "\n")
    report(_page(known), arguments.out)


def _page(known: dict[str, str]) -> str:
    heads = ["network", *KINDS]
    text = [
        "# Networks as files", "",
        "The small variant of each family (`tests/small_models.py`), weights drawn, norms with the statistics of a",
        "batch; 16 samples, in one batch and one of them alone. A cell is the file's megabytes, the largest difference",
        "between what its runtime gives and what the network gives, as a share of the largest output, and seconds of",
        "writing, opening and comparing (by the clock, of a machine that others may use). More than 1e-4 (half: 2e-2)",
        "would be an error.", "", provenance(),
        f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |",
        *(known[case.name] for case in cases() if case.name in known),
    ]  # fmt: skip
    return "\n".join(text)


if __name__ == "__main__":
    main()
