"""Norms: any network's batch norms replaced by batch, sync, ghost, group, layer, instance, switchable or online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from crucible.options import ConfigError
from norms.convert import check_norm_kwargs, convert_norm
from norms.modules import average_running_statistics
from norms.online import (
    OnlineNorm,
    exclude_streams_from_broadcast,
    recomputation_contexts,
    synchronise_streams,
)

NormName = Literal["batch", "sync", "ghost", "group", "layer", "instance", "switchable", "online", "none"]

__all__ = [
    "NormOptions",
    "OnlineNorm",
    "average_running_statistics",
    "check_norm",
    "convert_norm",
    "exclude_streams_from_broadcast",
    "recomputation_contexts",
    "synchronise_streams",
]


@dataclass(frozen=True)
class NormOptions:
    """The options of the norms."""

    norm: Annotated[NormName | None, "norm in place of the network's batch norms; null: as built"] = None
    norm_kwargs: Annotated[
        dict | None, "options of that norm, such as {num_groups: 16}; null: its defaults"
    ] = None


def check_norm(options: NormOptions) -> None:
    """Refuse options that the norm does not take; needs no network.

    Raises:
        ConfigError: naming the option.
    """
    if options.norm is not None:
        check_norm_kwargs(options.norm, options.norm_kwargs or {})
    elif options.norm_kwargs:
        name, value = next(iter(options.norm_kwargs.items()))
        raise ConfigError(f"model.norm_kwargs.{name}={value!r} needs model.norm")
