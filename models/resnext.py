"""ResNeXt (Xie et al., arXiv 1611.05431) for 1-D, 2-D and 3-D input, with torchvision's layout and keys."""

from __future__ import annotations

from models.dynamic_resnet import ResNetModel
from models.layers import Bottleneck


class Bottleneck32x4d(Bottleneck):
    """32 groups of 4 channels in the first stage."""

    groups, base_width = 32, 4


class Bottleneck32x8d(Bottleneck):
    """32 groups of 8 channels in the first stage."""

    groups, base_width = 32, 8


class ResNeXt50(ResNetModel):
    """ResNeXt-50 32x4d: 25.0 M parameters."""

    short = {"depth": 50}
    block, layers, weights = Bottleneck32x4d, (3, 4, 6, 3), "resnext50_32x4d"


class ResNeXt101(ResNetModel):
    """ResNeXt-101 32x8d: 88.8 M parameters."""

    short = {"depth": 101}
    block, layers, weights = Bottleneck32x8d, (3, 4, 23, 3), "resnext101_32x8d"
