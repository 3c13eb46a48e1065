"""Mixup and CutMix on the device: pairs of samples become one, their labels a mixture.

Mixup: Zhang et al., arXiv 1710.09412. CutMix: Yun et al., arXiv 1905.04899.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from crucible.batch import Batch
from crucible.corrections import Correction, option_is, rounded_targets
from crucible.keyed import keyed_uniform, stream_key
from crucible.options import ConfigError
from crucible.technique import BatchStage, Setting, Step, Technique


@dataclass(frozen=True)
class Mix(Technique):
    """Which mixing is on; with both, each batch gets one of the two."""

    needs: ClassVar = {
        "mixup_alpha": ("mixup",), "mix_prob": ("mixup", "cutmix_alpha"), "mix_switch_prob": ("cutmix_alpha", "mixup"),
    }  # fmt: skip

    corrections: ClassVar = (
        Correction(
            "model.cutmix_alpha", 2, option_is("model.cutmix_alpha"),
            "CutMix's boxes had at most half of the area, as the weight was folded to at least 1/2: of alpha 1 they "
            "pasted .178 in the mean, and .298 as published (of benchmarks/results, technique_cost.md has it, whose "
            "times do not depend on a box's size)",
        ),
        rounded_targets("model.mixup"),
        rounded_targets("model.cutmix_alpha"),
    )  # fmt: skip

    mixup: Annotated[bool, "mix pairs of samples (arXiv 1710.09412)"] = False
    mixup_alpha: Annotated[float, "(0, inf)", "of Beta(alpha, alpha), which the weight is drawn from"] = 0.2
    cutmix_alpha: Annotated[
        float, "[0, inf)", "of Beta(alpha, alpha) for the area of pasted boxes; 0 is off (arXiv 1905.04899)"
    ] = 0.0
    mix_prob: Annotated[float, "[0, 1]", "chance that a batch is mixed"] = 1.0
    mix_switch_prob: Annotated[float, "[0, 1]", "chance of cutmix where both are on"] = 0.5

    def check(self, setting: Setting) -> None:
        name = "model.mixup" if self.mixup else "model.cutmix_alpha"
        if self.mix_switch_prob != 0.5 and not (self.mixup and self.cutmix_alpha > 0):
            raise ConfigError(
                f"model.mix_switch_prob={self.mix_switch_prob:g} needs both "
                "model.mixup=true and model.cutmix_alpha above 0, to choose between"
            )
        check_mixes_classes(f"{name}={str(getattr(self, name.removeprefix('model.'))).lower()}", setting)

    def attach(self, step: Step) -> None:
        step.batch.append(BatchStage("mixing", Mixing(self, step.setting.num_classes)))


def check_mixes_classes(option: str, setting: Setting) -> None:
    """Refuse to mix targets that are no probabilities of two classes or more.

    Raises:
        ConfigError: naming the option.
    """
    if setting.task == "regression":
        raise ConfigError(f"{option} mixes class probabilities and has no meaning with data.task=regression")
    if setting.num_classes == 1:
        raise ConfigError(f"{option} mixes class probabilities: it needs data.num_classes of 2 or more")


def class_probabilities(target: Tensor, num_classes: int) -> Tensor:
    """(N,) class indices as (N, K) float32 rows of 0 and 1; (N, K) probabilities as they are, in float32."""
    if target.ndim == 2:
        return target.float()
    return (target[:, None] == torch.arange(num_classes, device=target.device)).float()


def mixing_partners(n: int, key: Tensor, device: torch.device) -> Tensor:
    """(N,) int64: with whom each sample of a batch is mixed, a random permutation drawn from a 0-dimensional key."""
    draws = keyed_uniform(key, torch.arange(n, device=device), 1)
    return draws[:, 0].argsort(stable=True)


def mixup_batch(input: Tensor, target: Tensor, weight: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`weight * sample + (1 - weight) * partner`, for the input and for the target.

    Args:
        input: (N, ...) float.
        target: (N, K) float32 probabilities.
        weight: 0-dimensional float32 in [1/2, 1].
        key: 0-dimensional int64; draws the partners, a random permutation.
    """
    partner = mixing_partners(input.shape[0], key, input.device)
    mixed = torch.lerp(input[partner], input, weight.to(input.dtype))
    return mixed, torch.lerp(target[partner], target, weight)


