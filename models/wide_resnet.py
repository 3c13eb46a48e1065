"""Wide ResNets for 1-D, 2-D and 3-D input (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from typing import Annotated, Any

from models.layers import blocks_in_each_of_three_stages
from models.preact_resnet import PreActBasicBlock, PreActModel


class WRN2810(PreActModel):
    """WRN-28-10, 36.5 M parameters at 10 classes; other depths and widths by option.

    Three stages of pre-activation basic blocks with `widen_factor` times 16, 32 and 64 channels.
    """

    def __init__(
        self,
        depth: Annotated[int, "[10, inf)", "layers with weights, 6n + 4"] = 28,
        widen_factor: Annotated[int, "[1, inf)", "channels relative to a ResNet of 16, 32 and 64"] = 10,
        block_dropout: Annotated[float, "[0, 1)", "dropout rate between a block's convolutions"] = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        blocks = blocks_in_each_of_three_stages(depth, layers_per_block=2, others=4)
        self.model = self.network(
            PreActBasicBlock,
            [[width * widen_factor] * blocks for width in (16, 32, 64)],
            stem_channels=16,
            block_dropout=block_dropout,
        )
