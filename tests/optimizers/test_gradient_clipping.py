"""Gradient clipping: what the optimizer gets is no longer than the bound, whatever comes before it in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel

TECHNIQUE = yaml.safe_load((ROOT / "cli_configs" / "technique" / "gradient_clipping.yaml").read_text())[
    "trainer"
]
BOUND = 0.05  # below every gradient here
TECHNIQUES = [
    {},
    {"sam": True},
    {"gradient_centralization": "all"},
    {"sam": True, "gradient_centralization": "all"},
]


class Tiny(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            num_classes=4, input_channels=1, lr=0.1, momentum=0.0, weight_decay=0.0, warmstart=0, **kwargs
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


class Steps(Callback):
    """The gradients that each step was made with, and what it did to the weights."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.moves: list[float] = []
        self.means: list[float] = []
        self._before = torch.empty(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = vector(pl_module.parameters())

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.norms.append(float(vector(p.grad for p in pl_module.parameters()).norm()))
        self.moves.append(float((vector(pl_module.parameters()) - self._before).norm()))
        self.means.append(float(pl_module.model[-1].weight.grad.mean(1).abs().max()))


def vector(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def steps(options: dict[str, Any], **trainer_options: Any) -> Steps:
    seen = Steps()
    data = SyntheticDataModule(
        name="synthetic", num_samples=80, batch_size=8, num_classes=4, size=8, input_channels=1
    )
    data.check()
    Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[seen], logger=False, enable_checkpointing=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **trainer_options,
    ).fit(Tiny(scheduler=None, **options), datamodule=data)  # fmt: skip
    return seen


@pytest.mark.parametrize("options", TECHNIQUES, ids=str)
def test_the_step_is_made_with_a_gradient_of_the_bounds_length(options: dict[str, Any]) -> None:
    clipped = steps(options, **{**TECHNIQUE, "gradient_clip_val": BOUND})
    assert min(steps(options).norms) > BOUND, "the bound acts on every step"
    # a gradient that was centralised after the clipping would be shorter than the bound
    assert clipped.norms == pytest.approx([BOUND] * len(clipped.norms), rel=1e-4)
    assert clipped.moves == pytest.approx([0.1 * BOUND] * len(clipped.norms), rel=1e-3), (
        "SGD's step is lr times it"
    )
    if "gradient_centralization" in options:
        assert max(clipped.means) < 1e-6


@pytest.mark.parametrize("options", TECHNIQUES, ids=str)
def test_the_bound_is_on_the_unscaled_gradient(options: dict[str, Any]) -> None:
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    clipped = steps(options, plugins=scaled, **{**TECHNIQUE, "gradient_clip_val": BOUND})
    assert clipped.norms == pytest.approx([BOUND] * len(clipped.norms), rel=1e-3)


def test_shorter_gradients_are_left_as_they_are() -> None:
    assert steps({}, **{**TECHNIQUE, "gradient_clip_val": 1e6}).norms == steps({}).norms
    assert max(steps({}, **TECHNIQUE).norms) <= TECHNIQUE["gradient_clip_val"] * (1 + 1e-6)
