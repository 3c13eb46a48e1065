from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from sklearn.metrics import confusion_matrix, mean_absolute_error, r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks.plots import (
    MAX_CLASSES,
    PredictionSample,
    ResultPlots,
    draw_batch,
    draw_confusion,
    draw_curves,
)

N, CLASSES = 37, 5


class Batch(NamedTuple):
    input: Tensor
    target: Tensor
    index: Tensor


class Points(Dataset):
    def __init__(self, task: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.input = torch.randn(N, 6, generator=generator)
        label, value = torch.randint(CLASSES, (N,), generator=generator), self.input.sum(dim=1) + 100
        self.target = label if task == "classification" else value

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Batch:
        return Batch(self.input[i], self.target[i], torch.tensor(i))


class Data(LightningDataModule):
    def __init__(self, task: str = "classification", class_names: list[str] | None = None) -> None:
        super().__init__()
        self.task, self.class_names = task, class_names or []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Points(self.task), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Tiny(LightningModule):
    epochs = 3.0

    def __init__(
        self, task: str = "classification", num_classes: int = CLASSES, fail_in_epoch: int = -1
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.task, self.num_classes, self.fail_in_epoch = task, num_classes, fail_in_epoch
        self.net = nn.Linear(6, num_classes if task == "classification" else 1)

    def outputs(self, input: Tensor) -> Tensor:
        return self.net(input) if self.task == "classification" else self.net(input).flatten()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.current_epoch == self.fail_in_epoch:
            raise RuntimeError("stop here")
        return (self.outputs(batch.input) ** 2).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.outputs(batch.input).detach(), "target": batch.target, "index": batch.index}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_trainer(folder: Path, plots: ResultPlots | None = None, **options) -> Trainer:
    options = {"logger": False, "devices": 1, "max_epochs": 3, "enable_progress_bar": False, **options}
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    return Trainer(
        default_root_dir=folder, callbacks=[plots or ResultPlots()], accelerator="cpu", **quiet, **options
    )


def read_counts(folder: Path, split: str) -> tuple[list[str], list[str], np.ndarray]:
    with (folder / "plots" / f"confusion_matrix_{split}.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    return header[1:], [row[0] for row in rows], np.array([[int(v) for v in row[1:]] for row in rows])


def expected_counts(model: Tiny) -> np.ndarray:
    data = Points("classification")
    prediction = model.outputs(data.input).argmax(dim=1)
    return confusion_matrix(data.target, prediction, labels=range(model.num_classes))


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_a_fit_leaves_the_confusions_of_its_last_validation(tmp_path):
    model, names = Tiny(), [f"kind $_{i}" for i in range(CLASSES)]
    make_trainer(tmp_path).fit(model, Data(class_names=names))
    columns, rows, counts = read_counts(tmp_path, "val")
    assert columns == rows == names
    assert np.array_equal(counts, expected_counts(model))
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "confusion_matrix_val.csv",
        "confusion_matrix_val.png",
    ]
    assert is_picture(tmp_path / "plots" / "confusion_matrix_val.png")


def test_the_test_split_has_its_own_files(tmp_path):
    model = Tiny()
    make_trainer(tmp_path).test(model, Data(), verbose=False)
    columns, _, counts = read_counts(tmp_path, "test")
    assert columns == ["0", "1", "2", "3", "4"], "classes without names are numbered"
    assert np.array_equal(counts, expected_counts(model))
    assert is_picture(tmp_path / "plots" / "confusion_matrix_test.png")


def test_validation_alone_writes_too(tmp_path):
    model = Tiny()
    make_trainer(tmp_path).validate(model, Data(), verbose=False)
    assert np.array_equal(read_counts(tmp_path, "val")[2], expected_counts(model))


@pytest.mark.parametrize(("every", "written"), [(None, False), (2, True), (3, False)])
def test_every_n_epochs_writes_before_the_end(tmp_path, every, written):
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(tmp_path, ResultPlots(every_n_epochs=every)).fit(Tiny(fail_in_epoch=2), Data())
    assert (tmp_path / "plots" / "confusion_matrix_val.png").exists() == written


def test_too_many_classes_are_said_not_drawn(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path).test(Tiny(num_classes=MAX_CLASSES + 1), Data(), verbose=False)
    assert f"no confusion matrix for {MAX_CLASSES + 1} classes" in caplog.text
    assert not (tmp_path / "plots").exists()


def test_the_picture_names_few_classes_and_lists_the_worst_confusions_of_many():
    few = draw_confusion(np.array([[7, 3], [1, 9]]), ["cat", "dog"], "val")
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == ["cat", "dog"]
    assert {text.get_text() for text in few.axes[0].texts} == {"7", "3", "1", "9"}
    assert few.axes[0].images[0].get_array().tolist() == [[0.7, 0.3], [0.1, 0.9]], (
        "rows are shares of the true class"
    )
    assert "0.8000 of 20" in few.axes[0].get_title()

    counts = np.diag(np.full(1000, 45))
    counts[3, 700], counts[998, 999] = 5, 4
    many = draw_confusion(counts, [f"c{i}" for i in range(1000)], "val")
    listed = many.axes[1].texts[0].get_text().splitlines()[2:]
    assert [line.split() for line in listed] == [["5", "c3", "->", "c700"], ["4", "c998", "->", "c999"]]
    drawn = many.axes[0].images[0].get_array()
    assert drawn.shape == (250, 250), "drawn in blocks that are wide enough to see"
    assert drawn[0, 175] == pytest.approx(0.1), "a block shows its largest cell"


def test_regression_draws_predictions_against_targets(tmp_path):
    model = Tiny("regression")
    make_trainer(tmp_path).fit(model, Data("regression"))
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["predictions_val.png"]
    assert is_picture(tmp_path / "plots" / "predictions_val.png")


def test_r2_and_error_are_those_of_all_samples_and_the_sample_is_bounded():
    generator = torch.Generator().manual_seed(0)
    target = 1e4 + torch.randn(500, generator=generator)
    prediction = target + 0.3 * torch.randn(500, generator=generator)
    metric = PredictionSample(size=64)
    for i in range(0, 500, 30):
        metric.update(prediction[i : i + 30], target[i : i + 30], torch.arange(500)[i : i + 30])
    points, r2, mae, count = metric.compute()
    assert r2 == pytest.approx(r2_score(target.double(), prediction.double()), rel=1e-6)
    assert mae == pytest.approx(mean_absolute_error(target.double(), prediction.double()), rel=1e-6)
    assert points.shape == (64, 2) and count == 500
    pairs = set(zip(prediction.tolist(), target.tolist(), strict=True))
    assert set(map(tuple, points.tolist())) <= pairs, "points are real pairs of prediction and target"


def test_the_sample_depends_on_the_indices_alone():
    index = torch.arange(300)
    forward, shuffled = PredictionSample(size=50), PredictionSample(size=50)
    forward.update(index.float(), index.float(), index)
    for part in index[torch.randperm(300, generator=torch.Generator().manual_seed(3))].split(17):
        shuffled.update(part.float(), part.float(), part)
    chosen = forward.compute()[0]
    assert torch.equal(chosen, shuffled.compute()[0])
    thirds = torch.histc(chosen[:, 0], bins=3, min=0, max=300)
    assert thirds.min() >= 8, "the sample covers the data"


def test_fewer_samples_than_places_are_all_kept():
    metric = PredictionSample(size=50)
    metric.update(torch.arange(5.0), torch.arange(5.0), torch.arange(5))
    assert sorted(metric.compute()[0][:, 0].tolist()) == [0, 1, 2, 3, 4]


class EvenSplit(Data):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(Points(self.task), range(36)), batch_size=6)


