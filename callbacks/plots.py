"""Pictures of a run: its learning curves, and what the model gets wrong (a confusion matrix, or predictions)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from crucible.cells import cell
from crucible.console import epoch_named
from crucible.files import replacing
from crucible.keyed import scrambled
from crucible.loggers import log_picture
from crucible.measures import R2
from crucible.training import watched
from crucible.writing import fails_together

MAX_CLASSES = 2000
NAMED_CLASSES = 40
COUNTED_CLASSES = 20
DRAWN_CELLS = 250
MAX_TILES, SMALLEST_TILE = 64, 64  # of the picture of a batch; pixels
NO_SAMPLE = torch.iinfo(torch.int64).max


class ConfusionCounts(Metric):
    """Counts (K, K) int64 of samples by true class (row) and predicted class (column); adds up over ranks.

    An update costs O(N) and no host synchronisation, which a K*K-long `bincount` would need.

    Args:
        num_classes: K.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes**2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add `logits` (N, K) float with `target` (N,) int64; those that are no numbers are not counted."""
        cell = target * self.num_classes + logits.argmax(dim=1)
        self.counts.index_add_(0, cell, logits.logsumexp(dim=1).isfinite().to(cell.dtype))

    def compute(self) -> Tensor:
        """The counts, of all ranks."""
        return self.counts.view(self.num_classes, self.num_classes)


class PredictionSample(Metric):
    """A bounded sample of (prediction, target), with r2 and the mean absolute error of all samples.

    A sample is kept by a hash of its index, so it is the same whichever rank or worker brought it.

    Args:
        size: samples kept.
        dtype: of the sums behind r2 and the error.
    """

    full_state_update = False
    keys: Tensor
    points: Tensor
    sums: Tensor

    def __init__(self, size: int = 2000, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.size = size
        self.add_state("keys", torch.full((size,), NO_SAMPLE, dtype=torch.int64), dist_reduce_fx=_join)
        self.add_state("points", torch.zeros(size, 2), dist_reduce_fx=_join)
        self.add_state("sums", torch.zeros(2, dtype=dtype), dist_reduce_fx="sum")
        self.r2 = R2()

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add predictions `logits` (N,) float with `target` (N,) float and `index` (N,) int64."""
        prediction, wide = logits.to(self.sums.dtype), target.to(self.sums.dtype)
        self.sums += torch.stack((torch.ones_like(wide), (prediction - wide).abs())).sum(dim=1)
        self.r2.update(prediction, wide)
        points = torch.stack((logits, target), dim=1).to(self.points.dtype)
        self.keys, self.points = self._smallest(
            torch.cat((self.keys, scrambled(index))), torch.cat((self.points, points))
        )

    def _smallest(self, keys: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        kept, position = keys.topk(self.size, largest=False)
        return kept, points[position]

    def compute(self) -> tuple[Tensor, float, float, int]:
        """`(points (n, 2) float32, n <= size; r2; mean absolute error; number of samples)` of all ranks."""
        keys, points = self._smallest(self.keys, self.points)
        count, absolute = self.sums.tolist()
        return points[keys != NO_SAMPLE].cpu(), float(self.r2.compute()), absolute / max(count, 1), int(count)


def _join(of_ranks: Tensor) -> Tensor:
    return of_ranks.flatten(0, 1)


class ResultPlots(Callback):
    """Writes what the task calls for to `<trainer.default_root_dir>/plots`, for validation and test.

    Classification: `confusion_matrix_val.png` (rows normalised to the true class) and `.csv` (counts, a row a
    true class). Regression: `predictions_val.png`, targets against predictions with r2 and the mean absolute
    error. `_test` likewise. The last validation of a fit and every test are written; W&B gets the pictures.
    `first_batch.png` has images of the first training batch as the network sees them, and `curves.png`, at the end of a
    training, loss and accuracy (error) by the epoch, of all rows of metrics.csv.
    Above 2000 classes there is no confusion matrix, and a line says so. Exact over ranks; rank 0 writes.

    Args:
        every_n_epochs: write also after the validation of every so many epochs; null: at the end only.
    """

    def __init__(self, every_n_epochs: Annotated[int, "[1, inf)"] | None = None) -> None:
        self.every_n_epochs = every_n_epochs
        self._metric: Metric | None = None
        self._epoch = ""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0 and batch_idx == 0:
            self._write_first_batch(trainer, batch.input)
        self.on_train_batch_start = None  # type: ignore[method-assign, assignment]  # Lightning passes over it from here on

    @fails_together
    def _write_first_batch(self, trainer: Trainer, images: Tensor) -> None:
        picture = draw_batch(images) if trainer.is_global_zero else None
        if picture is not None:
            file = Path(trainer.default_root_dir) / "plots" / "first_batch.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                picture.save(temporary, format="png")
            log_picture(trainer.loggers, "first_batch", file, 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._add(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        done = trainer.current_epoch + 1
        fits = trainer.state.fn == "fit"
        self._epoch = epoch_named(trainer.current_epoch, watched(pl_module).epochs) if fits else ""
        due = self.every_n_epochs is not None and done % self.every_n_epochs == 0
        if due or trainer.state.fn != "fit":
            self._write(trainer, pl_module, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # only now is it known which validation was the last
        self._write(trainer, pl_module, "val")
        self._write_curves(trainer)

    @fails_together
    def _write_curves(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (folder / "metrics.csv").is_file():
            return
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if rows:
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            with replacing(folder / "plots" / "curves.png") as file:
                draw_curves(rows).savefig(file, format="png", dpi=150)
            log_picture(trainer.loggers, "curves", folder / "plots" / "curves.png", trainer.global_step)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _begin(self, pl_module: LightningModule) -> None:
        self._metric = None
        if pl_module.task == "regression":
            wide = torch.float32 if pl_module.device.type == "mps" else torch.float64
            self._metric = PredictionSample(dtype=wide).to(pl_module.device)
        elif pl_module.num_classes <= MAX_CLASSES:  # type: ignore[operator]
            self._metric = ConfusionCounts(pl_module.num_classes).to(pl_module.device)  # type: ignore[arg-type]
        else:
            rank_zero_info(
                f"plots: no confusion matrix for {pl_module.num_classes} classes (limit {MAX_CLASSES})"
            )

    def _add(self, outputs: Any) -> None:
        if self._metric is not None:
            self._metric.update(outputs["logits"], outputs["target"], outputs["index"])

    @fails_together
    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        """Collective: every rank calls it, rank 0 writes. Each result is written once."""
        if self._metric is None:
            return
        result = self._metric.compute()
        self._metric = None
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "plots"
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{split}, {self._epoch}" if split == "val" and self._epoch else split
        if pl_module.task == "regression":
            points, r2, mae, count = result
            name, figure = "predictions", draw_predictions(points, r2, mae, count, title)
        else:
            names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
            names = names if names and len(names) == len(result) else [str(i) for i in range(len(result))]
            name, figure = "confusion_matrix", draw_confusion(result.cpu().numpy(), names, title)
            with replacing(folder / f"{name}_{split}.csv") as file:
                _write_counts(file, result.tolist(), names)
        picture = folder / f"{name}_{split}.png"
        with replacing(picture) as file:
            figure.savefig(file, format="png", dpi=150)
        log_picture(trainer.loggers, f"{split}/{name}", picture, trainer.global_step)


def _write_counts(path: Path, counts: list[list[int]], names: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["true \\ predicted", *map(cell, names)])
        writer.writerows([cell(name), *row] for name, row in zip(names, counts, strict=True))


def draw_curves(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Loss, and accuracy or absolute error, of training and validation by the epoch, which is counted from 1.

    Args:
        rows: of metrics.csv, as texts; an empty one is no value.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    second = "mae" if any(row.get("train/mae") for row in rows) else "acc"
    for axes, name in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        for split, marker in (("train", "o"), ("val", "s")):
            known = [
                (int(r["epoch"]) + 1, float(r[f"{split}/{name}"])) for r in rows if r.get(f"{split}/{name}")
            ]
            if known:
                alone = marker if len(known) == 1 else ""
                axes.plot(*zip(*known, strict=True), marker=alone, label=split)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def draw_batch(images: Tensor) -> Image.Image | None:
    """A batch as tiles in rows of eight, at most 64, on one scale from its least value (black) to its greatest (white).

    Args:
        images: (N, C, H, W) float, or (N, C, D, H, W), of which the middle slice is shown; of fewer than three channels
            the first is shown in grey, of more the first three. Others give None.
    """
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.ndim != 4:
        return None
    shown = images[:MAX_TILES, : 3 if images.shape[1] >= 3 else 1].detach().float().cpu()
    shown = torch.nan_to_num(shown)
    low, high = float(shown.min()), float(shown.max())
    pixels = ((shown - low) * (255 / max(high - low, 1e-12))).round().to(torch.uint8)
    times = max(1, -(-SMALLEST_TILE // max(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3).movedim(1, 3)
    rows, (height, width) = -(-len(pixels) // 8), pixels.shape[1:3]
    sheet = np.full((rows * (height + 2), min(8, len(pixels)) * (width + 2), 3), 255, dtype=np.uint8)
    for number, tile in enumerate(pixels.numpy()):
        top, left = number // 8 * (height + 2), number % 8 * (width + 2)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet)


def draw_confusion(counts: Any, names: Sequence[str], title: str) -> Figure:
    """A confusion matrix as colours: the share of each true class (row) that was predicted as each class.

    Few classes are named and their cells counted; of many, the most frequent confusions are listed beside it.

    Args:
        counts: (K, K) integer array, rows are true classes.
        names: K class names.
        title: what the samples are.
    """
    k, total = len(names), max(int(counts.sum()), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named, counted = k <= NAMED_CLASSES, k <= COUNTED_CLASSES
    side = min(max(4.5, 0.45 * k + 2), 9.0)
    figure = Figure(figsize=(side + (0.5 if named else 4.5), side), layout="constrained")
    axes = figure.subplots(1, 1 if named else 2, width_ratios=None if named else [side, 4], squeeze=False)[0]
    block = -(-k // DRAWN_CELLS)
    shown, end = _largest_of_blocks(share, block), block * -(-k // block) - 0.5
    # a root scale keeps the rare confusions visible beside the diagonal
    image = axes[0].imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, 1), extent=(-0.5, end, end, -0.5))
    label = "share of the true class" + (f" (largest of {block} x {block} cells)" if block > 1 else "")
    figure.colorbar(image, ax=axes[0], shrink=0.8, label=label)
    accuracy = counts.trace() / total
    axes[0].set(xlabel="predicted", ylabel="true", title=f"{title}: accuracy {accuracy:.4f} of {total}")
    if named:
        labels = [name if len(name) <= 20 else name[:19] + "…" for name in names]
        upright = max(map(len, labels)) <= 2
        axes[0].set_xticks(range(k), labels, rotation=0 if upright else 90, parse_math=False)
        axes[0].set_yticks(range(k), labels, parse_math=False)
    if counted:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.35 else "black"
            text = str(counts[row, column])
            axes[0].text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    if not named:
        axes[1].axis("off")
        axes[1].text(0, 1, _worst(counts, names), va="top", fontsize=8, family="monospace", parse_math=False)
    return figure


def _largest_of_blocks(share: Any, block: int) -> Any:
    cells = -(-len(share) // block)
    padded = np.pad(share, (0, cells * block - len(share)))
    return padded.reshape(cells, block, cells, block).max(axis=(1, 3))


def _worst(counts: Any, names: Sequence[str], listed: int = 30) -> str:
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:listed]
    rows, columns = np.unravel_index(order, wrong.shape)
    lines = [
        f"{wrong[row, column]:5d}  {names[row][:20]} -> {names[column][:20]}"
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    ]
    return "\n".join(["most frequent confusions", "count  true -> predicted", *lines])


def draw_predictions(points: Tensor, r2: float, mae: float, count: int, title: str) -> Figure:
    """Predictions over targets, with the line where they agree.

    Args:
        points: (n, 2) float: prediction, target.
        r2: coefficient of determination of all samples.
        mae: mean absolute error of all samples.
        count: number of all samples.
        title: what the samples are.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    finite = points[points.isfinite().all(dim=1)].numpy()
    axes.scatter(finite[:, 1], finite[:, 0], s=8, alpha=0.5, linewidths=0)
    if len(finite):
        axes.axline((finite[0, 1], finite[0, 1]), slope=1, color="black", linewidth=1)
    shown = f"{len(points)} of {count} samples" if len(points) < count else f"{count} samples"
    axes.set(xlabel="target", ylabel="prediction", title=f"{title}: r2 {r2:.4f}, mae {mae:.4g} ({shown})")
    return figure
