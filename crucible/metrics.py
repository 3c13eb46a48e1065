"""The metrics of a run, in one table: names, which way is better, and what computes them.

States live on the device, are bounded, and add up exactly over ranks (`crucible.measures`). torchmetrics takes
seconds to import, so that only what builds a metric imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from crucible.configuration import select
from crucible.corrections import HALF_PRECISION, Correction
from crucible.options import ConfigError, suggest
from crucible.other_words import metric_here

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import MetricCollection

    from crucible.measures import Measure

NAMED = 8  # classes that a remark names


def _measure(name: str, *, of_classes: bool = False, **arguments: Any) -> Callable[[int], Measure]:
    """Builds a class of `crucible.measures`."""

    def build(num_classes: int) -> Measure:
        from crucible import measures

        measure: Measure = getattr(measures, name)(*((num_classes,) if of_classes else ()), **arguments)
        return measure

    return build


@dataclass(frozen=True)
class MetricRow:
    """A metric that Crucible knows.

    Attributes:
        name: as the option `metrics` takes it.
        logged: as it is logged, behind the split and a slash.
        task: that it has a meaning for; None: not asked for by name: the loss of every run, means over corruptions.
        higher_is_better: else lower is.
        fraction: within [0, 1], and shown in percent.
        build: makes it, given the number of classes.
    """

    name: str
    logged: str
    task: Literal["classification", "regression"] | None
    higher_is_better: bool
    fraction: bool
    build: Callable[[int], Measure] | None


METRICS = (
    # name, logged, task, higher is better, fraction, build
    MetricRow("acc", "acc", "classification", True, True, _measure("Accuracy")),
    MetricRow("top5", "acc_top5", "classification", True, True, _measure("Accuracy", top_k=5)),
    MetricRow("f1", "f1", "classification", True, True, _measure("ClassScore", of_classes=True, score="f1")),
    MetricRow(
        "f1_per_class", "f1_per_class", "classification", True, True,
        _measure("ClassScore", of_classes=True, score="f1", mean=False),
    ),
    MetricRow(
        "precision", "precision", "classification", True, True,
        _measure("ClassScore", of_classes=True, score="precision"),
    ),
    MetricRow(
        "recall", "recall", "classification", True, True,
        _measure("ClassScore", of_classes=True, score="recall"),
    ),
    MetricRow("auroc", "auroc", "classification", True, True, _measure("Auroc", of_classes=True)),
    MetricRow("ece", "ece", "classification", False, True, _measure("CalibrationError")),
    MetricRow("mse", "mse", "regression", False, False, _measure("MeanError", squared=True)),
    MetricRow("mae", "mae", "regression", False, False, _measure("MeanError", squared=False)),
    MetricRow("r2", "r2", "regression", True, False, _measure("R2")),
    MetricRow("loss", "loss", None, False, False, None),
    # of a test under corruptions (crucible.robustness)
    MetricRow("acc_corrupted", "acc_corrupted", None, True, True, None),
    MetricRow("ece_corrupted", "ece_corrupted", None, False, True, None),
    MetricRow("mce", "mce", None, False, True, None),
)  # fmt: skip


def _corrected(config: Mapping[str, Any]) -> bool:
    names = set(config["metrics"])
    merged = "top5" in names and names & {"f1", "f1_per_class", "precision", "recall"}
    rounded = select(config, "trainer.precision") in HALF_PRECISION and names & {"ece", "mse", "mae"}
    return bool(merged or rounded or names & {"auroc", "r2"})


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        "metrics", 2, _corrected,
        "merged by the first batch (top5 with f1, precision, recall), rounded to the weights' dtype, auroc in 200"
        " uniform bins with classes absent as 0, r2 from a difference of float32 sums",
    ),
)  # fmt: skip
_BY_NAME = {row.name: row for row in METRICS}
_BY_LOGGED_NAME = {row.logged: row for row in METRICS}


def base_name(logged: str) -> str:
    """A logged name without split and class: `f1_per_class` of `val_raw/f1_per_class/cat`."""
    return logged.split("/")[1] if "/" in logged else logged


def of_split(logged: str, *splits: str) -> bool:
    """Whether a logged name is of one of the splits: `val` has `val/acc`, `val_raw/acc`, and a group's `val_in/acc`."""
    return logged.partition("/")[0].partition("_")[0] in splits and "/" in logged


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
            here = metric_here(name)
            way = suggest(name, known) if here is None else f"; here it is {here}"
            raise ConfigError(f"metrics: {name!r} is not a metric for {task}{way}")
    if "top5" in names and num_classes <= 5:
        raise ConfigError(
            f"metrics: top5 is always 1 with data.num_classes={num_classes}; it needs at least 6 classes"
        )


def build_metrics(names: Sequence[str], task: str, num_classes: int) -> MetricCollection:
    """The metrics `names`, keyed as they are logged (`top5` is logged as `acc_top5`).

    Classification metrics take probabilities (N, K) and targets (N,), and may be handed `logits` (N, K) by name,
    whose order AUROC keeps where the probabilities are 0 and 1; f1, precision, recall and AUROC are means over
    classes. Regression metrics take predictions (N,) and targets (N,). No metric knows of the others.
    """
    from torchmetrics import MetricCollection

    check_metrics(names, task, num_classes)
    rows = [_BY_NAME[name] for name in names]
    built = {row.logged: row.build(num_classes) for row in rows if row.build is not None}
    # torchmetrics would merge those whose states coincide after the first batch
    return MetricCollection(dict(built), compute_groups=False)


def remarks(metrics: MetricCollection, class_names: Sequence[str] = ()) -> list[str]:
    """What a reader of the values must know, a line each; after `compute`. Waits for the device."""
    lines: list[str] = []
    left_out: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        mask = getattr(metric, "left_out", None)
        out = [] if mask is None else mask.tolist()
        if missing := [i for i, undefined in enumerate(out) if undefined]:
            known = len(class_names) == len(out)
            labels = [class_names[i] if known else str(i) for i in missing]
            shown = ", ".join(labels[:NAMED]) + (f" and {len(labels) - NAMED} more" if labels[NAMED:] else "")
            left_out.setdefault(shown, []).append(name)
        if getattr(metric, "binned", None) is not None:
            lines.append(f"{name} is exact to {metric.binned} samples a process, and in bins of ranks above")
    lines += [
        f"{', '.join(names)}: undefined for, and left out: {classes}" for classes, names in left_out.items()
    ]
    return lines


def scalars(values: dict[str, Tensor], class_names: Sequence[str] = ()) -> dict[str, Tensor]:
    """One scalar a name: `f1_per_class` (K,) becomes `f1_per_class/<class>`, without undefined (NaN) classes.

    Where all are NaN, outputs were not finite, and all stay.
    """
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.ndim == 0:
            flat[name] = value
        else:
            labels = class_names if len(class_names) == len(value) else [str(i) for i in range(len(value))]
            kept = [True] * len(value) if bool(value.isnan().all()) else (~value.isnan()).tolist()
            each = zip(labels, value, kept, strict=True)
            flat.update({f"{name}/{label}": v for label, v, known in each if known})
    return flat


def headline(final: Mapping[str, float]) -> str:
    """The two of a run's final values that a reader wants first."""
    wanted = [name for name in ("test/acc", "test/mae", "val/acc", "val/loss") if name in final]
    return ", ".join(f"{name} {final[name]:.4f}" for name in wanted[:2])
