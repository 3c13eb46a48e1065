"""The statistics that norms keep for evaluation: taken anew for other weights, and alike on all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crucible.machine import wide
from norms.online import STREAMS, OnlineNorm, synchronise_streams


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The floating buffers `running_*` of a norm whose `momentum` is a batch's weight in them; else none.

    Torch's batch and instance norms are of that kind, with all that is derived from them, and switchable norms.
    """
    momentum = getattr(module, "momentum", "none")
    if not (momentum is None or isinstance(momentum, (int, float))):
        return []
    return [
        buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("running_") and buffer.is_floating_point()
    ]


@torch.no_grad()
def refresh_statistics(
    network: nn.Module,
    inputs: Iterable[Tensor],
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Take all norms' statistics anew from forward passes, for weights that they were not gathered with.

    Norms with running statistics get the plain mean over the batches, of all processes, of what each batch would
    bring into them, summed in float32 or wider; online norms mean and variance of the union of the samples. What
    the network leaves as it is in training (norms in eval mode or of momentum 0) stays. Nothing waits.

    Args:
        network: in any mode, which it keeps. A compiled one runs uncompiled.
        inputs: `(N, C, *spatial)` batches of it; as many in each process.
        forward: what each forward pass, and not the making of its input, is to run in.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.train()
    training = [module for module in network.modules() if module.training]
    kept: list[_Running | _Streamed] = [
        _Running(m) for m in training if running_statistics(m) and m.momentum != 0
    ]
    kept += [_Streamed(m) for m in training if isinstance(m, OnlineNorm)]
    try:
        with _uncompiled(network) if kept else nullcontext():
            for input in inputs if kept else ():
                with forward():
                    network(input)
    finally:
        for statistics in kept:
            statistics.close()
        for module, mode in modes:
            module.training = mode
    average_running_statistics(network)
    synchronise_streams(network)


def _uncompiled(network: nn.Module) -> AbstractContextManager[Any]:
    # a momentum that differs in each pass would compile it anew each time
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class _Running:
    """Hooks by which a norm's running statistics become the mean over its calls."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.momentum, self.calls = norm, norm.momentum, 0
        self.buffers = running_statistics(norm)
        # a mean that is stepped in half precision would lose the later batches
        self.sums = [torch.zeros_like(b, dtype=torch.float32) for b in self.buffers if b.element_size() < 4]
        self.hooks = [norm.register_forward_pre_hook(self.before), norm.register_forward_hook(self.after)]

    def before(self, norm: Any, args: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            counter = getattr(norm, "num_batches_tracked", None)
            for buffer in (*self.buffers, *(() if counter is None else (counter,))):
                buffer.zero_()
        norm.momentum = 1.0 if self.sums else 1 / self.calls

    def after(self, norm: Any, args: Any, output: Any) -> None:
        for total, buffer in zip(self.sums, self.buffers, strict=False):
            total += buffer

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.norm.momentum = self.momentum
        for total, buffer in zip(self.sums, self.buffers, strict=False):
            if self.calls:
                buffer.copy_(total / self.calls)


class _Streamed:
    """A hook by which an online norm evaluates with the mean and variance of all samples so far, the batch's too.

    Its own streams would carry what they began with, the average over the training, through the first thousands
    of samples.
    """

    def __init__(self, norm: OnlineNorm) -> None:
        norm.eval()
        self.moments = torch.zeros(2, norm.num_features, dtype=wide(norm.m.device), device=norm.m.device)
        self.samples = 0
        self.hook = norm.register_forward_pre_hook(self.before)

    def before(self, norm: Any, args: tuple[Tensor, ...]) -> None:
        (input,) = args
        dims = [d for d in range(input.ndim) if d != 1]
        var, mean = torch.var_mean(input if input.element_size() >= 4 else input.float(), dims, correction=0)
        mean, var = mean.to(self.moments.dtype), var.to(self.moments.dtype)
        self.samples += len(input)
        self.moments += len(input) * torch.stack((mean, var + mean**2))
        mean, square = self.moments / self.samples
        norm.m.copy_(mean)
        norm.var.copy_((square - mean**2).clamp_min(0))

    def close(self) -> None:
        self.hook.remove()


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


@torch.no_grad()
def average_running_statistics(network: nn.Module) -> None:
    """Give all processes the mean of their norms' running statistics; alone, does nothing."""
    tensors = [] if _alone() else [b for m in network.modules() for b in running_statistics(m)]
    if tensors:
        flat = torch.cat([b.float().flatten() for b in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([b.numel() for b in tensors])
        for buffer, part in zip(tensors, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Give all processes the network's buffers as a checkpoint has them; alone, does nothing.

    They are the first process's, as DDP hands them out before a forward; an average of weights, which DDP does not
    know, has had each process's own. Of online norms' streams, where each process has a part, it is
    `synchronise_streams`.
    """
    if _alone():
        return
    streams = {
        id(getattr(m, name)) for m in network.modules() if isinstance(m, OnlineNorm) for name in STREAMS
    }
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        if id(buffer) not in streams:
            kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        flat = torch.cat([b.flatten() for b in buffers])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
    synchronise_streams(network)
