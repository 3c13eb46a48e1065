"""Fine-tuning of a part: layers that keep their weights, for all of the training or until an epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Annotated, Any, ClassVar

from lightning.pytorch.strategies import ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from crucible.batch import Batch
from crucible.console import epoch_named
from crucible.corrections import Correction, all_of, option_is
from crucible.options import ConfigError
from crucible.technique import BatchStage, Closure, Setting, Step, Technique, is_on
from norms import OnlineNorm
from norms.statistics import running_statistics
from optimizers.centralization import GradientCentralization
from optimizers.groups import LayerDecay, depths

log = logging.getLogger("crucible")

BACKBONE = "backbone"


@dataclass(frozen=True)
class Freeze(Technique):
    """A part of the network keeps its weights and its norms' statistics."""

    needs: ClassVar = {"unfreeze_at": ("freeze",)}
    corrections: ClassVar = (
        Correction(
            "model.unfreeze_at", 2, all_of(option_is("model.unfreeze_at"), is_on(GradientCentralization)),
            "gradients of what learns later were not centralised",
        ),
    )  # fmt: skip

    freeze: Annotated[
        str | Annotated[int, "[1, inf)"] | list[str] | None,
        "what keeps its weights: backbone, all but the head; a number, so many layers from the input on; a pattern of "
        "the parameters' names, or a list; null: nothing",
    ] = None
    unfreeze_at: Annotated[int | None, "[1, inf)", "epochs after which all of it learns; null: never"] = None

    @property
    def turns(self) -> Mapping[str, float]:
        return {} if self.unfreeze_at is None else {"unfreeze_at": self.unfreeze_at}

    def check(self, setting: Setting) -> None:
        if isinstance(self.freeze, list) and not self.freeze:
            raise ConfigError("model.freeze=[]: names nothing; null freezes nothing")
        if self.freeze == BACKBONE and self.unfreeze_at is None and setting.of(LayerDecay).on:
            raise ConfigError(
                "model.freeze=backbone: only the head learns, there are no layers whose rates could fall; "
                "model.unfreeze_at=EPOCHS lets them learn"
            )

    def attach(self, step: Step) -> None:
        frozen = Frozen(self.freeze, self.unfreeze_at)
        step.network.append(frozen.find)
        step.optimizer.append(frozen.watch)
        if self.unfreeze_at is not None:
            step.raw.append(BatchStage("freeze", frozen.before_a_batch))
            step.closure.append(frozen.without_gradients)


