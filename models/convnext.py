"""ConvNeXt (Liu et al., arXiv 2201.03545), from timm."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from models.timm import TimmFamily

# the paper's, for 300 epochs on ImageNet-1k
STOCHASTIC_DEPTH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}


class ConvNext(TimmFamily):
    """ConvNeXt-T, -S, -B or -L (29, 50, 89 or 198 M parameters at 1000 classes), or timm's smaller ones.

    2-D data of 32 pixels or more a side. Its norms are LayerNorms, part of its design: `model.norm` has
    nothing to convert.
    """

    variants = {
        size: f"convnext_{size}"
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
    }

    def __init__(
        self,
        type: Annotated[
            Literal["atto", "femto", "pico", "nano", "tiny", "small", "base", "large"], "size"
        ] = "tiny",
        stochastic_depth: Annotated[
            float | None,
            "[0, 1)",
            "drop rate of the last block (arXiv 1603.09382); null: tiny 0.1, small 0.4, base and large 0.5",
        ] = None,
        **kwargs: Any,
    ) -> None:
        own = STOCHASTIC_DEPTH.get(type, 0.0)
        super().__init__(
            type, stochastic_depth=own if stochastic_depth is None else stochastic_depth, **kwargs
        )
