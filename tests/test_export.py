"""A trained network leaves as one file: what the file's own runtime gives is what the network gives, or there is none.

And its card says what the record says.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from conftest import ROOT, runs_in
from damage import done, refused
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_other_data import CLASSES, write_classes
from timm.models import save_for_hf
from torch import Tensor, nn

from crucible import load_run
from crucible.options import ConfigError
from lab import export
from lab.build import build_model
from lab.use import Transform
from models.cifar_resnet import CifarResNet
from models.dynamic_resnet import ResNet18
from models.timm import TimmModel

TRAIN = [
    "data=image_folder", "data.input_size=16", "data.module.batch_size=8", "model=cifar_resnet", "model.depth=8",
    "trainer.max_epochs=2", "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false",
    "metrics=[acc,ece]", "technique=[ema,mixup]", "model.ema_decay=0.5", "data.module.val_split=0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on unequal classes, whose temperature for mirrored images is recorded, and `new/`, other pictures."""
    folder = tmp_path_factory.mktemp("export")
    write_classes(folder / "animals", {name: name for name in CLASSES})
    write_classes(folder / "animals", {CLASSES[0]: CLASSES[0]}, 40, seed=5)
    write_classes(folder / "new", {name: name for name in CLASSES}, 2, seed=3)
    done(folder, *TRAIN, f"data.module.data_root_dir={folder / 'animals'}")
    done(folder, f"run={runs_in(folder)[0]}", "task=test", "tta=flip", "calibrate=true")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return runs_in(place / "experiments")[0]


