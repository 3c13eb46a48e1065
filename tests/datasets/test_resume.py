"""Exact resume: a real Trainer, stopped anywhere, goes on with the very samples that would have come."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from crucible.options import ConfigError
from datasets.synthetic import SyntheticDataModule

EPOCHS, SAMPLES = 3, 44  # 40 train: 5 batches of 8


class Model(LightningModule):
    """Records which samples, in which epoch, it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.index.tolist()))
        return self.layer(batch.input.flatten(1)).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(())  # validation that draws must not matter

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.step:
            raise KeyError("killed")


def data(**options: Any) -> SyntheticDataModule:
    settings = {"num_workers": 0, "batch_size": 8} | options
    return SyntheticDataModule(
        name="s", input_dim=1, size=4, num_samples=SAMPLES, num_classes=2, input_channels=1, **settings
    )


def fit(
    folder: Path, *, callbacks: list[Callback], ckpt: Path | None = None, module: Any = None, **options: Any
) -> Model:
    model = Model()
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=module or data(), ckpt_path=ckpt, weights_only=True)
    return model


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"accumulate_grad_batches": 2}])
def test_every_steps_checkpoint_resumes_to_the_same_samples(tmp_path, options):
    whole = fit(tmp_path, callbacks=[checkpoints(tmp_path / "c", every_n_train_steps=1)], **options)
    per_epoch = options.get("limit_train_batches", 5)
    assert len(whole.seen) == EPOCHS * per_epoch
    for file in sorted((tmp_path / "c").glob("*.ckpt"))[:-1]:
        progress = torch.load(file, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = progress["total"]["processed"]
        resumed = fit(tmp_path, callbacks=[], ckpt=file, **options)
        assert resumed.seen == whole.seen[done:], file.name


@pytest.mark.parametrize("when", ["train_epoch_end", "validation_end"])
def test_an_epochs_checkpoint_resumes_at_the_next_epoch(tmp_path, when):
    saver = checkpoints(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=when == "train_epoch_end")
    whole = fit(tmp_path, callbacks=[saver])
    files = sorted((tmp_path / "c").glob("*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
    assert len(files) == EPOCHS
    for epoch, file in enumerate(files[:-1], start=1):
        resumed = fit(tmp_path, callbacks=[], ckpt=file)
        assert resumed.seen == whole.seen[5 * epoch :]


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (4, 0), (5, 0), (7, 0), (10, 0), (5, 2), (7, 2)])
def test_a_run_that_breaks_off_resumes_where_it_was(tmp_path, stop, workers):
    options = {"num_workers": workers}
    whole = fit(tmp_path, callbacks=[], module=data(**options))
    saver = checkpoints(tmp_path / "c", every_n_train_steps=100, save_on_exception=True)
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path, callbacks=[saver, StopAt(stop)], module=data(**options))
    (file,) = (tmp_path / "c").glob("*.ckpt")
    resumed = fit(tmp_path, callbacks=[], ckpt=file, module=data(**options))
    assert resumed.seen == whole.seen[stop:]


def test_two_interruptions_are_as_good_as_none(tmp_path):
    whole, file = fit(tmp_path, callbacks=[]), None
    for stop in (3, 8):
        saver = checkpoints(tmp_path / str(stop), every_n_train_steps=100, save_on_exception=True)
        with pytest.raises(KeyError):
            fit(tmp_path, callbacks=[saver, StopAt(stop)], ckpt=file)
        (file,) = (tmp_path / str(stop)).glob("*.ckpt")
    assert fit(tmp_path, callbacks=[], ckpt=file).seen == whole.seen[8:]


def test_a_module_used_again_starts_from_the_beginning(tmp_path):
    saver = checkpoints(tmp_path / "c", every_n_train_steps=3)
    whole = fit(tmp_path, callbacks=[saver])
    module = data()
    fit(tmp_path, callbacks=[], ckpt=tmp_path / "c" / "step=3.ckpt", module=module)
    assert fit(tmp_path, callbacks=[], module=module).seen == whole.seen


def test_loaders_made_anew_every_epoch_keep_the_order(tmp_path):
    whole = fit(tmp_path, callbacks=[])
    assert fit(tmp_path, callbacks=[], reload_dataloaders_every_n_epochs=1).seen == whole.seen


def test_epochs_have_different_orders(tmp_path):
    seen = fit(tmp_path, callbacks=[]).seen
    orders = [[i for e, batch in seen if e == epoch for i in batch] for epoch in range(EPOCHS)]
    assert all(len(set(order)) == 40 for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_a_checkpoint_inside_an_epoch_needs_the_same_global_batch(tmp_path):
    fit(tmp_path, callbacks=[checkpoints(tmp_path / "c", every_n_train_steps=3)])
    with pytest.raises(ConfigError, match=r"data\.module\.batch_size=4: .* batches of 8"):
        fit(tmp_path, callbacks=[], ckpt=tmp_path / "c" / "step=3.ckpt", module=data(batch_size=4))


def test_overfit_batches_train_on_the_same_batches_every_epoch(tmp_path):
    seen = fit(tmp_path, callbacks=[], overfit_batches=2).seen
    assert len(seen) == 2 * EPOCHS
    assert len({tuple(batch) for _, batch in seen}) == 2


class Predictor(Model):
    def predict_step(self, batch: Any, batch_idx: int) -> list[int]:
        return batch.index.tolist()


def test_predict_delivers_each_sample_once_in_order(tmp_path):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = trainer.predict(Predictor(), datamodule=data())
    assert [i for batch in batches for i in batch] == list(range(11))
