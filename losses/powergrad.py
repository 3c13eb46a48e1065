"""PowerGrad (arXiv 2111.12495): cross-entropy with a power of the probabilities in its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from crucible.options import ConfigError
from crucible.technique import Setting, Step, Technique


def powergrad_cross_entropy(
    logits: Tensor,
    target: Tensor,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy whose gradient to the logits z is that of the probabilities p raised to `alpha`.

    The value is the true cross-entropy of softmax(z) against q, the (smoothed) target. The gradient is
    `(p^alpha / sum(p^alpha) - q) / N = (softmax(alpha z) - q) / N`: the gradient of cross-entropy at
    temperature 1/alpha, divided by alpha. It does not depend on a loss scale. With `alpha` 1 this is
    `F.cross_entropy`, bit for bit.

    With `weights` w the target is q w, in the value and in the gradient: `(sum(q w) softmax(alpha z) - q w) / N`.

    Computed in float32, or float64 for float64 logits, under autocast too. A custom backward shares the
    log-probabilities with the value and is about as fast as `F.cross_entropy` (benchmarks/loss_cost.py);
    the same from two calls of `F.cross_entropy` took 1.8 times as long.

    Args:
        logits: `(N, K)`, any floating dtype.
        target: `(N,)` int64 class indices in [0, K), or `(N, K)` floating probabilities whose rows sum to 1.
        alpha: greater than 0; the paper's range is (0, 1], with 0.25 to 0.3 typical on ImageNet.
        label_smoothing: in [0, 1), the share of the target spread evenly over all K classes, as in torch.
        weights: (K,) of the classes; the sum is divided by N as without, as torch does for probabilities.

    Returns:
        The scalar loss, of the dtype computed in. It has no second derivative unless `alpha` is 1.

    Raises:
        ValueError: for probabilities of another shape than the logits.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target probabilities {tuple(target.shape)} do not fit logits {tuple(logits.shape)}"
            )
        target = target.to(logits.dtype)
    if weights is not None:
        target = spread(logits, target, label_smoothing) * weights.to(logits.dtype)
        if alpha == 1:
            return F.cross_entropy(logits, target)
        return _PowerGrad.apply(logits, target, alpha, 0.0, True)
    if alpha == 1:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return _PowerGrad.apply(logits, target, alpha, label_smoothing, False)


def spread(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Targets (N,) int64 or (N, K) as (N, K) of the logits' dtype, a share of each spread evenly over the classes."""
    if not target.is_floating_point():
        target = F.one_hot(target, logits.shape[1])
    target = target.to(logits.dtype)
    return target * (1 - smoothing) + smoothing / logits.shape[1] if smoothing else target


@dataclass(frozen=True)
class PowerGrad(Technique):
    """The loss's gradient sees the class probabilities raised to a power."""

    powergrad_alpha: Annotated[
        float,
        "(0, 1]",
        "power of the probabilities in the gradient; 1 is plain cross-entropy (arXiv 2111.12495)",
    ] = 1.0

    def check(self, setting: Setting) -> None:
        check_has_classes("powergrad_alpha", 1.0, self.powergrad_alpha, setting)

    def attach(self, step: Step) -> None:
        step.criterion.alpha = self.powergrad_alpha  # type: ignore[assignment]  # of PowerGradCrossEntropy


@dataclass(frozen=True)
class LabelSmoothing(Technique):
    """A share of each target is spread evenly over all classes; once, mixed targets too."""

    label_smoothing: Annotated[float, "[0, 1)", "share of the target spread evenly over all classes"] = 0.0

    def check(self, setting: Setting) -> None:
        check_has_classes("label_smoothing", 0.0, self.label_smoothing, setting)

    def attach(self, step: Step) -> None:
        step.criterion.label_smoothing = self.label_smoothing  # type: ignore[assignment]  # as above


def check_has_classes(option: str, off: float, value: float, setting: Setting) -> None:
    """Refuse an option of the class probabilities where there are none.

    Raises:
        ConfigError: for regression.
    """
    if setting.task == "regression":
        raise ConfigError(
            f"model.{option} must be {off:g} with data.task=regression, got {value!r}: it acts on class probabilities"
        )


class ClassCriterion(nn.Module):
    """A criterion of targets `(N,)` or `(N, K)` for logits `(N, K)`, which techniques smooth and weigh.

    Attributes:
        label_smoothing: in [0, 1), the share of the target spread evenly over all classes.
        weights: (K,), what the classes' terms are multiplied by; None: nothing.

    Raises:
        ConfigError: for a `label_smoothing` out of range.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"model.label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        self.weights: Tensor | None = None

    def smooth(self, logits: Tensor, target: Tensor) -> Tensor:
        """The (N, K) target, smoothed."""
        return spread(logits, target, self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


class PowerGradCrossEntropy(ClassCriterion):
    """`powergrad_cross_entropy` as a criterion: `(logits (N, K), target (N,) or (N, K)) -> scalar`.

    Args:
        alpha: the power, greater than 0; 1 is plain cross-entropy.
        label_smoothing: in [0, 1).

    Raises:
        ConfigError: for an `alpha` or a `label_smoothing` out of range.
    """

    def __init__(self, alpha: float, label_smoothing: float = 0.0) -> None:
        if not 0 < alpha < math.inf:
            raise ConfigError(f"model.powergrad_alpha must be in (0, 1], got {alpha!r}")
        super().__init__(label_smoothing)
        self.alpha = alpha

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return powergrad_cross_entropy(logits, target, self.alpha, self.label_smoothing, self.weights)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, {super().extra_repr()}"


class _PowerGrad(Function):
    """Value of the cross-entropy at z, gradient `(softmax(alpha z) - q) / N`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, alpha: float, smoothing: float, weighted: bool
    ) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        ctx.save_for_backward(log_p, target)
        ctx.alpha, ctx.smoothing, ctx.weighted = alpha, smoothing, weighted
        soft = target.is_floating_point()
        loss = -(log_p * target).sum() / len(log_p) if soft else F.nll_loss(log_p, target)
        return torch.lerp(loss, -log_p.mean(), smoothing) if smoothing else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        log_p, target = ctx.saved_tensors
        n, k = log_p.shape
        scale = grad / n
        kept = scale * (1 - ctx.smoothing)
        # p^alpha as a power of two: exp2 is several times faster than exp and pow on the CPU.
        # The largest p of a row is at least 1/K, so the sum cannot underflow.
        out = (log_p * (ctx.alpha / math.log(2))).exp2_()
        out.mul_(scale / out.sum(dim=1, keepdim=True))
        if ctx.weighted:  # rows of the target that do not sum to 1
            out.mul_(target.sum(dim=1, keepdim=True))
        if target.is_floating_point():
            out.addcmul_(target, kept, value=-1)
        else:
            out.scatter_add_(1, target.unsqueeze(1), (-kept).expand(n, 1))
        if ctx.smoothing:
            out.sub_(scale * (ctx.smoothing / k))
        return out, None, None, None, None