def cutmix_batch(input: Tensor, target: Tensor, weight: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner into each sample; the target is mixed by the area really pasted.

    The box has the input's aspect and `1 - weight` of its volume, each side rounded down to an even number; it lies
    around a uniform position, and what hangs over the edge is cut off, so that the sample keeps at least `weight` of
    its volume. The boxes are distributed as those of torchvision's `CutMix`.

    Args:
        input: (N, C, *spatial) float, with 1, 2 or 3 spatial dimensions.
        target: (N, K) float32 probabilities.
        weight: 0-dimensional float32 in [0, 1].
        key: 0-dimensional int64; draws the partners and the centre.
    """
    spatial = input.shape[2:]
    partner = mixing_partners(input.shape[0], key, input.device)
    # the partners use draw 0 of indices 0 to N-1; the centre uses an index that no batch reaches
    centre = keyed_uniform(key, torch.full((1,), -1, device=input.device), len(spatial))[0]
    side = (1 - weight) ** (1 / len(spatial))
    inside: Tensor | None = None
    for axis, size in enumerate(spatial):
        middle, half = (centre[axis] * size).floor(), (side * size / 2).floor()
        position = torch.arange(size, device=input.device)
        within = (position >= middle - half) & (position < middle + half)
        within = within.view([-1 if a == axis else 1 for a in range(len(spatial))])
        inside = within if inside is None else inside & within
    assert inside is not None, "cutmix needs spatial dimensions"
    pasted = inside.float().mean()
    return torch.where(inside, input[partner], input), torch.lerp(target, target[partner], pasted)


class Mixing:
    """Mixes a batch as its key says.

    Args:
        options: what is on.
        num_classes: K.
    """

    def __init__(self, options: Mix, num_classes: int) -> None:
        self.options = options
        self.num_classes = num_classes

    def __call__(self, batch: Batch, key: int) -> Batch:
        """Mix each sample with another of the batch.

        The weight is drawn from Beta(alpha, alpha). Mixup's is folded to at least 1/2, which changes nothing but who
        is whose partner; CutMix's is not, as the boxes of a weight and of its complement are no complements. Draws
        happen on the CPU or in integer arithmetic on the device; no value
        comes back to the host.

        Args:
            batch: input (N, ...) float, for CutMix (N, C, *spatial); target (N,) int64 class indices or (N, K)
                float probabilities.
            key: from `stream_key`, one a batch.

        Returns:
            The batch with its input mixed or, in a share `1 - mix_prob` of the batches, as it was, of the same shape
            and dtype, and (N, K) float32 probabilities as its target, of 0 and 1 where nothing was mixed.
        """
        input, target, visit = batch
        options, device = self.options, input.device
        draw = np.random.Generator(np.random.Philox(key))
        cutmix = options.cutmix_alpha > 0 and (not options.mixup or draw.random() < options.mix_switch_prob)
        if cutmix and input.ndim < 3:
            raise ConfigError(
                f"model.cutmix_alpha={options.cutmix_alpha} pastes boxes: the input has no spatial dimensions"
            )
        alpha = options.cutmix_alpha if cutmix else options.mixup_alpha
        share = draw.beta(alpha, alpha)
        # drawn last: the batches that are mixed are mixed as they would be with mix_prob=1
        if options.mix_prob < 1 and draw.random() >= options.mix_prob:
            return Batch(input, class_probabilities(target, self.num_classes), visit)
        # filled on the device: a copied scalar would make the host wait for it
        kept = share if cutmix else max(share, 1 - share)
        weight = torch.full((), kept, dtype=torch.float32, device=device)
        pairs = torch.full((), stream_key(key, "pairs"), dtype=torch.int64, device=device)
        mix = cutmix_batch if cutmix else mixup_batch
        return Batch(*mix(input, class_probabilities(target, self.num_classes), weight, pairs), visit)
