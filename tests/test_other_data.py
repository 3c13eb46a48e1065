"""Trained weights on other data: labels by name, records of their own, runs of the older fingerprint recognised."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Outcome, runs_in, summary_of
from PIL import Image

from datasets.image_folder import ImageFolderDataModule
from lab import tasks
from lab.build import build_data
from lab.experiment import identity

CLASSES = ["Hund", "Kätzchen", "Pferd", "Schiff"]
COLOURS = {"Hund": (220, 30, 30), "Kätzchen": (30, 220, 30), "Pferd": (30, 30, 220), "Schiff": (220, 220, 30)}
IMAGES = 15


def write_classes(folder: Path, names: dict[str, str], count: int = IMAGES, seed: int = 0) -> None:
    """Noisy pictures of each class's colour: `{name of the folder: class}`."""
    generator = np.random.default_rng(seed)
    for name, of in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            pixels = np.clip(generator.normal(COLOURS[of], 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.bmp")


def train(cli, folder: Path, *more: str) -> Outcome:
    outcome = cli(
        "data=image_folder", f"data.module.data_root_dir={folder}", "data.input_size=16", "data.module.batch_size=8",
        "model=cifar_resnet", "model.depth=8", "trainer.max_epochs=2", "logger.wandb=null", "callbacks.plots=null",
        "trainer.enable_progress_bar=false", *more,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one training of these tests lies, for `run` to copy."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(cli, tmp_path: Path, trained: Path) -> Path:
    """A run on `tmp_path/animals` whose best weights have been tested."""
    if not any(trained.iterdir()):
        write_classes(tmp_path / "animals", {name: name for name in CLASSES})
        train(cli, tmp_path / "animals")
        (found,) = runs_in(tmp_path / "experiments")
        assert cli(f"run={found}", "task=test").status == 0
        for name in ("animals", "experiments"):
            shutil.copytree(tmp_path / name, trained / name)
        (trained / "was").write_text(str(tmp_path))
        return found
    for name in ("animals", "experiments"):
        shutil.copytree(trained / name, tmp_path / name)
    (found,) = runs_in(tmp_path / "experiments")
    config = found / "config.yaml"
    config.write_text(config.read_text().replace((trained / "was").read_text(), str(tmp_path)))
    return found


def records(run: Path) -> dict[str, bytes]:
    """What a run holds that a report reads, and the pictures."""
    kept = (
        "test.json",
        "test_correct_best.npz",
        "test_correct.npz",
        "predictions.csv",
        "summary.json",
        "plots/*",
    )
    return {f.name: f.read_bytes() for pattern in kept for f in run.glob(pattern)}


def predicted(cli, run: Path, folder: Path, *more: str) -> dict[str, dict[str, str]]:
    outcome = cli(f"run={run}", "task=predict", f"data.module.data_root_dir={folder}", *more)
    assert outcome.status == 0, outcome.err
    file = Path(outcome.out.strip().splitlines()[-1].rpartition("->  ")[2])
    assert file.parent.parent == run / "tests", "other data have a file of their own"
    with file.open(newline="") as stream:
        return {row["sample"]: row for row in csv.DictReader(stream)}


def test_class_names_stand_in_the_run_and_its_checkpoints(run: Path) -> None:
    assert summary_of(run)["classes"] == CLASSES
    for name in ("best", "last"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["class_names"] == CLASSES


def test_another_folder_is_scored_by_name_and_leaves_the_runs_records_as_they_are(
    cli, run: Path, tmp_path: Path
) -> None:
    before = records(run)
    assert {"test.json", "test_correct_best.npz", "test_correct.npz"} <= before.keys()

    # in other case, one class missing: all images of the flat folder
    write_classes(tmp_path / "flat", {"SCHIFF": "Schiff", "hund": "Hund", "kätzchen": "Kätzchen"}, 5, seed=1)
    plots = "callbacks.plots={_target_: callbacks.plots.ResultPlots}"
    tested = cli(f"run={run}", "task=test", f"data.module.data_root_dir={tmp_path / 'flat'}", plots)
    assert tested.status == 0, tested.err
    assert "15 images of 3 of 4 classes" in tested.out and "left out, without an image: Pferd" in tested.out
    (file,) = run.glob("tests/*/test.json")
    record = json.loads(file.read_text())
    assert record["data"] == file.parent.name != summary_of(run)["data_fingerprint"]
    assert str(file) in tested.out and (file.parent / "test_correct_best.npz").is_file()
    assert list(file.parent.glob("plots/confusion_matrix_test.*"))
    rows = predicted(cli, run, tmp_path / "flat")
    assert len(rows) == 15
    assert all(row["target"].casefold() == sample.split("/")[0].casefold() for sample, row in rows.items())
    hits = np.mean([row["target"] == row["prediction"] for row in rows.values()])
    assert record["metrics"]["test/acc"] == pytest.approx(hits)

    # other names, and only a test folder
    names = {"cat": "Kätzchen", "dog": "Hund", "horse": "Pferd", "ship": "Schiff"}
    write_classes(tmp_path / "english" / "test", names, 3)
    english = f"data.module.data_root_dir={tmp_path / 'english'}"
    refused = cli(f"run={run}", "task=test", english)
    assert refused.status == 2 and len(refused.err.strip().splitlines()) == 1
    assert "test/cat: the network has no such class" in refused.err and "class_map=FILE" in refused.err
    (tmp_path / "names.yaml").write_text("\n".join(f"{k}: {v}" for k, v in names.items()))
    rows = predicted(cli, run, tmp_path / "english", f"data.module.class_map={tmp_path / 'names.yaml'}")
    assert {s: row["target"] for s, row in rows.items()} == {s: names[s.split("/")[0]] for s in rows}
    assert len(rows) == 12

    assert records(run) == before


def test_the_runs_own_data_are_its_own_wherever_they_lie(cli, run: Path, tmp_path: Path) -> None:
    own = json.loads((run / "test.json").read_text())
    shutil.move(tmp_path / "animals", tmp_path / "moved")
    tested = cli(f"run={run}", "task=test", f"data.module.data_root_dir={tmp_path / 'moved'}")
    assert tested.status == 0, tested.err
    again = json.loads((run / "test.json").read_text())
    assert again["metrics"] == own["metrics"] and again["data"] == own["data"] and again["time"] > own["time"]
    assert "6 images of 4 of 4 classes" in tested.out, "the test split that was held out"
    assert not (run / "tests").exists()


def test_what_makes_another_test_of_the_same_data_has_a_record_of_its_own(
    cli, run: Path, tmp_path: Path
) -> None:
    before = records(run)
    for option in ("trainer.limit_test_batches=1", "data.module.test_split=0.3"):
        assert cli(f"run={run}", "task=test", option).status == 0
    write_classes(tmp_path / "animals", {"Hund": "Hund"}, IMAGES + 1)
    changed = cli(f"run={run}", "task=test")
    assert changed.status == 0 and "changed since the training" in changed.out
    assert len(list(run.glob("tests/*/test.json"))) == 3
    assert records(run) == before


def as_before_names(run: Path, folder: Path) -> Path:
    """The run as the code before this wrote it: no names of classes, and the id of the older fingerprint."""
    config = tasks.RunDirectory(run).config()
    data = build_data(config)
    summary = {k: v for k, v in summary_of(run).items() if k not in ("classes", "data_fingerprint")}
    summary["identity"] = identity(config, {"data": data.fingerprint(1)})
    del summary["identity_hash"]
    summary["run_id"] = f"{summary['identity']}-s0"
    (run / "summary.json").write_text(json.dumps(summary))
    for file in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        del checkpoint["class_names"]
        file.unlink()
        torch.save(checkpoint, file)
    return run.rename(run.with_name(summary["run_id"]))


@pytest.mark.slow
def test_a_run_of_the_older_fingerprint_is_recognised_until_the_pixels_change(
    cli, run: Path, tmp_path: Path
) -> None:
    old = as_before_names(run, tmp_path / "animals")
    for _ in range(2):
        again = train(cli, tmp_path / "animals")
        assert f"{old}: finished before" in again.out and "recognised by names and sizes" in again.out
    assert summary_of(old)["classes"] == CLASSES
    picture = next((tmp_path / "animals" / "Hund").glob("*.bmp"))
    size = picture.stat().st_size
    Image.new("RGB", (16, 16), (1, 2, 3)).save(picture)
    assert picture.stat().st_size == size
    assert "finished before" not in train(cli, tmp_path / "animals").out, "other pixels are other data"
    assert len(runs_in(tmp_path / "experiments")) == 2


def test_a_run_without_names_takes_those_of_its_folder_or_positions_and_says_so(
    cli, run: Path, tmp_path: Path
) -> None:
    old = as_before_names(run, tmp_path / "animals")
    write_classes(tmp_path / "other", {"schiff": "Schiff", "pferd": "Pferd"}, 2, seed=1)
    other = f"data.module.data_root_dir={tmp_path / 'other'}"
    tested = cli(f"run={old}", "task=test", other)
    assert "4 images of 2 of 4 classes" in tested.out and "the run recorded none" in tested.out
    shutil.move(tmp_path / "animals", tmp_path / "moved")
    blind = cli(f"run={old}", "task=test", other)
    assert blind.status == 0 and "labels are taken by position" in blind.out
    own = cli(f"run={old}", "task=test", f"data.module.data_root_dir={tmp_path / 'moved'}")
    assert own.status == 0 and f"{old / 'test.json'}" in own.out, "its id tells its own data"


def test_runs_are_averaged_by_the_names_of_their_classes(monkeypatch, tmp_path: Path) -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    target, sample = torch.tensor([0, 1]), torch.arange(2)
    order = [2, 0, 1]

    def score(run, config, checkpoint):
        names = ["a", "b", "c"]
        if config:
            return tasks.Scores(scores, target, sample), SimpleNamespace(
                data=SimpleNamespace(class_names=names)
            )
        names = [names[i] for i in order]
        return (
            tasks.Scores(scores[:, order], torch.tensor([1, 2]), sample),
            SimpleNamespace(data=SimpleNamespace(class_names=names)),
        )

    monkeypatch.setattr(tasks, "score", score)
    run = tasks.RunDirectory(tmp_path)
    mean, _ = tasks.average([(run, {"first": True}, tmp_path), (run, {}, tmp_path)])
    assert torch.allclose(mean.scores, scores) and mean.target.tolist() == [0, 1]


def test_replaced_pixels_change_the_fingerprint_wherever_they_are(tmp_path: Path) -> None:
    write_classes(tmp_path, {name: name for name in CLASSES[:2]}, 4)

    def fingerprint() -> str:
        return ImageFolderDataModule(name="data", data_root_dir=str(tmp_path)).fingerprint()

    seen = {fingerprint()}
    for n, file in enumerate(sorted(tmp_path.rglob("*.bmp"))):
        content = bytearray(file.read_bytes())
        content[54 + n] ^= 1  # of one pixel
        file.write_bytes(content)
        seen.add(fingerprint())
    assert len(seen) == 9
