"""Groups of evaluation samples, and two trees of the same pictures as one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.groups import Joint, groups_of
from datasets.image_folder import class_folders
from datasets.imagenet import ImagenetDataModule
from datasets.images import Arrays, Relabelled, sample_name
from datasets.sampling import hold_out, unseparated

CLASSES = ["n01", "n02"]


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """`in` and `sin`: the same names, but for formats and styles; the second lacks a picture and has one twice."""
    first, second = tmp_path / "in", tmp_path / "styles" / "sin"
    for split, count in (("train", 12), ("val", 2)):
        write_images(first / split, CLASSES, count, size=(8, 8))
        write_images(second / split, CLASSES, count, size=(8, 8))
    here = second / "train" / "n01"
    (here / "0.jpg").rename(here / "0-stylized-monet.png")
    (here / "1.jpg").unlink()
    (here / "2-stylized-other.jpg").write_bytes((here / "2.jpg").read_bytes())
    return first, second


def joint(first: Path, second: Path | None, **options: Any) -> ImagenetDataModule:
    root = None if second is None else str(second)
    return ImagenetDataModule(
        name="both", data_root_dir=str(first), stylized_root_dir=root, val_split=0.25, batch_size=4, **options
    )


def picture(name: str) -> str:
    return "/".join(name.split("/")[1:]).partition("-stylized-")[0].partition(".")[0]


@pytest.mark.parametrize("options", [{}, {"folds": 3, "fold": 1}])
def test_the_versions_of_a_picture_are_on_one_side_which_is_that_of_the_first_tree_alone(
    trees: tuple[Path, Path], options: dict[str, int]
) -> None:
    if options:
        both, alone = (ImagenetDataModule(name="x", data_root_dir=str(trees[0]), **options) for _ in range(2))
        both.stylized_root_dir = str(trees[1])
    else:
        both, alone = joint(*trees), joint(trees[0], None)
    sides = {}
    for split in ("train", "val"):
        samples = both.samples(split)
        sides[split] = [samples.raw.names[i] for i in samples.indices]
    train, val = ({picture(n) for n in names} for names in (sides["train"], sides["val"]))
    assert not train & val and len(train | val) == 24
    assert {n.partition("/")[0] for n in sides["val"]} == {"in", "sin"}
    of_one = alone.samples("val")
    assert {f"in/{of_one.raw.names[i]}" for i in of_one.indices} == {
        n for n in sides["val"] if n[:3] == "in/"
    }


def test_each_sample_is_of_a_group_and_named_after_it(trees: tuple[Path, Path]) -> None:
    data = joint(*trees)
    data.check()
    groups, raw = data.groups("test"), data.samples("test").raw
    assert groups is not None and groups.names == ["in", "sin"] and groups.counts() == {"in": 4, "sin": 4}
    assert [raw.names[i].split("/")[0] for i in range(8)] == [groups.names[n] for n in groups.numbers]
    assert "by group: 4 of in, 4 of sin" in data.scored()
    assert data.num_classes == 2 and len(data.train_dataset) == 48
    assert raw[5][1] == raw.targets[5]


def test_the_data_are_what_they_are_wherever_the_trees_lie(trees: tuple[Path, Path], tmp_path: Path) -> None:
    before, alone = joint(*trees).fingerprint(), joint(trees[0], None).fingerprint()
    moved = tmp_path / "moved"
    trees[1].rename(moved)
    assert joint(trees[0], moved).fingerprint() == before != alone
    assert joint(moved, trees[0]).fingerprint() != before, "which side is which is told apart"


def test_trees_that_do_not_match_are_refused_by_name(trees: tuple[Path, Path]) -> None:
    first, second = trees
    with pytest.raises(ConfigError, match=r"stylized_root_dir=.*gone"):
        joint(first, second.parent / "gone").samples("train")
    with pytest.raises(ConfigError, match="is data_root_dir too"):
        joint(first, first).samples("train")
    write_images(second / "train", ["n03"], 1, size=(8, 8))
    with pytest.raises(ConfigError, match=r"stylized_root_dir: .*n03: .*no such class"):
        joint(first, second).samples("train")
    (second / "train" / "n03").rename(second.parent / "n03")
    (second / "train" / "n02").rename(second.parent / "n02")
    with pytest.raises(ConfigError, match=r"stylized_root_dir: .*no images of class n02"):
        joint(first, second).samples("train")


def test_a_trained_network_is_scored_on_both_trees_by_the_names_of_its_classes(
    trees: tuple[Path, Path],
) -> None:
    (trees[1] / "val" / "n01").rename(trees[1] / "val" / "n03")
    data = joint(*trees)
    data.score_for(["n03", "n02", "n01"], elsewhere=True)
    raw = data.samples("test").raw
    groups = data.groups("test")
    assert groups is not None and groups.counts() == {"in": 4, "sin": 4}
    assert raw.targets.tolist() == [2, 2, 1, 1, 1, 1, 0, 0]


def test_units_of_one_sample_each_change_no_split() -> None:
    targets = np.random.default_rng(0).integers(0, 3, 50)

    def divide(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return hold_out(targets, 0.3, "classification", 1)

    for a, b in zip(unseparated(np.arange(50), divide, targets), divide(targets), strict=True):
        assert np.array_equal(a, b)


def test_no_picture_is_in_the_training_and_in_the_held_out_test_samples(tmp_path: Path) -> None:
    write_images(tmp_path, CLASSES, 20, size=(8, 8))
    one = class_folders(tmp_path, 3)

    class Both(BaseDataModule):
        def setup(self, stage: str) -> None:
            self.hold_out_test(Joint({"a": one, "b": one}), 0.3)

    data = Both(name="both", batch_size=2, num_workers=0, val_split=0.2)
    pictures = {}
    for split in ("train", "val", "test"):
        samples = data.samples(split)
        numbers = range(len(samples.raw)) if samples.indices is None else samples.indices
        pictures[split] = {sample_name(samples.raw, int(i)).partition("/")[2] for i in numbers}
    assert not (pictures["train"] | pictures["val"]) & pictures["test"] and len(pictures["test"]) == 12
    assert not pictures["train"] & pictures["val"]


def test_subsets_and_relabelled_ones_keep_their_groups(tmp_path: Path) -> None:
    write_images(tmp_path, CLASSES, 3, size=(8, 8))
    one = class_folders(tmp_path, 3)
    both = Joint({"a": one, "b": one})
    part = both.subset(np.array([1, 7, 8]))
    assert part.group_numbers.tolist() == [0, 1, 1] and part.targets.tolist() == [0, 0, 0]
    changed = both.relabelled(np.array([-1, 0]), ["n02"])
    assert changed.group_numbers.tolist() == [0, 0, 0, 1, 1, 1] and set(changed.targets) == {0}
    raw = Arrays(torch.zeros(4, 1), [0, 1, 0, 1])
    raw.groups, raw.group_numbers = ["x", "y"], np.array([0, 0, 1, 1])  # type: ignore[attr-defined]
    groups = groups_of(Relabelled(raw, raw.targets, np.array([-1, 0]), ["one"]))
    assert groups is not None and groups.numbers.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "numbers", "message"),
    [
        (["raw"], [0, 0], "'raw' is no name of a group"),
        (["A/b"], [0, 0], "is no name of a group"),
        (["a", "a"], [0, 1], "two groups of one name"),
        (["a"], [0], "a whole number for each of the 2 samples"),
        (["a"], [0.0, 0.5], "a whole number"),
        (["a"], [0, 1], "from 0 to 1; -1 to 0"),
    ],
)
def test_groups_that_cannot_be_logged_are_refused_before_anything_is_trained(
    names: list[str], numbers: list[float], message: str
) -> None:
    class Own(BaseDataModule):
        def setup(self, stage: str) -> None:
            self.train_dataset = Arrays(torch.zeros(4, 1), [0, 1, 0, 1])
            self.test_dataset = Arrays(torch.zeros(2, 1), [0, 1])
            self.test_dataset.groups = names
            self.test_dataset.group_numbers = numbers

    with pytest.raises(ConfigError, match=message):
        Own(name="own").check()
