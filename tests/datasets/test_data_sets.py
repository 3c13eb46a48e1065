"""Each data set: what it reads, what it makes of it, and how it refuses what is wrong."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from augmentation.policies import cifar, imagenet
from crucible.options import ConfigError, check_arguments
from datasets.base_datamodule import BaseDataModule
from datasets.cifar import CIFAR10DataModule
from datasets.digits import DigitsDataModule
from datasets.image_folder import ImageFolderDataModule
from datasets.image_regression import ImageRegressionDataModule
from datasets.imagenet import ImagenetDataModule
from datasets.poster_regression import PosterRegressionDataModule
from datasets.synthetic import SyntheticDataModule

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "cli_configs" / "data").glob("*.yaml"))


def write_image(path: Path, shade: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def write_tree(root: Path, folders: dict[str, int], size: tuple[int, int] = (12, 10)) -> None:
    for number, (folder, count) in enumerate(folders.items()):
        for i in range(count):
            write_image(root / folder / f"{i:03}.png", 40 * number + i, size)


def made(cls: type[BaseDataModule], root: Path | None = None, **options: Any) -> BaseDataModule:
    settings = {"name": "data", "batch_size": 4, "num_workers": 0}
    module = cls(**settings | options | ({} if root is None else {"data_root_dir": str(root)}))
    module.check()
    return module


def targets_of(module: BaseDataModule, split: str) -> list[float]:
    samples = module.samples(split)
    return samples[(0, list(range(len(samples))))].target.tolist()


SMALL = {"train_transforms": cifar.BaselineTransform(size=8), "test_transforms": cifar.TestTransform(size=8)}


# The configurations


def whole(path: Path) -> DictConfig:
    """The file, over the one that it builds on."""
    config = OmegaConf.load(path)
    for base in config.pop("defaults", []):
        if base != "_self_":
            config = OmegaConf.merge(OmegaConf.load(ROOT / f"cli_configs{base}.yaml"), config)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_with_the_common_defaults_is_what_its_target_takes(path):
    train = OmegaConf.load(ROOT / "cli_configs" / "train.yaml")
    config = OmegaConf.merge({"data": train.data, "seed": 0, "data_dir": "/data"}, whole(path))
    module = OmegaConf.to_container(config, resolve=True)["data"]["module"]
    for options in (module, module["train_transforms"], module["test_transforms"]):
        where, name = options["_target_"].rsplit(".", 1)
        check_arguments(getattr(importlib.import_module(where), name), options, "data.module")
    built = instantiate(module, _convert_="all")
    assert built.name == path.stem
    for policy in (built.train_transforms, built.test_transforms):
        assert policy.unused_options == {}
        assert policy.channels_given in (0, config.data.input_channels)
        assert getattr(policy, "size", config.data.input_size) == config.data.input_size


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_opens_with_its_command_and_states_only_the_data(path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n# ")
    assert "#     python main.py data=" + path.stem in text
    config = whole(path)
    assert set(config) <= {"data", "metrics"}
    assert ("metrics" in config) == (config.data.task == "regression")
    assert {"module", "num_classes", "input_channels", "input_size", "input_dim", "task"} == set(config.data)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem in ("digits", "synthetic")], ids=lambda p: p.stem
)
def test_data_without_files_load_as_configured(path):
    train = OmegaConf.load(ROOT / "cli_configs" / "train.yaml")
    config = OmegaConf.merge({"data": train.data, "seed": 0}, OmegaConf.load(path))
    module = instantiate(OmegaConf.to_container(config, resolve=True)["data"]["module"], _convert_="all")
    module.check()
    batch = module.batch_transform(next(iter(module.train_dataloader())), "train", 0)
    assert batch.input.shape[1:] == (
        config.data.input_channels,
        *[config.data.input_size] * config.data.input_dim,
    )
    assert batch.input.dtype == torch.float32
    assert abs(batch.input.mean()) < 0.3


# Digits


def test_digits_are_split_70_10_20_with_the_same_test_split_for_every_seed():
    modules = [
        made(DigitsDataModule, input_channels=1, val_split=0.125, split_seed=s, seed=s) for s in (0, 1)
    ]
    sizes = [len(modules[0].samples(split)) for split in ("train", "val", "test")]
    assert sizes == [1258, 180, 359]
    tests = [m.samples("test").raw.inputs for m in modules]
    assert torch.equal(*tests)
    assert modules[0].num_classes == 10
    for split in ("train", "val", "test"):
        counts = np.bincount(targets_of(modules[0], split))
        assert counts.max() - counts.min() <= 0.1 * counts.mean() + 1


def test_digits_use_the_whole_range_of_uint8():
    inputs = made(DigitsDataModule, input_channels=1).train_dataset.inputs
    assert inputs.dtype == torch.uint8
    assert inputs.shape[1:] == (1, 8, 8)
    assert len(inputs.unique()) == 17
    assert (inputs.min(), inputs.max()) == (0, 255)


def test_digits_come_in_colour_when_three_channels_are_asked_for():
    inputs = made(DigitsDataModule, input_channels=3).train_dataset.inputs
    assert inputs.shape[1:] == (3, 8, 8)
    assert torch.equal(inputs[:, 0], inputs[:, 2])


def test_no_digit_is_in_two_splits():
    module = made(DigitsDataModule, input_channels=1)
    parts = [module.samples(split) for split in ("train", "val")]
    assert not set(parts[0].indices.tolist()) & set(parts[1].indices.tolist())
    assert len(module.train_dataset) + len(module.test_dataset) == 1797


# Image folders


def test_a_plain_folder_of_classes_is_split_by_class(tmp_path):
    write_tree(tmp_path, {"cat": 40, "ant": 20})
    module = made(ImageFolderDataModule, tmp_path, test_split=0.1, val_split=0.25, **SMALL)
    assert module.class_names == ["ant", "cat"]
    assert module.num_classes == 2
    counts = {split: np.bincount(targets_of(module, split)).tolist() for split in ("train", "val", "test")}
    assert counts["test"] == [2, 4]
    assert np.abs(np.subtract(counts["val"], [4.5, 9])).max() <= 1
    assert np.add(counts["train"], counts["val"]).tolist() == [18, 36]
    assert not module.test_is_val
    names = {
        split: {module.sample_name(i, split) for i in module.samples(split)[(0, [0, 1])].index}
        for split in counts
    }
    assert names["test"].isdisjoint(names["train"] | names["val"])


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders_are_used_as_they_are(tmp_path, validation):
    write_tree(tmp_path, {"train/a": 6, "train/b": 4, f"{validation}/b": 3, "test/a": 2, "test/b": 1})
    module = made(ImageFolderDataModule, tmp_path, **SMALL)
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [10, 3, 3]
    assert targets_of(module, "val") == [1, 1, 1]
    assert module.sample_name(0, "val") == "b/000.png"


def test_a_missing_test_folder_is_held_out_or_left_out(tmp_path):
    write_tree(tmp_path, {"train/a": 20, "train/b": 20, "val/a": 5})
    held = made(ImageFolderDataModule, tmp_path, test_split=0.1, **SMALL)
    assert [len(held.samples(split)) for split in ("train", "val", "test")] == [36, 5, 4]
    without = made(ImageFolderDataModule, tmp_path, test_split=0.0, **SMALL)
    assert [len(without.samples(split)) for split in ("train", "val", "test")] == [40, 5, 5]
    assert without.test_is_val


def test_images_of_any_size_make_one_batch(tmp_path):
    for i in range(12):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.jpg", size=(5 + 7 * i, 90 - 5 * i))
    policy = imagenet.BaselineTransform(size=16)
    module = made(ImageFolderDataModule, tmp_path, test_split=0.0, train_transforms=policy)
    assert next(iter(module.train_dataloader())).input.shape == (4, 3, 16, 16)


def test_folds_over_folders_are_refused_where_there_is_a_validation_folder(tmp_path):
    write_tree(tmp_path, {"train/a": 6, "train/b": 6, "val/a": 2, "test/a": 2})
    with pytest.raises(ConfigError, match=r"data\.cv\.k=3: data has a validation split of its own"):
        made(ImageFolderDataModule, tmp_path, folds=3, **SMALL)


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        ({}, {}, r"holds no class folders"),
        ({"a": 5, "b": 5}, {"num_classes": 3}, r"data\.num_classes=3: data has 2 classes in "),
        ({"train/a": 5, "test/b": 5}, {}, r"test/b: the training images have no such class"),
        ({"a": 5, "b/.hidden": 5}, {}, r"/b: holds no images"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, folders, options, message):
    write_tree(tmp_path, folders)
    with pytest.raises(ConfigError, match=message):
        made(ImageFolderDataModule, tmp_path, **options, **SMALL)


@pytest.mark.parametrize(
    "cls", [ImageFolderDataModule, ImagenetDataModule, PosterRegressionDataModule, ImageRegressionDataModule]
)
def test_a_missing_folder_is_refused_by_its_option(tmp_path, cls):
    with pytest.raises(ConfigError, match=r"data\.module\.data_root_dir=.*nowhere: no such folder"):
        made(cls, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.module\.data_root_dir is missing"):
        made(cls)


def test_the_fingerprint_moves_with_the_folder_and_changes_with_it(tmp_path):
    write_tree(tmp_path / "a", {"x": 8, "y": 8})
    original = made(ImageFolderDataModule, tmp_path / "a", **SMALL).fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert made(ImageFolderDataModule, tmp_path / "b", **SMALL).fingerprint() == original
    write_image(tmp_path / "b" / "x" / "new.png")
    assert made(ImageFolderDataModule, tmp_path / "b", **SMALL).fingerprint() != original


# ImageNet


def test_imagenet_tests_on_the_val_folder_and_holds_validation_out_of_train(tmp_path):
    write_tree(tmp_path, {"train/n01": 10, "train/n02": 10, "val/n01": 3, "val/n02": 3})
    module = made(ImagenetDataModule, tmp_path, val_split=0.2, num_classes=2, **SMALL)
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [16, 4, 6]
    assert sorted(targets_of(module, "val")) == [0, 0, 1, 1]
    literature = made(ImagenetDataModule, tmp_path, val_split="test", num_classes=2, **SMALL)
    assert [len(literature.samples(split)) for split in ("train", "val", "test")] == [20, 6, 6]


def test_imagenet_needs_the_same_classes_in_both_folders(tmp_path):
    write_tree(tmp_path, {"train/n01": 5, "train/n02": 5, "val/n01": 3})
    with pytest.raises(ConfigError, match=r"has no images of class n02"):
        made(ImagenetDataModule, tmp_path, **SMALL)
    write_tree(tmp_path, {"val/n02": 3, "val/n03": 3})
    with pytest.raises(ConfigError, match=r"n03: the training images have no such class"):
        made(ImagenetDataModule, tmp_path, **SMALL)


# CIFAR


@pytest.fixture
def cifar_tree(tmp_path) -> Path:
    write_tree(tmp_path, {"train/bird": 8, "train/ant": 8, "test/bird": 2, "test/ant": 2}, (32, 32))
    return tmp_path


def test_cifar_from_folders_is_one_array_with_sorted_classes(cifar_tree):
    module = made(CIFAR10DataModule, cifar_tree)
    assert module.class_names == ["ant", "bird"]
    inputs, targets = module.train_dataset.inputs, module.train_dataset.targets
    assert inputs.shape == (16, 3, 32, 32)
    assert inputs.dtype == torch.uint8
    assert targets.tolist() == [0] * 8 + [1] * 8
    assert inputs[:8, 0, 0, 0].tolist() == [40 + i for i in range(8)]
    assert len(module.samples("test")) == 4


def test_decoded_folders_are_kept_and_decoded_again_when_a_file_changes(cifar_tree):
    first = made(CIFAR10DataModule, cifar_tree)
    kept = {path.name for path in (cifar_tree / ".decoded").iterdir()}
    assert len(kept) == 2
    again = made(CIFAR10DataModule, cifar_tree)
    assert torch.equal(again.train_dataset.inputs, first.train_dataset.inputs)
    assert again.fingerprint() == first.fingerprint()
    assert {path.name for path in (cifar_tree / ".decoded").iterdir()} == kept
    write_image(cifar_tree / "train" / "ant" / "000.png", 255, (32, 32))
    changed = made(CIFAR10DataModule, cifar_tree)
    assert changed.train_dataset.inputs[0, 0, 0, 0] == 255
    assert changed.fingerprint() != first.fingerprint()


def test_cifar_comes_in_grey_when_one_channel_is_asked_for(cifar_tree):
    assert made(CIFAR10DataModule, cifar_tree, input_channels=1).train_dataset.inputs.shape == (16, 1, 32, 32)


def test_cifar_refuses_images_of_another_size(cifar_tree):
    write_image(cifar_tree / "train" / "ant" / "999.png", size=(64, 48))
    with pytest.raises(ConfigError, match=r"999\.png has 64x48 pixels, not 32x32"):
        made(CIFAR10DataModule, cifar_tree)


def test_cifar_in_its_original_form_is_read_by_torchvision(tmp_path, monkeypatch):
    class Original:
        base_folder = "batches"
        classes = ["ant", "bird"]

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.data = np.arange((6 if train else 2) * 32 * 32 * 3, dtype=np.uint8).reshape(-1, 32, 32, 3)
            self.targets = [0, 1] * (len(self.data) // 2)
            if download:
                (Path(root) / self.base_folder).mkdir()

    monkeypatch.setattr(CIFAR10DataModule, "source", Original)
    module = made(CIFAR10DataModule, tmp_path / "new", batch_size=2)
    assert (tmp_path / "new" / "batches").is_dir()
    assert module.train_dataset.inputs.shape == (6, 3, 32, 32)
    assert torch.equal(
        module.train_dataset.inputs[0, :, 1, 2], torch.tensor([102, 103, 104], dtype=torch.uint8)
    )
    assert module.class_names == ["ant", "bird"]


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch, error):
    class Unreachable:
        base_folder = "batches"

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise error

    monkeypatch.setattr(CIFAR10DataModule, "source", Unreachable)
    with pytest.raises(ConfigError, match=rf"data\.module\.data_root_dir=.*download failed \({error}\)"):
        made(CIFAR10DataModule, tmp_path)


# Regression


def test_poster_values_are_read_from_the_names(tmp_path):
    for i in range(30):
        write_image(tmp_path / ("a" if i % 2 else ".") / f"{i / 4}_film_{i}.jpg", i)
    module = made(PosterRegressionDataModule, tmp_path, task="regression", **SMALL)
    values = [*targets_of(module, "train"), *targets_of(module, "val"), *targets_of(module, "test")]
    assert sorted(values) == [i / 4 for i in range(30)]
    batch = next(iter(module.train_dataloader()))
    assert batch.target.dtype == torch.float32
    for index, value in zip(batch.index.tolist(), batch.target.tolist(), strict=True):
        assert module.sample_name(index, "train").split("/")[-1].startswith(f"{value}_")


@pytest.mark.parametrize("name", ["film.jpg", "x_film.jpg", "nan_film.jpg"])
def test_a_poster_without_a_value_is_named(tmp_path, name):
    write_image(tmp_path / "1_a.jpg")
    write_image(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name}: no number before the first '_'"):
        made(PosterRegressionDataModule, tmp_path, task="regression", **SMALL)


def write_table(root: Path, rows: list[str], header: str = "file,value") -> None:
    for i in range(20):
        write_image(root / f"images/{i}.png", i)
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


ROWS = [f"images/{i}.png,{i * 0.5}" for i in range(20)]


def test_a_table_gives_each_image_its_value(tmp_path):
    write_table(tmp_path, ROWS)
    module = made(ImageRegressionDataModule, tmp_path, task="regression", **SMALL)
    samples = module.samples("train")
    batch = samples[(0, list(range(len(samples))))]
    assert len(samples) == 16
    for index, value in zip(batch.index.tolist(), batch.target.tolist(), strict=True):
        assert module.sample_name(index, "train") == f"images/{int(value * 2)}.png"


def test_the_columns_may_have_other_names(tmp_path):
    write_table(tmp_path, [f"{i},x,images/{i}.png" for i in range(20)], "score,note,path")
    options = {"file_column": "path", "value_column": "score", "task": "regression"}
    module = made(ImageRegressionDataModule, tmp_path, **options, **SMALL)
    assert (
        sorted(targets_of(module, "train") + targets_of(module, "val") + targets_of(module, "test"))[-1] == 19
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/3.png,high", r"labels\.csv, line 22: 'high' is not a number"),
        ("images/3.png,nan", r"line 22: 'nan' is not a number"),
        ("images/3.png", r"line 22: None is not a number"),
        ("images/99.png,1", r"line 22: no such file: 'images/99\.png'"),
        (",1", r"line 22: no such file: ''"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    write_table(tmp_path, [*ROWS, row])
    with pytest.raises(ConfigError, match=message):
        made(ImageRegressionDataModule, tmp_path, task="regression", **SMALL)


def test_missing_columns_and_tables_are_named(tmp_path):
    write_table(tmp_path, ROWS, "path,value")
    with pytest.raises(ConfigError, match=r"data\.module\.file_column=file: .* has the columns path, value"):
        made(ImageRegressionDataModule, tmp_path, task="regression", **SMALL)
    with pytest.raises(ConfigError, match=r"data\.module\.csv_file=other\.csv: no such file"):
        made(ImageRegressionDataModule, tmp_path, task="regression", csv_file="other.csv", **SMALL)


# Synthetic


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_made_up_classes_can_be_told_apart(input_dim):
    module = made(
        SyntheticDataModule, input_dim=input_dim, size=8, num_samples=200, num_classes=4, input_channels=2
    )
    train, test = module.train_dataset, module.test_dataset
    assert train.inputs.shape == (200, 2, *[8] * input_dim)
    means = torch.stack([train.inputs[train.targets == k].mean(0) for k in range(4)]).flatten(1)
    nearest = torch.cdist(test.inputs.flatten(1), means).argmin(1).numpy()
    assert (nearest == test.targets).mean() > 0.8
    assert len(test) == 50


def test_made_up_values_can_be_regressed():
    module = made(
        SyntheticDataModule, input_dim=1, size=32, num_samples=400, task="regression", input_channels=1
    )
    train, test = module.train_dataset, module.test_dataset
    design = train.inputs.flatten(1).numpy()
    weights = np.linalg.lstsq(design, train.targets, rcond=None)[0]
    error = test.inputs.flatten(1).numpy() @ weights - test.targets
    assert 1 - error.var() / test.targets.var() > 0.8
    assert module.class_names == []


def test_made_up_data_are_a_function_of_the_split_seed():
    prints = [
        made(SyntheticDataModule, split_seed=s, seed=r, num_classes=3, num_samples=40).fingerprint()
        for s, r in ((0, 0), (0, 1), (1, 0))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_made_up_classes_need_a_number():
    with pytest.raises(ConfigError, match=r"data\.num_classes is missing"):
        made(SyntheticDataModule)
