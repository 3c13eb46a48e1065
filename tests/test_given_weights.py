"""Anyone's weights to a number: timm's, torchvision's and others' files tested without a run, prepared as timm does."""

from __future__ import annotations

import copy
import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, runs_in
from damage import done, main_in_process, refused
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from timm.models import adapt_input_conv, save_for_hf
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as v2F

from augmentation.policies.imagenet import TestTransform
from crucible import load_run
from crucible.configuration import to_plain
from crucible.options import ConfigError
from crucible.run import RunDirectory
from lab.build import build_data
from lab.config import settle_weights_data
from models.weights import load_state

CLASSES = ("ant", "bee", "cow")


def timm_on(place: Path) -> list[str]:
    data = f"data.module.data_root_dir={place / 'val'}"
    return ["model=timm", "data=imagenet", data, "trainer.accelerator=cpu", "metrics=[acc]"]


def network_of(seed: int, classes: int = 3, channels: int = 3) -> torch.nn.Module:
    """With statistics and a bias by which it tells coarse pictures apart."""
    torch.manual_seed(seed)
    network = timm.create_model("test_resnet", num_classes=classes, in_chans=channels)
    pictures = F.interpolate(torch.rand(32, channels, 8, 8), 64, mode="bicubic") * 2 - 1
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("bn2.weight", "bn3.weight")):
                tensor.fill_(1.0)  # timm begins with residual branches that add nothing
        for norm in network.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0
        network(pictures)
        network.eval().fc.bias -= network(pictures).mean(dim=0)  # type: ignore[operator, union-attr]
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`val/` with photographs of many shapes, `hub/` as timm writes it, `checkpoint.pth.tar` as its training does."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
        for number in range(9):
            height, width = (int(side) for side in rng.integers(40, 260, 2))
            coarse = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / "val" / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    network = network_of(0)
    network.pretrained_cfg |= {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.9}  # type: ignore[operator]
    save_for_hf(network, str(folder / "hub"), safe_serialization=True)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, folder / "checkpoint.pth.tar")
    return folder


def run_of(folder: Path) -> RunDirectory:
    return RunDirectory(max(runs_in(folder), key=lambda path: (path / "config.yaml").stat().st_mtime_ns))


