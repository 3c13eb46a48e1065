"""Seams inside a network, at which a technique mixes the features of a batch; one graph serves all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Seam:
    """`weight * x + (1 - weight) * x[partner]` of a training batch of features x (N, ...); weight 1 leaves them.

    Weight and partners are tensors that are filled anew for each batch, so that a compiled network needs no other
    graph for another layer, and nothing waits for the device. In evaluation a seam does nothing.

    Args:
        place: where it is, for people: `input`, or the name of the module that it is behind.
    """

    def __init__(self, place: str = "") -> None:
        self.place = place
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
    """Put a seam at the network's input, and one behind each of its first stages; by hooks, so that keys stay.

    A network whose stages cannot be found has them behind its first children that have parameters instead. The last
    stage or child gets none.

    Args:
        network: changed in place; before it is compiled.
        inner: seams behind stages, at most.
    """
    seams = [Seam("input")]
    network.register_forward_pre_hook(_AtInput(seams[0]))
    names = {module: name for name, module in network.named_modules()}
    for part in (_ends_of_stages(network) or _with_parameters(network)[:-1])[:inner]:
        seams.append(Seam(names[part]))
        part.register_forward_hook(_Behind(seams[-1]))
    return seams


def _ends_of_stages(network: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are those of the network's stages, but for the last; none where none are found.

    Where the resolution falls several times within one sequence, of blocks or of layers, the stages are what lies
    between. Else they are the children that hold blocks, or the blocks themselves where a single sequence holds all.
    """
    children = _with_parameters(network)
    holders = [child for child in children if any(_has_blocks(part) for part in child.children())]
    among = [*([network] if holders else []), *(holders or children)]
    sequences = [module for module in among if isinstance(module, nn.Sequential)]
    for sequence in reversed(sequences):  # a stem comes first
        if ends := _before_falls(sequence):
            return ends
    if len(holders) == 1 and sequences:
        return [part for part in sequences[-1].children() if _has_blocks(part)][:-1]
    return holders[:-1]


def _before_falls(sequence: nn.Sequential) -> list[nn.Module]:
    """The parts of a sequence behind which the resolution falls, from its first block on."""
    parts = list(sequence)
    first = next((number for number, part in enumerate(parts) if _has_blocks(part)), 0)
    falls = [number for number in range(first, len(parts)) if _strides(parts[number])]
    # a pool ends a stage, a layer or a block begins one
    ends = [fall - any(True for _ in parts[fall].parameters()) for fall in falls]
    return [parts[end] for end in ends if first <= end < len(parts) - 1]


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    """The children that have parameters; of a list, which never runs itself, its own."""
    children: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            children += _with_parameters(child)
        elif next(child.parameters(), None) is not None:
            children.append(child)
    return children


def _has_blocks(module: nn.Module) -> bool:
    """Whether it is or has a block: several layers together."""
    return any(len(_with_parameters(part)) > 1 for part in module.modules())


def _strides(module: nn.Module) -> bool:
    def largest(stride: Any) -> int:
        return max(stride, default=1) if isinstance(stride, (tuple, list)) else stride

    strides = (largest(getattr(part, "stride", 1)) for part in module.modules())
    return any(isinstance(stride, int) and stride > 1 for stride in strides)


class _AtInput:
    def __init__(self, seam: Seam) -> None:
        self.seam = seam

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self.seam.mix(args[0]), *args[1:]) if module.training else None


class _Behind:
    def __init__(self, seam: Seam) -> None:
        self.seam = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._mixed(output) if module.training else None

    def _mixed(self, output: Any) -> Any:
        if isinstance(output, tuple):  # of octaves, say
            return tuple(map(self._mixed, output))
        return self.seam.mix(output) if isinstance(output, Tensor) else output
