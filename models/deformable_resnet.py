"""ResNets with modulated deformable convolutions (Zhu et al., "Deformable ConvNets v2", arXiv 1811.11168), 2-D."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from crucible.corrections import Correction, option_is
from crucible.options import ConfigError
from models.dynamic_resnet import ResNetModel
from models.layers import BasicBlock, Bottleneck, ResidualBlock


class DeformableConv2d(nn.Conv2d):
    """Convolution whose taps move by learned offsets, each weighted by a learned `sigmoid`; without bias.

    Offsets and weights come from a convolution of the same kernel and stride that starts at zero: no offset, and
    half of each tap. The taps are read and weighted in float32 under mixed precision, as torchvision does, and where
    the weights have 16 bits.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd.
        stride: of the convolution.
        groups: of the convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        taps = kernel_size**2
        self.taps = taps
        self.offset_weight = nn.Parameter(torch.empty(3 * taps, in_channels, kernel_size, kernel_size))
        self.offset_bias = nn.Parameter(torch.empty(3 * taps))
        nn.init.zeros_(self.offset_weight)
        nn.init.zeros_(self.offset_bias)

    def forward(self, input: Tensor) -> Tensor:
        moved = F.conv2d(input, self.offset_weight, self.offset_bias, self.stride, self.padding)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        offset, mask = moved.to(dtype).split((2 * self.taps, self.taps), dim=1)
        out = deform_conv2d(
            input.to(dtype),
            offset,
            self.weight.to(dtype),
            None,
            self.stride,
            self.padding,
            mask=mask.sigmoid(),
        )
        return out.to(moved.dtype)


class _Deformable(ResidualBlock):
    def _conv3x3(
        self, input_dim: int, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> nn.Module:
        return DeformableConv2d(in_channels, out_channels, 3, stride, groups)


class DeformableBasicBlock(_Deformable, BasicBlock):
    """The basic block with both convolutions deformable."""


class DeformableBottleneck(_Deformable, Bottleneck):
    """The bottleneck with its 3x3 convolution deformable."""


class DeformableResNetModel(ResNetModel):
    """A ResNet whose 3x3 convolutions in the second to fourth stage are deformable; torchvision's weights fit."""

    corrections: ClassVar = (
        Correction(
            "model._target_", 2, option_is("trainer.precision", "16-true"),
            "the taps of deformable convolutions were weighted in float16",
        ),
    )  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("input_dim", 2) != 2:
            raise ConfigError(
                f"data.input_dim={kwargs['input_dim']}: deformable convolutions are for 2-D input"
            )
        super().__init__(**kwargs)


class DeformableResNet18(DeformableResNetModel):
    """18 layers, 12.4 M parameters."""

    short = {"depth": 18}
    block, layers, weights = (BasicBlock, *(DeformableBasicBlock,) * 3), (2, 2, 2, 2), "resnet18"


class DeformableResNet50(DeformableResNetModel):
    """50 layers, 26.8 M parameters."""

    short = {"depth": 50}
    block, layers, weights = (Bottleneck, *(DeformableBottleneck,) * 3), (3, 4, 6, 3), "resnet50"


class DeformableResNet101(DeformableResNetModel):
    """101 layers, 46.8 M parameters."""

    short = {"depth": 101}
    block, layers, weights = (Bottleneck, *(DeformableBottleneck,) * 3), (3, 4, 23, 3), "resnet101"
