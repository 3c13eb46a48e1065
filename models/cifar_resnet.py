"""The CIFAR ResNets of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2), for 1-D, 2-D and 3-D input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from crucible.options import ConfigError
from models.base_model import BaseModel
from models.dynamic_resnet import SE_RD_RATIO, ResNet
from models.layers import BasicBlock


class CifarResNet(BaseModel):
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
        zero_init_residual: Annotated[bool, "each block starts as its shortcut (arXiv 1706.02677)"] = False,
        resnet_dropout: Annotated[float, "[0, 1)", "dropout rate before the head"] = 0.0,
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.0,
        shakedrop: Annotated[bool, "ShakeDrop in each block (arXiv 1802.02375)"] = False,
        squeeze_excitation: Annotated[bool, "channel gates in each block (arXiv 1709.01507)"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (depth - 2) % 6:
            below = depth - (depth - 2) % 6
            raise ConfigError(
                f"model.depth must be 6n + 2, such as {max(below, 8)} or {below + 6}, got {depth}"
            )
        self.model = ResNet(
            BasicBlock,
            ((depth - 2) // 6,) * 3,
            self.num_outputs,
            input_dim=self.input_dim,
            input_channels=self.input_channels,
            width=16,
            cifar_size=True,
            resnet_dropout=resnet_dropout,
            stochastic_depth=stochastic_depth,
            shakedrop=shakedrop,
            se_rd_ratio=SE_RD_RATIO if squeeze_excitation else None,
            zero_init_residual=zero_init_residual,
            shortcut="pad" if shortcut == "A" else "conv",
        )
