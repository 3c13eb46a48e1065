"""Give any network another activation, or anti-aliased downsampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crucible.modules import replace_modules
from crucible.options import ConfigError
from crucible.technique import Step, Technique
from models.layers import AVG_POOL, CONV, MAX_POOL

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

ActivationName = Literal[
    "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "softplus", "silu", "gelu", "mish", "hardswish"
]  # fmt: skip
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}
# their gradient follows from the output, so that overwriting the input saves memory
_IN_PLACE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU)
# timm has its own of the same kinds; its Sigmoid, HardSigmoid and Tanh are gates
_TIMM_ACTIVATIONS = {
    "Swish", "Mish", "HardSwish", "HardMish", "GELU", "GELUTanh", "QuickGELU", "SwishMe", "MishMe",
    "HardSwishMe", "HardMishMe",
}  # fmt: skip


@dataclass(frozen=True)
class ActivationSwap(Technique):
    """Another activation in place of the network's own; gates stay."""

    activation: Annotated[
        ActivationName | None,
        "in place of the network's own; null: as built",
    ] = None

    def attach(self, step: Step) -> None:
        assert self.activation is not None
        step.network.append(partial(convert_activations, name=self.activation))


@dataclass(frozen=True)
class BlurDownsampling(Technique):
    """Anti-aliased downsampling (arXiv 1904.11486)."""

    blur_pool: Annotated[bool, "low-pass filter at every halving of the resolution (arXiv 1904.11486)"] = (
        False
    )

    def attach(self, step: Step) -> None:
        step.network.append(partial(blur_downsampling, input_dim=step.setting.input_dim))


# Activations


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, tuple(ACTIVATIONS.values())):
        return True
    return type(module).__name__ in _TIMM_ACTIVATIONS and type(module).__module__.startswith("timm.layers.")


def convert_activations(network: nn.Module, name: str) -> nn.Module:
    """Exchange every activation of the ReLU kind, in place; gates (sigmoid, softmax) stay.

    Raises:
        ConfigError: where the network has none.
    """
    found: dict[int, Any] = {id(module): module for module in network.modules() if _is_activation(module)}
    if not found:
        raise ConfigError(
            f"model.activation={name}: {type(network).__name__} has no activation module to exchange"
        )
    kind = ACTIVATIONS[name]
    like = next(network.parameters(), None)
    new: dict[int, nn.Module] = {}
    for key, source in found.items():
        if type(source) is kind:
            continue
        target: Any = kind()
        if isinstance(target, _IN_PLACE):
            target.inplace = getattr(source, "inplace", False)
        if like is not None:
            target.to(device=like.device, dtype=like.dtype)
        new[key] = target.train(source.training)
    return replace_modules(network, new)


# Anti-aliased downsampling


