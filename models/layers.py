"""Building blocks that the network families share, for 1, 2 or 3 spatial dimensions.

Norms are plain `nn.BatchNormNd` submodules and every activation is a submodule of its own, so that a later
conversion can replace them one by one. What is off is an `nn.Identity`: it costs nothing and has no keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

Activation = Callable[[], nn.Module]


def conv(input_dim: int, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """Convolution without bias that keeps the size at stride 1 (odd `kernel_size`)."""
    return CONV[input_dim](
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
    )


def global_average(x: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over space: `(N, C, *spatial)` to `(N, C)`, or to `(N, C, 1, ...)` with `keepdim`."""
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=keepdim)


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth: in training each sample's branch is zero with probability `rate`, else / (1 - rate).

    Huang et al., arXiv 1603.09382, scaled in training so that evaluation is plain.
    """
    return StochasticDepth(rate, mode="row") if rate > 0 else nn.Identity()


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop rates of `depth` blocks, linear from `rate / depth` to `rate` (arXiv 1603.09382, equation 4)."""
    return [rate * block / depth for block in range(1, depth + 1)]


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
        activation: makes an activation module.
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
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self._build_branch(in_channels, width, stride, input_dim, activation)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv(input_dim, in_channels, out_channels, 1, stride), BATCH_NORM[input_dim](out_channels)
            )
        self.se: nn.Module = nn.Identity()
        if se_rd_ratio is not None:
            self.se = SqueezeExcitation(out_channels, se_rd_ratio, input_dim)
        self.drop_path = drop_path(drop_path_rate)
        self.act = activation()

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        raise NotImplementedError

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
        self.conv1 = conv(input_dim, in_channels, width, 3, stride)
        self.bn1 = BATCH_NORM[input_dim](width)
        self.act1 = activation()
        self.conv2 = conv(input_dim, width, width, 3)
        self.bn2 = BATCH_NORM[input_dim](width)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution, the 3x3 strided as in torchvision ("v1.5"; in the paper the first)."""

    expansion = 4
    last_norm = "bn3"

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        self.conv1 = conv(input_dim, in_channels, width, 1)
        self.bn1 = BATCH_NORM[input_dim](width)
        self.act1 = activation()
        self.conv2 = conv(input_dim, width, width, 3, stride)
        self.bn2 = BATCH_NORM[input_dim](width)
        self.act2 = activation()
        self.conv3 = conv(input_dim, width, width * self.expansion, 1)
        self.bn3 = BATCH_NORM[input_dim](width * self.expansion)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


def initialise(network: nn.Module) -> None:
    """He's normal initialisation by fan-out (arXiv 1502.01852) of all convolutions, in place.

    Other layers keep torch's: ones and zeros for norms, uniform for linear layers and biases.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_last_norms(network: nn.Module) -> None:
    """Zero the weight of the norm that ends each residual branch, so that each block starts as its shortcut.

    Goyal et al., arXiv 1706.02677, section 5.1.
    """
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))
