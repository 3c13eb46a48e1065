"""Online norm's kernels for a GPU, interpreted: the definition's numbers, few launches, and code for a real device."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from online_definition import assert_follows, online_norm, step
from torch import Tensor, nn

from norms import online
from norms.online import STREAMS, OnlineNorm

sys.path.append(str(ROOT / "benchmarks"))
from launches import Launches, launches, steps_of_online_norm

STEPS = ("moments", "stream_", "layer_scale", "normalise", "slopes", "along", "control_", "input_gradient")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, on numbers that are not finite


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """The kernels, run by Triton's interpreter on CPU tensors; scans hold 16 samples at a time, passes 32 elements."""
    pytest.importorskip("triton", reason="needs Triton")
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted", ROOT / "norms" / "online_kernels.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_SAMPLES", 16)
    monkeypatch.setattr(module, "_TILE", 32)
    return module


@pytest.mark.parametrize(
    ("space", "ecm"),
    [
        pytest.param(
            space, ecm, id=f"{space}-{ecm}", marks=[pytest.mark.nightly] if (row + column) % 3 else []
        )
        for row, space in enumerate([(), (3, 2), "channels_last"])
        for column, ecm in enumerate(["ls", "ac", "none"])
    ],
)
def test_the_kernels_equal_the_sequential_definition(kernels, ecm, space):
    norm = online_norm(3, alpha_fwd=15 / 16, alpha_bkw=7 / 8, ecm=ecm, clamp_val=1.5)
    shape = (11, 5) if space == "channels_last" else space  # whose plane is cut into parts
    batches = [2 * torch.randn(n, 3, *shape, dtype=torch.float64) + 1 for n in (18 if space == () else 3, 2)]
    if space == "channels_last":
        batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]
        assert kernels._plan(batches[0]).grid[2] > 1
    with steps_of_online_norm(kernels):
        assert_follows(norm, batches, 1e-10)


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.999, 0.99)])
def test_the_kernels_are_exact_without_memory_and_with_a_long_one(kernels, alphas):
    norm = online_norm(2, alpha_fwd=alphas[0], alpha_bkw=alphas[1])
    with steps_of_online_norm(kernels):
        assert_follows(norm, [torch.randn(n, 2, 2, 2, dtype=torch.float64) for n in (3, 4)], 1e-10)


def test_the_kernels_are_exact_where_a_control_coefficient_is_negative(kernels):
    norm, x = (
        online_norm(2, alpha_fwd=0.999, alpha_bkw=0.99),
        13 * torch.randn(5, 2, 3, 3, dtype=torch.float64),
    )
    assert (1 - 0.01 * (x * x).mean((2, 3)) < 0).any()
    with steps_of_online_norm(kernels):
        assert_follows(norm, [x, x[:2]], 1e-10)


