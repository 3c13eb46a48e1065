"""How far a network's confidence is from its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class CalibrationError(Metric):
    """Expected calibration error: the mean over samples of |confidence - accuracy|, in equal-width bins.

    Guo et al., arXiv 1706.04599, equation 3. The state is three sums a bin, whatever the data's size.

    Args:
        bins: number of bins over the confidence of the predicted class.
    """

    full_state_update = False
    confidence: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name in ("confidence", "correct", "count"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add `probabilities` (N, K) float and `target` (N,) int64."""
        confidence, prediction = probabilities.max(dim=1)
        bin_index = (confidence * self.bins).long().clamp(0, self.bins - 1)
        self.confidence.index_add_(0, bin_index, confidence.to(self.confidence.dtype))
        self.correct.index_add_(0, bin_index, (prediction == target).to(self.correct.dtype))
        self.count.index_add_(0, bin_index, torch.ones_like(confidence, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """The error, 0 to 1."""
        return ((self.confidence - self.correct).abs().sum() / self.count.sum().clamp(min=1)).float()
