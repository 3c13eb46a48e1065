"""ResNets for 1-D, 2-D and 3-D input (He et al., arXiv 1512.03385), with torchvision's layout and keys."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from crucible.options import ConfigError
from models.base_model import BaseModel
from models.layers import (
    BATCH_NORM,
    CONV,
    MAX_POOL,
    Activation,
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    drop_path_rates,
    global_average,
    initialise,
    zero_last_norms,
)
from models.weights import load_state

SE_RD_RATIO = 1 / 16
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer


class ResNet(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`.

    In 2-D without extras it has torchvision's state-dict keys and shapes, and the same outputs with the same
    weights. Initialised here: He's normal for convolutions, ones and zeros for norms, torch's default for
    the head.

    Args:
        block: residual block.
        layers: blocks in each of the four stages.
        num_outputs: size of the head.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        cifar_size: small input: a 3x3 stem of stride 1 without max-pooling, 1/8 of the input at the end
            instead of 1/32.
        resnet_dropout: dropout rate before the head, in [0, 1).
        stochastic_depth: drop rate of the last block, in [0, 1); see `models.layers.drop_path_rates`.
        se_rd_ratio: squeeze-and-excitation in each block with this width ratio; None: without.
        zero_init_residual: each block starts as its shortcut.
        activation: makes an activation module.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        layers: tuple[int, int, int, int],
        num_outputs: int = 1000,
        *,
        input_dim: int = 2,
        input_channels: int = 3,
        cifar_size: bool = False,
        resnet_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        se_rd_ratio: float | None = None,
        zero_init_residual: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if cifar_size else (7, 2)
        self.conv1 = CONV[input_dim](
            input_channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn1 = BATCH_NORM[input_dim](64)
        self.act = activation()
        self.maxpool = nn.Identity() if cifar_size else MAX_POOL[input_dim](3, stride=2, padding=1)
        rates = iter(drop_path_rates(stochastic_depth, sum(layers)))
        channels = 64

        def stage(width: int, blocks: int, stride: int) -> nn.Sequential:
            nonlocal channels
            built: list[ResidualBlock] = []
            for i in range(blocks):
                built.append(
                    block(
                        channels,
                        width,
                        stride if i == 0 else 1,
                        input_dim=input_dim,
                        se_rd_ratio=se_rd_ratio,
                        drop_path_rate=next(rates),
                        activation=activation,
                    )
                )
                channels = width * block.expansion
            return nn.Sequential(*built)

        self.layer1 = stage(64, layers[0], 1)
        self.layer2 = stage(128, layers[1], 2)
        self.layer3 = stage(256, layers[2], 2)
        self.layer4 = stage(512, layers[3], 2)
        self.dropout = nn.Dropout(resnet_dropout) if resnet_dropout > 0 else nn.Identity()
        self.fc = nn.Linear(channels, num_outputs)
        initialise(self)
        if zero_init_residual:
            zero_last_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(global_average(x)))


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's best ImageNet weights of the ResNet `name`, downloaded once into torch's cache."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
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


class _ResNetModel(BaseModel):
    """The options of every ResNet; a variant names its block, its stages and torchvision's weights."""

    block: ClassVar[type[ResidualBlock]]
    layers: ClassVar[tuple[int, int, int, int]]

    def __init__(
        self,
        cifar_size: Annotated[bool, "3x3 stem without max-pooling, for images below 96 pixels"] = False,
        zero_init_residual: Annotated[bool, "each block starts as its shortcut (arXiv 1706.02677)"] = False,
        resnet_dropout: Annotated[float, "[0, 1)", "dropout rate before the head"] = 0.0,
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.0,
        squeeze_excitation: Annotated[bool, "channel gates in each block (arXiv 1709.01507)"] = False,
        se_rd_ratio: Annotated[float, "(0, 1]", "width of the gates' bottleneck / channels"] = SE_RD_RATIO,
        pretrained: Annotated[bool, "start from torchvision's ImageNet weights"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if se_rd_ratio != SE_RD_RATIO and not squeeze_excitation:
            raise ConfigError(
                f"model.se_rd_ratio={se_rd_ratio} has no effect without model.squeeze_excitation=true"
            )
        self.model = ResNet(
            self.block,
            self.layers,
            self.num_outputs,
            input_dim=self.input_dim,
            input_channels=self.input_channels,
            cifar_size=cifar_size,
            resnet_dropout=resnet_dropout,
            stochastic_depth=stochastic_depth,
            se_rd_ratio=se_rd_ratio if squeeze_excitation else None,
            zero_init_residual=zero_init_residual,
        )
        if pretrained:
            unlike = {
                f"data.input_dim={self.input_dim}": self.input_dim != 2,
                f"data.input_channels={self.input_channels}": self.input_channels != 3,
                "model.cifar_size=true": cifar_size,
                "model.squeeze_excitation=true": squeeze_excitation,
                "model.zero_init_residual=true": zero_init_residual,
            }
            for option, given in unlike.items():
                if given:
                    raise ConfigError(
                        f"model.pretrained=true does not go with {option}: the weights are those "
                        "of the plain network for 2-D images of 3 channels"
                    )
            name = type(self).__name__.lower()
            self.weights_report = load_state(
                self.model, _imagenet_weights(name), f"model.pretrained=true (torchvision's {name})"
            )


class ResNet18(_ResNetModel):
    """18 layers, 11.7 M parameters."""

    block, layers = BasicBlock, (2, 2, 2, 2)


class ResNet34(_ResNetModel):
    """34 layers, 21.8 M parameters."""

    block, layers = BasicBlock, (3, 4, 6, 3)


class ResNet50(_ResNetModel):
    """50 layers, 25.6 M parameters."""

    block, layers = Bottleneck, (3, 4, 6, 3)


class ResNet101(_ResNetModel):
    """101 layers, 44.5 M parameters."""

    block, layers = Bottleneck, (3, 4, 23, 3)


class ResNet152(_ResNetModel):
    """152 layers, 60.2 M parameters."""

    block, layers = Bottleneck, (3, 8, 36, 3)