class Frozen:
    """The frozen part of a network.

    What never learns has no gradients, is in no optimizer's group, and is no matter of DDP's. What learns later is in
    both from the start, so that their order never changes. Until then a process on its own computes no gradients for
    it; under DDP, which has settled whose gradients are exchanged, be it of one process, they are dropped before the
    step, so that neither weight decay nor momentum moves a weight: the numbers are the same. Norms of the part are in
    evaluation mode, whatever mode the network is put into. Dropout goes on.

    Args:
        what: as the option `freeze`.
        until: epochs after which it learns; None: never.
    """

    def __init__(self, what: str | int | Sequence[str] | None, until: int | None) -> None:
        self.what, self.until = what, until
        self.parameters: list[nn.Parameter] = []
        self.norms: dict[str, nn.Module] = {}
        self.holds = False
        self._drops = False
        self._module: Any = None

    def find(self, network: nn.Module) -> nn.Module:
        """Find the part, and hold it.

        Raises:
            ConfigError: where that is nothing, or everything.
        """
        named = dict(network.named_parameters())
        found = self._named(network, named)
        if len(found) in (0, len(named)):
            names = list(named)
            what = "nothing" if not found else "all"
            raise ConfigError(
                f"model.freeze={self.what}: is {what} of the network, whose parameters are {names[0]}, {names[1]}, ... "
                f"{names[-1]}",
                "docs/weights.md",
            )
        self.parameters = [named[name] for name in found]
        held = set(self.parameters)
        self.norms = {}
        for name, module in network.named_modules():
            if running_statistics(module) or isinstance(module, OnlineNorm):
                own = _nearest_parameters(network, name)
                if own and all(p in held for p in own):
                    self.norms[name] = module
        self.hold(True)
        if self.until is None:
            self._learns(False)
        return network

    def _named(self, network: nn.Module, named: dict[str, nn.Parameter]) -> list[str]:
        if isinstance(self.what, int) or self.what == BACKBONE:
            depth = depths(network)
            last = max(depth.values())
            least = 1 if self.what == BACKBONE else last + 1 - int(self.what)
            return [name for name, p in named.items() if depth[p] >= max(1, least)]
        patterns = [self.what] if isinstance(self.what, str) else list(self.what or ())
        found = []
        for pattern in patterns:
            hit = [n for n in named if fnmatch(n, pattern) or fnmatch(n, f"{pattern}.*")]
            if not hit:
                raise ConfigError(
                    f"model.freeze={pattern}: no parameter of the network is named so; its parts are "
                    f"{', '.join(dict(network.named_children()))}",
                    "docs/weights.md",
                )
            found += hit
        return list(dict.fromkeys(found))

    def hold(self, frozen: bool) -> None:
        """Put the part's norms into evaluation mode for as long as it is frozen; else into the network's own mode."""
        self.holds = frozen
        for norm in self.norms.values():
            if frozen:
                norm.eval()
                norm.train = _Stays(norm)  # type: ignore[method-assign]
            else:
                vars(norm).pop("train", None)
                norm.train()

    def _learns(self, does: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(does)

    def watch(self, module: Any, optimizer: Optimizer) -> None:
        """Follow a training, whose optimizer and processes have taken the part in."""
        self._module = module
        here = dict(module.model.named_modules())  # sync_batchnorm has put others in their place
        self.norms = {name: here.get(name, norm) for name, norm in self.norms.items()}
        self.hold(self.holds)
        self._drops = self.until is not None and isinstance(module.trainer.strategy, ParallelStrategy)
        if self.holds and not self._drops:
            self._learns(False)
        share = sum(p.numel() for p in self.parameters) / sum(p.numel() for p in module.model.parameters())
        log.info(
            "frozen%s: %d tensors, %.1f %% of the parameters; %d norms of theirs keep their statistics",
            "" if self.until is None else f" for {self.until} epochs",
            len(self.parameters),
            100 * share,
            len(self.norms),
        )

    def before_a_batch(self, batch: Batch, key: int) -> Batch:
        """Let the part go where its epoch has come; a resumed training comes here, too."""
        assert self.until is not None
        if self._module is None:  # samples are tried before there is a training
            return batch
        if self.holds and self._module.current_epoch >= self.until:
            self.hold(False)
            log.info("%s: what was frozen learns from here on", epoch_named(self._module.current_epoch))
            if not self._drops:
                self._learns(True)
        return batch

    def without_gradients(self, module: Any, closure: Closure) -> Closure:
        """The closure of forward and backward, after which the part has no gradients."""
        if not (self.holds and self._drops):
            return closure

        return _Dropping(closure, self.parameters)


class _Dropping:
    """Lightning's closure, which keeps its result in `_result`, and after which some parameters have no gradients."""

    def __init__(self, closure: Closure, parameters: Sequence[nn.Parameter]) -> None:
        self._closure, self._parameters = closure, parameters

    def __call__(self) -> Any:
        loss = self._closure()
        for parameter in self._parameters:
            parameter.grad = None
        return loss

    @property
    def _result(self) -> Any:
        return self._closure._result  # type: ignore[attr-defined]

    @_result.setter
    def _result(self, result: Any) -> None:
        self._closure._result = result  # type: ignore[attr-defined]


class _Stays:
    """In place of a module's `train`: it stays in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self._module


def _nearest_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """A module's parameters; of one without, those of the nearest module around it that has some."""
    while True:
        if found := list(network.get_submodule(name).parameters()):
            return found
        if not name:
            return []
        name = name.rpartition(".")[0]
