"""Lookahead: slow weights that start at the first weights and follow the fast ones every k steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from stages import optimizer_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from crucible.options import ConfigError

NAMES = ["SGD", "Adam", "AdamW", "Rmsprop", "Madgrad", "lion", "lamb", "adafactor"]
A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


class Bowl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))
        self.bias = nn.Parameter(torch.zeros(6))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.weight - A.to(self.weight) + self.bias).square().mean()


def options(**values: Any) -> dict[str, Any]:
    return {"lookahead": True, **values}


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.8), (5, 0.5)])
def test_steps_follow_the_paper_from_the_first_weights_on(name, k, alpha):
    ours, inner = Bowl().double(), Bowl().double()
    built = optimizer_of(
        ours, **options(optimizer=name, lr=0.3, undecay_norm=True, lookahead_k=k, lookahead_alpha=alpha)
    )
    plain = optimizer_of(inner, optimizer=name, lr=0.3, undecay_norm=True)
    slow = [p.detach().clone() for p in inner.parameters()]
    for t in range(1, 12):
        step(ours, built)
        step(inner, plain)  # keeps its momentum when its weights are set back
        if t % k == 0:
            with torch.no_grad():
                for i, p in enumerate(inner.parameters()):
                    slow[i] = slow[i] + alpha * (p - slow[i])
                    p.copy_(slow[i])
        for p, q in zip(ours.parameters(), inner.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("off", [{"lookahead": False}, {"lookahead_alpha": 1.0}])
def test_off_and_alpha_one_are_bitwise_the_plain_optimizer(off):
    ours, other = Bowl(), Bowl()
    built, plain = optimizer_of(ours, **options(**off)), optimizer_of(other)
    for _ in range(11):
        step(ours, built)
        step(other, plain)
    assert torch.equal(ours.weight, other.weight)


def test_off_leaves_neither_hook_nor_state():
    optimizer = optimizer_of(Bowl())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert set(optimizer.state_dict()) == {"state", "param_groups", "optimizer"}


def test_the_first_weights_are_those_of_the_first_step_not_of_the_builder():
    bowl = Bowl()
    optimizer = optimizer_of(bowl, **options(lookahead_k=1, lr=1e-12, weight_decay=0.0))
    with torch.no_grad():
        bowl.weight.fill_(7.0)  # as loaded weights would
    step(bowl, optimizer)
    torch.testing.assert_close(bowl.weight, torch.full((6, 6), 7.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_a_resumed_copy_goes_on_in_lock_step_and_is_independent(name, at, tmp_path):
    bowl = Bowl()
    optimizer = optimizer_of(bowl, **options(optimizer=name))
    for _ in range(at):
        step(bowl, optimizer)
    torch.save((bowl.state_dict(), optimizer.state_dict()), tmp_path / "last.ckpt")
    weights, state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = Bowl()
    resumed = optimizer_of(other, **options(optimizer=name))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(6):
        step(bowl, optimizer)
    for _ in range(6):  # not in turns: what the two share would show
        step(other, resumed)
    for p, q in zip(bowl.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loading_copies_the_slow_weights():
    bowl = Bowl()
    optimizer = optimizer_of(bowl, **options(lookahead_k=1))
    step(bowl, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = optimizer_of(other := Bowl(), **options(lookahead_k=1))
    resumed.load_state_dict(state)
    before = state["lookahead"]["slow"][0].clone()
    step(other, resumed)
    assert torch.equal(state["lookahead"]["slow"][0], before)


def test_a_deep_copy_of_module_and_optimizer_shares_nothing():
    bowl = Bowl()
    optimizer = optimizer_of(bowl, **options(lookahead_k=2))
    step(bowl, optimizer)
    other, theirs = copy.deepcopy((bowl, optimizer))
    for _ in range(3):
        step(other, theirs)
    expected = Bowl()
    alone = optimizer_of(expected, **options(lookahead_k=2))
    for _ in range(4):
        step(expected, alone)
    for _ in range(3):
        step(bowl, optimizer)
    assert torch.equal(bowl.weight, expected.weight)


def test_the_inner_optimizers_state_is_its_own():
    bowl = Bowl()
    optimizer = optimizer_of(bowl, **options())
    for _ in range(6):
        step(bowl, optimizer)
    assert {key for state in optimizer.state.values() for key in state} == {"momentum_buffer"}


def test_a_step_that_the_loss_scaler_skips_does_not_count():
    ours, other = Bowl(), Bowl()
    built, plain = (optimizer_of(m, **options(lookahead_k=2)) for m in (ours, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for t in range(5):
        built.zero_grad()
        scaler.scale(ours()).backward()
        if t in (1, 2):
            ours.weight.grad[0, 0] = float("inf")
        else:
            step(other, plain)
        scaler.step(built)
        scaler.update()
    assert built.state_dict()["lookahead"]["steps"] == 3
    torch.testing.assert_close(ours.weight, other.weight)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.bowl = Bowl()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.bowl() * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self, **options(lookahead_k=3))


def train(steps: int, ckpt_path: Path | None = None) -> tuple[Trainer, Model]:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model := Model(), DataLoader(torch.ones(20, 1)), ckpt_path=ckpt_path)
    return trainer, model


def test_a_training_resumed_between_synchronisations_ends_bitwise_the_same(tmp_path):
    _, whole = train(10)
    first, _ = train(5)
    first.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = train(10, tmp_path / "last.ckpt")
    assert torch.equal(resumed.bowl.weight, whole.bowl.weight)


def test_a_state_without_slow_weights_is_refused():
    state = optimizer_of(Bowl()).state_dict()
    with pytest.raises(ConfigError, match=r"model.lookahead=true: the training state"):
        optimizer_of(Bowl(), **options()).load_state_dict(state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lookahead_k": 0}, r"model.lookahead_k must be in \[1, inf\), got 0"),
        ({"lookahead_alpha": 0.0}, r"model.lookahead_alpha must be in \(0, 1\], got 0.0"),
        ({"lookahead": False, "lookahead_k": 6}, "model.lookahead_k=6 needs model.lookahead=true"),
        ({"lookahead": False, "lookahead_alpha": 0.8}, "model.lookahead_alpha=0.8 needs model.lookahead"),
    ],
)
def test_what_cannot_be_honoured_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_of(Bowl(), **values)
