"""A sample that cannot be read ends a run in one line: its file, its split, what to do; whichever process read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import runs_in, summary_of, write_images
from PIL import Image
from torch.utils.data import Dataset

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.cifar import CIFAR10DataModule
from datasets.image_folder import ImageFolderDataModule
from datasets.image_regression import ImageRegressionDataModule
from datasets.images import Arrays, SampleError

RUN = (
    "data=image_folder", "data.num_classes=2", "data.input_size=16", "data.module.batch_size=4",
    "data.module.train_transforms._target_=augmentation.policies.cifar.TestTransform",
    "data.module.test_transforms._target_=augmentation.policies.cifar.TestTransform",
    "++data.module.train_transforms.size=16", "++data.module.test_transforms.size=16",
    "model=cifar_resnet", "model.depth=8", "trainer.max_epochs=1", "logger.wandb=null", "callbacks.plots=null",
    "callbacks.progress=null", "trainer.enable_progress_bar=false",
)  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images" / "train", ["a", "b"], 12, (16, 16))
    write_images(tmp_path / "images" / "val", ["a", "b"], 4, (16, 16))
    return tmp_path / "images"


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _truncated,
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("not a picture"),
    "gone": Path.unlink,
    "unreadable": _unreadable,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere.jpg")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_wrong_with_a_file_it_is_named_with_its_split(images: Path, damage: str) -> None:
    module = ImageFolderDataModule(
        name="x", data_root_dir=str(images), batch_size=4, num_workers=0, cache="none"
    )
    module.check()
    file = images / "val" / "b" / "2.jpg"
    DAMAGES[damage](file)
    with pytest.raises(SampleError) as error:
        list(module.val_dataloader())
    line = str(error.value)
    assert str(file) in line and "val split" in line and "replace or remove it" in line
    assert "\n" not in line and line.count(str(file)) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_ends_in_that_line_and_records_it(cli, images: Path, tmp_path: Path, workers: int) -> None:
    _truncated(images / "train" / "a" / "3.jpg")
    outcome = cli(*RUN, f"data.module.data_root_dir={images}", f"data.module.num_workers={workers}")
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert outcome.status == 2 and len(errors) == 1 and "Traceback" not in outcome.err
    assert str(images / "train" / "a" / "3.jpg") in errors[0] and "train split" in errors[0]
    (run,) = runs_in(tmp_path / "experiments")
    summary = summary_of(run)
    assert summary["status"] == "failed" and f"error: {summary['reason']}" == errors[0]
    if workers:  # where it was in the worker is kept
        assert "Original Traceback" in (run / "main.log").read_text()


@pytest.mark.slow
def test_a_rank_says_it_too(ranks, images: Path) -> None:
    _truncated(images / "train" / "a" / "3.jpg")
    both = ranks(*RUN, f"data.module.data_root_dir={images}", "data.module.num_workers=1", "trainer.devices=2",
                 "trainer.accelerator=cpu")  # fmt: skip
    said = "".join(rank.err for rank in both)
    assert f"error: {images / 'train' / 'a' / '3.jpg'}: cannot be read as an image" in said
    assert any(rank.status == 2 for rank in both)


@pytest.mark.nightly
def test_what_two_ranks_skip_is_counted_once(ranks, images: Path, tmp_path: Path) -> None:
    for broken in ("a/3.jpg", "b/4.jpg"):
        _truncated(images / "train" / broken)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "probe.py").write_text(
        "import json\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Probe(Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        with open(f'{trainer.default_root_dir}/rank{trainer.global_rank}.json', 'w') as stream:\n"
        "            json.dump([float(p.double().sum()) for p in pl_module.parameters()], stream)\n"
    )
    both = ranks(*RUN, f"data.module.data_root_dir={images}", "data.module.num_workers=1", "trainer.devices=2",
                 "trainer.accelerator=cpu", "data.module.on_error=skip", "trainer.max_epochs=2",
                 f"user_dir={tmp_path / 'mine'}", "+callbacks.probe._target_=probe.Probe")  # fmt: skip
    assert [rank.status for rank in both] == [0, 0], both[0].err + both[1].err
    (run,) = runs_in(tmp_path / "experiments")
    found = summary_of(run)["unreadable"]
    assert sum(split["count"] for split in found.values()) == 2
    assert {name for split in found.values() for name in split["samples"]} == {"a/3.jpg", "b/4.jpg"}
    first, second = (json.loads(rank.read_text()) for rank in run.glob("rank*.json"))
    assert first == second, "replicas stay identical"


class _Mine(BaseDataModule):
    def __init__(self, raw: Dataset, **options: object) -> None:
        super().__init__(name="mine", num_workers=options.pop("num_workers", 0), batch_size=2, **options)
        self.raw = raw

    def setup(self, stage: str) -> None:
        self.train_dataset = self.raw


class _Raw(Dataset):
    def __init__(self, sample: Callable[[int], object]) -> None:
        self.sample, self.targets = sample, np.arange(20) % 2

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> object:
        return self.sample(index)


def _odd_shape(index: int) -> object:
    return torch.zeros(1, 4 + (index == 7), 4), index % 2


def _missing_key(index: int) -> object:
    return {}[index] if index == 7 else (torch.zeros(1, 4, 4), 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (
            _odd_shape,
            r"sample \d+ of the train split is 1x.x4, \d+ is 1x.x4: all samples of a batch have one shape",
        ),
        (_missing_key, r"sample 7 of the train split \(_Raw\): KeyError: 7; "),
    ],
)
def test_a_data_set_of_ones_own_is_named_with_the_sample(sample, says: str, workers: int) -> None:
    module = _Mine(_Raw(sample), num_workers=workers, val_split=0.1)
    with pytest.raises(SampleError, match=says) as error:
        list(module.train_dataloader())
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("targets", "task", "says"),
    [
        (
            [0, 1, 2, 1],
            "classification",
            r"sample 2 of the train split \(Arrays\): its target is 2; .*from 0 to 1",
        ),
        ([0, -1, 1, 1], "classification", "its target is -1"),
        ([0, 0.5, 1, 1], "classification", "its target is 0.5; a label is a whole number"),
        ([0.1, np.nan, 1, 1], "regression", "its target is nan; a value is a finite number"),
        (["a", "b", "a", "b"], "classification", "not numbers"),
    ],
)
def test_targets_that_no_loss_takes_are_refused_before_the_first_step(targets, task: str, says: str) -> None:
    raw = Arrays(torch.zeros(4, 1, 4, 4), targets, ["x", "y"] if task == "classification" else [])
    with pytest.raises(ConfigError, match=says):
        _Mine(raw, task=task, val_split=0.5).check()


def test_a_damaged_copy_of_decoded_images_is_made_again(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split, ["a", "b"], 4, (32, 32))

    def pixels() -> torch.Tensor:
        module = CIFAR10DataModule(name="x", data_root_dir=str(tmp_path), num_classes=2)
        module.setup("fit")
        return module.train_dataset.inputs

    whole = pixels().clone()  # of the mapped file
    for damaged in (b"", b"nonsense", None):
        for file in (tmp_path / ".decoded").glob("*.npy"):
            if damaged is None:
                np.save(file, np.zeros((3, 3)))
            else:
                file.write_bytes(damaged)
        assert torch.equal(pixels(), whole)


def test_a_table_that_is_no_text_is_named(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for content in (b"file,value\na.png,\xff\xfe", b"file,value\na.png,1\n\0\0"):
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=r"labels\.csv"):
            ImageRegressionDataModule(name="x", data_root_dir=str(tmp_path), task="regression").check()
