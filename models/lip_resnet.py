"""ResNets with local importance-based pooling (Gao et al., arXiv 1908.04156) for 1-D, 2-D and 3-D input."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from crucible.corrections import Correction, all_of, option_is
from crucible.options import ConfigError
from crucible.technique import is_on
from models.convert import BlurDownsampling
from models.dynamic_resnet import ResNetModel
from models.layers import AVG_POOL, Activation, Bottleneck, Shortcut, conv

INSTANCE_NORM: dict[int, type[nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
LOGIT_WIDTH = 128
LARGEST_LOGIT = 12.0


class LIP(nn.Module):
    """Average over 3x3 windows of stride 2 with learned weights `exp(12 sigmoid(norm(conv(features))))`.

    The convolution starts at zero, so that the pooling starts as the plain average. The weights are float32
    under mixed precision.

    Args:
        channels: of the input, each with weights of its own.
        features: channels of what the weights are computed from.
        kernel_size: of that convolution.
        input_dim: spatial dimensions.
    """

    def __init__(self, channels: int, features: int, kernel_size: int, input_dim: int) -> None:
        super().__init__()
        self.conv = conv(input_dim, features, channels, kernel_size)
        self.norm = INSTANCE_NORM[input_dim](channels, affine=True)
        self.pool = AVG_POOL[input_dim](3, stride=2, padding=1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """`x` (N, channels, *spatial) at half the resolution; `features` has its spatial size."""
        logits = self.norm(self.conv(features))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = (LARGEST_LOGIT * logits.sigmoid()).exp()
        # a blur in the pool's place is a convolution, which autocast would do in a dtype that the weights exceed
        device = x.device.type
        casts = torch.amp.is_autocast_available(device)  # not on the meta device
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            return (self.pool(x * weight) / self.pool(weight)).to(x.dtype)


class LIPMaxPool(LIP):
    """In place of the stem's max pool: weights from the input itself, by a 3x3 convolution."""

    def __init__(self, channels: int, input_dim: int) -> None:
        super().__init__(channels, channels, 3, input_dim)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


class LIPBottleneck(Bottleneck):
    """The bottleneck whose stride, in the branch and in the shortcut, is a `LIP`.

    In the branch it takes the place of the 3x3 convolution, together with a 1x1 convolution after. The weights of
    both come from features that they share (the paper's "Bottleneck-128").
    """

    def _build_branch(
        self, in_channels: int, width: int, stride: int, input_dim: int, activation: Activation
    ) -> None:
        super()._build_branch(in_channels, width, stride, input_dim, activation)
        self.strided = stride == 2
        if self.strided:
            norm = INSTANCE_NORM[input_dim]
            self.features = nn.Sequential(
                conv(input_dim, in_channels, LOGIT_WIDTH, 1),
                norm(LOGIT_WIDTH, affine=True),
                activation(),
                conv(input_dim, LOGIT_WIDTH, LOGIT_WIDTH, 3),
                norm(LOGIT_WIDTH, affine=True),
                activation(),
            )
            self.pool = LIP(width, LOGIT_WIDTH, 1, input_dim)
            self.shortcut_pool = LIP(in_channels, LOGIT_WIDTH, 1, input_dim)

    def _conv3x3(
        self, input_dim: int, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> nn.Module:
        if stride == 1:
            return super()._conv3x3(input_dim, in_channels, out_channels, stride, groups)
        return conv(input_dim, in_channels, out_channels, 1)

    def _build_shortcut(
        self, in_channels: int, out_channels: int, stride: int, input_dim: int, shortcut: Shortcut
    ) -> nn.Module:
        return super()._build_shortcut(in_channels, out_channels, 1, input_dim, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        if not self.strided:
            return super().forward(x)
        features = self.features(x)
        branch = self.pool(self.act1(self.bn1(self.conv1(x))), features)
        branch = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(branch)))))
        shortcut = self.downsample(self.shortcut_pool(x, features))
        return self.act(shortcut + self.drop_path(self.se(branch)))


_blurs_under_autocast = all_of(
    is_on(BlurDownsampling), option_is("trainer.precision", "bf16-mixed", "16-mixed", "bf16", "16", 16)
)


class LIPResNetModel(ResNetModel):
    """A ResNet with `LIP` wherever it halves the resolution after the first convolution.

    It starts as the authors' code does: the convolutions of the weights and the last norm of each branch at zero, the
    head from N(0, 0.01) and zeros.
    """

    block = LIPBottleneck
    corrections: ClassVar = (
        Correction(
            "model._target_", 2, lambda config: True,
            "LIP-ResNets started with branches that were not zero and torch's default in the head",
        ),
        Correction(
            "model._target_", 3, _blurs_under_autocast,
            "a blur cast down the weights of the pooling, which are float32",
        ),
    )  # fmt: skip

    def __init__(
        self,
        zero_init_residual: Annotated[
            bool, "each block starts as its shortcut (arXiv 1706.02677), as in the authors' code"
        ] = True,
        head_std: Annotated[
            float | None, "(0, inf)", "the head starts from N(0, head_std) and zeros; null: torch's default"
        ] = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(zero_init_residual=zero_init_residual, head_std=head_std, **kwargs)
        if kwargs.get("stem") == "D":
            raise ConfigError("model.stem=D pools before the shortcuts, which LIPResNet does already; use C")
        if kwargs.get("averaged_shortcut"):
            raise ConfigError("model.averaged_shortcut=true: LIPResNet pools before the shortcuts already")
        network: Any = self.model
        if not isinstance(network.maxpool, nn.Identity):
            network.maxpool = LIPMaxPool(network.bn1.num_features, self.input_dim)
        for module in network.modules():
            if isinstance(module, LIP):
                nn.init.zeros_(module.conv.weight)  # type: ignore[arg-type]


class LIPResNet50(LIPResNetModel):
    """50 layers, 23.9 M parameters."""

    short = {"depth": 50}
    layers = (3, 4, 6, 3)


class LIPResNet101(LIPResNetModel):
    """101 layers, 42.9 M parameters."""

    short = {"depth": 101}
    layers = (3, 4, 23, 3)
