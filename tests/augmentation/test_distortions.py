"""Distortions against torchvision's functions, one image at a time, and against the papers' distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2F

from augmentation.distortions import (
    ATTEMPTS,
    Distort,
    Distortions,
    adjust_colors,
    erase,
    erased_boxes,
    keyed_noise,
    rotate,
)
from crucible.batch import Batch
from crucible.keyed import keyed_uniform, stream_key, visits
from crucible.options import ConfigError, read_options
from crucible.technique import Setting, Step, assemble

EACH = [
    Distort(cutout_size=6),
    Distort(random_erasing=0.9),
    Distort(random_rotation=30),
    Distort(color_jitter=0.4),
]
ALL = Distort(cutout_size=6, random_erasing=0.9, random_rotation=30, color_jitter=0.4)
KEY = stream_key(0, "distortions", 3)


def names(options: Distort) -> str:
    return "+".join(name for name, value in vars(options).items() if value)


def pictures(n: int = 8, channels: int = 3, size: tuple[int, int] = (16, 20)) -> torch.Tensor:
    """uint8, smooth enough that colours and positions matter."""
    generator = torch.Generator().manual_seed(n)
    coarse = torch.rand(n, channels, 5, 5, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") * 255).round().byte()


def floats(n: int = 8, channels: int = 3, size: tuple[int, int] = (16, 20)) -> torch.Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(n))


class Parts:
    """What the technique adds to the stages before and after the policy; `None` of a stage that it leaves alone."""

    def __init__(self, step: Step) -> None:
        for name, stages in (("before", step.raw), ("after", step.batch)):
            assert [(s.stream, s.per) for s in stages] in ([], [("distortions", "sample")])
            setattr(self, name, self._part(stages[0].change) if stages else lambda input, index, key: input)

    def _part(self, change):
        return lambda input, index, key: change(Batch(input, index, index), key).input


def build_distortions(options: Distort, input_dim: int, input_channels: int) -> Parts | None:
    step = assemble({Distort: options}, Setting("", 0, input_dim, input_channels), torch.nn.Identity())
    return Parts(step) if step.raw or step.batch else None


def check_distortions(options: Distort, data: dict) -> None:
    assemble({Distort: options}, Setting(data=data), torch.nn.Identity())


def distort(options: Distort, image: torch.Tensor, index: torch.Tensor, key: int = KEY):
    """Both parts, with a stand-in for the policy's normalisation between them."""
    made = build_distortions(options, 2, image.shape[1])
    return made.after(made.before(image, index, key).float() / 64 - 2, index, key)


# What is asked for


def test_off_is_none():
    assert build_distortions(Distort(), 2, 3) is None
    assert build_distortions(Distort(), 1, 3) is None


@pytest.mark.parametrize("options", EACH, ids=names)
@pytest.mark.parametrize("input_dim", [1, 3])
def test_input_that_is_no_image_is_refused_by_the_options_name(options, input_dim):
    with pytest.raises(ConfigError, match=rf"model\.{names(options)}=.*data\.input_dim is {input_dim}"):
        build_distortions(options, input_dim, 3)


def test_colours_need_grey_or_rgb():
    with pytest.raises(ConfigError, match=r"model\.color_jitter=0\.4 .*data\.input_channels is 4"):
        build_distortions(Distort(color_jitter=0.4), 2, 4)
    assert build_distortions(Distort(random_rotation=5), 2, 4) is not None


def test_colours_need_values_of_an_image():
    made = build_distortions(Distort(color_jitter=0.4), 2, 3)
    index = torch.arange(8)
    with pytest.raises(ConfigError, match=r"model\.color_jitter=0\.4 .*uint8 or float in \[0, 1\].* from -"):
        made.before(floats(), index, KEY)
    with pytest.raises(ConfigError, match=r"model\.color_jitter"):
        made.before(torch.full((8, 3, 4, 4), math.nan), index, KEY)
    assert made.before(pictures() / 255, index, KEY).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [("cutout_size", -1), ("random_erasing", 1.5), ("random_rotation", 181), ("color_jitter", 1.1)],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"model\.{name} must be in "):
        read_options(Distort, {name: value})


def data(policy: str = "cifar.BaselineTransform", **further) -> dict:
    node = {"_target_": f"augmentation.policies.{policy}", "size": 32} | further
    return {"input_dim": 2, "input_channels": 3, "input_size": 32, "module": {"train_transforms": node}}


def test_a_cutout_asked_for_twice_is_refused():
    options = Distort(cutout_size=8)
    check_distortions(options, data())
    check_distortions(options, data("cifar.BaselineCutoutTransform", cutout_size=0))
    check_distortions(Distort(random_erasing=0.5), data("cifar.BaselineCutoutTransform"))
    for again in (data("cifar.BaselineCutoutTransform"), data("cifar.AutoAugmentTransform", cutout_size=4)):
        with pytest.raises(ConfigError, match=r"model\.cutout_size=8: \w+Transform already cuts out \d+ pix"):
            check_distortions(options, again)


