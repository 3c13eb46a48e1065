"""Knowledge distillation (Hinton et al., arXiv 1503.02531): learn from a trained network's probabilities too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from augmentation.manifold_mixup import ManifoldMixup
from crucible.batch import Batch
from crucible.corrections import Correction, all_of, option_is
from crucible.options import ConfigError
from crucible.technique import InnerMixing, Setting, Step, Technique, TrainedNetwork, is_on

KINDS = "a run, a run's checkpoint, timm:NAME, or timm:NAME@FILE with weights of your own"


@dataclass(frozen=True)
class Distil(Technique):
    """Learn from a trained network's class probabilities too."""

    networks: ClassVar = ("teacher",)
    corrections: ClassVar = (
        Correction(
            "model.teacher", 2, all_of(option_is("model.teacher"), is_on(ManifoldMixup)),
            "the teacher's probabilities were not mixed where the student's features were",
        ),
    )  # fmt: skip
    needs: ClassVar = {"distillation_weight": ("teacher",), "temperature": ("teacher",)}

    teacher: Annotated[
        str | None, f"whose probabilities are learnt from (arXiv 1503.02531): {KINDS}; null: nobody's"
    ] = None
    distillation_weight: Annotated[
        float | None, "[0, 1]", "the teacher's share of the loss, the criterion has the rest; null: 0.5"
    ] = None
    temperature: Annotated[
        float | None, "(0, inf)", "both networks' logits are divided by it in the teacher's term; null: 4"
    ] = None

    def check(self, setting: Setting) -> None:
        if setting.task == "regression":
            raise ConfigError(
                f"model.teacher={self.teacher} has no meaning with data.task=regression:"
                " what is learnt are class probabilities"
            )

    def attach(self, step: Step) -> None:
        distillation = Distillation(self, step.inside)
        step.networks[self.networks[0]] = distillation
        step.ready.append(distillation.observe)
        step.loss.append(distillation.loss)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(logits / T))`, the mean over the batch.

    The factor keeps the gradient's size as T varies: it tends to `(logits - teacher) / (N K)`, both centred,
    for large T.

    Args:
        logits: `(N, K)`, any floating dtype; computed in float32 or wider.
        teacher: `(N, K)` logits.
        temperature: T, greater than 0.
    """
    return _divergence(logits, _soft(teacher, temperature), temperature)


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = _soft(logits, temperature)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _soft(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.element_size() >= 4 else logits.float()
    return (wide / temperature).log_softmax(dim=1)


class Distillation(TrainedNetwork):
    """The teacher's part in a training step: it looks at each batch once, and its term joins the loss.

    The loss is `(1 - w) loss + w T^2 KL(teacher || student)`. The teacher takes (N, C, *spatial) to logits (N, K);
    it is in eval mode, without gradients. Where the student mixes samples inside of itself, the teacher sees them
    unmixed, and its probabilities are mixed as the targets are.

    Args:
        options: weight w and temperature T.
        inside: what mixes samples inside of the student; of the step, which may get it later.
    """

    def __init__(self, options: Distil, inside: Sequence[InnerMixing] = ()) -> None:
        self.weight = 0.5 if options.distillation_weight is None else options.distillation_weight
        self.temperature = 4.0 if options.temperature is None else options.temperature
        self.inside = inside
        self._log_probabilities: Tensor | None = None

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        """Let the teacher look at the batch of the step to come, whose input is as the student's."""
        assert self.network is not None, "no teacher was handed in"
        found = _soft(self.network(batch.input), self.temperature)
        for mixing in self.inside:
            found = mixing.mix(found.exp()).clamp(min=torch.finfo(found.dtype).tiny).log()
        self._log_probabilities = found

    def loss(self, loss: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """The scalar `loss` of `logits` (N, K) on the batch last observed, with the teacher's term."""
        assert self._log_probabilities is not None, "the teacher has seen no batch"
        return torch.lerp(loss, _divergence(logits, self._log_probabilities, self.temperature), self.weight)
