"""Online Normalization (Chiley et al., arXiv 1905.05894): batch norm's effect without a batch.

Each channel is normalised by exponential averages over the samples seen so far, and the gradient is corrected
by two control processes. A sample depends on all samples before it, yet nothing loops over them: what is
sequential lives on `(N, C)` and is solved by scans in log2(N) vector steps; the large tensor is only reduced
over space and rescaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec
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


# The steps of a pass. A large tensor is only reduced over space and rescaled. Means over space are `(N, C)`, or come in
# K parts `(N, K, C)` whose sum they are: how kernels fill a GPU. `w` and `b` are the affine map's, of any dtype.


def _small_half(x: Tensor) -> bool:
    return x.element_size() < 4 and x[0, 0].numel() < _LARGE_PLANE


def _expand(stat: Tensor, x: Tensor) -> Tensor:
    return stat.view(stat.shape + (1,) * (x.ndim - 2))


def _space(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def _whole(parts: Tensor) -> Tensor:
    return parts if parts.ndim == 2 else parts.sum(1)


def _as(dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
    return (t if t.dtype == dtype else t.to(dtype) for t in tensors)


def _moments(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Means over space of `x - m` and of its square, for the streamed mean `m` `(C,)`.

    About the streamed mean: about zero, a mean far from zero would cancel the variance.
    """
    shifted = x.to(torch.promote_types(x.dtype, m.dtype)) - _expand(m[None], x)
    return shifted.mean(_space(x)), (shifted * shifted).mean(_space(x))


