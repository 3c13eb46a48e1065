"""PyramidNets for 1-D, 2-D and 3-D input (Han et al., arXiv 1610.02915), additive, as in the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from torch import nn

from crucible.configuration import find_target
from crucible.corrections import Correction
from models.layers import AVG_POOL, PaddedShortcut, blocks_in_each_of_three_stages
from models.preact_resnet import PreActBasicBlock, PreActBottleneck, PreActModel
from models.residual import EitherBlock

STEM_CHANNELS = 16


class PyramidBasicBlock(PreActBasicBlock):
    """A pre-activation block without its first activation, with a norm at the end of its branch.

    The shortcut has no parameters: average pooling where the block is strided, zeros in the new channels.
    """

    activates_input, ends_with_norm = False, True

    def _downsample(self, in_channels: int, out_channels: int, stride: int, input_dim: int) -> nn.Module:
        pad = PaddedShortcut(out_channels - in_channels, stride=1)
        return nn.Sequential(AVG_POOL[input_dim](2, ceil_mode=True), pad) if stride > 1 else pad


class PyramidBottleneck(PyramidBasicBlock):
    """1x1, 3x3 and 1x1 convolution."""

    kernels, expansion = PreActBottleneck.kernels, PreActBottleneck.expansion


def _widths(alpha: float, blocks: int) -> list[float]:
    """Of each block, unrounded: the k-th of all has gained k shares of alpha."""
    return [STEM_CHANNELS + alpha * k / blocks for k in range(1, blocks + 1)]


def _had_wider_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a width lies halfway above an even number, and so was rounded up before."""
    variant, given = find_target(config["model"]["_target_"], "model._target_"), config["model"]
    kind = variant.block_of(given.get("bottleneck"))
    depth, alpha = variant.size_of(given.get("depth"), given.get("alpha"))
    blocks = blocks_in_each_of_three_stages(depth, len(kind.kernels), others=2)
    return any(width % 2 == 0.5 for width in _widths(alpha, 3 * blocks))


class _PyramidNetModel(PreActModel, EitherBlock):
    block: ClassVar[type[PreActBasicBlock]]
    published_depth: ClassVar[int]
    published_alpha: ClassVar[float]
    corrections: ClassVar = (
        Correction(
            "model._target_", 2, _had_wider_blocks,
            "a width between two numbers was rounded up; the authors' code takes the even one",
        ),
    )  # fmt: skip

    def __init__(
        self,
        depth: Annotated[
            int | None, "[8, inf)", "layers with weights: 6n + 2, with bottlenecks 9n + 2; null: as named"
        ] = None,
        alpha: Annotated[
            float | None, "[0, inf)", "channels gained from the first block to the last; null: the variant's"
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        depth, alpha = self.size_of(depth, alpha)
        block = self.block_of(self.bottleneck)
        blocks = blocks_in_each_of_three_stages(depth, len(block.kernels), others=2)
        widths = [round(width) for width in _widths(alpha, 3 * blocks)]
        self.model = self.network(
            block,
            [widths[i : i + blocks] for i in range(0, 3 * blocks, blocks)],
            stem_channels=STEM_CHANNELS,
            stem_norm=True,
        )

    @classmethod
    def block_of(cls, bottleneck: bool | None) -> type[PreActBasicBlock]:
        """The kind of block that `model.bottleneck` asks for."""
        return {None: cls.block, False: PyramidBasicBlock, True: PyramidBottleneck}[bottleneck]

    @classmethod
    def size_of(cls, depth: int | None, alpha: float | None) -> tuple[int, float]:
        """Depth and alpha, the published ones where they are None."""
        return (
            cls.published_depth if depth is None else depth,
            cls.published_alpha if alpha is None else alpha,
        )


class PyramidNet110(_PyramidNetModel):
    """110 layers in basic blocks, alpha 270: 28.5 M parameters at 10 classes; 18.3 M in bottlenecks."""

    short = {"type": 110}
    block, published_depth, published_alpha = PyramidBasicBlock, 110, 270


class PyramidNet272(_PyramidNetModel):
    """272 layers in bottlenecks, alpha 200: 26.2 M parameters at 10 classes."""

    short = {"type": 272}
    block, published_depth, published_alpha = PyramidBottleneck, 272, 200
