"""A run is used: predictions from any folder and beside any packages, of one file, with views and at a temperature."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, runs_in, summary_of
from damage import done, main_in_process
from PIL import Image
from scipy.optimize import minimize_scalar
from test_other_data import CLASSES, write_classes
from test_report import make_run
from torchvision.transforms.v2 import functional as v2F

import report
from augmentation.policies.imagenet import TestTransform
from crucible import load_run, sealed
from crucible.calibration import calibrated
from crucible.options import ConfigError
from lab import tasks
from lab.build import build_data
from lab.recorded import completed
from lab.tasks import RunDirectory

TRAIN = [
    "data=image_folder", "data.input_size=16", "data.module.batch_size=8", "model=cifar_resnet", "model.depth=8",
    "trainer.max_epochs=2", "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false",
    "metrics=[acc]", "technique=ema",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training images are gone, and `new/`, a folder of others."""
    folder = tmp_path_factory.mktemp("use")
    write_classes(folder / "animals", {name: name for name in CLASSES})
    write_classes(folder / "new", {name: name for name in CLASSES}, 4, seed=3)
    done(folder, *TRAIN, f"data.module.data_root_dir={folder / 'animals'}", "data.module.val_split=0.3")
    (folder / "animals").rename(folder / "moved")
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """The run, to be changed by one test."""
    (found,) = runs_in(place / "experiments")
    return Path(shutil.copytree(found, tmp_path / "runs" / "a" / found.name))


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# from any folder, beside any packages

ELSEWHERE = """
import json, sys
import datasets, models, utils, lab                    # other people's
before = list(sys.path)
from crucible import load_run

run = load_run(sys.argv[1])
own = load_run(sys.argv[3], user_dir=sys.argv[4])
predictions = run.predict(sys.argv[2])
assert sys.path == before
for module in (datasets, models, utils, lab):
    assert module.WHOSE == "theirs" and sys.modules[module.__name__] is module
import losses
assert losses.WHOSE == "theirs"
ours = [n for n in sys.modules if n.startswith("crucible.rooms.datasets")]
assert not ours, ours

import copy, pickle, torch
again = pickle.loads(pickle.dumps(run.network))
compiled = torch.compile(copy.deepcopy(run.network), backend="eager", fullgraph=True)
x = run.transform(sys.argv[2] + "/" + predictions.names[0])[None]
with torch.no_grad():
    assert torch.equal(again(x), run.network(x)) and torch.allclose(compiled(x), run.network(x), atol=1e-5)
json.dump({
    "names": predictions.names, "probabilities": predictions.probabilities.tolist(), "own": type(own.model).__name__,
    "same": own.predict(sys.argv[2]).labels == predictions.labels,
}, sys.stdout)
"""

NET = """
from models.cifar_resnet import CifarResNet
class Net(CifarResNet):
    pass
"""


