"""The corruptions: their published settings, independent formulas, and what holds of any picture."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from augmentation import corruptions as c
from augmentation.corruptions import COMMON, EXTRA, SEVERITIES, corrupt

ALL = (*COMMON, *EXTRA)


def picture(side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Soft blobs with some detail: (C, side, side) uint8."""
    noise = np.random.default_rng(seed).uniform(size=(channels, side, side))
    smooth = ndimage.gaussian_filter(noise, (0, side / 16, side / 16), mode="wrap")
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return np.round(255 * (0.1 + 0.7 * smooth + 0.1 * noise)).astype(np.uint8)


def as_floats(image: np.ndarray) -> np.ndarray:
    return image.transpose(1, 2, 0) / 255.0


def close(result: np.ndarray, expected: np.ndarray, levels: int = 1) -> bool:
    """Within so many levels of (H, W, C) floats, which are cut off to whole ones."""
    values = np.clip(expected, 0, 1) * 255
    return bool((np.abs(result.transpose(1, 2, 0) - values) <= levels + 1e-3).all())


# The tables, written once more from the source (make_imagenet_c.py, make_cifar_c.py): a typing error shows here.
PUBLISHED = {
    "gaussian_noise": ([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10]),
    "shot_noise": ([60, 25, 12, 5, 3], [500, 250, 100, 75, 50]),
    "impulse_noise": ([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),
    "speckle_noise": ([0.15, 0.2, 0.35, 0.45, 0.6], [0.06, 0.1, 0.12, 0.16, 0.2]),
    "gaussian_blur": ([1, 2, 3, 4, 6], [0.4, 0.6, 0.7, 0.8, 1]),
    "glass_blur": (
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    ),
    "defocus_blur": (
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)], [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    ),
    "motion_blur": (
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)], [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    ),
    "fog": (
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    ),
    "frost": (
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    ),
    "contrast": ([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),
    "brightness": ([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),
    "saturate": (
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)], [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    ),
    "jpeg_compression": ([25, 18, 15, 10, 7], [80, 65, 58, 50, 40]),
    "pixelate": ([0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65]),
    "snow": (
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "spatter": (
        [
            (0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1),
        ],
        [
            (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ],
    ),
    "elastic_transform": (
        [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
}  # fmt: skip
ZOOMS = (
    [(1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)],
    [(1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)],
)


def test_the_settings_are_the_published_ones() -> None:
    assert len(COMMON) == 15 and len(EXTRA) == 4
    assert set(c.IMAGENET) == set(c.CIFAR) == set(ALL) == {*PUBLISHED, "zoom_blur"}
    for name, tables in PUBLISHED.items():
        assert (list(c.IMAGENET[name]), list(c.CIFAR[name])) == tables, name
    for table, published in zip((c.IMAGENET, c.CIFAR), ZOOMS, strict=True):
        for (number, step), zooms in zip(table["zoom_blur"], published, strict=True):
            assert 1 + np.arange(number) * step == pytest.approx(np.arange(*zooms))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 1, 1), (3, 3, 40), (1, 70, 64)])
@pytest.mark.parametrize("name", ALL)
def test_any_picture_comes_back_in_its_shape_and_the_same_each_time(
    name: str, shape: tuple[int, ...]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    for severity in (1, 5):
        result = corrupt(image, name, severity, 7)
        assert result.shape == shape and result.dtype == np.uint8
        assert (image == before).all(), "the picture handed in is left alone"
        assert (corrupt(image, name, severity, 7) == result).all()


@pytest.mark.parametrize("name", ALL)
def test_black_and_white_pictures_do_not_break_it(name: str) -> None:
    for level in (0, 255):
        for severity in SEVERITIES:
            assert corrupt(np.full((3, 32, 32), level, np.uint8), name, severity, 0).shape == (3, 32, 32)


DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
         "fog", "elastic_transform", "spatter")  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_draws_differ_from_sample_to_sample_and_from_severity_to_severity(name: str) -> None:
    image = picture(32)
    assert (corrupt(image, name, 3, 0) != corrupt(image, name, 3, 1)).any()


# Where the source's own settings rise in strength, so does the error. Elsewhere (glass, elastic, frost, saturate,
# spatter) each severity trades one parameter against another.
@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur",
                                  "gaussian_blur", "motion_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                                  "jpeg_compression", "snow", "fog"])  # fmt: skip
def test_the_error_grows_with_severity(name: str) -> None:
    images = [picture(32, seed=i) for i in range(24)]
    errors = [
        np.mean([((corrupt(x, name, s, i).astype(float) - x) ** 2).mean() for i, x in enumerate(images)])
        for s in SEVERITIES
    ]
    assert errors[-1] > errors[0] > 0
    if name != "pixelate":  # whose blocks fit a picture of 32 pixels better or worse
        assert errors == sorted(errors), errors


def test_noise_has_the_published_moments() -> None:
    image = np.full((3, 128, 128), 128, np.uint8)
    x = 128 / 255
    for severity, (sd, photons, share) in enumerate(zip(*(PUBLISHED[n][0] for n in ("gaussian_noise", "shot_noise",
                                                    "impulse_noise")), strict=True), start=1):  # fmt: skip
        if severity > 2:
            continue  # beyond, values are clipped
        result = corrupt(image, "gaussian_noise", severity, 0) / 255
        assert result.std() == pytest.approx(sd, rel=0.03) and result.mean() == pytest.approx(x, abs=0.005)
        assert (corrupt(image, "shot_noise", severity, 0) / 255).std() == pytest.approx(
            np.sqrt(x / photons), rel=0.05
        )
        hit = corrupt(image, "impulse_noise", severity, 0)
        assert (hit != 128).mean() == pytest.approx(share, rel=0.1)
        assert set(np.unique(hit)) == {0, 128, 255} and (hit == 255).mean() == pytest.approx(
            share / 2, rel=0.15
        )
    speckle = corrupt(image, "speckle_noise", 1, 0) / 255
    assert speckle.std() == pytest.approx(0.15 * x, rel=0.03)


@pytest.mark.parametrize("side", [32, 96])
def test_blurs_are_scipys(side: int) -> None:
    image, table = picture(side), c.CIFAR if side < 64 else c.IMAGENET
    x = as_floats(image)
    for severity in SEVERITIES:
        sigma = table["gaussian_blur"][severity - 1]
        expected = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)
        assert close(corrupt(image, "gaussian_blur", severity, 0), expected)
        radius, alias = table["defocus_blur"][severity - 1]
        grid = max(8, int(radius))  # the source's, beyond which the soft edge does not go
        at, reach = np.arange(-grid, grid + 1), 1 if radius <= 8 else 2
        disk = (at[:, None] ** 2 + at[None, :] ** 2 <= radius**2).astype(float)
        taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * alias**2))
        kernel = ndimage.correlate(disk / disk.sum(), np.outer(taps, taps) / taps.sum() ** 2, mode="mirror")
        expected = ndimage.correlate(x, kernel[..., None], mode="mirror")
        assert close(corrupt(image, "defocus_blur", severity, 0), expected)
        total, (number, step) = x.copy(), table["zoom_blur"][severity - 1]
        for factor in 1 + np.arange(number) * step:
            inner = int(np.ceil(side / factor))
            top = (side - inner) // 2
            zoomed = ndimage.zoom(x[top : top + inner, top : top + inner], (factor, factor, 1), order=1)
            trim = (len(zoomed) - side) // 2
            total += zoomed[trim : trim + side, trim : trim + side]
        assert close(corrupt(image, "zoom_blur", severity, 0), total / (number + 1))