class BlurPool(nn.Module):
    """Binomial filter (1, 2, 1) / 4 along each dimension, then every `stride`-th position.

    Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486. `(N, C, *spatial)`, any float
    dtype. The border is reflected, or repeated where the map is too small for that.

    Args:
        stride: per spatial dimension; one of stride 1 is left as it is.
        padding: positions added before and after each filtered dimension.
        ceil_mode: a last window that sticks out by one position counts.
    """

    kernel: Tensor

    def __init__(
        self, stride: tuple[int, ...], padding: tuple[int, int] = (1, 1), ceil_mode: bool = False
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        lines = [torch.tensor([0.25, 0.5, 0.25] if s > 1 else [1.0]) for s in stride]
        kernel = reduce(lambda a, b: a[..., None] * b, lines)
        self.register_buffer("kernel", kernel[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        smallest = math.inf
        for size, stride in zip(reversed(x.shape[2:]), reversed(self.stride), strict=True):
            before, after = self.padding if stride > 1 else (0, 0)
            if self.ceil_mode and stride > 1:
                after += -(size + before + after - 3) % stride
            padding += [before, after]
            smallest = min(smallest, size - max(before, after))
        x = F.pad(x, padding, mode="reflect" if smallest > 0 else "replicate")
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, *self.kernel.shape[1:])
        return _CONVOLVE[len(self.stride)](x, kernel, stride=self.stride, groups=channels)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"


def blur_downsampling(network: nn.Module, input_dim: int) -> nn.Module:
    """Blur wherever a convolution or a pool halves the resolution; sizes stay.

    A strided convolution or max pool runs at stride 1 and is blurred and subsampled after; norm and activation
    follow at the lower resolution (in the paper they come before the blur, at four times the cost). For a 1x1
    convolution the order makes no difference, and the blur comes first. An average pool becomes the blur.
    Strides above 2, as of patch embeddings, are no halving and stay.
    """
    kinds = (CONV[input_dim], MAX_POOL[input_dim], AVG_POOL[input_dim])
    found: list[tuple[Any, tuple[int, ...]]] = []
    for module in network.modules():
        if isinstance(module, kinds):
            stride = _tuple(module.stride, input_dim)  # type: ignore[arg-type]
            if max(stride) == 2:
                found.append((module, stride))
    if not found:
        raise ConfigError(
            f"model.blur_pool=true: {type(network).__name__} has no convolution or pool of stride 2 "
            f"for {input_dim}-D input"
        )
    like = next(network.parameters(), torch.zeros(0))
    new: dict[int, nn.Module] = {}
    for module, stride in found:
        ceil_mode = getattr(module, "ceil_mode", False) and _last_window_starts_inside(module, input_dim)
        if isinstance(module, AVG_POOL[input_dim]):
            lost = _positions_lost(module, stride, input_dim)
            if lost is not None:
                blur = BlurPool(stride, ((3 - lost) // 2, (2 - lost) // 2), ceil_mode)
                new[id(module)] = blur.to(device=like.device, dtype=like.dtype)
            continue
        module.stride = (1,) * input_dim
        module.blur = BlurPool(stride).to(device=like.device, dtype=like.dtype)
        if ceil_mode:
            module.register_forward_pre_hook(_extend_end)
        if isinstance(module, CONV[input_dim]) and _is_pointwise(module):
            module.register_forward_pre_hook(_blur_input)
        else:
            module.register_forward_hook(_blur_output)
    return replace_modules(network, new)


def _blur_input(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return module.blur(args[0])  # type: ignore[operator]


def _extend_end(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """One position more at the end of each strided dimension, for the window that sticks out there."""
    padding = [amount for s in reversed(module.blur.stride) for amount in (0, s - 1)]  # type: ignore[arg-type]
    return F.pad(args[0], padding, value=-math.inf)


def _blur_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return module.blur(output)  # type: ignore[operator]


def _is_pointwise(conv: Any) -> bool:
    return set(conv.kernel_size) == {1} and set(conv.padding) == {0}


def _last_window_starts_inside(pool: Any, input_dim: int) -> bool:
    """Whether ceil_mode can add a window: torch leaves out one that would start in the padding at the end."""
    windows = zip(_tuple(pool.kernel_size, input_dim), _tuple(pool.padding, input_dim), strict=True)
    return all(padding < size - 1 for size, padding in windows)


def _positions_lost(pool: Any, stride: tuple[int, ...], input_dim: int) -> int | None:
    """By how much an average pool at stride 1 would shrink its input, or None for windows that are wide enough."""
    if type(pool).__name__.endswith("Same"):  # timm's, which pads while it runs
        return 0
    windows = zip(_tuple(pool.kernel_size, input_dim), _tuple(pool.padding, input_dim), stride, strict=True)
    lost = {size - 1 - 2 * padding for size, padding, s in windows if s == 2}
    return lost.pop() if len(lost) == 1 and max(lost) <= 2 else None


def _tuple(value: int | tuple[int, ...], length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else (*value,) * (length // len(value))