def of_another_class(run: Path, target: str, user_dir: Path) -> Path:
    """The run, as if it had been made with a class of the user's own."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["_target_"], config["user_dir"] = target, str(user_dir)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for file in (run / "checkpoints").glob("*.ckpt"):
        state = dict(sealed.read(file))
        state["network"] = {**state["network"], "model": config["model"], "user_dir": str(user_dir)}
        file.unlink()
        sealed.write(state, file)
    return run


@pytest.mark.slow
def test_a_run_predicts_from_elsewhere_without_its_data_and_beside_packages_of_the_same_names(
    place: Path, run: Path, tmp_path: Path
) -> None:
    assert not (place / "animals").exists()
    out = tmp_path / "predictions.csv"
    done(tmp_path, f"run={run}", "task=predict", f"data.module.predict_dir={place / 'new'}", f"out={out}")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "crucible").symlink_to(ROOT / "crucible")  # as an editable installation finds it
    for name in ("datasets", "models", "utils", "lab", "losses"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        (tmp_path / "theirs" / name / "__init__.py").write_text("WHOSE = 'theirs'\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net_of_mine.py").write_text(NET)
    other = shutil.copytree(run, tmp_path / "own")
    of_another_class(Path(other), "net_of_mine.Net", tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    done_there = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(run), str(place / "new"), str(other), str(tmp_path / "mine")],
        cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'theirs'}:{tmp_path / 'site'}"},
    )  # fmt: skip
    assert done_there.returncode == 0, done_there.stderr
    found = json.loads(done_there.stdout)
    rows = table(out)
    assert found["names"] == [row["sample"] for row in rows] and len(rows) == 16
    expected = [[float(row[f"p({name})"]) for name in CLASSES] for row in rows]
    assert np.allclose(found["probabilities"], expected, atol=1e-5)
    assert found["own"] == "Net" and found["same"]


# what it takes


def test_paths_pictures_arrays_and_tensors_are_the_same_images(place: Path, run: Path) -> None:
    loaded = load_run(run)
    files = sorted((place / "new" / "Hund").glob("*.bmp"))
    expected = loaded.predict(files)
    assert expected.names == [str(file) for file in files] and expected.classes == CLASSES
    assert expected.labels == [max(row, key=lambda pair: pair[1])[0] for row in expected.top(4)]
    pictures = [Image.open(file) for file in files]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    given = [
        pictures,
        arrays,
        list(arrays),
        tensors,
        tensors / 255,
        arrays / 255,
        place / "new" / "Hund",
        iter(files),
    ]
    for number, images in enumerate(given):
        found = loaded.predict(images, batch_size=3 + 61 * (number % 2))
        assert torch.allclose(found.probabilities, expected.probabilities, atol=1e-6)
    one = loaded.predict(pictures[0])
    assert len(one) == 1 and one[0].label == expected[0].label
    assert one[0].probability == pytest.approx(expected[0].probability, abs=1e-6)
    assert list(expected.table().columns) == ["sample", "prediction", *(f"p({name})" for name in CLASSES)]
    with_alpha = np.concatenate([arrays, np.full_like(arrays[..., :1], 9)], axis=-1)
    assert loaded.predict(with_alpha).labels == expected.labels
    greys = loaded.predict(arrays[..., 0]).probabilities
    assert torch.allclose(greys, loaded.predict(np.repeat(arrays[..., :1], 3, -1)).probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (torch.randn(3, 16, 16), "0 to 1, and not normalised yet"),
        (
            torch.zeros(2, 16, 16, dtype=torch.uint8),
            "a tensor of 1x2x16x16; the network takes input of 3 channels",
        ),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "an array of 2x2x2x2x3"),
        (np.zeros((4, 4), np.int32), "pixels of torch.int32"),
        (7, "int is no image"),
    ],
)
def test_what_is_no_image_is_said_in_one_line(run: Path, images: object, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_run(run).predict(images)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"broken.png: cannot be read as an image"):
        load_run(run).predict(tmp_path)


def test_a_regression_in_one_dimension_gives_values(tmp_path: Path) -> None:
    done(tmp_path, *TINY, "data.task=regression", "data.input_dim=1", "metrics=[mse]")
    (found,) = runs_in(tmp_path / "experiments")
    loaded, data = load_run(found), build_data(completed(RunDirectory(found).config()))
    inputs = torch.stack([data.samples("test").raw[i][0] for i in range(5)])
    predicted = loaded.predict(inputs)
    rows = tmp_path / "rows.csv"
    done(tmp_path, f"run={found}", "task=predict", f"out={rows}")
    assert predicted.values == pytest.approx([float(r["prediction"]) for r in table(rows)[:5]], abs=1e-4)
    assert loaded.classes == [] and predicted[0].label == pytest.approx(float(predicted.values[0]))
    assert loaded.features(inputs).shape == (5, 64)
    with pytest.raises(ConfigError, match="no picture is"):
        loaded.predict(Image.new("L", (8, 8)))
    with pytest.raises(ConfigError, match="classification"):
        done_or_raise(tmp_path, f"run={found}", "task=test", "calibrate=true")


def done_or_raise(folder: Path, *arguments: str) -> None:
    outcome = main_in_process(folder, *arguments)
    if outcome.status:
        assert outcome.err.count("\n") == 1, outcome.err
        raise ConfigError(outcome.err)


# on one device


@pytest.fixture
def unmet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed for two devices, of which the second one is never started."""

    def wait(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for ranks that nobody starts")

    monkeypatch.setattr("torch.distributed.init_process_group", wait)
    return ["trainer.devices=2", "trainer.accelerator=cpu"]


def test_a_temperature_is_fitted_on_the_device_that_predicts(tmp_path: Path, unmet: list[str]) -> None:
    done(tmp_path, *TINY)
    (found,) = runs_in(tmp_path / "experiments")
    shutil.copytree(found, found.parent / "other")
    asked = ["calibrate=true", *unmet]
    assert "fitted to" in done(tmp_path, f"run={found}", "task=predict", *asked)
    assert "temperature" in done(tmp_path, f"run={found.parent}/*", "task=test", *asked)


# what it holds


def test_a_checkpoint_alone_suffices(place: Path, run: Path, tmp_path: Path) -> None:
    expected = load_run(run, "last")
    alone = tmp_path / "alone" / "model.ckpt"
    alone.parent.mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", alone)
    shutil.rmtree(run)
    loaded = load_run(alone)
    assert loaded.classes == CLASSES and loaded.task == "classification" and loaded.lacks == ""
    assert loaded.input == {"dim": 2, "channels": 3, "size": 16}
    assert repr(loaded.transform) == repr(expected.transform)
    assert loaded.chosen_by["monitor"] == "val/acc" and loaded.chosen_by["epoch"] == 1
    last = expected.metrics.iloc[-1]
    assert {n: pytest.approx(v) for n, v in loaded.chosen_by["metrics"].items() if n in last} == {
        n: last[n] for n in loaded.chosen_by["metrics"] if n in last
    }
    averaged = torch.load(alone, weights_only=True)["averaged_state_dict"]
    assert all(torch.equal(loaded.model.state_dict()[n], v) for n, v in averaged.items())
    images = place / "new"
    assert torch.equal(loaded.predict(images).probabilities, expected.predict(images).probabilities)


def test_the_transform_is_that_of_the_test_with_its_numbers(place: Path, run: Path) -> None:
    described = summary_of(run)["transform"]
    loaded = load_run(run)
    assert loaded.transform.describe() == described
    assert described["_target_"] == "augmentation.policies.imagenet.TestTransform" and described["size"] == 16
    assert described["mean"] == [0.485, 0.456, 0.406] and described["std"] == [0.229, 0.224, 0.225]
    config = completed(RunDirectory(run).config())
    config["data"]["module"]["data_root_dir"] = str(place / "moved")
    data = build_data(config)
    files = data.samples("test")
    batch = data.batch_transform(files[0, [0, 1, 2]], "eval", 0)
    for number, input in zip(batch.index.tolist(), batch.input, strict=True):
        assert torch.equal(loaded.transform(place / "moved" / files.raw.names[number]), input)


def test_a_run_of_before_is_loaded_and_what_it_lacks_is_said_in_one_line(place: Path, run: Path) -> None:
    expected = load_run(run).predict(place / "new").probabilities
    for file in (run / "checkpoints").glob("*.ckpt"):
        state = {
            k: v for k, v in sealed.read(file).items() if k not in ("network", "validated", "class_names")
        }
        file.unlink()
        sealed.write(state, file)
    with pytest.warns(UserWarning, match="did not record the numbers of its evaluation transform") as said:
        loaded = load_run(run / "checkpoints" / "best.ckpt")
    assert len(said) == 1 and loaded.classes == CLASSES, "the summary has the names"
    assert torch.equal(loaded.predict(place / "new").probabilities, expected)
    summary = summary_of(run)
    del summary["classes"]
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.warns(UserWarning, match="and the names of its classes"):
        assert load_run(run).classes == ["0", "1", "2", "3"]
    out = done(place, f"run={run}", "task=predict", f"data.module.predict_dir={place / 'new'}")
    assert "labels are taken by position" in out
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds weights, and not what network they are of"):
        load_run(run / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"_target_": "os.system", "_args_": ["true"]}}, "nothing of it was run"),
        ({"transform": {"_target_": "builtins.exec", "_args_": ["1"]}}, "nothing of it was run"),
        ({"schema": 99}, "a later Crucible"),
        ({"input": {"dim": "two"}}, "is damaged"),
        ({"transform": None}, "is damaged"),
    ],
)
def test_what_a_checkpoint_says_is_judged(run: Path, tmp_path: Path, change: dict, said: str) -> None:
    state = dict(sealed.read(run / "checkpoints" / "last.ckpt"))
    state["network"] = {**state["network"], **change}
    sealed.write(state, tmp_path / "theirs.ckpt")
    with pytest.raises(ConfigError, match=said):
        load_run(tmp_path / "theirs.ckpt")


