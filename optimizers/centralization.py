"""Gradient centralization (Yong et al., arXiv 2004.01461): gradients of weights lose their mean per output.

Weight decay stands behind it, as in the paper, where the operator acts on the gradient of the loss and the optimizer
has the rest: the mean of an output's weights decays like the weights. In the code that the authors published, SGD adds
the L2 term to the gradient first, so that it is centralised too and that mean stays for ever what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from crucible.options import ConfigError
from crucible.private import AnyConvolution
from crucible.technique import Step, Technique

__all__ = ["GradientCentralization", "centralise_gradients", "centralised_weights"]

Which = Literal["all", "conv"]


@dataclass(frozen=True)
class GradientCentralization(Technique):
    """Gradients of weights lose their mean per output."""

    gradient_centralization: Annotated[
        Which | None,
        "weights whose gradients lose their mean, before weight decay is added: of convolutions, or of linear layers "
        "too (arXiv 2004.01461)",
    ] = None

    def attach(self, step: Step) -> None:
        assert self.gradient_centralization is not None
        centralisation = _Centralisation(self.gradient_centralization)
        step.optimizer.append(centralisation.find)
        step.gradient.append(centralisation.act)


class _Centralisation:
    def __init__(self, which: Which) -> None:
        self.which = which
        self.weights: list[nn.Parameter] = []

    def find(self, module: Any, optimizer: Any) -> None:
        learnt = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights = centralised_weights(module, self.which, learnt)

    def act(self) -> None:
        centralise_gradients(self.weights)


def centralised_weights(
    module: nn.Module, which: Which, learnt: Iterable[nn.Parameter] | None = None
) -> list[nn.Parameter]:
    """The trainable weights in `module` whose gradients are centralised.

    Those of convolutions and, with `which="all"` as in the paper, of linear layers and attention projections,
    told by module type: embeddings, norms and channel scales have more than one dimension in some networks
    and no mean to lose. A weight with one input per output is left out, as its gradient would be zero.

    Args:
        module: whose weights.
        which: kinds of layers.
        learnt: the weights that an optimizer has, among them those that are frozen for some epochs only; None: those
            that require a gradient.

    Raises:
        ConfigError: where there is none.
    """
    found: list[nn.Parameter] = []
    for part in module.modules():
        if isinstance(part, AnyConvolution) or (which == "all" and isinstance(part, nn.Linear)):
            found.append(part.weight)  # type: ignore[arg-type]
        elif which == "all" and isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found.append(part.in_proj_weight)
    trainable = {p for p in module.parameters() if p.requires_grad} if learnt is None else set(learnt)
    weights = [w for w in dict.fromkeys(found) if w in trainable and w.numel() > w.shape[0]]
    if not weights:
        kind = "convolution" if which == "conv" else "convolution or linear layer"
        raise ConfigError(f"model.gradient_centralization={which}: the network has no trainable {kind}")
    return weights


@torch.no_grad()
def centralise_gradients(weights: Iterable[Tensor]) -> None:
    """Subtract from each gradient `(out, in, *kernel)` its mean over all dimensions but the first, in place.

    For the raw gradient: after unscaling and before clipping, weight decay and momentum. The mean is taken in
    float32 or wider. Weights without a gradient are passed over. Nothing waits for the device.
    """
    gradients = [w.grad for w in weights if w.grad is not None]
    if gradients:
        means = [  # there is no foreach mean
            g.mean(tuple(range(1, g.ndim)), keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
            for g in gradients
        ]
        torch._foreach_sub_(gradients, means)
