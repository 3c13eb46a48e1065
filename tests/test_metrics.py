"""Metrics against scikit-learn and against formulas, over uneven batches."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn import metrics as sk

from crucible import measures
from crucible.metrics import METRICS, build_metrics, find_metric, higher_is_better, scalars
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
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(t, p, multi_class="ovr", average="macro"))
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


def test_memory_does_not_grow_with_the_data(scores, monkeypatch) -> None:
    p, t = scores
    monkeypatch.setattr(measures, "EXACT_SCORES", 3 * p.numel())
    collection = build_metrics(
        ["acc", "top5", "f1", "precision", "recall", "auroc", "ece"], "classification", 8
    )

    def numbers() -> int:
        states = [state for metric in collection.values() for state in metric.metric_state.values()]
        return sum(s.numel() for state in states for s in (state if isinstance(state, list) else [state]))

    most = []
    for _ in range(3):
        most.append(0)
        for _ in range(8):
            collection.update(p, t)
            most[-1] = max(most[-1], numbers())
    assert most[0] == most[1] == most[2]


def test_a_metric_without_meaning_is_refused() -> None:
    with pytest.raises(ConfigError, match="r2"):
        build_metrics(["r2"], "classification", 8)
    with pytest.raises(ConfigError, match=r"top5.*num_classes=3"):
        build_metrics(["top5"], "classification", 3)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_each_row_of_the_table_can_be_built_and_is_logged_as_it_says(task: str) -> None:
    rows = [row for row in METRICS if row.task == task]
    collection = build_metrics([row.name for row in rows], task, 8)
    assert set(collection) == {row.logged for row in rows}


def test_what_torchmetrics_knows_of_a_metric_agrees_with_the_table() -> None:
    for row in METRICS:
        if row.build is None:
            continue
        metric = row.build(8)
        if metric.higher_is_better is not None:
            assert metric.higher_is_better == row.higher_is_better, row.name
        if row.fraction and metric.plot_upper_bound is not None:
            assert (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0), row.name


@pytest.mark.parametrize(
    ("logged", "mode", "higher"),
    [
        ("val/acc", None, True),
        ("val/loss", None, False),
        ("val_raw/ece", None, False),
        ("val/f1_per_class/cat", None, True),
        ("val_raw/f1_per_class/loss", None, True),  # of a class that is called so
        ("val/my_error", None, True),
        ("val/my_error", "min", False),
        ("val/loss", "max", True),
    ],
)
def test_which_way_is_better_is_a_matter_of_the_metric_or_of_the_mode(logged, mode, higher) -> None:
    assert higher_is_better(logged, mode) == higher


def test_a_value_of_ones_own_is_in_no_table() -> None:
    assert find_metric("val/my_error") is None


def test_the_table_costs_no_import_of_torch() -> None:
    code = "import sys; import reporting.request; print({'torch', 'torchmetrics'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
