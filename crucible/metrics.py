"""The metrics of a run, in one table: names, which way is better, and what computes them.

States live on the device, are bounded, and add up exactly over ranks. torchmetrics takes seconds to import, so
that only what builds a metric imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from crucible.corrections import Correction
from crucible.options import ConfigError, suggest

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric, MetricCollection

AUROC_THRESHOLDS = 200


def _multiclass(name: str, **arguments: Any) -> Callable[[int], Metric]:
    """Takes probabilities (N, K) and targets (N,)."""

    def build(num_classes: int) -> Metric:
        import torchmetrics.classification as tm

        metric: Metric = getattr(tm, f"Multiclass{name}")(
            num_classes=num_classes, validate_args=False, **arguments
        )
        return metric

    return build


def _calibration_error(num_classes: int) -> Metric:
    from crucible.calibration import CalibrationError

    return CalibrationError()


def _regression(name: str) -> Callable[[int], Metric]:
    """Takes predictions (N,) and targets (N,)."""

    def build(num_classes: int) -> Metric:
        import torchmetrics.regression as tm

        metric: Metric = getattr(tm, name)()
        return metric

    return build


@dataclass(frozen=True)
class MetricRow:
    """A metric that Crucible knows.

    Attributes:
        name: as the option `metrics` takes it.
        logged: as it is logged, behind the split and a slash.
        task: that it has a meaning for; None: logged in every run, without being asked for.
        higher_is_better: else lower is.
        fraction: within [0, 1], and shown in percent.
        build: makes it, given the number of classes.
    """

    name: str
    logged: str
    task: Literal["classification", "regression"] | None
    higher_is_better: bool
    fraction: bool
    build: Callable[[int], Metric] | None


METRICS = (
    # name, logged, task, higher is better, fraction, build
    MetricRow("acc", "acc", "classification", True, True, _multiclass("Accuracy", average="micro")),
    MetricRow("top5", "acc_top5", "classification", True, True, _multiclass("Accuracy", average="micro", top_k=5)),
    MetricRow("f1", "f1", "classification", True, True, _multiclass("F1Score", average="macro")),
    MetricRow("f1_per_class", "f1_per_class", "classification", True, True, _multiclass("F1Score", average="none")),
    MetricRow("precision", "precision", "classification", True, True, _multiclass("Precision", average="macro")),
    MetricRow("recall", "recall", "classification", True, True, _multiclass("Recall", average="macro")),
    MetricRow(
        "auroc", "auroc", "classification", True, True,
        _multiclass("AUROC", average="macro", thresholds=AUROC_THRESHOLDS),
    ),
    MetricRow("ece", "ece", "classification", False, True, _calibration_error),
    MetricRow("mse", "mse", "regression", False, False, _regression("MeanSquaredError")),
    MetricRow("mae", "mae", "regression", False, False, _regression("MeanAbsoluteError")),
    MetricRow("r2", "r2", "regression", True, False, _regression("R2Score")),
    MetricRow("loss", "loss", None, False, False, None),
)  # fmt: skip
CORRECTIONS: tuple[Correction, ...] = ()
_BY_NAME = {row.name: row for row in METRICS}
_BY_LOGGED_NAME = {row.logged: row for row in METRICS}


def base_name(logged: str) -> str:
    """A logged name without split and class: `f1_per_class` of `val_raw/f1_per_class/cat`."""
    return logged.split("/")[1] if "/" in logged else logged


def find_metric(logged: str) -> MetricRow | None:
    """The row of what is logged as `logged`, such as `val/acc`; None for a value that is not in the table."""
    return _BY_LOGGED_NAME.get(base_name(logged))


def higher_is_better(logged: str, mode: Literal["min", "max"] | None = None) -> bool:
    """Which way the value logged as `logged` is better.

    Args:
        logged: such as `val/acc`.
        mode: settles it; None: by the table, where it knows the metric, else higher is better.
    """
    if mode is not None:
        return mode == "max"
    row = find_metric(logged)
    return row is None or row.higher_is_better


def check_metrics(names: Sequence[str], task: str, num_classes: int) -> None:
    """Refuse a metric that does not exist or has no meaning for the task.

    Raises:
        ConfigError: naming `metrics`.
    """
    known = [row.name for row in METRICS if row.task == task]
    for name in names:
        if name not in known:
            raise ConfigError(f"metrics: {name!r} is not a metric for {task}{suggest(name, known)}")
    if "top5" in names and num_classes <= 5:
        raise ConfigError(
            f"metrics: top5 is always 1 with data.num_classes={num_classes}; it needs at least 6 classes"
        )


def build_metrics(names: Sequence[str], task: str, num_classes: int) -> MetricCollection:
    """The metrics `names`, keyed as they are logged (`top5` is logged as `acc_top5`).

    Classification metrics take probabilities (N, K) and targets (N,); f1, precision, recall and AUROC are
    means over classes. AUROC is binned (200 thresholds), so its memory does not grow with the data.
    Regression metrics take predictions (N,) and targets (N,).
    """
    from torchmetrics import MetricCollection

    check_metrics(names, task, num_classes)
    rows = [_BY_NAME[name] for name in names]
    return MetricCollection({row.logged: row.build(num_classes) for row in rows if row.build is not None})


def scalars(values: dict[str, Tensor], class_names: Sequence[str] = ()) -> dict[str, Tensor]:
    """One scalar a name: `f1_per_class` (K,) becomes `f1_per_class/<class>`."""
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.ndim == 0:
            flat[name] = value
        else:
            labels = class_names if len(class_names) == len(value) else [str(i) for i in range(len(value))]
            flat.update({f"{name}/{label}": v for label, v in zip(labels, value, strict=True)})
    return flat


def headline(final: Mapping[str, float]) -> str:
    """The two of a run's final values that a reader wants first."""
    wanted = [name for name in ("test/acc", "test/mae", "val/acc", "val/loss") if name in final]
    return ", ".join(f"{name} {final[name]:.4f}" for name in wanted[:2])