# what is inside


def test_features_are_what_the_last_layer_takes_or_what_a_named_one_gives(place: Path, run: Path) -> None:
    loaded, images = load_run(run), place / "new"
    pooled = loaded.features(images)
    assert pooled.shape == (16, 64)
    probabilities = loaded.network.fc(pooled).softmax(dim=1)
    assert torch.allclose(probabilities, loaded.predict(images).probabilities, atol=1e-5)
    assert loaded.features(images, "layer3", batch_size=5).mean(dim=(2, 3)).sub(pooled).abs().max() < 1e-5
    with pytest.raises(
        ConfigError, match="layer=layer33: the network has no such module; did you mean layer3"
    ):
        loaded.features(images, "layer33")


# tests on other data, with views and at a temperature


def test_the_temperature_is_that_of_an_independent_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(400, 7, generator=generator)
    target = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = calibrated(logits, target)

    def nll(temperature: float) -> float:
        z = logits.numpy().astype(np.float64) / temperature
        z = z - z.max(axis=1, keepdims=True)
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(400), target.numpy()]).mean())

    def ece(temperature: float) -> float:
        z = np.exp(logits.numpy().astype(np.float64) / temperature)
        p = z / z.sum(axis=1, keepdims=True)
        sure, right = p.max(axis=1), p.argmax(axis=1) == target.numpy()
        bins = np.minimum((sure * 15).astype(int), 14)
        return sum(abs(right[bins == b].sum() - sure[bins == b].sum()) for b in range(15)) / 400

    best = minimize_scalar(nll, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-10})
    assert found.temperature == pytest.approx(best.x, rel=1e-5) and 2 < found.temperature < 3.2
    assert (found.nll_before, found.nll_after) == pytest.approx((nll(1), best.fun), rel=1e-9)
    assert (found.ece_before, found.ece_after) == pytest.approx((ece(1), ece(best.x)), abs=1e-6)
    assert found.ece_after < found.ece_before and not found.at_its_bound
    assert calibrated(torch.eye(3) * 9, torch.arange(3)).at_its_bound, "all right: as cold as may be"
    with pytest.raises(ValueError, match="finite"):
        calibrated(torch.full((2, 2), math.nan), torch.tensor([0, 1]))