def pixels(folder: Path) -> np.ndarray:
    """(N, H, W, C) uint8 of a folder's pictures, as any program reads them."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.bmp"))])


def normalised(images: np.ndarray, says: dict[str, Any]) -> Tensor:
    """By what a file says of its input, and nothing of ours."""
    mean, std = (np.asarray(says[name], dtype=np.float32) for name in ("mean", "std"))
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).movedim(-1, 1).contiguous()


# the files


@pytest.mark.slow
def test_a_file_of_onnx_takes_pictures_and_gives_the_probabilities_of_the_run(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    said = done(
        place, f"run={run}", "task=export", "format=onnx", "export.normalize=true", "export.layout=NHWC",
        "export.softmax=true", "tta=flip", "calibrate=true",
    )  # fmt: skip
    file = run / "export" / "best-normalize-flip-nhwc-calibrate-softmax.onnx"
    assert re.search(r"labels agree on (\d+) of \1\n", said) and str(file) in said
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:], output.name) == (
        "input", "tensor(uint8)", [16, 16, 3], "probabilities",
    )  # fmt: skip
    loaded = load_run(run)
    pictures = pixels(place / "new")
    wanted = loaded.predict(pictures, tta="flip", calibrate=True)
    cropped = [loaded.transform.stored(sample.raw) for sample in loaded.transform.samples(pictures)]
    images = torch.stack(cropped).movedim(1, -1).contiguous().numpy()
    for count in (1, 3, len(images)):
        found = session.run(None, {"input": images[:count]})[0]
        # the temperature is low here, which makes differences of logits thirty times as large
        np.testing.assert_allclose(found, wanted.probabilities[:count], atol=1e-4)
    says = {n: json.loads(value) for n, value in session.get_modelmeta().custom_metadata_map.items()}
    assert says["classes"] == wanted.classes
    (place / "FOLDER").mkdir()
    Image.fromarray(images[0]).save(place / "FOLDER" / "a.png")
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    with contextlib.chdir(place):
        exec(code.replace("RUN/export/best-normalize-nhwc-calibrate-softmax.onnx", str(file)), {})
    label, probability = capsys.readouterr().out.split()
    assert (label, float(probability)) == (wanted[0].label, pytest.approx(wanted[0].probability, abs=1e-4))
    assert says["included"] == ["normalize", "flip", "temperature", "softmax"]
    assert (
        says["run"] == run.name
        and says["metrics"]["val/acc"] == load_run(run).chosen_by["metrics"]["val/acc"]
    )


def of_torch_export(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    says = {"crucible.json": ""}
    program = torch.export.load(file, extra_files=says)
    return program.module(), json.loads(says["crucible.json"])


def of_torchscript(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    says: dict[str, Any] = {"crucible.json": ""}
    script = torch.jit.load(file, _extra_files=says)
    return script, json.loads(says["crucible.json"])


def of_safetensors(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    with safe_open(file, "pt") as opened:
        says = {n: json.loads(v) for n, v in opened.metadata().items() if n != "format"}
    network = build_model(load_run(file.parent.parent).config, load=False, compile=False).model.eval()
    network.load_state_dict(load_file(file))
    return network, says


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "suffix", "opened"),
    [
        pytest.param("torch_export", "pt2", of_torch_export, marks=pytest.mark.slow),
        ("torchscript", "ts", of_torchscript),
        ("safetensors", "safetensors", of_safetensors),
    ],
)
def test_a_file_gives_the_logits_of_the_averaged_weights_for_batches_of_any_size(
    kind: str, suffix: str, opened: Any, place: Path, run: Path
) -> None:
    done(place, f"run={run}", "task=export", f"format={kind}")
    network, says = opened(run / "export" / f"best.{suffix}")
    loaded = load_run(run)
    input = normalised(pixels(place / "new"), says)
    with torch.no_grad():
        wanted = loaded.network(input)
        for count in (1, 3, len(input)):
            torch.testing.assert_close(network(input[:count]), wanted[:count], atol=1e-5, rtol=1e-5)
    assert (says["classes"], says["input_size"], says["averaged"]) == (loaded.classes, 16, True)
    assert says["input"] == {
        "name": "input",
        "dtype": "float32",
        "layout": "NCHW",
        "shape": ["batch", 3, 16, 16],
    }
    assert says["output"]["name"] == "logits" and says["included"] == []


def made(model: Any, kind: str, file: Path, dim: int = 2, **more: Any) -> export.Made:
    """A file of a model that nobody trained."""
    target = "cifar.TestTransform" if dim == 2 else "default.IdentityTransform"
    transform = Transform({"_target_": f"augmentation.policies.{target}"}, dim, 3)
    draws = torch.Generator().manual_seed(0)
    shape = (4, 3, *[32 if dim == 2 else 8] * dim)
    stored = (
        torch.randint(256, shape, generator=draws, dtype=torch.uint8)
        if dim == 2
        else torch.randn(shape, generator=draws)
    )
    return export.export_model(kind, model.eval(), transform, stored, file, **more)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: TimmModel(type="test_efficientnet"), lambda: timm.create_model("test_efficientnet", num_classes=10)),
        (lambda: ResNet18(cifar_size=False), lambda: torchvision.models.resnet18(num_classes=10)),
    ],
    ids=["timm", "torchvision"],
)  # fmt: skip
def test_weights_of_a_network_of_others_load_there(ours: Any, theirs: Any, tmp_path: Path) -> None:
    model = ours()
    made(model, "safetensors", tmp_path / "a.safetensors", fresh=lambda: ours().eval())
    network, x = theirs().eval(), torch.randn(2, 3, 64, 64)
    network.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.model(x))


def test_a_network_of_one_and_of_three_dimensions_and_a_regression_are_exported(tmp_path: Path) -> None:
    for dim in (1, 3):
        model = CifarResNet(depth=8, input_dim=dim, task="regression", metrics=["mse"])
        found = made(model, "torchscript", tmp_path / "a.ts", dim)
        assert found.says["output"] == {"name": "values", "dtype": "float32", "shape": ["batch"]}
        assert found.says["input"]["shape"] == ["batch", 3, *[8] * dim]


class OfTheBatchThatWasTraced(nn.Module):
    """What a graph has that was made for one size of batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)


def another_bias(exported: Any, *arguments: Any) -> None:
    with torch.no_grad():
        next(p for p in reversed(list(exported.parameters()))).add_(0.01)
    export._write_torchscript(exported, *arguments)


