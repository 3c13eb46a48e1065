"""Optimizers: one builder for the classic ones and every optimizer that timm registers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from crucible.options import ConfigError, check_value, shown, signature_options, suggest
from crucible.private import unscale_outside_the_step

__all__ = ["OptimizerOptions", "build_optimizer"]

Regroup = Callable[[nn.Module, list[dict[str, Any]]], list[dict[str, Any]]]

_CLASSIC: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
}  # these need no timm, which takes a second to import
_TIMM_NAMES = {"rmsprop": "rmsproptf"}  # the first seed's Rmsprop has TensorFlow's epsilon, inside the root
_SPELLING = ("SGD", "Adam", "AdamW", "Rmsprop", "Madgrad")
_NAME = "optimizer"  # in a state, that of the class
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
    optimizer_kwargs: Annotated[dict[str, Any] | None, "further arguments of the optimizer"] = None

    def __post_init__(self) -> None:
        # a trial: a bad argument ends the run here
        weight = nn.Parameter(torch.zeros(1, 1))
        optimizer = _construct(self, [weight])
        if self.optimizer_kwargs and not self.optimizer_kwargs.get("capturable"):  # which a CPU cannot try
            weight.grad = torch.zeros_like(weight)
            with _refusing(self, self.optimizer_kwargs):
                optimizer.step()

    @property
    def momentum_in_use(self) -> float | None:
        """That of the optimizer, its own where none is given; None where it has none."""
        return _resolve(self)[1].get("momentum")


def build_optimizer(
    module: nn.Module, options: OptimizerOptions, regroup: Sequence[Regroup] = ()
) -> Optimizer:
    """The optimizer of `module`'s trainable parameters.

    On CUDA, SGD, Adam and AdamW run fused; the others choose for themselves, mostly foreach.

    Args:
        module: with the network.
        options: of the optimizer.
        regroup: what techniques make of its groups of parameters (the stage `groups`).

    Raises:
        ConfigError: where nothing is trainable.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model: no parameter is trainable, there is nothing to optimize")
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": options.lr, "weight_decay": options.weight_decay}
    ]
    for change in regroup:
        groups = change(module, groups)
    return _construct(options, [group for group in groups if group["params"]])


def _construct(options: OptimizerOptions, parameters: list[Any]) -> Optimizer:
    optimizer_class, arguments = _resolve(options)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    if optimizer_class in _CLASSIC.values() and first.is_cuda and not {"foreach", "fused"} & set(arguments):
        arguments["fused"] = True
    with _refusing(options, arguments):
        optimizer = optimizer_class(parameters, lr=options.lr, weight_decay=options.weight_decay, **arguments)
    if arguments.get("fused"):
        # A fused step would unscale by itself: too late for what reads or clips the gradients before it.
        unscale_outside_the_step(optimizer)
    optimizer.register_state_dict_post_hook(_sign)
    optimizer.register_load_state_dict_pre_hook(_keep_what_is_configured)
    return optimizer


@contextlib.contextmanager
def _refusing(options: OptimizerOptions, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Optimizers refuse by whatever their first use of a bad argument raises."""
    try:
        yield
    except Exception as error:
        of = (
            f"model.optimizer_kwargs={shown(dict(options.optimizer_kwargs))}"
            if options.optimizer_kwargs
            else arguments
        )
        raise ConfigError(
            f"model.optimizer={options.optimizer} refuses its arguments: {' '.join(str(error).split())} ({of})"
        ) from error


def _sign(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state[_NAME] = type(optimizer).__name__


def _keep_what_is_configured(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state gives moments and counters; the arguments of the optimizer are those it was built with.

    Some optimizers count in their groups, so that what is no argument of theirs is the state's.

    Raises:
        ConfigError: for a state of another optimizer, or of other groups of parameters.
    """
    groups, saved = optimizer.param_groups, state["param_groups"]
    arguments = {name for kind in type(optimizer).__mro__[:-1] for name in signature_options(kind)}
    own, theirs = ({name for group in part for name in group} for part in (groups, saved))
    name = type(optimizer).__name__
    # states of before 0.2 have no name in them
    if state.get(_NAME, name) != name or ((own & arguments) - theirs and (theirs - own) - {"initial_lr"}):
        raise ConfigError(
            f"model.optimizer: the training state is of {state.get(_NAME, 'another optimizer')}, whose moments mean "
            f"nothing to {name}"
        )
    sizes, saved_sizes = ([len(group["params"]) for group in part] for part in (groups, saved))
    if sizes != saved_sizes:
        raise ConfigError(
            f"model: the training state's optimizer has {_in_words(saved_sizes)}, this one {_in_words(sizes)}; "
            "what groups parameters (model.undecay_norm, model.layer_decay) must be as it was"
        )
    given = (arguments - {"params"}) | {"initial_lr"}  # the latter by the schedule
    kept = [
        {
            **group,
            **{k: v for k, v in old.items() if k not in given},
        }  # with the state's numbers of parameters
        for old, group in zip(saved, groups, strict=True)
    ]
    return {**state, "param_groups": kept}


def _in_words(sizes: list[int]) -> str:
    if len(sizes) == 1:
        return f"one group of {sizes[0]} tensors"
    return f"{len(sizes)} groups of {', '.join(map(str, sizes))} tensors"


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
        arguments[name] = check_value(f"model.optimizer_kwargs.{name}", value, known[name][0])
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
