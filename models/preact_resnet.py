"""Pre-activation ResNets for 1-D, 2-D and 3-D input (He et al., arXiv 1603.05027), in timm's `resnetv2` layout.

Also what the families with the same kind of block share: `models.wide_resnet` and `models.pyramidnet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from models.layers import (
    BATCH_NORM,
    MAX_POOL,
    Activation,
    SqueezeExcitation,
    conv,
    drop_path,
    drop_path_rates,
    global_average,
    initialise,
    start_head,
)
from models.residual import EitherBlock, GatedResidualModel, Layers


class PreActBasicBlock(nn.Module):
    """`shortcut + drop_path(se(branch))`: norm and activation come before each 3x3 convolution.

    The first norm and activation serve both ways where the shape changes: there the shortcut is a 1x1
    convolution of the activated input.

    Args:
        in_channels: channels of the input.
        width: channels inside the branch; the output has `width * expansion`.
        stride: of the block, taken by the first 3x3 convolution.
        input_dim: spatial dimensions.
        se_rd_ratio: squeeze-and-excitation at the branch's end with this width ratio; None: without.
        drop_path_rate: see `models.layers.drop_path`.
        shakedrop: the branch is gated by ShakeDrop, and ends with a norm, as ShakeDrop needs it
            (arXiv 1802.02375, table 5b).
        block_dropout: dropout rate before the branch's last convolution.
        activation: makes an activation module.
    """

    kernels: ClassVar[tuple[int, ...]] = (3, 3)
    expansion: ClassVar[int] = 1
    activates_input: ClassVar[bool] = True
    ends_with_norm: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        input_dim: int = 2,
        se_rd_ratio: float | None = None,
        drop_path_rate: float = 0.0,
        shakedrop: bool = False,
        block_dropout: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        last = len(self.kernels) - 1
        self.bn1 = BATCH_NORM[input_dim](in_channels)
        self.act1 = activation() if self.activates_input else nn.Identity()
        self.branch = nn.Sequential()
        for i, kernel in enumerate(self.kernels):
            if i > 0:
                self.branch.add_module(f"bn{i + 1}", BATCH_NORM[input_dim](width))
                self.branch.add_module(f"act{i + 1}", activation())
            if i == last and block_dropout > 0:
                self.branch.add_module("dropout", nn.Dropout(block_dropout))
            ends = in_channels if i == 0 else width, out_channels if i == last else width
            step = stride if i == self.kernels.index(3) else 1
            self.branch.add_module(f"conv{i + 1}", conv(input_dim, *ends, kernel, step))
        if self.ends_with_norm or shakedrop:
            self.branch.add_module(f"bn{last + 2}", BATCH_NORM[input_dim](out_channels))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = self._downsample(in_channels, out_channels, stride, input_dim)
        self.projects = self.activates_input and not isinstance(self.downsample, nn.Identity)
        self.se: nn.Module = nn.Identity()
        if se_rd_ratio is not None:
            self.se = SqueezeExcitation(out_channels, se_rd_ratio, input_dim)
        self.drop_path = drop_path(drop_path_rate, shakedrop)

    def _downsample(self, in_channels: int, out_channels: int, stride: int, input_dim: int) -> nn.Module:
        return conv(input_dim, in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        shortcut = self.downsample(activated if self.projects else x)
        return shortcut + self.drop_path(self.se(self.branch(activated)))


class PreActBottleneck(PreActBasicBlock):
    """1x1, 3x3 and 1x1 convolution, the 3x3 strided as in timm (in the paper the first)."""

    kernels, expansion = (1, 3, 1), 4


class PreActResNet(nn.Module):
    """`(N, C, *spatial)` float to `(N, num_outputs)`; any spatial size.

    Initialised as `models.dynamic_resnet.ResNet`.

    Args:
        block: kind of block.
        widths: of each block, by stages; each stage after the first halves the resolution.
        num_outputs: size of the head.
        stem_channels: channels after the first convolution.
        stem_norm: a norm behind the first convolution, and in the stem of large input an activation.
        input_dim: spatial dimensions, 1 to 3.
        input_channels: channels of the input.
        cifar_size: small input: a 3x3 stem of stride 1 without max-pooling, instead of one that quarters the
            resolution.
        resnet_dropout: dropout rate before the head, in [0, 1).
        stochastic_depth: drop rate of the last block, in [0, 1); see `models.layers.drop_path_rates`.
        shakedrop: ShakeDrop in each block; see `PreActBasicBlock`.
        se_rd_ratio: squeeze-and-excitation in each block with this width ratio; None: without.
        zero_init_residual: each block starts as its shortcut: the last layer of its branch is zero.
        head_std: the head starts from N(0, head_std) and zeros; None: torch's default.
        final_norm: a norm and an activation behind the last block.
        block_dropout: dropout rate inside each block, in [0, 1).
        activation: makes an activation module.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock],
        widths: Sequence[Sequence[int]],
        num_outputs: int = 1000,
        *,
        stem_channels: int = 64,
        stem_norm: bool = False,
        input_dim: int = 2,
        input_channels: int = 3,
        cifar_size: bool = False,
        resnet_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        shakedrop: bool = False,
        se_rd_ratio: float | None = None,
        zero_init_residual: bool = False,
        head_std: float | None = None,
        final_norm: bool = True,
        block_dropout: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if cifar_size else (7, 2)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", conv(input_dim, input_channels, stem_channels, kernel, stride))
        if stem_norm:
            self.stem.add_module("bn", BATCH_NORM[input_dim](stem_channels))
        if not cifar_size:
            if stem_norm:
                self.stem.add_module("act", activation())
            self.stem.add_module("maxpool", MAX_POOL[input_dim](3, stride=2, padding=1))
        channels = stem_channels
        rates = iter(drop_path_rates(stochastic_depth, sum(map(len, widths)), shakedrop))
        self.blocks = nn.Sequential()
        for stage, widths_of_stage in enumerate(widths):
            for i, width in enumerate(widths_of_stage):
                self.blocks.append(
                    block(
                        channels,
                        width,
                        2 if stage > 0 and i == 0 else 1,
                        input_dim=input_dim,
                        se_rd_ratio=se_rd_ratio,
                        drop_path_rate=next(rates),
                        shakedrop=shakedrop,
                        block_dropout=block_dropout,
                        activation=activation,
                    )
                )
                channels = width * block.expansion
        self.norm = BATCH_NORM[input_dim](channels) if final_norm else nn.Identity()
        self.act = activation() if final_norm else nn.Identity()
        self.dropout = nn.Dropout(resnet_dropout) if resnet_dropout > 0 else nn.Identity()
        self.fc = nn.Linear(channels, num_outputs)
        initialise(self)
        start_head(self.fc, head_std)
        if zero_init_residual:
            for module in self.blocks:
                nn.init.zeros_(module.branch[-1].weight)  # type: ignore[union-attr, index]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.blocks(self.stem(x))))
        return self.fc(self.dropout(global_average(x)))


