"""steps.csv: what its rows say, that they go on after a stop as if there had been none, and what they cost."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, runs_in
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.recorder import Interrupted
from callbacks.steps import StepRecorder
from crucible.run import RunDirectory
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel

BATCH, STEPS = 8, 10  # of an epoch


class Small(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"num_classes": 4, "input_channels": 1, "lr": 0.1, "warmstart": 0, **kwargs})
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, self.num_outputs))


class Seen(Callback):
    """What the network was trained with, by the step: the loss, the rate, and the gradient's norm."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.norms.append(float(gradients.norm()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)  # Lightning's is a part


class Kept(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("step/") for name in metrics):
            self.rows.append((step, dict(metrics)))

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(name)


def data(batch_size: int) -> SyntheticDataModule:
    module = SyntheticDataModule(
        name="synthetic", num_samples=90, batch_size=batch_size, num_classes=4, size=8, input_channels=1
    )  # fmt: skip
    module.check()
    assert len(module.samples("train")) // BATCH == STEPS
    return module


def fit(
    folder: Path, every: int, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    model = Small(**{n: options.pop(n) for n in ("lr_interval", "sam") if n in options})
    run, batch_size = RunDirectory(folder), options.pop("batch_size", BATCH)
    folder.mkdir(exist_ok=True)
    recorder = [StepRecorder(run, every)] if every else []
    trainer = Trainer(
        accelerator="cpu", logger=options.pop("logger", False), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, max_epochs=2,
        callbacks=[*recorder, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=data(batch_size), ckpt_path=resume, weights_only=True)
    return trainer


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "steps.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_row_has_the_mean_loss_since_the_last_one_and_rate_and_gradient_of_its_step(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, 4, seen, lr_interval="step")
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 8, 12, 16, 20]
    assert [row["epoch"] for row in found] == [0, 0, 1, 1, 1]
    for number, row in enumerate(found):
        steps = slice(4 * number, 4 * number + 4)  # the third row has steps of two epochs
        assert row["loss"] == pytest.approx(mean(seen.losses[steps]), rel=1e-6)
        assert row["lr"] == seen.rates[4 * number + 3]
        assert row["grad_norm"] == pytest.approx(seen.norms[4 * number + 3], rel=1e-6)
        assert row["images_per_s"] > 0 and math.isfinite(row["images_per_s"])


def test_steps_are_those_of_the_optimizer_where_gradients_are_accumulated(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, 2, seen, accumulate_grad_batches=2)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10]
    assert found[0]["loss"] == pytest.approx(mean(seen.losses[:4]), rel=1e-6)
    assert found[2]["loss"] == pytest.approx(mean(seen.losses[8:12]), rel=1e-6)


def test_trackers_have_the_rows_by_the_step(tmp_path: Path) -> None:
    kept = Kept()
    fit(tmp_path, 5, logger=kept)
    assert [step for step, _ in kept.rows] == [5, 10, 15, 20]
    for (_, values), row in zip(kept.rows, rows(tmp_path), strict=True):
        assert values == {f"step/{name}": row[name] for name in ("loss", "lr", "grad_norm", "images_per_s")}


class StopAt(Callback):
    """Saves a state at one step, and ends the process's training at a later one."""

    def __init__(self, file: Path, save: int, stop: int) -> None:
        self.file, self.save, self.stop = file, save, stop

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.save:
            trainer.save_checkpoint(self.file)
        if trainer.global_step == self.stop:
            raise Interrupted(15)


@pytest.mark.parametrize("save", [3, 6, 10, 11])
def test_a_resumed_run_ends_with_the_rows_of_one_that_was_not_stopped(tmp_path: Path, save: int) -> None:
    fit(tmp_path / "whole", 4)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", 4, StopAt(tmp_path / "state.ckpt", save, save + 4))
    after_the_state = rows(tmp_path / "parts")[-1]["step"]
    assert after_the_state > save, "a row of work that is lost"
    with (tmp_path / "parts" / "steps.csv").open("a") as stream:
        stream.write("1,1")  # killed while it wrote
    fit(tmp_path / "parts", 4, resume=tmp_path / "state.ckpt")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for row in (*whole, *parts):
        del row["images_per_s"]
    assert [row["step"] for row in parts] == [4, 8, 12, 16, 20]
    for row, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(row, rel=1e-12)


class HostReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sam", [False, True])
def test_the_host_reads_from_the_device_once_a_row_and_never_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sam: bool
) -> None:
    reads, lists = HostReads(), [0]
    to_list = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        lists[0] += tensor.is_floating_point()  # the sampler's numbers are whole, and never on a device
        return to_list(tensor)

    after: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(lists[0])

    monkeypatch.setattr(Tensor, "tolist", counted)
    in_step: list[int] = []

    class Reads(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            in_step.append(reads.count)

    with reads:
        fit(tmp_path, 4, Counts(), Reads(), limit_val_batches=0, sam=sam)
    first = [count - after[0] for count in after[: STEPS - 1]]
    of_rows = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [a - b for a, b in zip(first, of_rows, strict=True)] == [0] * (STEPS - 1)
    assert len(set(in_step[: STEPS - 1])) == 1


def train_on_two(folder: str) -> None:
    fit(Path(folder), 2, devices=2, strategy="ddp", limit_val_batches=0)


@pytest.mark.slow
def test_two_processes_make_one_file_with_the_loss_over_both(on_two_processes, tmp_path: Path) -> None:
    on_two_processes(train_on_two, tmp_path)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10]
    fit(tmp_path / "one", 2, batch_size=2 * BATCH, limit_val_batches=0)
    for row, other in zip(rows(tmp_path / "one"), found, strict=True):
        for name in ("epoch", "step", "loss", "lr", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name


@pytest.mark.slow
def test_the_option_makes_the_file_and_changes_no_identity(cli: Any, tmp_path: Path) -> None:
    outcome = cli(*TINY, "trainer.log_every_n_steps=2")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path / "experiments")
    assert [row["step"] for row in rows(run)] == [2, 4]
    again = cli(*TINY)
    assert "finished before" in again.out and runs_in(tmp_path / "experiments") == [run]


DIGITS = [
    "trainer.log_every_n_steps=1", "trainer.max_epochs=1", "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1", "test_after_training=false", "logger.wandb=null", "callbacks.plots=null",
    "trainer.enable_progress_bar=false",
]  # fmt: skip


def test_views_of_a_sample_are_one_image(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("callbacks.steps.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    per_s = []
    for arm in ("baseline", "augmix"):
        outcome = cli(*DIGITS, f"technique={arm}", f"exp_dir={arm}")
        assert outcome.status == 0, outcome.err
        (run,) = runs_in(tmp_path / arm)
        per_s.append([row["images_per_s"] for row in rows(run)])
    assert per_s[0] == per_s[1] and len(per_s[0]) > 1
