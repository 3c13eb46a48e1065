"""What computes the metrics: states that add up exactly over batches and ranks, in float32 or wider.

Each is NaN where an output was not a finite number, of however many samples: never a plausible number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric

from crucible.machine import wide

EXACT_SCORES = 2**26  # AUROC: scores (samples times classes) that all ranks keep together, four bytes each
BINS_OF_RANKS = 2048  # of each class, for what is more than that
_BLOCK = 2**22  # numbers sorted at a time


class Measure(Metric):
    """A metric whose sums stay as wide as the device allows, whatever the dtype of the module it is part of.

    Attributes:
        left_out: after `compute`, (K,) bool: the classes that it is not defined for; None: defined without classes.
        binned: after `compute`: from which number of samples on it is binned; None: it is exact.
    """

    full_state_update = False
    broken: Tensor  # numbers among the outputs that are not finite
    left_out: Tensor | None = None
    binned: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("broken", torch.int64)

    def add_sum(self, name: str, dtype: torch.dtype = torch.float64, *size: int) -> None:
        """A state of zeros, summed over ranks."""
        self.add_state(name, torch.zeros(size, dtype=dtype), dist_reduce_fx="sum")

    def watch(self, outputs: Tensor) -> None:
        """Remember whether an output of any shape was not finite."""
        self.broken += (~outputs.isfinite()).sum()

    def settled(self, value: Tensor) -> Tensor:
        """The value as float32; NaN where an output was not finite."""
        return value.masked_fill(self.broken > 0, math.nan).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        # takes the device that the module moves to and not its dtype: bf16 sums stop at 256
        device = fn(torch.zeros(1, device=self.device)).device

        def moved(state: Tensor) -> Tensor:
            kept = state.dtype == torch.float32 or not state.is_floating_point()
            return state.to(state.dtype if kept else wide(device)).to(device)

        return super()._apply(moved, exclude_state)


class Accuracy(Measure):
    """The share of samples whose class is among the `top_k` most probable."""

    hits: Tensor
    count: Tensor

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        self.top_k = top_k
        self.add_sum("hits", torch.int64)
        self.add_sum("count", torch.int64)

    def update(self, probabilities: Tensor, target: Tensor, logits: Tensor | None = None) -> None:
        """Add `probabilities` (N, K) float and `target` (N,) int64; `logits` (N, K) tell apart what is all 0."""
        self.watch(probabilities)
        if self.top_k == 1:
            self.hits += (probabilities.argmax(dim=1) == target).sum()
        else:
            ordered = probabilities if logits is None else logits
            self.hits += (ordered.topk(self.top_k, dim=1).indices == target.unsqueeze(1)).sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """The share, 0 to 1."""
        sums = wide(self.hits.device)
        return self.settled(self.hits.to(sums) / self.count.clamp(min=1).to(sums))


class ClassScore(Measure):
    """F1, precision or recall of each class, or their mean, with scikit-learn's conventions.

    A class without samples and without predictions is left out. What has a zero below the line otherwise (the
    recall of a class without samples that was predicted, the precision of one that never was) is 0.

    Args:
        num_classes: K.
        score: which of the three.
        mean: over the classes; else one value each.
    """

    right: Tensor
    predicted: Tensor
    present: Tensor

    def __init__(
        self, num_classes: int, score: Literal["f1", "precision", "recall"], mean: bool = True
    ) -> None:
        super().__init__()
        self.score, self.mean = score, mean
        for name in ("right", "predicted", "present"):
            self.add_sum(name, torch.int64, num_classes)

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add `probabilities` (N, K) float and `target` (N,) int64."""
        self.watch(probabilities)
        classes = torch.arange(len(self.right), device=target.device)
        predicted = probabilities.argmax(dim=1, keepdim=True) == classes
        present = target.unsqueeze(1) == classes
        self.right += (predicted & present).sum(dim=0)
        self.predicted += predicted.sum(dim=0)
        self.present += present.sum(dim=0)

    def compute(self) -> Tensor:
        """0 to 1; each class's, (K,): NaN for those that are left out."""
        right, predicted, present = (n.float() for n in (self.right, self.predicted, self.present))
        above, below = {
            "f1": (2 * right, predicted + present),
            "precision": (right, predicted),
            "recall": (right, present),
        }[self.score]
        self.left_out = predicted + present == 0
        each = above / below.clamp(min=1)
        if not self.mean:
            return self.settled(each.masked_fill(self.left_out, math.nan))
        return self.settled((each / (~self.left_out).sum().clamp(min=1).float()).sum())


