"""The open window of gradient accumulation in a training state: a stop between two of its batches loses nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from crucible.options import ConfigError

_KEY = "accumulation"


def pending_batches(trainer: Any) -> int:
    """How many batches have added their gradients to the step to come; 0 between two steps."""
    batch = _place_in_the_epoch(trainer)
    return batch % trainer.accumulate_grad_batches


def _place_in_the_epoch(trainer: Any) -> int:
    """Batches of the epoch that is under way; 0 between two epochs."""
    loop = trainer.fit_loop
    epoch, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    inside = epoch.started > epoch.processed and batches.processed < trainer.num_training_batches
    return batches.processed if inside else 0


def group_factor(trainer: Any, batch: int) -> float:
    """What makes the gradient of an epoch's last group of batches a mean where the group is not whole; else 1.

    Lightning divides by `accumulate_grad_batches` there too.

    Args:
        trainer: that trains.
        batch: the number of the batch in its epoch, from 1.
    """
    group, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    left = batches % group
    return group / left if batch > batches - left else 1.0


def save_window(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add to a training state the gradients that each process has summed, as they are before the exchange.

    Collective. Rank 0's state holds those of all ranks; between two steps there are none.
    """
    trainer = module.trainer
    if not _place_in_the_epoch(trainer):
        return
    pending = pending_batches(trainer)
    checkpoint[_KEY] = {
        "of": trainer.accumulate_grad_batches,
        "batches": pending,
        "precision": str(trainer.precision),
        "gradients": _of_all_ranks(module) if pending else [],
    }


def _of_all_ranks(module: LightningModule) -> list[dict[str, Tensor]]:
    """The gradients of each rank on the CPU, by parameter; complete on rank 0 only."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    world = module.trainer.world_size
    if world == 1:
        return [{n: p.grad.detach().cpu() for n, p in named.items() if p.grad is not None}]
    first = dist.get_rank() == 0
    there = torch.tensor(
        [p.grad is not None for p in named.values()], device=module.device, dtype=torch.uint8
    )
    everywhere = [torch.empty_like(there) for _ in range(world)]
    dist.all_gather(everywhere, there)
    has = torch.stack(everywhere).bool().tolist()
    found: list[dict[str, Tensor]] = [{} for _ in range(world)]
    for number, (name, parameter) in enumerate(
        named.items()
    ):  # one at a time: rank 0 holds all ranks' of one
        if not any(has[rank][number] for rank in range(world)):
            continue
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        parts = [torch.empty(own.shape, dtype=own.dtype, device=own.device) for _ in range(world)]
        dist.gather(own.contiguous(), parts if first else None, dst=0)
        for rank in range(world) if first else ():
            if has[rank][number]:
                found[rank][name] = parts[rank].cpu()
    return found


def restore_window(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the parameters the gradients that a training state holds of its open window; before the first batch.

    With another number of processes than it was saved by, each takes the mean, which is what they would exchange.

    Raises:
        ConfigError: where the window goes on with other batches to a step, or in another precision.
    """
    window = checkpoint.get(_KEY)
    if window is None:
        return
    trainer: Any = module.trainer
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
        trainer.accumulate_grad_batches = window["of"]  # which it sets where an epoch begins only
    if problem := window_problem(window, trainer.accumulate_grad_batches, str(trainer.precision)):
        raise ConfigError(problem)
    gradients = window["gradients"]
    if not gradients:
        return
    parameters = dict(module.named_parameters())
    own = gradients[trainer.global_rank] if len(gradients) == trainer.world_size else _mean(gradients)
    for name, gradient in own.items():
        parameter = parameters[name]
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def window_problem(window: dict[str, Any], accumulate: int, precision: str) -> str | None:
    """Why a run cannot go on inside this window; None where it can."""
    if window["of"] != accumulate:
        return (
            f"trainer.accumulate_grad_batches={accumulate}: the training state lies inside an epoch with steps of "
            f"{window['of']} batches"
        )
    if window["batches"] and window["precision"] != precision:
        return (
            f"trainer.precision={precision}: the training state lies between two batches of one step, whose "
            f"gradients are those of {window['precision']}"
        )
    return None


def _mean(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name: tensor for part in gradients for name, tensor in part.items()}
    return {
        name: sum((part.get(name, torch.zeros_like(some)) for part in gradients), torch.zeros_like(some))
        / len(gradients)
        for name, some in names.items()
    }
