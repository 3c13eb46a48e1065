"""Binary cross-entropy: the formula, timm's implementation, what a threshold makes of mixed targets."""

from __future__ import annotations

import pytest
import torch
from stages import assembled
from timm.loss import BinaryCrossEntropy as Timms
from torch import Tensor

from crucible.options import ConfigError
from crucible.technique import Setting
from losses import build_criterion

DRAW = torch.Generator().manual_seed(3)
LOGITS = torch.randn(7, 5, generator=DRAW, dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])
WEIGHT = torch.tensor([0.9, 0.75, 0.5, 0.3, 0.85, 0.6, 1.0], dtype=torch.float64)


def mixed() -> Tensor:
    one_hot = torch.eye(5, dtype=torch.float64)
    return one_hot[LABELS] * WEIGHT[:, None] + one_hot[(LABELS + 1) % 5] * (1 - WEIGHT[:, None])


def by_the_formula(logits: Tensor, target: Tensor) -> Tensor:
    p = 1 / (1 + (-logits).exp())
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def test_it_is_the_mean_over_samples_and_classes_of_what_the_formula_says() -> None:
    criterion = build_criterion(binary_cross_entropy=True)
    one_hot = torch.eye(5, dtype=torch.float64)[LABELS]
    assert float(criterion(LOGITS, LABELS)) == pytest.approx(
        float(by_the_formula(LOGITS, one_hot)), rel=1e-12
    )
    assert float(criterion(LOGITS, mixed())) == pytest.approx(
        float(by_the_formula(LOGITS, mixed())), rel=1e-12
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_timms_on_labels_and_on_mixed_targets(smoothing: float) -> None:
    criterion, timms = build_criterion(binary_cross_entropy=True, label_smoothing=smoothing), Timms(smoothing)
    assert float(criterion(LOGITS, LABELS)) == pytest.approx(float(timms(LOGITS, LABELS)), rel=1e-12)
    smoothed = mixed() * (1 - smoothing) + smoothing / 5  # as timm's Mixup makes them
    assert float(criterion(LOGITS, mixed())) == pytest.approx(float(timms(LOGITS, smoothed)), rel=1e-12)


def test_above_the_threshold_a_mixed_class_is_there_whole_as_in_timm() -> None:
    criterion, timms = (
        build_criterion(binary_cross_entropy=True, bce_threshold=0.2),
        Timms(0.0, target_threshold=0.2),
    )
    assert float(criterion(LOGITS, mixed())) == pytest.approx(float(timms(LOGITS, mixed())), rel=1e-12)
    assert float(criterion(LOGITS, mixed())) != pytest.approx(
        float(by_the_formula(LOGITS, mixed())), rel=1e-3
    )


def test_smoothing_comes_after_the_threshold_so_that_it_is_not_cut_off() -> None:
    criterion = build_criterion(binary_cross_entropy=True, bce_threshold=0.2, label_smoothing=0.1)
    target = (mixed() > 0.2).double() * 0.9 + 0.1 / 5
    assert float(criterion(LOGITS, mixed())) == pytest.approx(
        float(by_the_formula(LOGITS, target)), rel=1e-12
    )


def test_half_precision_is_computed_in_float32() -> None:
    criterion = build_criterion(binary_cross_entropy=True)
    loss = criterion(LOGITS.bfloat16(), mixed().float())
    assert loss.dtype == torch.float32
    assert loss == criterion(LOGITS.bfloat16().float(), mixed().float())


def test_it_compiles_into_one_graph() -> None:
    criterion = build_criterion(binary_cross_entropy=True, bce_threshold=0.2, label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    assert compiled(LOGITS, mixed()) == criterion(LOGITS, mixed())


def test_validation_stays_cross_entropy_and_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.binary_cross_entropy=true: PowerGrad acts on the softmax"):
        assembled(binary_cross_entropy=True, powergrad_alpha=0.3)
    with pytest.raises(ConfigError, match=r"model\.bce_threshold=0.2 needs model\.binary_cross_entropy=true"):
        assembled(bce_threshold=0.2)
    with pytest.raises(
        ConfigError, match=r"model\.binary_cross_entropy=true has no meaning with data\.task=regression"
    ):
        assembled(Setting("regression"), binary_cross_entropy=True)
