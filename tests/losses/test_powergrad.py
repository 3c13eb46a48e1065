"""PowerGrad: the gradient is (softmax(alpha z) - q) / N, the value is the true cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from crucible.options import ConfigError
from losses.powergrad import PowerGradCrossEntropy, powergrad_cross_entropy

N, K = 12, 7


def sample(kind: str, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, K, dtype=dtype, generator=generator) * scale
    hard = torch.randint(K, (N,), generator=generator)
    if kind == "hard":
        return logits.requires_grad_(), hard
    partner, weight = hard.flip(0), torch.rand(N, 1, dtype=torch.float64, generator=generator)
    mixed = weight * F.one_hot(hard, K) + (1 - weight) * F.one_hot(partner, K)
    return logits.requires_grad_(), mixed.to(dtype)


def probabilities(target: Tensor, smoothing: float) -> Tensor:
    q = F.one_hot(target, K).double() if target.ndim == 1 else target.double()
    return (1 - smoothing) * q + smoothing / K


def gradient(criterion: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(criterion(logits, target), logits)[0]


@pytest.mark.parametrize("kind", ["hard", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.25])
def test_gradient_is_the_papers_and_value_is_cross_entropy(alpha, smoothing, kind):
    logits, target = sample(kind)
    q = probabilities(target, smoothing)
    p = logits.detach().softmax(dim=1)
    powered = p**alpha / (p**alpha).sum(dim=1, keepdim=True)
    criterion = PowerGradCrossEntropy(alpha, smoothing)
    torch.testing.assert_close(gradient(criterion, logits, target), (powered - q) / N, rtol=0, atol=1e-15)
    value = -(q * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(criterion(logits, target).detach(), value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["hard", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_alpha_one_is_bitwise_cross_entropy(smoothing, kind):
    logits, target = sample(kind, torch.float32)
    plain = F.cross_entropy(logits, target, label_smoothing=smoothing)
    criterion = PowerGradCrossEntropy(1.0, smoothing)
    assert torch.equal(criterion(logits, target), plain)
    assert torch.equal(gradient(criterion, logits, target), torch.autograd.grad(plain, logits)[0])


def test_a_mixed_target_equals_the_mixture_of_two_losses():
    logits, hard = sample("hard")
    other, weight = hard.roll(1), 0.3
    mixed = weight * probabilities(hard, 0) + (1 - weight) * probabilities(other, 0)
    criterion = PowerGradCrossEntropy(0.3)
    two = weight * gradient(criterion, logits, hard) + (1 - weight) * gradient(criterion, logits, other)
    torch.testing.assert_close(gradient(criterion, logits, mixed), two, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["hard", "mixed"])
def test_a_loss_scale_cancels(kind):
    logits, target = sample(kind, torch.float32)
    loss = powergrad_cross_entropy(logits, target, 0.3, 0.1)
    (scaled,) = torch.autograd.grad(loss * 65536, logits, retain_graph=True)
    assert torch.equal(scaled / 65536, torch.autograd.grad(loss, logits)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, target = sample("hard", dtype)
    wide = logits.detach().float().requires_grad_()
    criterion = PowerGradCrossEntropy(0.3)
    loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion(wide, target))
    # in float16 a gradient this small needs its loss scale
    (scaled,) = torch.autograd.grad(loss * 1024, logits)
    assert torch.equal(scaled, (1024 * gradient(criterion, wide, target)).to(dtype))


def test_probabilities_that_underflow_keep_their_power():
    logits = torch.zeros(1, K)
    logits[0, 0] = 200.0  # every other probability is below the least float32
    logits.requires_grad_()
    expected = (0.25 * logits.detach().double()).softmax(dim=1)
    expected[0, 1] -= 1
    got = gradient(PowerGradCrossEntropy(0.25), logits, torch.tensor([1]))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.0, 2000.0])
def test_extreme_logits_give_finite_results(scale):
    logits, target = sample("hard", torch.float32, scale)
    criterion = PowerGradCrossEntropy(0.25)
    assert criterion(logits, target).isfinite()
    torch.testing.assert_close(
        gradient(criterion, logits, target).double(),
        ((0.25 * logits.detach().double()).softmax(dim=1) - probabilities(target, 0)) / N,
        rtol=1e-3,
        atol=1e-6,
    )


def test_only_the_value_is_computed_without_gradients():
    logits, target = sample("hard")
    with torch.no_grad():
        loss = powergrad_cross_entropy(logits, target, 0.3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(logits, target).detach())


def test_a_second_derivative_is_refused():
    logits, target = sample("hard")
    (first,) = torch.autograd.grad(powergrad_cross_entropy(logits, target, 0.3), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("kind", ["hard", "mixed"])
def test_compiles_without_a_graph_break(kind):
    logits, target = sample(kind)
    criterion = PowerGradCrossEntropy(0.3, 0.1)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, logits, target), gradient(criterion, logits, target))


@pytest.mark.nightly  # CI sees inductor in tests/norms/test_online_norm.py
def test_inductor_computes_the_same():
    logits, target = sample("hard", torch.float32)
    criterion = PowerGradCrossEntropy(0.3)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
    torch.testing.assert_close(gradient(compiled, logits, target), gradient(criterion, logits, target))


@pytest.mark.parametrize("alpha", [0.0, -0.3, float("nan"), float("inf")])
def test_a_power_that_is_not_positive_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"model.powergrad_alpha must be in \(0, 1\], got"):
        PowerGradCrossEntropy(alpha)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ConfigError, match=r"model.label_smoothing must be in \[0, 1\), got"):
        PowerGradCrossEntropy(0.3, smoothing)


def test_target_probabilities_are_never_broadcast():
    logits, _ = sample("hard")
    with pytest.raises(ValueError, match=r"\(12, 1\) do not fit logits \(12, 7\)"):
        powergrad_cross_entropy(logits, torch.ones(N, 1, dtype=torch.float64), 0.3)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(K, 5, generator=generator))
        self.criterion = PowerGradCrossEntropy(0.25, 0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(F.linear(batch[0], self.weight), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_scaled_float16_step_moves_the_weights_as_the_formula_says():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 5, generator=generator)
    target = torch.randint(K, (N,), generator=generator)
    model = Classifier()
    w = model.weight.detach().double().clone()
    p = (0.25 * x.double() @ w.T).softmax(dim=1)
    expected = w - 0.5 * (p - probabilities(target, 0.1)).T @ x.double() / N
    trainer = Trainer(
        accelerator="cpu",
        plugins=MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, target), batch_size=N))
    assert not torch.equal(model.weight.detach().double(), w)
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=0, atol=1e-3)
