"""Wide, shallow convolutional networks that learn CIFAR-10 in minutes of one CPU core, in 1-D, 2-D and 3-D.

What makes a network fast on a CPU is few layers with many channels at a low resolution: matrix products that are
large, and few passes over memory. The shape comes from the networks that are trained for speed: Page's ResNet-9
("How to train your ResNet", DAWNBench 2018: a convolution and max-pooling open each stage, the last pooling is over
all of what is left) and airbench (Jordan, arXiv 2404.00498: a convolution of 2x2 before three such blocks, no
residual branches).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from torch import Tensor, nn

from crucible.options import ConfigError
from models.base_model import BaseModel
from models.layers import BATCH_NORM, CONV, MAX_POOL, Activation, conv, initialise, start_head


class Shape(NamedTuple):
    """The first convolution (its channels: `stem`), the channels of the blocks, the least input."""

    kernel: int
    stride: int
    padding: int
    stem: int
    widths: tuple[int, ...]
    smallest: int


SHAPES = {
    "S": Shape(kernel=4, stride=2, padding=1, stem=48, widths=(96, 192), smallest=8),
    "M": Shape(kernel=3, stride=2, padding=1, stem=32, widths=(64, 128, 256), smallest=15),
    "L": Shape(kernel=2, stride=1, padding=0, stem=24, widths=(32, 128, 256), smallest=9),
}


class LaptopNet(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`.

    A convolution, then blocks of two 3x3 convolutions, the first followed by 2x2 max-pooling; each convolution has a
    norm and an activation behind it. The maximum over all positions goes into a linear head. Initialised with He's
    normal for convolutions, torch's default for the head.

    Args:
        shape: which of them; one of `SHAPES`.
        num_outputs: size of the head.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        dropout: rate before the head, in [0, 1).
        activation: makes an activation module.
    """

    def __init__(
        self,
        shape: Shape,
        num_outputs: int = 10,
        *,
        input_dim: int = 2,
        input_channels: int = 3,
        dropout: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.smallest = shape.smallest
        self.stem = nn.Sequential(
            CONV[input_dim](
                input_channels, shape.stem, shape.kernel, shape.stride, padding=shape.padding, bias=False
            ),
            BATCH_NORM[input_dim](shape.stem),
            activation(),
        )
        self.blocks = nn.Sequential()
        channels = shape.stem
        for width in shape.widths:
            block = nn.Sequential(conv(input_dim, channels, width, 3), MAX_POOL[input_dim](2))
            block.extend([BATCH_NORM[input_dim](width), activation()])
            block.extend([conv(input_dim, width, width, 3), BATCH_NORM[input_dim](width), activation()])
            self.blocks.append(block)
            channels = width
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.fc = nn.Linear(channels, num_outputs)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Raises a ConfigError for input that the poolings leave nothing of."""
        if min(x.shape[2:]) < self.smallest:
            raise ConfigError(
                f"data.input_size: this network halves its input and needs at least {self.smallest} along each "
                f"dimension, got {'x'.join(map(str, x.shape[2:]))}; model.type=S needs {SHAPES['S'].smallest}"
            )
        x = self.blocks(self.stem(x))
        return self.fc(self.dropout(x.flatten(2).amax(dim=2)))


class Laptop(BaseModel):
    """0.63 M (S), 1.17 M (M) and 1.09 M parameters (L) at 10 classes."""

    def __init__(
        self,
        type: Annotated[Literal["S", "M", "L"], "size, by the time that a step takes"] = "S",
        resnet_dropout: Annotated[float, "[0, 1)", "dropout rate before the head"] = 0.0,
        head_std: Annotated[
            float | None, "(0, inf)", "the head starts from N(0, head_std) and zeros; null: torch's default"
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = LaptopNet(
            SHAPES[type],
            self.num_outputs,
            input_dim=self.input_dim,
            input_channels=self.input_channels,
            dropout=resnet_dropout,
        )
        start_head(self.model.fc, head_std)