def test_a_file_that_gives_something_else_does_not_take_the_place_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.ts"
    file.write_text("the one before")
    model = CifarResNet(depth=8)
    with monkeypatch.context() as patched:
        patched.setitem(export.KINDS, "torchscript", export.KINDS["torchscript"]._replace(write=another_bias))
        with pytest.raises(ConfigError, match=r"gives other logits than the network: 0\.01 apart"):
            made(model, "torchscript", file)
    model.model = nn.Sequential(model.model, OfTheBatchThatWasTraced())
    with pytest.raises(ConfigError, match=r"^format=torchscript: "):
        made(model, "torchscript", file)
    assert file.read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_without_a_run_and_a_run_without_its_data_are_exported(place: Path, run: Path) -> None:
    weights = place / "theirs.safetensors"
    made(TimmModel(type="test_efficientnet", num_classes=4), "safetensors", weights,
         fresh=lambda: TimmModel(type="test_efficientnet", num_classes=4).eval())  # fmt: skip
    asked = [
        "task=export", "format=torchscript", "model=timm", "model.type=test_efficientnet", f"model.init_from={weights}",
        "data=image_folder", f"out={place / 'theirs.ts'}", "data.num_classes=4", "data.input_size=32",
    ]  # fmt: skip
    said = done(place, *asked, f"data.module.data_root_dir={place / 'nowhere'}")
    assert "16 random samples" in said and "nowhere" in said
    _, says = of_torchscript(place / "theirs.ts")
    assert says["classes"] == [] and says["output"]["shape"] == ["batch", 4]
    assert "Not trained here" in (place / "theirs.ts.md").read_text()
    (place / "animals").rename(place / "moved")
    try:
        said = done(
            place, f"run={run}", "task=export", "format=torchscript", "ckpt_path=last", "export.half=true"
        )
        assert "16 random samples" in said and "animals" in said
        card = (run / "export" / "last-half.ts.md").read_text()
        assert "random samples" in card and "samples: not known (they cannot be read here)" in card
    finally:
        (place / "moved").rename(place / "animals")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["format=tflite"], "format must be one of onnx, torch_export, torchscript, safetensors, got 'tflite'"),
        (["format=torchscript", "out=."], "out=.: is a folder; name the file"),
        (["format=torchscript", "tta=five_crops"], "tta=five_crops: is not exported"),
        (["format=safetensors", "export.softmax=true"], "export.softmax: format=safetensors holds weights"),
        (["export.nhwc=true"], "export.nhwc=True: ExportOptions has no such option"),
        (["ckpt_path=nope"], "ckpt_path=nope: no such checkpoint"),
        (["format=onnx"], "format=onnx: needs the packages onnx, onnxscript, onnxruntime, not installed here: pip"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(
    asked: list[str], says: str, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("onnx") else find(name, *a)
    )
    assert says in refused(place, f"run={run}", "task=export", *asked)


def test_several_runs_and_options_of_another_task_are_said_in_a_line(place: Path, run: Path) -> None:
    both = f"run={run},{run.parent / 'other'}"
    (run.parent / "other").symlink_to(run)
    try:
        assert "task=export: is for one run, run= names 2; each=true" in refused(place, both, "task=export")
        assert "task=card: is for one run" in refused(place, both, "task=card")
    finally:
        (run.parent / "other").unlink()
    assert "format=onnx: is for task=export" in refused(place, f"run={run}", "task=test", "format=onnx")
    assert "calibrate=true: is for task=test, predict, export" in refused(
        place, f"run={run}", "task=card", "calibrate=true"
    )


# docs/export.md

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_commands_of_the_page_do_what_it_says(
    place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("onnx", "torch_export"):  # written by their exporters above
        script, kinds = export.KINDS["torchscript"], export.KINDS
        monkeypatch.setitem(kinds, kind, kinds[kind]._replace(write=script.write, open=script.open, needs=()))
    for name in ("RUN", "RUNS/a", "RUNS/b"):
        shutil.copytree(run, tmp_path / name)
    theirs = timm.create_model("test_efficientnet", num_classes=4)
    save_for_hf(theirs, tmp_path / "HUB", model_config={"num_classes": 4})
    (tmp_path / "PATH").symlink_to(place / "new")
    commands = [shlex.split(line)[2:] for line in PAGE.splitlines() if line.startswith("    python main.py ")]
    assert len(commands) == 8
    for command in commands:
        done(tmp_path, *command)
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("RUN*/**/export/*")}
    files = {
        "RUN/export/best.onnx", "RUN/export/best-normalize-nhwc-calibrate-softmax.onnx", "RUN/export/last-flip.pt2",
        "RUN/export/best.safetensors", "RUNS/a/export/best.ts", "RUNS/b/export/best.ts",
    }  # fmt: skip
    assert {file for file in written if "flip-" not in file and "/best-half" not in file} >= files
    assert {f"{file}.md" for file in files} <= written
    assert (tmp_path / "FILE.ts.md").is_file() and (tmp_path / "RUN" / "card.md").is_file()
    (theirs_here,) = (tmp_path / "experiments").glob("image_folder/*/export/best.ts")
    assert of_torchscript(theirs_here)[1]["classes"] == sorted(CLASSES)
    documented = set(re.findall(r"`(\w+)`", PAGE.split("| name | what it is |")[1].split("```")[0]))
    _, says = of_torchscript(tmp_path / "FILE.ts")
    assert says.keys() <= documented


# the card


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """E. B. Wilson (1927), equation of the score interval."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_the_card_says_what_the_record_says_and_no_more(place: Path, run: Path) -> None:
    done(place, f"run={run}", "task=card", "ckpt_path=last")
    text = (run / "card-last.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    _, header, body = text.split("---\n", 2)
    accuracy = summary["final"]["test/acc"]
    (result,) = yaml.safe_load(header)["model-index"][0]["results"]
    assert {m["name"]: m["value"] for m in result["metrics"]}["test/acc"] == pytest.approx(accuracy, abs=1e-6)
    row = next(
        line
        for line in body.splitlines()
        if line.startswith("| `last.ckpt` | image_folder, test | test/acc ")
    )
    *_, value, between, n, _ = (part.strip() for part in row.split("|"))
    low, high = wilson(accuracy, int(n))
    assert (value, between) == (f"{accuracy:.4f}", f"{low:.4f} to {high:.4f}")
    (fit,) = json.loads((run / "calibration.json").read_text())
    fitted = fit["weights"] == export.file_fingerprint("ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert (
        "Probabilities are not calibrated." in body
    ) != fitted  # last.ckpt is best.ckpt where the last epoch is
    counts = [int(n) for n in re.search(r"training samples of a class: (\d+) to (\d+)", body).groups()]  # type: ignore[union-attr]
    assert counts[1] >= 1.5 * counts[0] > 0
    assert f"Unequal classes: the largest has {counts[1]} training samples, the smallest {counts[0]}." in body
    for line in (
        f"{summary['parameters']:,}", "A single seed (0)", "Never tested under corruptions.", "techniques: ema, mixup",
        "python main.py data=image_folder", "[arXiv 1710.09412](https://arxiv.org/abs/1710.09412)",
        "[arXiv 1512.03385]", ", ".join(sorted(CLASSES)), "Never scored on other data than image_folder.",
    ):  # fmt: skip
        assert line in body, line

    # what is recorded of other weights, on other data and under corruptions, has its place
    other = run / "tests" / "0123"
    other.mkdir(parents=True)
    weights = export.file_fingerprint("ckpt_path", str(run / "checkpoints" / "best.ckpt"))
    (other / "test.json").write_text(json.dumps({
        "checkpoint": "best.ckpt", "own_data": False, "folder": "/x/zoo", "data": "0123", "samples": 50,
        "metrics": {"test/acc": 0.5}, "tta": [], "calibration": None,
    }))  # fmt: skip
    (other / "corruptions_best.json").write_text(json.dumps({
        "weights": weights, "folder": "/x/zoo", "samples": 50, "clean": {"acc": 0.5, "ece": 0.1},
        "cells": {"fog": {"1": {"acc": 0.4}, "2": {"acc": 0.2}}}, "averages": {"acc_corrupted": 0.3},
    }))  # fmt: skip
    done(place, f"run={run}", "task=card")
    best = (run / "card.md").read_text()
    assert (
        f"temperature {fit['temperature']:.4f}, tta=flip, fitted to {fit['samples']} validation samples"
        in best
    )
    assert "| `best.ckpt` | zoo (0123) | test/acc | 0.5000 | 0.3664 to 0.6336 | 50 |" in best  # R's prop.test
    assert "| fog | 1, 2 | 0.3000 |" in best and "- acc_corrupted 0.3000" in best
    assert "Never tested under corruptions." not in best and "/x/zoo" not in best


# the table


@pytest.mark.nightly
@pytest.mark.parametrize("kind", export.KINDS)
def test_every_family_and_every_norm_is_exported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    table = importlib.import_module("export")
    cells = {case.name: table.cell(case, kind, tmp_path) for case in table.cases()}
    assert not {name: text for name, text in cells.items() if text.startswith("refused")}
