"""Optimizers: one builder for the classic ones and every optimizer that timm registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from crucible.options import ConfigError, signature_options, suggest
from optimizers.lookahead import attach_lookahead

__all__ = ["OptimizerOptions", "build_optimizer", "parameter_groups"]

_CLASSIC: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
}  # these need no timm, which takes a second to import
_TIMM_NAMES = {"rmsprop": "rmsproptf"}  # the first seed's Rmsprop has TensorFlow's epsilon, inside the root
_SPELLING = ("SGD", "Adam", "AdamW", "Rmsprop", "Madgrad")
_OWN_OPTIONS = ("params", "lr", "momentum", "nesterov", "weight_decay")


@dataclass(frozen=True)
class OptimizerOptions:
    """The options of the optimizer.

    Raises:
        ConfigError: for an unknown name, or an option that the optimizer does not have or accept.
    """

    optimizer: Annotated[
        str, "SGD, Adam, AdamW, Rmsprop, Madgrad (in any case), or the name of a timm optimizer"
    ] = "SGD"
    lr: Annotated[float, "(0, inf)", "learning rate, which the schedule scales"] = 0.02
    momentum: Annotated[float | None, "[0, 1)", "null: 0.9 where the optimizer has a momentum"] = None
    nesterov: Annotated[bool, "Nesterov momentum, for SGD and its kin"] = False
    weight_decay: Annotated[float, "[0, inf)", "L2 or decoupled, as the optimizer defines it"] = 5e-4
    undecay_norm: Annotated[bool, "no weight decay on norms, biases and other vectors (arXiv 1812.01187)"] = (
        False
    )
    optimizer_kwargs: Annotated[dict[str, Any] | None, "further arguments of the optimizer"] = None
    layer_decay: Annotated[
        float, "(0, 1]", "each layer's learning rate relative to the next one's; 1 is off (arXiv 2003.10555)"
    ] = 1.0
    gradient_centralization: Annotated[
        Literal["all", "conv"] | None,
        "weights whose gradients lose their mean: of convolutions, or of linear layers too (arXiv 2004.01461)",
    ] = None
    lookahead: Annotated[bool, "every k steps, go back a part of the way (arXiv 1907.08610)"] = False
    lookahead_k: Annotated[int, "[1, inf)", "steps between Lookahead's synchronisations"] = 5
    lookahead_alpha: Annotated[float, "(0, 1]", "the part of the way that Lookahead keeps"] = 0.5

    def __post_init__(self) -> None:
        for name in ("lookahead_k", "lookahead_alpha"):
            if getattr(self, name) != getattr(OptimizerOptions, name) and not self.lookahead:
                raise ConfigError(f"model.{name}={getattr(self, name)} needs model.lookahead=true")
        _construct(self, [nn.Parameter(torch.zeros(1, 1))])  # a trial: a bad argument ends the run here


def build_optimizer(module: nn.Module, options: OptimizerOptions) -> Optimizer:
    """The optimizer of `module`'s trainable parameters, with Lookahead where asked for.

    On CUDA, SGD, Adam and AdamW run fused; the others choose for themselves, mostly foreach.
    `gradient_centralization` acts before clipping, so outside the optimizer: `optimizers.centralization`.

    Raises:
        ConfigError: where nothing is trainable, or `layer_decay` meets a single layer.
    """
    optimizer = _construct(options, parameter_groups(module, options))
    if options.lookahead:
        attach_lookahead(optimizer, options.lookahead_k, options.lookahead_alpha)
    return optimizer


def parameter_groups(module: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """The trainable parameters of `module` as optimizer groups: each once, in the module's order.

    With `undecay_norm` there are two groups, first the decayed parameters, then without weight decay those of
    norms and all of fewer than two dimensions (biases, scales), told by module type and shape, not by name.
    With `layer_decay` there are as many groups for each layer, the head's first, with the learning rate
    `lr * layer_decay ** (layers behind it)`. An empty group is left out.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model: no parameter is trainable, there is nothing to optimize")
    spared = _vectors(module) if options.undecay_norm else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p not in spared], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p in spared], "weight_decay": 0.0},
    ]
    if options.layer_decay < 1:
        depth = _depths(module)
        depths = sorted({depth[p] for p in parameters})
        if len(depths) == 1:
            raise ConfigError(
                f"model.layer_decay={options.layer_decay}: all trainable parameters are in one layer"
            )
        groups = [
            {
                **group,
                "params": [p for p in group["params"] if depth[p] == d],
                "lr": options.lr * options.layer_decay**d,
            }
            for d in depths
            for group in groups
        ]
    return [group for group in groups if group["params"]]


