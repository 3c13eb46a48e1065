"""The non-local block: self-attention over all positions (Wang et al., arXiv 1711.07971)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import BATCH_NORM


class NonLocal(nn.Module):
    """`x + norm(z(softmax(theta(x) phi(x)^T) g(x)))`, the paper's embedded Gaussian; shape is kept.

    The norm's scale starts at zero, so that the block starts as the identity. Time grows with the square of the
    number of positions.

    Args:
        channels: of the input; the attention works with half of them.
        input_dim: spatial dimensions.
    """

    def __init__(self, channels: int, input_dim: int = 2) -> None:
        super().__init__()
        inner = channels // 2
        self.theta = nn.Linear(channels, inner)
        self.phi = nn.Linear(channels, inner)
        self.g = nn.Linear(channels, inner)
        self.z = nn.Linear(inner, channels)
        self.norm = BATCH_NORM[input_dim](channels)
        for layer in (self.theta, self.phi, self.g, self.z):
            nn.init.normal_(layer.weight, std=0.01)  # the authors': larger ones saturate the softmax
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)  # (N, P, C)
        attended = F.scaled_dot_product_attention(
            self.theta(positions), self.phi(positions), self.g(positions), scale=1.0
        )
        return x + self.norm(self.z(attended).transpose(1, 2).unflatten(2, x.shape[2:]))
