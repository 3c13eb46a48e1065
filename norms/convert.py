"""Give any network another norm."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crucible.modules import replace_modules
from crucible.options import ConfigError, check_value, signature_options, suggest
from crucible.private import AnyBatchNorm
from norms.modules import (
    BatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    NoNorm,
    SwitchNorm,
    SyncBatchNorm,
)
from norms.online import OnlineNorm

NORMS: dict[str, type[nn.Module]] = {
    "batch": BatchNorm,
    "sync": SyncBatchNorm,
    "ghost": GhostBatchNorm,
    "group": GroupNorm,
    "layer": LayerNorm,
    "instance": InstanceNorm,
    "switchable": SwitchNorm,
    "online": OnlineNorm,
    "none": NoNorm,
}
_CONVERTIBLE: tuple[type, ...] = (AnyBatchNorm, *NORMS.values())


def norm_options(norm: str) -> dict[str, tuple[Any, Any]]:
    """`{name: (annotation, default)}` of what `model.norm_kwargs` may hold for a norm."""
    options = signature_options(NORMS[norm])
    return {name: option for name, option in options.items() if name not in ("num_features", "affine")}


def check_norm_kwargs(norm: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs`, each checked against what the norm takes.

    Raises:
        ConfigError: for an unknown norm, an option that it does not have, or a bad value.
    """
    if norm not in NORMS:
        raise ConfigError(
            f"model.norm must be one of {', '.join(NORMS)}, got {norm!r}{suggest(str(norm), NORMS)}"
        )
    known = norm_options(norm)
    checked = {}
    for name, value in kwargs.items():
        option = f"model.norm_kwargs.{name}"
        if name not in known:
            hint = suggest(name, known) or ": it has none"
            raise ConfigError(f"{option}={value!r}: model.norm={norm} has no such option{hint}")
        checked[name] = check_value(option, value, known[name][0])
    return checked


def convert_norm(network: nn.Module, norm: str, **kwargs: Any) -> nn.Module:
    """Replace every norm of the batch kind by `norm`, in place, for input of any dimension.

    The batch kind: `nn.BatchNorm1d|2d|3d`, `nn.SyncBatchNorm`, their subclasses (timm's `BatchNormAct2d` keeps
    its fused dropout and activation) and whatever this function made. Other norms that the network was built
    with, such as the LayerNorms of a ConvNeXt or a transformer, are part of its design and stay.

    Scale and shift stay the same parameters (so zero-initialised norms stay zero); eps and momentum are kept
    unless given; running statistics pass between batch, sync, ghost, switchable and online norms; so do
    device, dtype and training mode. `none` drops all of these, and makes activations out-of-place: after an
    identity, they would overwrite what a skip connection still needs.

    Args:
        network: changed in place.
        norm: batch, sync, ghost, group, layer, instance, switchable, online or none.
        kwargs: options of the norm, such as `num_groups` or `alpha_fwd`.

    Returns:
        The network; the new norm if `network` is itself a norm.

    Raises:
        ConfigError: for an unknown norm or option, channels that `num_groups` does not divide, or a network
            without a norm to convert.
    """
    checked = check_norm_kwargs(norm, kwargs)
    found: dict[str, Any] = {
        name: module for name, module in network.named_modules() if isinstance(module, _CONVERTIBLE)
    }
    if not found:
        raise ConfigError(f"model.norm={norm}: {type(network).__name__} has no norm to convert")
    if norm == "group":
        groups = checked.get("num_groups", norm_options(norm)["num_groups"][1])
        common = math.gcd(*(module.num_features for module in found.values()))
        for name, module in found.items():
            if module.num_features % groups:
                raise ConfigError(
                    f"model.norm_kwargs.num_groups must divide {common}, as it must divide every norm's channels,"
                    f" got {groups}: {name or type(network).__name__} has {module.num_features}"
                )
    like = next(network.parameters(), None)
    new = {id(module): _converted(module, norm, checked, like) for module in found.values()}
    network = replace_modules(network, new)
    if norm == "none":
        in_place: list[Any] = [m for m in network.modules() if getattr(m, "inplace", False) is True]
        for module in in_place:
            module.inplace = False
    return network


def _converted(source: Any, norm: str, kwargs: Mapping[str, Any], like: Tensor | None) -> nn.Module:
    """The norm that takes the place of `source`; of the device and dtype of `like` if `source` holds none."""
    takes = inspect.signature(NORMS[norm]).parameters
    kept_options = [name for name in ("eps", "momentum") if name in takes and hasattr(source, name)]
    values: dict[str, Any] = {name: getattr(source, name) for name in kept_options}
    if values.get("momentum", 0.0) is None and norm == "switchable":
        del values["momentum"]  # it has no plain average
    values |= kwargs
    scale: Tensor | None = getattr(source, "weight", None)
    if "affine" in takes:
        # an identity has lost its scale and shift: they start anew
        values["affine"] = isinstance(source, NoNorm) or scale is not None
    target: Any = NORMS[norm](source.num_features, **values)
    like = next((t for t in [*source.parameters(), *source.buffers()] if t.is_floating_point()), like)
    if like is not None:
        target.to(device=like.device, dtype=like.dtype)
    if scale is not None and "affine" in takes:
        target.weight, target.bias = scale, source.bias
    old, new = _statistics(source), _statistics(target)
    if old is not None and new is not None:
        with torch.no_grad():
            for mine, theirs in zip(new, old, strict=True):
                mine.copy_(theirs)
    if isinstance(target, AnyBatchNorm) and getattr(source, "num_batches_tracked", None) is not None:
        target.num_batches_tracked.copy_(source.num_batches_tracked)  # type: ignore[union-attr]
    if isinstance(getattr(source, "act", None), nn.Module):
        target.drop, target.act = getattr(source, "drop", nn.Identity()), source.act
        target.register_forward_hook(drop_and_activate)
    return target.train(source.training)


def drop_and_activate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The hook of a norm that stands for one with dropout and activation within it."""
    return module.act(module.drop(output))  # type: ignore[operator]


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and variance per channel that evaluation uses; None for a norm without them."""
    if isinstance(norm, OnlineNorm):
        return norm.m, norm.var
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    return None if mean is None or var is None else (mean, var)
