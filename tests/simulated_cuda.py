"""A CUDA device without a GPU: what would wait, what would be launched, and what lies on the wrong device.

    with simulated_cuda() as device:
        x = torch.randn(4, device="cuda")       # says device='cuda:0', and is computed by the CPU
        (x > 0).nonzero()                       # device.waits: one, with the line of code that caused it
        x + torch.ones(4)                       # RuntimeError, as on a GPU

A `CudaTensor` wraps a tensor of the CPU. Python is told that it is on `cuda:0`; torch's C++ is told `lazy:0`, a device
for which autograd needs no driver and no thread. So the two are told apart everywhere: what C++ allocates beside a
`CudaTensor` is one too. A dispatch mode sees each operator below autograd, and

- counts it as a launch, unless it is a view or an allocation. A foreach operator is one. Fused kernels of CUDA may be
  fewer (dropout is one there, and a few here), reductions in several passes more;
- notes where the host would wait: a scalar read, a shape that depends on values (nonzero, a boolean index), a copy to
  the host, and one from memory that is not pinned;
- refuses what mixes devices, and a generator of the CPU.

Autocast acts by CUDA's own lists (https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops"). It cannot tell what is in
kernels: their numerics, speed, memory, nor what inductor, NCCL or CUDA graphs make of a network.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import Library
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INSIDE = torch.device("lazy", 0)  # what C++ takes it for
CPU = torch.device("cpu")
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
ROOT = Path(__file__).resolve().parent.parent

# no kernel: allocations, and views that the schema does not call one
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
}
# the shape of what comes out depends on values
WAITING = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount",
    "repeat_interleave", "is_nonzero", "_local_scalar_dense",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"_to_copy", "copy_", "_foreach_copy_"}
TAKES_HOST_SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_", "full_like", "where"}

# what CUDA's autocast runs in its lower precision, and what in float32
LOWER = (
    "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "mm", "mv", "linear", "addbmm",
    "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "einsum", "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "native_layer_norm", "group_norm", "norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "soft_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp", "prod", "softmax",
    "log_softmax", "cumprod", "cumsum", "sum", "linalg_vector_norm",
)  # fmt: skip


class Wait(NamedTuple):
    """One moment in which the host would wait for the device.

    Attributes:
        phase: that the device was in (`SimulatedCuda.phase`).
        operator: what caused it.
        where: the line of Crucible, or else of a library, that called it.
    """

    phase: str
    operator: str
    where: str


class CudaTensor(Tensor):
    """A tensor of the simulated device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=INSIDE, _extra_dispatch_keys=AUTOCAST,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = SimulatedCuda.active
        assert mode is not None, "a tensor of the simulated device has outlived it"
        return mode.run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, CudaTensor):
            raise RuntimeError("incompatible tensor type: the data of a CUDA tensor are on the device")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA, **options})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first"
        )

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.cpu()).replace("tensor(", "tensor(cuda:0, ", 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)


