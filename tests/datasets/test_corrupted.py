"""Corrupted test images: made as they are read, or from ready folders; labels that are several; numbered folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation.corruptions import COMMON, EXTRA, corrupt
from augmentation.policies.cifar import TestTransform as CifarTest
from callbacks.real_labels import AnyOf
from crucible.options import ConfigError
from crucible.robustness import ALEXNET_ERRORS, averages
from datasets.base_datamodule import BaseDataModule
from datasets.classes import numbered_classes
from datasets.corrupted import Cell, CorruptedSamples, wanted_cells
from datasets.images import Arrays
from datasets.ready import ReadyCorruptionsDataModule, find_ready
from datasets.real_labels import real_labels

WNIDS = [f"n{i:08d}" for i in range(1000)]


class Pictures(BaseDataModule):
    """Twelve colour pictures of 32 pixels."""

    def setup(self, stage: str) -> None:
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8))
        self.train_dataset = self.test_dataset = Arrays(images, np.arange(12) % 2)


def delivered(data: BaseDataModule) -> tuple[torch.Tensor, list[int]]:
    batches = list(data.test_dataloader())
    return torch.cat([b.input for b in batches]), torch.cat([b.index for b in batches]).tolist()


def test_cells_are_named_one_by_one_or_by_their_group() -> None:
    assert wanted_cells("fog", 3) == [Cell("fog", 3)]
    assert wanted_cells("all", None) == [Cell(name, s) for name in COMMON for s in range(1, 6)]
    assert wanted_cells("all", None) == wanted_cells("all", "all") and len(wanted_cells("extra", "all")) == 20
    assert wanted_cells(["snow", "fog", "snow"], 1) == [Cell("snow", 1), Cell("fog", 1)]
    with pytest.raises(
        ConfigError, match=r"gausian_noise: no such corruption; did you mean gaussian_noise\?"
    ):
        wanted_cells("gausian_noise", 1)
    with pytest.raises(ConfigError, match=r"severity=3: of which data.module.corruption\?"):
        wanted_cells(None, 3)


def test_pictures_are_the_same_in_any_batch_and_worker_and_whatever_the_seed() -> None:
    cell, found = Cell("glass_blur", 5), []
    for batch_size, workers, seed in ((12, 0, 0), (5, 0, 1), (3, 2, 0)):
        data = Pictures(
            name="p", batch_size=batch_size, num_workers=workers, seed=seed, test_transforms=CifarTest()
        )
        data.corrupt(cell)
        found.append(delivered(data))
    clean = data.samples("test")[(0, list(range(12)))]
    expected = torch.stack(
        [torch.from_numpy(corrupt(x.numpy(), *cell, i)) for i, x in enumerate(clean.input)]
    )
    for pictures, index in found:
        assert index == list(range(12)) and torch.equal(pictures, expected)
    data.corrupt(None)
    assert torch.equal(delivered(data)[0], clean.input)


def test_only_the_test_images_suffer() -> None:
    data = Pictures(
        name="p", batch_size=4, num_workers=0, train_transforms=CifarTest(), test_transforms=CifarTest()
    )
    data.corrupt(Cell("contrast", 5))
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        assert torch.equal(batch.input, data.train_dataset.inputs[batch.index])


def test_data_that_are_no_pictures_are_refused_in_a_line() -> None:
    class Series(BaseDataModule):
        def setup(self, stage: str) -> None:
            self.train_dataset = self.test_dataset = Arrays(torch.zeros(6, 2, 50), np.arange(6) % 2)

    with pytest.raises(ConfigError, match="one or three channels in 8 bits; a test sample is 2x50, float32"):
        Series(name="s", num_workers=0).corrupt(Cell("fog", 1))


@pytest.mark.parametrize("option", [{"corruption": "fog"}, {"severity": 3}, {"real_labels": "real.json"}])
def test_training_takes_none(option: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.*run=RUN task=test"):
        Pictures(name="p", **option).check()


# Ready ones


def ready(folder: Path, classes: list[str] | None, **options) -> ReadyCorruptionsDataModule:
    data = ReadyCorruptionsDataModule(
        name="c",
        data_root_dir=str(folder),
        num_workers=0,
        batch_size=8,
        test_transforms=CifarTest(),
        **options,
    )
    data.score_for(classes, elsewhere=True)
    return data


def write_arrays(folder: Path, labels: np.ndarray, each: int) -> np.ndarray:
    images = np.random.default_rng(1).integers(0, 256, (5 * each, 32, 32, 3), dtype=np.uint8)
    for name in ("fog", "saturate"):
        np.save(folder / f"{name}.npy", images if name == "fog" else 255 - images)
    np.save(folder / "labels.npy", labels)
    return images


def test_arrays_of_cifar_c_are_read_by_severity_and_their_labels_by_name(tmp_path: Path) -> None:
    names = [
        "truck",
        "airplane",
        "bird",
        "automobile",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
    ]  # another order
    labels = np.tile(np.array([9, 0, 2]), 5).astype(np.uint8)
    images = write_arrays(tmp_path, labels, each=3)
    data = ready(tmp_path, names)
    for severity in (1, 4):
        data.corrupt(Cell("fog", severity))
        pictures, _ = delivered(data)
        part = images[3 * (severity - 1) : 3 * severity].transpose(0, 3, 1, 2)
        assert (pictures.numpy() == part).all()
        batch = next(iter(data.test_dataloader()))
        assert [names[t] for t in batch.target.tolist()] == ["truck", "airplane", "bird"]
    with pytest.raises(ConfigError, match="no snow there; it has fog, saturate"):
        data.corrupt(Cell("snow", 1))


def test_labels_of_other_arrays_are_places_and_damage_is_said(tmp_path: Path) -> None:
    images = write_arrays(tmp_path, np.array([0, 5], dtype=np.int64), each=2)
    data = ready(tmp_path, [f"c{i}" for i in range(6)])
    data.corrupt(Cell("saturate", 5))
    assert next(iter(data.test_dataloader())).target.tolist() == [0, 5]
    assert (delivered(data)[0].numpy() == (255 - images[8:]).transpose(0, 3, 1, 2)).all()
    assert "taken as the position" in " ".join(data.remarks)
    with pytest.raises(ConfigError, match="labels from 0 to 5; the network has 4 classes"):
        ready(tmp_path, list("abcd")).corrupt(Cell("fog", 1))
    (tmp_path / "fog.npy").write_bytes((tmp_path / "fog.npy").read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"fog\.npy: cannot be read as an array"):
        ready(tmp_path, None).corrupt(Cell("fog", 1))
    np.save(tmp_path / "fog.npy", images[:9])
    with pytest.raises(ConfigError, match=r"is 9x32x32x3 uint8; it must be"):
        ready(tmp_path, None).corrupt(Cell("fog", 1))


def test_folders_of_imagenet_c_are_read_by_name_and_pictures_of_the_networks_size_as_they_are(
    tmp_path: Path,
) -> None:
    levels = {}
    for severity in (1, 3):
        for name in ("n00000002", "n00000007"):
            folder = tmp_path / "weather" / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            levels[severity, name] = 40 * severity + int(name[-1])
            Image.new("RGB", (32, 32), (levels[severity, name],) * 3).save(folder / "a.png")
    found = find_ready(str(tmp_path))
    assert found is not None and list(found.files) == ["fog"] and not found.arrays
    data = ready(tmp_path, ["n00000007", "n00000001", "n00000002"])
    data.corrupt(Cell("fog", 3))
    batch = next(iter(data.test_dataloader()))
    for picture, target in zip(batch.input, batch.target.tolist(), strict=True):
        assert picture.unique().tolist() == [levels[3, data.class_names[target]]]
    with pytest.raises(ConfigError, match="has no severity 2; it has 1, 3"):
        data.corrupt(Cell("fog", 2))
    assert find_ready(str(tmp_path / "weather" / "fog" / "1")) is None and find_ready(None) is None


# ImageNet-V2 and ReaL


def test_folders_named_by_number_are_the_sorted_classes_of_imagenet() -> None:
    shuffled = WNIDS[500:] + WNIDS[:500]
    numbers = numbered_classes(["0", "1", "10", "999"], shuffled)
    assert numbers is not None and [shuffled[n] for n in numbers] == [WNIDS[i] for i in (0, 1, 10, 999)]
    assert numbered_classes(["0", "n00000001"], WNIDS) is None
    assert numbered_classes(["0", "01"], WNIDS) is None
    assert numbered_classes(["0", "1"], WNIDS[:10]) is None, "of which 1000 these are, numbers do not say"


def test_real_labels_find_their_images_by_number_or_by_order(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0, 2], [], [1]]))
    classes = ["n2", "n0", "n1"]  # the network's order; numbers count the sorted names
    names = [f"n0/ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1, 2)]
    allowed = real_labels(str(file), names, classes)
    assert allowed.tolist() == [[False, False, True], [True, True, False], [False, False, False]]
    assert (real_labels(str(file), ["x/b.png", "y/a.png", "x/c.png"], classes)[1] == allowed[1]).all()
    for content, names, message in (
        ("[[3]]", ["a/ILSVRC2012_val_00000001.JPEG"], "entry 0 has class 3; the network has 3 classes"),
        ("[[0]]", ["a/ILSVRC2012_val_00000002.JPEG"], "has 1 entries; there is an image numbered 2"),
        ("[[0]]", ["a.png", "b.png"], "has 1 entries for 2 test images"),
        ("[0]", ["a.png"], "must be a list of lists"),
        ("[[0]", ["a.png"], "is no JSON"),
        ("[[0]]", None, "for images in files"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            real_labels(str(file), names, classes)
    with pytest.raises(ConfigError, match="no such file"):
        real_labels(str(tmp_path / "none.json"), ["a.png"], classes)


def test_any_of_the_right_classes_counts_and_images_without_one_do_not() -> None:
    accuracy = AnyOf()
    logits = torch.eye(3)
    accuracy.update(logits, torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool))
    assert float(accuracy.compute()) == 0.5 and int(accuracy.counted) == 2


# Means


def table_of(acc: float) -> dict:
    cells = {name: {str(s): {"acc": acc, "ece": 0.1 * s} for s in range(1, 6)} for name in COMMON}
    return {"cells": cells, "imagenet": False}


def test_means_are_over_all_15_by_5_cells_and_mce_is_imagenets() -> None:
    record = table_of(0.75)
    assert averages(record) == pytest.approx({"acc_corrupted": 0.75, "ece_corrupted": 0.3})
    record["imagenet"] = True
    record["cells"]["fog"] = {s: {"acc": 1.0, "ece": 0.0} for s in "12345"}
    expected = sum(0.25 / e for n, e in ALEXNET_ERRORS.items() if n != "fog") / 15
    assert averages(record)["mce"] == pytest.approx(expected)
    for name, error in ALEXNET_ERRORS.items():  # AlexNet itself has 1
        record["cells"][name] = {s: {"acc": 1 - error, "ece": 0.0} for s in "12345"}
    assert averages(record)["mce"] == pytest.approx(1)
    record["cells"]["extra"] = {}
    del record["cells"]["snow"]["4"]
    assert averages(record) == {}
    assert tuple(ALEXNET_ERRORS) == COMMON and not set(EXTRA) & set(ALEXNET_ERRORS)


def test_few_pictures_need_no_workers() -> None:
    data = Pictures(name="p", test_transforms=CifarTest())
    assert CorruptedSamples(data.samples("test"), Cell("fog", 1)).few
