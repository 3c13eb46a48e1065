"""The quick path of photographs: decoders, crops, whole batches, what is kept decoded, what is skipped."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import runs_in, summary_of, write_images
from PIL import Image
from torchvision.transforms import v2

from augmentation.policies import cifar, imagenet
from augmentation.policies.base import resized
from crucible.options import ConfigError
from crucible.pictures import PictureError, Shape, decode, decode_with_pil, shape_of
from datasets import cache as caches
from datasets.image_folder import ImageFolderDataModule, class_folders
from datasets.images import SampleError


def noise(height: int = 24, width: int = 40, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


KINDS: dict[str, Callable[[], bytes]] = {
    "4:4:4": lambda: saved(noise(), subsampling=0),
    "4:2:0": lambda: saved(noise(), subsampling=2),
    "odd sides": lambda: saved(noise(24, 40).crop((0, 0, 37, 21)), subsampling=2),
    "progressive": lambda: saved(noise(), progressive=True),
    "grey": lambda: saved(noise().convert("L")),
    "CMYK": lambda: saved(noise().convert("CMYK")),
    "1x1": lambda: saved(Image.new("RGB", (1, 1), (9, 90, 200))),
    "PNG": lambda: saved(noise(), "PNG"),
    "16-bit PNG": lambda: saved(Image.fromarray(np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)), "PNG"),
    "palette": lambda: saved(noise().quantize(16), "PNG", transparency=0),
    "RGBA": lambda: saved(noise().convert("RGBA"), "PNG"),
    "animated GIF": lambda: saved(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
    "animated WebP": lambda: saved(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)], lossless=True),
    **{f"EXIF {n}": (lambda n=n: saved(noise(), exif=_exif(n))) for n in range(9)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_gives_the_pixels_that_pil_gives(kind: str) -> None:
    content = KINDS[kind]()
    for channels in (1, 3):
        reference = np.asarray(decode_with_pil(content, channels))
        expected = torch.from_numpy(
            reference.reshape(*reference.shape[:2], channels).transpose(2, 0, 1).copy()
        )
        for decoder in ("pil", "auto"):
            found = decode(content, channels, decoder)
            assert found.dtype == torch.uint8 and torch.equal(found, expected), decoder
    assert shape_of(content) == expected.shape[1:]


def _bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def _jpeg_bomb() -> bytes:
    content = bytearray(saved(noise()))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(content)


BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: saved(noise(96, 96))[:-400],
    "header only": lambda: saved(noise())[:300],
    "empty": lambda: b"",
    "text": lambda: b"not a picture",
    "bomb": _bomb,
    "JPEG bomb": _jpeg_bomb,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("decoder", ["pil", "auto"])
def test_no_decoder_takes_what_is_broken(kind: str, decoder: str) -> None:
    with pytest.raises(PictureError) as error:
        decode(BROKEN[kind](), 3, decoder)
    assert str(error.value) and "\n" not in str(error.value)


def test_a_photograph_is_decoded_smaller_only_where_that_is_asked_for() -> None:
    pytest.importorskip("simplejpeg")
    content = saved(noise(160, 240))
    assert decode(content, 3).shape == (3, 160, 240)
    assert decode(content, 3, least=lambda _: Shape(70, 100)).shape == (3, 80, 120)
    assert decode(content, 3, least=lambda _: Shape(100, 100)).shape == (3, 160, 240)
    turned = saved(noise(160, 240), exif=_exif(6))
    assert decode(turned, 3, least=lambda _: Shape(100, 70)).shape == (3, 120, 80)


@pytest.mark.parametrize("policy", [imagenet.BaselineTransform, imagenet.TestTransform])
def test_large_photographs_scaled_while_they_are_decoded_give_nearly_the_same_crops(
    tmp_path: Path, policy: type
) -> None:
    pytest.importorskip("simplejpeg")
    for place, label in ((place, label) for place in range(4) for label in "ab"):
        (tmp_path / label).mkdir(exist_ok=True)
        # 16 times as large as the crops; one of them lies on its side
        content = saved(noise(512, 640, place), quality=95, exif=_exif(6 if place == 3 else 1))
        (tmp_path / label / f"{place}.jpg").write_bytes(content)

    def inputs(scaled: bool) -> torch.Tensor:
        data = ImageFolderDataModule(
            name="large", data_root_dir=str(tmp_path), batch_size=6, num_workers=0, test_split=0.0, val_split=0.2,
            train_transforms=policy(size=32, dct_scaling=scaled), test_transforms=policy(size=32, dct_scaling=scaled),
            cache="none",
        )  # fmt: skip
        data.setup("fit")
        batches = [*data.train_dataloader(), *data.val_dataloader()]
        return torch.cat([b.input for b in batches])[torch.cat([b.index for b in batches]).argsort()].float()

    whole, scaled = inputs(False), inputs(True)
    assert whole.shape == scaled.shape == (8, 3, 32, 32)
    assert not torch.equal(whole, scaled)  # something was scaled
    error = (whole - scaled).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).min() > 20  # PSNR in dB; another crop has less than 15


@pytest.mark.parametrize("shape", [(3, 50, 70), (1, 33, 20)])
def test_a_resize_does_not_depend_on_the_memory_format_and_is_torchvisions(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    together = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = v2.functional.resize(pixels, [24, 16], antialias=True)
    assert torch.equal(resized(pixels, 24, 16), expected)
    assert torch.equal(resized(together, 24, 16), expected)
    view = together[:, 5:25, 3:18]
    assert torch.equal(resized(view, 8, 8), resized(view.clone(memory_format=torch.contiguous_format), 8, 8))


def folder(
    root: Path, count: int = 12, size: tuple[int, int] = (48, 40), **options: object
) -> ImageFolderDataModule:
    """Of photographs of two classes."""
    if not root.exists():
        for number in range(2 * count):
            place = root / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.jpg").write_bytes(saved(noise(size[1], size[0], number)))
    given = {"name": "x", "data_root_dir": str(root), "batch_size": 4, "num_workers": 0, "test_split": 0.0,
             "train_transforms": imagenet.BaselineTransform(size=16),
             "test_transforms": imagenet.TestTransform(size=16)} | options  # fmt: skip
    return ImageFolderDataModule(**given)


def batches(data: ImageFolderDataModule, epoch: int = 0) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_decoder_cache_and_workers_change_no_pixel_and_no_fingerprint(tmp_path: Path) -> None:
    found = []
    for options in ({"cache": "none"}, {"decoder": "pil", "cache": "none"}, {}, {}, {"cache": "memory"},
                    {"cache": "none", "num_workers": 2}):  # fmt: skip
        data = folder(tmp_path / "images", **options)
        data.check()
        ready = [data.batch_transform(batch, "train", 3).input for batch in batches(data, 3)]
        found.append((torch.cat(ready), data.fingerprint()))
    assert all(torch.equal(f[0], found[0][0]) and f[1] == found[0][1] for f in found[1:])
    assert len(list((tmp_path / "images" / ".decoded").iterdir())) == 1


def test_pictures_of_one_size_are_decoded_once_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folder(tmp_path / "images")
    first.setup("fit")
    monkeypatch.setattr(caches, "_decode", None)  # would fail
    again = folder(tmp_path / "images")
    again.setup("fit")
    assert torch.equal(again.train_dataset.inputs, first.train_dataset.inputs)
    assert again.sample_name(3, "train") == first.sample_name(3, "train") != "3"


def test_auto_keeps_within_its_bounds_and_what_is_asked_for_by_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "MOST", 1000)
    data = folder(tmp_path / "images")
    data.setup("fit")
    assert not hasattr(data.train_dataset, "inputs") and not (tmp_path / "images" / ".decoded").exists()
    (tmp_path / "images" / "a" / "odd.jpg").write_bytes(saved(noise(64, 64)))
    monkeypatch.undo()
    folder(tmp_path / "images").setup("fit")
    with pytest.raises(ConfigError, match=r"data\.module\.cache=memory: .*48x40"):
        folder(tmp_path / "images", cache="memory").setup("fit")


def test_a_folder_that_cannot_be_written_leaves_the_copy_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "why_not_writable", lambda folder: "read-only")
    data = folder(tmp_path / "images")
    data.setup("fit")
    assert hasattr(data.train_dataset, "inputs") and not (tmp_path / "images" / ".decoded").exists()
    assert list((tmp_path / "cache" / "crucible" / "decoded").iterdir())


@pytest.mark.slow
def test_data_on_the_device_give_the_run_that_data_in_memory_give(cli, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a", "b"], 16, (16, 16))
    results = {}
    for cache in ("memory", "device", "none"):
        place = tmp_path / cache
        outcome = cli(*RUN, f"data.module.data_root_dir={tmp_path / 'images'}", f"data.module.cache={cache}",
                      f"exp_dir={place}")  # fmt: skip
        assert outcome.status == 0, outcome.err
        (run,) = runs_in(place)
        results[cache] = run.name, summary_of(run)["final"]
    assert results["memory"] == results["device"] == results["none"]


def test_data_that_need_the_cpu_are_not_kept_on_a_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.module\.cache=device: the val samples need work"):
        folder(tmp_path / "images", cache="device").val_dataloader()


RUN = (
    "data=image_folder", "data.num_classes=2", "data.input_size=16", "data.module.batch_size=4",
    "data.module.train_transforms._target_=augmentation.policies.cifar.BaselineTransform",
    "data.module.test_transforms._target_=augmentation.policies.cifar.TestTransform",
    "++data.module.train_transforms.size=16", "++data.module.test_transforms.size=16",
    "model=cifar_resnet", "model.depth=8", "trainer.max_epochs=1", "logger.wandb=null", "callbacks.plots=null",
    "callbacks.progress=null", "trainer.enable_progress_bar=false", "data.module.num_workers=0",
)  # fmt: skip


def test_a_skipped_sample_that_comes_up_again_has_another_stand_in(tmp_path: Path) -> None:
    whole = folder(tmp_path / "images", cache="none", random_batches=True)
    drawn = torch.cat([batch.index for batch in batches(whole, 1)])
    numbers, times = drawn.unique(return_counts=True)
    bad = int(numbers[times.argmax()])
    (tmp_path / "images" / whole.sample_name(bad, "train")).write_bytes(b"nonsense")
    found = []
    for workers in (0, 2):
        data = folder(
            tmp_path / "images", cache="none", random_batches=True, on_error="skip", num_workers=workers
        )
        found.append([torch.cat(parts) for parts in zip(*batches(data, 1), strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0][2][drawn == bad].unique()) == int(times.max()) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_sample_changes_no_other_one(tmp_path: Path, workers: int) -> None:
    whole = folder(tmp_path / "images", cache="none")
    expected = batches(whole, 1)
    bad = expected[1].index[2].item()
    (tmp_path / "images" / whole.sample_name(bad, "train")).write_bytes(b"nonsense")
    data = folder(tmp_path / "images", cache="none", on_error="skip", num_workers=workers)
    found = batches(data, 1)
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        same = torch.ones(4, dtype=torch.bool)
        same[2] = number != 1
        assert torch.equal(a.input[same], b.input[same]) and torch.equal(a.index[same], b.index[same])
        assert a.input.shape == b.input.shape
    stand_in = found[1].index[2].item()
    assert stand_in != bad and found[1].target[2] == data.train_dataset.targets[stand_in]
    assert data.unread("train").nonzero().flatten().tolist() == [bad]
    with pytest.raises(SampleError, match="on_error=skip"):
        batches(folder(tmp_path / "images", cache="none"), 1)


def test_evaluation_goes_on_without_what_cannot_be_read(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", cache="none", on_error="skip", val_split=0.5)
    data.setup("fit")
    held = data.samples("val").indices
    (tmp_path / "images" / data.sample_name(int(held[0]), "val")).write_bytes(b"")
    seen = torch.cat([b.index for b in data.val_dataloader()]).tolist()
    assert seen == held[1:].tolist()
    for index in held[:4]:
        (tmp_path / "images" / data.sample_name(int(index), "val")).write_bytes(b"")
    with pytest.raises(SampleError, match="nor can the others of its batch"):
        list(data.val_dataloader())


@pytest.mark.parametrize("cache", ["none", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_run_that_skips_counts_says_and_records_it(cli, tmp_path: Path, cache: str) -> None:
    write_images(tmp_path / "images" / "train", ["a", "b"], 12, (16, 16))
    write_images(tmp_path / "images" / "test", ["a", "b"], 4, (16, 16))
    (tmp_path / "images" / "train" / "a" / "3.jpg").write_bytes(b"nonsense")
    (tmp_path / "images" / "train" / "b" / "4.jpg").unlink()
    (tmp_path / "images" / "train" / "b" / "4.jpg").symlink_to("nowhere.jpg")
    options = [o for o in RUN if "progress" not in o]
    outcome = cli(*options, f"data.module.data_root_dir={tmp_path / 'images'}", "data.module.on_error=skip",
                  f"data.module.cache={cache}", "trainer.max_epochs=3")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "unreadable 2" in outcome.out.splitlines()[-3]
    (run,) = runs_in(tmp_path / "experiments")
    summary = summary_of(run)
    found = summary["unreadable"]
    assert sum(split["count"] for split in found.values()) == 2
    said = outcome.out + outcome.err + (run / "main.log").read_text()
    assert said.count("train/a/3.jpg: cannot be read") >= 1 and "train/b/4.jpg" in said


STOP = """
import os, signal
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Stop(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if Path("stop").exists() and trainer.global_step == int(Path("stop").read_text()):
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_run_that_was_stopped_has_skipped_what_the_whole_one_has(cli, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", ["a", "b"], 12, (16, 16))
    for broken in ("a/3.jpg", "a/5.jpg", "b/4.jpg"):
        (tmp_path / "images" / "train" / broken).write_bytes(b"nonsense")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stop.py").write_text(STOP)
    command = [*RUN, f"data.module.data_root_dir={tmp_path / 'images'}", "data.module.on_error=skip",
               "data.module.cache=none", "test_after_training=false", "user_dir=mine",
               "+callbacks.stop._target_=stop.Stop"]  # fmt: skip
    assert cli(*command, "exp_dir=whole").status == 0
    (whole,) = runs_in(tmp_path / "whole")
    batches = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    (tmp_path / "stop").write_text(str(batches - 1))  # what is left has not met them all
    assert cli(*command, "exp_dir=stopped").status == 128 + 15
    (tmp_path / "stop").unlink()
    assert cli(*command, "exp_dir=stopped").status == 0
    (stopped,) = runs_in(tmp_path / "stopped")
    found = [summary_of(run)["unreadable"] for run in (whole, stopped)]
    assert (
        found[0] == found[1] and found[0]["train"]["count"] + found[0].get("val", {"count": 0})["count"] == 3
    )
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (whole, stopped)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_listing_is_what_it_was(tmp_path: Path) -> None:
    for name in ("a/1.JPG", "a/deep/2.png", "a/.hidden/3.jpg", "a/@eaDir/4.jpg", "a/._5.jpg", "a/6.txt",
                 "a/d.jpg/7.gif", "b/8.jpeg", "b/noextension"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = class_folders(tmp_path, 3)
    assert list(files.names) == ["a/1.JPG", "a/d.jpg/7.gif", "a/deep/2.png", "b/8.jpeg"]
    chosen = files.subset(np.array([3, 0, 2]))
    assert list(chosen.names) == ["b/8.jpeg", "a/1.JPG", "a/deep/2.png"] and chosen.targets.tolist() == [
        1,
        0,
        0,
    ]


def test_small_policies_take_other_sizes_as_before_within_a_level() -> None:
    image = noise(40, 40)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    found = cifar.TestTransform().sample(image).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1
