"""Lookahead (Zhang et al., arXiv 1907.08610): every k steps the weights go back a part of the way they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from crucible.options import ConfigError
from crucible.technique import Step, Technique

__all__ = ["Lookahead", "attach_lookahead"]

_KEY = "lookahead"


@dataclass(frozen=True)
class Lookahead(Technique):
    """Every k steps the weights go back a part of the way."""

    needs: ClassVar = {"lookahead_k": ("lookahead",), "lookahead_alpha": ("lookahead",)}

    lookahead: Annotated[bool, "every k steps, go back a part of the way (arXiv 1907.08610)"] = False
    lookahead_k: Annotated[int, "[1, inf)", "steps between Lookahead's synchronisations"] = 5
    lookahead_alpha: Annotated[float, "(0, 1]", "the part of the way that Lookahead keeps"] = 0.5

    def attach(self, step: Step) -> None:
        def follow(module: Any, optimizer: Optimizer) -> None:
            lookahead = attach_lookahead(optimizer, self.lookahead_k, self.lookahead_alpha)
            step.kept.append(lambda: [*lookahead.slow, *_parameters(optimizer)])

        step.optimizer.append(follow)


def attach_lookahead(optimizer: Optimizer, k: int, alpha: float) -> _Lookahead:
    """Make `optimizer` the inner optimizer of Lookahead, in place.

    As in the paper, the slow weights start at the weights before the first step, and after every k-th step

        slow <- slow + alpha (fast - slow),    fast <- slow.

    Only steps that the optimizer performs count: one that a loss scaler skips is no step. The optimizer's own
    state (momentum) is kept at a synchronisation, the paper's default. What trains, is evaluated and is saved
    as the model are the fast weights, which equal the slow ones after every k-th step.

    Slow weights and count travel in the optimizer's `state_dict()` under a key of their own, so that the
    state of the inner optimizer stays as it knows it. Like every hook, Lookahead is not part of a deep copy or
    pickle of the optimizer: attach it to a new one and load the state.

    Args:
        optimizer: any; before its first step.
        k: steps between synchronisations, at least 1.
        alpha: step of the slow weights, in (0, 1]; 1 leaves the inner optimizer as it is.

    Raises:
        ConfigError: from `optimizer.load_state_dict`, for a state that was saved without Lookahead.
    """
    return _Lookahead(optimizer, k, alpha)


class _Lookahead:
    def __init__(self, optimizer: Optimizer, k: int, alpha: float) -> None:
        self.k, self.alpha = k, alpha
        self.steps = 0  # a Python number: nothing on the device is asked whether to synchronise
        self.slow: list[Tensor] = []  # in the order of the parameters in their groups
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _start(self, optimizer: Optimizer, *_: Any) -> None:
        # at the first step, not before: weights may be loaded, moved or laid out anew until then
        if not self.slow:
            self.slow = [p.detach().clone() for p in _parameters(optimizer)]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.k == 0:
            fast = _parameters(optimizer)
            torch._foreach_lerp_(self.slow, fast, self.alpha)
            torch._foreach_copy_(fast, self.slow)

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state[_KEY] = {"steps": self.steps, "slow": self.slow}

    @torch.no_grad()
    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if _KEY not in state:
            raise ConfigError(
                "model.lookahead=true: the training state to resume was saved without Lookahead"
            )
        self.steps = state[_KEY]["steps"]
        saved = state[_KEY]["slow"]  # empty before the first step
        self.slow = [
            torch.empty_like(p).copy_(slow)
            for p, slow in zip(_parameters(optimizer) if saved else [], saved, strict=True)
        ]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