class SimulatedCuda(TorchDispatchMode):
    """The device: what has been launched on it, and waited for.

    Attributes:
        phase: of what happens now; whoever watches sets it.
        waits: in their order.
        launches: of each phase and operator.
    """

    active: SimulatedCuda | None = None

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.waits: list[Wait] = []
        self.launches: Counter[tuple[str, str]] = Counter()

    def launched(self, *phases: str) -> int:
        """Launches in these phases."""
        return sum(count for (phase, _), count in self.launches.items() if phase in phases)

    def waited(self, *phases: str) -> list[Wait]:
        """Waits in these phases."""
        return [wait for wait in self.waits if wait.phase in phases]

    def wait(self, operator: str) -> None:
        """Note that the host would wait here."""
        self.waits.append(Wait(self.phase, operator, _caller()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator, on whichever device it belongs to."""
        ours = [t for t in tree_leaves((args, kwargs)) if isinstance(t, CudaTensor)]
        target = kwargs.get("device")
        if not ours and not _is_cuda(target):
            return func(*args, **kwargs)
        if _is_composite(func):  # in inference mode operators arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy" and ours and target == CPU:
            self.wait("copy to the host")
            return func(args[0].held, **{k: v for k, v in kwargs.items() if k != "non_blocking"})
        self._check_devices(func, name, args, kwargs)
        self._note_waits(name, args, kwargs)
        if not (name in FREE or func.is_view):
            self.launches[self.phase, name] += 1
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        return tree_map(partial(_wrapped, func, ours), result)

    def _check_devices(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator not in torch.cuda.default_generators:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
        if name in COPYING:
            return
        inputs = [args[0], *args[2:]] if name in INDEXING else args
        scalars = name in INDEXING or name in TAKES_HOST_SCALARS or torch.Tag.pointwise in func.tags
        scalars = scalars and not name.startswith(("_foreach", "_fused", "lerp"))
        for tensor in tree_leaves((inputs, kwargs)):
            if (
                isinstance(tensor, Tensor)
                and not isinstance(tensor, CudaTensor)
                and (tensor.ndim or not scalars)
            ):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {name} has {tuple(tensor.shape)} on the CPU"
                )

    def _note_waits(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in WAITING:
            self.wait(name)
        if name in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a mask")
                if isinstance(index, Tensor) and not isinstance(index, CudaTensor):
                    self.wait(f"{name} by an index on the host")
        if name in ("_to_copy", "copy_"):
            into, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if into is not None and not isinstance(into, CudaTensor):
                self.wait("copy to the host")
            elif not isinstance(source, CudaTensor) and not (asynchronous and _is_pinned(source)):
                self.wait("copy from memory that is not pinned")


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_cuda(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type in ("cuda", INSIDE.type)


def _held(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.held
    return CPU if _is_cuda(value) else value


def _wrapped(func: Any, ours: list[CudaTensor], value: Any) -> Any:
    """A result as a tensor of the device: the very one that was changed in place, else a new one."""
    if not isinstance(value, Tensor):
        return value
    for tensor in ours:
        if tensor.held is value:
            if tensor.stride() != value.stride() or tensor.shape != value.shape:
                raise NotImplementedError(f"{func}: a change of shape in place is not simulated")
            return tensor
    if func.is_view and torch.is_inference_mode_enabled() and not ours[0].is_inference():
        with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary one
            return CudaTensor(value)
    return CudaTensor(value)


def _caller() -> str:
    """The innermost line of Crucible, else of its tests, else of a library that is no part of torch."""
    found = ""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and file != __file__ and "/.venv/" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        if not found and file != __file__ and "/torch/" not in file:
            found = f"{file.partition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return found


# Pinned memory: a mark on a tensor of the CPU


def _is_pinned(tensor: Tensor, *_: Any) -> bool:
    return not tensor.numel() or getattr(tensor, "pinned", False)


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copied = tensor.detach().clone()
    copied.pinned = True  # type: ignore[attr-defined]
    return copied


# Autocast by CUDA's lists


@contextmanager
def _casting_as_cuda() -> Iterator[None]:
    operators_of_aten = Library("aten", "IMPL")
    try:
        for names, to in (
            (LOWER, lambda: torch.get_autocast_dtype("cuda")),
            (FLOAT32, lambda: torch.float32),
        ):
            for name in names:
                packet = getattr(aten, name)
                for overload in packet.overloads():
                    if not overload.endswith("out"):
                        operator = getattr(packet, overload)
                        operators_of_aten.impl(
                            operator, partial(_cast_and_call, operator, to), "AutocastCUDA"
                        )
        yield
    finally:
        operators_of_aten._destroy()


def _cast_and_call(operator: Any, to: Callable[[], torch.dtype], *args: Any, **kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        fits = isinstance(value, CudaTensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(to()) if fits else value

    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return operator(*tree_map(cast, args), **tree_map(cast, kwargs))


# What torch and Lightning ask about the machine


class _Properties:
    name, major, minor, total_memory, multi_processor_count, warp_size = (
        "Simulated GPU",
        9,
        0,
        80 << 30,
        132,
        32,
    )


def _moved(to: Any) -> Any:
    """`torch.Tensor.to` that knows the device."""

    def wrapper(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def inside(value: Any) -> Any:
            named = isinstance(value, str) and value.partition(":")[0] == "cuda"
            return INSIDE if named or (isinstance(value, torch.device) and value.type == "cuda") else value

        return to(tensor, *map(inside, args), **{k: inside(v) for k, v in kwargs.items()})

    return wrapper


def _made(make: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor` that know the device."""

    def wrapper(
        data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> Tensor:
        if isinstance(data, CudaTensor):
            made = data.detach()
            made = made.clone() if make.__name__ == "tensor" else made
            made = made.to(**kwargs) if kwargs else made
        else:
            made = make(data, *args, **kwargs)
        made = made if device is None else made.to(device)
        return made.requires_grad_() if requires_grad else made

    return wrapper


def _grouped(group: Any) -> Any:
    """Torch's grouping of tensors for its foreach kernels, which asks C++ for their device."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return {
            (CUDA if device == INSIDE else device, dtype): lists
            for (device, dtype), lists in group(*args, **kwargs).items()
        }

    return wrapper


# torch deletes the attribute
_OPTIMIZER = import_module("torch.optim.optimizer")


def _machine(device: SimulatedCuda, bf16: bool) -> list[tuple[Any, dict[str, Any]]]:
    """What is asked of each module and class of torch, and what this machine says."""
    generators = (torch.Generator(),)
    capability = (9, 0) if bf16 else (7, 0)
    grouped = {
        "_group_tensors_by_device_and_dtype": _grouped(_foreach_utils._group_tensors_by_device_and_dtype)
    }
    return [
        (torch, {"tensor": _made(torch.tensor), "as_tensor": _made(torch.as_tensor)}),
        (Tensor, {"to": _moved(Tensor.to), "cuda": lambda t, *_, **o: t.to(CUDA, **o), "pin_memory": _pin,
                         "is_pinned": _is_pinned}),
        (torch.cuda, {
            "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
            "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda *_: None,
            "get_device_name": lambda *_: _Properties.name, "get_device_capability": lambda *_: capability,
            "get_device_properties": lambda *_: _Properties, "is_bf16_supported": lambda *_, **__: bf16,
            "empty_cache": lambda: None, "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1 << 20,
            "reset_peak_memory_stats": lambda *_: None, "mem_get_info": lambda *_: (8 << 30, 80 << 30),
            "synchronize": lambda *_: device.wait("synchronize"), "default_generators": generators,
            "manual_seed_all": lambda seed: generators[0].manual_seed(seed),
            "manual_seed": lambda seed: generators[0].manual_seed(seed),
            "get_rng_state": lambda *_: generators[0].get_state(),
            "set_rng_state": lambda state, *_: generators[0].set_state(state),
            "get_rng_state_all": lambda: [generators[0].get_state()],
            "set_rng_state_all": lambda states: generators[0].set_state(states[0]),
        }),
        (torch.cuda.amp.common, {"amp_definitely_not_available": lambda: False}),
        (torch.accelerator, {
            "is_available": lambda *_, **__: True, "current_accelerator": lambda *_, **__: torch.device("cuda"),
            "device_count": lambda: 1, "current_device_index": lambda: 0, "set_device_index": lambda *_: None,
        }),
        (_foreach_utils, grouped), (_OPTIMIZER, grouped), (torch.nn.utils.clip_grad, grouped),
    ]  # fmt: skip


@contextmanager
def simulated_cuda(bf16: bool = True) -> Iterator[SimulatedCuda]:
    """The machine has a GPU inside; afterwards it is as before.

    Args:
        bf16: whether the GPU has instructions for it. Else mixed precision is fp16, with a scaler.
    """
    device = SimulatedCuda()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for owner, names in _machine(device, bf16):
            for name, value in names.items():
                stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch.object(SimulatedCuda, "active", device))
        for kinds in (_foreach_utils._foreach_supported_types, _OPTIMIZER._foreach_supported_types):
            kinds.append(CudaTensor)  # type: ignore[arg-type]
            stack.callback(kinds.remove, CudaTensor)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the object that it is
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(_casting_as_cuda())
        stack.enter_context(device)
        yield device