def test_in_float32_the_kernels_stay_close_to_the_definition_with_a_mean_far_from_zero(kernels):
    norm = online_norm(2, dtype=torch.float32)
    with torch.no_grad():
        norm.m.fill_(99.0)
    with steps_of_online_norm(kernels):
        assert_follows(norm, [torch.randn(n, 2, 4, 4) + 100 for n in (6, 3)], 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_kernels_equal_the_plain_operations(kernels, dtype):
    norm = online_norm(2, dtype=torch.float32)
    norm.weight.data = norm.weight.data.to(dtype)
    plain = copy.deepcopy(norm)
    x, grad = torch.randn(2, 4, 2, 3, 3).to(dtype)
    with steps_of_online_norm(kernels):
        found = step(norm, x, grad)
    with steps_of_online_norm(online._Steps):
        expected = step(plain, x, grad)
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == other.dtype == dtype
        torch.testing.assert_close(value, other)
    assert norm.weight.grad.dtype == dtype
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
    for name in STREAMS:
        torch.testing.assert_close(getattr(norm, name), getattr(plain, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_kernels_keep_the_state_of_a_channel_whose_update_is_not_finite(kernels, bad):
    norm, before = online_norm(2, ecm="none"), online_norm(2, ecm="none")
    x, grad = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    broken_x, broken_grad = x.clone(), grad.clone()
    broken_x[1, 0, 0, 0] = broken_grad[1, 0, 0, 0] = bad
    with steps_of_online_norm(kernels):
        norm(broken_x)
        step(norm, x, broken_grad)
    for name in ("u", "v"):
        new, old = getattr(norm, name), getattr(before, name)
        assert new[0] == old[0]
        assert new[1] != old[1]
    norm, plain = online_norm(2, ecm="none"), online_norm(2, ecm="none")
    with steps_of_online_norm(kernels):
        norm(broken_x)
    with steps_of_online_norm(online._Steps):
        plain(broken_x)
    for name in ("m", "var"):
        assert getattr(norm, name)[0] == getattr(before, name)[0]
        torch.testing.assert_close(getattr(norm, name), getattr(plain, name))


def test_a_gradient_that_lies_otherwise_than_the_input_is_brought_to_its_layout(kernels):
    x, grad = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    with steps_of_online_norm(online._OPERATORS):
        _, dx = step(online_norm(3), x, grad.contiguous(memory_format=torch.channels_last))
        _, expanded = step(online_norm(3), x.transpose(2, 3), torch.ones(()).double().expand(2, 3, 4, 2))
    torch.testing.assert_close(dx, step(online_norm(3), x, grad)[1])
    torch.testing.assert_close(
        expanded, step(online_norm(3), x.transpose(2, 3), torch.ones_like(expanded))[1]
    )


# Launches


def total(norm: nn.Module, steps: Any, channels_last: bool = False) -> tuple[int, int]:
    with steps_of_online_norm(steps):
        forward, backward = launches(norm, (128, 8, 4, 4), channels_last)
    return sum(forward.values()), sum(backward.values())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{"ecm": "ls"}, {"ecm": "ac"}, {"ecm": "none"}, {"affine": False}], ids=str
)
def test_a_norm_launches_at_most_six_kernels_a_direction_on_a_gpu(kwargs, channels_last):
    assert max(total(OnlineNorm(8, **kwargs), online._OPERATORS, channels_last)) <= 6


def test_the_count_sees_operations_that_are_not_kernels_of_their_own():
    assert min(total(OnlineNorm(8), online._Steps)) > 50

    class Fault(online._Steps):
        """The operators, but that one makes a copy on its way."""

        moments = staticmethod(lambda x, m: online._OPERATORS.moments(x.clone(), m))

    for name in STEPS[1:]:
        setattr(Fault, name, staticmethod(getattr(online._OPERATORS, name)))
    right, wrong = total(OnlineNorm(8), online._OPERATORS), total(OnlineNorm(8), Fault)
    assert wrong == (right[0] + 1, right[1])


def test_each_operator_is_one_launch_of_a_kernel(kernels, monkeypatch):
    launched: list[Any] = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *rest, **more: launched.append(kernel))
    for ecm in ("ls", "none"):
        launched.clear()
        norm = OnlineNorm(8, ecm=ecm)
        with steps_of_online_norm(kernels), Launches() as others:
            out = norm(torch.randn(4, 8, 3, 3, requires_grad=True))
            forward = len(launched)
            torch.autograd.backward(out, torch.empty_like(out))
        assert (forward, len(launched)) == ((4, 8) if ecm == "ls" else (3, 6))
        assert set(others.names) <= {"randn"}


def test_every_step_is_an_operator_and_a_kernel(kernels):
    for name in STEPS:
        assert callable(getattr(kernels, name))
        assert hasattr(torch.ops.online_norm, name)
    assert set(STEPS) == set(online._SCHEMAS)


# A real device


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(channels_last, monkeypatch):
    triton = pytest.importorskip("triton", reason="needs Triton")
    backend = pytest.importorskip("triton.backends.compiler")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("Triton without NVIDIA's compiler")
    from norms import online_kernels

    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        online_kernels,
        "_launch",
        lambda kernel, grid, *args, **constants: seen.append((kernel, args, constants)),
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(128, 64, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
    with steps_of_online_norm(online_kernels):
        out = OnlineNorm(64)(x)
        out.backward(torch.empty_like(out))
    assert len(seen) == 8
    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    for kernel, arguments, constants in seen:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        constants |= {
            name: 1
            for name, value in given.items()
            if value is not None and type(value) is int and value == 1
        }
        signature = {
            name: "constexpr"
            if name in constants
            else kinds[value.dtype]
            if isinstance(value, Tensor)
            else "i32"
            for name, value in {**given, **constants}.items()
        }
        source = triton.compiler.ASTSource(
            kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        )
        code = triton.compile(source, target=backend.GPUTarget("cuda", 90, 32))
        assert code.asm["cubin"], kernel.__name__
        assert ".local" not in code.asm["ptx"], f"{kernel.__name__} spills its registers"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "shape", [(130, 64, 8, 8), (5, 3), (300, 8, 3, 3), (2, 2048, 7, 7), (3, 5, 40, 60)], ids=str
)
@pytest.mark.parametrize(
    "run", [lambda norm: norm, lambda norm: torch.compile(norm)], ids=["eager", "compiled"]
)
def test_on_a_gpu_online_norm_equals_the_definition(shape, run: Callable[[nn.Module], nn.Module]):
    for layout in (torch.contiguous_format, torch.channels_last):
        norm = online_norm(shape[1], dtype=torch.float64)
        on_gpu = copy.deepcopy(norm).float().cuda()
        call = run(on_gpu)
        for _ in range(2):
            x, grad = torch.randn(2, *shape)
            if len(shape) == 4:
                x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
            out, dx = step(call, x.cuda(), grad.cuda())
            exact, exact_dx = step(norm, x.double(), grad.double())
            torch.testing.assert_close(out.cpu().double(), exact, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(dx.cpu().double(), exact_dx, atol=1e-3, rtol=1e-3)
        for name in STREAMS:
            torch.testing.assert_close(
                getattr(on_gpu, name).cpu().double(), getattr(norm, name), atol=1e-3, rtol=1e-3
            )