class PreActModel(GatedResidualModel):
    """The options that all families of pre-activation blocks share.

    A family sets `self.model = self.network(block, widths, ...)`.
    """

    def __init__(
        self,
        cifar_size: Annotated[bool, "3x3 stem without max-pooling, for images below 96 pixels"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network_options["cifar_size"] = cifar_size
        self.network: Callable[..., PreActResNet] = partial(PreActResNet, **self.network_options)


class _PreActResNetModel(PreActModel, EitherBlock):
    block: ClassVar[type[PreActBasicBlock]]
    layers: ClassVar[Layers]
    basic_layers: ClassVar[Layers | None] = None  # of one with bottlenecks, had it basic blocks

    def __init__(
        self,
        final_norm: Annotated[bool, "norm and activation behind the last block, as in the paper"] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        layers = self.layers_of(self.block is PreActBottleneck, self.layers, self.basic_layers)
        block = self.block if layers is self.layers else PreActBasicBlock
        widths = [[64 * 2**i] * n for i, n in enumerate(layers)]
        self.model = self.network(block, widths, final_norm=final_norm)


class PreActResNet18(_PreActResNetModel):
    """18 layers, 11.7 M parameters."""

    short = {"depth": 18}
    block, layers = PreActBasicBlock, (2, 2, 2, 2)


class PreActResNet34(_PreActResNetModel):
    """34 layers, 21.8 M parameters."""

    short = {"depth": 34}
    block, layers = PreActBasicBlock, (3, 4, 6, 3)


class PreActResNet50(_PreActResNetModel):
    """50 layers, 25.5 M parameters; 36.6 M in basic blocks."""

    short = {"depth": 50}
    block, layers = PreActBottleneck, (3, 4, 6, 3)
    basic_layers = 4, 6, 10, 5


class PreActResNet101(_PreActResNetModel):
    """101 layers, 44.5 M parameters."""

    short = {"depth": 101}
    block, layers = PreActBottleneck, (3, 4, 23, 3)


class PreActResNet152(_PreActResNetModel):
    """152 layers, 60.2 M parameters; 87.1 M in basic blocks."""

    short = {"depth": 152}
    block, layers = PreActBottleneck, (3, 8, 36, 3)
    basic_layers = 4, 13, 55, 4
