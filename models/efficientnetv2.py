"""EfficientNetV2 (Tan and Le, arXiv 2104.00298), from timm: the variants that have the authors' weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from models.base_model import BaseModel
from models.timm import build_timm

DROPOUT = {"S": 0.2, "M": 0.3, "L": 0.4}


class EfficientNetV2(BaseModel):
    """EfficientNetV2-S, -M or -L (21, 54 or 119 M parameters at 1000 classes); needs 2-D data.

    `tf_efficientnetv2_s|m|l` in timm. The drop rates' defaults are those of the authors' code.
    """

    def __init__(
        self,
        type: Annotated[Literal["S", "M", "L"], "size"] = "S",
        stochastic_depth: Annotated[float, "[0, 1)", "drop rate of the last block (arXiv 1603.09382)"] = 0.2,
        resnet_dropout: Annotated[
            float | None, "[0, 1)", "dropout rate before the head; null: S 0.2, M 0.3, L 0.4"
        ] = None,
        pretrained: Annotated[bool, "start from the ImageNet-21k weights tuned on ImageNet-1k"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = build_timm(
            f"tf_efficientnetv2_{type.lower()}",
            self,
            stochastic_depth=stochastic_depth,
            resnet_dropout=DROPOUT[type] if resnet_dropout is None else resnet_dropout,
            pretrained=pretrained,
        )
