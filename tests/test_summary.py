"""task=summary, and the generated table of models."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nightly
from small_models import FAMILIES, small
from torch import nn
from torchvision.models import get_model_weights

from docs import models_page as models_table
from docs.models_page import Row, line, models_page, reported, rows, used_notes
from lab.summary import build_on_meta, count_multiply_adds, input_shape, network_costs
from models.dynamic_resnet import ResNet18


def on_meta(network: nn.Module) -> nn.Module:
    return network.to("meta")


def test_the_counts_are_those_of_the_layers() -> None:
    network = on_meta(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    )
    costs = network_costs(network, (2, 3, 6, 6))
    conv, linear = 2 * 36 * 8 * 3 * 9, 2 * 288 * 5
    assert costs.multiply_adds == conv + linear
    assert costs.step_flops == 2 * (conv + linear) + 2 * conv + 4 * linear  # no gradient for the images
    assert costs.parameters == 8 * 27 + 8 + 288 * 5 + 5
    assert [(layer.name, layer.output, layer.multiply_adds) for layer in costs.layers] == [
        ("0", (2, 8, 6, 6), conv), ("1", (2, 8, 6, 6), 0), ("2", (2, 288), 0), ("3", (2, 5), linear)
    ]  # fmt: skip
    # the images for the convolution's weights, the ReLU's output for itself and the linear layer
    assert [layer.saved_bytes for layer in costs.layers] == [4 * 2 * 108, 4 * 2 * 288, 0, 0]
    assert costs.saved_bytes == 4 * 2 * (108 + 288)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ConvTranspose2d(8, 6, 2, 2)],
    ids=["depthwise", "grouped", "transposed"],
)  # fmt: skip
def test_the_backward_pass_of_a_convolution_is_twice_the_forward(layer: nn.Module) -> None:
    costs = network_costs(on_meta(nn.Sequential(nn.Conv2d(3, 8, 1), layer)), (2, 3, 6, 6))
    first, second = (layer.multiply_adds for layer in costs.layers)
    assert costs.step_flops == 2 * (2 * first + 3 * second)  # no gradient for the images


def test_a_module_has_the_costs_of_those_within() -> None:
    costs = network_costs(on_meta(ResNet18(cifar_size=True).model), (1, 3, 32, 32))
    of = {layer.name: layer for layer in costs.layers}
    for name in ("parameters", "multiply_adds", "saved_bytes"):
        stages = [n for n in of if "." not in n]
        assert sum(getattr(of[n], name) for n in stages) == getattr(costs, name)
        assert sum(getattr(of[f"layer3.{i}"], name) for i in (0, 1)) == getattr(of["layer3"], name)


def test_activation_memory_is_what_a_real_step_keeps() -> None:
    network, x = ResNet18(cifar_size=True).model.train(), torch.randn(2, 3, 16, 16)
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x).sum()
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert network_costs(on_meta(network), (2, 3, 16, 16)).saved_bytes == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["as built", *nightly("online")])
@pytest.mark.parametrize("family", [f if n % 3 == 0 else nightly(f)[0] for n, f in enumerate(FAMILIES)])
def test_every_family_is_counted_without_memory(family: str, norm: str) -> None:
    config = small(family)
    if norm == "online" and not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in build_on_meta(config).modules()
    ):
        pytest.skip("no norm to convert")
    config["model"]["norm"] = None if norm == "as built" else norm
    model = build_on_meta(config)
    costs = network_costs(model.model, input_shape(config, batch=4))
    assert all(p.is_meta for p in model.parameters())
    assert costs.multiply_adds == 4 * count_multiply_adds(model.model, input_shape(config, batch=1))
    assert 2.5 < costs.step_flops / (2 * costs.multiply_adds) <= 3.01
    assert costs.saved_bytes > 0


def test_the_command_prints_a_table_and_leaves_nothing(cli: Any, tmp_path: Path) -> None:
    outcome = cli(
        "task=summary", "data=imagenet", "model._target_=models.dynamic_resnet.ResNet50", "summary_depth=1",
        "data.num_classes=null",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert re.search(r"layer4\s+Sequential\s+2048 x 7 x 7\s+14,964,736\s+809 M", outcome.out)
    assert "parameters     25,557,032" in outcome.out
    assert "multiply-adds  4.09 G a sample" in outcome.out
    assert "layer4.0" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_sams_second_pass_is_counted(cli: Any) -> None:
    def step(*arguments: str) -> float:
        number, unit = re.search(
            r"^step +([\d.]+) (.)FLOPs", cli("task=summary", *arguments).out, re.M
        ).groups()  # type: ignore[union-attr]
        return float(number) * {"G": 1, "T": 1000}[unit]

    assert step("model.sam=true") == pytest.approx(2 * step(), rel=0.01)


@pytest.mark.parametrize("task", ["summary", "train"])
def test_input_that_the_network_cannot_take_is_one_line(task: str, cli: Any, tmp_path: Path) -> None:
    outcome = cli(f"task={task}", "model=convnext", "model.type=atto")
    assert outcome.status == 2
    assert outcome.err.startswith("error: data.input_size=8: ConvNext cannot take input of 1x8x8 (")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# docs/models.md


def test_every_family_is_in_the_table() -> None:
    assert {row.family for row in rows()} == set(FAMILIES)
    assert reported().keys() - {"notes"} <= set(FAMILIES)
    text = models_table.PAGE.read_text()
    assert all(f"`model={family}" in text for family in FAMILIES)


@pytest.mark.slow
def test_one_row_in_ten_is_the_generated_one() -> None:
    page = models_table.PAGE.read_text().splitlines()
    written = [number for number, text in enumerate(page) if text.startswith("| ") and "`model=" in text]
    assert len(written) == len(rows())
    for number, row in list(zip(written, rows(), strict=True))[::10]:
        assert page[number] == line(row, used_notes()), "run python -m docs.generate"


@pytest.mark.nightly
def test_the_table_is_the_generated_one() -> None:
    assert models_table.PAGE.read_text() == models_page(), "run python -m docs.generate"


TORCHVISION = [row for row in rows() if row.source.startswith("torchvision ")]


@pytest.mark.parametrize("row", TORCHVISION, ids=lambda row: row.name)
def test_a_row_of_torchvision_has_its_figures(row: Row) -> None:
    weights = get_model_weights(row.source.split()[1]).IMAGENET1K_V1  # type: ignore[attr-defined]
    assert float(row.top1) == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], abs=0.005)
    parameters, multiply_adds = row.costs()
    assert parameters == weights.meta["num_params"]
    assert multiply_adds / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.002)


LISTED = [row for row in rows() if row.listed]


@pytest.mark.parametrize("row", LISTED, ids=lambda row: row.name)
def test_a_figure_that_differs_from_the_listed_one_is_explained(row: Row) -> None:
    agree = True
    for text, value, unit in zip(row.listed.split(" / "), row.costs(), (1e6, 1e9), strict=True):
        last_digit = 10.0 ** -len(text.partition(".")[2])
        agree &= math.isclose(value / unit, float(text), abs_tol=last_digit / 2 + 1e-9)
    assert agree == (row.note == ""), row.costs()


@pytest.mark.parametrize("row", [r for r in LISTED if r.note == "statistics"], ids=lambda row: row.name)
def test_running_statistics_explain_where_the_note_says_so(row: Row) -> None:
    network = row.build()
    statistics = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    assert f"{(row.costs()[0] + statistics) / 1e6:.1f}" == row.listed.split(" / ")[0]
