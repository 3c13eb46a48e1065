"""AugMix's consistency loss: a clean image and two AugMix views of it are to be classified alike.

Hendrycks et al., arXiv 1912.02781. The batch becomes three times as long, `[clean; first view; second view]`, with
the same targets and sample numbers thrice, so that whatever acts by sample number (shifts, flips, cutout, rotation)
acts alike on the three. The criterion sees the clean images; the divergence sees all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from augmentation.automatic import AugMix
from augmentation.manifold_mixup import ManifoldMixup
from augmentation.mixing import Mix
from crucible.batch import Batch
from crucible.keyed import keyed_uniform
from crucible.options import ConfigError
from crucible.technique import BatchStage, Setting, Step, Technique

VIEWS = 3


@dataclass(frozen=True)
class AugMixConsistency(Technique):
    """The Jensen-Shannon divergence between a clean image and two AugMix views of it joins the loss."""

    needs: ClassVar = {"augmix_severity": ("augmix_weight",), "augmix_width": ("augmix_weight",)}

    augmix_weight: Annotated[
        float,
        "[0, inf)",
        "weight of the divergence between three views of an image; 0 is off (arXiv 1912.02781)",
    ] = 0.0
    augmix_severity: Annotated[int, "[1, 10]", "largest strength of the views' operations, of 10"] = 3
    augmix_width: Annotated[int, "[1, 16]", "chains of operations that a view mixes"] = 3

    @property
    def passes(self) -> float:
        return float(VIEWS) if self.augmix_weight else 1.0

    def check(self, setting: Setting) -> None:
        name = f"model.augmix_weight={self.augmix_weight:g}"
        if setting.task == "regression" or setting.num_classes == 1:
            raise ConfigError(
                f"{name} compares class probabilities: it needs data.task=classification and two classes or more"
            )
        if setting.input_dim != 2 or setting.input_channels not in (1, 3):
            raise ConfigError(
                f"{name} needs grey or RGB images: data.input_dim is {setting.input_dim}, data.input_channels "
                f"{setting.input_channels}"
            )
        for other, options in ((Mix, "model.mixup or model.cutmix_alpha"), (ManifoldMixup, "manifold mixup")):
            if setting.of(other).on:
                raise ConfigError(
                    f"{name} compares three views of one image, and {options} mixes each view with another image: "
                    "choose one"
                )

    def attach(self, step: Step) -> None:
        step.raw.append(BatchStage("augmix", _Views(self), "sample"))
        step.criterion = _OfTheClean(step.criterion)
        step.loss.append(self._with_divergence)

    def _with_divergence(self, loss: Tensor, logits: Tensor, _: Batch) -> Tensor:
        return loss + self.augmix_weight * jensen_shannon(logits)


class _Views:
    """Makes a batch of three views; a table of operations for each size of images."""

    def __init__(self, options: AugMixConsistency) -> None:
        self.options = options
        self._made: dict[tuple[int, int, torch.device], AugMix] = {}

    def __call__(self, batch: Batch, key: int) -> Batch:
        """uint8 (N, C, H, W) images to (3N, C, H, W): as they are, and two views.

        Raises:
            ConfigError: for input that is no uint8.
        """
        images, target, visit = batch
        if images.dtype != torch.uint8:
            raise ConfigError(
                f"model.augmix_weight={self.options.augmix_weight:g} needs uint8 images: the input is "
                f"{str(images.dtype).removeprefix('torch.')}"
            )
        place = (images.shape[2], images.shape[3], images.device)
        augmix = self._made.get(place)
        if augmix is None:
            augmix = AugMix(*place[:2], self.options.augmix_severity, self.options.augmix_width).to(
                images.device
            )
            self._made[place] = augmix
        # filled on the device: a copied scalar would make the host wait for it
        on_device = torch.full((), key, dtype=torch.int64, device=images.device)
        first, second = keyed_uniform(on_device, visit, 2 * augmix.draws).split(augmix.draws, dim=1)
        views = augmix(torch.cat((images, images)), torch.cat((first, second)))
        repeats = (VIEWS,) + (1,) * (target.ndim - 1)
        return Batch(torch.cat((images, views)), target.repeat(repeats), visit.repeat(VIEWS))


class _OfTheClean(nn.Module):
    """A criterion on the first third of a batch."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        clean = len(logits) // VIEWS
        loss: Tensor = self.criterion(logits[:clean], target[:clean])
        return loss


def jensen_shannon(logits: Tensor) -> Tensor:
    """The mean divergence of three views' class probabilities from their mean, in nats; 0 to log 3.

    Args:
        logits: (3N, K), the views one after the other.
    """
    wide = logits if logits.element_size() >= 4 else logits.float()
    views = wide.log_softmax(dim=1).unflatten(0, (VIEWS, -1))
    mean = views.exp().mean(dim=0).clamp(min=1e-7).log()  # as published, where a mean has no logarithm
    return (views.exp() * (views - mean)).sum(dim=2).mean()
