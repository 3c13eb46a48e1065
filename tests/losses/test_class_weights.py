"""Class weights: the formula, torch's own, PowerGrad's gradient under them, and the counts they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from stages import assembled
from torch import Tensor, nn

from crucible.keyed import visited
from crucible.options import ConfigError
from crucible.technique import Setting
from datasets.base_datamodule import BaseDataModule
from datasets.images import Arrays
from datasets.sampling import EpochSampler
from losses import build_criterion, evaluation_criterion
from losses.powergrad import powergrad_cross_entropy
from losses.weights import balanced_weights
from models.base_model import BaseModel

DRAW = torch.Generator().manual_seed(5)
LOGITS = torch.randn(6, 4, generator=DRAW, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SHARES = torch.rand(6, 4, generator=DRAW, dtype=torch.float64).softmax(dim=1)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)


def gradient(loss: Any, logits: Tensor = LOGITS) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_are_torchs_for_probabilities(smoothing: float) -> None:
    for target in (LABELS, SHARES):
        dense = F.one_hot(target, 4).double() if target.ndim == 1 else target

        def ours(z: Tensor, target: Tensor = target) -> Tensor:
            return powergrad_cross_entropy(z, target, 1.0, smoothing, WEIGHTS)

        def torchs(z: Tensor, dense: Tensor = dense) -> Tensor:
            return F.cross_entropy(z, dense, weight=WEIGHTS, label_smoothing=smoothing)

        assert float(ours(LOGITS)) == pytest.approx(float(torchs(LOGITS)), rel=1e-12)
        torch.testing.assert_close(gradient(ours), gradient(torchs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.3, 0.999999])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_powergrads_gradient_has_the_weighted_target_and_its_value_stays_true(
    alpha: float, smoothing: float
) -> None:
    def loss(z: Tensor) -> Tensor:
        return powergrad_cross_entropy(z, SHARES, alpha, smoothing, WEIGHTS)

    target = (SHARES * (1 - smoothing) + smoothing / 4) * WEIGHTS
    assert float(loss(LOGITS)) == pytest.approx(float(-(target * LOGITS.log_softmax(1)).sum() / 6), rel=1e-12)
    powered = (alpha * LOGITS).softmax(1)
    expected = (target.sum(1, keepdim=True) * powered - target) / 6
    torch.testing.assert_close(gradient(loss), expected, rtol=1e-9, atol=1e-12)


def test_binary_cross_entropy_weighs_the_classes_terms() -> None:
    criterion = build_criterion(binary_cross_entropy=True)
    criterion.weights = WEIGHTS  # type: ignore[assignment]
    expected = F.binary_cross_entropy_with_logits(LOGITS, SHARES, weight=WEIGHTS)
    assert float(criterion(LOGITS, SHARES)) == pytest.approx(float(expected), rel=1e-12)


def test_balanced_weights_make_classes_equal_and_a_sample_count_one_in_the_mean() -> None:
    counts = np.array([10, 30, 0, 60])
    weights = balanced_weights(counts)
    assert weights == pytest.approx([100 / 30, 100 / 90, 1.0, 100 / 180])
    assert (weights * counts)[[0, 1, 3]] == pytest.approx(100 / 3)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)


class Uneven(BaseDataModule):
    """30 samples of class 0, 10 of class 1; every tenth of each is held out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            name="uneven", batch_size=4, input_channels=1, num_classes=2, num_workers=0, **kwargs
        )

    def setup(self, stage: str) -> None:
        labels = np.repeat([0, 1], [30, 10])
        self.train_dataset = Arrays(torch.randn(40, 1, 2, 2), labels, ["a", "b"])


class Small(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=2, input_channels=1, lr=0.1, warmstart=0, **kwargs)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, self.num_outputs))


def fit(model: BaseModel, data: BaseDataModule, epochs: int = 1) -> None:
    data.check()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=epochs,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def test_balanced_are_the_counts_of_the_samples_that_train_and_evaluation_is_plain() -> None:
    model = Small(class_weights="balanced")
    fit(model, Uneven())
    assert model.criterion.weights.tolist() == pytest.approx([36 / (2 * 27), 36 / (2 * 9)])  # type: ignore[union-attr]
    assert model.evaluation_criterion.weights is None
    assert type(model.evaluation_criterion) is type(evaluation_criterion())


def test_numbers_are_taken_as_they_are_and_bad_ones_refused_by_name() -> None:
    model = Small(class_weights=[1.0, 5.0])
    fit(model, Uneven())
    assert model.criterion.weights.tolist() == [1.0, 5.0]  # type: ignore[union-attr]
    for values, setting, said in (
        ([1.0, 5.0, 1.0], Setting(num_classes=2), r"model\.class_weights has 3 numbers, data\.num_classes is 2"),
        ([0.0, 0.0], Setting(num_classes=2), r"model\.class_weights: all are 0"),
        ([-1.0, 1.0], Setting(num_classes=2), r"model\.class_weights must be .*got \[-1\.0, 1\.0\]"),
        ("even", Setting(num_classes=2), r"model\.class_weights must be .*balanced.*got 'even'"),
        ("balanced", Setting("regression"), r"model\.class_weights=balanced has no meaning with data\.task=regression"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            assembled(setting, class_weights=values)


def test_balanced_batches_draw_each_class_as_often_and_its_samples_alike() -> None:
    data = Uneven(balanced_batches=True)
    data.check()
    drawn = np.concatenate([batch.index for epoch in range(60) for batch in data.training_batches(epoch, 9)])
    labels = np.asarray(data.train_dataset.targets)[drawn]
    assert abs(labels.mean() - 0.5) < 0.04  # 2160 draws: 3.7 standard deviations
    counts = np.bincount(drawn, minlength=40)[data.samples("train").indices]
    of_the_rare = counts[-9:] / counts[-9:].mean()
    assert of_the_rare.min() > 0.7 and of_the_rare.max() < 1.3
    assert not np.isin(drawn, data.samples("val").indices).any()


def test_balanced_batches_are_a_function_of_seed_and_epoch_for_any_number_of_ranks() -> None:
    chances = np.arange(1.0, 25.0)

    def batches(world: int, epoch: int) -> list[list[int]]:
        ranks = [
            EpochSampler(24, 12 // world, 3, rank=rank, world_size=world, chances=chances)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.set_epoch(epoch)
        return [[n for _, part in parts for n in part] for parts in zip(*ranks, strict=True)]

    assert batches(1, 2) == batches(2, 2) == batches(3, 2)
    assert batches(1, 2) != batches(1, 3)
    assert all(0 <= number < 24 for batch in batches(1, 2) for number in visited(np.array(batch)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balanced_batches": True, "random_batches": True}, r"data\.module\.random_batches=true: .*already"),
        ({"balanced_batches": True, "task": "regression"}, r"data\.module\.balanced_batches=true needs classes"),
    ],
)  # fmt: skip
def test_balanced_batches_refuse_what_has_no_meaning_beside_them(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Uneven(**options)
