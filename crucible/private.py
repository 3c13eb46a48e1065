"""Private names of other packages that Crucible leans on, each with what it is taken to mean.

An upgrade may move them. tests/test_private.py says so by name, before a run does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.conv import _ConvNd as AnyConvolution
from torch.optim import Optimizer

__all__ = [
    "AnyBatchNorm", "AnyConvolution", "FOREACH", "end_sigterm_votes", "has_bf16_instructions", "keep_queues",
    "storage_identity", "trial_in_storage", "unscale_outside_the_step", "wandb_arguments",
]  # fmt: skip

# of torch, used where they stand: one kernel for many tensors
FOREACH = (
    "_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_", "_foreach_norm",
    "_foreach_sub_",
)  # fmt: skip


def storage_identity(tensor: Tensor) -> int:
    """The address of the tensor's storage object: equal for views of one storage, on the meta device too."""
    return tensor.untyped_storage()._cdata


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 in instructions of its own (AVX512_BF16, AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_queues(iterator: Any) -> None:
    """Keep the queues to a loader's workers as long as its iterator.

    In one piece of garbage with it they would be closed first, and each worker, which nothing could then tell to end,
    would be waited for in vain for five seconds.
    """
    if (queues := getattr(iterator, "_index_queues", None)) and not hasattr(iterator, "_kept"):
        iterator._kept = True
        weakref.finalize(iterator, len, queues).atexit = False


def unscale_outside_the_step(optimizer: Optimizer) -> None:
    """Have the gradient scaler unscale before the step, which a fused optimizer would do within it."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def end_sigterm_votes(trainer: Any) -> None:
    """Lightning's ranks no longer vote in every step whether one got a SIGTERM."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def wandb_arguments(logger: Any) -> dict[str, Any]:
    """What Lightning's W&B logger would hand to `wandb.init`, without `anonymous`, of which W&B warns."""
    return {name: value for name, value in logger._wandb_init.items() if name != "anonymous"}


def trial_in_storage(trial: Any) -> int:
    """The number of an Optuna trial in its storage, with which another process opens it."""
    return trial._trial_id
