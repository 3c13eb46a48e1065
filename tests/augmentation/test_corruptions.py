"""Corruptions: published settings, formulas in float64, one result for a picture whatever else is drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from augmentation.corruptions import CIFAR, COMMON, EXTRA, IMAGENET, SEVERITIES, corrupt

ALL = (*COMMON, *EXTRA)


def photograph(side: int, channels: int = 3) -> np.ndarray:
    """Something smooth with edges, (channels, side, side) uint8."""
    y, x = np.mgrid[:side, :side] / side
    planes = [
        0.5 + 0.35 * np.sin(5 * x + k) * np.cos(4 * y) + 0.15 * ((x - 0.5) ** 2 + y**2 < 0.2)
        for k in range(channels)
    ]
    return (np.stack(planes).clip(0, 1) * 255).astype(np.uint8)


def error(corrupted: np.ndarray, image: np.ndarray) -> float:
    return float(((corrupted.astype(np.float64) - image) ** 2).mean())


def test_there_are_the_fifteen_and_the_four_with_five_settings_each():
    assert (len(COMMON), len(EXTRA), SEVERITIES) == (15, 4, (1, 2, 3, 4, 5))
    for table in (IMAGENET, CIFAR):
        assert set(table) == set(ALL)
        assert all(len(settings) == 5 for settings in table.values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("side", "channels"), [(64, 3), (32, 3), (32, 1), (8, 1), (5, 3), (1, 1)])
def test_any_picture_keeps_its_shape_also_where_kernels_are_larger(name, side, channels):
    image = photograph(side, channels)[:, :, : max(side - 1, 1)]
    kept = image.copy()
    for severity in (1, 5):
        out = corrupt(image, name, severity, 3)
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        assert (image == kept).all()


@pytest.mark.parametrize(
    "name", sorted(set(ALL) - {"saturate", "elastic_transform", "glass_blur", "frost", "snow"})
)
@pytest.mark.parametrize("side", [96, 32])
def test_the_error_grows_with_the_severity(name, side):
    image = photograph(side)
    errors = [np.mean([error(corrupt(image, name, s, i), image) for i in range(4)]) for s in SEVERITIES]
    assert errors[-1] > errors[0]
    if name not in ("spatter", "motion_blur"):  # water becomes mud; a trail's direction is drawn
        assert np.all(np.diff(errors) > -0.05 * errors[-1])


def test_one_picture_suffers_the_same_whatever_else_is_drawn():
    image = photograph(32)
    for name in ALL:
        first = corrupt(image, name, 3, 7)
        corrupt(image, "gaussian_noise", 1, 0)
        assert (corrupt(image, name, 3, 7) == first).all()
    for name in ("gaussian_noise", "snow", "fog", "elastic_transform", "spatter"):
        assert (corrupt(image, name, 3, 8) != corrupt(image, name, 3, 7)).any()


def test_the_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy()
    for name in ALL:
        corrupt(photograph(32), name, 2, 1)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("side", "table"), [(128, IMAGENET), (32, CIFAR)])
def test_noise_has_the_published_size(severity, side, table):
    grey = np.full((3, side, side), 128, dtype=np.uint8)
    x = 128 / 255
    many = np.stack([corrupt(grey, "impulse_noise", severity, i) for i in range(8)])
    assert np.mean((many == 0) | (many == 255)) == pytest.approx(
        table["impulse_noise"][severity - 1], rel=0.15
    )
    if severity < 3 or side == 32:  # beyond, values are cut off at black and white
        sizes = {
            "gaussian_noise": table["gaussian_noise"][severity - 1],
            "shot_noise": (x / table["shot_noise"][severity - 1]) ** 0.5,
            "speckle_noise": x * table["speckle_noise"][severity - 1],
        }
        for name, sd in sizes.items():
            noisy = np.stack([corrupt(grey, name, severity, i) for i in range(8)])
            assert noisy.std() / 255 == pytest.approx(sd, rel=0.04), name


@pytest.mark.parametrize(("side", "table"), [(96, IMAGENET), (32, CIFAR)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_those_without_draws_equal_their_formulas(severity, side, table):
    image = photograph(side)
    x = image.astype(np.float64) / 255

    def bytes_of(values: np.ndarray) -> np.ndarray:
        return np.clip(values, 0, 1) * 255

    factor = table["contrast"][severity - 1]
    mean = x.mean(axis=(1, 2), keepdims=True)
    by = table["brightness"][severity - 1]
    value = x.max(axis=0)
    sigma = table["gaussian_blur"][severity - 1]
    expected = {
        "contrast": (x - mean) * factor + mean,
        "brightness": x * np.minimum(value + by, 1) / value,
        "gaussian_blur": ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest", truncate=4),
    }
    for name, values in expected.items():
        assert np.abs(corrupt(image, name, severity, 0) - bytes_of(values)).max() <= 1.01, name
    stream = io.BytesIO()
    picture = Image.fromarray(image.transpose(1, 2, 0))
    picture.save(stream, "JPEG", quality=table["jpeg_compression"][severity - 1])
    decoded = np.asarray(Image.open(stream)).transpose(2, 0, 1)
    assert (corrupt(image, "jpeg_compression", severity, 0) == decoded).all()
    fewer = int(side * table["pixelate"][severity - 1])
    blocks = picture.resize((fewer, fewer), Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
    assert (corrupt(image, "pixelate", severity, 0) == np.asarray(blocks).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_is_a_disk_of_the_published_radius(severity):
    point = np.zeros((1, 96, 96), dtype=np.uint8)
    point[0, 48, 48] = 255
    # what one pixel is spread over is read off a plane of its weights: a step that is blurred
    step = np.zeros((1, 96, 96), dtype=np.uint8)
    step[:, :, 48:] = 255
    profile = corrupt(step, "defocus_blur", severity, 0)[0, 48].astype(np.float64) / 255
    radius, alias = IMAGENET["defocus_blur"][severity - 1]
    at = np.arange(-11, 12)
    disk = (at[:, None] ** 2 + at[None] ** 2 <= radius**2).astype(np.float64)
    disk = ndimage.gaussian_filter(disk, alias, truncate=(1 if radius <= 8 else 2) / alias)
    disk /= disk.sum()
    column = disk.sum(axis=0)
    expected = np.convolve(step[0, 48] / 255, column, mode="same")
    assert np.abs(profile - expected)[20:76].max() < 0.02


def test_zoom_blur_is_the_mean_of_the_zooms():
    image = photograph(64)
    number, by = IMAGENET["zoom_blur"][4]
    x = image.astype(np.float64) / 255
    total = x.copy()
    for i in range(number):
        factor = 1 + by * i
        inner = int(np.ceil(64 / factor))
        first = (64 - inner) // 2
        zoomed = ndimage.zoom(
            x[:, first : first + inner, first : first + inner], (1, factor, factor), order=1
        )
        trim = (zoomed.shape[1] - 64) // 2
        total += zoomed[:, trim : trim + 64, trim : trim + 64]
    assert np.abs(corrupt(image, "zoom_blur", 5, 0) - total / (number + 1) * 255).max() < 1.5


def test_a_grey_picture_stays_grey_and_colour_is_what_saturate_changes():
    grey = photograph(32, 1)
    assert (corrupt(grey, "saturate", 5, 0) == grey).all()
    dull = corrupt(photograph(32), "saturate", 2, 0).astype(int)
    whole = photograph(32).astype(int)
    assert np.ptp(dull, axis=0).mean() < 0.2 * np.ptp(whole, axis=0).mean()
