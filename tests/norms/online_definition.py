"""Online normalization as arXiv 1905.05894 defines it, and what the tests of it have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norms.online import STREAMS, OnlineNorm

Streams = tuple[Tensor, ...]


def streams_of(norm: OnlineNorm) -> Streams:
    return tuple(getattr(norm, name).double().clone() for name in STREAMS)


def sequential(norm: OnlineNorm, x: Tensor, grad: Tensor, streams: Streams) -> tuple[Tensor, ...]:
    """Output, gradients of input, weight and bias, and the streams after, sample by sample in float64."""
    m, var, u, v = streams
    x, grad = x.detach().double(), grad.double()
    space = list(range(1, x.ndim - 1))

    def spread(stat: Tensor) -> Tensor:
        return stat.view((-1,) + (1,) * len(space))

    def mean(t: Tensor) -> Tensor:
        return t.mean(space) if space else t

    weight = norm.weight.detach().double().requires_grad_()
    bias = norm.bias.detach().double().requires_grad_()
    outputs, inputs = [], []
    for sample, slope in zip(x, grad, strict=True):
        sigma = (var + norm.eps).sqrt()
        y = ((sample - spread(m)) / spread(sigma)).requires_grad_()
        mu = mean(sample)
        var = (
            norm.alpha_fwd * var
            + (1 - norm.alpha_fwd) * mean((sample - spread(mu)) ** 2)
            + norm.alpha_fwd * (1 - norm.alpha_fwd) * (mu - m) ** 2
        )
        m = norm.alpha_fwd * m + (1 - norm.alpha_fwd) * mu
        out = y * spread(weight) + spread(bias)
        if norm.ecm == "ls":
            out = out / ((out * out).mean() + norm.ls_eps).sqrt()
        elif norm.ecm == "ac":
            out = out.clamp(-norm.clamp_val, norm.clamp_val)
        out.backward(slope)
        controlled = y.grad - (1 - norm.alpha_bkw) * spread(v) * y.detach()
        v = v + mean(y.detach() * controlled)
        dx = controlled / spread(sigma) - (1 - norm.alpha_bkw) * spread(u)
        u = u + mean(dx)
        outputs.append(out.detach())
        inputs.append(dx)
    return torch.stack(outputs), torch.stack(inputs), weight.grad, bias.grad, m, var, u, v


def step(norm: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(grad)
    return out.detach(), x.grad


def assert_follows(norm: OnlineNorm, batches: list[Tensor], tolerance: float) -> None:
    streams = streams_of(norm)
    for x in batches:
        grad = torch.randn_like(x)
        norm.zero_grad()
        out, dx = step(norm, x, grad)
        *expected, m, var, u, v = sequential(norm, x, grad, streams)
        streams = (m, var, u, v)
        found = (out, dx, norm.weight.grad, norm.bias.grad, *streams_of(norm))
        for value, exact in zip(found, (*expected, *streams), strict=True):
            assert (value.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1e-3)


def online_norm(channels: int = 4, dtype: torch.dtype = torch.float64, **kwargs) -> OnlineNorm:
    torch.manual_seed(0)
    norm = OnlineNorm(channels, **kwargs).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm
