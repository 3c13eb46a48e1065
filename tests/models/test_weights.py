"""Weights from files: every kind that is understood, what is reported, what is refused."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crucible.options import ConfigError
from models.weights import load_weights


class Net(nn.Module):
    """A convolution, a norm and a head, and a place that only some networks have."""

    def __init__(self, outputs: int = 5, width: int = 4, gate: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        if gate:
            self.gate = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean(dim=(2, 3)))


def random_state(**options: Any) -> dict[str, Tensor]:
    return {
        k: torch.randn_like(v) if v.is_floating_point() else v for k, v in Net(**options).state_dict().items()
    }


def save(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


def assert_has(network: nn.Module, state: dict[str, Tensor]) -> None:
    own = network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_bare_state_dict(tmp_path: Path, prefix: str) -> None:
    network, state = Net(), random_state()
    report = load_weights(network, save(prefixed(state, prefix), tmp_path / "w.pth"))
    assert_has(network, state)
    assert report.endswith("9 of 9 tensors loaded")


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "model.module.", "module.model."])
def test_lightning_checkpoint_without_what_is_not_the_network(tmp_path: Path, prefix: str) -> None:
    network, state = Net(), random_state()
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": prefixed(state, prefix) | {"val_metrics.acc.tp": torch.zeros(5)},
        "optimizer_states": [{"state": {}}],
        "hyper_parameters": {"lr": 0.1},
    }
    report = load_weights(network, str(save(content, tmp_path / "best.ckpt")))
    assert_has(network, state)
    assert len(report.splitlines()) == 1


def test_a_network_with_a_part_named_model_or_module_is_not_stripped(tmp_path: Path) -> None:
    state = random_state()
    for name in ("model", "module"):
        network = nn.ModuleDict({name: Net()})
        load_weights(network, save(prefixed(state, f"{name}."), tmp_path / "w.pth"))
        assert_has(network[name], state)


def test_timm_training_file_with_its_namespace_gives_the_averaged_weights(tmp_path: Path) -> None:
    network, state, averaged = Net(), random_state(), random_state()
    content = {
        "epoch": 3,
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1, mean=(0.5, 0.5)),
        "state_dict": prefixed(state, "module."),
        "state_dict_ema": averaged,
    }
    report = load_weights(network, save(content, tmp_path / "checkpoint.pth.tar"))
    assert_has(network, averaged)
    assert "(state_dict_ema)" in report
    del content["state_dict_ema"]
    report = load_weights(network, save(content, tmp_path / "checkpoint.pth.tar"))
    assert_has(network, state)
    assert "(state_dict)" in report


def test_torchvision_reference_file(tmp_path: Path) -> None:
    network, state = Net(), random_state()
    content = {"model": state, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(lr=0.1)}
    load_weights(network, save(content, tmp_path / "model_1.pth"))
    assert_has(network, state)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network, state = Net(), random_state()
    safetensors.save_file(state, tmp_path / "model.safetensors")
    load_weights(network, tmp_path / "model.safetensors")
    assert_has(network, state)


def test_half_precision_files_become_the_networks_precision(tmp_path: Path) -> None:
    network, state = Net(), random_state()
    load_weights(network, save({k: v.half() for k, v in state.items()}, tmp_path / "w.pth"))
    assert network.conv.weight.dtype == torch.float32
    assert torch.equal(network.conv.weight, state["conv.weight"].half().float())


def test_a_head_of_another_size_keeps_its_initial_values_and_is_reported(tmp_path: Path) -> None:
    network, state = Net(outputs=5), random_state(outputs=7)
    before = {k: v.clone() for k, v in network.fc.state_dict().items()}
    report = load_weights(network, save(state, tmp_path / "w.pth"))
    assert_has(network.fc, before)
    assert_has(network, {k: v for k, v in state.items() if not k.startswith("fc.")})
    assert "7 of 9 tensors loaded" in report
    assert "fc.weight 7x4 in the file, 5x4 here" in report


def test_keys_on_one_side_only_are_reported(tmp_path: Path) -> None:
    with_gate = load_weights(Net(), save(random_state(gate=True), tmp_path / "w.pth"))
    assert "in the file only, not used: gate.weight, gate.bias" in with_gate
    without = load_weights(Net(gate=True), save(random_state(), tmp_path / "w.pth"))
    assert "missing in the file, left at their initial values: gate.weight, gate.bias" in without
    assert "9 of 11 tensors loaded" in without


def test_norm_counters_that_old_files_lack_are_no_news(tmp_path: Path) -> None:
    state = random_state()
    del state["bn.num_batches_tracked"]
    assert len(load_weights(Net(), save(state, tmp_path / "w.pth")).splitlines()) == 1


def test_another_shape_elsewhere_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    network = Net(width=4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"model\.init_from=.*conv\.weight is 6x3x3x3 .* 4x3x3x3"):
        load_weights(network, save(random_state(width=6), tmp_path / "w.pth"))
    assert_has(network, before)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"model\.init_from=.*no weight matches"):
        load_weights(Net(), file)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"lr": 0.1}, {}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_from="):
        load_weights(Net(), save(content, tmp_path / "w.pth"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ConfigError, match=r"model\.init_from=.*no such file"):
            load_weights(Net(), path)


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    file = save(random_state(), tmp_path / name)
    content = {"empty": b"", "text": b"<html>not found</html>", "cut": file.read_bytes()[:1500]}[damage]
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.init_from=") as caught:
        load_weights(Net(), file)
    assert "\n" not in str(caught.value)


class Malicious:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_never_runs_code(tmp_path: Path) -> None:
    content = {"state_dict": random_state(), "extra": Malicious(tmp_path / "harm")}
    with pytest.raises(ConfigError, match=r"model\.init_from=.*objects other than weights"):
        load_weights(Net(), save(content, tmp_path / "w.pth"))
    assert not (tmp_path / "harm").exists()
