"""The corruptions of ImageNet-C and CIFAR-10-C: what a picture may have to suffer, in five severities.

Hendrycks and Dietterich, arXiv 1903.12261. Lengths, strengths and the order of operations are those with which the
published files were made (github.com/hendrycks/robustness, ImageNet-C/create_c); the code is our own, in NumPy,
SciPy and Pillow. What it cannot have from there:

- frost lays one of six photographs over the picture; here it is one of five drawn textures. Its numbers differ from
  those of ready ImageNet-C files.
- random draws are other ones (keyed by corruption, severity and the sample's number), distances in spatter are
  Euclidean instead of a 5x5 mask's, and affine maps are interpolated exactly instead of in 1/32 pixels.
- published ImageNet-C files are JPEGs of quality 85; here the pixels go to the network as they come out.

Pictures whose shorter side is below 64 pixels get CIFAR-10-C's settings, all others ImageNet-C's. Lengths in pixels
are not scaled with the picture: what is a slight blur at 32 pixels is a strong one at 8. Those that the source ties
to the side (elastic, zoom, pixelate) are relative here too. A kernel may be larger than the picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal

from crucible.keyed import stream_key

VERSION = 1  # of the pixels: raised where a corruption comes out differently
COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
SMALL_BELOW = 64  # pixels of the shorter side

Floats = NDArray[Any]  # float32, or float64 on the way
Random = np.random.RandomState  # its streams are frozen over NumPy's versions

# settings by severity; the meaning of each stands with the function of that name
IMAGENET: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}  # fmt: skip
CIFAR: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}  # fmt: skip


def corrupt(image: NDArray[np.uint8], name: str, severity: int, index: int) -> NDArray[np.uint8]:
    """One picture corrupted: the same for one corruption, severity and sample, whatever else is drawn.

    Args:
        image: (C, H, W) uint8, C 1 or 3.
        name: of `COMMON` or `EXTRA`.
        severity: 1 to 5.
        index: the sample's number.

    Returns:
        uint8 of the same shape. Saturation of a grey picture is undefined; it comes back as it is.
    """
    small = min(image.shape[1:]) < SMALL_BELOW
    setting = (CIFAR if small else IMAGENET)[name][severity - 1]
    key = stream_key("corruption", name, severity, index)
    random = _random()
    random.seed(np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint32))
    values = np.ascontiguousarray(image.transpose(1, 2, 0), dtype=np.float32) / np.float32(255)
    changed = _FUNCTIONS[name](values, setting, random, small)
    return np.ascontiguousarray(_bytes(changed).transpose(2, 0, 1))


@lru_cache(maxsize=1)
def _random() -> Random:
    """This process's generator, seeded anew for each picture: to make one costs as much as 30 seedings."""
    return Random()


def prepare(name: str, height: int, width: int) -> None:
    """Make what all pictures of a size share, so that a loader's workers find it when they are forked."""
    if name == "frost":
        side, small = _frost_side(height, width)
        for number in range(_FROSTS):
            _frost_texture(number, side, small)


def _bytes(values: Floats) -> NDArray[np.uint8]:
    """0 to 1 as 0 to 255, cut off as in the source, but not where only float32 is short of a whole number."""
    return (np.clip(values, 0, 1) * 255 + 1e-3).astype(np.uint8)


# Operations that several share. Whatever acts on rows and columns alike is a matrix, made once for each length.


@lru_cache(maxsize=256)
def _smoothing(length: int, sigma: float, truncate: float, mode: str) -> Floats:
    """A Gaussian filter along an axis of `length`, as a matrix."""
    identity = np.eye(length)
    return ndimage.gaussian_filter1d(identity, sigma, axis=0, mode=mode, truncate=truncate).astype(np.float32)


def _gaussian(x: Floats, sigma: float, truncate: float = 4.0, mode: str = "nearest") -> Floats:
    """(H, W) or (H, W, C) smoothed; sigma in pixels."""
    rows, columns = (_smoothing(n, float(sigma), truncate, mode) for n in x.shape[:2])
    return _along_both(x, rows, columns)


def _along_both(x: Floats, rows: Floats, columns: Floats) -> Floats:
    """`rows @ x @ columns.T` for each channel."""
    vertical: Any = (rows @ x.reshape(len(x), -1)).reshape(len(rows), *x.shape[1:])
    both: Floats = columns @ vertical if x.ndim == 3 else vertical @ columns.T
    return both


