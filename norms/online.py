"""Online Normalization (Chiley et al., arXiv 1905.05894): batch norm's effect without a batch.

Each channel is normalised by exponential averages over the samples seen so far, and the gradient is corrected
by two control processes. A sample depends on all samples before it, yet nothing loops over them: what is
sequential lives on `(N, C)` and is solved by scans in log2(N) vector steps; the large tensor is only reduced
over space and rescaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

STREAMS = ("m", "var", "u", "v")
_LARGE_PLANE = 128  # elements; on smaller planes the CPU's kernels are slow in half precision


def scan_constant(inputs: Tensor, factor: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """`s[t+1] = factor s[t] + inputs[t]` from `s[0] = start`, in log2(N) vector steps.

    Args:
        inputs: `(N, C)`.
        factor: of the state.
        start: `(C,)`.

    Returns:
        `s[0..N-1]` of shape `(N, C)` and `s[N]` of shape `(C,)`.
    """
    state = torch.cat((inputs[:1] + factor * start, inputs[1:]))
    reach = 1
    while reach < inputs.shape[0]:
        state = torch.cat((state[:reach], torch.add(state[reach:], state[:-reach], alpha=factor**reach)))
        reach *= 2
    return torch.cat((start[None], state[:-1])), state[-1]


def scan_variable(factors: Tensor, inputs: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """`s[t+1] = factors[t] s[t] + inputs[t]` from `s[0] = start`; factors `(N, C)` of any sign, or zero.

    As `scan_constant` otherwise.
    """
    largest = torch.finfo(factors.dtype).max
    state = torch.cat((torch.addcmul(inputs[:1], factors[:1], start[None]), inputs[1:]))
    reach, n = 1, inputs.shape[0]
    while reach < n:
        state = torch.cat((state[:reach], torch.addcmul(state[reach:], factors[reach:], state[:-reach])))
        if 2 * reach < n:
            # an infinite product would make NaN of a zero state, where the sequential form has zero
            product = (factors[reach:] * factors[:-reach]).clamp(-largest, largest)
            factors = torch.cat((factors[:reach], product))
        reach *= 2
    return torch.cat((start[None], state[:-1])), state[-1]


def _stream(
    offset: Tensor, s2: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics that normalise each sample of a batch.

    Args:
        offset: mean of each sample less `m`, `(N, C)`.
        s2: variance of each sample, `(N, C)`.
        m, var: the state before the batch, `(C,)`.

    Returns:
        `(N, C)`: the streamed mean, 1 / sigma, and the means over space of y and of y^2; `(C,)`: the state after
        the batch.
    """
    drift, last_drift = scan_constant((1 - alpha) * offset, alpha, torch.zeros_like(m))
    d = offset - drift
    variance, last_var = scan_constant((1 - alpha) * (s2 + alpha * d * d), alpha, var)
    inv = torch.rsqrt(variance + eps)
    y1 = d * inv
    y2 = (s2 + d * d) * inv * inv
    return m + drift, inv, y1, y2, m + last_drift, last_var.clone()


