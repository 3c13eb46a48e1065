"""Which parameters the optimizer treats alike: no decay on norms (arXiv 1812.01187), rates by layer (2003.10555)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from typing import Annotated, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from crucible.configuration import find_target
from crucible.corrections import Correction
from crucible.keyed import keyed_rng
from crucible.options import ConfigError
from crucible.technique import Step, Technique

Groups = list[dict[str, Any]]


def _spares_what_a_network_exempts(config: Mapping[str, Any]) -> bool:
    model = config["model"]
    if not model.get("undecay_norm"):
        return False
    # neither the seed nor weights from elsewhere say which parameters there are
    options = {k: v for k, v in model.items() if k not in ("seed", "init_from")}
    return _exempts(json.dumps({**options, **({"pretrained": False} if options.get("pretrained") else {})}))


@cache
def _exempts(options: str) -> bool:
    """Whether the network of these `model.*` options exempts a parameter that is no vector and of no norm."""
    arguments = json.loads(options)
    target = find_target(arguments.pop("_target_"), "model._target_")
    try:
        with torch.device("meta"):
            network = target(**arguments)
    except (NotImplementedError, RuntimeError):  # a constructor that looks at its weights
        with keyed_rng(0):
            network = target(**arguments)
    return not exempt_parameters(network) <= _vectors(network)


@dataclass(frozen=True)
class UndecayNorm(Technique):
    """No weight decay on norms and biases."""

    corrections: ClassVar = (
        Correction(
            "model.undecay_norm", 2, _spares_what_a_network_exempts,
            "what the network itself exempts was decayed: class tokens, position embeddings, tables of biases",
        ),
    )  # fmt: skip

    undecay_norm: Annotated[
        bool,
        "no weight decay on norms, biases and other vectors (arXiv 1812.01187), and on what a network exempts itself",
    ] = False

    def attach(self, step: Step) -> None:
        step.groups.append(spare_vectors)


@dataclass(frozen=True)
class LayerDecay(Technique):
    """Each layer learns slower than the one after it."""

    layer_decay: Annotated[
        float, "(0, 1]", "each layer's learning rate relative to the next one's; 1 is off (arXiv 2003.10555)"
    ] = 1.0

    def attach(self, step: Step) -> None:
        step.groups.append(lambda module, groups: decay_by_layer(module, groups, self.layer_decay))


@dataclass(frozen=True)
class HeadRate(Technique):
    """The head has a learning rate of its own."""

    head_lr_scale: Annotated[
        float, "(0, inf)", "the head's learning rate relative to the body's, for fine-tuning; 1 is off"
    ] = 1.0

    def attach(self, step: Step) -> None:
        step.groups.append(lambda module, groups: scale_head(module, groups, self.head_lr_scale))


def scale_head(module: nn.Module, groups: Groups, factor: float) -> Groups:
    """Each group in two: the body's, then the head's with `lr * factor`. The head is the last layer (`depths`)."""
    depth = depths(module)
    return [
        part
        for group in groups
        for part in (
            {**group, "params": [p for p in group["params"] if depth[p] > 0]},
            {**group, "params": [p for p in group["params"] if depth[p] == 0], "lr": group["lr"] * factor},
        )
    ]


def spare_vectors(module: nn.Module, groups: Groups) -> Groups:
    """Each group in two: first what is decayed, then without weight decay the norms' parameters and all of fewer
    than two dimensions (biases, scales), told by module type and shape, not by name, and what a network exempts."""
    spared = _vectors(module) | exempt_parameters(module)
    return [
        part
        for group in groups
        for part in (
            {**group, "params": [p for p in group["params"] if p not in spared]},
            {**group, "params": [p for p in group["params"] if p in spared], "weight_decay": 0.0},
        )
    ]


def exempt_parameters(module: nn.Module) -> set[nn.Parameter]:
    """What networks exempt from weight decay themselves: class tokens, position embeddings, tables of biases.

    By the method of timm's networks, `no_weight_decay()`: names of parameters, with wildcards. Of networks within one
    another the outermost that has it speaks; a part of a network does not, though some layers of timm have the method.
    """
    return _exempt(module, within=False)


def _exempt(module: nn.Module, within: bool) -> set[nn.Parameter]:
    is_network = not within or hasattr(module, "num_classes")
    if is_network and callable(names := getattr(module, "no_weight_decay", None)):
        patterns = list(names())
        return {p for name, p in module.named_parameters() if any(fnmatch(name, each) for each in patterns)}
    holds_networks = isinstance(module, (LightningModule, nn.ModuleDict, nn.ModuleList))
    within = within or not holds_networks
    return {p for child in module.children() for p in _exempt(child, within)}


def decay_by_layer(module: nn.Module, groups: Groups, decay: float) -> Groups:
    """The groups once for each layer, the head's first, with the rate `lr * decay ** (layers behind it)`.

    Raises:
        ConfigError: where all parameters are in one layer.
    """
    depth = depths(module)
    found = sorted({depth[p] for group in groups for p in group["params"]})
    if len(found) == 1:
        raise ConfigError(f"model.layer_decay={decay}: all trainable parameters are in one layer")
    return [
        {**group, "params": [p for p in group["params"] if depth[p] == d], "lr": group["lr"] * decay**d}
        for d in found
        for group in groups
    ]


def _vectors(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of norms, which may have several dimensions, and all of fewer than two."""
    norms = [m for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    return {p for norm in norms for p in norm.parameters()} | {p for p in module.parameters() if p.ndim < 2}


def depths(module: nn.Module) -> dict[nn.Parameter, int]:
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
