"""VGG with batch norm for 1-D, 2-D and 3-D input (Simonyan and Zisserman, arXiv 1409.1556), torchvision's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from crucible.corrections import Correction
from crucible.options import ConfigError
from models.base_model import BaseModel
from models.layers import (
    ADAPTIVE_AVG_POOL,
    BATCH_NORM,
    CONV,
    MAX_POOL,
    Activation,
    conv,
    global_average,
    initialise,
    start_head,
)

WIDTHS = (64, 128, 256, 512, 512)
STRIDED_WIDTHS = {4: (64, 128, 256, 512), 6: (64, 128, 256, 512, 512, 512)}  # of so many stages
POOLED = 7  # positions along each dimension in front of the three linear layers
HIDDEN = 4096


class VGG(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`.

    In 2-D without `cifar_size` it has the state-dict keys and shapes of torchvision's `vggNN_bn`, and the same
    outputs with the same weights. Initialised as there: He's normal for convolutions, zeros for all biases, ones and
    zeros for norms, N(0, 0.01) for the three linear layers. The one linear layer of `cifar_size`, which
    torchvision does not have, keeps torch's default.

    Args:
        layers: convolutions in each of the five stages; max-pooling ends each stage.
        num_outputs: size of the head.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        cifar_size: small input: one linear layer on the global average instead of three on 7 positions along
            each dimension. Pooling keeps the last of an odd number of positions, so that any size will do.
        dropout: rate in the classifier, in [0, 1).
        activation: makes an activation module.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int, int],
        num_outputs: int = 1000,
        *,
        input_dim: int = 2,
        input_channels: int = 3,
        cifar_size: bool = False,
        dropout: float = 0.5,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = input_channels
        for width, convolutions in zip(WIDTHS, layers, strict=True):
            for _ in range(convolutions):
                self.features.append(CONV[input_dim](channels, width, 3, padding=1))
                self.features.append(BATCH_NORM[input_dim](width))
                self.features.append(activation())
                channels = width
            self.features.append(MAX_POOL[input_dim](2, stride=2, ceil_mode=cifar_size))
        self.smallest = 1 if cifar_size else 2 ** len(WIDTHS)
        self.positions = 1 if cifar_size else POOLED
        self.avgpool = ADAPTIVE_AVG_POOL[input_dim](self.positions)
        self.classifier = nn.Sequential()
        channels *= self.positions**input_dim
        if not cifar_size:
            for _ in range(2):
                self.classifier.extend([nn.Linear(channels, HIDDEN), activation(), nn.Dropout(dropout)])
                channels = HIDDEN
        elif dropout > 0:
            self.classifier.append(nn.Dropout(dropout))
        self.classifier.append(nn.Linear(channels, num_outputs))
        initialise(self)
        for module in self.features:
            if isinstance(module, CONV[input_dim]):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if not cifar_size:
            for module in self.classifier:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.01)
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raises a ConfigError for input below 32 along a dimension, unless `cifar_size`."""
        if min(x.shape[2:]) < self.smallest:
            raise ConfigError(
                f"data.input_size: VGG halves its input five times and needs at least {self.smallest} along "
                f"each dimension, got {'x'.join(map(str, x.shape[2:]))}; or set model.cifar_size=true"
            )
        x = self.features(x)
        if set(x.shape[2:]) != {self.positions}:  # on CUDA this pooling has no deterministic backward
            x = self.avgpool(x)
        return self.classifier(x.flatten(1))


def _has_three_linear_layers(config: Mapping[str, Any]) -> bool:
    return config["model"].get("cifar_size") is False and not config["model"].get("strided")


class StridedVGG(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`: a VGG that strides instead of pooling.

    That of github.com/MIC-DKFZ/dynamic-network-architectures (24d174f): convolutions without biases, the first of each
    stage but the first with stride 2, and one linear layer on the global average; the two others' places are taken by
    further convolutions. Initialised with He's normal for convolutions, torch's default for the head.

    Args:
        layers: convolutions in each stage; four stages, or six for large input.
        num_outputs: size of the head.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        dropout: rate before the head, in [0, 1).
        activation: makes an activation module.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_outputs: int = 1000,
        *,
        input_dim: int = 2,
        input_channels: int = 3,
        dropout: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels, stride = input_channels, 1
        for width, convolutions in zip(STRIDED_WIDTHS[len(layers)], layers, strict=True):
            for _ in range(convolutions):
                self.features.append(conv(input_dim, channels, width, 3, stride))
                self.features.append(BATCH_NORM[input_dim](width))
                self.features.append(activation())
                channels, stride = width, 1
            stride = 2
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.fc = nn.Linear(channels, num_outputs)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(global_average(self.features(x))))


class _VGGModel(BaseModel):
    """The options of every VGG; a variant names its stages, and those of `StridedVGG`, for large and small input."""

    layers: ClassVar[tuple[int, int, int, int, int]]
    strided_layers: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]]
    corrections: ClassVar = (
        Correction(
            "model._target_", 2, _has_three_linear_layers,
            "the three linear layers of VGG started with torch's default instead of N(0, 0.01) and zeros",
        ),
    )  # fmt: skip

    def __init__(
        self,
        cifar_size: Annotated[bool, "one linear layer as the head, for images below 96 pixels"] = False,
        strided: Annotated[
            bool,
            "strides instead of pooling, one linear layer, more convolutions (dynamic-network-architectures)",
        ] = False,
        resnet_dropout: Annotated[
            float | None, "[0, 1)", "dropout rate in the classifier; null: 0.5, with cifar_size or strided 0"
        ] = None,
        head_std: Annotated[
            float | None, "(0, inf)", "the last layer starts from N(0, head_std) and zeros; null: as built"
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        usual = 0.0 if cifar_size or strided else 0.5
        options: dict[str, Any] = {
            "num_outputs": self.num_outputs,
            "input_dim": self.input_dim,
            "input_channels": self.input_channels,
            "dropout": usual if resnet_dropout is None else resnet_dropout,
        }
        if strided:
            network = StridedVGG(self.strided_layers[cifar_size], **options)
            start_head(network.fc, head_std)
            self.model = network
        else:
            self.model = VGG(self.layers, cifar_size=cifar_size, **options)
            head = self.model.classifier[-1]
            assert isinstance(head, nn.Linear)
            start_head(head, head_std)


class VGG16(_VGGModel):
    """16 layers with weights, 138.4 M parameters; 14.7 M with cifar_size."""

    short = {"depth": 16}
    layers = (2, 2, 3, 3, 3)
    strided_layers = (2, 2, 2, 3, 3, 3), (2, 3, 5, 5)


class VGG19(_VGGModel):
    """19 layers with weights, 143.7 M parameters; 20.0 M with cifar_size."""

    short = {"depth": 19}
    layers = (2, 2, 4, 4, 4)
    strided_layers = (2, 2, 3, 3, 4, 4), (3, 4, 5, 6)
