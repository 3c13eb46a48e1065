"""The options that families of residual blocks share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from crucible.corrections import HALF_PRECISION, Correction, all_of, option_is
from crucible.options import ConfigError
from models.base_model import BaseModel
from norms import Norm

SE_RD_RATIO = 1 / 16
Layers = tuple[int, ...]  # blocks of each stage


class ResidualModel(BaseModel):
    """The options of every family of residual blocks.

    `network_options`: these and the shape of input and output, by the names that the family's network gives them.
    """

    def __init__(
        self,
        zero_init_residual: Annotated[bool, "each block starts as its shortcut (arXiv 1706.02677)"] = False,
        resnet_dropout: Annotated[float, "[0, 1)", "dropout rate before the head"] = 0.0,
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.0,
        head_std: Annotated[
            float | None, "(0, inf)", "the head starts from N(0, head_std) and zeros; null: torch's default"
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if zero_init_residual and self.step.setting.of(Norm).norm == "none":
            raise ConfigError(
                "model.zero_init_residual=true needs norms to set to zero; model.norm=none removes them"
            )
        self.network_options: dict[str, Any] = {
            "num_outputs": self.num_outputs,
            "input_dim": self.input_dim,
            "input_channels": self.input_channels,
            "zero_init_residual": zero_init_residual,
            "resnet_dropout": resnet_dropout,
            "stochastic_depth": stochastic_depth,
            "head_std": head_std,
        }


class GatedResidualModel(ResidualModel):
    """And of those whose branches may end in a gate."""

    corrections: ClassVar[tuple[Correction, ...]] = (
        Correction(
            "model.shakedrop", 2,
            all_of(option_is("model.shakedrop"), option_is("trainer.precision", *HALF_PRECISION, "64-true", "64", 64)),
            "gates and factors were drawn in the weights' precision",
        ),
    )  # fmt: skip

    def __init__(
        self,
        shakedrop: Annotated[bool, "ShakeDrop in each block (arXiv 1802.02375)"] = False,
        squeeze_excitation: Annotated[bool, "channel gates in each block (arXiv 1709.01507)"] = False,
        se_rd_ratio: Annotated[float, "(0, 1]", "width of the gates' bottleneck / channels"] = SE_RD_RATIO,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if se_rd_ratio != SE_RD_RATIO and not squeeze_excitation:
            raise ConfigError(
                f"model.se_rd_ratio={se_rd_ratio} has no effect without model.squeeze_excitation=true"
            )
        self.network_options |= {
            "shakedrop": shakedrop,
            "se_rd_ratio": se_rd_ratio if squeeze_excitation else None,
        }


class EitherBlock(GatedResidualModel):
    """And of those with variants that are built of basic blocks or of bottlenecks."""

    def __init__(
        self,
        bottleneck: Annotated[
            bool | None, "1x1, 3x3 and 1x1 convolution instead of two 3x3; null: as the variant is published"
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bottleneck = bottleneck

    def layers_of(self, has: bool, layers: Layers, others: Layers | None) -> Layers:
        """The blocks of each stage.

        Args:
            has: whether the variant has bottlenecks.
            layers: of the variant.
            others: with the other kind of block; None: nobody uses one.

        Raises:
            ConfigError: for blocks that the variant does not have.
        """
        if self.bottleneck in (None, has):
            return layers
        if others is None:
            kind = "bottlenecks" if has else "basic blocks"
            raise ConfigError(
                f"model.bottleneck={str(self.bottleneck).lower()}: {type(self).__name__} has {kind} only; leave it "
                "null, or take the 50 or 152 of resnet, preact_resnet or se_resnet, which have either"
            )
        return others
