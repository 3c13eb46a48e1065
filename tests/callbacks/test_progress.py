from __future__ import annotations

import io
import re
import sys
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import progress
from callbacks.progress import Progress


class Batch(NamedTuple):
    input: Tensor
    target: Tensor
    index: Tensor


class Points(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Batch:
        generator = torch.Generator().manual_seed(i)
        return Batch(torch.randn(4, generator=generator), torch.tensor(i % 3), torch.tensor(i))


class Data(LightningDataModule):
    class_names = ["a", "b", "c"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Points(), batch_size=3)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Tiny(LightningModule):
    task, num_classes = "classification", 3

    @property
    def epochs(self) -> float:
        return 2.0 if self._trainer is None else float(self._trainer.max_epochs)

    def log_training(self) -> None: ...

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.read = 0
        self.fail_at: int | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch_samples = len(batch.index)
        if batch_idx == self.fail_at:
            raise RuntimeError("stop here")
        return nn.functional.cross_entropy(self.net(batch.input), batch.target)

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        self.log_dict({"train/loss": 0.25, "train/acc": 0.75}, on_step=False, on_epoch=True, batch_size=3)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.net(batch.input).detach(), "target": batch.target, "index": batch.index}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch.input)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/loss": 0.5, "val/acc": 0.625})

    def on_test_epoch_end(self) -> None:
        self.log_dict({"test/loss": 0.125, "test/acc": 0.875, "test/ece": 0.0625})

    def running_metrics(self) -> dict[str, float]:
        self.read += 1
        return {"loss": 0.375, "acc": 0.5}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "REDRAW_S", 0.0)
    monkeypatch.setattr(progress, "SLOW_S", 1e6)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def make_trainer(tmp_path, bar: Progress, **options) -> Trainer:
    options = {"max_epochs": 2, "num_sanity_val_steps": 2, **options}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(
        callbacks=[bar], default_root_dir=tmp_path, accelerator="cpu", devices=1, **quiet, **options
    )


def test_it_stands_in_for_lightnings_progress_bar(tmp_path):
    bar = Progress()
    trainer = make_trainer(tmp_path, bar)
    assert trainer.progress_bar_callback is bar
    assert [c for c in trainer.callbacks if isinstance(c, ProgressBar)] == [bar]


def test_a_log_file_gets_one_plain_line_an_epoch(tmp_path, capsys):
    model = Tiny()
    make_trainer(tmp_path, Progress(refresh_rate=1)).fit(model, Data())
    first, second = capsys.readouterr().out.splitlines()
    values = r"train loss 0\.2500 acc 0\.7500  val loss 0\.5000 acc 0\.6250  lr 0\.05  [\d.]+ s  \d+ images/s"
    assert re.fullmatch(rf"epoch 1 of 2  {values}  left \d+:\d\d", first)
    assert re.fullmatch(rf"epoch 2 of 2  {values}", second)
    assert model.read == 0, "nothing shows the running loss, so nothing waits for it"


def test_an_epoch_without_validation_does_not_repeat_the_values_of_an_earlier_one(tmp_path, capsys):
    trainer = make_trainer(tmp_path, Progress(), max_epochs=3, check_val_every_n_epoch=2)
    trainer.fit(Tiny(), Data())
    assert ["val loss" in line for line in capsys.readouterr().out.splitlines()] == [False, True, False]


def test_validate_test_and_predict_end_with_one_line_each(tmp_path, capsys):
    trainer, model = make_trainer(tmp_path, Progress()), Tiny()
    trainer.validate(model, Data(), verbose=False)
    trainer.test(model, Data(), verbose=False)
    trainer.predict(model, Data())
    validated, tested, predicted = capsys.readouterr().out.splitlines()
    assert validated.startswith("val  loss 0.5000  acc 0.6250  ")
    assert tested.startswith("test  loss 0.1250  acc 0.8750  ece 0.0625  ")
    assert predicted.startswith("predict  24 images  ")


