"""Drawn folder trees and tables against what a reader would say that they are."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import nightly

from crucible.options import ConfigError
from datasets.classes import match_classes, read_class_map
from datasets.image_folder import ImageFolderDataModule
from datasets.image_regression import ImageRegressionDataModule
from datasets.layout import split_of

DRAWS = [pytest.param(range(60), id="60"), *nightly(range(60, 460))]
SPELLINGS = {
    "train": ["train", "Train", "TRAIN", "training", "Training", "train_set", "trainset", "train-images", "TrainData",
              "train2017", "images_train"],
    "val": ["val", "Val", "valid", "Valid", "validation", "VALIDATION", "val_set", "valset", "dev", "validation_data"],
    "test": ["test", "Test", "testing", "test_set", "TestSet", "testset", "test-data", "test1"],
}  # fmt: skip
CLASSES = ["Hund", "Kätzchen", "Pferd", "Schiff", "cat", "dog", "invalid", "test tube", "trainers", "a", "A", "0", "10",
           "N'Ko", "contest", "validated"]  # fmt: skip


@pytest.mark.parametrize("name", [name for names in SPELLINGS.values() for name in names])
def test_a_split_is_told_by_its_name(name):
    assert name in SPELLINGS[split_of(name)]


@pytest.mark.parametrize(
    "name", [*CLASSES, "pretest", "train station", "test_tube", "data", "images", "set", "2017"]
)
def test_a_class_is_no_split(name):
    assert split_of(name) is None


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


def draw_tree(root: Path, draw: random.Random) -> dict[str, set[tuple[str, Path]]]:
    """Write a tree; who is in which split, `(class, file)`."""
    base = root
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        base = base / draw.choice(["flowers", "my data", "extracted"])
    classes = draw.sample(CLASSES, draw.randint(2, 5))
    form = draw.choice(["plain", "splits", "within"])
    splits = ["train", *draw.choice([[], ["test"], ["val"], ["val", "test"]])] if form != "plain" else [""]
    if form == "within" and len(splits) == 1:
        splits.append("test")
    spelled = {split: draw.choice(SPELLINGS[split]) for split in splits if split}
    found: dict[str, set[tuple[str, Path]]] = {split or "train": set() for split in splits}
    for split in splits:
        for name in classes:
            folder = {
                "plain": base / name,
                "splits": base / spelled.get(split, "") / name,
                "within": base / name / spelled.get(split, ""),
            }[form]
            deeper = draw.choice(["", "2020"]) if form != "within" else ""
            for i in range(draw.randint(3, 5)):
                file = folder / deeper / f"{split}{i}.{draw.choice(['jpg', 'PNG'])}"
                touch(file)
                found[split or "train"].add((name, file))
    if draw.random() < 0.5:
        touch(base / "__MACOSX" / classes[0] / "0.jpg")
        touch(base / ".thumbnails" / "0.jpg")
        (base / "README.txt").write_text("of the data")
    if draw.random() < 0.3 and form == "splits":
        (base / "annotations").mkdir()
        (base / "annotations" / "boxes.xml").touch()
    return found


def read(root: Path, **options: Any) -> ImageFolderDataModule:
    module = ImageFolderDataModule(name="data", data_root_dir=str(root), num_workers=0, **options)
    module.setup("fit")
    return module


def seen(raw: Any) -> set[tuple[str, Path]]:
    if raw is None:
        return set()
    return {(raw.classes[t], raw.root / n) for t, n in zip(raw.targets.tolist(), raw.names, strict=True)}


@pytest.mark.parametrize("seeds", DRAWS)
def test_a_drawn_tree_is_read_as_a_reader_would(tmp_path, seeds):
    for seed in seeds:
        expected = draw_tree(root := tmp_path / str(seed), random.Random(seed))
        module = read(root, test_split=0.2)
        train, val, test = (seen(getattr(module, f"{s}_dataset")) for s in ("train", "val", "test"))
        assert val == expected.get("val", set()), seed
        if "test" in expected:
            assert (train, test) == (expected["train"], expected["test"]), seed
        else:
            assert train | test == expected["train"] and test and not train & test, seed
        assert module.class_names == sorted({name for name, _ in expected["train"]}), seed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a.jpg", "test/b.jpg"], r"test, train hold no class folders"),
        (["photos/1.jpg"], r"holds one class only, photos; is it the folder of the class folders\?"),
        (["train/cat/1.jpg", "test/cat/1.jpg"], r"holds one class only, cat"),
        (["cat/1.jpg", "dog/1.jpg", "test/cat/1.jpg"], r"is test/ a split or a class\?"),
        (["Train/a/1.jpg", "Train/b/1.jpg", "training/a/1.jpg"], r"which is the train split, Train/ or training/\?"),
        (["val/a/1.jpg", "test/a/1.jpg"], r"there is no training split beside test, val"),
        (["x/train/a/1.jpg", "x/test/a/1.jpg", "y/train/a/1.jpg", "y/test/a/1.jpg"], r"several data sets \(x, y\)"),
        (["cat/train/1.jpg", "cat/test/1.jpg", "dog/1.jpg"], r"cat/ is divided into test, train, dog/ is not"),
    ],
)  # fmt: skip
def test_what_a_reader_could_not_say_is_refused(tmp_path, files, message):
    for file in files:
        touch(tmp_path / file)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


def test_classes_that_look_like_splits_beside_others_are_classes(tmp_path):
    for name in ("train", "bus", "plane"):
        touch(tmp_path / "vehicles" / name / "1.jpg")
    for name in ("valid", "invalid"):
        touch(tmp_path / "tickets" / name / "1.jpg")
    assert read(tmp_path / "vehicles", test_split=0.0).class_names == ["bus", "plane", "train"]
    assert read(tmp_path / "tickets", test_split=0.0).class_names == ["invalid", "valid"]


# Labels of other data


def other_name(name: str, draw: random.Random) -> str:
    change = draw.choice([str.upper, str.lower, str.title, str, lambda n: unicodedata.normalize("NFD", n)])
    return change(name)


@pytest.mark.parametrize("seeds", DRAWS)
def test_the_labels_of_a_drawn_other_folder_are_those_of_the_names(tmp_path, seeds):
    for seed in seeds:
        draw = random.Random(seed)
        known = draw.sample([name for name in CLASSES if name not in ("a", "A")], draw.randint(2, 6))
        present = draw.sample(known, draw.randint(1, len(known)))
        there = {name: other_name(name, draw) for name in present}
        renamed = draw.sample(present, draw.randint(0, len(present)))
        class_map = {f"{name} (other)": name for name in renamed}
        there |= {name: f"{name} (other)" for name in renamed}
        root = tmp_path / str(seed)
        extra = draw.random() < 0.3
        if extra:
            class_map["besides"] = None
            touch(root / "test" / "besides" / "0.jpg")
        form = "test/" if extra else draw.choice(["", "test/", "Test_Set/"])
        for spelled in there.values():
            for i in range(draw.randint(1, 3)):
                touch(root / f"{form}{spelled}" / f"{i}.jpg")
        file = tmp_path / f"{seed}.yaml"
        file.write_text("\n".join(f"{k!r}: {'null' if v is None else repr(v)}" for k, v in class_map.items()))
        module = ImageFolderDataModule(
            name="data", data_root_dir=str(root), class_map=str(file) if class_map else None
        )
        module.score_for(known, elsewhere=True)
        module.setup("test")
        assert module.class_names == known
        files = {p.relative_to(root / form) for p in root.rglob("*.jpg") if "besides" not in p.parts}
        labels = {
            Path(n): known[t]
            for n, t in zip(module.test_dataset.names, module.test_dataset.targets, strict=True)
        }
        assert labels == {f: next(k for k, v in there.items() if v == f.parts[0]) for f in files}, seed
        absent = len(known) - len(present)
        assert module.scored()[0] == f"{len(files)} images of {len(present)} of {len(known)} classes"
        assert len(module.scored()) == (2 if absent else 1)


def test_a_class_that_the_network_does_not_know_is_refused_in_one_line(tmp_path):
    for name in ("cat", "bird", "cow"):
        touch(tmp_path / "test" / name / "1.jpg")
    module = ImageFolderDataModule(name="data", data_root_dir=str(tmp_path))
    module.score_for(["cat", "dog"], elsewhere=True)
    with pytest.raises(ConfigError, match=r"test/bird: the network has no such class \(nor cow\); they are cat, dog; "
                                          r"data\.module\.class_map=FILE"):  # fmt: skip
        module.setup("test")


def test_names_that_differ_in_case_only_are_told_apart_to_the_letter():
    assert match_classes(["A", "a"], ["a", "A"], "x").tolist() == [1, 0]
    with pytest.raises(ConfigError, match=r"x/ÄÖ: may be Äö or äÖ"):
        match_classes(["ÄÖ"], ["Äö", "äÖ"], "x")


@pytest.mark.parametrize("text", ["- a\n- b", "a: [1, 2]", "a: {b: c}", "just text", "a: b: c"])
def test_a_mapping_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.module\.class_map=.*map\.yaml"):
        read_class_map(str(tmp_path / "map.yaml"))
    with pytest.raises(ConfigError, match=r"no such file"):
        read_class_map(str(tmp_path / "none.yaml"))


def test_a_mapping_for_training_is_refused(tmp_path):
    for name in ("a", "b"):
        touch(tmp_path / name / "1.jpg")
    with pytest.raises(ConfigError, match=r"data\.module\.class_map=map\.yaml: is for testing"):
        ImageFolderDataModule(name="data", data_root_dir=str(tmp_path), class_map="map.yaml").check()


# Tables


def draw_table(root: Path, draw: random.Random) -> dict[str, float] | None:
    """Write labels.csv and its images; the values by file, or None where a reader would call it wrong."""
    columns = ["file", "value", *(["note"] if draw.random() < 0.4 else [])]
    draw.shuffle(columns)
    rows: list[list[str]] = []
    values: dict[str, float] = {}
    for i in range(draw.randint(12, 20)):
        name, value = f"images/{i}.png", round(draw.uniform(-9, 9), 3)
        touch(root / name)
        values[name] = value
        cells = {"file": draw.choice([name, name, f"./{name}"]), "note": draw.choice(["", "good", '"a, b"'])}
        cells["value"] = draw.choice([str(value), f" {value}", f'"{value}"', f"{value:e}"])
        rows.append([cells[c] for c in columns])
        values[cells["file"]] = values.pop(name)
    wrong = draw.choice([None, None, "comma", "twice", "twice otherwise", "link", "number", "column twice"])
    at, place = draw.randrange(len(rows)), columns.index("file")
    if wrong == "comma":
        rows[at][columns.index("value")] = "0,5"
    elif wrong in ("twice", "twice otherwise", "link"):
        name = rows[at][place]
        other = {"twice": name, "twice otherwise": f"images/../{name}", "link": "link.png"}[wrong]
        if wrong == "link":
            (root / "link.png").symlink_to(root / name)
        rows.insert(draw.randrange(len(rows)), [other if c == "file" else "1" for c in columns])
    elif wrong == "number":
        rows[at][columns.index("value")] = draw.choice(["1_000", "", "nan", "1e999", "half", "0x1", "1 2"])
    elif wrong == "column twice":
        columns.append("value")
        rows = [[*row, "7"] for row in rows]
    lines = [",".join(columns), *(",".join(row) + draw.choice(["", "", ","]) for row in rows)]
    lines.insert(draw.randrange(1, len(lines)), "")
    bom = draw.choice(["", "\ufeff"])
    (root / "labels.csv").write_text(bom + "\n".join(lines), encoding="utf-8")
    return None if wrong else values


@pytest.mark.parametrize("seeds", DRAWS)
def test_a_drawn_table_is_read_as_it_stands_or_refused(tmp_path, seeds):
    for seed in seeds:
        expected = draw_table(root := tmp_path / str(seed), random.Random(seed))
        module = ImageRegressionDataModule(name="data", data_root_dir=str(root), task="regression")
        if expected is None:
            with pytest.raises(ConfigError, match=r"labels\.csv"):
                module.setup("fit")
            continue
        module.setup("fit")
        parts = (module.train_dataset, module.test_dataset)
        found = {name: t for raw in parts for name, t in zip(raw.names, raw.targets.tolist(), strict=True)}
        assert sum(map(len, parts)) == len(found) == len(expected), seed
        assert found == {name: np.float32(value) for name, value in expected.items()}, seed