def test_calibration_is_fitted_to_the_validation_split_recorded_and_used(place: Path, run: Path) -> None:
    refused = main_in_process(
        place, f"run={run}", "task=predict", "calibrate=true", f"data.module.predict_dir={place}"
    )
    assert refused.status == 2 and "needs the run's validation split" in refused.err
    own = f"data.module.data_root_dir={place / 'moved'}"
    plain = json.loads(
        Path(done(place, f"run={run}", "task=test", own).split("->  ")[-1].strip()).read_text()
    )
    said = done(place, f"run={run}", "task=test", "calibrate=true", own)
    record = json.loads(Path(said.split("->  ")[-1].strip()).read_text())
    fit = record["calibration"]
    assert f"temperature {fit['temperature']:.4f}, fitted to 16 validation samples" in said
    assert json.loads((run / "test.json").read_text())["metrics"] == plain["metrics"], "its own record stays"
    assert record["metrics"]["test/acc"] == plain["metrics"]["test/acc"]
    assert {"test/ece", "test/ece_before"} <= record["metrics"].keys()
    (entry,) = json.loads((run / "calibration.json").read_text())
    assert {n: entry[n] for n in fit} == fit and entry["tta"] == []

    loaded, new = load_run(run), place / "new"
    sharp = loaded.predict(new).probabilities
    expected = (sharp.log() / fit["temperature"]).softmax(dim=1)
    assert torch.allclose(loaded.predict(new, calibrate=True).probabilities, expected, atol=1e-5)
    out = done(place, f"run={run}", "task=predict", "calibrate=true", f"data.module.predict_dir={new}")
    assert "recorded, of 16 validation samples" in out
    rows = table(run / "predictions-calibrate.csv")
    assert np.allclose([[float(r[f"p({c})"]) for c in CLASSES] for r in rows], expected, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"no temperature for best.ckpt; .*calibrate=true tta=\[flip\] fits it"
    ):
        loaded.predict(new, calibrate=True, tta="flip")


