"""Norms with one signature, `(num_features, ..., affine=True)`, for `(N, C, *spatial)` of any dimension.

They are torch's own where torch has one; norms of a class convert into each other (`norms.convert`).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crucible.private import AnyBatchNorm

Eps = Annotated[float, "(0, inf)", "added to the variance"]
Momentum = Annotated[
    float | None, "[0, 1]", "weight of a batch in the running statistics; null: plain average"
]


class BatchNorm(AnyBatchNorm):
    """Batch normalisation (arXiv 1502.03167) for any number of spatial dimensions."""

    running_mean: Tensor  # always tracked
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, eps: Eps = 1e-5, momentum: Momentum = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, *spatial), got {tuple(input.shape)}")


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch normalisation over the batches of all DDP processes; in a single process it is batch norm."""

    def __init__(
        self, num_features: int, eps: Eps = 1e-5, momentum: Momentum = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)


class GhostBatchNorm(BatchNorm):
    """Batch norm over parts of a batch, "ghost" or "virtual" batches (arXiv 1705.08741).

    A training batch of N samples is cut into ceil(N / ghost_size) parts whose sizes differ by one at most; the
    parts interleave. The running statistics take one step a batch, towards the mean of the parts' statistics.
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: Annotated[int, "[1, inf)", "largest number of samples normalised together"] = 32,
        eps: Eps = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        n = input.shape[0]
        parts = -(-n // self.ghost_size)
        if not self.training or parts == 1:
            return super().forward(input)
        self._check_input_dim(input)
        self.num_batches_tracked.add_(1)
        rate: float | Tensor | None = self.momentum
        if rate is None:
            rate = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        # `more` parts of size + 1, then the others of this size
        size, more = divmod(n, parts)
        if more:
            first = more * (size + 1)
            cut = [(input[:first], more), (input[first:], parts - more)]
        else:
            cut = [(input, parts)]
        outputs, means, variances = [], [], []
        for part, count in cut:
            out, mean, variance = self._normalise(part, count)
            outputs.append(out)
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            mean, variance = torch.cat(means).mean(0), torch.cat(variances).mean(0)
            self.running_mean.add_(rate * (mean - self.running_mean))
            self.running_var.add_(rate * (variance - self.running_var))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _normalise(self, input: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every `count`-th sample together; means and unbiased variances `(count, C)` of these parts."""
        c = self.num_features
        view = input.reshape(input.shape[0] // count, count * c, *input.shape[2:])
        mean = self.running_mean.new_zeros(count * c)
        variance = torch.ones_like(mean)
        weight = None if self.weight is None else self.weight.repeat(count)
        bias = None if self.bias is None else self.bias.repeat(count)
        out = F.batch_norm(view, mean, variance, weight, bias, True, 1.0, self.eps)
        return out.reshape(input.shape), mean.view(count, c), variance.view(count, c)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GroupNorm(nn.GroupNorm):
    """Each sample's statistics over groups of channels and space (arXiv 1803.08494)."""

    def __init__(
        self,
        num_features: int,
        num_groups: Annotated[int, "[1, inf)", "groups of channels; divides every layer's channels"] = 32,
        eps: Eps = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(num_groups, num_features, eps, affine)
        self.num_features = num_features


class LayerNorm(GroupNorm):
    """Each sample's statistics over all channels and space (arXiv 1607.06450), scale and shift per channel."""

    def __init__(self, num_features: int, eps: Eps = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, 1, eps, affine)


class InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """Each sample's and channel's statistics over space (arXiv 1607.08022); needs more than one pixel."""

    def __init__(self, num_features: int, eps: Eps = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps, affine=affine)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 3:
            raise ValueError(f"instance norm needs (N, C, *spatial), got {tuple(input.shape)}")
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


class SwitchNorm(nn.Module):
    """Switchable normalisation (arXiv 1806.10779): learns how to weigh instance, layer and batch statistics.

    Mean and variance are weighed sums of the three, in this order, with softmax(`mean_weight`) and
    softmax(`var_weight`), both `(3,)` and equal at the start. Variances are biased, as in the paper. Batch
    statistics are those of the batch in training, running averages in evaluation. Statistics are float32 or
    wider.
    """

    def __init__(
        self,
        num_features: int,
        eps: Eps = 1e-5,
        momentum: Annotated[float, "[0, 1]", "weight of a batch in the running statistics"] = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.mean_weight = nn.Parameter(torch.zeros(3))
        self.var_weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.forward(x[..., None])[..., 0]
        wide = x if x.element_size() >= 4 else x.float()
        space = list(range(2, x.ndim))
        mean = wide.mean(space, keepdim=True)
        var = (wide - mean).square().mean(space, keepdim=True)
        # a mixture's variance: the mean of the variances and the variance of the means
        layer_mean, layer_var = mean.mean(1, keepdim=True), _pooled(mean, var, 1)
        per_channel = (1, -1) + (1,) * len(space)
        if self.training:
            batch_mean, batch_var = mean.mean(0, keepdim=True), _pooled(mean, var, 0)
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean.flatten().to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(batch_var.flatten().to(self.running_var.dtype), self.momentum)
        else:
            batch_mean, batch_var = self.running_mean.view(per_channel), self.running_var.view(per_channel)
        of_mean, of_var = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = of_mean[0] * mean + of_mean[1] * layer_mean + of_mean[2] * batch_mean
        var = of_var[0] * var + of_var[1] * layer_var + of_var[2] * batch_var
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        out = (wide - mean) * scale
        if self.bias is not None:
            out = out + self.bias.view(per_channel)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum:g}, affine={self.affine}"


def _pooled(mean: Tensor, var: Tensor, dim: int) -> Tensor:
    between = (mean - mean.mean(dim, keepdim=True)).square()
    return (var + between).mean(dim, keepdim=True)


class NoNorm(nn.Module):
    """The input itself. Remembers the channels, so that a network can be given a norm again."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)
