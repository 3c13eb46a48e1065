"""BaseModel: one step is what the parts say, metrics are exact, the rooms' options are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crucible.options import ConfigError
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel


class Tiny(BaseModel):
    """A convolution, a norm, dropout and a head."""

    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = TinyNetwork(self.input_channels, self.num_outputs, dropout)


class TinyNetwork(nn.Module):
    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x)).relu().mean((2, 3))))


def data(**options: Any) -> SyntheticDataModule:
    values = {
        "name": "synthetic",
        "num_samples": 90,
        "batch_size": 8,
        "num_classes": 4,
        "size": 8,
        "input_channels": 1,
    }
    module = SyntheticDataModule(**{**values, **options})
    module.check()
    return module


def fit(model: BaseModel, module: SyntheticDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=options.pop("max_epochs", 1), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        **options,
    )  # fmt: skip
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=module)
    return trainer


class Batches(Callback):
    """What the model was handed and what it made of it."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def make(**options: Any) -> Tiny:
    torch.manual_seed(0)
    return Tiny(
        **{"num_classes": 4, "input_channels": 1, "lr": 0.1, "scheduler": None, "warmstart": 0, **options}
    )


def test_a_step_of_sgd_is_what_a_hand_written_step_does() -> None:
    model, reference = make(weight_decay=1e-3), make()
    seen = Batches()
    fit(model, data(), seen, limit_train_batches=2, limit_val_batches=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    reference.train()
    for batch in seen.batches:
        optimizer.zero_grad()
        F.cross_entropy(reference(batch.input), batch.target).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_train_metrics_are_means_over_all_samples_of_the_epoch() -> None:
    seen = Batches()
    trainer = fit(make(lr=1e-8), data(), seen)
    sizes = [len(b.target) for b in seen.batches]
    expected = sum(n * loss for n, loss in zip(sizes, seen.losses, strict=True)) / sum(sizes)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-6)


def test_validation_loss_and_accuracy_are_exact_and_plain() -> None:
    model, module = make(label_smoothing=0.1, powergrad_alpha=0.3, mixup=True), data()
    trainer = fit(model, module)
    model.eval()
    logits, targets = [], []
    for batch in module.val_dataloader():
        batch = module.batch_transform(batch, "eval", 0)
        with torch.no_grad():
            logits.append(model(batch.input))
        targets.append(batch.target)
    z, t = torch.cat(logits), torch.cat(targets)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(F.cross_entropy(z, t)), rel=1e-5
    )
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx(
        float((z.argmax(1) == t).float().mean())
    )


def test_mixing_hands_the_criterion_probabilities_and_counts_the_dominant_label() -> None:
    seen = Batches()
    fit(make(mixup=True, mixup_alpha=1.0), data(), seen)
    target = seen.batches[0].target
    assert target.shape == (8, 4) and target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    assert (target.max(1).values >= 0.5).all()


def test_regression_compares_shapes_of_one_dimension() -> None:
    module = data(task="regression", num_classes=None)
    trainer = fit(make(task="regression", num_classes=1), module)
    assert {"train/loss", "train/mae", "val/loss", "val/mse", "val/mae"} <= set(trainer.callback_metrics)


def test_dropout_draws_are_a_function_of_seed_epoch_and_batch() -> None:
    def losses(seed: int, disturb: bool) -> list[float]:
        seen = Batches()
        model = make(dropout=0.5, seed=seed)
        if disturb:
            torch.rand(1000)
        fit(model, data(), seen, limit_val_batches=0 if disturb else None)
        return seen.losses

    assert losses(0, False) == losses(0, True)
    assert losses(0, False) != losses(1, False)


def test_sam_counts_each_sample_once_and_advances_one_step_a_batch() -> None:
    seen = Batches()
    trainer = fit(make(sam=True), data(), seen, limit_train_batches=5)
    assert trainer.global_step == 5
    assert trainer.callback_metrics["train/loss"] == pytest.approx(sum(seen.losses) / 5, rel=1e-6)


def test_the_schedule_reaches_its_end_per_epoch_of_optimizer_steps() -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(make(scheduler="CosineAnneal", warmstart=1), data(), Rates(), max_epochs=4)
    per_epoch = rates[:: len(rates) // 4]
    assert per_epoch == pytest.approx([0.05, 0.1, 0.075, 0.025])


@pytest.mark.parametrize("norm", ["online", "ghost", "layer", "instance", "switchable", "none"])
def test_any_norm_trains_in_place_of_batch_norm(norm: str) -> None:
    model = make(norm=norm, lr=0.02)
    model.convert()
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    seen = Batches()
    fit(model, data(num_samples=400), seen, max_epochs=4)
    assert sum(seen.losses[-20:]) < sum(seen.losses[:20])


def test_norm_options_are_checked_with_the_others() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm_kwargs\.groups=4: .*num_groups"):
        make(norm="group", norm_kwargs={"groups": 4})
    with pytest.raises(ConfigError, match=r"model\.norm_kwargs\.num_groups=4 needs model\.norm"):
        make(norm_kwargs={"num_groups": 4})
    with pytest.raises(ConfigError, match=r"model\.norm_kwargs\.num_groups must divide 8"):
        make(norm="group", norm_kwargs={"num_groups": 3}).convert()


def test_online_norm_under_sam_advances_its_streams_once_a_step() -> None:
    def streams(**options: Any) -> dict[str, Tensor]:
        model = make(norm="online", **options)
        model.convert()
        fit(model, data(), limit_train_batches=3, limit_val_batches=0)
        return {k: v for k, v in model.state_dict().items() if k.startswith("model.norm.")}

    plain, at_rest = streams(), streams(sam=True, sam_rho=0.0)
    assert plain.keys() == at_rest.keys() and all(torch.equal(plain[k], at_rest[k]) for k in plain)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, or a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in (
            "_local_scalar_dense",
            "item",
            "equal",
            "is_nonzero",
            "nonzero",
            "masked_select",
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"mixup": True, "powergrad_alpha": 0.3}, {"sam": True}, {"norm": "online"}], ids=str
)
def test_a_step_never_waits_for_the_device(options: dict[str, Any]) -> None:
    reads = HostReads()
    after: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(reads.count)

    model = make(**options)
    model.convert()
    with reads:
        fit(model, data(), Counts(), limit_val_batches=0)
    assert len(after) > 5
    assert len(set(after[:-1])) == 1, f"values read after each step: {after}"


def test_an_option_that_nobody_consumes_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.label_smoothin=0\.1: Tiny has no such option; did you mean label_smoothing",
    ):
        make(label_smoothin=0.1)


def test_a_compiled_model_and_a_plain_one_exchange_checkpoints(tmp_path: Path) -> None:
    plain, compiled = make(), make()
    compiled.model.compile(backend="eager", fullgraph=True)
    trainer = fit(compiled, data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    plain.load_state_dict(state)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(plain.eval()(x), compiled.eval()(x))


def test_the_loss_under_bf16_is_float32() -> None:
    seen = Batches()
    trainer = fit(make(), data(), seen, precision="bf16-mixed")
    assert trainer.callback_metrics["train/loss"].dtype in (torch.float32, torch.float64)
    assert all(p.dtype == torch.float32 for p in trainer.lightning_module.parameters())