def test_the_mean_over_views_is_that_of_their_probabilities(place: Path, run: Path) -> None:
    loaded, new = load_run(run), place / "new"
    out = done(place, f"run={run}", "task=predict", "tta=[five_crops,flip]", f"data.module.predict_dir={new}")
    assert "the mean over views: five_crops, flip" in out
    rows = table(run / "predictions-five_crops-flip.csv")
    found = loaded.predict(new, tta=["flip", "five_crops"]).probabilities
    assert np.allclose([[float(r[f"p({c})"]) for c in CLASSES] for r in rows], found, atol=1e-5)
    policy: TestTransform = loaded.transform.policy
    for number, name in enumerate(loaded.predict(new).names):
        pixels = v2F.pil_to_tensor(Image.open(new / name))
        ten = v2F.ten_crop(v2F.resize(pixels, [18, 18], antialias=True), [16, 16])
        inputs = policy.normalize(torch.stack(ten))
        with torch.no_grad():
            mean = loaded.network(inputs).softmax(dim=1).mean(dim=0)
        assert torch.allclose(found[number], mean, atol=1e-5)
    tested = done(place, f"run={run}", "task=test", "tta=flip", f"data.module.data_root_dir={new}")
    record = json.loads(Path(tested.split("->  ")[-1].strip()).read_text())
    flipped = loaded.predict(new, tta="flip")
    hits = [
        label == name.partition("/")[0] for label, name in zip(flipped.labels, flipped.names, strict=True)
    ]
    assert record["metrics"]["test/acc"] == pytest.approx(np.mean(hits)) and record["tta"] == ["flip"]


def test_several_folders_give_a_table(place: Path, run: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "few", {"HUND": "Hund", "schiff": "Schiff"}, 3, seed=5)
    (tmp_path / "empty").mkdir()
    roots = [str(folder) for folder in (place / "new", tmp_path / "few", tmp_path / "empty")]
    outcome = main_in_process(
        place, f"run={run}", "task=test", f"data.module.data_root_dir=[{','.join(roots)}]", "tta=flip"
    )
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "empty" in outcome.err, outcome.err
    rows = table(run / "tests" / "table-flip.csv")
    assert [row["folder"] for row in rows] == roots and [row["images"] for row in rows] == ["16", "6", ""]
    for row in rows[:2]:
        record = json.loads(Path(row["record"]).read_text())
        assert float(row["test/acc"]) == record["metrics"]["test/acc"] and record["folder"] == row["folder"]
    assert "6 images of 2 of 4 classes" in outcome.out and "folder" in outcome.out
    predicted = main_in_process(
        place, f"run={run}", "task=predict", f"data.module.data_root_dir=[{roots[0]},{roots[1]}]"
    )
    assert predicted.status == 2 and "several folders are for task=test" in predicted.err