def _vectors(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of norms, which may have several dimensions, and all of fewer than two."""
    norms = [m for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    return {p for norm in norms for p in norm.parameters()} | {p for p in module.parameters() if p.ndim < 2}


def _depths(module: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers lie behind each parameter, in the network that `module` is or wraps.

    Networks of timm say what their layers are. Elsewhere the network's children are, in their order, with
    those of `Sequential` and `ModuleList` one by one: a ResNet's stem, each residual block, its head. A child
    without a matrix or kernel (a norm) belongs to the layer before it, the network's own parameters (position
    embeddings) to the first.
    """
    network = module
    while not hasattr(network, "group_matcher"):
        parts = [child for child in network.children() if next(child.parameters(), None) is not None]
        if len(parts) != 1 or next(network.parameters(recurse=False), None) is not None:
            break
        network = parts[0]
    if hasattr(network, "group_matcher"):
        from timm.models import group_parameters

        matcher = network.group_matcher(coarse=False)  # type: ignore[operator]
        by_name = group_parameters(network, matcher, reverse=True)
        last = max(by_name.values())  # that of what timm leaves out
        layer = {p: by_name.get(name, last) for name, p in network.named_parameters()}
    else:
        layer, vectors, last, begun = {}, _vectors(network), 0, False
        for child in _children(network):
            if any(p not in vectors for p in child.parameters()):
                last += begun
                begun = True
            layer.update({p: last for p in child.parameters() if p not in layer})
    head = max(layer.values(), default=0)
    return {p: head - layer.get(p, 0) for p in module.parameters()}


def _children(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _children(child)
        else:
            yield child


def _construct(options: OptimizerOptions, parameters: list[Any]) -> Optimizer:
    optimizer_class, arguments = _resolve(options)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    if optimizer_class in _CLASSIC.values() and first.is_cuda and not {"foreach", "fused"} & set(arguments):
        arguments["fused"] = True
    try:
        optimizer = optimizer_class(parameters, lr=options.lr, weight_decay=options.weight_decay, **arguments)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.optimizer={options.optimizer} refuses its arguments: {error} ({arguments})"
        ) from error
    if arguments.get("fused"):
        # A fused step would unscale by itself: too late for what reads or clips the gradients before it.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _resolve(options: OptimizerOptions) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The class and its arguments besides `lr` and `weight_decay`, or a `ConfigError`."""
    optimizer_class, arguments = _look_up(options.optimizer)
    known = signature_options(optimizer_class)
    for name, value in (options.optimizer_kwargs or {}).items():
        if name in _OWN_OPTIONS:
            raise ConfigError(f"model.optimizer_kwargs.{name}={value!r}: this is set as model.{name}")
        if name not in known:
            hint = suggest(name, set(known) - set(_OWN_OPTIONS))
            raise ConfigError(
                f"model.optimizer_kwargs.{name}={value!r}: {options.optimizer} has no such argument{hint}"
            )
        arguments[name] = value
    if options.momentum is not None:
        arguments["momentum"] = options.momentum
    if options.nesterov:
        arguments["nesterov"] = True
    for name in ("momentum", "nesterov"):
        if name in arguments and name not in known:
            raise ConfigError(f"model.{name}={arguments[name]!r}: {options.optimizer} has no {name}")
    return optimizer_class, arguments


def _look_up(name: str) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The optimizer class behind a name, and the arguments that the name implies."""
    key = name.lower()
    if key in _CLASSIC:
        return _CLASSIC[key], {"momentum": 0.9} if key == "sgd" else {}
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    key = _TIMM_NAMES.get(key, key)
    registered = [str(n) for n in list_optimizers()]
    if key not in registered:
        raise ConfigError(f"model.optimizer={name!r} is unknown{suggest(name, (*_SPELLING, *registered))}")
    info = get_optimizer_info(key)
    if info.second_order:
        raise ConfigError(f"model.optimizer={name} needs second derivatives, which no training step computes")
    try:
        optimizer_class = get_optimizer_class(key, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"model.optimizer={name} is not available here: {error}") from error
    implied = {"momentum": 0.9} if info.has_momentum else {}
    return optimizer_class, {**implied, **(info.defaults or {})}
