"""Batch norms that take their statistics over the batches of all processes, for as long as these train together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from crucible.corrections import option_is
from crucible.machine import world_size
from crucible.modules import replace_modules
from crucible.private import AnyBatchNorm
from norms.convert import convert_norm, drop_and_activate
from norms.modules import GhostBatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def is_synchronised(config: Mapping[str, Any]) -> bool:
    """Whether the batch norms of a plain, resolved configuration are synchronised."""
    return option_is("trainer.sync_batchnorm")(config) and world_size(config["trainer"]) > 1


class SynchronisedNorms(LayerSync):
    """`trainer.sync_batchnorm`: what is a batch norm to the formula becomes one over all processes.

    Lightning's own exchanges whatever is of the class, and so loses the activations that timm's norms have within
    them, and turns ghost norms into their opposite. Here dropout, activation and hooks stay, and a norm with a forward
    pass of its own stays what it is.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []  # what was there, and what stands for it

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with synchronised norms in place, of the same parameters."""
        self._pairs = [(norm, _synchronised(norm)) for norm in model.modules() if _is_plain(norm)]
        return replace_modules(model, {id(old): new for old, new in self._pairs})

    def revert(self, model: nn.Module) -> nn.Module:
        """The model with the norms that were there, which have the statistics gathered meanwhile."""
        pairs, self._pairs = self._pairs, []
        with torch.no_grad():
            for old, new in pairs:
                for name in _BUFFERS:
                    if (kept := getattr(old, name)) is not None:
                        setattr(old, name, getattr(new, name).detach().to(kept.dtype))
                old.train(new.training)
        return replace_modules(model, {id(new): old for old, new in pairs})


def _is_plain(norm: nn.Module) -> bool:
    if not isinstance(norm, AnyBatchNorm) or isinstance(norm, (nn.SyncBatchNorm, GhostBatchNorm)):
        return False
    fused = isinstance(getattr(norm, "act", None), nn.Module)  # timm's, with dropout and activation
    return fused or type(norm).forward is AnyBatchNorm.forward


def _synchronised(norm: Any) -> Any:
    new: Any = convert_norm(norm, "sync")
    for hook in norm._forward_hooks.values():
        if hook is not drop_and_activate:  # which the conversion has seen to
            new.register_forward_hook(hook)
    if norm.running_mean is None:
        new.track_running_stats = False
        for name in _BUFFERS:
            setattr(new, name, None)
    return new
