"""EfficientNetV2 (Tan and Le, arXiv 2104.00298), from timm: the variants that have the authors' weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from models.timm import TimmFamily

DROPOUT = {"M": 0.3, "L": 0.4}


class EfficientNetV2(TimmFamily):
    """EfficientNetV2-S, -M or -L (21, 54 or 119 M parameters at 1000 classes) or the small B0 to B3; 2-D data.

    `tf_efficientnetv2_s` and so on in timm. The drop rates' defaults are those of the authors' code.
    """

    variants = {size: f"tf_efficientnetv2_{size.lower()}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")}

    def __init__(
        self,
        type: Annotated[Literal["B0", "B1", "B2", "B3", "S", "M", "L"], "size"] = "S",
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.2,
        resnet_dropout: Annotated[
            float | None, "[0, 1)", "dropout rate before the head; null: M 0.3, L 0.4, others 0.2"
        ] = None,
        pretrained: Annotated[bool, "start from timm's ImageNet weights of the authors"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            type,
            stochastic_depth=stochastic_depth,
            resnet_dropout=DROPOUT.get(type, 0.2) if resnet_dropout is None else resnet_dropout,
            pretrained=pretrained,
            **kwargs,
        )