class Frozen(Tiny):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def draw_on_two(folder, task):
    make_trainer(Path(folder), devices=2, strategy="ddp").fit(Frozen(task), EvenSplit(task))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.nightly)])
def test_two_ranks_write_what_one_writes(on_two_processes, tmp_path, task):
    one, two = tmp_path / "one", tmp_path / "two"
    make_trainer(one).fit(Frozen(task), EvenSplit(task))
    on_two_processes(draw_on_two, two, task)
    if task == "classification":
        assert read_counts(two, "val")[2].sum() == 36
    written = sorted(path.name for path in (one / "plots").iterdir())
    assert written == sorted(path.name for path in (two / "plots").iterdir())
    for name in written:
        assert (one / "plots" / name).read_bytes() == (two / "plots" / name).read_bytes()


@pytest.mark.slow
def test_wandb_gets_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="test")
    try:
        make_trainer(tmp_path, logger=logger).test(Tiny(), Data(), verbose=False)
        media = list(tmp_path.glob("wandb/offline-run-*/files/media/images/test/confusion_matrix_*.png"))
        assert len(media) == 1 and is_picture(media[0])
    finally:
        wandb.finish()


@pytest.mark.parametrize(
    ("shape", "size"), [((70, 3, 32, 64), (8 * 66, 8 * 34)), ((3, 1, 8, 8), (3 * 66, 66))]
)
def test_a_batch_is_shown_on_one_scale_at_most_sixty_four_of_it_small_ones_enlarged(shape, size) -> None:
    batch = torch.zeros(shape)
    batch[1, :, 0, 0], batch[2, :, 0, 0] = 2.0, -2.0
    sheet = draw_batch(batch)
    assert sheet.size == size
    side = 66
    found = [sheet.getpixel((tile * side, 0))[0] for tile in range(3)]
    assert found == [128, 255, 0], "what is between the least and the greatest value is grey"
    assert draw_batch(torch.zeros(4, 6)) is None, "no images"


def test_curves_have_the_rows_of_all_epochs_counted_from_one_and_leave_out_what_has_no_value() -> None:
    rows = [
        {"epoch": "0", "train/loss": "2.0", "val/loss": "1.5", "train/acc": "0.25", "val/acc": ""},
        {"epoch": "1", "train/loss": "nan", "val/loss": "1.0", "train/acc": "0.5", "val/acc": "0.75"},
    ]
    loss, accuracy = draw_curves(rows).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert drawn["val"] == [[1.0, 1.5], [2.0, 1.0]]
    assert drawn["train"][0] == [1.0, 2.0] and np.isnan(drawn["train"][1][1])
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [
        [[1.0, 0.25], [2.0, 0.5]],
        [[2.0, 0.75]],
    ]
    regression = draw_curves([{"epoch": "0", "train/loss": "1.0", "train/mae": "0.5"}])
    assert [axes.get_ylabel() for axes in regression.axes] == ["loss", "mae"]


def test_a_training_leaves_its_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,train/loss,train/acc\n0,2.0,0.25\n1,1.0,0.5\n")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        callbacks=[ResultPlots()], default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **options
    )
    trainer.fit(Tiny(), Data())
    assert (tmp_path / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")
