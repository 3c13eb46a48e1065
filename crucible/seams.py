"""Seams inside a network, at which a technique mixes the features of a batch; one graph serves all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Seam:
    """`weight * x + (1 - weight) * x[partner]` of a training batch of features x (N, ...); weight 1 leaves them.

    Weight and partners are tensors that are filled anew for each batch, so that a compiled network needs no other
    graph for another layer, and nothing waits for the device. In evaluation a seam does nothing.
    """

    def __init__(self) -> None:
        self.weight = torch.ones(())
        self.partner = torch.zeros(0, dtype=torch.int64)

    def set(self, weight: float, partner: Tensor) -> None:
        """Mix the features of the next batch.

        Args:
            weight: a sample's own share, in [0, 1].
            partner: (N,) int64 numbers in the batch, on its device.
        """
        if self.partner.shape != partner.shape or self.partner.device != partner.device:
            self.weight = torch.ones((), device=partner.device)
            self.partner = torch.empty_like(partner)
        self.weight.fill_(weight)
        self.partner.copy_(partner)

    def rest(self) -> None:
        """Leave the features as they are, until the next `set`."""
        self.weight.fill_(1.0)

    def mix(self, x: Tensor) -> Tensor:
        """The features (N, ...) of any floating dtype, mixed; as they are where no batch of N was set."""
        if self.partner.shape[0] != x.shape[0]:
            return x
        return torch.lerp(x[self.partner], x, self.weight.to(x.dtype))


def insert_seams(network: nn.Module, inner: int) -> list[Seam]:
    """Put a seam at the network's input, and one behind each of its first parts; by hooks, so that keys stay.

    The parts are the network's children that hold blocks (the stages of a ResNet, say), or, where there are none,
    its children that have parameters. The last part gets none.

    Args:
        network: changed in place; before it is compiled.
        inner: seams behind parts, at most.
    """
    seams = [Seam()]
    network.register_forward_pre_hook(_AtInput(seams[0]))
    children = [child for child in network.children() if next(child.parameters(), None) is not None]
    stages = [child for child in children if any(len(list(part.children())) > 1 for part in child.children())]
    parts = (stages if len(stages) > 1 else children)[:-1]
    for part in parts[:inner]:
        seams.append(Seam())
        part.register_forward_hook(_Behind(seams[-1]))
    return seams


class _AtInput:
    def __init__(self, seam: Seam) -> None:
        self.seam = seam

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self.seam.mix(args[0]), *args[1:]) if module.training else None


class _Behind:
    def __init__(self, seam: Seam) -> None:
        self.seam = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.seam.mix(output) if module.training and isinstance(output, Tensor) else None