class CalibrationError(Measure):
    """Expected calibration error: the mean over samples of |confidence - accuracy|, in equal-width bins.

    Guo et al., arXiv 1706.04599, equation 3. The state is three sums a bin, whatever the data's size.

    Args:
        bins: number of bins over the confidence of the predicted class.
    """

    confidence: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name in ("confidence", "correct", "count"):
            self.add_sum(name, torch.float64, bins)

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add `probabilities` (N, K) float and `target` (N,) int64."""
        self.watch(probabilities)
        confidence, prediction = probabilities.max(dim=1)
        bin_index = (confidence * self.bins).long().clamp(0, self.bins - 1)
        self.confidence.index_add_(0, bin_index, confidence.to(self.confidence.dtype))
        self.correct.index_add_(0, bin_index, (prediction == target).to(self.correct.dtype))
        self.count.index_add_(0, bin_index, torch.ones_like(confidence, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """The error, 0 to 1."""
        return self.settled((self.confidence - self.correct).abs().sum() / self.count.sum().clamp(min=1))


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the probabilities p of `logits` (N, K), float32.

    In the order of the probabilities, and without their ties at 0 and 1 where a network is confident.
    """
    z = logits.to(wide(logits.device))
    largest = torch.arange(z.shape[1], device=z.device) == z.argmax(dim=1, keepdim=True)
    others = z.masked_fill(largest, -math.inf).logsumexp(dim=1, keepdim=True)
    log_p = z.log_softmax(dim=1)
    # 1 - p of the largest is a difference of nearly equal numbers; of the others it is at least a half
    return torch.where(largest, z - others, log_p - torch.log1p(-log_p.exp())).float()


