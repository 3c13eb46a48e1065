"""Metrics against scikit-learn and against formulas, over uneven batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from crucible.metrics import build_metrics, scalars
from crucible.options import ConfigError

SIZES = [7, 16, 1, 30, 149]


@pytest.fixture
def scores() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(8, (sum(SIZES),), generator=generator)
    logits = torch.randn(len(target), 8, generator=generator)
    logits[torch.arange(len(target)), target] += 1.0
    return logits.softmax(1), target


def evaluate(
    names: list[str], task: str, scores: torch.Tensor, target: torch.Tensor, classes: int = 8
) -> dict[str, float]:
    collection = build_metrics(names, task, classes)
    for s, t in zip(scores.split(SIZES), target.split(SIZES), strict=True):
        collection.update(s, t)
    return {k: float(v) for k, v in scalars(collection.compute()).items()}


def test_classification_metrics_equal_scikit_learn(scores) -> None:
    p, t = scores
    got = evaluate(
        ["acc", "top5", "f1", "f1_per_class", "precision", "recall", "auroc"], "classification", p, t
    )
    predicted = p.argmax(1)
    assert got["acc"] == pytest.approx(sk.accuracy_score(t, predicted))
    assert got["acc_top5"] == pytest.approx(sk.top_k_accuracy_score(t, p, k=5))
    assert got["f1"] == pytest.approx(sk.f1_score(t, predicted, average="macro"))
    assert got["precision"] == pytest.approx(sk.precision_score(t, predicted, average="macro"))
    assert got["recall"] == pytest.approx(sk.recall_score(t, predicted, average="macro"))
    assert got["auroc"] == pytest.approx(
        sk.roc_auc_score(t, p, multi_class="ovr", average="macro"), abs=0.005
    )
    each = sk.f1_score(t, predicted, average=None)
    assert [got[f"f1_per_class/{k}"] for k in range(8)] == pytest.approx(list(each))


def test_calibration_error_equals_its_definition(scores) -> None:
    p, t = scores
    confidence, predicted = p.max(1)
    bins = np.minimum((confidence.numpy() * 15).astype(int), 14)
    expected = sum(
        abs(confidence.numpy()[bins == b].mean() - (predicted == t).numpy()[bins == b].mean())
        * (bins == b).mean()
        for b in np.unique(bins)
    )
    assert evaluate(["ece"], "classification", p, t)["ece"] == pytest.approx(expected, abs=1e-6)


def test_regression_metrics_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(sum(SIZES), generator=generator) * 3
    predicted = target + torch.randn(len(target), generator=generator)
    got = evaluate(["mse", "mae", "r2"], "regression", predicted, target)
    assert got["mse"] == pytest.approx(sk.mean_squared_error(target, predicted), rel=1e-5)
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(target, predicted), rel=1e-5)
    assert got["r2"] == pytest.approx(sk.r2_score(target, predicted), rel=1e-4)


def test_memory_does_not_grow_with_the_data(scores) -> None:
    p, t = scores
    collection = build_metrics(
        ["acc", "top5", "f1", "precision", "recall", "auroc", "ece"], "classification", 8
    )
    collection.update(p, t)

    def numbers() -> int:
        return sum(state.numel() for metric in collection.values() for state in metric.metric_state.values())

    before = numbers()
    for _ in range(5):
        collection.update(p, t)
    assert numbers() == before


def test_a_metric_without_meaning_is_refused() -> None:
    with pytest.raises(ConfigError, match="r2"):
        build_metrics(["r2"], "classification", 8)
    with pytest.raises(ConfigError, match=r"top5.*num_classes=3"):
        build_metrics(["top5"], "classification", 3)