@lru_cache(maxsize=512)
def _zooming(length: int, factor: float) -> Floats:
    """A zoom about the middle of an axis by `factor` >= 1 with linear interpolation, as a matrix (length, length)."""
    inner = int(np.ceil(length / factor))
    first = (length - inner) // 2
    large = max(round(inner * factor), length)
    place = np.arange(length) + (large - length) // 2
    place = np.minimum(place * ((inner - 1) / max(large - 1, 1)), inner - 1)
    left = np.minimum(place.astype(int), max(inner - 2, 0))
    share = (place - left).astype(np.float32)
    matrix = np.zeros((length, length), dtype=np.float32)
    row = np.arange(length)
    np.add.at(matrix, (row, first + left), 1 - share)
    np.add.at(matrix, (row, first + np.minimum(left + 1, inner - 1)), share)
    return matrix


def _zoomed(x: Floats, factor: float) -> Floats:
    return _along_both(x, *(_zooming(n, float(factor)) for n in x.shape[:2]))


def _streaked(x: Floats, radius: float, sigma: float, degrees: float) -> Floats:
    """Motion blur as ImageMagick's: each pixel the mean of a trail of 2 radius + 1 pixels, its weights half a Gaussian.

    Args:
        x: (H, W) or (H, W, C); beyond its edges, the edge goes on.
        radius: of the trail, in pixels.
        sigma: of the weights, in pixels.
        degrees: the trail's direction, 0 to the right, 90 down.
    """
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    angle = np.deg2rad(degrees)
    down, right = (np.ceil(steps * f(angle) - 0.5).astype(int) for f in (np.sin, np.cos))
    height, width = x.shape[:2]
    reach = int(max(np.abs(down).max(), np.abs(right).max()))
    padded = np.pad(x, ((reach, reach), (reach, reach), *((0, 0),) * (x.ndim - 2)), mode="edge")
    out = np.zeros_like(x)
    for weight, dy, dx in zip(
        weights.tolist(), (down + reach).tolist(), (right + reach).tolist(), strict=True
    ):
        out += np.float32(weight) * padded[dy : dy + height, dx : dx + width]
    return out