class Auroc(Measure):
    """The mean over classes of the area under the ROC curve of each against the rest.

    The share of pairs of a sample of the class and another one that its score puts in order; ties count half. It
    is exact while the ranks together have at most `EXACT_SCORES` scores. What is more is counted in bins of equal
    numbers of samples, which are drawn anew each time, so that only the order of the scores matters. Classes that no
    sample, or every sample, is of are left out.

    Args:
        num_classes: K.
    """

    # all (n, K), by sample or by bin
    scores: list[Tensor]
    hits: list[Tensor]
    bin_scores: list[Tensor]
    bin_hits: list[Tensor]
    bin_misses: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("scores", "hits", "bin_scores", "bin_hits", "bin_misses"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, target: Tensor, logits: Tensor | None = None) -> None:
        """Add `target` (N,) int64 with `logits` (N, K), or where there are none with `probabilities` (N, K)."""
        self.watch(probabilities)
        wide_p = probabilities.to(wide(probabilities.device))
        self.scores.append(wide_p.logit().float() if logits is None else log_odds(logits))
        self.hits.append(target)
        if _length(self.scores) > self.capacity:
            self._bin()

    @property
    def capacity(self) -> int:
        """Samples that this rank keeps the scores of."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if distributed else 1
        return max(1, EXACT_SCORES // (self.num_classes * ranks))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics', also where a rank has no sample, or bins that another has not."""
        device, k = self.device, self.num_classes
        for name in self._defaults:
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                size = (0,) if name == "hits" else (0, k)
                dtype = torch.float32 if name.endswith("scores") else torch.int64
                state.append(torch.zeros(size, dtype=dtype, device=device))
        super().sync(*args, **kwargs)

    def _columns(self, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some classes: sorted scores (C, M), and running numbers (C, M + 1) of hits and of misses."""
        device, k = self.device, self.num_classes
        scores = _joined(self.scores, (0, k), torch.float32, device)[:, classes]
        hits = _joined(self.hits, (0,), torch.int64, device).unsqueeze(1) == classes
        numbers = [
            torch.cat((one, _joined(binned, (0, k), one.dtype, device)[:, classes])).T
            for one, binned in (
                (scores, self.bin_scores), (hits.long(), self.bin_hits), ((~hits).long(), self.bin_misses)
            )
        ]  # fmt: skip
        sorted_scores, order = numbers[0].contiguous().sort(dim=1)
        running = [
            torch.nn.functional.pad(n.gather(1, order).cumsum(dim=1), (1, 0)) for n in numbers[1:]
        ]  # whole numbers: exact, and in the same order on every device
        return sorted_scores, running[0], running[1]

    def _blocks(self) -> tuple[Tensor, ...]:
        samples = _length(self.scores) + _length(self.bin_scores)
        return torch.arange(self.num_classes, device=self.device).split(max(1, _BLOCK // max(samples, 1)))

    def _bin(self) -> None:
        """Put all samples into bins of equal numbers."""
        parts: list[tuple[Tensor, ...]] = []
        for classes in self._blocks():
            scores, hits, misses = self._columns(classes)
            numbers = hits + misses
            first, last = (torch.searchsorted(scores, scores, right=right) for right in (False, True))
            # the middle of those with the same score, so that they stay together
            middle = numbers.gather(1, first) + numbers.gather(1, last) - 1
            bins = middle * BINS_OF_RANKS // (2 * numbers[:, -1:])
            each = torch.arange(BINS_OF_RANKS, device=scores.device).expand(len(scores), -1).contiguous()
            start, end = (torch.searchsorted(bins, each, right=right) for right in (False, True))
            typical = scores.gather(1, ((start + end - 1) // 2).clamp(0, scores.shape[1] - 1))
            parts.append((typical, *(n.gather(1, end) - n.gather(1, start) for n in (hits, misses))))
        self.bin_scores, self.bin_hits, self.bin_misses = (
            [torch.cat(columns).T.contiguous()] for columns in zip(*parts, strict=True)
        )
        self.scores, self.hits = [], []

    def compute(self) -> Tensor:
        """The mean area, 0 to 1; NaN where no class has one."""
        areas = []
        for classes in self._blocks():
            scores, hits, misses = self._columns(classes)
            below, upto = (
                misses.gather(1, torch.searchsorted(scores, scores, right=right)) for right in (False, True)
            )
            in_order = (hits.diff(dim=1) * (below + upto)).sum(dim=1)  # twice the pairs
            sums = wide(scores.device)
            areas.append(in_order.to(sums) / (2 * hits[:, -1].to(sums) * misses[:, -1].to(sums)))
        area = torch.cat(areas)
        self.left_out = area.isnan()
        self.binned = self.capacity if _length(self.bin_scores) else None
        known = (~self.left_out).sum().to(area.dtype)
        return self.settled(area.masked_fill(self.left_out, 0.0).sum() / known)


def _length(parts: list[Tensor] | Tensor) -> int:
    return len(parts) if isinstance(parts, Tensor) else sum(map(len, parts))


def _joined(parts: list[Tensor] | Tensor, empty: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """The parts of a list state, which is one tensor after it was synchronised."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(empty, dtype=dtype, device=device)


class MeanError(Measure):
    """The mean of the absolute errors, or of their squares."""

    total: Tensor
    count: Tensor

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.squared = squared
        self.add_sum("total")
        self.add_sum("count", torch.int64)

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add `predictions` (N,) and `target` (N,), float."""
        self.watch(predictions)
        error = predictions.to(self.total.dtype) - target.to(self.total.dtype)
        self.total += (error.square() if self.squared else error.abs()).sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """In the targets' unit, or its square."""
        return self.settled(self.total / self.count.clamp(min=1).to(self.total.dtype))


def _pooled(moments: Tensor) -> Tensor:
    """(R, 3) numbers, means and sums of squared distances from them, of R parts: (3,) of all."""
    count, mean, squares = moments.unbind(dim=-1)
    number = count.sum()
    centre = (count * mean).sum() / number.clamp(min=1)
    return torch.stack((number, centre, (squares + count * (mean - centre).square()).sum()))


class R2(Measure):
    """The share of the targets' variance that is explained; targets that are all the same: 1 or 0, as scikit-learn.

    Distances are taken from the mean: a difference of sums of squares loses years, or prices.
    """

    residual: Tensor
    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("residual")
        self.add_state("moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx=_pooled)

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add `predictions` (N,) and `target` (N,), float."""
        self.watch(predictions)
        y = target.to(self.residual.dtype)
        self.residual += (predictions.to(y.dtype) - y).square().sum()
        mean = y.mean().nan_to_num()  # no samples
        count = torch.full_like(mean, len(y))
        self.moments = _pooled(
            torch.stack((self.moments, torch.stack((count, mean, (y - mean).square().sum()))))
        )

    def compute(self) -> Tensor:
        """At most 1; NaN of fewer than two samples."""
        count, _, spread = self.moments.unbind()
        constant = (self.residual == 0).to(spread.dtype)
        value = torch.where(spread > 0, 1 - self.residual / spread, constant)
        return self.settled(value.masked_fill(count < 2, math.nan))