def test_motion_blur_is_a_trail_of_half_a_gaussian() -> None:
    spot = np.zeros((41, 41), np.float32)
    spot[20, 20] = 1
    trail = c._streaked(spot, 6, 2, 0)
    weights = np.exp(-(np.arange(13) ** 2) / 8)
    assert trail[20, 8:21] == pytest.approx((weights / weights.sum())[::-1], abs=1e-6), (
        "the source lies to the right"
    )
    assert trail[20].sum() == pytest.approx(1) and trail.sum() == pytest.approx(1)
    down = c._streaked(spot, 6, 2, 90)
    assert down == pytest.approx(trail.T)


def test_brightness_and_saturation_are_those_of_hue_saturation_value() -> None:
    image = picture(32)
    image[:, 0, 0], image[:, 0, 1] = 0, 90  # black and grey
    for severity in SEVERITIES:
        expected, coloured = np.empty((2, 32, 32, 3))
        by, (factor, offset) = c.CIFAR["brightness"][severity - 1], c.CIFAR["saturate"][severity - 1]
        for place in np.ndindex(32, 32):
            h, s, v = colorsys.rgb_to_hsv(*as_floats(image)[place])
            expected[place] = colorsys.hsv_to_rgb(h, s, min(v + by, 1))
            coloured[place] = colorsys.hsv_to_rgb(h, min(max(s * factor + offset, 0), 1), v)
        assert close(corrupt(image, "brightness", severity, 0), expected)
        assert close(corrupt(image, "saturate", severity, 0), coloured)
    grey = picture(32, channels=1)
    assert (corrupt(grey, "saturate", 5, 0) == grey).all(), "undefined for grey pictures: left as they are"