@lru_cache(maxsize=32)
def _disk(radius: float, alias: float) -> Floats:
    """A disk of `radius` pixels that sums to 1, then its edge softened by a Gaussian of sigma `alias`."""
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at[None, :] ** 2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    taps = np.exp(-(np.arange(-(size // 2), size // 2 + 1) ** 2) / (2 * alias**2))
    taps /= taps.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps, axis=axis, mode="mirror")
    used = np.abs(at[disk.any(axis=0)]).max()
    return disk[reach - used : reach + used + 1, reach - used : reach + used + 1].astype(np.float32)


def _plasma(side: int, decay: float, random: Random) -> Floats:
    """A height map of clouds by midpoint displacement (diamond-square) on a torus, from 0 to 1.

    Args:
        side: a power of two.
        decay: by how much the displacement falls from one level to the next.
        random: draws the displacements.
    """
    heights = np.zeros((side, side))
    spread, step = 100.0, side
    while step >= 2:
        half = step // 2

        def shifted(mean: NDArray[np.float64], spread: float = spread) -> NDArray[np.float64]:
            return mean + spread * random.uniform(-spread, spread, mean.shape)

        corners = heights[::step, ::step]
        beside = corners + np.roll(corners, -1, axis=1)
        centres = shifted((beside + np.roll(beside, -1, axis=0)) / 4)
        heights[half::step, half::step] = centres
        above = centres + np.roll(centres, 1, axis=0)
        heights[::step, half::step] = shifted((above + beside) / 4)
        left, down = centres + np.roll(centres, 1, axis=1), corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = shifted((left + down) / 4)
        spread, step = spread / decay, half
    heights -= heights.min()
    return (heights / max(heights.max(), 1e-12)).astype(np.float32)


def _power_of_two(length: int) -> int:
    return 1 << max(length - 1, 1).bit_length()


def _grey(x: Floats) -> Floats:
    """(H, W, 1) luminance (ITU-R 601-2)."""
    return x if x.shape[2] == 1 else (x @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def _paint(levels: tuple[int, int, int], channels: int) -> Floats:
    """A colour, 0 to 255, for pictures of so many channels; (1, 1, C)."""
    colour = np.array(levels, dtype=np.float32).reshape(1, 1, 3) / np.float32(255)
    return _grey(colour) if channels == 1 else colour


# The corruptions: (H, W, C) float32 from 0 to 1, the setting, the draws, and whether the picture is a small one


def _gaussian_noise(x: Floats, sd: float, random: Random, small: bool) -> Floats:
    return x + random.normal(scale=sd, size=x.shape).astype(np.float32)


def _shot_noise(x: Floats, photons: float, random: Random, small: bool) -> Floats:
    """`photons`: so many make white."""
    return (random.poisson(x * photons) / photons).astype(np.float32)


def _impulse_noise(x: Floats, share: float, random: Random, small: bool) -> Floats:
    """Salt and pepper on a `share` of the values."""
    hit, salt = random.uniform(size=x.shape) < share, random.uniform(size=x.shape) < 0.5
    return np.where(hit, salt.astype(np.float32), x)


def _speckle_noise(x: Floats, sd: float, random: Random, small: bool) -> Floats:
    return x + x * random.normal(scale=sd, size=x.shape).astype(np.float32)


def _gaussian_blur(x: Floats, sigma: float, random: Random, small: bool) -> Floats:
    return _gaussian(x, sigma)


def _defocus_blur(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(radius, sigma of its soft edge)."""
    kernel = _disk(*setting)
    reach = len(kernel) // 2
    padded = np.pad(
        x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect" if min(x.shape[:2]) > 1 else "edge"
    )
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)).astype(np.float32)


def _glass_blur(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(sigma, distance, rounds): blurred, each pixel taken from a near one, blurred again.

    Pixel after pixel from the lower right takes over what its neighbour has by then. The source means to exchange
    the two, but its assignment of views copies: the published files are copies, and so are these.
    """
    sigma, distance, rounds = setting
    height, width, _ = x.shape
    blurred = _bytes(_gaussian(x, sigma)).reshape(height * width, -1)
    row, column = np.arange(height - distance, distance, -1), np.arange(width - distance, distance, -1)
    if not len(row) or not len(column):
        return _gaussian(_gaussian(x, sigma), sigma)  # too small a picture to move anything in
    at = np.add.outer(row * width, column)
    source = list(range(height * width))
    for _ in range(rounds):
        moved = random.randint(-distance, distance, size=(2, *at.shape))
        near = at + moved[0] * width + moved[1]
        for here, there in zip(at.ravel().tolist(), near.ravel().tolist(), strict=True):
            source[here] = source[there]
    return _gaussian(blurred[source].reshape(x.shape).astype(np.float32) / np.float32(255), sigma)


def _motion_blur(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(radius, sigma) of the trail."""
    radius, sigma = setting
    return _streaked(x, radius, sigma, random.uniform(-45, 45))


def _zoom_blur(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(number, step): the mean of the picture and of so many zooms from 1 on."""
    number, step = setting
    total = x.copy()
    for i in range(number):
        total += _zoomed(x, 1 + i * step)
    return total / (number + 1)


def _snow(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(mean, sd, zoom and threshold of the flakes, radius and sigma of their fall, how much colour is left)."""
    mean, sd, zoom, threshold, radius, sigma, kept = setting
    flakes = _zoomed(random.normal(mean, sd, size=x.shape[:2]).astype(np.float32), zoom)
    flakes = _bytes(np.where(flakes < threshold, 0, flakes)).astype(np.float32)
    flakes = np.round(_streaked(flakes, radius, sigma, random.uniform(-135, -45)))[..., None] / np.float32(
        255
    )
    bleached = kept * x + (1 - kept) * np.maximum(x, _grey(x) * 1.5 + 0.5)
    return bleached + flakes + flakes[::-1, ::-1]


_FROSTS = 5  # the source draws from five of its six photographs


def _frost_side(height: int, width: int) -> tuple[int, bool]:
    """The side of the textures that pictures are covered from, and whether they are shrunk for small pictures."""
    longer = max(height, width)
    return max(512, 2 * _power_of_two(longer)), min(height, width) < SMALL_BELOW and longer <= 64


@lru_cache(maxsize=2 * _FROSTS)
def _frost_texture(number: int, side: int, small: bool) -> Floats:
    """(side, side, 3) ice on a dark pane: clouds and needles in a bluish white; drawn, no photograph.

    For small pictures a quarter of the side: the source shrinks its photographs to a fifth.
    """
    random = Random(number)
    clouds = _plasma(side, 1.8, random)
    needles = np.zeros((side, side), dtype=np.float32)
    for _ in range(6):
        seeds = (random.uniform(size=needles.shape) > 0.997).astype(np.float32)
        needles = np.maximum(needles, _streaked(seeds, 16, 12, random.uniform(0, 360)))
    needles = np.clip(needles / np.quantile(needles, 0.98), 0, 1)
    texture = np.clip(clouds * (0.75 + 0.55 * needles), 0, 1)[..., None] * _paint((205, 228, 255), 3)
    if small:
        texture = texture.reshape(side // 4, 4, side // 4, 4, 3).mean(axis=(1, 3))
    return texture


def _frost(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(weight of the picture, weight of the ice)."""
    height, width, channels = x.shape
    texture = _frost_texture(random.randint(_FROSTS), *_frost_side(height, width))
    top, left = (random.randint(len(texture) - n) for n in (height, width))
    ice = texture[top : top + height, left : left + width]
    return setting[0] * x + setting[1] * (_grey(ice) if channels == 1 else ice)


def _fog(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(thickness, decay of the clouds' structure)."""
    thickness, decay = setting
    brightest = float(x.max())
    clouds = _plasma(_power_of_two(max(x.shape[:2])), decay, random)[: x.shape[0], : x.shape[1], None]
    return (x + thickness * clouds) * (brightest / (brightest + thickness))


def _brightness(x: Floats, by: float, random: Random, small: bool) -> Floats:
    """Value (of hue, saturation, value) raised."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + by, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _saturate(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(factor, offset) of the saturation. A grey pixel has hue 0, as in the source: an offset turns it red."""
    if x.shape[2] == 1:
        return x
    factor, offset = setting
    value = x.max(axis=2, keepdims=True)
    below = value - x
    saturation = below.max(axis=2, keepdims=True) / np.where(value > 0, value, 1)
    changed = np.clip(saturation * factor + offset, 0, 1)
    red = np.array([0, 1, 1], dtype=np.float32)
    coloured = saturation > 0
    return value - np.where(
        coloured, below * (changed / np.where(coloured, saturation, 1)), value * changed * red
    )


def _contrast(x: Floats, factor: float, random: Random, small: bool) -> Floats:
    """`factor` about each channel's mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(strength and smoothness of the displacement, strength of the affine map), as shares of the side.

    The source's side of ImageNet is 244 where it should be 224, which stays so.
    """
    height, width = x.shape[:2]
    side = min(height, width) * (1 if small else 244 / 224)
    strength, sigma, jitter = (c * side for c in setting)
    middle, reach = np.array([height // 2, width // 2]), max(min(height, width) // 3, 1)
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + random.uniform(-jitter, jitter, size=(3, 2))
    # where each pixel comes from: (x, y, 1) of the moved corners to the corners themselves
    back = np.linalg.lstsq(np.c_[moved, np.ones(3)], corners.astype(np.float64), rcond=None)[0]
    down, right = np.mgrid[:height, :width].astype(np.float64)
    from_right, from_down = (back[0, i] * right + back[1, i] * down + back[2, i] for i in (0, 1))
    x = _sampled(x, from_down, from_right, "mirror")
    fields = random.uniform(-1, 1, size=(2, height, width)).astype(np.float32)
    dx, dy = (strength * _gaussian(f, sigma, 3.0, "reflect") for f in fields) if sigma else (0.0, 0.0)
    return _sampled(x, down + dy, right + dx, "reflect")


def _sampled(x: Floats, down: Any, right: Any, mode: str) -> Floats:
    """Each channel at the places (H, W), linearly interpolated."""
    channels = [ndimage.map_coordinates(c, (down, right), order=1, mode=mode) for c in np.moveaxis(x, 2, 0)]
    return np.stack(channels, axis=2)


def _picture(x: Floats) -> Image.Image:
    values = np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if x.shape[2] == 1 else values)


def _of_picture(picture: Image.Image) -> Floats:
    values: Floats = np.asarray(picture, dtype=np.float32) / np.float32(255)
    return values if values.ndim == 3 else values[..., None]


def _pixelate(x: Floats, share: float, random: Random, small: bool) -> Floats:
    """Shrunk to a `share` of the side and blown up again."""
    height, width, _ = x.shape
    fewer = (max(int(width * share), 1), max(int(height * share), 1))
    shrunk = _picture(x).resize(fewer, Image.Resampling.BOX)
    return _of_picture(shrunk.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(x: Floats, quality: int, random: Random, small: bool) -> Floats:
    stream = io.BytesIO()
    _picture(x).save(stream, "JPEG", quality=quality)
    return _of_picture(Image.open(stream))


def _spatter(x: Floats, setting: Any, random: Random, small: bool) -> Floats:
    """(mean, sd and smoothness of the liquid, its threshold, strength or smoothness of the drops, 0 water or 1 mud)."""
    mean, sd, sigma, threshold, drops, mud = setting
    liquid = _gaussian(random.normal(mean, sd, size=x.shape[:2]).astype(np.float32), sigma)
    liquid = np.where(liquid < threshold, 0, liquid)
    if mud:
        cover = _gaussian((liquid > threshold).astype(np.float32), drops)
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return x * (1 - cover) + _paint((63, 42, 20), x.shape[2]) * cover
    water = _relief(_bytes(liquid))
    water = water / max(float(water.max()), 1e-12) * drops
    return x + water[..., None] * _paint((175, 238, 238), x.shape[2])


def _relief(liquid: NDArray[np.uint8]) -> Floats:
    """How much drops shine, given how much liquid there is: embossed by the distance to their edges, (H, W)."""
    edges = _edges(liquid.astype(np.float32), 50, 150)
    distance = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(liquid.shape, 20.0)
    distance = ndimage.uniform_filter(np.minimum(distance, 20), 3, mode="mirror").astype(np.uint8)
    embossed = ndimage.correlate(
        _equalized(distance).astype(np.int32), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror"
    )
    shine = np.round(ndimage.uniform_filter(np.clip(embossed, 0, 255).astype(np.float32), 3, mode="mirror"))
    return liquid.astype(np.float32) * shine


def _equalized(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every level equally frequent, as far as may be; values of one level stay."""
    counts = np.bincount(values.ravel(), minlength=256)
    lowest = counts[values.min()]
    if lowest == values.size:
        return values
    return (
        np.round((np.cumsum(counts) - lowest) * (255 / (values.size - lowest)))
        .clip(0, 255)
        .astype(np.uint8)[values]
    )


def _edges(values: Floats, low: float, high: float) -> NDArray[np.bool_]:
    """Canny's edges of (H, W) levels: ridges of the Sobel gradient (L1) above `low` that hang on one above `high`."""
    dx, dy = (ndimage.sobel(values, axis=axis, mode="nearest") for axis in (1, 0))
    strength = np.abs(dx) + np.abs(dy)
    padded = np.pad(strength, 1)
    height, width = values.shape

    def beside(down: int, right: int) -> Floats:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    slope = np.abs(dy) / np.maximum(np.abs(dx), 1e-12)
    level, steep = slope < np.tan(np.pi / 8), slope > np.tan(3 * np.pi / 8)
    falling = dx * dy >= 0
    before = np.select([level, steep, falling], [beside(0, -1), beside(-1, 0), beside(-1, -1)], beside(-1, 1))
    after = np.select([level, steep, falling], [beside(0, 1), beside(1, 0), beside(1, 1)], beside(1, -1))
    ridge = (strength > before) & (strength >= after) & (strength > low)
    parts, _ = ndimage.label(ridge, structure=np.ones((3, 3)))
    strong = np.unique(parts[ridge & (strength > high)])
    return np.isin(parts, strong[strong > 0])


_FUNCTIONS: dict[str, Callable[[Floats, Any, Random, bool], Floats]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur, "glass_blur": _glass_blur, "motion_blur": _motion_blur, "zoom_blur": _zoom_blur,
    "snow": _snow, "frost": _frost, "fog": _fog, "brightness": _brightness, "contrast": _contrast,
    "elastic_transform": _elastic_transform, "pixelate": _pixelate, "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise, "gaussian_blur": _gaussian_blur, "spatter": _spatter, "saturate": _saturate,
}  # fmt: skip