def test_a_cutout_has_to_leave_something():
    for size in (32, 40):
        with pytest.raises(ConfigError, match=rf"model\.cutout_size={size} .*32 pixels"):
            check_distortions(Distort(cutout_size=size), data())
    with pytest.raises(ConfigError, match=r"model\.cutout_size=2\.5 must be whole pixels"):
        check_distortions(Distort(cutout_size=2.5), data())
    with pytest.raises(ConfigError, match=r"model\.cutout_size=16 .*16 pixels"):
        distort(Distort(cutout_size=16), pictures(), torch.arange(8))


# Each image as torchvision would make it


@pytest.mark.parametrize("size", [(16, 16), (16, 20), (21, 13)])
def test_rotation_is_torchvisions(size):
    input = floats(6, size=size)
    degrees = torch.tensor([0.0, 15.0, -15.0, 90.0, 180.0, -71.3])
    turned = rotate(input, degrees)
    for one, angle, image in zip(turned, degrees.tolist(), input, strict=True):
        expected = v2F.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        # torchvision rounds the coordinates in another order: at the image's edge that moves a value
        assert torch.allclose(one, expected, atol=2e-5)
    assert torch.allclose(turned[0], input[0], atol=1e-5)


def test_colours_are_torchvisions_in_the_stated_order():
    input = pictures().float() / 255
    factors = torch.rand(8, 3, generator=torch.Generator().manual_seed(1)) * 2
    for one, image, (b, c, s) in zip(adjust_colors(input, factors), input, factors.tolist(), strict=True):
        expected = v2F.adjust_brightness(image, b)
        expected = v2F.adjust_contrast(expected, c)
        expected = v2F.adjust_saturation(expected, s)
        assert torch.allclose(one, expected, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_factor_of_one_changes_nothing_and_of_zero_leaves_the_plain_image(place):
    input = pictures().float() / 255
    assert torch.allclose(adjust_colors(input, torch.ones(8, 3)), input, atol=1e-6)
    factors = torch.ones(8, 3)
    factors[:, place] = 0
    plain = adjust_colors(input, factors)
    grey = v2F.rgb_to_grayscale(input)
    expected = [torch.zeros(()), grey.mean((1, 2, 3), keepdim=True), grey][place]
    assert torch.allclose(plain, expected.expand_as(plain), atol=1e-5)


def test_grey_images_have_no_saturation():
    input = pictures(channels=1).float() / 255
    factors = torch.tensor([[0.7, 1.4, 0.2]]).expand(8, 3)
    expected = v2F.adjust_contrast(v2F.adjust_brightness(input[2], 0.7), 1.4)
    assert torch.allclose(adjust_colors(input, factors)[2], expected, atol=1e-5)


def test_uint8_images_are_rounded_once():
    factors = torch.rand(8, 3, generator=torch.Generator().manual_seed(2)) * 2
    exact = adjust_colors(pictures().float() / 255, factors) * 255
    stored = adjust_colors(pictures(), factors)
    assert stored.dtype == torch.uint8
    assert ((stored.float() - exact).abs() < 0.5 + 1e-3).all()


def test_erasing_is_torchvisions():
    input, noise = floats(), floats(80)[:8]
    top, left, height, width = torch.tensor([[0, 3, 15, 0, 4, 2, 9, 0], [0, 1, 19, 5, 4, 3, 2, 1],
                                             [16, 5, 1, 0, 7, 2, 7, 3], [20, 5, 1, 7, 0, 3, 9, 2]])  # fmt: skip
    erased = erase(input, (top, left, height, width), noise)
    for n, image in enumerate(input):
        t, y, h, w = (int(side[n]) for side in (top, left, height, width))
        assert torch.equal(erased[n], v2F.erase(image, t, y, h, w, noise[n, :, t : t + h, y : y + w]))


@pytest.mark.parametrize(("size", "pixels"), [(6, 6), (0.5, 8), (0.25, 4), (0.01, 1)])
def test_cutout_sets_a_square_to_zero(size, pixels):
    index = torch.arange(400)
    input = torch.ones(400, 2, 16, 20)
    holes = build_distortions(Distort(cutout_size=size), 2, 2).after(input, index, KEY) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    heights, widths = (holes[:, 0].any(axis).sum(1) for axis in (2, 1))
    assert torch.equal(heights * widths, holes[:, 0].sum((1, 2))), "not one box"
    assert heights.max() == widths.max() == pixels
    assert (heights > 0).all() and (widths > 0).all()
    if pixels > 1:
        assert (heights < pixels).any(), "the centre may lie anywhere: some squares hang over the edge"


# Distributions


def test_erased_boxes_have_the_stated_areas_aspects_and_places():
    n, side = 20_000, 1000
    draws = keyed_uniform(5, torch.arange(n), 3 + 2 * ATTEMPTS)
    top, left, h, w = (v.double().numpy() for v in erased_boxes(draws, side, side, 0.4))
    erased = h > 0
    assert stats.binomtest(int(erased.sum()), n, 0.4).pvalue > 1e-3
    assert ((top >= 0) & (left >= 0) & (top + h <= side) & (left + w <= side)).all()
    area, aspect = (h * w)[erased] / side**2, h[erased] / w[erased]
    # a box is rounded to whole pixels
    assert area.min() > 0.0198 and area.max() < 0.3305
    assert aspect.min() > 0.295 and aspect.max() < 3.35
    # only the largest of the narrow boxes do not fit: below an area of 0.3 nothing is refused
    unrefused = area < 0.3
    assert stats.kstest(area[unrefused], stats.uniform(0.02, 0.28).cdf).pvalue > 1e-3
    low, high = math.log(0.3), math.log(3.3)
    assert stats.kstest(np.log(aspect[unrefused]), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for start, length in ((top, h), (left, w)):
        place = (start[erased] + 0.5) / (side + 1 - length[erased])
        assert stats.kstest(place, "uniform").pvalue > 1e-3


def test_a_box_that_does_not_fit_is_drawn_again():
    draws = torch.full((3, 3 + 2 * ATTEMPTS), 0.5)
    draws[:, 0] = 0.0
    draws[0, 3], draws[0, 3 + ATTEMPTS] = 1.0, 1.0  # 0.33 of the area, 3.3 times as high as wide: too high
    draws[2, 3:] = 1.0  # no attempt fits
    _, _, h, w = erased_boxes(draws, 100, 100, 0.5)
    assert (h[0], w[0]) == (h[1], w[1]) and h[1] > 0
    assert (h[2], w[2]) == (0, 0)


def test_noise_is_standard_normal_and_differs_between_pixels_channels_and_samples():
    draw = keyed_uniform(9, torch.arange(6), 1)[:, 0]
    noise = keyed_noise(torch.tensor(9), draw, torch.Size((6, 3, 40, 40)))
    for sample in noise.double():
        assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
        rows = sample[:, 1:] * sample[:, :-1]
        assert abs(rows.mean()) < 5 / math.sqrt(rows.numel())
    for a, b in itertools.combinations(noise, 2):
        assert not torch.equal(a, b)
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 5 / math.sqrt(6 * 1600)


def test_erasing_happens_with_the_asked_probability_and_elsewhere_changes_nothing():
    input, index = torch.zeros(3000, 1, 8, 8), torch.arange(3000)
    for probability in (0.25, 1.0):
        made = build_distortions(Distort(random_erasing=probability), 2, 1)
        changed = made.after(input, index, KEY) != 0
        share = changed.flatten(1).any(1)
        assert stats.binomtest(int(share.sum()), 3000, probability).pvalue > 1e-3
        assert changed.flatten(1).float().mean(1).max() <= 0.40  # 0.33, and the sides' rounding


def test_angles_are_uniform():
    """A dot on a circle tells the angle."""
    n, size = 1500, 41
    input = torch.zeros(n, 1, size, size)
    input[:, 0, 20, 36] = 1
    turned = build_distortions(Distort(random_rotation=40), 2, 1).after(input, torch.arange(n), KEY)
    place = torch.arange(size) - 20.0
    x, y = (turned[:, 0].sum(axis) @ place for axis in (1, 2))
    angle = torch.rad2deg(torch.atan2(-y, x)).numpy()
    assert stats.kstest(angle, stats.uniform(-40.5, 81).cdf).pvalue > 1e-3
    assert np.abs(angle).max() < 41


def test_colour_factors_are_uniform_and_independent():
    """Brightness alone acts on a black and white image whose grey is fixed by it."""
    made, index = build_distortions(Distort(color_jitter=0.4), 2, 1), torch.arange(2000)
    dark = torch.tensor([0.2, 0.4]).view(1, 1, 1, 2).expand(2000, 1, 2, 2)
    output = made.before(dark, index, KEY)[:, 0, 0].double()
    brightness = output.mean(1) / 0.3
    contrast = (output[:, 1] - output[:, 0]) / (0.2 * brightness)
    for factor in (brightness, contrast):
        assert stats.kstest(factor.numpy(), stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert abs(stats.pearsonr(brightness.numpy(), contrast.numpy()).statistic) < 0.08


# Keys


@pytest.mark.parametrize("options", [*EACH, ALL], ids=names)
def test_a_sample_is_distorted_alike_in_every_batch(options):
    input, index = pictures(12), torch.arange(100, 112)
    whole = distort(options, input, index)
    assert not torch.equal(whole, input.float() / 64 - 2)
    for rows in ([5], [11, 3], [7, 2, 9, 0, 4]):
        assert torch.allclose(distort(options, input[rows], index[rows]), whole[rows], atol=1e-6)


@pytest.mark.parametrize("options", EACH, ids=names)
def test_samples_and_epochs_differ(options):
    input, index = pictures(1).expand(12, -1, -1, -1), torch.arange(12)
    outputs = distort(options, input, index)
    assert len({one.numpy().tobytes() for one in outputs}) > 8
    assert not torch.equal(outputs, distort(options, input, index, stream_key(0, "distortions", 4)))


def test_switching_one_on_leaves_the_draws_of_another():
    input, index = torch.ones(40, 1, 16, 16), torch.arange(40)
    alone = build_distortions(Distort(cutout_size=6), 2, 1).after(input, index, KEY)
    both = build_distortions(Distort(cutout_size=6, random_erasing=0.5), 2, 1)
    output = both.after(input, index, KEY)
    unerased = (output * (1 - output) == 0).flatten(1).all(1)
    assert 5 < unerased.sum() < 35
    assert torch.equal(output[unerased], alone[unerased])


def test_nothing_is_drawn_from_the_global_generator():
    state = torch.default_generator.get_state()
    distort(ALL, pictures(), torch.arange(8))
    assert torch.equal(state, torch.default_generator.get_state())


# Shapes, types and speed


@pytest.mark.parametrize("options", [*EACH, ALL], ids=names)
def test_the_input_is_kept_as_it_was(options):
    made, index = build_distortions(options, 2, 3), torch.arange(8)
    raw, normalised = pictures(), floats()
    kept = raw.clone(), normalised.clone()
    assert made.before(raw, index, KEY).dtype == torch.uint8
    made.before(raw / 255, index, KEY)
    made.after(normalised, index, KEY)
    assert torch.equal(raw, kept[0])
    assert torch.equal(normalised, kept[1])


@pytest.mark.parametrize("options", [*EACH, ALL], ids=names)
def test_the_memory_format_is_kept_and_changes_no_value(options):
    made, index = build_distortions(options, 2, 3), torch.arange(8)
    for part, input in ((made.before, pictures()), (made.after, floats())):
        output = part(input.contiguous(memory_format=torch.channels_last), index, KEY)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(output, part(input, index, KEY), atol=1e-5)
        assert part(input, index, KEY).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_is_finite(dtype):
    made, index = build_distortions(ALL, 2, 3), torch.arange(8)
    output = made.after(floats().to(dtype), index, KEY)
    exact = made.after(floats(), index, KEY)
    assert output.dtype == dtype
    assert (output.float() - exact).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.after(floats(), index, KEY), exact), "positions are computed in float32"
    colours = made.before((pictures() / 255).to(dtype), index, KEY)
    assert colours.dtype == dtype
    assert colours.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_both_parts_compile_fullgraph_once_for_all_keys(backend, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("augmentation.distortions._on_device", lambda key, input: key)
    distortions = Distortions(ALL)
    for key in map(torch.tensor, range(3)):
        index = torch.arange(int(key) * 8, int(key) * 8 + 8)
        for part, input in ((distortions.before, pictures()), (distortions.after, floats())):
            batch = Batch(input, index, index)
            compiled = torch.compile(part, backend=backend, fullgraph=True)
            assert torch.allclose(compiled(batch, key).input, part(batch, key).input, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("options", EACH, ids=names)
def test_each_visit_of_a_sample_is_distorted_by_draws_of_its_own(options):
    parts = build_distortions(options, 2, 3)

    def distorted(visit: torch.Tensor) -> torch.Tensor:
        given = [input.repeat(len(visit), 1, 1, 1) for input in (pictures(1), floats(1))]
        made = [
            part(input, visit, KEY) for part, input in zip((parts.before, parts.after), given, strict=True)
        ]
        return torch.cat([one.flatten(1).float() for one in made], dim=1)

    several = distorted(visits(torch.full((12,), 5), torch.arange(12)))
    assert torch.equal(several[:1], distorted(torch.tensor([5])))
    assert len(several.unique(dim=0)) > 6


def test_the_input_can_be_differentiated():
    input = floats().requires_grad_()
    build_distortions(ALL, 2, 3).after(input, torch.arange(8), KEY).square().sum().backward()
    assert input.grad.isfinite().all()
    assert (input.grad != 0).any()