def test_a_table_of_folders_goes_on_after_any_error_of_one(
    place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken", "whole"):
        write_classes(tmp_path / name, {"HUND": "Hund", "schiff": "Schiff"}, 3, seed=5)
    tested = tasks._tested

    def failing(runs: Any, out: Any) -> Any:
        if str(runs[0][1]["data"]["module"]["data_root_dir"]).endswith("broken"):
            raise RuntimeError("no such kernel")
        return tested(runs, out)

    monkeypatch.setattr(tasks, "_tested", failing)
    roots = [str(tmp_path / name) for name in ("broken", "whole")]
    file = tmp_path / "table.csv"
    outcome = main_in_process(
        place, f"run={run}", "task=test", f"data.module.data_root_dir=[{','.join(roots)}]", f"out={file}"
    )
    assert outcome.status == 1 and "RuntimeError: no such kernel" in outcome.err
    assert [row["images"] for row in table(file)] == ["", "6"]


def test_real_labels_count_with_views_and_a_temperature(place: Path, run: Path, tmp_path: Path) -> None:
    loaded, flat = load_run(run), tmp_path / "flat"
    for name in CLASSES:
        (flat / name).mkdir(parents=True)
        for file in (place / "new" / name).iterdir():
            number = 1 + 4 * CLASSES.index(name) + int(file.stem)
            shutil.copy(file, flat / name / f"ILSVRC2012_val_{number:08d}.bmp")
    predicted = loaded.predict(flat, tta="flip")
    allowed = [[n % 4] if n % 3 else [] for n in range(16)]
    (tmp_path / "real.json").write_text(json.dumps(allowed))
    done(
        place,
        f"run={run}",
        "task=test",
        "calibrate=true",
        f"data.module.data_root_dir={place / 'moved'}",
        "tta=flip",
    )
    said = done(
        place, f"run={run}", "task=test", "tta=flip", "calibrate=true", f"data.module.data_root_dir={flat}",
        f"data.module.real_labels={tmp_path / 'real.json'}",
    )  # fmt: skip
    record = json.loads(Path(said.split("->  ")[-1].strip()).read_text())
    order = [int(Path(name).stem[-8:]) - 1 for name in predicted.names]
    hits = [
        CLASSES.index(label) in allowed[n]
        for n, label in zip(order, predicted.labels, strict=True)
        if allowed[n]
    ]
    assert record["metrics"]["test/acc_real"] == pytest.approx(np.mean(hits))
    assert record["metrics"]["test/real_images"] == len(hits)


# docs/use.md

PAGE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_does_what_it_says(
    place: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "new" / "Hund", tmp_path / "FOLDER")
    Image.new("RGB", (30, 20), (200, 40, 40)).save(tmp_path / "FOLDER" / "a.png")
    write_classes(tmp_path / "OTHER", {name: name for name in CLASSES}, 2, seed=7)
    write_classes(tmp_path / "SECOND", {name: name for name in CLASSES}, 3, seed=8)
    run.rename(tmp_path / "RUN")
    config = tmp_path / "RUN" / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "animals"), str(place / "moved")))
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code) == 2
    with contextlib.chdir(tmp_path):
        exec("\n".join(code), {})
    said = capsys.readouterr().out
    assert "TestTransform(" in said and "(3, 16, 16) (5, 64)" in said and "val/acc" in said
    commands = [shlex.split(line)[2:] for line in PAGE.splitlines() if line.startswith("    python main.py ")]
    assert len(commands) == 6
    for command in commands:
        done(tmp_path, *command)
    assert [row["images"] for row in table(tmp_path / "RUN" / "tests" / "table.csv")] == ["8", "12"]
    assert len(table(tmp_path / "FOLDER.csv")) == 5


# the report


def test_the_report_compares_the_arms_on_each_other_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])
    for seed in range(4):
        for arm, gain in (("baseline", 0.0), ("mixup", 0.02 + 0.001 * seed)):
            folder = make_run(tmp_path, arm, seed, 0.9 + 0.001 * seed)
            for name, tta, shift in (("sketches", [], 0.4), ("photos", ["flip"], 0.1)):
                if (arm, seed, name) == ("mixup", 3, "sketches"):
                    continue
                record = {
                    "checkpoint": "last.ckpt", "data": name, "folder": f"/data/{name}", "samples": 50, "tta": tta,
                    "metrics": {"test/acc": 0.9 - shift + gain}, "calibration": None,
                }  # fmt: skip
                place = folder / "tests" / name / "test.json"
                place.parent.mkdir(parents=True)
                place.write_text(json.dumps(record))
    assert report.main([f"runs={tmp_path}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "### On other data" in text and "| arm | photos (flip) | sketches |" in text
    assert "| mixup | 82.15 | 52.10 |" in text
    assert "`test/acc` on sketches, 50 images, last weights of 7 runs, against baseline:" in text
    assert "+1.85 to +2.35" in text, "Student's t over the pairs 2.0, 2.1, 2.2"
    assert "Without this test: mixup, seed 3" in text
    rows = table(tmp_path / "report" / "results.csv")
    assert {row["data"] for row in rows} == {"digits", "digits on photos (flip)", "digits on sketches"}
