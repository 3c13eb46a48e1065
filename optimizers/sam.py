"""Sharpness-aware minimisation: SAM (arXiv 2010.01412) and its adaptive form ASAM (arXiv 2102.11600).

The gradient of a step is taken at the weights w + e instead of w, with e the move of length `rho` that raises
the loss the most. There is no optimizer class: both passes live in the closure that any optimizer calls, so
that every optimizer, precision, clipper, schedule and checkpoint sees an ordinary step at w.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, ClassVar, NoReturn

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from crucible.corrections import HALF_PRECISION
from crucible.options import ConfigError
from crucible.technique import Closure, Setting, Step, Technique

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sam(Technique):
    """The gradient is taken where the loss nearby is highest."""

    needs: ClassVar = dict.fromkeys(("adaptive_sam", "sam_rho", "sam_sync", "sam_every"), ("sam",))

    sam: Annotated[
        bool, "take the gradient where the loss nearby is highest; doubles a step's cost (arXiv 2010.01412)"
    ] = False
    adaptive_sam: Annotated[
        bool, "measure the distance relative to each weight's size (arXiv 2102.11600)"
    ] = False
    sam_rho: Annotated[float | None, "[0, inf)", "length of the ascent; null: 0.05, adaptive 0.5"] = None
    sam_sync: Annotated[
        bool, "one ascent from the gradient over all processes; false: one in each process, as in the paper"
    ] = False
    sam_every: Annotated[
        int,
        "[1, inf)",
        "steps from one ascent to the next; those between are plain (SAM-k of arXiv 2203.02714)",
    ] = 1

    @property
    def passes(self) -> float:
        return 1 + 1 / self.sam_every if self.sam else 1.0

    def check(self, setting: Setting) -> None:
        _check_one_batch(setting.accumulate_grad_batches)
        if setting.precision in HALF_PRECISION:
            _refuse_16_bits(f"trainer.precision={setting.precision}")

    def attach(self, step: Step) -> None:
        step.optimizer.append(_check_dtypes)
        step.closure.append(lambda module, closure: sam_closure(module, closure, self))


def _check_one_batch(accumulated: int) -> None:
    if accumulated > 1:
        raise ConfigError(
            f"model.sam=true needs trainer.accumulate_grad_batches=1, got {accumulated}:"
            " the second gradient would be that of the last batch only"
        )


def _check_dtypes(module: Any, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.dtype.itemsize < 4:
                _refuse_16_bits(f"weights of {weight.dtype}")


def _refuse_16_bits(what: str) -> NoReturn:
    raise ConfigError(
        f"model.sam=true: {what} would round most of the ascent's small moves away; use mixed precision or 32-true"
    )


def sam_closure(module: Any, closure: Closure, options: Sam) -> Closure:
    """Lightning's closure of one training step, made into the two passes of SAM.

    Hand the result on in `LightningModule.optimizer_step`. The first pass is the ordinary step: its loss,
    its log and its buffers stay. The second pass starts from the buffers and the random state of the first,
    leaves the gradient and nothing else, and runs with `module.step_pass` at 2 (else 1), so that
    `training_step` can log and count in the first pass only. Hooks around the backward run in both passes,
    `on_before_optimizer_step` once, on the second pass's gradient. With `sam_rho` 0 the step is bitwise the
    plain one. With `sam_every` k only the steps 0, k, 2k, ... of the training are so; on the others the
    closure comes back as it is.

    A first gradient that is not finite (a loss scale too large) gives no ascent: the second pass meets the
    same overflow at the same weights, and the loss scaler skips the step.

    Args:
        module: attached to a trainer, with automatic optimization; its `reseed()` sets all random generators to the
            key of this step, and is called before each pass.
        closure: as Lightning hands it to `optimizer_step`.
        options: those of SAM; `sam` itself is not looked at.

    Raises:
        ConfigError: where a callback has made several batches a step meanwhile.
    """
    _check_one_batch(module.trainer.accumulate_grad_batches)
    if module.trainer.global_step % options.sam_every:
        return closure
    rho = options.sam_rho
    if rho is None:
        rho = 0.5 if options.adaptive_sam else 0.05

    def both_passes() -> Any:
        start = _snapshot(module.buffers())
        strategy = module.trainer.strategy
        per_process = isinstance(strategy, ParallelStrategy) and not options.sam_sync
        module.reseed()
        with strategy.block_backward_sync() if per_process else nullcontext():
            loss = closure()
        if loss is None:  # training_step skipped the batch
            return None
        assert hasattr(closure, "_result"), "Lightning's closure no longer keeps its result in _result"
        result = closure._result
        first = _snapshot(module.buffers())
        weights = ascend(module.parameters(), rho, options.adaptive_sam)
        _copy(start)
        module.step_pass = 2
        try:
            module.reseed()
            closure()
        finally:
            module.step_pass = 1
            restore(weights)
            _copy(first)
        closure._result = result
        return loss

    return both_passes


@torch.no_grad()
def ascend(parameters: Iterable[Tensor], rho: float, adaptive: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Move the parameters that have a gradient g by e, in place, and return them with their former values.

    `e = rho g / |g|`, or `e = rho w^2 g / |w g|` if `adaptive`: the norm is that of all parameters together,
    in float32 or wider. A scale on all gradients cancels. Where the norm is not finite nothing moves.
    Nothing waits for the device.
    """
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    if not pairs:
        return []
    moved, slopes = [p for p, _ in pairs], [grad for _, grad in pairs]
    saved = _snapshot(moved)
    if adaptive:
        slopes = list(torch._foreach_mul(moved, slopes))
    dtype = reduce(torch.promote_types, {s.dtype for s in slopes}, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(slopes, 2, dtype)))
    steps = torch._foreach_mul(slopes, rho / (norm + 1e-12))
    if adaptive:
        torch._foreach_mul_(steps, moved)
    # Zero the bits of the steps, as zero times infinity would be NaN.
    for group in _by_kind([(s, s) for s in steps]).values():
        bits = _BITS[group[0][0].element_size()]
        torch._foreach_mul_([s.view(bits) for s, _ in group], norm.isfinite().to(bits))
    torch._foreach_add_(moved, steps)
    return saved


def restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the former values of `ascend` back: bit by bit, whatever has happened to the gradients since."""
    _copy(saved)


def _snapshot(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = [(t, torch.empty_like(t)) for t in tensors]
    _copy([(copy, t) for t, copy in pairs])
    return pairs


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for group in _by_kind(pairs).values():
        torch._foreach_copy_([target for target, _ in group], [source for _, source in group])


def _by_kind(pairs: list[tuple[Tensor, Tensor]]) -> dict[Any, list[tuple[Tensor, Tensor]]]:
    """Pairs of tensors by dtype and device: what one foreach kernel takes."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair[0].dtype, pair[0].device].append(pair)
    return groups
