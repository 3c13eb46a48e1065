"""Norms: any network's batch norms replaced by batch, sync, ghost, group, layer, instance, switchable or online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import nn

from crucible.corrections import Correction, all_of, option_is
from crucible.technique import Setting, Step, Technique
from norms.convert import check_norm_kwargs, convert_norm
from norms.online import (
    OnlineNorm,
    exclude_streams_from_broadcast,
    own_streams,
    recomputation_contexts,
    set_own_streams,
)
from norms.statistics import refresh_statistics, share_buffers
from norms.synchronised import SynchronisedNorms, is_synchronised

NormName = Literal["batch", "sync", "ghost", "group", "layer", "instance", "switchable", "online", "none"]

__all__ = [
    "Norm",
    "OnlineNorm",
    "SynchronisedNorms",
    "convert_norm",
    "exclude_streams_from_broadcast",
    "is_synchronised",
    "own_streams",
    "recomputation_contexts",
    "refresh_statistics",
    "set_own_streams",
    "share_buffers",
]


@dataclass(frozen=True)
class Norm(Technique):
    """Another norm in place of the network's batch norms."""

    needs: ClassVar = {"norm_kwargs": ("norm",)}
    corrections: ClassVar = (
        Correction(
            "model.compile", 2,
            lambda config: option_is("model.compile", True)(config) and option_is("model.norm", "online")(config),
            "under torch 2.11 no gradient passed an online norm that was compiled",
        ),
        Correction(
            "model.norm", 2, option_is("model.norm", "switchable"),
            "switchable norm summed in another order: the last digits differ",
        ),
        Correction(
            "trainer.sync_batchnorm", 2, all_of(is_synchronised, option_is("model.norm", "ghost")),
            "ghost norms took their statistics over all processes",
        ),
    )  # fmt: skip

    norm: Annotated[NormName | None, "in place of the network's batch norms; null: as built"] = None
    norm_kwargs: Annotated[
        dict | None,
        "options of that norm: {alpha_fwd: 0.999}, {num_groups: 16}, {ghost_size: 32}; null: its defaults",
    ] = None

    def check(self, setting: Setting) -> None:
        assert self.norm is not None
        check_norm_kwargs(self.norm, self.norm_kwargs or {})

    def attach(self, step: Step) -> None:
        step.network.append(self._convert)

    def _convert(self, network: nn.Module) -> nn.Module:
        assert self.norm is not None
        return convert_norm(network, self.norm, **(self.norm_kwargs or {}))
