"""The CIFAR ResNets of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2), for 1-D, 2-D and 3-D input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from models.dynamic_resnet import ResNet
from models.layers import BasicBlock, blocks_in_each_of_three_stages
from models.residual import GatedResidualModel


class CifarResNet(GatedResidualModel):
    """Three stages of n basic blocks with 16, 32 and 64 channels after a 3x3 stem, n = (depth - 2) / 6.

    For 3 channels and 10 classes, shortcut A: depth 20 has 0.27 M parameters, 32 0.46 M, 44 0.66 M, 56 0.85 M,
    110 1.7 M.
    """

    def __init__(
        self,
        depth: Annotated[int, "[8, inf)", "layers with weights, 6n + 2"] = 20,
        shortcut: Annotated[
            Literal["A", "B"], "where the shape changes: A pads with zeros (the paper's), B is a convolution"
        ] = "A",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        blocks = blocks_in_each_of_three_stages(depth, layers_per_block=2, others=2)
        self.model = ResNet(
            BasicBlock,
            (blocks,) * 3,
            width=16,
            cifar_size=True,
            shortcut="pad" if shortcut == "A" else "conv",
            **self.network_options,
        )
