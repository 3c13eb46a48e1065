"""Whether tensors are finite, asked once for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from crucible.machine import wide


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from tensors_in(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from tensors_in(part)


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all floating numbers are finite; one kernel for many tensors, and one wait for each device."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    extremes: dict[torch.device, list[Tensor]] = {}
    for (device, _), group in groups.items():  # not sums, which overflow
        if device.type == "cpu":  # whose norms take ten times as long
            found = [extreme for tensor in group for extreme in torch.aminmax(tensor)]
        else:
            found = list(torch._foreach_norm(group, math.inf))
        extremes.setdefault(device, []).extend(value.to(wide(device)) for value in found)
    return all(bool(torch.stack(values).isfinite().all()) for values in extremes.values())
