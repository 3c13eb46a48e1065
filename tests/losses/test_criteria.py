"""Building the criterion from its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stages import assembled

from crucible.options import ConfigError
from losses import RegressionLoss, build_criterion, evaluation_criterion

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])


def test_the_default_is_cross_entropy():
    assert torch.equal(build_criterion()(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET))


def test_options_reach_the_criterion_by_name_and_as_techniques():
    named = build_criterion(powergrad_alpha=0.3, label_smoothing=0.1)
    given = assembled(powergrad_alpha=0.3, label_smoothing=0.1).criterion
    for criterion in (named, given):
        assert (criterion.alpha, criterion.label_smoothing) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"powergrad_alpha": 3.0}, r"model.powergrad_alpha must be in \(0, 1\], got 3.0"),
        ({"powergrad_alpha": 0}, r"model.powergrad_alpha must be in \(0, 1\], got 0"),
        ({"label_smoothing": 1.0}, r"model.label_smoothing must be in \[0, 1\), got 1.0"),
        ({"loss": "mse"}, "model.loss must be cross_entropy with data.task=classification, got 'mse'"),
        ({"loss": "hinge"}, "model.loss must be .*cross_entropy, mse, mae.* got 'hinge'"),
        ({"label_smothing": 0.1}, "model.label_smothing=0.1: .*did you mean label_smoothing?"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        build_criterion(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"powergrad_alpha": 0.3}, "model.powergrad_alpha must be 1 with data.task=regression, got 0.3"),
        ({"label_smoothing": 0.1}, "model.label_smoothing must be 0 with data.task=regression, got 0.1"),
        ({"loss": "cross_entropy"}, "model.loss must be mse or mae with data.task=regression"),
    ],
)
def test_class_options_are_refused_for_regression(values, message):
    with pytest.raises(ConfigError, match=message):
        build_criterion(task="regression", **values)


@pytest.mark.parametrize(("loss", "expected"), [(None, 5.25), ("mse", 5.25), ("mae", 1.75)])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_minimises_the_squared_or_absolute_error(loss, expected, shape):
    prediction = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(shape)
    target = torch.tensor([2.0, 0.0, 3.0, 8.0])
    assert build_criterion(loss=loss, task="regression")(prediction, target) == expected


@pytest.mark.parametrize(
    ("prediction", "target"), [((4, 1), (4, 1)), ((4,), (4, 1)), ((4, 2), (4,)), ((4,), (1,)), ((1,), (4,))]
)
def test_regression_never_broadcasts(prediction, target):
    with pytest.raises(ValueError, match="regression needs predictions"):
        RegressionLoss()(torch.zeros(prediction), torch.zeros(target))


def test_regression_in_half_precision_is_computed_in_float32():
    prediction = torch.tensor([300.0, -300.0], dtype=torch.float16)  # the square overflows float16
    loss = RegressionLoss()(prediction, torch.zeros(2))
    assert loss.dtype == torch.float32
    assert loss == 90000.0


def test_evaluation_is_plain_whatever_the_training_loss():
    assert torch.equal(evaluation_criterion()(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET))
    prediction, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    assert evaluation_criterion("regression")(prediction, target) == 5.0
    assert evaluation_criterion("regression", "mae")(prediction, target) == 2.0