def test_contrast_jpeg_and_pixelate_are_their_formulas() -> None:
    image = picture(96)
    x, mean = as_floats(image), as_floats(image).mean(axis=(0, 1))
    shown = Image.fromarray(image.transpose(1, 2, 0))
    for severity in SEVERITIES:
        factor = PUBLISHED["contrast"][0][severity - 1]
        assert close(corrupt(image, "contrast", severity, 0), (x - mean) * factor + mean)
        stream = io.BytesIO()
        shown.save(stream, "JPEG", quality=PUBLISHED["jpeg_compression"][0][severity - 1])
        expected = np.asarray(Image.open(stream)).transpose(2, 0, 1)
        assert (corrupt(image, "jpeg_compression", severity, 0) == expected).all()
        fewer = int(96 * PUBLISHED["pixelate"][0][severity - 1])
        small = shown.resize((fewer, fewer), Image.Resampling.BOX).resize((96, 96), Image.Resampling.BOX)
        assert (corrupt(image, "pixelate", severity, 0) == np.asarray(small).transpose(2, 0, 1)).all()


def test_glass_moves_each_pixel_by_no_more_than_its_distance_and_rounds() -> None:
    """At a sigma that blurs nothing, every pixel is one of the picture's, and its copy is near."""
    places = np.arange(32 * 32).reshape(32, 32)
    image = np.stack([places >> 8, places & 255, np.zeros_like(places)]).astype(np.uint8)
    moved = corrupt(image, "glass_blur", 1, 0).astype(int)  # sigma 0.05
    found = (moved[0] << 8) + moved[1]
    down, right = found // 32 - places // 32, found % 32 - places % 32
    assert set(np.unique(right)) == {-1, 0} and set(np.unique(down)) == {-1, 0}
    assert (found[:2] == places[:2]).all() and (found[:, :2] == places[:, :2]).all(), "a margin stays"


def test_fog_is_between_the_picture_and_white_and_its_clouds_fill_their_range() -> None:
    clouds = c._plasma(64, 2.0, np.random.RandomState(0))
    assert clouds.shape == (64, 64) and (clouds.min(), clouds.max()) == (0, 1)
    steep, soft = (np.abs(np.diff(c._plasma(64, d, np.random.RandomState(1)))).mean() for d in (1.4, 3.0))
    assert steep > 2 * soft, "the slower the displacement falls, the rougher the clouds"
    black = np.zeros((3, 32, 32), np.uint8)
    assert not corrupt(black, "fog", 5, 0).any(), "as in the source: fog is as bright as the brightest pixel"


def test_frost_covers_with_ice_by_the_published_weights() -> None:
    for side in (32, 96):
        weights = (c.CIFAR if side < 64 else c.IMAGENET)["frost"]
        for severity in (1, 5):
            kept, ice = weights[severity - 1]
            covered = corrupt(np.zeros((3, side, side), np.uint8), "frost", severity, 3) / 255
            assert 0 < covered.max() <= ice + 1e-6
            level = corrupt(np.full((3, side, side), 60, np.uint8), "frost", severity, 3) / 255
            assert level == pytest.approx(np.minimum(covered + kept * 60 / 255, 1), abs=2 / 255)


def test_an_elastic_map_without_strength_is_the_picture_and_a_shift_is_a_shift() -> None:
    image = as_floats(picture(32)).astype(np.float32)
    down, right = np.mgrid[:32, :32].astype(float)
    assert c._sampled(image, down, right, "reflect") == pytest.approx(image, abs=1e-6)
    still = c._elastic_transform(image, (0, 0, 0), np.random.RandomState(0), True)
    assert still == pytest.approx(image, abs=1e-5)


def test_spatter_is_pale_turquoise_water_then_brown_mud() -> None:
    black, white = np.zeros((3, 96, 96), np.uint8), np.full((3, 96, 96), 255, np.uint8)
    water = corrupt(black, "spatter", 2, 0)
    wet = water.sum(axis=0) > 60
    assert wet.any() and water[1][wet] == pytest.approx(water[2][wet]) and (water[0] <= water[1]).all()
    assert (water[0][wet] / water[1][wet]).mean() == pytest.approx(175 / 238, abs=0.01)
    mud = corrupt(white, "spatter", 5, 0)
    darkest = mud.reshape(3, -1)[:, mud.sum(axis=0).argmin()]
    assert darkest == pytest.approx([63, 42, 20], abs=45) and (mud == 255).any()


def test_edges_are_those_of_a_square() -> None:
    square = np.zeros((20, 20), np.float32)
    square[6:14, 6:14] = 200
    edges = c._edges(square, 50, 150)
    assert not edges[9:11, 9:11].any() and not edges[:4].any()
    assert edges[8:12, 5:7].any(axis=1).all() and edges[5:7, 8:12].any(axis=0).all()
    assert not c._edges(np.full((5, 5), 7.0, np.float32), 50, 150).any()