def by_timm(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, logits and targets by timm's own data set, loader and network."""
    described = json.loads((folder / "hub" / "config.json").read_text())
    config = resolve_data_config(pretrained_cfg=described["pretrained_cfg"])
    dataset = create_dataset("", root=str(folder / "val"), is_training=False)
    loader = create_loader(
        dataset,
        batch_size=8,
        is_training=False,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        **{n: config[n] for n in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    batches = list(loader)
    images, target = (torch.cat([b[i] for b in batches]) for i in range(2))
    with torch.inference_mode():
        return images, network_of(0)(images), target


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_pictures_are_prepared_as_timm_does_to_the_last_level(mode: str, interpolation: str) -> None:
    theirs = create_transform(
        (3, 48, 48), crop_pct=0.9, crop_mode=mode, interpolation=interpolation, use_prefetcher=True
    )
    ours = TestTransform(size=48, crop_pct=0.9, crop_mode=mode, interpolation=interpolation, resize_by="pil")
    rng = np.random.default_rng(1)
    for height, width in ((53, 53), (60, 200), (171, 64), (30, 41)):
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = torch.as_tensor(np.asarray(theirs(picture)))
        assert torch.equal(ours.sample(v2F.pil_to_tensor(picture)), expected)


def test_weights_of_timm_give_timms_numbers_to_the_last_image(place: Path, tmp_path: Path) -> None:
    out = done(tmp_path, "task=test", f"model.init_from={place / 'hub'}", *timm_on(place))
    assert "timm's data configuration of hub: 3x64x64, bicubic, crop_pct 0.9" in out
    assert "92 of 92 tensors loaded" in out
    run = run_of(tmp_path)
    images, logits, target = by_timm(place)

    data = build_data(run.config())
    data.score_for(list(CLASSES), elsewhere=True)
    data.prepare_data()
    ours = torch.cat([data.batch_transform(batch, "eval", 0).input for batch in data.test_dataloader()])
    assert torch.allclose(ours, images, atol=1e-6, rtol=0)

    used = load_run(run.path)
    found = used.predict(
        [place / "val" / name / f"{i}.{'png' if i % 2 else 'jpg'}" for name in CLASSES for i in range(9)]
    )
    assert found.probabilities is not None
    assert torch.allclose(found.probabilities, logits.softmax(dim=1), atol=1e-5)
    record = json.loads((run.path / "test.json").read_text())
    top1 = (logits.argmax(dim=1) == target).double().mean()
    assert record["metrics"]["test/acc"] == pytest.approx(float(top1), abs=1e-7) and record["samples"] == 27
    assert len(set(logits.argmax(dim=1).tolist())) > 1


@pytest.mark.slow
def test_what_timm_gives_is_recorded_and_what_is_typed_holds(place: Path, tmp_path: Path) -> None:
    typed = ["data.module.test_transforms.crop_pct=1.0", "data.num_classes=3"]
    out = done(
        tmp_path,
        "task=test",
        "model.type=test_resnet",
        f"model.init_from={place / 'checkpoint.pth.tar'}",
        *timm_on(place),
        *typed,
    )
    assert "as typed: data.module.test_transforms.crop_pct" in out
    run = run_of(tmp_path)
    transform = run.config()["data"]["module"]["test_transforms"]
    assert transform["crop_pct"] == 1.0 and transform["size"] == 160 and transform["resize_by"] == "pil"
    assert transform["mean"] == transform["std"] == [0.5, 0.5, 0.5]
    assert any("160x160" in line for line in run.summary()["resolved"])
    done(
        tmp_path,
        "task=test",
        "model.type=test_resnet",
        f"model.init_from={place / 'checkpoint.pth.tar'}",
        *timm_on(place),
        "model.data_config=false",
        "data.num_classes=3",
    )
    assert run_of(tmp_path).config()["data"]["module"]["test_transforms"]["size"] == 224


def composed(*options: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        return to_plain(compose("train", list(options)))


def test_fine_tuning_takes_the_size_that_timm_trains_in_and_a_test_that_it_tests_in() -> None:
    typed = ["model=timm", "model.type=resnet10t", "model.pretrained=true", "data=imagenet"]
    tuned, tested = composed(*typed), composed(*typed, "task=test")
    (said,) = settle_weights_data(tuned, typed)
    settle_weights_data(tested, typed)
    assert "timm's data configuration of resnet10t.c3_in1k: 3x176x176, bicubic, crop_pct 0.875" in said
    assert [c["data"]["input_size"] for c in (tuned, tested)] == [176, 224]
    training, evaluation = (tuned["data"]["module"][f"{role}_transforms"] for role in ("train", "test"))
    assert training["size"] == evaluation["size"] == 176 and "resize_by" not in training
    assert tested["data"]["module"]["test_transforms"]["crop_pct"] == 0.95

    for left in (["model.data_config=false"], ["model.pretrained=false"], ["data=cifar10"]):
        config = composed(*typed, *left)
        before = copy.deepcopy(config["data"])
        said = " ".join(settle_weights_data(config, [*typed, *left]))
        same = config["data"] == before
        assert same or ("size and crop stay the data's" in said and config["data"]["input_size"] == 32)
    grey = composed(*typed, "data.input_channels=1")
    assert "mean and std stay the data's, of 1 channels" in settle_weights_data(grey, typed)[0]


def test_a_crop_mode_that_the_policy_does_not_have_is_refused(place: Path, tmp_path: Path) -> None:
    described = json.loads((place / "hub" / "config.json").read_text())
    described["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").symlink_to(place / "hub" / "model.safetensors")
    config = composed("model=timm", f"model.init_from={tmp_path}", "data=imagenet")
    with pytest.raises(
        ConfigError, match="wants crop_mode=border, which the evaluation policy does not have"
    ):
        settle_weights_data(config, [])


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 4), (3, 7), (1, 3)])
def test_a_stem_is_adapted_as_timm_does(before: int, after: int) -> None:
    source, target = network_of(0, channels=before), network_of(1, channels=after)
    report = load_state(target, source.state_dict(), "FILE")
    assert "92 of 92 tensors loaded" in report and "conv1.0.weight: the weights of" in report
    weight, adapted = source.state_dict()["conv1.0.weight"], target.state_dict()["conv1.0.weight"]
    if before == 3:
        assert torch.allclose(adapted, adapt_input_conv(after, weight))
    assert torch.allclose(adapted.sum(dim=1), weight.sum(dim=1), atol=1e-5) or after % before


@pytest.mark.slow
def test_the_folder_is_used_as_a_runs_is_and_trains_no_more(place: Path, tmp_path: Path) -> None:
    command = ["task=test", f"model.init_from={place / 'hub'}", *timm_on(place)]
    done(tmp_path, *command)
    run = run_of(tmp_path)
    done(tmp_path, *command, "tta=flip")
    assert run_of(tmp_path).path == run.path and len(list(run.path.glob("tests/*/test.json"))) == 1
    done(tmp_path, f"run={run.path}", "task=predict", f"data.module.predict_dir={place / 'val'}")
    assert len((run.path / "predictions.csv").read_text().splitlines()) == 28
    assert load_run(run.path).classes == list(CLASSES)
    assert "holds weights from elsewhere" in refused(tmp_path, f"run={run.path}")


@pytest.mark.slow
def test_several_weights_make_one_table(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(network_of(1).state_dict(), other)
    files = [str(place / "checkpoint.pth.tar"), str(other), str(tmp_path / "none.pth")]
    outcome = main_in_process(
        tmp_path,
        "task=test",
        "model.type=test_resnet",
        f"model.init_from=[{','.join(files)}]",
        *timm_on(place),
        "data.num_classes=3",
        "checkpoint.keep=none",
    )
    assert outcome.status == 2 and "none.pth: no such file" in outcome.err
    (table,) = tmp_path.rglob("weights-table.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["weights"] for row in rows] == files
    assert [row["images"] for row in rows] == ["27", "27", ""]
    assert rows[0]["test/acc"] != rows[1]["test/acc"] and not list(tmp_path.rglob("*.ckpt"))
    assert "weights" in outcome.out and json.loads(Path(rows[1]["record"]).read_text())["samples"] == 27


def test_a_list_of_weights_is_tested_on_one_device(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for ranks that nobody starts")

    monkeypatch.setattr("torch.distributed.init_process_group", wait)
    typed = [
        "model.type=test_resnet",
        f"model.init_from=[{place / 'checkpoint.pth.tar'}]",
        "data.num_classes=3",
    ]
    out = done(tmp_path, "task=test", *typed, *timm_on(place), "trainer.devices=2")
    assert "trainer.devices=2: a list of weights is tested on one device" in out and "test/acc" in out


@pytest.mark.slow
def test_weights_of_timms_own_name_are_matched_by_the_classes_of_imagenet(
    place: Path, tmp_path: Path
) -> None:
    torch.save(network_of(2, classes=1000).state_dict(), tmp_path / "pretrained.pth")
    for number, name in enumerate(("n01443537", "n01440764")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for file in (place / "val" / CLASSES[number]).glob("*.png"):
            (tmp_path / "val" / name / file.name).symlink_to(file)
    given = f"+model.timm_kwargs.pretrained_cfg_overlay.file={tmp_path / 'pretrained.pth'}"
    out = done(
        tmp_path, "task=test", "model.type=test_resnet", "model.pretrained=true", given, *timm_on(tmp_path)
    )
    assert (
        "timm's data configuration of test_resnet.r160_in1k: 3x160x160" in out and "2 of 1000 classes" in out
    )
    line = refused(
        tmp_path,
        "task=test",
        "model.type=test_resnet",
        "model.pretrained=true",
        given,
        *timm_on(tmp_path),
        "data.num_classes=2",
    )
    assert "data.num_classes=2: the weights of test_resnet have 1000" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.type=test_resnet"], "of which weights?"),
        (
            ["model.type=test_resnet", "model.init_from={place}/checkpoint.pth.tar", "data.num_classes=1000"],
            "has 3 classes, the weights 1000",
        ),
        (["model.type=test_vit", "model.init_from={place}/hub"], "is of test_resnet"),
        (
            ["model.type=test_resnet", "model.init_from={place}/half.pth", "data.num_classes=3"],
            "does not fill the network",
        ),
        (["model.type=[test_resnet,test_vit]", "model.init_from=[a,b]"], "one list"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(
    place: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    state = network_of(0).state_dict()
    torch.save(
        {name: tensor for name, tensor in state.items() if not name.startswith("fc")}, place / "half.pth"
    )
    line = refused(tmp_path, "task=test", *timm_on(place), *(o.format(place=place) for o in options))
    assert said in line and not runs_in(tmp_path)


def with_names(place: Path, folder: Path, names: list[str], kind: str) -> list[str]:
    """The network of `place`, whose outputs are called so: what is typed of it."""
    if kind == "hub":
        described = json.loads((place / "hub" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"label_names": names}))
        (folder / "model.safetensors").symlink_to(place / "hub" / "model.safetensors")
        return [f"model.init_from={folder}"]
    torch.save({"state_dict": network_of(0).state_dict(), "class_names": names}, folder / "last.ckpt")
    return ["model.type=test_resnet", f"model.init_from={folder / 'last.ckpt'}"]


@pytest.mark.parametrize("kind", ["hub", "checkpoint"])
def test_labels_are_those_of_the_weights_names_whatever_their_case(
    place: Path, tmp_path: Path, kind: str
) -> None:
    names = ["COW", "Bee", "ant"]  # by position, ants would be cows
    given = with_names(place, tmp_path, names, kind)
    done(tmp_path, "task=test", *given, *timm_on(place))
    run = run_of(tmp_path)
    assert run.summary()["classes"] == names
    found = load_run(run.path).predict([place / "val" / n for n in CLASSES]).labels
    right = np.mean([label.lower() == CLASSES[i // 9] for i, label in enumerate(found)])
    (record,) = run.path.rglob("test.json")
    assert json.loads(record.read_text())["metrics"]["test/acc"] == pytest.approx(right)


@pytest.mark.parametrize("kind", ["hub", "checkpoint"])
def test_data_of_other_names_than_the_weights_are_refused_and_mapped(
    place: Path, tmp_path: Path, kind: str
) -> None:
    given = ["task=test", *with_names(place, tmp_path, ["ant", "bee", "cattle"], kind), *timm_on(place)]
    line = refused(tmp_path, *given)
    assert "val/cow: the network has no such class; they are ant, bee, cattle" in line
    assert "class_map=FILE" in line and not runs_in(tmp_path)
    (tmp_path / "map.yaml").write_text("cow: cattle")
    done(tmp_path, *given, f"data.module.class_map={tmp_path / 'map.yaml'}")
    assert run_of(tmp_path).summary()["classes"] == ["ant", "bee", "cattle"]


def test_names_that_are_the_datas_give_way_to_those_of_other_data(place: Path, tmp_path: Path) -> None:
    for known, other in zip(CLASSES, ("dog", "eel", "fox"), strict=True):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / other).symlink_to(place / "val" / known)
    unnamed = ["model.type=test_resnet", f"model.init_from={place / 'checkpoint.pth.tar'}"]
    command = ["task=test", *unnamed, "data.num_classes=3"]
    first = done(tmp_path, *command, *timm_on(place))
    assert "the weights name no classes: ant, bee, cow, as in the data" in first
    run = run_of(tmp_path)
    accuracy = json.loads((run.path / "test.json").read_text())["metrics"]["test/acc"]
    done(tmp_path, *command, *timm_on(tmp_path))
    assert runs_in(tmp_path) == [run.path] and load_run(run.path).classes == ["dog", "eel", "fox"]
    (second,) = run.path.glob("tests/*/test.json")  # test.json stays that of the first data
    assert json.loads(second.read_text())["metrics"]["test/acc"] == accuracy


def test_names_that_are_the_datas_give_way_to_the_weights_own(place: Path, tmp_path: Path) -> None:
    command = [
        "task=test",
        "model.type=test_resnet",
        f"model.init_from={place / 'checkpoint.pth.tar'}",
        "data.num_classes=3",
    ]
    assert "name no classes" in done(tmp_path, *command, *timm_on(place))
    run = run_of(tmp_path)
    named = with_names(place, tmp_path, ["cow", "bee", "ant"], "checkpoint")
    assert "name no classes" not in done(tmp_path, "task=test", *named, *timm_on(place))
    assert runs_in(tmp_path) == [run.path] and load_run(run.path).classes == ["cow", "bee", "ant"]
    assert "name no classes" not in done(tmp_path, *command, *timm_on(place))
    assert load_run(run.path).classes == ["cow", "bee", "ant"]


# docs/weights.md


@pytest.mark.nightly
def test_the_page_does_what_it_says(place: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("    python main.py ")]
    assert len(commands) == 9
    weights = tmp_path / "weights.pth"
    torch.save(network_of(2, classes=1000).state_dict(), weights)
    for known, name in zip(CLASSES, ("n01440764", "n01443537", "n01484850"), strict=True):
        (tmp_path / "fish").mkdir(exist_ok=True)
        (tmp_path / "fish" / name).symlink_to(place / "val" / known)
    put = {"PATH": place / "val", "HUB": place / "hub", "FILE": place / "checkpoint.pth.tar"}
    names = {"resnet50": "test_resnet", "resnet18": "test_resnet.r160_in1k"}
    small = ["trainer.accelerator=cpu", "metrics=[acc]", "checkpoint.keep=none", "logger.wandb=null"]
    short = ["trainer.max_epochs=2", "data.module.batch_size=8", "model.warmstart=0", "callbacks.plots=null"]
    for command in commands:
        pretrained, text = "model.pretrained=true" in command, "\n".join(command)
        for name, value in (*put.items(), *names.items()):
            value = tmp_path / "fish" if pretrained and name == "PATH" else value
            text = re.sub(rf"(?<=[=\[,]){name}\b", str(value), text)
        options = [*text.splitlines(), *small]
        if pretrained:
            options.append(f"+model.timm_kwargs.pretrained_cfg_overlay.file={weights}")
        elif "model.type=test_resnet" in options:
            options.append("data.num_classes=3")
        done(tmp_path, *options, *([] if any(o.startswith("task=") for o in options) else short))
    tuned = [RunDirectory(run) for run in runs_in(tmp_path) if (run / "metrics.csv").exists()]
    assert len(tuned) == 4
    for run in tuned:
        module = run.config()["data"]["module"]
        assert module["train_transforms"]["size"] == module["test_transforms"]["size"] == 64
        assert (
            module["train_transforms"]["mean"] == [0.5, 0.5, 0.5] and run.config()["data"]["input_size"] == 64
        )
        assert (
            module["test_transforms"]["crop_pct"] == 0.9 and "interpolation" not in module["train_transforms"]
        )
        assert any("timm's data configuration of hub" in line for line in run.summary()["resolved"])
        assert "92 of 92 tensors loaded" in (run.path / "main.log").read_text()
    assert sum("frozen" in (run.path / "main.log").read_text() for run in tuned) == 2
