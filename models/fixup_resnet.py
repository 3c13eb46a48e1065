"""ResNets without normalization, by Fixup (Zhang et al., arXiv 1901.09321), for 1-D, 2-D and 3-D input.

They train without norms at the usual learning rates. What the PowerGrad work (arXiv 2111.12495) calls `resnet18_wobn`
is another network: a plain ResNet-18 whose norms are left out, model=resnet model.norm=none. Beyond the paper this
one follows the author's code (github.com/hongyi-zhang/Fixup): a block's first bias lies before its projected shortcut
too, and scalars and biases learn at a tenth of the rate.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from crucible.corrections import Correction
from models.base_model import BaseModel
from models.dynamic_resnet import ResNet
from models.layers import Activation, BasicBlock, Shortcut, conv

SCALAR_RATE = 0.1  # of the learning rate


class Scalar(nn.Module):
    """Adds one learned number, or multiplies by it."""

    def __init__(self, multiplies: bool = False) -> None:
        super().__init__()
        self.multiplies = multiplies
        self.value = nn.Parameter(torch.ones(1) if multiplies else torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value if self.multiplies else x + self.value


class FixupBasicBlock(BasicBlock):
    """Two 3x3 convolutions without norms: a learned scalar before each layer, and one that scales the branch.

    The first scalar also lies before the shortcut, where that has a layer.
    """

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        self.bias1 = Scalar()
        self.conv1 = self._conv3x3(input_dim, in_channels, width, stride)
        self.bias2 = Scalar()
        self.act1 = activation()
        self.bias3 = Scalar()
        self.conv2 = self._conv3x3(input_dim, width, width)
        self.scale = Scalar(multiplies=True)
        self.bias4 = Scalar()

    def _build_shortcut(
        self, in_channels: int, out_channels: int, stride: int, input_dim: int, shortcut: Shortcut
    ) -> nn.Module:
        return conv(input_dim, in_channels, out_channels, 1, stride)

    def branch(self, x: Tensor) -> Tensor:
        """Of the input behind `bias1`."""
        x = self.act1(self.bias2(self.conv1(x)))
        return self.bias4(self.scale(self.conv2(self.bias3(x))))

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.bias1(x)
        shortcut = x if isinstance(self.downsample, nn.Identity) else self.downsample(shifted)
        return self.act(shortcut + self.drop_path(self.se(self.branch(shifted))))


class FixupResNet(ResNet):
    """`ResNet` of `FixupBasicBlock`, with Fixup's initialisation.

    The head and the last convolution of each branch start at zero, the first one's weights are He's times
    `blocks ** -0.5` (the paper's rule for two layers a branch).
    """

    def __init__(self, layers: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        super().__init__(FixupBasicBlock, layers, *args, **kwargs)
        self.bn1 = Scalar()
        self.dropout = nn.Sequential(self.dropout, Scalar())
        for module in self.modules():
            if isinstance(module, FixupBasicBlock):
                with torch.no_grad():
                    module.conv1.get_parameter("weight").mul_(1 / math.sqrt(sum(layers)))
                nn.init.zeros_(module.conv2.get_parameter("weight"))
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)


def slow_scalars(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group of the optimizer in two: the weights, then at `SCALAR_RATE` of their rate scalars and biases."""
    slow = {p for part in module.modules() if isinstance(part, Scalar) for p in part.parameters()}
    slow |= {p for name, p in module.named_parameters() if name.endswith(".bias")}
    return [
        part
        for group in groups
        for part in (
            {**group, "params": [p for p in group["params"] if p not in slow]},
            {**group, "params": [p for p in group["params"] if p in slow], "lr": group["lr"] * SCALAR_RATE},
        )
    ]


class FixupResNetModel(BaseModel):
    """The options of every Fixup ResNet."""

    layers: ClassVar[tuple[int, ...]]
    corrections: ClassVar = (
        Correction(
            "model._target_", 2, lambda config: True,
            "Fixup's shortcuts had biases of their own, and scalars and biases learned at the full rate",
        ),
    )  # fmt: skip

    def __init__(
        self,
        cifar_size: Annotated[bool, "3x3 stem without max-pooling, for images below 96 pixels"] = False,
        resnet_dropout: Annotated[float, "[0, 1)", "dropout rate before the head"] = 0.0,
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.step.groups.insert(0, slow_scalars)
        self.model = FixupResNet(
            self.layers,
            self.num_outputs,
            input_dim=self.input_dim,
            input_channels=self.input_channels,
            cifar_size=cifar_size,
            resnet_dropout=resnet_dropout,
            stochastic_depth=stochastic_depth,
        )


class ResNet18WithoutNorm(FixupResNetModel):
    """18 layers, 11.7 M parameters."""

    short = {"depth": 18}
    layers = (2, 2, 2, 2)


class ResNet34WithoutNorm(FixupResNetModel):
    """34 layers, 21.8 M parameters."""

    short = {"depth": 34}
    layers = (3, 4, 6, 3)