def test_a_terminal_shows_the_epoch_in_progress_and_keeps_the_finished_lines(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    model = Tiny()
    make_trainer(tmp_path, Progress(refresh_rate=2)).fit(model, Data())
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    values = r"loss 0\.3750  acc 0\.5000  lr 0\.05  \d+ images/s  \d:\d\d<\d:\d\d"
    assert re.search(rf"epoch 1 of 2 .* 1/8  {values}", shown), "from the first step on"
    assert re.search(rf"epoch 1 of 2 .* 4/8  {values}", shown)
    assert re.search(r"epoch 2 of 2 .* validation 8/8", shown)
    kept = re.findall(r"(epoch \d of 2)  train loss 0\.2500 acc 0\.7500  val loss", shown)
    assert kept == ["epoch 1 of 2", "epoch 2 of 2"]
    assert model.read == 2 * (8 / 2 + 1), "the running loss is read once a redraw"


def test_redraws_are_bounded_in_time_however_fast_the_steps(tmp_path, monkeypatch):
    open_terminal(monkeypatch)
    monkeypatch.setattr(progress, "REDRAW_S", 1e6)
    model = Tiny()
    make_trainer(tmp_path, Progress(refresh_rate=1)).fit(model, Data())
    assert model.read == 0


@pytest.mark.parametrize("width", [40, 80, 200])
def test_what_a_terminal_has_no_room_for_is_left_out_whole(tmp_path, monkeypatch, width):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    trainer, model = make_trainer(tmp_path, Progress(refresh_rate=1)), Tiny()
    trainer.fit(model, Data())
    trainer.test(model, Data(), verbose=False)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()))
    assert max(map(len, lines)) <= width
    live = [
        line for line in lines if line.startswith("epoch ") and "5/8" in line and "validation" not in line
    ]
    for name, value in (("loss", "0.3750"), ("acc", "0.5000"), ("lr", "0.05")):
        assert all(re.search(rf"{name} {re.escape(value)}( |$)", line) for line in live if name in line), name
    assert (
        live
        and all("loss" in line for line in live)
        and all(("images/s" in line) == (width > 80) for line in live)
    )
    said = " ".join(lines)
    assert re.search(r"test  loss 0\.1250 +acc 0\.8750 +ece 0\.0625 +[\d.]+ s +\d+ images/s", said)


def test_a_dumb_terminal_counts_as_a_log_file(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    make_trainer(tmp_path, Progress(refresh_rate=1)).fit(Tiny(), Data())
    assert "\x1b" not in terminal.getvalue()
    assert len(terminal.getvalue().splitlines()) == 2


def test_the_terminal_is_given_back_when_training_fails(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    model = Tiny()
    model.fail_at = 4
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(tmp_path, Progress(refresh_rate=1)).fit(model, Data())
    assert sys.stdout is terminal
    shown = terminal.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is visible again"


def test_other_ranks_show_nothing(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    model = Tiny()
    trainer = make_trainer(tmp_path, Progress(refresh_rate=1))
    trainer.fit(model, Data())
    trainer.test(model, Data(), verbose=False)
    assert terminal.getvalue() == ""
    assert model.read == 0


def test_disabled_it_is_silent_until_enabled_again(tmp_path, capsys):
    bar, model = Progress(), Tiny()
    trainer = make_trainer(tmp_path, bar)
    bar.disable()
    trainer.test(model, Data(), verbose=False)
    assert capsys.readouterr().out == ""
    bar.enable()
    trainer.test(model, Data(), verbose=False)
    assert capsys.readouterr().out.startswith("test  ")


def test_an_epoch_resumed_in_its_middle_counts_from_where_it_stands(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    bar, model = Progress(refresh_rate=1), Tiny()
    trainer = make_trainer(tmp_path, bar)
    bar.setup(trainer, model, "fit")
    trainer.fit_loop.max_batches = 8
    trainer.strategy.optimizers = [model.configure_optimizers()]
    bar.on_train_start(trainer, model)
    batch = next(iter(Data().train_dataloader()))
    model.batch_samples = len(batch.index)
    bar.on_train_batch_end(trainer, model, None, batch, batch_idx=5)
    assert " 6/8  loss" in terminal.getvalue()
    bar.teardown(trainer, model, "fit")
