"""A residual network small enough to train in every test, with what the techniques act on."""

from __future__ import annotations

from models.dynamic_resnet import ResNetModel
from models.layers import BasicBlock


class TinyResNet(ResNetModel):
    """Two residual blocks, the second one strided; 0.08 M parameters."""

    block, layers, width = BasicBlock, (1, 1), 32


class NarrowResNet(TinyResNet):
    """Its shape with a quarter of the channels, for recorded runs."""

    width = 8
