"""From the bytes of an image file to pixels: one interface, the fastest decoder that gives PIL's pixels.

PIL is the reference. simplejpeg (libjpeg-turbo as well; `pip install -e '.[fast]'`) decodes what is plainly a JPEG, and
what it refuses goes to PIL, which has the last word: the same files are readable with either, the pixels are the same,
and so is the turning upright. No decoder but PIL sees a picture with more pixels than PIL takes without a warning.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from crucible.options import ConfigError

Decoder = Literal["auto", "pil", "simplejpeg"]
_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8\xff"
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # of EXIF and XMP, which may say which side is up; of the pixels


class PictureError(ValueError):
    """Bytes that are no readable picture; the text is the reason, in one line."""


class Shape(NamedTuple):
    """Of an upright picture, in pixels."""

    height: int
    width: int


Least = Callable[[Shape], Shape]


def decode(content: bytes, channels: int, decoder: Decoder = "auto", least: Least | None = None) -> Tensor:
    """One picture of any usual format, upright.

    The EXIF orientation is applied (one that is not 2 to 8 means upright); 16-bit values are scaled to 8 bits;
    transparency is dropped; of an animation, the first frame is taken.

    Args:
        content: of the file.
        channels: 1 for grey, 3 for colour.
        decoder: auto takes simplejpeg where it is installed. It never changes the pixels.
        least: from the shape of the upright picture, the least that is needed of it: a JPEG may be decoded at 1/2,
            1/4 or 1/8 of its size, in both sides at least this, by scaling in its cosine transform: quicker for
            large photographs, at some loss (PSNR 28 dB at worst, against a full decode, once both are resized).
            Only by simplejpeg; None: whole.

    Returns:
        uint8 (channels, height, width); in memory, a pixel's channels may lie together (channels_last).

    Raises:
        PictureError: for what is truncated, not an image, too large to be one, or of float values.
        ConfigError: for a decoder that is not installed.
    """
    if decoder != "pil" and content.startswith(_JPEG):
        fast = _simplejpeg(required=decoder == "simplejpeg")
        if fast is not None and (pixels := _fast(fast, content, channels, least)) is not None:
            return pixels
    picture = decode_with_pil(content, channels)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def decode_with_pil(content: bytes, channels: int) -> Image.Image:
    """As `decode`, by PIL: an image of mode L (1 channel) or RGB.

    Raises:
        PictureError: as there.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _upright(_eight_bits(image, "L" if channels == 1 else "RGB"), _orientation(image))
    except Exception as error:  # decoders of damaged files raise anything
        raise PictureError(_reason(content, error)) from error


def from_pil(image: Image.Image, channels: int) -> Tensor:
    """A picture that PIL has opened, as `decode` would give it: uint8 (channels, height, width), upright.

    Raises:
        PictureError: for values that are no pixels of 8 or 16 bits.
    """
    try:
        image.load()
        picture = _upright(_eight_bits(image, "L" if channels == 1 else "RGB"), _orientation(image))
    except Exception as error:
        raise PictureError(_reason(b" ", error)) from error
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def shape_of(content: bytes) -> Shape:
    """Height and width of an upright picture, from its header alone.

    Raises:
        PictureError: for what has no header of a picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = _orientation(image) >= 5
            return Shape(*(image.size if turned else image.size[::-1]))
    except Exception as error:
        raise PictureError(_reason(content, error)) from error


def grey(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 in colour to (..., 1, H, W) grey, by PIL's formula (ITU-R 601-2)."""
    red, green, blue = pixels.int().unbind(-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)


@cache
def installed() -> Any | None:
    """The module simplejpeg; None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _simplejpeg(required: bool) -> Any | None:
    if (module := installed()) is None and required:
        raise ConfigError(
            "data.module.decoder=simplejpeg: is not installed; pip install -e '.[fast]', or auto"
        )
    return module


def _fast(module: Any, content: bytes, channels: int, least: Least | None) -> Tensor | None:
    """The pixels by simplejpeg; None for whatever is better left to PIL."""
    try:
        height, width, colors, _ = module.decode_jpeg_header(content)
        if height * width > (Image.MAX_IMAGE_PIXELS or 0) or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        orientation = _orientation_in(content)
        smaller = {}
        if least is not None:
            upright = orientation < 5
            needed = least(Shape(height, width) if upright else Shape(width, height))
            down, across = needed if upright else needed[::-1]
            parts = next((p for p in (8, 4, 2) if height >= p * down and width >= p * across), 1)
            if parts > 1:
                smaller = {"min_height": -(-height // parts), "min_width": -(-width // parts)}
        pixels = torch.from_numpy(
            module.decode_jpeg(content, "GRAY" if colors == "Gray" else "RGB", **smaller)
        ).permute(2, 0, 1)
    except (ValueError, PictureError):
        return None
    found = 1 if colors == "Gray" else 3
    if found < channels:
        pixels = pixels.expand(channels, -1, -1)
    elif found > channels:
        pixels = grey(pixels)
    return pixels if orientation == 1 else _turned(pixels, orientation)


def _orientation_in(jpeg: bytes) -> int:
    """As PIL reads it; asked only where there is a segment that may say it."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != _APP1:
        if jpeg[at + 1] == _START_OF_SCAN:
            return 1
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    with Image.open(io.BytesIO(jpeg)) as image:
        return _orientation(image)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """`_upright` of (C, H, W)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    sides = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return pixels.flip(sides) if sides else pixels


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its values are floats of unknown range; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are wider than 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, OverflowError, EOFError, struct.error):
        return 1  # a damaged EXIF block says nothing about the pixels
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    return image.transpose(method)
