"""Tests under corruptions: the table and its record, ready folders, ReaL labels, what is refused, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import runs_in, summary_of
from PIL import Image
from test_report import make_run

import report
from augmentation.corruptions import COMMON, VERSION, corrupt
from callbacks.real_labels import AnyOf
from crucible.options import ConfigError
from crucible.robustness import ALEXNET_ERRORS, averages
from datasets.classes import numbered_classes
from datasets.corrupted import Cell
from datasets.digits import DigitsDataModule
from datasets.ready import ReadyCorruptionsDataModule, find_ready
from datasets.real_labels import real_labels

WNIDS = [f"n{number:08d}" for number in range(1000)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(cli, tmp_path: Path, kept: Path) -> Path:
    """A run on digits, trained once for the tests of this file; they do not change its weights."""
    if not any(kept.iterdir()):
        outcome = cli(
            "model=cifar_resnet", "model.depth=8", "trainer.max_steps=2", "logger.wandb=null", "callbacks.plots=null",
            "trainer.enable_progress_bar=false", f"exp_dir={kept}", "trainer.limit_val_batches=1",
            "data.module.num_workers=0",
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
    (found,) = runs_in(kept)
    return found


# The pictures


def samples(cell: Cell | None, workers: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = DigitsDataModule(name="digits", num_workers=workers, batch_size=batch_size, input_channels=1)
    data.setup("test")
    data.corrupt(cell)
    batches = list(data.test_dataloader())
    return torch.cat([b.input for b in batches]), torch.cat([b.index for b in batches])


def test_pictures_are_the_same_for_any_batch_size_and_workers() -> None:
    cell = Cell("gaussian_noise", 3)
    first, index = samples(cell, 0, 64)
    other, _ = samples(cell, 2, 50)
    assert torch.equal(first, other)
    whole, _ = samples(None, 0, 64)
    one = corrupt(whole[5].numpy(), "gaussian_noise", 3, int(index[5]))
    assert torch.equal(first[5], torch.from_numpy(one))


# The table


def record_of(tested) -> Path:
    assert tested.status == 0, tested.err
    return Path(tested.out.strip().splitlines()[-1].rpartition("->  ")[2])


def test_a_cell_is_tested_recorded_and_not_computed_again(cli, run: Path) -> None:
    options = (f"run={run}", "task=test", "data.module.num_workers=0")
    tested = cli(*options, "data.module.corruption=gaussian_noise", "data.module.severity=3")
    file = record_of(tested)
    record = json.loads(file.read_text())
    assert file.parent.parent == run / "tests"
    assert record["own_data"] and record["version"] == VERSION
    assert {"acc", "ece"} <= record["clean"].keys() & record["cells"]["gaussian_noise"]["3"].keys()
    assert "gaussian_noise" in tested.out and "1 of 75 cells" in tested.out
    before = record["cells"]["gaussian_noise"]["3"]
    record["cells"]["gaussian_noise"]["3"] = before | {"acc": 0.123}
    file.write_text(json.dumps(record))
    again = cli(*options, "data.module.corruption=[contrast,gaussian_noise]", "data.module.severity=3")
    now = json.loads(record_of(again).read_text())
    assert now["cells"]["gaussian_noise"]["3"]["acc"] == 0.123, "what is known is kept"
    assert "contrast" in now["cells"] and "1 of 2 cells were known" in again.out
    summary = summary_of(run)
    assert record["data"] == summary["data_fingerprint"]


def test_cells_of_other_images_are_not_put_together(cli, run: Path, tmp_path: Path) -> None:
    def tested(corruption: str, *typed: str) -> tuple[dict, str]:
        outcome = cli(
            f"run={run}", "task=test", "data.module.num_workers=0", "data.module.severity=1",
            f"data.module.corruption={corruption}", f"out={tmp_path / 'table.json'}", *typed,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        return json.loads((tmp_path / "table.json").read_text()), outcome.out

    two = ("trainer.limit_test_batches=2", "data.module.batch_size=20")
    record, _ = tested("contrast", *two)
    assert record["samples"] == 40
    record, said = tested("fog", *two, "data.module.batch_size=10")
    assert record["samples"] == 20 and list(record["cells"]) == ["fog"]
    assert "table.json was of another number of images, and is made anew" in said
    record, said = tested("contrast", "trainer.limit_test_batches=4", "data.module.batch_size=5")
    assert record["samples"] == 20 and sorted(record["cells"]) == ["contrast", "fog"], "the same images"
    record, said = tested(
        "fog", "trainer.limit_test_batches=1", "data.module.batch_size=20", "data.module.split_seed=1"
    )
    assert "of another reading of the images" in said and list(record["cells"]) == ["fog"]


def test_each_run_is_tested_by_itself_and_several_at_once_are_refused(cli, run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "other" / "x"
    empty.mkdir(parents=True)
    (empty / "config.yaml").write_text((run / "config.yaml").read_text())
    (empty / "overrides.yaml").write_text("[]")
    (empty / "summary.json").write_text((run / "summary.json").read_text())
    options = (
        "task=test",
        "data.module.corruption=contrast",
        "data.module.severity=1",
        "data.module.num_workers=0",
    )
    several = cli(f"run=[{run},{run.parent}/../digits/{run.name}]", *options)
    assert several.status == 2 and "each=true" in several.err
    each = cli(f"run={run},{empty}", "each=true", *options)
    assert each.status == 0, each.err
    assert "contrast" in each.out and f"{empty}: has no weights yet" in each.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("task=test", "data.module.corruption=gausian_noise"), "gaussian_noise"),
        (("task=test", "data.module.corruption=fog", "data.module.severity=6"), "severity"),
        (("task=test", "data.module.severity=2"), "of which data.module.corruption"),
        (("task=predict", "data.module.corruption=fog"), "only task=test"),
        (("task=train", "data.module.corruption=fog"), "data.module.corruption"),
        (("task=test", "data.module.real_labels=/nowhere.json"), "no such file"),
        (("task=test", "each=perhaps"), "must be true or false"),
    ],
)
def test_what_cannot_be_is_one_line(cli, run: Path, options: tuple[str, ...], said: str) -> None:
    outcome = cli(f"run={run}", *options)
    assert outcome.status == 2
    assert said in outcome.err and "Traceback" not in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2


def test_a_training_takes_no_corruption(cli) -> None:
    outcome = cli("data.module.corruption=fog", "logger.wandb=null")
    assert outcome.status == 2 and "task=test" in outcome.err and "Traceback" not in outcome.err


# The means


def whole_record(acc: float, imagenet: bool = False) -> dict:
    cells = {n: {str(s): {"acc": acc - 0.01 * s, "ece": 0.1} for s in range(1, 6)} for n in COMMON}
    return {"cells": cells, "imagenet": imagenet}


def test_means_need_all_cells_and_mce_imagenet() -> None:
    assert list(ALEXNET_ERRORS) == list(COMMON)
    found = averages(whole_record(0.5))
    assert found == pytest.approx({"acc_corrupted": 0.47, "ece_corrupted": 0.1})
    mce = np.mean([0.53 / error for error in ALEXNET_ERRORS.values()])
    assert averages(whole_record(0.5, imagenet=True))["mce"] == pytest.approx(mce)
    part = whole_record(0.5)
    del part["cells"]["fog"]["2"]
    assert averages(part) == {}


# Ready folders


def test_cifar_c_files_are_read_by_severity(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 0, 2]), 5))
    assert find_ready(str(tmp_path)).arrays
    data = ReadyCorruptionsDataModule(name="cifar10", data_root_dir=str(tmp_path), num_workers=0)
    data.score_for(["airplane", "bird", "automobile", "cat", *(f"c{i}" for i in range(6))], elsewhere=True)
    data.setup("test")
    data.corrupt(Cell("fog", 2))
    (batch,) = data.test_dataloader()
    assert torch.equal(batch.input, torch.from_numpy(images[4:8].transpose(0, 3, 1, 2)))
    assert batch.target.tolist() == [3, 1, 0, 2]
    with pytest.raises(ConfigError, match="no snow there"):
        data.corrupt(Cell("snow", 2))


def test_cifar_labels_go_to_the_classes_of_the_network_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((5, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.full(5, 9))  # truck
    names = ["truck", "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    data = ReadyCorruptionsDataModule(name="cifar10", data_root_dir=str(tmp_path), num_workers=0)
    data.score_for(names, elsewhere=True)
    data.setup("test")
    data.corrupt(Cell("fog", 5))
    (batch,) = data.test_dataloader()
    assert batch.target.tolist() == [0]


def test_imagenet_c_folders_are_read_by_severity(tmp_path: Path) -> None:
    for place, level in (("fog/1", 10), ("fog/2", 200)):
        for wnid in WNIDS[:2]:
            folder = tmp_path / "weather" / place / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (224, 224), (level,) * 3).save(folder / "ILSVRC2012_val_00000001.png")
    ready = find_ready(str(tmp_path))
    assert not ready.arrays and list(ready.files) == ["fog"]
    data = ReadyCorruptionsDataModule(name="imagenet", data_root_dir=str(tmp_path), num_workers=0)
    data.score_for([WNIDS[1], WNIDS[0]], elsewhere=True)
    data.setup("test")
    data.corrupt(Cell("fog", 2))
    (batch,) = data.test_dataloader()
    assert batch.input.unique().tolist() == [200] and batch.target.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="no severity 4"):
        data.corrupt(Cell("fog", 4))


def test_numbered_folders_are_places_among_the_sorted_classes() -> None:
    shuffled = WNIDS[::-1]
    assert numbered_classes(["0", "10", "2"], shuffled).tolist() == [999, 989, 997]
    assert numbered_classes(["0", "1"], ["cat", "dog"]) is None
    assert numbered_classes(["n00000001"], WNIDS) is None


# ReaL


def test_an_image_has_the_labels_of_its_number_as_the_network_counts_classes(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0, 2], [], [1]]))
    names = [f"val/x/ILSVRC2012_val_0000000{n}.JPEG" for n in (3, 2, 1)]
    allowed = real_labels(str(file), names, ["c", "a", "b"])
    assert allowed.tolist() == [[False, False, True], [False] * 3, [True, True, False]]


def test_any_of_the_labels_counts_and_images_without_are_left_out() -> None:
    metric = AnyOf()
    metric.update(
        torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[True, True], [False, True], [False, False]]),
    )
    assert float(metric.compute()) == 0.5


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("[[0]", "ILSVRC2012_val_00000001.JPEG", "no JSON"),
        ("{}", "ILSVRC2012_val_00000001.JPEG", "list of lists"),
        ("[[9]]", "ILSVRC2012_val_00000001.JPEG", "has class 9"),
        ("[[0], [0]]", "cat.png", "have no number"),
        ("[[0]]", "ILSVRC2012_val_00000002.JPEG", "numbered 2"),
    ],
)
def test_wrong_label_files_are_said(tmp_path: Path, content: str, name: str, said: str) -> None:
    file = tmp_path / "real.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        real_labels(str(file), [name], ["a", "b"])


# The report


def test_the_report_shows_robustness_in_pairs_and_says_who_was_not_tested(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])
    for seed in range(4):
        for arm, gain in (("baseline", 0.0), ("mixup", 0.02 + 0.001 * seed)):
            folder = make_run(tmp_path, arm, seed, 0.9 + 0.001 * seed)
            if (arm, seed) == ("mixup", 3):
                continue
            record = whole_record(0.7 + gain) | {
                "own_data": True,
                "version": 1,
                "data": "abc",
                "samples": 100,
            }
            record |= {"clean": {"acc": 0.9, "ece": 0.05}}
            record["averages"] = averages(record)
            place = folder / "tests" / "abc" / "corruptions_last.json"
            place.parent.mkdir(parents=True)
            place.write_text(json.dumps(record))
    report_arguments = [f"runs={tmp_path}"]
    assert report.main(report_arguments) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Robustness beside accuracy: last weights, 100 test images" in text
    assert "| mixup | 3 | 90.00 | 69.10 |" in text
    assert "+1.85 to +2.35" in text, "Student's t over the pairs 2.0, 2.1, 2.2"
    lacking = "cannot say (test/acc_corrupted is not in all runs)"
    assert f"**Under corruptions (test/acc_corrupted)**: mixup, {lacking}." in text
    verdicts = text.split("### Verdicts")[1].split("###")[0]
    assert "| diff, corrupted | verdict, corrupted |" in verdicts
    assert f"| +2.10 | {lacking} |" in verdicts, "beside the accuracy's own"
    without = next(line for line in text.splitlines() if "Without a whole test" in line)
    assert "mixup, seed 3" in without and "baseline" not in without
    assert "each=true" in text and "data.module.corruption=all" in text
