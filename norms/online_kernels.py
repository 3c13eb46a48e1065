"""Online normalization in Triton: each function here is one kernel, where a chain of operations would be dozens.

What a kernel sees of an input `(N, C, *spatial)` is `(N, C, S)` by its strides, contiguous or channels last: the
large passes read and write it as it lies. Means over space come in K parts `(N, K, C)`, so that there are programs
enough for a whole GPU, and are added up where they are read. Sums and states are of the dtype of the statistics.

What is sequential, over samples, is a scan in registers. The state *before* each sample is wanted: the scan is over
what lies one row above, and its first row is the identity. Results do not depend on the order of programs.

Triton's own helpers (`tl.sum`, `tl.zeros`) are compiled functions: they are left out, so that the tests can interpret
these kernels in a process of which Triton is already a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements that a program holds at a time
_PROGRAMS = 1024  # that a large pass has at least, where the input can be cut so
_SAMPLES = 128  # that a scan holds at a time
_CHANNELS = 64  # of a tile, where channels lie last


# Parts of kernels


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _later(p1, q1, m1, v1, p2, q2, m2, v2):
    """Two spans of samples as one. A span keeps the share p of what was before it, and has itself the share q = 1 - p,
    mean m and variance v: a mixture's mean and variance. q is carried, as 1 - p would be lost in rounding."""
    q = q2 + p2 * q1
    share = tl.where(q > 0, p2 * q1 / q, 0.0)
    apart = m1 - m2
    v = share * v1 + (1 - share) * v2 + share * (1 - share) * apart * apart
    return p1 * p2, q, share * m1 + (1 - share) * m2, v


@triton.jit
def _bounded(x):
    # an infinite product would make NaN of a zero state, where the sequential form has zero
    return tl.where(x > 3.4028234e38, 3.4028234e38, tl.where(x < -3.4028234e38, -3.4028234e38, x))


@triton.jit
def _after(f1, c1, b1, v1, u1, f2, c2, b2, v2, u2):
    """Two affine maps of the control states as one: v -> f v + v1, u -> c v + b u + u1."""
    return _bounded(f1 * f2), _bounded(c2 * f1 + b2 * c1), b1 * b2, f2 * v1 + v2, c2 * v1 + b2 * u1 + u2


@triton.jit
def _whole(pointer, rows, c, mask, channels, parts, wide: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr):
    """The sum of the parts `(N, parts, C)` at these rows and channels, `(BC, BN)`."""
    total = tl.full((BC, BN), 0.0, wide)
    for part in range(parts):
        total += tl.load(pointer + (rows * parts + part) * channels + c, mask=mask, other=0.0).to(wide)
    return total


@triton.jit
def _at(tile, here):
    """The column of a tile that `here` marks."""
    return tl.reduce(tl.where(here, tile, 0.0), 1, _add)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


# Kernels


