"""Manifold mixup (Verma et al., arXiv 1806.05236): pairs of samples are mixed at a layer drawn for each batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from augmentation.mixing import Mix, check_mixes_classes, class_probabilities, mixing_partners
from crucible.batch import Batch
from crucible.corrections import Correction, option_is, rounded_targets
from crucible.keyed import stream_key
from crucible.options import ConfigError
from crucible.seams import Seam, insert_seams
from crucible.technique import BatchStage, Setting, Step, Technique

log = logging.getLogger("crucible")


@dataclass(frozen=True)
class ManifoldMixup(Technique):
    """Mixup of the features behind one of the network's first stages, or of its input."""

    needs: ClassVar = {
        "manifold_mixup_alpha": ("manifold_mixup",),
        "manifold_mixup_layers": ("manifold_mixup",),
    }
    corrections: ClassVar = (
        rounded_targets("model.manifold_mixup"),
        Correction(
            "model.manifold_mixup", 3, option_is("model.manifold_mixup"),
            "features were mixed behind the stem, the whole body or both in networks that keep their blocks in one "
            "sequence, and not at all where they are a tuple",
        ),
    )  # fmt: skip

    manifold_mixup: Annotated[
        bool, "mix pairs of samples at a layer drawn for each batch (arXiv 1806.05236)"
    ] = False
    manifold_mixup_alpha: Annotated[
        float, "(0, inf)", "of Beta(alpha, alpha), which the weight is drawn from"
    ] = 2.0
    manifold_mixup_layers: Annotated[
        int,
        "[1, inf)",
        "inner places that are drawn from, besides the input: behind the first parts of the network",
    ] = 2

    def check(self, setting: Setting) -> None:
        check_mixes_classes("model.manifold_mixup=true", setting)
        if setting.of(Mix).on:
            raise ConfigError(
                "model.manifold_mixup=true mixes the input too: it does not go with model.mixup or model.cutmix_alpha"
            )

    def attach(self, step: Step) -> None:
        mixing = _ManifoldMixing(self, step.setting.num_classes)
        step.network.append(mixing.prepare)
        step.optimizer.append(mixing.say)
        step.batch.append(BatchStage("mixing", mixing))
        step.inside.append(mixing)


class _ManifoldMixing:
    def __init__(self, options: ManifoldMixup, num_classes: int) -> None:
        self.options = options
        self.num_classes = num_classes
        self.seams: list[Seam] = []
        self._labels = Seam()  # of the batch, wherever its features are mixed

    def prepare(self, network: nn.Module) -> nn.Module:
        self.seams = insert_seams(network, self.options.manifold_mixup_layers)
        if len(self.seams) < 2:
            raise ConfigError(
                f"model.manifold_mixup=true: {type(network).__name__} has no parts one after the other to mix between"
            )
        return network

    def say(self, module: Any, optimizer: Optimizer) -> None:
        """Where the network is mixed, for people."""
        log.info("manifold mixup at one of: %s", ", ".join(seam.place for seam in self.seams))

    def __call__(self, batch: Batch, key: int) -> Batch:
        """Set the seams for this batch; its target becomes (N, K) float32 probabilities, mixed as the features are."""
        input, target, visit = batch
        draw: Any = np.random.Generator(np.random.Philox(key))
        alpha = self.options.manifold_mixup_alpha
        share, place = draw.beta(alpha, alpha), int(draw.integers(len(self.seams)))
        weight = max(share, 1 - share)  # a sample's own label stays the dominant one
        pairs = torch.full((), stream_key(key, "pairs"), dtype=torch.int64, device=input.device)
        partner = mixing_partners(input.shape[0], pairs, input.device)
        for number, seam in enumerate(self.seams):
            seam.set(weight if number == place else 1.0, partner)
        self._labels.set(weight, partner)
        return Batch(input, self.mix(class_probabilities(target, self.num_classes)), visit)

    def mix(self, values: Tensor) -> Tensor:
        """Values (N, ...) of the batch's samples, mixed as its targets are."""
        return self._labels.mix(values)

    def rest(self) -> None:
        """Leave the features as they are, until the next training batch."""
        for seam in self.seams:
            seam.rest()
