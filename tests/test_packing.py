"""task=pack: what a packed copy holds, and what becomes of it when anything goes wrong."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Outcome, runs_in, write_images
from PIL import Image

import lab.packing
from augmentation.policies import cifar, imagenet
from crucible import command_line
from crucible.options import ConfigError
from datasets import packed
from datasets.image_folder import ImageFolderDataModule
from datasets.image_regression import ImageRegressionDataModule
from datasets.imagenet import ImagenetDataModule
from datasets.images import SampleError

lmdb = pytest.importorskip("lmdb")

CLASSES = ["ant", "bee", "cat"]


def made(cls: Any, root: Path, **options: Any) -> Any:
    settings = {
        "name": "photos",
        "batch_size": 4,
        "num_workers": 0,
        "cache": "none",
        "val_split": 0.25,
        "data_root_dir": str(root),
    }
    settings |= {
        "train_transforms": imagenet.BaselineTransform(size=16),
        "test_transforms": imagenet.TestTransform(size=16),
    }
    module = cls(**settings | options)
    module.check()
    return module


def loaded(module: Any, split: str) -> Any:
    samples = module.samples(split)
    return samples[(1, list(range(len(samples))))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of ten pictures of 48 x 40, one of them small, one grey, one PNG; and odd names."""
    root = tmp_path / "photos"
    write_images(root, CLASSES, 10)
    Image.new("RGB", (20, 12), (9, 99, 200)).save(root / "ant" / "small.png")
    Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50)).save(root / "bee" / "grey é, x.jpg")
    return root


