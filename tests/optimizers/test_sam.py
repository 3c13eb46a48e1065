"""SAM and ASAM: the gradient is that of w + e, everything else is an ordinary step at w."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from small_models import small
from stages import assembled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from crucible.options import ConfigError
from crucible.technique import Setting
from datasets.base_datamodule import Batch
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel
from optimizers.sam import Sam, ascend, restore, sam_closure

BATCH, STEPS = 8, 3
LR, MOMENTUM, DECAY = 0.2, 0.9, 0.01


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * STEPS, 5, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(3, (BATCH * STEPS,), generator=generator))


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 3))


class Model(LightningModule):
    step_pass = 1

    def __init__(self, net: nn.Module, options: Sam | None) -> None:
        super().__init__()
        self.net = net
        self.options = options
        self.seen: list[tuple[int, float]] = []
        self.before_step = 0
        self.reported: list[float] = []
        self.rates: list[float] = []
        self.key = 0

    def reseed(self) -> None:
        torch.default_generator.manual_seed(self.key)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.key = 100 + batch_idx
        self.reseed()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append((self.step_pass, loss.item()))
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.options is not None:
            optimizer_closure = sam_closure(self, optimizer_closure, self.options)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before_step += 1
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.reported.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(
    model: Model, dataset: TensorDataset | None = None, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=settings.pop("max_epochs", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, DataLoader(dataset or data(), batch_size=BATCH), ckpt_path=ckpt_path)
    return trainer


def assert_equal_state(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def by_hand(net: nn.Module, dataset: TensorDataset, rho: float, adaptive: bool, every: int = 1) -> None:
    """Two passes (or one, on the steps between) and one SGD step for each batch, spelt out, in place."""
    parameters = list(net.parameters())
    buffers: list[Tensor | None] = [None] * len(parameters)
    for step in range(STEPS):
        x, y = dataset[step * BATCH : (step + 1) * BATCH]
        first = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
        length = rho if step % every == 0 else 0.0
        shifted = copy.deepcopy(net)
        if adaptive:
            norm = sum(((w * g) ** 2).sum() for w, g in zip(parameters, first, strict=True)) ** 0.5
            moves = [length * w.detach() ** 2 * g / norm for w, g in zip(parameters, first, strict=True)]
        else:
            norm = sum((g**2).sum() for g in first) ** 0.5
            moves = [length * g / norm for g in first]
        with torch.no_grad():
            for w, e in zip(shifted.parameters(), moves, strict=True):
                w += e
        second = torch.autograd.grad(F.cross_entropy(shifted(x), y), list(shifted.parameters()))
        with torch.no_grad():
            for i, (w, g) in enumerate(zip(parameters, second, strict=True)):
                g = g + DECAY * w
                previous = buffers[i]
                buffers[i] = g if previous is None else MOMENTUM * previous + g
                w -= LR / (1 + step) * buffers[i]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_training_equals_two_passes_by_hand(adaptive, every):
    net = network().double()
    expected = copy.deepcopy(net)
    options = Sam(sam=True, adaptive_sam=adaptive, sam_rho=0.3, sam_every=every)
    train(Model(net, options), data(torch.float64), precision="64-true")
    by_hand(expected, data(torch.float64), 0.3, adaptive, every)
    for (name, a), b in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.05), (True, 0.5)])
def test_the_papers_rho_is_the_default(adaptive, rho):
    one, other = network(), network()
    train(Model(one, Sam(sam=True, adaptive_sam=adaptive)))
    train(Model(other, Sam(sam=True, adaptive_sam=adaptive, sam_rho=rho)))
    assert_equal_state(one, other)


@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_is_bitwise_the_plain_step_with_its_dropout_and_statistics(adaptive):
    plain, net = network(0.5), network(0.5)
    train(Model(plain, None))
    train(Model(net, Sam(sam=True, adaptive_sam=adaptive, sam_rho=0.0)))
    assert_equal_state(net, plain)


def test_both_passes_drop_the_same_units():
    net = network(0.5)
    model = Model(net, Sam(sam=True, sam_rho=0.0))
    train(model)
    assert [p for p, _ in model.seen] == [1, 2] * STEPS
    assert [loss for p, loss in model.seen if p == 1] == [loss for p, loss in model.seen if p == 2]


def test_the_reported_loss_is_the_first_passs():
    model = Model(network(), Sam(sam=True, sam_rho=0.5))
    train(model)
    assert model.reported == [loss for p, loss in model.seen if p == 1]
    assert model.reported != [loss for p, loss in model.seen if p == 2]


def test_a_batch_is_one_step_for_the_trainer_the_hooks_and_the_schedule():
    model = Model(network(), Sam(sam=True))
    trainer = train(model)
    assert trainer.global_step == STEPS
    assert model.before_step == STEPS
    assert model.rates == pytest.approx([LR / (1 + step) for step in range(STEPS)])
    assert model.step_pass == 1


def test_the_optimizers_state_is_its_own():
    model = Model(network(), Sam(sam=True))
    trainer = train(model)
    states = trainer.optimizers[0].state_dict()["state"].values()
    assert {key for state in states for key in state} == {"momentum_buffer"}


def test_clipping_acts_on_the_final_gradient_only():
    plain, net = network(), network()
    train(Model(plain, None), gradient_clip_val=0.1)
    train(Model(net, Sam(sam=True, sam_rho=0.0)), gradient_clip_val=0.1)
    assert_equal_state(net, plain)


@pytest.mark.parametrize(("every", "passes"), [(1, [1, 2] * 3), (2, [1, 2, 1, 1, 2]), (3, [1, 2, 1, 1])])
def test_the_ascent_is_made_on_each_kth_step_from_the_first_on(every, passes):
    model = Model(network(), Sam(sam=True, sam_every=every))
    trainer = train(model)
    assert [number for number, _ in model.seen] == passes
    assert trainer.global_step == model.before_step == STEPS


def test_a_resumed_run_goes_on_counting_to_the_next_ascent(tmp_path):
    options = Sam(sam=True, sam_every=2)
    whole, part, rest = (Model(network(), options) for _ in range(3))
    train(whole, max_epochs=2)
    train(part).save_checkpoint(tmp_path / "half.ckpt")
    train(rest, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert [number for number, _ in part.seen] == [1, 2, 1, 1, 2]
    assert [number for number, _ in rest.seen] == [1, 1, 2, 1], (
        "its first step is the run's fourth, a plain one"
    )
    assert_equal_state(rest.net, whole.net)


class Tiny(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=4, input_channels=1, lr=0.1, **kwargs)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(32, 4),
        )  # fmt: skip
        self.convert()
        self.given: list[tuple[int, Tensor, Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.given.append((self.step_pass, batch.input, batch.target))
        return super().training_step(batch, batch_idx)


def fit(model: Tiny, **settings: Any) -> None:
    images = SyntheticDataModule(
        name="synthetic", num_samples=80, batch_size=8, num_classes=4, size=8, input_channels=1
    )
    images.check()
    Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, **settings,
    ).fit(model, datamodule=images)  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "online"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_rho_zero_is_bitwise_plain_with_everything_that_draws_or_keeps_state(norm, precision):
    options = {"norm": norm, "mixup": True, "gradient_centralization": "all", "lookahead": True}
    plain, sharp = Tiny(**options), Tiny(**options, sam=True, sam_rho=0.0)
    fit(plain, precision=precision, gradient_clip_val=0.5)
    fit(sharp, precision=precision, gradient_clip_val=0.5)
    assert_equal_state(sharp, plain)


def test_both_passes_see_one_mixed_batch():
    model = Tiny(sam=True, mixup=True, mixup_alpha=1.0)
    fit(model)
    for (one, x, y), (two, again, target) in zip(model.given[::2], model.given[1::2], strict=True):
        assert (one, two) == (1, 2)
        assert y.is_floating_point()
        assert torch.equal(x, again)
        assert torch.equal(y, target)


class SkippedOnce(nn.Module):
    """A branch that only the first pass of a step uses, as stochastic depth may do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.always, self.branch, self.never = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.always(x) + (self.branch(x) if self.calls % 2 else 0)


