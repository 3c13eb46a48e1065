"""A residual network small enough to train in every test, with what the techniques act on."""

from __future__ import annotations

from typing import Any

from models.base_model import BaseModel
from models.dynamic_resnet import ResNet
from models.layers import BasicBlock


class TinyResNet(BaseModel):
    """One residual block between the stem and the head of a ResNet; 75,000 parameters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = TinyNetwork(self.input_channels, self.num_outputs)


class TinyNetwork(ResNet):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(BasicBlock, (1, 0, 0, 0), outputs, input_channels=channels, cifar_size=True)
