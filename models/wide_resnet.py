"""Wide ResNets for 1-D, 2-D and 3-D input (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from typing import Annotated, Any

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet
from models.layers import BasicBlock, blocks_in_each_of_three_stages
from models.preact_resnet import PreActBasicBlock, PreActModel

STEM_CHANNELS = 16


class WRN2810(PreActModel):
    """WRN-28-10, 36.5 M parameters at 10 classes; other depths and widths by option.

    Three stages of pre-activation basic blocks with `widen_factor` times 16, 32 and 64 channels; or of ResNet's
    blocks, whose shortcuts are a 1x1 convolution and a norm behind an average (`preactivation=False`).
    """

    def __init__(
        self,
        depth: Annotated[int, "[10, inf)", "layers with weights, 6n + 4"] = 28,
        widen_factor: Annotated[int, "[1, inf)", "channels relative to a ResNet of 16, 32 and 64"] = 10,
        block_dropout: Annotated[float, "[0, 1)", "dropout rate between a block's convolutions"] = 0.0,
        preactivation: Annotated[
            bool, "false: ResNet's blocks, activated after the sum, with averaged shortcuts"
        ] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        blocks = blocks_in_each_of_three_stages(depth, layers_per_block=2, others=4)
        if preactivation:
            self.model = self.network(
                PreActBasicBlock,
                [[width * widen_factor] * blocks for width in (16, 32, 64)],
                stem_channels=STEM_CHANNELS,
                block_dropout=block_dropout,
            )
            return
        if block_dropout:
            raise ConfigError(
                f"model.block_dropout={block_dropout:g}: with model.preactivation=false blocks have none; set it to 0"
            )
        self.model = ResNet(
            BasicBlock,
            (blocks,) * 3,
            width=16 * widen_factor,
            stem_channels=STEM_CHANNELS,
            shortcut="pool_conv",
            **self.network_options,
        )
