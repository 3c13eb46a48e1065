"""Norms with one signature, `(num_features, ..., affine=True)`, for `(N, C, *spatial)` of any dimension.

They are torch's own where torch has one; norms of a class convert into each other (`norms.convert`).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        wide = x if x.element_size() >= 4 else x.float()
        wide = wide.flatten(2) if x.ndim > 2 else wide[..., None]  # (N, C, positions)
        with torch.no_grad():
            mean = wide.mean(2)
            own = torch.stack((mean, (wide - mean[..., None]).square_().mean(2)))
            layer = _pooled(own, 2)
            if self.training:
                batch = _pooled(own, 1)
                mean, var = batch[:, 0].to(self.running_mean.dtype).unbind()
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
            else:
                batch = torch.stack((self.running_mean, self.running_var)).to(own.dtype)[:, None]
        shares = torch.stack((self.mean_weight, self.var_weight)).softmax(1, dtype=own.dtype)
        out = _Switched.apply(
            wide, own, layer, batch, shares, self.weight, self.bias, self.eps, self.training
        )
        return out.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum:g}, affine={self.affine}"


def _pooled(own: Tensor, dim: int) -> Tensor:
    """Mean and variance of a mixture along `dim`, from its parts': `(2, N, C)` to `(2, 1, C)` or `(2, N, 1)`."""
    pooled = own.mean(dim, keepdim=True)
    pooled[1].add_(own[0].var(dim - 1, correction=0, keepdim=True))
    return pooled


class _Switched(torch.autograd.Function):
    """Switchable normalisation by statistics that are at hand, and its gradient, written out.

    Left to autograd, the chain of small sums between the statistics and the output is twice as many kernels, and
    reads the input twice as often.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor, layer: Tensor, batch: Tensor, shares: Tensor,
        weight: Tensor | None, bias: Tensor | None, eps: float, of_input: bool,
    ) -> Tensor:  # fmt: skip
        """Normalise.

        Args:
            ctx: autograd's.
            x: `(N, C, positions)`, as are output and gradient.
            own: its means and variances over positions, `(2, N, C)`.
            layer: over channels and positions, `(2, N, 1)`.
            batch: over samples and positions, or other statistics in their place, `(2, 1, C)`.
            shares: of the three in the mean and in the variance, `(2, 3)`.
            weight: `(C,)`.
            bias: `(C,)`.
            eps: added to the variance.
            of_input: whether `batch` is of this input.
        """
        of_own, of_layer, of_batch = shares[..., None, None].unbind(1)
        mean, var = torch.addcmul(torch.addcmul(of_own * own, of_layer, layer), of_batch, batch).unbind()
        rstd = torch.rsqrt(var + eps)
        scale = rstd if weight is None else rstd * weight
        ctx.save_for_backward(x, own, layer, batch, shares, weight, bias, mean, rstd, scale)
        ctx.of_input = of_input
        centred = x - mean[..., None]
        if bias is None:
            return centred * scale[..., None]
        return torch.addcmul(bias.to(x.dtype)[:, None], centred, scale[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, own, layer, batch, shares, weight, bias, mean, rstd, scale = ctx.saved_tensors
        samples, channels, positions = x.shape
        centred = x - mean[..., None]
        total = grad.sum(2)
        moment = (grad * centred).sum(2) * rstd
        # of the mixed mean and variance, (2, N, C), and summed over what they share
        mixed = torch.stack((-total, moment * rstd * -0.5)) * scale
        pools = ((layer, mixed.sum(2, keepdim=True), channels), (batch, mixed.sum(1, keepdim=True), samples))
        shared = [(mixed * own).sum((1, 2)), *((sums * pool).sum((1, 2)) for pool, sums, _ in pools)]
        # of the sample's own: itself, and as a part of each pool, whose variance has that of the means in it
        of_own, *of_pools = shares[..., None, None].unbind(1)
        of_statistics = of_own * mixed
        for share, (pool, sums, count) in zip(of_pools[: 1 + ctx.of_input], pools, strict=False):
            of_statistics.addcmul_(share, sums, value=1 / count)
            of_statistics[0].addcmul_(own[0] - pool[0], share[1] * sums[1], value=2 / count)
        of_mean, of_var = (of_statistics / positions).unbind()
        slope = 2 * of_var
        shift = torch.addcmul(of_mean, slope, mean - own[0])
        of_x = torch.addcmul(shift[..., None], centred, slope[..., None]).addcmul_(grad, scale[..., None])
        return (
            of_x, None, None, None, torch.stack(shared, 1),
            None if weight is None else moment.sum(0).to(weight.dtype),
            None if bias is None else total.sum(0).to(bias.dtype), None, None,
        )  # fmt: skip


class NoNorm(nn.Module):
    """The input itself. Remembers the channels, so that a network can be given a norm again."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)
