"""PyramidNets for 1-D, 2-D and 3-D input (Han et al., arXiv 1610.02915), additive, as in the authors' code."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from torch import nn

from models.layers import AVG_POOL, PaddedShortcut, blocks_in_each_of_three_stages
from models.preact_resnet import PreActBasicBlock, PreActBottleneck, PreActModel

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


class _PyramidNetModel(PreActModel):
    block: ClassVar[type[PreActBasicBlock]]
    published_depth: ClassVar[int]
    published_alpha: ClassVar[float]

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
        depth = self.published_depth if depth is None else depth
        alpha = self.published_alpha if alpha is None else alpha
        blocks = blocks_in_each_of_three_stages(depth, len(self.block.kernels), others=2)
        # rounded half up; the k-th of all blocks has gained k shares of alpha
        widths = [int(STEM_CHANNELS + alpha * k / (3 * blocks) + 0.5) for k in range(1, 3 * blocks + 1)]
        self.model = self.network(
            self.block,
            [widths[i : i + blocks] for i in range(0, 3 * blocks, blocks)],
            stem_channels=STEM_CHANNELS,
            stem_norm=True,
        )


class PyramidNet110(_PyramidNetModel):
    """110 layers in basic blocks, alpha 270: 28.5 M parameters at 10 classes."""

    short = {"type": 110}
    block, published_depth, published_alpha = PyramidBasicBlock, 110, 270


class PyramidNet272(_PyramidNetModel):
    """272 layers in bottlenecks, alpha 200: 26.2 M parameters at 10 classes."""

    short = {"type": 272}
    block, published_depth, published_alpha = PyramidBottleneck, 272, 200
