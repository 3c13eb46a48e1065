"""ResNets for 1-D, 2-D and 3-D input (He et al., arXiv 1512.03385), with torchvision's layout and keys."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from crucible.options import ConfigError
from models.layers import (
    BATCH_NORM,
    MAX_POOL,
    Activation,
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    Shortcut,
    conv,
    drop_path_rates,
    global_average,
    initialise,
    start_head,
    zero_last_norms,
)
from models.non_local import NonLocal
from models.residual import EitherBlock, Layers
from models.weights import load_state

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
NON_LOCAL_STAGES = (1, 2)  # the second and third: res3 and res4 of arXiv 1711.07971, table 2c

Block = type[ResidualBlock] | tuple[type[ResidualBlock], ...]


class ResNet(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`; any spatial size.

    In 2-D without extras it has torchvision's state-dict keys and shapes, and the same outputs with the same
    weights. Initialised here: He's normal for convolutions, ones and zeros for norms, torch's default for
    the head.

    Args:
        block: residual block, or one for each stage.
        layers: blocks in each stage; each stage after the first halves the resolution.
        num_outputs: size of the head.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        width: channels inside the first stage's blocks; they double with each stage.
        cifar_size: small input: a stem of stride 1 without max-pooling, 1/8 of the input at the end
            instead of 1/32; 3x3 instead of 7x7.
        stem: C: three 3x3 convolutions in place of the 7x7; D: also average pools before the shortcuts' 1x1
            convolutions (He et al., arXiv 1812.01187, ResNet-C and -D); the layout is that of timm's resnet50d.
        resnet_dropout: dropout rate before the head, in [0, 1).
        stochastic_depth: drop rate of the last block, in [0, 1); see `models.layers.drop_path_rates`.
        shakedrop: ShakeDrop in each block; see `models.layers.ShakeDrop`.
        se_rd_ratio: squeeze-and-excitation in each block with this width ratio; None: without.
        non_local: self-attention after every other block of the second and third stage; see
            `models.non_local`.
        zero_init_residual: each block starts as its shortcut.
        head_std: the head starts from N(0, head_std) and zeros; None: torch's default.
        activation: makes an activation module.
        shortcut: where a block changes the shape; see `models.layers.ResidualBlock`.
        stem_channels: channels of the stem; None: `width`.
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, ...],
        num_outputs: int = 1000,
        *,
        input_dim: int = 2,
        input_channels: int = 3,
        width: int = 64,
        cifar_size: bool = False,
        stem: Literal["C", "D"] | None = None,
        resnet_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        shakedrop: bool = False,
        se_rd_ratio: float | None = None,
        non_local: bool = False,
        zero_init_residual: bool = False,
        head_std: float | None = None,
        activation: Activation = nn.ReLU,
        shortcut: Shortcut = "conv",
        stem_channels: int | None = None,
    ) -> None:
        super().__init__()
        stride = 1 if cifar_size else 2
        channels = stem_channels or width
        if stem is None:
            self.conv1 = conv(input_dim, input_channels, channels, 3 if cifar_size else 7, stride)
        else:
            half = channels // 2
            self.conv1 = nn.Sequential(
                conv(input_dim, input_channels, half, 3, stride),
                BATCH_NORM[input_dim](half),
                activation(),
                conv(input_dim, half, half, 3),
                BATCH_NORM[input_dim](half),
                activation(),
                conv(input_dim, half, channels, 3),
            )
        self.bn1 = BATCH_NORM[input_dim](channels)
        self.act = activation()
        self.maxpool = nn.Identity() if cifar_size else MAX_POOL[input_dim](3, stride=2, padding=1)

        kinds = block if isinstance(block, tuple) else (block,) * len(layers)
        rates = iter(drop_path_rates(stochastic_depth, sum(layers), shakedrop))
        self.stages = tuple(f"layer{i + 1}" for i in range(len(layers)))
        for i, name in enumerate(self.stages):
            stage = nn.Sequential()
            for n in range(layers[i]):
                built = self._block(
                    (i, n),
                    kinds[i],
                    channels,
                    width * 2**i,
                    2 if i > 0 and n == 0 else 1,
                    input_dim=input_dim,
                    se_rd_ratio=se_rd_ratio,
                    drop_path_rate=next(rates),
                    shakedrop=shakedrop,
                    activation=activation,
                    shortcut="pool_conv" if stem == "D" else shortcut,
                )
                stage.add_module(str(n), built)
                channels = width * 2**i * kinds[i].expansion
                if non_local and i in NON_LOCAL_STAGES and n % 2 == 1:
                    stage.add_module(f"{n}_non_local", NonLocal(channels, input_dim))
            self.add_module(name, stage)
        self.dropout: nn.Module = nn.Dropout(resnet_dropout) if resnet_dropout > 0 else nn.Identity()
        self.fc = nn.Linear(channels, num_outputs)
        initialise(self)
        start_head(self.fc, head_std)
        if zero_init_residual:
            zero_last_norms(self)

    def _block(self, position: tuple[int, int], kind: Any, *args: Any, **options: Any) -> nn.Module:
        """The block at `position` (stage, number in the stage); a variant may build others."""
        return kind(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.dropout(global_average(x)))


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's best ImageNet weights of the ResNet `name`, downloaded once into torch's cache."""
    weights = get_model_weights(name).DEFAULT
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch's download waits for ever where nobody answers
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigError(
            f"model.pretrained=true: cannot download {weights.url} ({error}); "
            f"put the file into {folder}, or name it as model.init_from"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


class ResNetModel(EitherBlock):
    """The options of every ResNet; a variant names its block, its stages and, where they fit, torchvision's weights."""

    block: ClassVar[Block]
    layers: ClassVar[Layers]
    basic_layers: ClassVar[Layers | None] = None  # of one with bottlenecks, had it basic blocks
    width: ClassVar[int] = 64
    weights: ClassVar[str | None] = None

    def __init__(
        self,
        cifar_size: Annotated[bool, "3x3 stem without max-pooling, for images below 96 pixels"] = False,
        stem: Annotated[
            Literal["C", "D"] | None, "ResNet-C or -D (arXiv 1812.01187); null: one convolution"
        ] = None,
        averaged_shortcut: Annotated[
            bool, "shortcuts average before their 1x1 convolution instead of striding, as they do with stem D"
        ] = False,
        non_local: Annotated[bool, "self-attention in the middle stages (arXiv 1711.07971)"] = False,
        pretrained: Annotated[bool, "start from torchvision's ImageNet weights"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        block, layers = self.block_and_layers()
        self.model = ResNet(
            block,
            layers,
            width=self.width,
            cifar_size=cifar_size,
            stem=stem,
            shortcut="pool_conv" if averaged_shortcut else "conv",
            non_local=non_local,
            **self.network_options,
        )
        if pretrained:
            options = self.network_options
            if self.weights is None:
                raise ConfigError(
                    f"model.pretrained=true: torchvision has no weights of {type(self).__name__}; "
                    "name a file as model.init_from"
                )
            unlike = {
                f"data.input_dim={self.input_dim}": self.input_dim != 2,
                f"data.input_channels={self.input_channels}": self.input_channels != 3,
                "model.cifar_size=true": cifar_size,
                f"model.stem={stem}": stem is not None,
                "model.averaged_shortcut=true": averaged_shortcut,
                "model.bottleneck=false": (block, layers) != (self.block, self.layers),
                "model.squeeze_excitation=true": options["se_rd_ratio"] is not None,
                "model.non_local=true": non_local,
                "model.shakedrop=true": options["shakedrop"],
                "model.zero_init_residual=true": options["zero_init_residual"],
            }
            for option, given in unlike.items():
                if given:
                    raise ConfigError(
                        f"model.pretrained=true does not go with {option}: the weights are those "
                        "of the plain network for 2-D images of 3 channels"
                    )
            source = f"model.pretrained=true (torchvision's {self.weights})"
            self.weights_report = load_state(self.model, _imagenet_weights(self.weights), source)

    def block_and_layers(self) -> tuple[Block, Layers]:
        """The block, or one for each stage, and how many blocks each stage has."""
        first = self.block[0] if isinstance(self.block, tuple) else self.block
        layers = self.layers_of(first.expansion > 1, self.layers, self.basic_layers)
        return self.block if layers is self.layers else BasicBlock, layers


class ResNet18(ResNetModel):
    """18 layers, 11.7 M parameters."""

    short = {"depth": 18}
    block, layers, weights = BasicBlock, (2, 2, 2, 2), "resnet18"


class ResNet34(ResNetModel):
    """34 layers, 21.8 M parameters."""

    short = {"depth": 34}
    block, layers, weights = BasicBlock, (3, 4, 6, 3), "resnet34"


class ResNet50(ResNetModel):
    """50 layers, 25.6 M parameters; 36.6 M in basic blocks."""

    short = {"depth": 50}
    block, layers, weights = Bottleneck, (3, 4, 6, 3), "resnet50"
    basic_layers = 4, 6, 10, 5


class ResNet101(ResNetModel):
    """101 layers, 44.5 M parameters."""

    short = {"depth": 101}
    block, layers, weights = Bottleneck, (3, 4, 23, 3), "resnet101"


class ResNet152(ResNetModel):
    """152 layers, 60.2 M parameters; 87.1 M in basic blocks."""

    short = {"depth": 152}
    block, layers, weights = Bottleneck, (3, 8, 36, 3), "resnet152"
    basic_layers = 4, 13, 55, 4
