"""Reading images as they occur in the wild, and the raw data sets."""

from __future__ import annotations

import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from crucible.listing import image_files
from datasets.images import (
    Arrays,
    ImageFiles,
    Names,
    SampleError,
    fingerprint,
    with_channels,
)
from datasets.images import load_image as pixels_of

EXIF_ORIENTATION = 0x0112


def load_image(path, channels):
    """By both decoders, which agree to the pixel."""
    pixels = pixels_of(path, channels, "pil")
    assert torch.equal(pixels, pixels_of(path, channels, "auto"))
    assert pixels.dtype == torch.uint8 and len(pixels) == channels
    return to_pil_image(pixels)


@pytest.fixture
def gradient() -> Image.Image:
    """16x8 pixels, bright to the right: each orientation is told apart."""
    x = np.linspace(0, 255, 16)[None, :] * np.linspace(0.3, 1, 8)[:, None]
    return Image.fromarray(np.stack([x, x, x], -1).round().astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize(("channels", "expected"), [(1, "L"), (3, "RGB")])
def test_every_mode_becomes_grey_or_rgb(tmp_path, gradient, mode, channels, expected):
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    image = gradient.convert("L").convert(mode) if mode == "I;16" else gradient.convert(mode)
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    loaded = load_image(path, channels)
    assert loaded.mode == expected
    assert loaded.size == (16, 8)


def test_cmyk_keeps_its_colours(tmp_path):
    Image.new("RGB", (8, 8), (250, 20, 30)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    r, g, b = np.asarray(load_image(tmp_path / "c.jpg", 3)).mean((0, 1))
    assert r > 200 > 80 > max(g, b)


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.new("P", (4, 4))
    image.putpalette([200, 10, 10, 10, 200, 10] + [0] * 762)
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.png", transparency=bytes([128, 0]))
    loaded = load_image(tmp_path / "p.png", 3)
    assert loaded.getpixel((1, 1)) == (200, 10, 10)
    assert loaded.getpixel((0, 0)) == (10, 200, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, channels):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = np.asarray(load_image(tmp_path / "deep.png", channels))
    first = loaded if channels == 1 else loaded[..., 0]
    assert np.abs(first - values / 65535 * 255).max() <= 0.5


@pytest.mark.parametrize("orientation", range(9))
def test_the_exif_orientation_is_applied(tmp_path, gradient, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    gradient.save(tmp_path / "o.png", exif=exif)
    upright = np.asarray(gradient)
    expected = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright),
    }.get(orientation, upright)
    assert np.array_equal(np.asarray(load_image(tmp_path / "o.png", 3)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_pixels_readable(tmp_path, gradient):
    gradient.save(tmp_path / "e.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x7f" * 20)
    assert load_image(tmp_path / "e.jpg", 3).size == (16, 8)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "float", "bomb"])
def test_what_cannot_be_read_raises_with_the_files_name(tmp_path, damage):
    path = tmp_path / f"{damage}_file.png"
    if damage == "truncated":
        path = path.with_suffix(".jpg")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an image")
    elif damage == "float":
        path = path.with_suffix(".tif")
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
    elif damage == "bomb":
        header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(SampleError, match=path.name):
        load_image(path, 3)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif", 3).getpixel((0, 0)) == (255, 0, 0)


def test_grey_from_colour_is_pils(gradient):
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in noise])
    grey = with_channels(torch.from_numpy(noise).permute(0, 3, 1, 2), 1)
    assert np.array_equal(grey[:, 0].numpy(), expected)
    assert with_channels(grey, 3).shape == (5, 3, 8, 6)


def test_names_are_what_was_put_in_and_survive_pickling():
    names = Names(["a/b.jpg", "", "ü/ß.png", "x" * 300])
    for form in (names, pickle.loads(pickle.dumps(names))):
        assert list(form) == ["a/b.jpg", "", "ü/ß.png", "x" * 300]
        assert form[1:3] == ["", "ü/ß.png"]
    with pytest.raises(IndexError):
        names[4]


def test_listing_is_recursive_sorted_and_passes_over_what_is_no_image(tmp_path):
    for name in ("b/2.JPG", "b/c/1.png", "a.jpeg", "notes.txt", ".hidden.jpg", ".cache/3.jpg", "b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == ["a.jpeg", "b/2.JPG", "b/c/1.png"]


def files(folder, colour: int = 0, names: tuple[str, ...] = ("x/1.png", "y/2.png")) -> ImageFiles:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3 + colour, 3), colour).save(folder / name)
    return ImageFiles(folder, names, list(range(len(names))), 3)


def test_the_fingerprint_of_files_is_of_content_and_not_of_place(tmp_path):
    original = fingerprint([files(tmp_path / "a"), None])
    assert len(original) == 16
    assert fingerprint([files(tmp_path / "elsewhere"), None]) == original
    others = {
        fingerprint([files(tmp_path / "bytes", colour=40), None]),
        fingerprint([files(tmp_path / "names", names=("x/1.png", "y/3.png")), None]),
        fingerprint([None, files(tmp_path / "a")]),
        fingerprint([files(tmp_path / "a"), files(tmp_path / "a")]),
    }
    relabelled = files(tmp_path / "a")
    relabelled.targets = relabelled.targets[::-1].copy()
    others.add(fingerprint([relabelled, None]))
    assert len(others | {original}) == 6


def test_the_fingerprint_of_arrays_is_of_every_value():
    inputs = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    original = fingerprint([Arrays(inputs, [0, 1])])
    changed = inputs.clone()
    changed[1, 2, 1, 1] += 1
    seen = {
        original,
        fingerprint([Arrays(changed, [0, 1])]),
        fingerprint([Arrays(inputs, [1, 0])]),
        fingerprint([Arrays(inputs.view(2, 3, 1, 4), [0, 1])]),
        fingerprint([Arrays(inputs.float(), [0, 1])]),
    }
    assert len(seen) == 5
    assert fingerprint([Arrays(inputs.clone(), np.array([0, 1]))]) == original


def test_other_data_sets_have_a_fingerprint_too():
    plain = [(Image.new("L", (4, 4), i), i % 2) for i in range(5)]
    changed = [*plain[:4], (Image.new("L", (4, 4), 9), 0)]
    assert fingerprint([plain]) == fingerprint([list(plain)])
    assert fingerprint([plain]) != fingerprint([changed])