@triton.jit
def _plane_means_kernel(
    g_ptr, x_ptr, centre_ptr, first_ptr, second_ptr, channels, space, step, stride_n, stride_c, stride_s, centre_n,
    moments: tl.constexpr, wide: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    c = column[:, None]
    lies = n * stride_n + c.to(tl.int64) * stride_c
    centre = tl.load(centre_ptr + n * centre_n + c, mask=c < channels, other=0.0).to(wide)
    first, second = tl.full((BC, BS), 0.0, wide), tl.full((BC, BS), 0.0, wide)
    end = tl.minimum((part + 1) * step, space)
    for start in range(part * step, end, BS):
        s = start + tl.arange(0, BS)[None, :]
        mask = (c < channels) & (s < end)
        x = tl.load(x_ptr + lies + s.to(tl.int64) * stride_s, mask=mask, other=0.0).to(wide)
        centred = tl.where(mask, x - centre, 0.0)
        if moments:  # noqa: SIM108 (known when it is compiled)
            g = centred
        else:
            g = tl.load(g_ptr + lies + s.to(tl.int64) * stride_s, mask=mask, other=0.0).to(wide)
        first += g
        second += g * centred
    out = (n * parts + part) * channels + column
    tl.store(first_ptr + out, tl.reduce(first, 1, _add) / space, mask=column < channels)
    tl.store(second_ptr + out, tl.reduce(second, 1, _add) / space, mask=column < channels)


@triton.jit
def _stream_kernel(
    offset_ptr, square_ptr, m_ptr, var_ptr, mean_ptr, inv_ptr, y1_ptr, y2_ptr, samples,
    channels, parts, alpha: tl.constexpr, eps: tl.constexpr, wide: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    c = column[:, None]
    old_m = tl.load(m_ptr + column, mask=column < channels, other=0.0).to(wide)
    old_var = tl.load(var_ptr + column, mask=column < channels, other=0.0).to(wide)
    drift_before, var_before = tl.full((BC,), 0.0, wide), old_var  # of the mean, from where it was
    for start in range(0, samples, BN):
        place = tl.arange(0, BN)[None, :]
        row = start + place
        here = (c < channels) & (row < samples)
        offset = _whole(offset_ptr, row, c, here, channels, parts, wide, BC, BN)
        square = _whole(square_ptr, row, c, here, channels, parts, wide, BC, BN)
        s2 = square - offset * offset
        s2 = tl.where(s2 < 0, 0.0, s2)
        above = (c < channels) & (place > 0) & (row <= samples)
        m = _whole(offset_ptr, row - 1, c, above, channels, parts, wide, BC, BN)
        v = _whole(square_ptr, row - 1, c, above, channels, parts, wide, BC, BN) - m * m
        v = tl.where(v < 0, 0.0, v)
        p = tl.where(above, tl.full((BC, BN), alpha, wide), tl.full((BC, BN), 1.0, wide))
        q = tl.where(above, tl.full((BC, BN), 1 - alpha, wide), tl.full((BC, BN), 0.0, wide))
        p, q, m, v = tl.associative_scan((p, q, m, v), 1, _later)
        apart = drift_before[:, None] - m
        drift = p * drift_before[:, None] + q * m
        var = p * var_before[:, None] + q * v + p * q * apart * apart
        d = offset - drift
        inv = tl.rsqrt(var + eps)
        out = row * channels + c
        tl.store(mean_ptr + out, old_m[:, None] + drift, mask=here)
        tl.store(inv_ptr + out, inv, mask=here)
        tl.store(y1_ptr + out, d * inv, mask=here)
        tl.store(y2_ptr + out, (s2 + d * d) * inv * inv, mask=here)
        last = row == tl.minimum(start + BN, samples) - 1
        drift_before = _at(drift + (1 - alpha) * d, last)
        var_before = _at(alpha * var + (1 - alpha) * (s2 + alpha * d * d), last)
    finite = _is_finite(drift_before) & _is_finite(var_before)
    tl.store(m_ptr + column, tl.where(finite, old_m + drift_before, old_m), mask=column < channels)
    tl.store(var_ptr + column, tl.where(finite, var_before, old_var), mask=column < channels)


@triton.jit
def _layer_scale_kernel(
    y1_ptr, y2_ptr, w_ptr, b_ptr, r_ptr, channels, eps: tl.constexpr, wide: tl.constexpr, BC: tl.constexpr
):
    n = tl.program_id(0)
    total = tl.full((BC,), 0.0, wide)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        mask = c < channels
        y1 = tl.load(y1_ptr + n * channels + c, mask=mask, other=0.0)
        y2 = tl.load(y2_ptr + n * channels + c, mask=mask, other=0.0)
        w = tl.load(w_ptr + c, mask=mask, other=0.0).to(wide)
        b = tl.load(b_ptr + c, mask=mask, other=0.0).to(wide)
        total += w * w * y2 + 2 * w * b * y1 + b * b
    tl.store(r_ptr + n, tl.rsqrt(tl.reduce(total, 0, _add) / channels + eps))


@triton.jit
def _along_kernel(
    g0_ptr,
    g1_ptr,
    inv_ptr,
    w_ptr,
    b_ptr,
    r_ptr,
    along_ptr,
    channels,
    parts,
    wide: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    total = tl.full((1, BC), 0.0, wide)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)[None, :]
        mask = c < channels
        g0 = _whole(g0_ptr, n, c, mask, channels, parts, wide, 1, BC)
        g1 = _whole(g1_ptr, n, c, mask, channels, parts, wide, 1, BC)
        inv = tl.load(inv_ptr + n * channels + c, mask=mask, other=0.0)
        w = tl.load(w_ptr + c, mask=mask, other=0.0).to(wide)
        b = tl.load(b_ptr + c, mask=mask, other=0.0).to(wide)
        total += w * g1 * inv + b * g0
    r = tl.load(r_ptr + n)
    tl.store(along_ptr + n + tl.arange(0, 1), r * r * r * (tl.reduce(total, 1, _add) / channels))


@triton.jit
def _slopes(
    g0_ptr, g1_ptr, w, b, r_ptr, along_ptr, row, c, mask, y1, y2, inv, channels, parts,
    scaled: tl.constexpr, wide: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Means over space of dL/dz and of y dL/dz; layer scaling takes the part along z away."""
    d0 = _whole(g0_ptr, row, c, mask, channels, parts, wide, BC, BN)
    d1 = _whole(g1_ptr, row, c, mask, channels, parts, wide, BC, BN) * inv
    if scaled:
        r = tl.load(r_ptr + row + 0 * c, mask=mask, other=0.0)
        along = tl.load(along_ptr + row + 0 * c, mask=mask, other=0.0)
        d0 = r * d0 - along * (w * y1 + b)
        d1 = r * d1 - along * (w * y2 + b * y1)
    return d0, d1


@triton.jit
def _control_kernel(
    g0_ptr, g1_ptr, y1_ptr, y2_ptr, inv_ptr, w_ptr, b_ptr, r_ptr, along_ptr, u_ptr, v_ptr, us_ptr, vs_ptr,
    grad_w_ptr, grad_b_ptr, samples, channels, parts, plane,
    alpha: tl.constexpr, scaled: tl.constexpr, wide: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    c, inside = column[:, None], column < channels
    old_u = tl.load(u_ptr + column, mask=inside, other=0.0).to(wide)
    old_v = tl.load(v_ptr + column, mask=inside, other=0.0).to(wide)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(wide)[:, None]
    b = tl.load(b_ptr + column, mask=inside, other=0.0).to(wide)[:, None]
    u_before, v_before = old_u, old_v
    zero = tl.full((BC,), 0.0, wide)
    grad_w, grad_b, squares = zero, zero, zero
    for start in range(0, samples, BN):
        place = tl.arange(0, BN)[None, :]
        row = start + place
        above = (c < channels) & (place > 0) & (row <= samples)
        y1 = tl.load(y1_ptr + (row - 1) * channels + c, mask=above, other=0.0)
        y2 = tl.load(y2_ptr + (row - 1) * channels + c, mask=above, other=0.0)
        inv = tl.load(inv_ptr + (row - 1) * channels + c, mask=above, other=0.0)
        d0, d1 = _slopes(
            g0_ptr, g1_ptr, w, b, r_ptr, along_ptr, row - 1, c, above, y1, y2, inv, channels, parts,
            scaled, wide, BC, BN,
        )  # fmt: skip
        keep = tl.where(above, tl.full((BC, BN), alpha, wide), tl.full((BC, BN), 1.0, wide))
        f, cross, keep, of_v, of_u = tl.associative_scan(
            (1 - (1 - alpha) * y2, -(1 - alpha) * y1 * inv, keep, w * d1, w * d0 * inv), 1, _after
        )
        vs = f * v_before[:, None] + of_v
        us = cross * v_before[:, None] + keep * u_before[:, None] + of_u
        here = (c < channels) & (row < samples)
        tl.store(vs_ptr + row * channels + c, vs, mask=here)
        tl.store(us_ptr + row * channels + c, us, mask=here)
        y1 = tl.load(y1_ptr + row * channels + c, mask=here, other=0.0)
        y2 = tl.load(y2_ptr + row * channels + c, mask=here, other=0.0)
        inv = tl.load(inv_ptr + row * channels + c, mask=here, other=0.0)
        d0, d1 = _slopes(
            g0_ptr, g1_ptr, w, b, r_ptr, along_ptr, row, c, here, y1, y2, inv, channels, parts,
            scaled, wide, BC, BN,
        )  # fmt: skip
        grad_w += tl.reduce(tl.where(here, d1, 0.0), 1, _add)
        grad_b += tl.reduce(tl.where(here, d0, 0.0), 1, _add)
        squares += tl.reduce(y2, 1, _add)
        last = row == tl.minimum(start + BN, samples) - 1
        u_before = _at(us + ((w * d0 - (1 - alpha) * vs * y1) * inv - (1 - alpha) * us), last)
        v_before = _at(vs + (w * d1 - (1 - alpha) * vs * y2), last)
    # a gradient that overflowed, as loss scaling provokes, must not stay in the control state for good
    finite = _is_finite(u_before) & _is_finite(v_before) & _is_finite(squares)
    tl.store(u_ptr + column, tl.where(finite, u_before, old_u), mask=inside)
    tl.store(v_ptr + column, tl.where(finite, v_before, old_v), mask=inside)
    tl.store(grad_w_ptr + column, grad_w * plane, mask=inside)
    tl.store(grad_b_ptr + column, grad_b * plane, mask=inside)


@triton.jit
def _rescale_kernel(
    g_ptr, x_ptr, mean_ptr, inv_ptr, w_ptr, b_ptr, r_ptr, us_ptr, vs_ptr, along_ptr, out_ptr, channels, space, step,
    stride_n, stride_c, stride_s, gain: tl.constexpr, scaled: tl.constexpr, backward: tl.constexpr,
    wide: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[:, None]
    inside = c < channels
    lies = n * stride_n + c.to(tl.int64) * stride_c
    w = tl.load(w_ptr + c, mask=inside, other=0.0).to(wide)
    b = tl.load(b_ptr + c, mask=inside, other=0.0).to(wide)
    mean = tl.load(mean_ptr + n * channels + c, mask=inside, other=0.0)
    inv = tl.load(inv_ptr + n * channels + c, mask=inside, other=0.0)
    of_g, of_x, shift = w * inv, w * inv, b
    if scaled:
        r = tl.load(r_ptr + n)
        of_g, of_x, shift = r * of_g, r * of_x, r * b
    if backward:
        of_x = -gain * tl.load(vs_ptr + n * channels + c, mask=inside, other=0.0) * inv * inv
        shift = -gain * tl.load(us_ptr + n * channels + c, mask=inside, other=0.0)
        if scaled:
            along = tl.load(along_ptr + n)
            of_x -= along * (w * inv) * (w * inv)
            shift -= along * w * b * inv
    part = tl.program_id(2)
    end = tl.minimum((part + 1) * step, space)
    for start in range(part * step, end, BS):
        s = start + tl.arange(0, BS)[None, :]
        mask = inside & (s < end)
        place = lies + s.to(tl.int64) * stride_s
        out = (tl.load(x_ptr + place, mask=mask, other=0.0).to(wide) - mean) * of_x + shift
        if backward:
            out += tl.load(g_ptr + place, mask=mask, other=0.0).to(wide) * of_g
        tl.store(out_ptr + place, out, mask=mask)


# Their launches: the steps of `norms.online`, which says what they take and give. `x` is dense, `grad` lies as `x`


class _Plan(NamedTuple):
    """How a large pass is cut up: its grid, positions a program, strides of `(N, C, S)`, and the tile."""

    grid: tuple[int, int, int]
    space: int
    step: int
    strides: tuple[int, int, int]
    tile: dict[str, int]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _plan(x: Tensor) -> _Plan:
    samples, channels = x.shape[:2]
    space = x[0, 0].numel()
    if x.is_contiguous() and space > 1:
        strides = (channels * space, space, 1)
        across = min(_TILE, _power(space))
        deep = min(_TILE // across, _power(channels))
    else:
        strides = (channels * space, 1, channels)
        deep = min(_CHANNELS if space > 1 else _TILE, _power(channels))
        across = min(_TILE // deep, _power(space))
    blocks = -(-channels // deep)
    parts = max(1, min(-(-_PROGRAMS // (samples * blocks)), -(-space // (4 * across))))
    step = -(-space // parts)
    return _Plan((samples, blocks, -(-space // step)), space, step, strides, {"BC": deep, "BS": across})


def _scan_tile(samples: int, channels: int) -> dict[str, int]:
    deep = max(16, min(_SAMPLES, _power(samples)))
    return {"BC": min(_TILE // deep, _power(channels)), "BN": deep}


def _parts(means: Tensor) -> tuple[int, int, int]:
    """`N, K, C` of means over space; of K = 1, where the compiler made them."""
    return len(means), 1 if means.ndim == 2 else means.shape[1], means.shape[-1]


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **constants)


def _plane_means(
    g: Tensor, x: Tensor, centre: Tensor, moments: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    plan = _plan(x)
    samples, channels = x.shape[:2]
    first, second = (x.new_empty(samples, plan.grid[2], channels, dtype=dtype) for _ in range(2))
    _launch(
        _plane_means_kernel, plan.grid, g, x, centre, first, second, channels, plan.space, plan.step, *plan.strides,
        0 if centre.ndim == 1 else channels, moments=moments, wide=_wide(dtype), **plan.tile,
    )  # fmt: skip
    return first, second


def moments(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return _plane_means(x, x, m, True, torch.promote_types(x.dtype, m.dtype))


def slopes(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return _plane_means(grad, x, mean, False, mean.dtype)


def stream_(
    offset: Tensor, square: Tensor, m: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, parts, channels = _parts(offset)
    outputs = [offset.new_empty(samples, channels) for _ in range(4)]
    tile = _scan_tile(samples, channels)
    _launch(
        _stream_kernel, (-(-channels // tile["BC"]),), offset, square, m, var, *outputs, samples,
        channels, parts, alpha=alpha, eps=eps, wide=_wide(offset.dtype), **tile,
    )  # fmt: skip
    mean, inv, y1, y2 = outputs
    return mean, inv, y1, y2


def layer_scale(y1: Tensor, y2: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    r = y1.new_empty(len(y1), 1)
    channels = y1.shape[1]
    block = min(_TILE, _power(channels))
    _launch(
        _layer_scale_kernel, (len(y1),), y1, y2, w, b, r, channels, eps=eps, wide=_wide(y1.dtype), BC=block
    )
    return r


def along(g0: Tensor, g1: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    out = torch.empty_like(r)
    _, parts, channels = _parts(g0)
    block = min(_TILE, _power(channels))
    _launch(
        _along_kernel, (len(r),), g0, g1, inv, w, b, r, out, channels, parts, wide=_wide(inv.dtype), BC=block
    )
    return out


def control_(
    g0: Tensor, g1: Tensor, y1: Tensor, y2: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None,
    along: Tensor | None, u: Tensor, v: Tensor, plane: int, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    samples, parts, channels = _parts(g0)
    us, vs = torch.empty_like(inv), torch.empty_like(inv)
    grad_w, grad_b = torch.empty_like(w), torch.empty_like(b)
    tile = _scan_tile(samples, channels)
    scaled = r is not None
    _launch(
        _control_kernel, (-(-channels // tile["BC"]),), g0, g1, y1, y2, inv, w, b, r if scaled else inv,
        along if scaled else inv, u, v, us, vs, grad_w, grad_b, samples, channels, parts, plane,
        alpha=alpha, scaled=scaled, wide=_wide(inv.dtype), **tile,
    )  # fmt: skip
    return us, vs, grad_w, grad_b


def normalise(x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None) -> Tensor:
    return _rescale(x, x, mean, inv, w, b, r, None, None, None, 0.0)


def input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None, us: Tensor, vs: Tensor,
    along: Tensor | None, alpha: float,
) -> Tensor:  # fmt: skip
    return _rescale(grad, x, mean, inv, w, b, r, us, vs, along, 1 - alpha)


def _rescale(
    grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor, w: Tensor, b: Tensor, r: Tensor | None, us: Tensor | None,
    vs: Tensor | None, along: Tensor | None, gain: float,
) -> Tensor:  # fmt: skip
    plan, out = _plan(x), torch.empty_like(x)
    absent = inv  # any address: it is not read
    optional = (absent if t is None else t for t in (r, us, vs, along))
    _launch(
        _rescale_kernel, plan.grid, grad, x, mean, inv, w, b, *optional, out, x.shape[1], plan.space, plan.step,
        *plan.strides, gain=gain, scaled=r is not None, backward=us is not None, wide=_wide(mean.dtype), **plan.tile,
    )  # fmt: skip
    return out
