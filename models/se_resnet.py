"""SE-ResNets (Hu et al., arXiv 1709.01507) for 1-D, 2-D and 3-D input, in the layout of timm's `seresnet50`.

They are the ResNets with `model.squeeze_excitation=true` under a name of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from models.dynamic_resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152, ResNetModel


class SEResNetModel(ResNetModel):
    """A ResNet whose blocks always have gates."""

    def __init__(
        self,
        squeeze_excitation: Annotated[Literal[True], "channel gates in each block: what makes it SE"] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(squeeze_excitation=squeeze_excitation, **kwargs)


class SEResNet18(SEResNetModel):
    """18 layers, 11.8 M parameters."""

    short = {"depth": 18}
    block, layers = ResNet18.block, ResNet18.layers


class SEResNet34(SEResNetModel):
    """34 layers, 22.0 M parameters."""

    short = {"depth": 34}
    block, layers = ResNet34.block, ResNet34.layers


class SEResNet50(SEResNetModel):
    """50 layers, 28.1 M parameters."""

    short = {"depth": 50}
    block, layers, basic_layers = ResNet50.block, ResNet50.layers, ResNet50.basic_layers


class SEResNet101(SEResNetModel):
    """101 layers, 49.3 M parameters."""

    short = {"depth": 101}
    block, layers = ResNet101.block, ResNet101.layers


class SEResNet152(SEResNetModel):
    """152 layers, 66.8 M parameters."""

    short = {"depth": 152}
    block, layers, basic_layers = ResNet152.block, ResNet152.layers, ResNet152.basic_layers
