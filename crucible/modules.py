"""Exchanging modules inside a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(network: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put the modules `new`, keyed by the `id` of what they replace, wherever those are; in place.

    Returns:
        the network; what took its place if `network` is itself replaced.
    """
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(network), network)
