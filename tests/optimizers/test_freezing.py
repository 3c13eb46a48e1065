"""Fine-tuning of a part: what is frozen keeps its weights and statistics, until an epoch or for good."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from technique_runs import QUICK, built, composed
from torch import Tensor, nn

from crucible.options import ConfigError
from models.base_model import BaseModel
from models.dynamic_resnet import ResNet18
from optimizers.freezing import Frozen

pytestmark = pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start of training")
EPOCHS = ("trainer.max_steps=-1", "trainer.max_epochs=2")


class States(Callback):
    """The network's state before the training and after each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def _take(self, module: Any) -> None:
        self.seen.append({name: t.clone() for name, t in module.model.state_dict().items()})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._take(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._take(pl_module)


def trained(
    folder: Path, *techniques: str, compiled: bool = False, strategy: str = "auto", **options: Any
) -> tuple[BaseModel, list[dict[str, Tensor]]]:
    config = composed(
        *techniques, options=(*QUICK, *EPOCHS, "model.weight_decay=0.1", f"trainer.strategy={strategy}")
    )
    config["model"].update(options)
    model, data, trainer = built(config, folder)
    if compiled:
        model.model.compile(backend="aot_eager", fullgraph=True)
    states = States()
    trainer.callbacks.append(states)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=data)
    return model, states.seen


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("what", "learns"),
    [
        ("backbone", {"fc"}),
        (1, {"layer1", "layer2", "fc"}),
        ("layer1", {"conv1", "bn1", "layer2", "fc"}),
        (["conv1", "bn?", "layer*"], {"fc"}),
    ],
)
def test_what_is_frozen_keeps_weights_and_statistics(what: Any, learns: set[str], tmp_path: Path) -> None:
    model, (before, *_, after) = trained(tmp_path, freeze=what)
    assert parts(moved(before, after)) == learns
    in_optimizer = {p for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("technique", ["sam", "ema", "swa", "online_norm", "ghost_norm"])
@pytest.mark.slow
def test_other_techniques_leave_what_is_frozen(technique: str, tmp_path: Path) -> None:
    model, (before, *_, after) = trained(tmp_path, technique, freeze="backbone")
    assert parts(moved(before, after)) == {"fc"}
    for weights in model.step.weights:
        with weights.applied():
            assert parts(moved(before, model.model.state_dict())) == {"fc"}


def test_a_part_is_frozen_until_its_epoch_and_learns_from_then_on(tmp_path: Path) -> None:
    _, kept = trained(tmp_path, freeze="backbone")
    model, (before, after_one, after_two) = trained(tmp_path, freeze="backbone", unfreeze_at=1)
    assert all(torch.equal(after_one[name], kept[1][name]) for name in before)
    assert parts(moved(after_one, after_two)) == {"conv1", "bn1", "layer1", "layer2", "fc"}
    norms = [m for m in model.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.training for norm in norms)
    assert all(int(norm.num_batches_tracked) == 4 for norm in norms)  # of the second epoch


def test_the_gradients_of_what_learns_later_are_centralised_too(tmp_path: Path) -> None:
    """Then SGD leaves the mean of an output's weights alone, where nothing decays."""
    options = {"freeze": "backbone", "unfreeze_at": 1, "weight_decay": 0.0, "optimizer": "SGD", "lr": 0.1}
    _, (_, before, after) = trained(tmp_path, "gradient_centralization", **options)
    name = "layer1.0.conv1.weight"
    assert not torch.equal(before[name], after[name])
    torch.testing.assert_close(before[name].mean((1, 2, 3)), after[name].mean((1, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("technique", [(), ("sam",)])
def test_dropped_gradients_give_the_numbers_of_none(
    technique: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several processes do is what one does."""
    _, expected = trained(tmp_path, *technique, freeze="layer1", unfreeze_at=1)
    watch = Frozen.watch

    def as_one_of_several(self: Frozen, module: Any, optimizer: Any) -> None:
        watch(self, module, optimizer)
        self._drops = True
        self._learns(True)

    monkeypatch.setattr(Frozen, "watch", as_one_of_several)
    _, found = trained(tmp_path, *technique, freeze="layer1", unfreeze_at=1)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_ddp_of_one_process_lets_go_as_a_process_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"freeze": "layer1", "unfreeze_at": 1}
    _, expected = trained(tmp_path, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "NODE_RANK": 0,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    try:
        _, found = trained(tmp_path, strategy="ddp", **options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.nightly
def test_a_compiled_network_learns_from_its_epoch_too(tmp_path: Path) -> None:
    _, (before, after_one, after_two) = trained(tmp_path, compiled=True, freeze="backbone", unfreeze_at=1)
    assert parts(moved(before, after_one)) == {"fc"}
    _, expected = trained(tmp_path, freeze="backbone", unfreeze_at=1)
    assert "layer1" in parts(moved(after_one, after_two))
    assert all(torch.allclose(after_two[name], expected[2][name], atol=1e-4) for name in before)


def train_on_two(out: str) -> None:
    """What each of the two processes does."""
    config = composed(
        "freeze", "ema", options=(*QUICK, *EPOCHS, "trainer.devices=2", "data.module.batch_size=8")
    )
    config["model"]["unfreeze_at"] = 1
    model, data, trainer = built(config, Path(out))
    states = States()
    trainer.callbacks.append(states)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=data)
    before, after_one, after_two = states.seen
    sums = {name: float(p.detach().double().sum()) for name, p in model.model.named_parameters()}
    found = [
        trainer.world_size,
        sorted(parts(moved(before, after_one))),
        sorted(parts(moved(after_one, after_two))),
        sums,
    ]
    (Path(out) / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_let_go_at_the_same_epoch_and_stay_equal(on_two_processes: Any, tmp_path: Path) -> None:
    on_two_processes(train_on_two, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == 2 and first[1] == ["fc"] and first[2] == ["bn1", "conv1", "fc", "layer1", "layer2"]


def test_the_heads_rate_is_its_own(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, head_lr_scale=10.0, undecay_norm=True)
    rates = {p: g["lr"] for g in model.trainer.optimizers[0].param_groups for p in g["params"]}
    head = set(model.model.fc.parameters())  # type: ignore[operator, union-attr]
    assert all(rate == pytest.approx(0.008 if p in head else 0.0008) for p, rate in rates.items())
    assert head < rates.keys() and len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"freeze": "layer9"},
            "model.freeze=layer9: no parameter of the network is named so; its parts are conv1",
        ),
        ({"freeze": "*"}, r"model.freeze=\*: is all of the network"),
        ({"freeze": []}, r"model.freeze=\[\]: names nothing"),
        ({"freeze": "backbone", "layer_decay": 0.5}, "model.freeze=backbone: only the head learns"),
        ({"unfreeze_at": 3}, "model.unfreeze_at=3 needs model.freeze"),
    ],
)
def test_what_cannot_be_frozen_is_said_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ResNet18(**options).convert()
