"""Files as published works wrote them, made here by hand, start the networks of the recipes that reproduce them.

Names and shapes are those of timm 0.4.12 (the fork of github.com/bishshoy/power-grad-transform) and of torchvision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from torch.nn import functional as F

from crucible import configuration
from lab.build import build_model
from lab.config import check, resolve_network

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def layout(
    depth: int, *, norms: bool = True, gates: bool = False, groups: int = 1, deep: bool = False
) -> dict:
    """`{name: shape}` of a ResNet's state dict.

    Args:
        depth: 18 (two 3x3 convolutions a block), 50 or 101 (1x1, 3x3, 1x1).
        norms: batch norms behind the convolutions.
        gates: squeeze-and-excitation, a sixteenth of the channels in multiples of 8.
        groups: ResNeXt's, of four channels.
        deep: the stem and shortcuts of timm's resnet50d.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        if norms:
            shapes.update(
                {f"{name}.{part}": (channels,) for part in NORM} | {f"{name}.num_batches_tracked": ()}
            )

    if deep:
        for place, (outputs, inputs) in zip((0, 3, 6), ((32, 3), (32, 32), (64, 32)), strict=True):
            shapes[f"conv1.{place}.weight"] = (outputs, inputs, 3, 3)
        norm("conv1.1", 32)
        norm("conv1.4", 32)
    else:
        shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    channels, bottleneck = 64, depth > 34
    for stage, count in enumerate(BLOCKS[depth]):
        base = 64 * 2**stage
        inner, outer = (base * groups * 4 // 64 if groups > 1 else base), base * (4 if bottleneck else 1)
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            kernels = ((inner, channels, 1), (inner, inner // groups, 3), (outer, inner, 1))
            convolutions = kernels if bottleneck else ((outer, channels, 3), (outer, outer, 3))
            for n, (outputs, inputs, kernel) in enumerate(convolutions, start=1):
                shapes[f"{name}.conv{n}.weight"] = (outputs, inputs, kernel, kernel)
                norm(f"{name}.bn{n}", outputs)
            if gates:
                width = max(8, (outer // 16 + 7) // 8 * 8)
                for layer, (outputs, inputs) in (("fc1", (width, outer)), ("fc2", (outer, width))):
                    shapes[f"{name}.se.{layer}.weight"] = (outputs, inputs, 1, 1)
                    shapes[f"{name}.se.{layer}.bias"] = (outputs,)
            if block == 0 and (stage > 0 or channels != outer):
                shapes[f"{name}.downsample.{int(deep)}.weight"] = (outer, channels, 1, 1)
                norm(f"{name}.downsample.{int(deep) + 1}", outer)
            channels = outer
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.05
        state[name] = values.abs() + 0.5 if "running_var" in name else values
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(112_500)
    return state


def training_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the fork's CheckpointSaver writes: the weights among the arguments and the optimizer's moments."""
    args = argparse.Namespace(
        model="resnet18", modify_softmax=0.25, sched="cosine", scale=[0.08, 1.0], amp=True
    )
    return {
        "epoch": 99, "arch": "resnet18", "state_dict": state, "version": 2, "args": args, "metric": 70.298,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }  # fmt: skip


def started(recipe: str, content: Any, folder: Path) -> nn.Module:
    """The network that `recipe=... model.init_from=FILE` trains, at its start; all of the file is in it."""
    torch.save(content, folder / "weights.pth.tar")
    typed = [f"recipe={recipe}", f"model.init_from={folder / 'weights.pth.tar'}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", typed))
    check(config, typed)
    resolve_network(config)
    model = build_model(config)
    state, own = content.get("state_dict", content), model.model.state_dict()
    assert list(own.keys() ^ state.keys()) == []
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    assert f"{len(state)} of {len(state)} tensors loaded" in model.weights_report
    assert "\n" not in model.weights_report, "nothing is missing, and nothing left over"
    return model.model.eval()


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        ("powergrad/resnet18_cosine_powergrad", layout(18)),
        ("powergrad/resnet18_wobn_cosine", layout(18, norms=False)),
        ("powergrad/seresnet18_cosine", layout(18, gates=True)),
        pytest.param("powergrad/resnet50_label_smoothing", layout(50), marks=pytest.mark.nightly),
        pytest.param("powergrad/seresnet50_cosine", layout(50, gates=True), marks=pytest.mark.slow),
        pytest.param("powergrad/resnet101_cosine", layout(101), marks=pytest.mark.nightly),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_files_of_the_power_grad_repository_start_its_recipes(
    recipe: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    started(recipe, training_file(filled(shapes)), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        pytest.param("model_zoo/resnet50", layout(50), marks=pytest.mark.slow),
        pytest.param("model_zoo/resnext50", layout(50, groups=32), marks=pytest.mark.slow),
        pytest.param("bag_of_tricks/efficient", layout(50, deep=True), marks=pytest.mark.slow),
        pytest.param("model_zoo/resnet101", layout(101), marks=pytest.mark.nightly),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bare_weights_in_the_layout_of_torchvision_start_the_recipes_of_its_networks(
    recipe: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    started(recipe, filled(shapes), tmp_path)


def test_the_network_without_norms_gives_the_logits_of_their_checkpoint(tmp_path: Path) -> None:
    """Against their forward pass, written out: convolution and ReLU where a norm would stand between."""
    state = filled(layout(18, norms=False))
    network = started("powergrad/resnet18_wobn_cosine", training_file(state), tmp_path).double()
    state = {name: tensor.double() for name, tensor in state.items()}
    input = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    x = F.max_pool2d(F.conv2d(input, state["conv1.weight"], stride=2, padding=3).relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1).relu()
            inner = F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1)
            if (weight := state.get(f"{name}.downsample.0.weight")) is not None:
                x = F.conv2d(x, weight, stride=stride)
            x = (inner + x).relu()
    expected = F.linear(x.mean(dim=(2, 3)), state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        assert torch.allclose(network(input), expected, rtol=1e-9, atol=1e-12)
    assert expected.std() > 1e-3


def test_the_network_without_norms_starts_by_hes_rule_over_what_goes_out() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", ["recipe=powergrad/resnet18_wobn_cosine"]))
    resolve_network(config)
    network = build_model(config).model
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    for convolution in convolutions:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert convolution.bias is None