def test_a_layer_without_a_gradient_in_one_pass_keeps_its_weights():
    net = SkippedOnce()
    before = copy.deepcopy(net)
    train(Model(net, Sam(sam=True, sam_rho=1.0)))
    assert_equal_state(net.branch, before.branch)
    assert_equal_state(net.never, before.never)
    assert not torch.equal(net.always.weight, before.always.weight)


class Skipping(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def test_a_batch_that_training_step_skips_takes_no_second_pass():
    model = Skipping(network(), Sam(sam=True))
    train(model)
    assert [p for p, _ in model.seen] == [1, 2, 1, 2]


class Failing(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.step_pass == 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_a_failure_in_the_second_pass_leaves_the_weights_where_they_were():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    model = Failing(net, Sam(sam=True, sam_rho=1.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert model.step_pass == 1


def half_precision(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_a_scaled_float16_run_follows_the_float32_run():
    wide, half = network(), network()
    train(Model(wide, Sam(sam=True, sam_rho=0.3)))
    train(Model(half, Sam(sam=True, sam_rho=0.3)), plugins=half_precision(1024.0))
    for a, b in zip(half.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_an_overflow_leaves_the_weights_unmoved_and_the_statistics_finite():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    plugin = half_precision(2.0**40)
    trainer = train(Model(net, Sam(sam=True, sam_rho=0.3)), plugins=plugin)
    assert plugin.scaler.get_scale() == 2.0 ** (40 - STEPS)
    assert trainer.global_step == STEPS
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert all(b.isfinite().all() for b in net.buffers())


def parameters_with_gradients(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for shape in [(4, 3), (5,), (), (2, 3, 3, 3)]:
        p = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        p.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(p)
    made[3].data = made[3].data.to(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_ascent_has_the_length_rho_over_all_parameters_together(adaptive):
    parameters = parameters_with_gradients()
    before = [p.detach().clone() for p in parameters]
    ascend(parameters, 0.7, adaptive)
    moves = [(p.detach() - b) / (b.abs() if adaptive else 1) for p, b in zip(parameters, before, strict=True)]
    flat = torch.cat([m.flatten() for m in moves])
    slope = torch.cat(
        [(p.grad * (b.abs() if adaptive else 1)).flatten() for p, b in zip(parameters, before, strict=True)]
    )
    assert flat.norm() == pytest.approx(0.7)
    torch.testing.assert_close(flat / 0.7, slope / slope.norm())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_restoring_is_bit_exact_whatever_became_of_the_gradients(adaptive, dtype):
    parameters = parameters_with_gradients(dtype)
    before = [p.detach().clone() for p in parameters]
    saved = ascend(parameters, 0.7, adaptive)
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for p in parameters:
        p.grad = None
    restore(saved)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_loss_scale_cancels(adaptive):
    plain, scaled = parameters_with_gradients(torch.float32), parameters_with_gradients(torch.float32)
    for p in scaled:
        p.grad *= 65536
    ascend(plain, 0.7, adaptive)
    ascend(scaled, 0.7, adaptive)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_moves_where_the_norm_is_not_finite(value, adaptive, dtype):
    parameters = parameters_with_gradients(dtype)
    parameters[0].grad[1] = value
    parameters[3].grad[0] = value
    before = [p.detach().clone() for p in parameters]
    ascend(parameters, 0.7, adaptive)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_gradients_of_several_dtypes_share_one_norm():
    narrow, wide = parameters_with_gradients(torch.bfloat16), parameters_with_gradients(torch.float32)
    before = [p.detach().double().clone() for p in wide]
    ascend([*narrow, *wide], 0.7)
    length = torch.cat([p.grad.double().flatten() for p in [*narrow, *wide]]).norm()
    for p, b in zip(wide, before, strict=True):
        torch.testing.assert_close(p.detach().double(), b + 0.7 * p.grad.double() / length, rtol=0, atol=1e-6)


def test_parameters_without_a_gradient_are_left_alone():
    (idle, *_) = parameters = parameters_with_gradients()
    idle.grad = None
    before = idle.detach().clone()
    assert len(ascend(parameters, 0.7)) == 3
    assert torch.equal(idle, before)
    assert ascend([idle], 0.7) == []


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a value back from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_ascent_reads_nothing_back_from_the_device(adaptive):
    parameters = parameters_with_gradients()
    with NoHostRead():
        restore(ascend(parameters, 0.7, adaptive))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adaptive_sam": True}, "model.adaptive_sam=true needs model.sam=true"),
        ({"sam_rho": 0.0}, "model.sam_rho=0.0 needs model.sam=true"),
        ({"sam_sync": True}, "model.sam_sync=true needs model.sam=true"),
        ({"sam_every": 5}, "model.sam_every=5 needs model.sam=true"),
        ({"sam": True, "sam_every": 0}, "model.sam_every must be .* got 0"),
        ({"sam": True, "sam_rho": -0.1}, "model.sam_rho must be .* got -0.1"),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        assembled(**values)


def test_accumulation_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=1, got 4: .* last batch only"):
        assembled(Setting(accumulate_grad_batches=4), sam=True)
    assembled(Setting(accumulate_grad_batches=4))


def test_weights_of_16_bits_are_refused_early_and_late() -> None:
    message = r"model\.sam=true: {} would round .* use mixed precision or 32-true"
    with pytest.raises(ConfigError, match=message.format(r"trainer\.precision=bf16-true")):
        assembled(Setting(precision="bf16-true"), sam=True)
    (check,) = assembled(Setting(precision="bf16-mixed"), sam=True).optimizer
    net = network()
    check(net, torch.optim.SGD(net.parameters(), LR))
    with pytest.raises(ConfigError, match=message.format(r"weights of torch\.float16")):
        check(net, torch.optim.SGD(net.half().parameters(), LR))


def test_a_command_with_weights_of_16_bits_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"model\.sam=true: trainer\.precision=16-true"):
        small("cifar_resnet", "model.sam=true", "trainer.precision=16-true")


class Sharded(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([part[self.global_rank :: 2] for part in batch], batch_idx)


def start_on_two() -> tuple[nn.Linear, Tensor, Tensor]:
    """The network and the one batch of both processes."""
    torch.manual_seed(1)
    return nn.Linear(5, 3).double(), *data(torch.float64)[:BATCH]


def ascend_on_two(sync: str, file: str) -> None:
    net, x, y = start_on_two()
    trainer = train(
        Sharded(net, Sam(sam=True, sam_rho=0.5, sam_sync=sync == "True")),
        TensorDataset(x, y),
        precision="64-true",
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        torch.save(net.state_dict(), file)


@pytest.mark.slow
@pytest.mark.parametrize("sync", [False, True])
def test_processes_ascend_on_their_own_or_together(on_two_processes, tmp_path, sync):
    net, x, y = start_on_two()
    w, b = (p.detach().clone().requires_grad_() for p in net.parameters())
    on_two_processes(ascend_on_two, sync, tmp_path / "net.pt")
    net.load_state_dict(torch.load(tmp_path / "net.pt"))

    def gradients(rank: int, w: Tensor, b: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(F.linear(x[rank::2], w, b), y[rank::2])
        return list(torch.autograd.grad(loss, (w, b)))

    first = [gradients(rank, w, b) for rank in range(2)]
    if sync:
        first = [[(g + h) / 2 for g, h in zip(*first, strict=True)]] * 2
    second = []
    for rank in range(2):
        length = sum((g**2).sum() for g in first[rank]) ** 0.5
        moved = [p + 0.5 * g / length for p, g in zip((w, b), first[rank], strict=True)]
        second.append(gradients(rank, *moved))
    for p, start, g, h in zip(net.parameters(), (w, b), *second, strict=True):
        expected = start - LR * ((g + h) / 2 + DECAY * start)
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)
