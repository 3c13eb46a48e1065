"""ResNets with octave convolutions (Chen et al., arXiv 1904.05049) for 1-D, 2-D and 3-D input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet
from models.layers import AVG_POOL, BATCH_NORM, Activation, conv, drop_path
from models.residual import ResidualModel

# channels at full and at half resolution (0: none), and the maps
Channels = tuple[int, int]
Octaves = tuple[Tensor, Tensor | None]


class OctaveConv(nn.Module):
    """Convolution between two octaves, each of which gets a part from both.

    The high octave is averaged on its way down, the low one repeated on its way up; at stride 2 both are averaged
    before, as the authors do it.

    Args:
        in_channels: of the high and the low octave; 0: without a low one.
        out_channels: likewise.
        kernel_size: odd.
        stride: 1 or 2.
        input_dim: spatial dimensions.
    """

    def __init__(
        self, in_channels: Channels, out_channels: Channels, kernel_size: int, stride: int, input_dim: int
    ) -> None:
        super().__init__()
        self.stride = stride
        self.pool = AVG_POOL[input_dim](2)

        def path(inputs: int, outputs: int) -> nn.Module | None:
            return conv(input_dim, inputs, outputs, kernel_size) if inputs and outputs else None

        (high_in, low_in), (high_out, low_out) = in_channels, out_channels
        self.high_to_high = path(high_in, high_out)
        self.high_to_low = path(high_in, low_out)
        self.low_to_high = path(low_in, high_out)
        self.low_to_low = path(low_in, low_out)

    def forward(self, octaves: Octaves) -> Octaves:
        high, low = octaves
        if self.stride == 2:
            high = self._halved(high)
        new_high = self.high_to_high(high)  # type: ignore[misc]
        if self.low_to_high is not None:
            from_low = self.low_to_high(low)
            if self.stride == 1:
                from_low = _repeated(from_low, like=new_high)
            new_high = new_high + from_low
        new_low = None if self.high_to_low is None else self.high_to_low(self._halved(high))
        if self.low_to_low is not None:
            kept = self.low_to_low(self._halved(low) if self.stride == 2 else low)  # type: ignore[arg-type]
            new_low = kept if new_low is None else new_low + kept
        return new_high, new_low

    def _halved(self, x: Tensor) -> Tensor:
        """Means of two positions along each dimension; the last of an odd number stands for itself."""
        odd = [size % 2 for size in reversed(x.shape[2:])]
        if any(odd):
            x = F.pad(x, [amount for after in odd for amount in (0, after)], mode="replicate")
        return self.pool(x)


def _repeated(x: Tensor, like: Tensor) -> Tensor:
    """Each position of `x` twice along each dimension, cut to the size of `like`."""
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    index = tuple(slice(size) for size in like.shape)
    return x[index]


class OnOctaves(nn.Module):
    """A layer for the high octave and one for the low octave, where there is one."""

    def __init__(self, make: Callable[[int], nn.Module], channels: Channels) -> None:
        super().__init__()
        self.high = make(channels[0])
        self.low = make(channels[1]) if channels[1] else None

    def forward(self, octaves: Octaves) -> Octaves:
        high, low = octaves
        return self.high(high), low if self.low is None else self.low(low)


class OctaveBasicBlock(nn.Module):
    """`act(shortcut + drop_path(branch))` on two octaves; a tensor instead of the pair is a high octave alone.

    Args:
        in_channels: of both octaves together.
        width: channels inside the branch; the output has `width * expansion`.
        stride: of the block, taken by the first 3x3 convolution.
        alpha_in: the low octave's part of the input's channels.
        alpha_out: and of the output's.
        input_dim: spatial dimensions.
        drop_path_rate: see `models.layers.drop_path`.
        activation: makes an activation module.
    """

    kernels: ClassVar[tuple[int, ...]] = (3, 3)
    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        alpha_in: float,
        alpha_out: float,
        input_dim: int = 2,
        drop_path_rate: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        norm = BATCH_NORM[input_dim]
        inputs = _split(in_channels, alpha_in)
        outputs = _split(width * self.expansion, alpha_out)
        self.branch = nn.Sequential()
        channels = inputs
        for i, kernel in enumerate(self.kernels):
            last = i == len(self.kernels) - 1
            after = outputs if last else _split(width, alpha_out)
            step = stride if i == self.kernels.index(3) else 1
            self.branch.add_module(f"conv{i + 1}", OctaveConv(channels, after, kernel, step, input_dim))
            self.branch.add_module(f"bn{i + 1}", OnOctaves(norm, after))
            if not last:
                self.branch.add_module(f"act{i + 1}", OnOctaves(lambda _: activation(), after))
            channels = after
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                OctaveConv(inputs, outputs, 1, stride, input_dim), OnOctaves(norm, outputs)
            )
        self.drop_path = drop_path(drop_path_rate)
        self.act = OnOctaves(lambda _: activation(), outputs)

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        octaves = (x, None) if isinstance(x, Tensor) else x
        high, low = self.branch(octaves)
        if not isinstance(self.drop_path, nn.Identity):  # one draw for both
            kept = self.drop_path(high.new_ones(high.shape[0], *(1,) * (high.ndim - 1)))
            high, low = high * kept, None if low is None else low * kept
        high_shortcut, low_shortcut = self.downsample(octaves)
        high, low = self.act((high + high_shortcut, None if low is None else low + low_shortcut))
        return high if low is None else (high, low)


class OctaveBottleneck(OctaveBasicBlock):
    """1x1, 3x3 and 1x1 convolution."""

    kernels, expansion = (1, 3, 1), 4


def _split(channels: int, alpha: float) -> Channels:
    low = int(channels * alpha)
    return channels - low, low


class OctaveResNet(ResNet):
    """The ResNet whose stages work on two octaves, which meet again in the first block of the last.

    With bottlenecks it has as many parameters as the ResNet.

    Args:
        alpha: the low octave's part of the channels, in (0, 1).
        args: as `ResNet`, and so `kwargs`.
    """

    def __init__(
        self, *args: Any, alpha: float = 0.125, zero_init_residual: bool = False, **kwargs: Any
    ) -> None:
        self.alpha = alpha
        super().__init__(*args, **kwargs)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, OctaveBasicBlock):
                    for norm in module.branch[-1].children():
                        nn.init.zeros_(norm.weight)  # type: ignore[arg-type]

    def _block(
        self, position: tuple[int, int], kind: Any, *args: Any, input_dim: int, drop_path_rate: float,
        activation: Activation, **unused: Any,
    ) -> nn.Module:  # fmt: skip
        stage, number = position
        last, previous = len(self.stages) - 1, stage if number else stage - 1
        return kind(
            *args,
            alpha_in=self.alpha if 0 <= previous < last else 0.0,
            alpha_out=self.alpha if stage < last else 0.0,
            input_dim=input_dim,
            drop_path_rate=drop_path_rate,
            activation=activation,
        )


class OctResNetModel(ResidualModel):
    """The options of every ResNet with octave convolutions."""

    block: ClassVar[type[OctaveBasicBlock]]
    layers: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        alpha: Annotated[float, "(0, 1)", "part of the channels at half the resolution"] = 0.125,
        cifar_size: Annotated[bool, "3x3 stem without max-pooling, for images below 96 pixels"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if int(64 * alpha) < 1:
            raise ConfigError(
                f"model.alpha={alpha} leaves the first stage without a low octave: at least 1/64"
            )
        self.model = OctaveResNet(
            self.block,
            self.layers,
            alpha=alpha,
            cifar_size=cifar_size,
            **self.network_options,
        )


class OctResNet18(OctResNetModel):
    """18 layers, 11.7 M parameters."""

    short = {"depth": 18}
    block, layers = OctaveBasicBlock, (2, 2, 2, 2)


class OctResNet34(OctResNetModel):
    """34 layers, 21.8 M parameters."""

    short = {"depth": 34}
    block, layers = OctaveBasicBlock, (3, 4, 6, 3)


class OctResNet50(OctResNetModel):
    """50 layers, 25.6 M parameters."""

    short = {"depth": 50}
    block, layers = OctaveBottleneck, (3, 4, 6, 3)


class OctResNet101(OctResNetModel):
    """101 layers, 44.5 M parameters."""

    short = {"depth": 101}
    block, layers = OctaveBottleneck, (3, 4, 23, 3)


class OctResNet152(OctResNetModel):
    """152 layers, 60.2 M parameters."""

    short = {"depth": 152}
    block, layers = OctaveBottleneck, (3, 8, 36, 3)
