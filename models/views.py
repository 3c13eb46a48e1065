"""Several views of one image, whose predictions are averaged: test-time augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crucible.machine import widened
from crucible.options import ConfigError

View = Literal["flip", "five_crops"]
SEE = "docs/use.md"


def views_asked(tta: str | Sequence[str] | None) -> tuple[str, ...]:
    """The option `tta` in one order, each once; empty: the image alone."""
    asked = [tta] if isinstance(tta, str) else list(tta or ())
    for name in asked:
        if name not in ("flip", "five_crops"):
            raise ConfigError(f"tta={name}: must be flip, five_crops, or both", see=SEE)
    return tuple(sorted(set(asked)))


@dataclass(frozen=True)
class Views:
    """How the outputs of a classifier, or of a regression, are read off several views of each input.

    Five crops are made with the sample (`augmentation.five_crops`), the mirror image here.

    Attributes:
        asked: of `tta`.
        temperature: what logits are divided by (Guo et al., arXiv 1706.04599).
    """

    asked: tuple[str, ...] = ()
    temperature: float = 1.0

    def read(self, outputs: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Logits (N, K), or predictions (N,) of a regression, in float32 or wider.

        Of several views, the softmax of the logits is the mean of the views' probabilities, as in Krizhevsky et
        al.'s test with ten crops (NeurIPS 2012, section 4.1); predictions are their mean.

        Args:
            outputs: the model's; `(N, C, ...)` to `(N, K)` or `(N,)`.
            input: `(N, C, ...)`, or with five crops `(N, 5, C, H, W)`.
        """
        if not self.asked and self.temperature == 1:
            return widened(outputs(input))
        stacks = [input.flatten(0, 1)] if "five_crops" in self.asked else [input]
        if "flip" in self.asked:
            stacks.append(stacks[0].flip(-1))
        # of a shape, not by `len`, which would be one number for all batches in an exported graph
        each = [widened(outputs(stack)).unflatten(0, (input.shape[0], -1)) for stack in stacks]
        found = torch.cat(each, dim=1)
        if found.ndim == 2:
            return found.mean(dim=1)
        if found.shape[1] == 1:
            return found[:, 0] / self.temperature
        return (found.log_softmax(dim=2).logsumexp(dim=1) - math.log(found.shape[1])) / self.temperature
