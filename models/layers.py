"""Building blocks that the network families share, for 1, 2 or 3 spatial dimensions.

Norms are plain `nn.BatchNormNd` submodules and every activation is a submodule of its own, so that a later
conversion can replace them one by one. What is off is an `nn.Identity`: it costs nothing and has no keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from crucible.options import ConfigError

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_AVG_POOL: dict[int, type[nn.Module]] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}

Activation = Callable[[], nn.Module]
Shortcut = Literal["conv", "pool_conv", "pad"]


def conv(
    input_dim: int, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Convolution without bias that keeps the size at stride 1 (odd `kernel_size`)."""
    padding = kernel_size // 2
    return CONV[input_dim](
        in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=False
    )


def global_average(x: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over space: `(N, C, *spatial)` to `(N, C)`, or to `(N, C, 1, ...)` with `keepdim`."""
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=keepdim)


SHAKEDROP_RATE = 0.5  # 1 - p_L of the last block, the paper's


class _Scale(torch.autograd.Function):
    """`x * forward_factor`, whose gradient to `x` is `grad * backward_factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_factor: Tensor, backward_factor: Tensor) -> Tensor:
        ctx.save_for_backward(backward_factor)
        return x * forward_factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (backward_factor,) = ctx.saved_tensors
        return grad * backward_factor, None, None


class ShakeDrop(nn.Module):
    """Scales a residual branch at random, by different factors in the forward and the backward pass.

    Yamada et al., arXiv 1802.02375: `b + alpha - b * alpha` forward and `b + beta - b * beta` backward, with the
    gate b = 1 with probability `1 - rate`, alpha uniform in [-1, 1], beta in [0, 1]; in evaluation the
    expectation `1 - rate`. All three are drawn for each sample (the paper's level "Image"). The branch should
    end with a norm (table 5b of the paper).

    Args:
        rate: probability of a closed gate, [0, 1].
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.rate)
        # float32 whatever x is, so that mixed precision draws the same numbers
        shape = 3, x.shape[0], *(1,) * (x.ndim - 1)
        gate, alpha, beta = torch.rand(shape, device=x.device, dtype=torch.float32).unbind()
        opened = gate >= self.rate
        forward_factor = torch.where(opened, 1.0, 2 * alpha - 1).to(x.dtype)
        return _Scale.apply(x, forward_factor, torch.where(opened, 1.0, beta).to(x.dtype))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path(rate: float, shakedrop: bool = False) -> nn.Module:
    """What gates a residual branch: stochastic depth, or `ShakeDrop` of this rate.

    Stochastic depth: in training each sample's branch is zero with probability `rate`, else / (1 - rate).
    Huang et al., arXiv 1603.09382, scaled in training so that evaluation is plain.
    """
    if shakedrop:
        return ShakeDrop(rate)
    return StochasticDepth(rate, mode="row") if rate > 0 else nn.Identity()


def drop_path_rates(rate: float, depth: int, shakedrop: bool = False) -> list[float]:
    """Drop rates of `depth` blocks, linear from `rate / depth` to `rate` (arXiv 1603.09382, equation 4).

    With `shakedrop` the rate is `SHAKEDROP_RATE`.

    Raises:
        ConfigError: where stochastic depth and ShakeDrop are both asked for.
    """
    if shakedrop and rate > 0:
        raise ConfigError(
            f"model.shakedrop=true and model.stochastic_depth={rate} both gate the residual branch; choose one"
        )
    last = SHAKEDROP_RATE if shakedrop else rate
    return [last * block / depth for block in range(1, depth + 1)]


class SqueezeExcitation(nn.Module):
    """Channel gates from the channels' spatial means (Hu et al., arXiv 1709.01507); shape is kept.

    Args:
        channels: channels of the input.
        rd_ratio: bottleneck width / channels; the width is rounded to a multiple of 8, as timm does.
        input_dim: spatial dimensions.
    """

    def __init__(self, channels: int, rd_ratio: float, input_dim: int = 2) -> None:
        super().__init__()
        width = max(8, int(channels * rd_ratio + 4) // 8 * 8)
        self.fc1 = CONV[input_dim](channels, width, 1)
        self.act = nn.ReLU()
        self.fc2 = CONV[input_dim](width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(global_average(x, keepdim=True))))
        return x * gate.sigmoid()


class PaddedShortcut(nn.Module):
    """Every `stride`-th position and `extra_channels` zeros: He et al., arXiv 1512.03385, option A."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        spatial = x.ndim - 2
        index = (slice(None),) * 2 + (slice(None, None, self.stride),) * spatial
        return F.pad(x[index], (0, 0) * spatial + (0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class ResidualBlock(nn.Module):
    """`act(shortcut(x) + drop_path(se(branch(x))))`, the shortcut projected where the shape changes.

    A kind of block says how its branch is built and run, and which norm ends it.

    Args:
        in_channels: channels of the input.
        width: channels inside the branch; the output has `width * expansion`.
        stride: of the block.
        input_dim: spatial dimensions.
        se_rd_ratio: squeeze-and-excitation at the branch's end with this width ratio; None: without.
        drop_path_rate: see `drop_path`.
        shakedrop: the branch is gated by `ShakeDrop`.
        activation: makes an activation module.
        shortcut: where the shape changes: `conv`, a 1x1 convolution and norm (option B of arXiv 1512.03385);
            `pool_conv`, which averages before instead of striding (ResNet-D, arXiv 1812.01187); or `pad`,
            without parameters (option A).
    """

    expansion: ClassVar[int] = 1
    last_norm: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        input_dim: int = 2,
        se_rd_ratio: float | None = None,
        drop_path_rate: float = 0.0,
        shakedrop: bool = False,
        activation: Activation = nn.ReLU,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self._build_branch(in_channels, width, stride, input_dim, activation)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = self._build_shortcut(in_channels, out_channels, stride, input_dim, shortcut)
        self.se: nn.Module = nn.Identity()
        if se_rd_ratio is not None:
            self.se = SqueezeExcitation(out_channels, se_rd_ratio, input_dim)
        self.drop_path = drop_path(drop_path_rate, shakedrop)
        self.act = activation()

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        raise NotImplementedError

    def _conv3x3(
        self, input_dim: int, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> nn.Module:
        return conv(input_dim, in_channels, out_channels, 3, stride, groups)

    def _build_shortcut(
        self, in_channels: int, out_channels: int, stride: int, input_dim: int, shortcut: Shortcut
    ) -> nn.Module:
        if shortcut == "pad":
            return PaddedShortcut(out_channels - in_channels, stride)
        norm = BATCH_NORM[input_dim](out_channels)
        if shortcut == "conv":
            return nn.Sequential(conv(input_dim, in_channels, out_channels, 1, stride), norm)
        pool = AVG_POOL[input_dim](stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(
            pool if stride > 1 else nn.Identity(), conv(input_dim, in_channels, out_channels, 1), norm
        )

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to and including its last norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.downsample(x) + self.drop_path(self.se(self.branch(x))))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, the first strided (He et al., arXiv 1512.03385)."""

    last_norm = "bn2"

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        self.conv1 = self._conv3x3(input_dim, in_channels, width, stride)
        self.bn1 = BATCH_NORM[input_dim](width)
        self.act1 = activation()
        self.conv2 = self._conv3x3(input_dim, width, width)
        self.bn2 = BATCH_NORM[input_dim](width)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution, the 3x3 strided as in torchvision ("v1.5"; in the paper the first).

    ResNeXt (arXiv 1611.05431) has `groups` in the 3x3, each with `width * base_width / 64` channels.
    """

    expansion = 4
    last_norm = "bn3"
    groups: ClassVar[int] = 1
    base_width: ClassVar[int] = 64

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        inner = width * self.base_width // 64 * self.groups
        self.conv1 = conv(input_dim, in_channels, inner, 1)
        self.bn1 = BATCH_NORM[input_dim](inner)
        self.act1 = activation()
        self.conv2 = self._conv3x3(input_dim, inner, inner, stride, self.groups)
        self.bn2 = BATCH_NORM[input_dim](inner)
        self.act2 = activation()
        self.conv3 = conv(input_dim, inner, width * self.expansion, 1)
        self.bn3 = BATCH_NORM[input_dim](width * self.expansion)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


def blocks_in_each_of_three_stages(depth: int, layers_per_block: int, others: int) -> int:
    """How many blocks each stage has in a network of `depth` layers, `others` of them outside of blocks.

    Raises:
        ConfigError: where they do not come out even.
    """
    period = 3 * layers_per_block
    blocks, rest = divmod(depth - others, period)
    if rest or blocks < 1:
        below = max(depth - rest, period + others)
        raise ConfigError(
            f"model.depth must be {period}n + {others}, such as {below} or {below + period}, got {depth}"
        )
    return blocks


def initialise(network: nn.Module) -> None:
    """He's normal initialisation by fan-out (arXiv 1502.01852) of all convolutions, in place.

    Other layers keep torch's: ones and zeros for norms, uniform for linear layers and biases.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def start_head(head: nn.Linear, std: float | None) -> None:
    """Draw the head's weights from N(0, std) and set its biases to zero, in place; None: it stays torch's default."""
    if std is not None:
        nn.init.normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)


def zero_last_norms(network: nn.Module) -> None:
    """Zero the weight of the norm that ends each residual branch, so that each block starts as its shortcut.

    Goyal et al., arXiv 1706.02677, section 5.1.
    """
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))
