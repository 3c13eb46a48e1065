"""LogitStats: its statistics are the formulas, exact over an epoch's samples, and cost no wait."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.logit_stats import LogitStats, logit_statistics
from crucible.options import ConfigError
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel

NAMES = ("norm", "mean", "max", "var")


class Small(BaseModel):
    """A linear layer with dropout, trained on batches of 7, 6 and 5 samples; notes its training logits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * self.input_channels, self.num_outputs)
        )
        self.passes: list[list[Tensor]] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        size = 7 - self._batch_number() % 3 if self.trainer.training else None
        return type(batch)(*(part[:size] for part in batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.step_pass == 1:
            self.passes.append([])
        return super().training_step(batch, batch_idx)

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        if self.training:
            self.passes[-1].append(logits.detach().clone())
        return logits

    def logits_of_training(self) -> Tensor:
        """Those of each step's first pass."""
        return torch.cat([step[0] for step in self.passes])


def make(kind: type[BaseModel] = Small, **options: Any) -> Any:
    torch.manual_seed(0)
    values = {"num_classes": 4, "input_channels": 1, "lr": 0.1, "scheduler": None, "warmstart": 0}
    return kind(**{**values, **options})


def data(**options: Any) -> SyntheticDataModule:
    values = {"name": "synthetic", "num_samples": 90, "batch_size": 7, "num_classes": 4, "size": 4}
    module = SyntheticDataModule(**{**values, "input_channels": 1, **options})
    module.check()
    return module


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **options}
    return Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


def fit(model: BaseModel, *callbacks: Callback, **options: Any) -> dict[str, float]:
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(model, datamodule=data())
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def by_the_formulas(logits: Tensor) -> dict[str, float]:
    rows = [[float(v) for v in row] for row in logits.double()]
    k = len(rows[0])
    means = [sum(row) / k for row in rows]
    each = {
        "norm": [math.sqrt(sum(v * v for v in row)) for row in rows],
        "mean": [abs(m) for m in means],
        "max": [abs(max(row)) for row in rows],
        "var": [sum((v - m) ** 2 for v in row) / (k - 1) for row, m in zip(rows, means, strict=True)],
    }
    return {name: sum(values) / len(rows) for name, values in each.items()}


def shown(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {name: values[f"{prefix}/{name}"] for name in NAMES}


# The statistics


def test_the_statistics_are_the_formulas_in_float64() -> None:
    logits = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 - 2
    result = logit_statistics(logits)
    assert list(result) == list(NAMES)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in result.values())
    assert {k: float(v) for k, v in result.items()} == pytest.approx(by_the_formulas(logits), rel=1e-13)


def test_the_largest_logit_of_a_row_may_be_negative_and_counts_by_its_size() -> None:
    assert float(logit_statistics(torch.tensor([[-3.0, -1.0], [2.0, -9.0]]))["max"]) == 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_statistics_of_half_precision_are_float32_under_autocast(dtype: torch.dtype) -> None:
    logits = (torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = logit_statistics(logits)
    assert all(value.dtype == torch.float32 for value in result.values())
    assert {k: float(v) for k, v in result.items()} == pytest.approx(by_the_formulas(logits), rel=1e-5)


def test_the_statistics_compile_into_one_graph() -> None:
    logits = torch.randn(3, 4)
    compiled = torch.compile(logit_statistics, fullgraph=True, backend="eager")(logits)
    torch.testing.assert_close(compiled, logit_statistics(logits))


# Over an epoch


@pytest.mark.parametrize("options", [{}, {"mixup": True, "mixup_alpha": 1.0}, {"sam": True}], ids=str)
def test_training_values_are_means_over_every_sample_once(options: dict[str, Any]) -> None:
    model = make(**options)
    values = fit(model, LogitStats())
    logits = model.logits_of_training()
    assert {len(step[0]) for step in model.passes} == {5, 6, 7}
    assert {len(step) for step in model.passes} == {2 if options.get("sam") else 1}
    assert shown(values, "logits") == pytest.approx(by_the_formulas(logits), rel=1e-6)


def test_each_epoch_starts_anew() -> None:
    model = make()
    values = fit(model, LogitStats(), max_epochs=2)
    second = torch.cat([step[0] for step in model.passes[len(model.passes) // 2 :]])
    assert shown(values, "logits") == pytest.approx(by_the_formulas(second), rel=1e-6)


def test_validation_and_test_values_are_means_over_every_sample() -> None:
    model, module = make(), data()
    trainer = trainer_of(LogitStats())
    trainer.fit(model, datamodule=module)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(model, datamodule=module, verbose=False)
    values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    model.eval()
    for split, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        batches = [module.batch_transform(batch, "eval", 0).input for batch in loader]
        assert len({len(batch) for batch in batches}) == 2
        with torch.no_grad():
            logits = torch.cat([model(batch) for batch in batches])
        assert shown(values, f"{split}/logits") == pytest.approx(by_the_formulas(logits), rel=1e-6)


def test_a_network_compiled_in_place_gives_the_same_values() -> None:
    plain, compiled = make(), make()
    compiled.model.compile(backend="eager", fullgraph=True)
    assert fit(compiled, LogitStats()) == pytest.approx(fit(plain, LogitStats()), rel=1e-6)


def test_watching_changes_no_weight_and_leaves_no_hook() -> None:
    alone, watched = make(), make()
    fit(alone)
    fit(watched, LogitStats())
    for a, b in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not watched._forward_hooks


class Stop(Callback):
    """Saves the training state at the start of a step, and stops there."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyError("stopped")


def test_an_epoch_resumed_in_its_middle_has_the_whole_epochs_values(tmp_path: Path) -> None:
    whole = fit(make(), LogitStats(), max_epochs=2)
    stopped = make()
    with pytest.raises(KeyError):
        fit(stopped, LogitStats(), Stop(tmp_path / "c.ckpt", 3), max_epochs=2)
    assert not stopped._forward_hooks
    trainer = trainer_of(LogitStats(), max_epochs=2)
    trainer.fit(make(), datamodule=data(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    resumed = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert resumed == pytest.approx(whole, rel=1e-6)


# Norms of gradient and weights


class Gradients(Callback):
    """The gradient's norm, in float64, when the optimizer is about to step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.double().flatten() for p in pl_module.parameters()]
        self.norms.append(float(torch.cat(gradients).norm()))


@pytest.mark.parametrize("options", [{}, {"sam": True}], ids=str)
def test_the_gradient_norm_is_that_of_all_parameters_before_clipping(options: dict[str, Any]) -> None:
    seen, model = Gradients(), make(**options)
    values = fit(model, LogitStats(), seen, gradient_clip_val=0.05)
    assert min(seen.norms) > 0.05
    assert values["train/grad_norm"] == pytest.approx(sum(seen.norms) / len(seen.norms), rel=1e-6)
    assert values["train/grad_norm_max"] == pytest.approx(max(seen.norms), rel=1e-6)


def test_the_gradient_norm_is_taken_once_for_accumulated_batches() -> None:
    seen = Gradients()
    values = fit(make(), LogitStats(), seen, accumulate_grad_batches=2)
    assert values["train/grad_norm"] == pytest.approx(sum(seen.norms) / len(seen.norms), rel=1e-6)


def test_under_loss_scaling_the_norm_is_unscaled_and_skipped_steps_are_left_out() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    seen = Gradients()
    values = fit(make(), LogitStats(), seen, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    taken = [norm for norm in seen.norms if math.isfinite(norm)]
    assert 0 < len(taken) < len(seen.norms), "some steps overflow"
    assert values["train/grad_norm"] == pytest.approx(sum(taken) / len(taken), rel=1e-5)
    assert values["train/grad_norm_max"] == pytest.approx(max(taken), rel=1e-5)
    assert values["train/grad_norm_max"] < 100


def test_the_weight_norm_is_that_at_the_end_of_the_epoch() -> None:
    model = make()
    values = fit(model, LogitStats())
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    assert values["train/weight_norm"] == pytest.approx(float(weights.norm()), rel=1e-6)


def test_without_norms_only_the_logits_are_watched() -> None:
    values = fit(make(), LogitStats(norms=False))
    assert {f"logits/{name}" for name in NAMES} <= set(values)
    assert not any("_norm" in name for name in values)


# What it costs, and what it refuses


class HostReads(TorchDispatchMode):
    """Counts the reads of a value on the host, and of shapes that depend on values."""

    READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"sam": True}], ids=str)
def test_no_value_is_read_in_a_step(options: dict[str, Any]) -> None:
    reads = HostReads()
    after: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(reads.count)

    with reads:
        fit(make(**options), LogitStats(), Counts(), limit_val_batches=0)
    assert len(after) > 5
    assert len(set(after[:-1])) == 1, f"values read after each step: {after}"


def test_regression_has_no_logits_to_watch() -> None:
    module = data(task="regression", num_classes=None)
    with pytest.raises(ConfigError, match=r"technique=logit_stats .*data\.task=regression"):
        trainer_of(LogitStats()).fit(make(task="regression", num_classes=1), datamodule=module)


class Bypass(Small):
    """A training step that does not call the model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.model(batch.input), batch.target)


def test_a_model_whose_training_logits_cannot_be_seen_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"technique=logit_stats .*Bypass\.training_step"):
        fit(make(Bypass), LogitStats())


def test_the_technique_is_the_callback() -> None:
    content = yaml.safe_load((ROOT / "cli_configs" / "technique" / "logit_stats.yaml").read_text())
    assert isinstance(instantiate(content["callbacks"]["logit_stats"]), LogitStats)


# Two processes


class Keep(Callback):
    """Writes each rank's training logits and rank 0's values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(pl_module.logits_of_training(), self.folder / f"logits{trainer.global_rank}.pt")
        if trainer.global_rank == 0:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save(values, self.folder / "values.pt")


def train_and_keep(folder: str) -> None:
    fit(make(), LogitStats(), Keep(Path(folder)), devices=2, strategy="ddp")


@pytest.mark.slow
def test_two_processes_give_the_means_over_all_their_samples(on_two_processes, tmp_path: Path) -> None:
    on_two_processes(train_and_keep, tmp_path)
    logits = torch.cat([torch.load(tmp_path / f"logits{rank}.pt") for rank in range(2)])
    values = torch.load(tmp_path / "values.pt")
    assert shown(values, "logits") == pytest.approx(by_the_formulas(logits), rel=1e-6)