# Opaque to the compiler, which would otherwise recompute these in the backward, from a state that the forward
# has meanwhile advanced. It also shortens compilation.
@library.custom_op("online_norm::stream", mutates_args=())
def _stream_compiled(
    offset: Tensor, s2: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _stream(offset.contiguous(), s2.contiguous(), m, var, alpha, eps)


@_stream_compiled.register_fake
def _(
    offset: Tensor, s2: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, inv, y1, y2 = (offset.new_empty(offset.shape) for _ in range(4))
    return mean, inv, y1, y2, torch.empty_like(m), torch.empty_like(m)


def _control(
    d0: Tensor, d1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, u: Tensor, v: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The control processes' states at each sample of a batch.

    Args:
        d0, d1: means over space of dL/dy and of y dL/dy, `(N, C)`.
        y1, y2, inv: as `_stream` returns them.
        u, v: the states before the batch, `(C,)`.

    Returns:
        u and v at each sample, `(N, C)`, and after the batch, `(C,)`.
    """
    vs, last_v = scan_variable(1 - (1 - alpha) * y2, d1, v)
    us, last_u = scan_constant((d0 - (1 - alpha) * vs * y1) * inv, alpha, u)
    return us, vs, last_u.clone(), last_v.clone()


@library.custom_op("online_norm::control", mutates_args=())
def _control_compiled(
    d0: Tensor, d1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, u: Tensor, v: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _control(d0.contiguous(), d1.contiguous(), y1, y2, inv, u, v, alpha)


@_control_compiled.register_fake
def _(
    d0: Tensor, d1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, u: Tensor, v: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return d0.new_empty(d0.shape), d0.new_empty(d0.shape), torch.empty_like(u), torch.empty_like(u)


def _expand(stat: Tensor, x: Tensor) -> Tensor:
    return stat.view(stat.shape + (1,) * (x.ndim - 2))


# The CPU's batch-norm kernels, on a view in which each (sample, channel) is a channel: they reduce and rescale
# at the speed of memory, where a chain of elementwise operations makes a pass over memory for each.


def _small_half(x: Tensor) -> bool:
    return x.element_size() < 4 and x[0, 0].numel() < _LARGE_PLANE


def _plane_sums(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over space of `g` and of `g (x - mean)`, each `(N, C)`; contiguous input, `mean` `(N, C)`."""
    if _small_half(x):
        g, x = g.float(), x.float()
    view, mean = (1, mean.numel(), -1), mean.flatten()
    one = torch.ones_like(mean)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g.view(view), x.view(view), one, mean, one, mean, one, True, 0.0, [False, True, True]
    )
    return sums.view(x.shape[:2]), products.view(x.shape[:2])


def _rescale(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`(x - mean) scale + shift` in the dtype of `x`; contiguous `x`, the others `(N, C)`."""
    mean = mean.flatten()
    out = torch.native_batch_norm(
        x.view(1, mean.numel(), -1),
        scale.flatten(),
        shift.flatten(),
        mean,
        torch.ones_like(mean),
        False,
        0.0,
        0.0,
    )[0]
    # not a view: what a Function returns must not be one, or no activation could work on it in place
    return torch.ops.aten._unsafe_view(out, x.shape)


class _OnlineNormFunction(Function):
    """Normalisation, affine map and layer scaling in one; `ls_eps` None: without layer scaling.

    With y the normalised input, z = weight y + bias and r the inverse root mean square of z per sample, the
    output is r z. Means of y, y^2 and z^2 follow from the mean and variance of each (sample, channel), so the
    forward reads the input once for its statistics and once for its output, and the backward likewise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        m: Tensor,
        var: Tensor,
        u: Tensor,
        v: Tensor,
        alpha_fwd: float,
        alpha_bkw: float,
        eps: float,
        ls_eps: float | None,
    ) -> Tensor:
        native = x.device.type == "cpu" and not torch.compiler.is_compiling() and x.is_contiguous()
        dtype = torch.promote_types(x.dtype, m.dtype)
        start, w, b = m.to(dtype), weight.to(dtype), bias.to(dtype)
        space = list(range(2, x.ndim))
        plane = x.numel() // (x.shape[0] * x.shape[1])

        # Moments about the streamed mean: about zero, a mean far from zero would cancel the variance.
        if not native:
            shifted = x.to(dtype) - _expand(start[None], x)
            offset, square = shifted.mean(space), (shifted * shifted).mean(space)
        elif x.element_size() < 4:  # such a mean is lost in the input's own rounding
            sums, products = _plane_sums(x, x, start.expand(x.shape[:2]))
            offset = sums / plane - start
            square = products / plane - start * offset
        else:
            shifted = x - _expand(start[None], x)
            sums, products = _plane_sums(shifted, shifted, shifted.new_zeros(x.shape[:2]))
            offset, square = sums / plane, products / plane
        s2 = (square - offset * offset).clamp_min(0)

        compiling = torch.compiler.is_compiling()
        stream, ctx.control = (_stream_compiled, _control_compiled) if compiling else (_stream, _control)
        mean, inv, y1, y2, last_m, last_var = stream(offset, s2, start, var.to(dtype), alpha_fwd, eps)
        if ls_eps is None:
            r = torch.ones_like(y2[:, :1])
        else:
            r = torch.rsqrt((w * w * y2 + 2 * w * b * y1 + b * b).mean(1, keepdim=True) + ls_eps)

        if native:
            out = _rescale(x, mean, w * r * inv, (b * r).expand_as(inv))
        else:
            out = (x.to(dtype) - _expand(mean, x)) * _expand(w * r * inv, x) + _expand(b * r, x)
        finite = torch.isfinite(last_m + last_var)
        m.copy_(torch.where(finite, last_m, start))
        var.copy_(torch.where(finite, last_var, var.to(dtype)))
        ctx.save_for_backward(x, weight, bias, mean, inv, y1, y2, r)
        # Not among the saved tensors: their versions are checked, and two forwards may precede two backwards.
        ctx.u, ctx.v = u, v
        ctx.native, ctx.alpha_bkw, ctx.layer_scaling = native, alpha_bkw, ls_eps is not None
        # torch 2.11's dynamo takes a cast that changes nothing for no result of the function: no gradient passes
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inv, y1, y2, r = ctx.saved_tensors
        dtype, native, gain = mean.dtype, ctx.native, 1 - ctx.alpha_bkw
        w, b = weight.to(dtype), bias.to(dtype)
        u, v = ctx.u.to(dtype), ctx.v.to(dtype)
        space = list(range(2, x.ndim))
        plane = x.numel() // (x.shape[0] * x.shape[1])

        if native:
            grad = grad.contiguous()
            sums, products = _plane_sums(grad, x, mean)
            g0, g1 = sums / plane, products / plane * inv
        else:
            wide = grad.to(dtype)
            centred = x.to(dtype) - _expand(mean, x)
            g0, g1 = wide.mean(space), (wide * centred).mean(space) * inv
        # Means over space of dL/dz and of y dL/dz; layer scaling takes the part along z away.
        d0, d1 = r * g0, r * g1
        if ctx.layer_scaling:
            along = r * r * r * (w * g1 + b * g0).mean(1, keepdim=True)
            d0 = d0 - along * (w * y1 + b)
            d1 = d1 - along * (w * y2 + b * y1)

        us, vs, last_u, last_v = ctx.control(w * d0, w * d1, y1, y2, inv, u, v, ctx.alpha_bkw)
        # A gradient that overflowed, as loss scaling provokes, must not stay in the control state for good.
        finite = torch.isfinite(last_v + last_u + y2.sum(0))
        ctx.v.copy_(torch.where(finite, last_v, v))
        ctx.u.copy_(torch.where(finite, last_u, u))

        of_grad = w * r * inv
        of_x = -gain * vs * inv * inv
        constant = -gain * us
        if ctx.layer_scaling:
            of_x = of_x - along * (w * inv) ** 2
            constant = constant - along * w * b * inv
        if not native:
            out = wide * _expand(of_grad, x) + (centred * _expand(of_x, x) + _expand(constant, x))
        elif _small_half(x):
            out = _rescale(grad, torch.zeros_like(mean), of_grad, torch.zeros_like(mean))
            out += _rescale(x, mean, of_x, constant)
        else:
            out = _rescale(grad, torch.zeros_like(mean), of_grad, constant - mean * of_x)
            out.addcmul_(x, _expand(of_x.to(x.dtype), x))
        grad_weight = (plane * d1.sum(0)).to(weight.dtype)
        grad_bias = (plane * d0.sum(0)).to(bias.dtype)
        return out.to(x.dtype), grad_weight, grad_bias, *(None,) * 8


class OnlineNorm(nn.Module):
    """Online Normalization (arXiv 1905.05894): `(N, C, *spatial)` or `(N, C)` float to the same shape and dtype.

    Per channel and sample t, with mu and s2 the mean and (biased) variance of the sample over space:

        y_t = (x_t - m_t) / sqrt(var_t + eps)
        m_{t+1} = a m_t + (1 - a) mu          var_{t+1} = a var_t + (1 - a) s2 + a (1 - a) (mu - m_t)^2
        g'_t = g_t - (1 - b) v_t y_t          v_{t+1} = v_t + mean(y_t g'_t)
        dx_t = g'_t / sigma_t - (1 - b) u_t   u_{t+1} = u_t + mean(dx_t)

    with a = `alpha_fwd`, b = `alpha_bkw`, g the gradient by y; then an affine map, then the error
    compensation. Sample by sample, also within a batch: how samples are cut into batches changes nothing, so
    gradient accumulation is exact where each part's backward follows its forward.

    The streams `m`, `var`, `u`, `v` (buffers, `(C,)`) are float32 whatever the input's dtype, float64 in a
    float64 module. `m` and `var` advance in a training forward, with or without gradients (so statistics can be
    estimated anew under `no_grad`), `u` and `v` in a backward; a second backward of a retained graph advances
    them again. A channel's state is kept where an update is not finite. Evaluation normalises by `m` and `var`
    and applies the error compensation as in training.

    Stability needs mean(y^2) < 2 / (1 - b).

    `u` and `v` are in units of the gradient, with its loss scale. When the scale is multiplied by k, the
    unscaled gradients are those of a state 1/k times its value, exactly; the difference, at most
    |1 - 1/k| times the control terms, fades like b^t in t samples where mean(y^2) is near 1.

    Each DDP process streams its own samples; see `exclude_streams_from_broadcast` and `synchronise_streams`.

    Args:
        num_features: channels C.
        alpha_fwd: decay of the statistics, per sample.
        alpha_bkw: decay of the control processes, per sample.
        eps: added to the variance.
        affine: learn a scale and a shift per channel.
        ecm: error compensation: `ls` divides each sample by its root mean square over channels and space,
            `ac` clamps the output, `none` does nothing.
        ls_eps: added to the mean square of `ls`.
        clamp_val: bound of `ac`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    m: Tensor
    var: Tensor
    u: Tensor
    v: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_fwd: Annotated[float, "[0, 1)", "decay of mean and variance per sample"] = 0.999,
        alpha_bkw: Annotated[float, "[0, 1)", "decay of the control processes per sample"] = 0.99,
        eps: Annotated[float, "(0, inf)", "added to the variance"] = 1e-5,
        affine: bool = True,
        ecm: Annotated[
            Literal["ls", "ac", "none"], "error compensation: layer scaling, clamping, none"
        ] = "ls",
        ls_eps: Annotated[float, "(0, inf)", "added to layer scaling's mean square"] = 1e-5,
        clamp_val: Annotated[float, "(0, inf)", "bound of the clamping"] = 5.0,
    ) -> None:
        super().__init__()
        if ecm not in ("ls", "ac", "none"):
            raise ValueError(f"ecm must be ls, ac or none, got {ecm!r}")
        self.num_features = num_features
        self.alpha_fwd, self.alpha_bkw = alpha_fwd, alpha_bkw
        self.eps, self.affine = eps, affine
        self.ecm, self.ls_eps, self.clamp_val = ecm, ls_eps, clamp_val
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        for name in STREAMS:
            start = torch.ones if name == "var" else torch.zeros
            self.register_buffer(name, start(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, *spatial), got {tuple(x.shape)}")
        if x.ndim == 2:
            return self.forward(x[..., None])[..., 0]
        if self.training:
            weight = torch.ones_like(self.m) if self.weight is None else self.weight
            bias = torch.zeros_like(self.m) if self.bias is None else self.bias
            x = _OnlineNormFunction.apply(
                x,
                weight,
                bias,
                self.m,
                self.var,
                self.u,
                self.v,
                self.alpha_fwd,
                self.alpha_bkw,
                self.eps,
                self.ls_eps if self.ecm == "ls" else None,
            )
        else:
            # the kernel wants both in one dtype, and the streams are never of half precision
            scale, shift = (None if p is None else p.to(self.m.dtype) for p in (self.weight, self.bias))
            x = F.batch_norm(x, self.m, self.var, scale, shift, False, 0.0, self.eps)
            if self.ecm == "ls":
                wide = x if x.element_size() >= 4 else x.float()
                square = wide.square().mean(list(range(1, x.ndim)), keepdim=True)
                x = (wide * torch.rsqrt(square + self.ls_eps)).to(x.dtype)
        return F.hardtanh(x, -self.clamp_val, self.clamp_val) if self.ecm == "ac" else x

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, alpha_fwd={self.alpha_fwd:.6g}, alpha_bkw={self.alpha_bkw:.6g},"
            f" eps={self.eps:g}, affine={self.affine}, ecm={self.ecm}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> OnlineNorm:
        streams = {name: getattr(self, name) for name in STREAMS}
        super()._apply(fn, recurse)
        for name, stream in streams.items():  # half precision cannot hold an average over 1000 samples
            if (moved := getattr(self, name)).element_size() < 4:
                setattr(self, name, stream.float().to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also reads a batch norm's statistics, and the keys `norm.m`, ... of the paper's own code."""
        for name, batch_name in (("m", "running_mean"), ("var", "running_var"), ("u", ""), ("v", "")):
            for other in (f"norm.{name}", batch_name):
                if other and prefix + other in state_dict:
                    state_dict[prefix + name] = state_dict.pop(prefix + other).reshape(self.num_features)
        if state_dict.pop(prefix + "num_batches_tracked", None) is not None:
            for name in ("u", "v"):  # a batch norm has no control state: start from none
                state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def online_norms(network: nn.Module) -> list[OnlineNorm]:
    """The online norms of `network`, each once."""
    return [module for module in network.modules() if isinstance(module, OnlineNorm)]


def exclude_streams_from_broadcast(module: nn.Module) -> None:
    """Let each process keep its own streams under DistributedDataParallel; call it before `module` is wrapped.

    DDP would otherwise overwrite every process's streams by the first's before each forward, which throws the
    others' samples away and hands them control states of gradients that they did not have.
    """
    ignored = list(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    for prefix, norm in module.named_modules():
        if isinstance(norm, OnlineNorm):
            ignored += [f"{prefix}.{name}" if prefix else name for name in STREAMS]
    if ignored:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module, list(dict.fromkeys(ignored))
        )


@torch.no_grad()
def stream_moments(network: nn.Module) -> Tensor:
    """First and second moments and control states of all online norms, one float64 vector.

    The mean of such vectors over networks stands for the union of what they have seen.
    """
    rows = [
        torch.cat(
            (norm.m.double(), norm.var.double() + norm.m.double() ** 2, norm.u.double(), norm.v.double())
        )
        for norm in online_norms(network)
    ]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def set_stream_moments(network: nn.Module, moments: Tensor) -> None:
    """Set the streams of all online norms from a vector as `stream_moments` makes it."""
    norms = online_norms(network)
    for norm, row in zip(norms, moments.split([4 * norm.num_features for norm in norms]), strict=True):
        mean, square, u, v = row.view(4, -1)
        norm.m.copy_(mean)
        norm.var.copy_((square - mean**2).clamp_min(0))
        norm.u.copy_(u)
        norm.v.copy_(v)


def own_streams(network: nn.Module) -> Tensor:
    """The streams of all online norms of this process as they are, one float64 vector on the norms' device."""
    rows = [getattr(norm, name).double() for norm in online_norms(network) for name in STREAMS]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def set_own_streams(network: nn.Module, streams: Tensor) -> None:
    """Set the streams of all online norms from a vector as `own_streams` makes it, to the last bit."""
    tensors = [getattr(norm, name) for norm in online_norms(network) for name in STREAMS]
    for tensor, values in zip(tensors, streams.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values)


def synchronise_streams(network: nn.Module) -> None:
    """Give all processes the same streams: mean and variance of the union of their samples, mean control state.

    For use before evaluation and before a checkpoint; one collective for all norms. Does nothing in a single
    process, or without online norms.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    moments = stream_moments(network)
    if moments.numel():
        dist.all_reduce(moments)
        set_stream_moments(network, moments / dist.get_world_size())


def recomputation_contexts(
    network: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` for activation checkpointing of a part of a network that has online norms.

        checkpoint(block, x, use_reentrant=False, context_fn=partial(recomputation_contexts, block))

    The recomputation starts from the statistics of the first forward and leaves those of now in place; without
    it, it would normalise by later statistics, and the gradient would be wrong. Not for compiled networks.

    Raises:
        RuntimeError: while compiling.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("activation checkpointing of an OnlineNorm cannot be compiled")
    norms = online_norms(network)
    before: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def first() -> Iterator[None]:
        before[:] = [(norm.m.clone(), norm.var.clone()) for norm in norms]
        yield

    @contextmanager
    def again() -> Iterator[None]:
        now = [(norm.m.clone(), norm.var.clone()) for norm in norms]
        _set_statistics(norms, before)
        try:
            yield
        finally:
            _set_statistics(norms, now)

    return first(), again()


@torch.no_grad()
def _set_statistics(norms: list[OnlineNorm], statistics: list[tuple[Tensor, Tensor]]) -> None:
    for norm, (m, var) in zip(norms, statistics, strict=True):
        norm.m.copy_(m)
        norm.var.copy_(var)