def _stream_(
    offset: Tensor, square: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics that normalise each sample of a batch.

    Args:
        offset, square: as `_moments` returns them.
        m, var: the state before the batch, `(C,)`; overwritten by the one after it where that is finite.

    Returns:
        `(N, C)`: the streamed mean, 1 / sigma, and the means over space of y and of y^2.
    """
    offset, square = _whole(offset), _whole(square)
    start, start_var = _as(offset.dtype, m, var)
    s2 = (square - offset * offset).clamp_min(0)
    drift, last_drift = scan_constant((1 - alpha) * offset, alpha, torch.zeros_like(start))
    d = offset - drift
    variance, last_var = scan_constant((1 - alpha) * (s2 + alpha * d * d), alpha, start_var)
    inv = torch.rsqrt(variance + eps)
    y1 = d * inv
    y2 = (s2 + d * d) * inv * inv
    last_m = start + last_drift
    finite = torch.isfinite(last_m + last_var)
    mean = start + drift  # before `m` changes: `start` may be `m`
    m.copy_(torch.where(finite, last_m, start))
    var.copy_(torch.where(finite, last_var, start_var))
    return mean, inv, y1, y2


def _layer_scale(y1: Tensor, y2: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """The inverse root mean square of z = w y + b in each sample, `(N, 1)`."""
    w, b = _as(y1.dtype, w, b)
    return torch.rsqrt((w * w * y2 + 2 * w * b * y1 + b * b).mean(1, keepdim=True) + eps)


def _normalise(x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None) -> Tensor:
    """`r z`, in the dtype of `x` or a wider one; `r` None: `z`."""
    scale, shift = _output_scale(inv, w, b, r)
    return (x.to(mean.dtype) - _expand(mean, x)) * _expand(scale, x) + _expand(shift, x)


def _output_scale(inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
    r = torch.ones_like(inv[:, :1]) if r is None else r
    w, b = _as(inv.dtype, w, b)
    return w * r * inv, b * r


def _slopes(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Means over space of `grad` and of `grad (x - mean)`."""
    wide, centred = grad.to(mean.dtype), x.to(mean.dtype) - _expand(mean, x)
    return wide.mean(_space(x)), (wide * centred).mean(_space(x))


def _along(g0: Tensor, g1: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """r^3 times the mean of z dL/d(out) in each sample, `(N, 1)`: what layer scaling takes away along z."""
    w, b = _as(inv.dtype, w, b)
    return r * r * r * (w * (_whole(g1) * inv) + b * _whole(g0)).mean(1, keepdim=True)


def _control_(
    g0: Tensor, g1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None,
    along: Tensor | None, u: Tensor, v: Tensor, plane: int, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The control processes' states at each sample of a batch.

    Args:
        g0, g1: as `_slopes` returns them.
        y1, y2, inv: as `_stream_` returns them.
        r, along: as `_layer_scale` and `_along` return them; None without layer scaling.
        u, v: the states before the batch, `(C,)`; overwritten by those after it where these are finite.
        plane: positions of a channel.

    Returns:
        u and v at each sample, `(N, C)`, and the gradients of `w` and `b` in their dtype, `(C,)`.
    """
    g0, g1 = _whole(g0), _whole(g1) * inv
    wide, shift, start_u, start_v = _as(inv.dtype, w, b, u, v)
    d0, d1 = (g0, g1) if r is None else (r * g0, r * g1)  # means over space of dL/dz and of y dL/dz
    if along is not None:
        d0 = d0 - along * (wide * y1 + shift)
        d1 = d1 - along * (wide * y2 + shift * y1)
    vs, last_v = scan_variable(1 - (1 - alpha) * y2, wide * d1, start_v)
    us, last_u = scan_constant((wide * d0 - (1 - alpha) * vs * y1) * inv, alpha, start_u)
    # A gradient that overflowed, as loss scaling provokes, must not stay in the control state for good.
    finite = torch.isfinite(last_v + last_u + y2.sum(0))
    v.copy_(torch.where(finite, last_v, start_v))
    u.copy_(torch.where(finite, last_u, start_u))
    return us, vs, (plane * d1.sum(0)).to(w.dtype), (plane * d0.sum(0)).to(b.dtype)


def _input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None, us: Tensor, vs: Tensor,
    along: Tensor | None, alpha: float,
) -> Tensor:  # fmt: skip
    """dL/dx, in the dtype of `x` or a wider one."""
    of_grad, of_x, constant = _input_scales(inv, w, b, r, us, vs, along, alpha)
    centred = x.to(mean.dtype) - _expand(mean, x)
    return grad.to(mean.dtype) * _expand(of_grad, x) + (centred * _expand(of_x, x) + _expand(constant, x))


def _input_scales(
    inv: Tensor,
    w: Tensor,
    b: Tensor,
    r: Tensor | None,
    us: Tensor,
    vs: Tensor,
    along: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    w, b = _as(inv.dtype, w, b)
    gain = 1 - alpha
    of_x, constant = -gain * vs * inv * inv, -gain * us
    if along is not None:
        of_x = of_x - along * (w * inv) ** 2
        constant = constant - along * w * b * inv
    return (w * inv if r is None else w * r * inv), of_x, constant


# The large passes on a CPU: its batch-norm kernels, on a view in which each (sample, channel) is a channel, reduce and
# rescale at the speed of memory, where a chain of elementwise operations makes a pass over memory for each.


def _plane_means(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Means over space of `g` and of `g (x - mean)`, each `(N, C)`; contiguous input, `mean` `(N, C)`."""
    plane = x[0, 0].numel()
    if _small_half(x):
        g, x = g.float(), x.float()
    view, shape, mean = (1, mean.numel(), -1), mean.shape, mean.flatten()
    one = torch.ones_like(mean)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g.view(view), x.view(view), one, mean, one, mean, one, True, 0.0, [False, True, True]
    )
    return sums.view(shape) / plane, products.view(shape) / plane


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


class _Steps:
    """The steps in any mode and on any device, one operation after the other."""

    moments, slopes = staticmethod(_moments), staticmethod(_slopes)
    stream_, control_ = staticmethod(_stream_), staticmethod(_control_)
    layer_scale, along = staticmethod(_layer_scale), staticmethod(_along)
    normalise, input_gradient = staticmethod(_normalise), staticmethod(_input_gradient)


class _CpuSteps(_Steps):
    """The steps on a contiguous tensor of a CPU, not compiled."""

    @staticmethod
    def moments(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        if x.element_size() < 4:  # `x - m` is lost in the input's own rounding
            start = m.to(torch.promote_types(x.dtype, m.dtype))
            mean, product = _plane_means(x, x, start.expand(x.shape[:2]))
            offset = mean - start
            return offset, product - start * offset
        shifted = x - _expand(m[None], x)
        return _plane_means(shifted, shifted, shifted.new_zeros(x.shape[:2]))

    @staticmethod
    def normalise(x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None) -> Tensor:
        scale, shift = _output_scale(inv, w, b, r)
        return _rescale(x, mean, scale, shift.expand_as(inv))

    @staticmethod
    def slopes(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return _plane_means(grad, x, mean)

    @staticmethod
    def input_gradient(
        grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None, us: Tensor,
        vs: Tensor, along: Tensor | None, alpha: float,
    ) -> Tensor:  # fmt: skip
        of_grad, of_x, constant = _input_scales(inv, w, b, r, us, vs, along, alpha)
        if _small_half(x):
            out = _rescale(grad, torch.zeros_like(mean), of_grad, torch.zeros_like(mean))
            out += _rescale(x, mean, of_x, constant)
            return out
        out = _rescale(grad, torch.zeros_like(mean), of_grad, constant - mean * of_x)
        return out.addcmul_(x, _expand(of_x.to(x.dtype), x))


# On a GPU each step is one operator, and one kernel where there is Triton and it knows the device.

_W_B = "Tensor w, Tensor b"
_SCHEMAS = {
    "moments": "(Tensor x, Tensor m) -> (Tensor, Tensor)",
    "stream_": "(Tensor offset, Tensor square, Tensor(a!) m, Tensor(b!) var, float alpha, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_scale": f"(Tensor y1, Tensor y2, {_W_B}, float eps) -> Tensor",
    "normalise": f"(Tensor x, Tensor mean, Tensor inv, {_W_B}, Tensor? r) -> Tensor",
    "slopes": "(Tensor grad, Tensor x, Tensor mean) -> (Tensor, Tensor)",
    "along": f"(Tensor g0, Tensor g1, Tensor inv, {_W_B}, Tensor r) -> Tensor",
    "control_": f"(Tensor g0, Tensor g1, Tensor y1, Tensor y2, Tensor inv, {_W_B}, Tensor? r, Tensor? along,"
    " Tensor(a!) u, Tensor(b!) v, int plane, float alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    "input_gradient": f"(Tensor grad, Tensor x, Tensor mean, Tensor inv, {_W_B}, Tensor? r, Tensor us, Tensor vs,"
    " Tensor? along, float alpha) -> Tensor",
}
_LIBRARY = library.Library("online_norm", "FRAGMENT")


@cache
def _steps_on(device: torch.device) -> Any:
    """The steps as Triton's kernels, or as operations where Triton is missing or the GPU too old for it."""
    known = torch.version.hip or torch.cuda.get_device_capability(device) >= (7, 0)
    if find_spec("triton") is None or not known:
        return _Steps
    from norms import online_kernels

    return online_kernels


def _define(name: str, schema: str) -> None:
    def on_gpu(*arguments: Any) -> Any:
        return getattr(_steps_on(arguments[0].device), name)(*arguments)

    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, getattr(_Steps, name), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_gpu, "CUDA")


for _name, _schema in _SCHEMAS.items():
    _define(_name, _schema)
_OPERATORS: Any = torch.ops.online_norm


# Opaque to the compiler, which would otherwise recompute these in the backward, from a state that the forward
# has meanwhile advanced. It also shortens compilation. The other steps it makes kernels of itself.


@library.custom_op("online_norm::stream", mutates_args=())
def _stream_compiled(
    offset: Tensor, square: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = torch.stack((m, var)).to(offset.dtype)
    return *_OPERATORS.stream_(offset.contiguous(), square.contiguous(), *state, alpha, eps), state


@_stream_compiled.register_fake
def _(
    offset: Tensor, square: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, inv, y1, y2 = (offset.new_empty(offset.shape) for _ in range(4))
    return mean, inv, y1, y2, offset.new_empty(2, offset.shape[1])


@library.custom_op("online_norm::control", mutates_args=())
def _control_compiled(
    g0: Tensor, g1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None,
    along: Tensor | None, u: Tensor, v: Tensor, plane: int, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = torch.stack((u, v)).to(inv.dtype)
    found = _OPERATORS.control_(
        g0.contiguous(), g1.contiguous(), y1, y2, inv, w, b, r, along, *state, plane, alpha
    )
    return *found, state


@_control_compiled.register_fake
def _(
    g0: Tensor, g1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None,
    along: Tensor | None, u: Tensor, v: Tensor, plane: int, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    states = torch.empty_like(inv), torch.empty_like(inv)
    return *states, torch.empty_like(w), torch.empty_like(b), inv.new_empty(2, inv.shape[1])


class _CompiledSteps(_Steps):
    """The steps as the compiler sees them."""

    @staticmethod
    def stream_(
        offset: Tensor, square: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, inv, y1, y2, state = _stream_compiled(offset, square, m, var, alpha, eps)
        m.copy_(state[0])
        var.copy_(state[1])
        return mean, inv, y1, y2

    @staticmethod
    def control_(
        g0: Tensor, g1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None,
        along: Tensor | None, u: Tensor, v: Tensor, plane: int, alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        us, vs, of_w, of_b, state = _control_compiled(g0, g1, y1, y2, inv, w, b, r, along, u, v, plane, alpha)
        u.copy_(state[0])
        v.copy_(state[1])
        return us, vs, of_w, of_b


def _steps_for(x: Tensor) -> Any:
    if torch.compiler.is_compiling():
        return _CompiledSteps
    if x.device.type == "cuda" and x.numel():
        return _OPERATORS
    return _CpuSteps if x.device.type == "cpu" and x.is_contiguous() else _Steps


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
        steps = _steps_for(x)
        if steps is _OPERATORS and not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
            x = x.contiguous()
        offset, square = steps.moments(x, m)
        mean, inv, y1, y2 = steps.stream_(offset, square, m, var, alpha_fwd, eps)
        r = None if ls_eps is None else steps.layer_scale(y1, y2, weight, bias, ls_eps)
        out = steps.normalise(x, mean, inv, weight, bias, r)
        ctx.save_for_backward(x, weight, bias, mean, inv, y1, y2, r)
        # Not among the saved tensors: their versions are checked, and two forwards may precede two backwards.
        ctx.u, ctx.v = u, v
        ctx.steps, ctx.alpha_bkw = steps, alpha_bkw
        # torch 2.11's dynamo takes a cast that changes nothing for no result of the function: no gradient passes
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inv, y1, y2, r = ctx.saved_tensors
        steps, alpha = ctx.steps, ctx.alpha_bkw
        if steps is _CpuSteps:
            grad = grad.contiguous()
        elif steps is _OPERATORS and grad.stride() != x.stride():  # a kernel goes along both
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        plane = x.numel() // (x.shape[0] * x.shape[1])
        g0, g1 = steps.slopes(grad, x, mean)
        along = None if r is None else steps.along(g0, g1, inv, weight, bias, r)
        us, vs, of_weight, of_bias = steps.control_(
            g0, g1, y1, y2, inv, weight, bias, r, along, ctx.u, ctx.v, plane, alpha
        )
        out = steps.input_gradient(grad, x, mean, inv, weight, bias, r, us, vs, along, alpha)
        return out if out.dtype == x.dtype else out.to(x.dtype), of_weight, of_bias, *(None,) * 8


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
    # torch 2.11 comes here as it traces, when it no longer says that it compiles: new tensors are fake ones then
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
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