@pytest.fixture
def pack(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Pack `photos` into `tmp_path/pack`, as `python main.py task=pack` does once the options are checked."""

    def run(
        cls: Any = ImageFolderDataModule,
        root: Path = photos,
        out: Path = tmp_path / "pack",
        task: str = "classification",
        on_error: str = "raise",
        **options: Any,
    ) -> Outcome:
        module = {
            "_target_": f"{cls.__module__}.{cls.__name__}",
            "name": "photos",
            "data_root_dir": str(root),
            "task": task,
            "num_workers": "auto",
            "on_error": on_error,
        }
        config = {
            "out": str(out),
            "pack": {"size": 32, "quality": 90, **options},
            "data": {"module": module, "task": task},
        }
        try:
            status = lab.packing.pack(config)
        except Exception as error:
            status = command_line.explain(error)
        return Outcome(status, *capfd.readouterr())

    return run


# what a pack holds


def test_a_pack_has_the_folders_classes_names_order_and_splits(pack, photos: Path, tmp_path: Path) -> None:
    outcome = pack()
    assert outcome.status == 0, outcome.err
    assert "32 train images" in outcome.out and "verified" in outcome.out
    folder, packed_ = (made(ImageFolderDataModule, root) for root in (photos, tmp_path / "pack"))
    assert packed_.class_names == folder.class_names == CLASSES
    for split in ("train", "val", "test"):
        ours, theirs = packed_.samples(split), folder.samples(split)
        assert [ours.raw.names[i] for i in range(len(ours.raw))] == list(theirs.raw.names)
        assert ours.raw.targets.tolist() == theirs.raw.targets.tolist()
        assert (
            np.array_equal(ours.indices, theirs.indices)
            if theirs.indices is not None
            else ours.indices is None
        )
        a, b = loaded(packed_, split), loaded(folder, split)
        assert torch.equal(a.index, b.index) and torch.equal(a.target, b.target)
        # the draws are the same, so that only the resize and the coding differ
        assert (a.input.float() - b.input.float()).abs().mean() < 12
    assert packed_.fingerprint() != folder.fingerprint()


def test_small_files_are_copied_and_larger_ones_have_the_short_side(
    pack, tmp_path: Path, photos: Path
) -> None:
    Image.new("RGB", (90, 60)).save(photos / "cat" / "upright.jpg", exif=_exif(6))
    assert pack().status == 0
    images = packed.find_pack(tmp_path / "pack").images("train", 3)
    by_name = {images.names[i]: i for i in range(len(images))}
    assert images.encoded(by_name["ant/small.png"]) == (photos / "ant" / "small.png").read_bytes()
    assert images[by_name["ant/0.jpg"]][0].shape == (3, 32, 38)  # of 48 x 40, as torchvision's Resize
    assert images[by_name["cat/upright.jpg"]][0].shape == (3, 48, 32)
    grey = images.encoded(by_name["bee/grey é, x.jpg"])
    assert Image.open(_file(grey)).mode == "L" and len(images[by_name["bee/grey é, x.jpg"]][0]) == 3


def test_pack_size_null_keeps_every_file_and_an_evaluation_is_then_the_folders(
    pack, photos, tmp_path: Path
) -> None:
    assert pack(size=None).status == 0
    folder, packed_ = (made(ImageFolderDataModule, root) for root in (photos, tmp_path / "pack"))
    for split in ("train", "test"):
        assert torch.equal(loaded(packed_, split).input, loaded(folder, split).input)


def test_the_resize_is_that_of_the_evaluation_policy(pack, photos: Path, tmp_path: Path) -> None:
    assert pack(quality=100).status == 0
    policy = {"test_transforms": imagenet.TestTransform(size=28)}  # which resizes to 32
    a, b = (
        loaded(made(ImageFolderDataModule, root, **policy), "test").input
        for root in (photos, tmp_path / "pack")
    )
    off = (a.float() - b.float()).abs().mean()
    other = loaded(
        made(ImageFolderDataModule, photos, test_transforms=cifar.TestTransform(size=28)), "test"
    ).input
    assert off < 8 < (a.float() - other.float()).abs().mean()


def test_split_folders_are_kept_and_imagenet_reads_its_own(
    pack, imagenet_folder: Path, tmp_path: Path
) -> None:
    assert pack(ImagenetDataModule, root=imagenet_folder).status == 0
    out = tmp_path / "pack"
    assert packed.find_pack(out).splits == ["train", "val"]
    for cls in (ImagenetDataModule, ImageFolderDataModule):
        folder, packed_ = (made(cls, root) for root in (imagenet_folder, out))
        for split in ("train", "val", "test"):
            ours, theirs = loaded(packed_, split), loaded(folder, split)
            assert torch.equal(ours.index, theirs.index) and torch.equal(ours.target, theirs.target)
    again = made(ImagenetDataModule, out)
    moved = out.rename(tmp_path / "elsewhere")
    assert made(ImagenetDataModule, moved).fingerprint() == again.fingerprint()


def test_values_are_packed_too_and_a_pack_says_what_it_is_for(pack, tmp_path: Path) -> None:
    root, out = tmp_path / "values", tmp_path / "pack"
    write_images(root, ["x"], 8)
    (root / "labels.csv").write_text("file,value\n" + "".join(f"x/{i}.jpg,{i / 4}\n" for i in range(8)))
    outcome = pack(ImageRegressionDataModule, root, task="regression")
    assert outcome.status == 0, outcome.err
    a, b = (loaded(made(ImageRegressionDataModule, r, task="regression"), "train") for r in (root, out))
    assert torch.equal(a.target, b.target) and a.target.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"a pack for regression, data\.task is classification"):
        made(ImageFolderDataModule, out)


def test_a_pack_of_one_size_is_kept_decoded(pack, tmp_path: Path) -> None:
    assert pack(size=10).status == 0
    for name in ("ant/small.png", "bee/grey é, x.jpg"):  # of other shapes than the rest
        (tmp_path / "photos" / name).unlink()
    assert pack(size=10, out=tmp_path / "even").status == 0
    kept, read = (made(ImageFolderDataModule, tmp_path / "even", cache=cache) for cache in ("memory", "none"))
    assert torch.equal(loaded(kept, "test").input, loaded(read, "test").input)
    assert kept.fingerprint() == read.fingerprint()


def test_a_pack_may_be_packed_again(pack, tmp_path: Path) -> None:
    assert pack().status == 0
    second = pack(size=16, root=tmp_path / "pack", out=tmp_path / "smaller")
    assert second.status == 0, second.err
    assert packed.find_pack(tmp_path / "smaller").images("train", 3)[0][0].shape == (3, 16, 19)


# training from it


@pytest.mark.slow
def test_a_network_trains_from_a_pack_and_is_tested_on_it(pack, cli, photos, tmp_path: Path) -> None:
    assert pack().status == 0
    run = _train(cli, tmp_path / "pack", "data.module.num_workers=2", "trainer.max_epochs=1")
    assert run.status == 0, run.err
    assert "packed copy of photos: short side 32, quality 90" in " ".join(run.out.split())
    (folder,) = runs_in(tmp_path / "experiments")
    tested = cli(f"run={folder}", "task=test")
    assert tested.status == 0 and "test/acc" in tested.out, tested.err
    # on the folder that it was made of: other data, whose classes are matched by name
    elsewhere = cli(f"run={folder}", "task=test", f"data.module.data_root_dir={photos}")
    assert elsewhere.status == 0 and "other data than the run's own" in elsewhere.out, elsewhere.err
    predicted = cli(f"run={folder}", "task=predict")
    assert predicted.status == 0, predicted.err
    with (folder / "predictions.csv").open() as stream:
        assert all("/" in row["sample"] for row in csv.DictReader(stream))


def test_the_numbers_do_not_depend_on_the_workers(pack, tmp_path: Path) -> None:
    assert pack().status == 0
    first, second = (
        [b.input for b in made(ImageFolderDataModule, tmp_path / "pack", num_workers=n).train_dataloader()]
        for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _train(cli: Callable[..., Any], root: Path, *arguments: str) -> Any:
    return cli(
        "data=image_folder", f"data.module.data_root_dir={root}", "data.module.batch_size=8", "data.input_size=16",
        "model=cifar_resnet", "logger.wandb=null", "callbacks.plots=null", *arguments,
    )  # fmt: skip


@pytest.mark.nightly
def test_two_devices_read_one_pack_each_its_part(pack, shell, tmp_path: Path) -> None:
    assert pack().status == 0
    run = _train(shell, tmp_path / "pack", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=1",
                 "data.module.num_workers=1", "data.module.batch_size=4")  # fmt: skip
    assert run.status == 0, run.err


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_to_the_same_weights(pack, launch, shell, tmp_path: Path) -> None:
    assert pack().status == 0
    options = ("trainer.max_epochs=4", "data.module.num_workers=2")
    whole = _train(shell, tmp_path / "pack", *options, "exp_dir=whole")
    assert whole.status == 0, whole.err
    command: Command = _train(launch, tmp_path / "pack", *options, "exp_dir=killed")
    while command.poll() is None and not list((tmp_path / "killed").rglob("last.ckpt")):
        time.sleep(0.02)
    command.end()
    resumed = _train(shell, tmp_path / "pack", *options, "exp_dir=killed")
    assert resumed.status == 0, resumed.err
    states = [
        torch.load(next((tmp_path / d).rglob("last.ckpt")), weights_only=True)["state_dict"]
        for d in ("whole", "killed")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


# what may go wrong


def test_a_packing_that_is_killed_goes_on_and_ends_the_same(pack, tmp_path: Path, monkeypatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert pack(out=whole).status == 0
    real = lab.packing.repacked
    monkeypatch.setattr(lab.packing, "_COMMIT_S", 0.0)

    def dies(raw: Any, index: int, *options: Any) -> bytes:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(raw, index, *options)

    if (child := os.fork()) == 0:
        lab.packing.repacked = dies
        pack(out=killed)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with pytest.raises(ConfigError, match="a pack that is not finished; the command that began it goes on"):
        packed.find_pack(killed)
    resumed = pack(out=killed)
    assert resumed.status == 0, resumed.err
    assert "goes on at image" in resumed.out
    descriptions = [packed.read_description(out) for out in (whole, killed)]
    assert descriptions[0].digests == descriptions[1].digests
    assert "packed before" in pack(out=killed).out
    assert sorted(p.name for p in killed.iterdir()) == ["data.mdb", "pack.json"]


def test_a_source_that_changes_between_kill_and_resume_is_refused(
    pack, photos, tmp_path: Path, monkeypatch
) -> None:
    def stops(*_: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lab.packing, "repacked", stops)
        pack()
    write_images(photos, ["ant"], 12)
    outcome = pack()
    assert outcome.status == 2 and "or they have changed since the packing began; another out=" in outcome.err
    assert pack(out=tmp_path / "anew").status == 0


def test_what_cannot_be_read_is_listed_and_left_out(pack, photos: Path, tmp_path: Path) -> None:
    (photos / "bee" / "broken, =1.jpg").write_bytes((photos / "bee" / "1.jpg").read_bytes()[:200])
    (photos / "cat" / "empty.png").touch()
    outcome = pack()
    assert outcome.status == 1 and "2 images could not be read and are not in it" in outcome.out
    with (tmp_path / "pack" / "rejects.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == ["bee/broken, =1.jpg", "cat/empty.png"]
    assert all(row["split"] == "train" and "cannot be read" in row["reason"] for row in rows)
    module = made(ImageFolderDataModule, tmp_path / "pack")
    assert any("2 of 34 images could not be read" in remark for remark in module.remarks)
    (photos / "bee" / "broken, =1.jpg").unlink()
    (photos / "cat" / "empty.png").unlink()
    for split in ("train", "val", "test"):  # as if they had not been there
        folder = made(ImageFolderDataModule, photos)
        assert torch.equal(loaded(module, split).target, loaded(folder, split).target)


def _unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The network drive does not give one file."""
    real = os.open

    def opens(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", opens)


def test_what_the_file_system_does_not_give_stops_the_packing_which_goes_on(
    pack, tmp_path: Path, monkeypatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pack(out=whole).status == 0
    with monkeypatch.context() as patch:
        _unreadable(patch, "bee/3.jpg")
        outcome = pack(out=stopped)
    (line,) = outcome.err.strip().splitlines()
    assert outcome.status == 2 and "bee/3.jpg: cannot be read (Input/output error); 14 of 32 images" in line
    assert "the same command goes on there" in line and "replace or remove" not in line
    resumed = pack(out=stopped)
    assert resumed.status == 0 and "goes on at image 15 of 32" in resumed.out, resumed.err
    assert not (stopped / "rejects.csv").exists()
    assert len({tuple(packed.read_description(out).digests.items()) for out in (whole, stopped)}) == 1


def test_files_that_cannot_be_opened_are_left_out_where_that_is_asked_for(
    pack, photos: Path, tmp_path: Path
) -> None:
    (photos / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    outcome = pack()
    assert outcome.status == 2 and "bee/gone.jpg: cannot be read (No such file or directory)" in outcome.err
    assert not (tmp_path / "pack").exists()
    outcome = pack(on_error="skip")
    assert outcome.status == 1 and "1 images could not be read" in outcome.out, outcome.err
    assert (tmp_path / "pack" / "rejects.csv").read_text().splitlines()[1] == (
        f'"train","bee/gone.jpg","{photos}/bee/gone.jpg: cannot be read (No such file or directory)"'
    )


def test_a_class_of_which_nothing_can_be_read_is_refused(pack, photos: Path) -> None:
    (photos / "ant" / "0.jpg").write_bytes(b"no image")
    for file in (photos / "cat").iterdir():
        file.write_bytes(b"no image")
    outcome = pack()
    assert "could be read, the first: " in outcome.err and "/cat/0.jpg: cannot be read" in outcome.err
    assert outcome.status == 2 and "the train split: no image of class cat could be read" in outcome.err


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(pack, tmp_path: Path, monkeypatch) -> None:
    real = lab.packing._Writer.commit

    def full(self: Any) -> None:
        error = lmdb.Error("mdb_txn_commit: Input/output error")
        error.code = errno.EIO
        raise error

    monkeypatch.setattr(lab.packing._Writer, "commit", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    outcome = pack()
    (line,) = outcome.err.strip().splitlines()
    assert (
        outcome.status == 1 and "no space left on the device" in line and "the same command goes on" in line
    )
    monkeypatch.setattr(lab.packing._Writer, "commit", real)
    assert pack().status == 0


def test_the_map_grows_with_the_pack(pack, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lab.packing, "_FIRST_MAP", 1 << 16)
    assert pack(size=None).status == 0


def _flip(folder: Path, name: str) -> None:
    images = packed.find_pack(folder).images("train", 3)
    index = next(i for i in range(len(images)) if images.names[i] == name)
    data = images.encoded(index)
    packed.close(folder)
    file = folder / "data.mdb"
    content = bytearray(file.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_names_the_record_the_picture_and_the_file(pack, tmp_path: Path) -> None:
    assert pack().status == 0
    out = tmp_path / "pack"
    _flip(out, "bee/3.jpg")
    images = packed.find_pack(out).images("train", 3)
    index = next(i for i in range(len(images)) if images.names[i] == "bee/3.jpg")
    with pytest.raises(
        SampleError, match=rf"^bee/3\.jpg: .*data\.mdb, record {index}: its bytes have changed"
    ):
        images[index]
    verified = pack(verify=True)
    assert verified.status == 2 and f"records that have changed: {index}" in verified.err


def test_a_finished_pack_is_verified(pack) -> None:
    assert pack().status == 0
    outcome = pack(verify=True)
    assert outcome.status == 0 and "32 train images" in outcome.out and "verified" in outcome.out


def _newer(out: Path) -> None:
    description = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps({**description, "version": 2}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "newer": (_newer, "a pack of version 2, and this Crucible reads up to 1"),
    "no data": (lambda out: (out / "data.mdb").unlink(), "no such file, but pack.json beside it"),
    "half": (lambda out: os.truncate(out / "data.mdb", 8192), "has 8192 bytes of .*half a copy"),
    "no description": (
        lambda out: (out / "pack.json").unlink(),
        "holds data.mdb without pack.json: not a pack",
    ),
    "other": (lambda out: (out / "pack.json").write_text('{"a": 1}'), "not the description of a pack"),
    "no text": (lambda out: (out / "pack.json").write_bytes(b"\xff\x00"), "not the description of a pack"),
}


def test_what_is_no_whole_pack_is_refused_in_a_line(pack, tmp_path: Path) -> None:
    assert pack().status == 0
    for number, (damage, said) in enumerate(DAMAGES.values()):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "pack", copy)
        damage(copy)
        with pytest.raises(ConfigError, match=said):
            made(ImageFolderDataModule, copy)


def test_places_that_hold_something_else_are_refused(pack, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refused = {
        tmp_path / "full": "holds something else (thesis.tex)", photos / "pack": "lies inside the images",
        photos: "lies inside the images", tmp_path / "full" / "thesis.tex": "a file stands there",
    }  # fmt: skip
    for out, said in refused.items():
        outcome = pack(out=out)
        assert outcome.status == 2 and said in outcome.err, outcome.err
    assert not (photos / "pack").exists()
    assert pack().status == 0
    other = pack(quality=50)
    assert other.status == 2 and "holds a pack with pack.quality=90, not pack.quality=50" in other.err
    assert "no pack there" in pack(out=tmp_path / "none", verify=True).err


@pytest.mark.slow
def test_the_command_packs_and_trains_and_refuses_what_would_do_nothing(
    cli, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    outcome = cli(
        "task=pack", "data=image_folder", f"data.module.data_root_dir={photos}", f"out={out}", "pack.size=32"
    )
    assert outcome.status == 0 and "32 train images" in outcome.out, outcome.err
    run = _train(
        cli, out, "data.module.num_workers=2", "trainer.max_epochs=1", "trainer.limit_train_batches=1"
    )
    assert run.status == 0, run.err
    refused = cli("task=pack", "data=digits", "out=x")
    assert refused.status == 2
    assert "packs image files; those of data.module.name=digits are Arrays" in refused.err


def test_two_processes_do_not_pack_into_one_folder(pack, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    with lab.packing._alone(tmp_path / "pack"):
        # what holds it is its own; another open file of this process is another holder
        outcome = pack()
    assert outcome.status == 2 and "another process is packing there" in outcome.err


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)
