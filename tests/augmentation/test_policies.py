"""Policies: names, shapes and types, and what each does to pixels."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from augmentation.crops import DRAWS, _by_matrices, crop_box, crop_boxes
from augmentation.distortions import rotate
from augmentation.policies import cifar, digits, imagenet
from augmentation.policies.base import cutout, shift_and_flip
from augmentation.policies.default import IdentityTransform
from crucible.corrections import versions_of
from crucible.keyed import keyed_rng, keyed_uniform, stream_key
from crucible.options import ConfigError

NAMES = [
    "BaselineTransform",
    "BaselineCutoutTransform",
    "AutoAugmentTransform",
    "RandAugmentTransform",
    "TrivialAugmentTransform",
    "AugMixTransform",
    "TestTransform",
]
AUTOMATIC = NAMES[2:6]
MODULES = {"cifar": 32, "imagenet": 224}
ALL = [(module, name) for module in MODULES for name in NAMES] + [
    ("digits", "BaselineTransform"),
    ("digits", "TestTransform"),
]


def policy(module: str, name: str, **options):
    return getattr(importlib.import_module(f"augmentation.policies.{module}"), name)(**options)


def picture(width: int = 50, height: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("module", "name"), ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_makes_uint8_samples_and_float32_batches(module, name, channels):
    made = policy(module, name, channels=channels, mean=[0.5] * channels, std=[0.25] * channels)
    samples = []
    for size in ((50, 40), (32, 32), (8, 8)):
        for mode in ("RGB", "L"):
            with keyed_rng(1):
                samples.append(made.sample(picture(*size, mode)))
    input = torch.stack(samples)
    assert input.dtype == torch.uint8
    assert input.shape == (6, channels, made.size, made.size)
    output = made.batch(input, torch.arange(6), 3)
    assert output.dtype == torch.float32
    assert output.shape == input.shape


@pytest.mark.parametrize("module", list(MODULES))
def test_policies_of_one_module_take_the_same_options(module):
    signatures = {str(inspect.signature(type(policy(module, name)).__init__)) for name in NAMES}
    assert len(signatures) == 1
    for name in NAMES:
        assert policy(module, name, size=16, mean=[0.4], std=[0.2]).unused_options == {}


def test_an_option_without_effect_is_recorded():
    assert cifar.TestTransform(cutout_size=8).unused_options == {"cutout_size": 8}
    assert cifar.BaselineTransform(magnitude=5).unused_options == {"magnitude": 5}
    assert cifar.BaselineCutoutTransform(cutout_size=8).unused_options == {}
    assert imagenet.BaselineTransform(min_area=0.3, cutout_size=0).unused_options == {}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As Lightning has the weights' in a step under bf16-true and 64-true."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("module", "name"), [*ALL, ("cifar", "deepvoltaire"), ("cifar", "uda")])
def test_the_batch_part_knows_no_default_dtype(module: str, name: str, dtype: torch.dtype) -> None:
    def outputs() -> torch.Tensor:
        tables = {"deepvoltaire": "AutoAugmentTransform", "uda": "RandAugmentTransform"}
        made = policy(module, tables.get(name, name), **({"operations": name} if name in tables else {}))
        shape = (8, 3, made.size, made.size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return made.batch(pixels, torch.arange(8), 3)

    expected = outputs()
    with default_dtype(dtype):
        found = outputs()
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_crops_on_a_device_and_rotations_know_none_either(dtype: torch.dtype) -> None:
    def outputs() -> list[torch.Tensor]:
        images = torch.randint(
            256, (8, 3, 300, 310), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        boxes = crop_boxes(keyed_uniform(1, torch.arange(8), DRAWS), 300, 310, 0.08)
        turned = rotate(images[:, :, :40, :40].float(), torch.arange(8, dtype=torch.float32))
        return [_by_matrices(images, boxes, 32, torch.arange(8) % 2 > 0), turned]

    expected = outputs()
    with default_dtype(dtype):
        found = outputs()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("module", "name"), ALL)
def test_the_sample_part_is_a_function_of_the_key(module, name):
    made = policy(module, name)
    outputs = []
    for key in (5, 5):
        with keyed_rng(key):
            outputs.append(made.sample(picture()))
    assert torch.equal(*outputs)


def test_tensors_and_pictures_give_the_same_sample():
    image = picture(32, 32)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for module, name in ALL:
        made, results = policy(module, name), []
        for form in (image, tensor):
            with keyed_rng(2):
                results.append(made.sample(form))
        assert torch.equal(*results), (module, name)


def test_normalization_is_of_the_0_to_1_scale():
    made = cifar.TestTransform(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    input = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    )
    expected = (input.double() / 255 - mean) / std
    assert torch.allclose(made.batch(input, torch.arange(4), 0).double(), expected, atol=1e-6)


def test_mean_and_std_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="3 channels, the input 1"):
        cifar.TestTransform(mean=[0.5] * 3, std=[0.5] * 3).batch(
            torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.arange(2), 0
        )


@pytest.mark.parametrize("shape", [(5,), (2, 9), (2, 6, 7), (2, 4, 5, 6)])
def test_identity_takes_any_dimension(shape):
    input = torch.randn(3, *shape)
    assert torch.equal(IdentityTransform().batch(input, torch.arange(3), 0), input)
    scaled = IdentityTransform(mean=[1.0], std=[2.0]).batch(input, torch.arange(3), 0)
    assert torch.allclose(scaled, (input - 1) / 2, atol=1e-6)


def reference_shift(image: torch.Tensor, row: int, column: int, flip: bool, by: int) -> torch.Tensor:
    padded = torch.zeros(image.shape[0], image.shape[1] + 2 * by, image.shape[2] + 2 * by, dtype=image.dtype)
    padded[:, by : by + image.shape[1], by : by + image.shape[2]] = image
    crop = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return crop.flip(-1) if flip else crop


def test_the_batch_shift_is_pad_crop_and_flip_of_each_image():
    input = torch.randint(0, 256, (200, 2, 8, 6), dtype=torch.uint8)
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    output = shift_and_flip(input, draws, 4, 0.5)
    seen = set()
    for image, result, (r, c, f) in zip(input, output, draws.tolist(), strict=True):
        expected = reference_shift(image, int(r * 9), int(c * 9), f < 0.5, 4)
        assert torch.equal(result, expected)
        seen.add((int(r * 9), int(c * 9)))
    assert len(seen) > 60  # of 81


def test_digits_are_shifted_by_at_most_a_pixel_and_never_mirrored():
    made = digits.BaselineTransform()
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 3:5, 3:5] = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)
    input = image.expand(300, 1, 8, 8)
    output = made.batch(input, torch.arange(300), 9) * 255
    places = set()
    for result in output.round():
        places.add(tuple((result[0] == 10).nonzero()[0].tolist()))
        r, c = (result[0] == 10).nonzero()[0].tolist()
        assert result[0, r : r + 2, c : c + 2].tolist() == [[10, 20], [30, 40]]
    assert places == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


@pytest.mark.parametrize("size", [1, 4, 5, 16])
def test_cutout_blanks_one_clipped_square_anywhere(size):
    input = torch.ones(500, 2, 12, 10)
    draws = torch.rand(500, 2, generator=torch.Generator().manual_seed(1))
    output = cutout(input, draws, size)
    for image, (r, c) in zip(output, draws.tolist(), strict=True):
        row, column = int(r * 12), int(c * 10)
        expected = torch.ones(12, 10)
        top, left = row - size // 2, column - size // 2
        expected[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert torch.equal(image[0], expected)
        assert torch.equal(image[1], expected)


def test_cutout_is_drawn_per_sample_and_the_same_in_any_batch():
    made = cifar.BaselineCutoutTransform()
    input = torch.full((64, 3, 32, 32), 200, dtype=torch.uint8)
    whole = made.batch(input, torch.arange(64), stream_key(0, "batch", 3))
    assert len({(image == 0).numpy().tobytes() for image in whole}) > 50
    some = torch.tensor([5, 60, 7])
    assert torch.equal(made.batch(input[:3], some, stream_key(0, "batch", 3)), whole[some])
    assert not torch.equal(made.batch(input, torch.arange(64), stream_key(0, "batch", 4)), whole)


def test_half_of_the_images_are_mirrored():
    made = cifar.BaselineTransform(padding=0)
    ramp = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    output = made.batch(ramp, torch.arange(2000), 1)
    mirrored = (output[:, 0, 0, 0] > output[:, 0, 0, 31]).sum().item()
    assert 900 < mirrored < 1100


def test_the_imagenet_test_policy_takes_the_centre():
    image = Image.new("RGB", (512, 256), (0, 0, 0))
    image.paste((255, 255, 255), (144, 16, 144 + 224, 16 + 224))
    assert (imagenet.TestTransform().sample(image) == 255).all()
    small = imagenet.TestTransform(size=64).sample(Image.new("RGB", (100, 300)))
    assert small.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"), [(224, 0.875, 256), (224, 0.95, 235), (16, 0.875, 18), (12, 0.875, 13)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_resizes_and_crops_as_timm_does(size, crop_pct, resized, interpolation):
    """timm 0.4.12 and since: floor(size / crop_pct), the same filter, the central square."""
    made = imagenet.TestTransform(size=size, crop_pct=crop_pct, interpolation=interpolation)
    assert made.resized_side == resized
    image = torch.from_numpy(np.array(picture(300, 280))).permute(2, 0, 1)
    theirs = v2.Compose([v2.Resize(resized, v2.InterpolationMode(interpolation)), v2.CenterCrop(size)])
    assert torch.equal(made.sample(image), theirs(image))


def test_a_resized_side_that_was_rounded_up_is_another_number():
    def versions(size):
        node = {"data": {"module": {"test_transforms": {"size": size}}}}
        return versions_of(imagenet.TestTransform.corrections[-1:], node)

    assert versions(224) == versions(16) == {}
    assert versions(12) == {"data.module.test_transforms": 2}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_random_crops_are_resized_by_the_filter_that_is_named(interpolation):
    made, image = imagenet.BaselineTransform(size=24, interpolation=interpolation), picture(60, 50)
    pixels, seen = torch.from_numpy(np.array(image)).permute(2, 0, 1), set()
    for key in range(12):
        with keyed_rng(key):
            found = made.sample(image)
        with keyed_rng(key):
            draws = torch.rand(made.crop_draws).tolist()
        box = crop_box(50, 60, draws, 0.08)
        by = {
            m.value: v2.functional.resized_crop(pixels, *box, [24, 24], m)
            for m in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)
        }
        seen |= {name for name, expected in by.items() if torch.equal(found, expected)}
    assert seen == ({"bilinear", "bicubic"} if interpolation == "random" else {interpolation})


def test_pictures_of_another_size_are_resized_by_the_filter_that_is_named():
    image = torch.from_numpy(np.array(picture(50, 40))).permute(2, 0, 1)
    for mode in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC):
        expected = v2.functional.resize(image, [32, 32], mode)
        assert torch.equal(cifar.TestTransform(interpolation=mode.value).sample(image), expected)


def test_interpolations_that_a_policy_cannot_follow_are_refused():
    for made, interpolation in (
        (imagenet.TestTransform, "random"), (imagenet.TestTransform, "nearest"),
        (imagenet.BaselineTransform, "nearest"),
        (cifar.TestTransform, "random"), (imagenet.RandAugmentTransform, "random"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"interpolation={interpolation}: {made.__name__}"):
            made(interpolation=interpolation)
    assert imagenet.RandAugmentTransform(interpolation="nearest").resizing == "bilinear"
    with pytest.raises(ConfigError, match="ratio="):
        imagenet.BaselineTransform(ratio=[2.0, 1.0])


@pytest.mark.parametrize("module", list(MODULES))
def test_a_vertical_flip_is_drawn_apart_from_all_else(module):
    """At chance 1 each image is that of chance 0 upside down: nothing else is drawn otherwise."""
    size = 16
    input = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)
    options = {"size": size} | ({"padding": 0} if module == "cifar" else {})
    plain, turned, half = (
        policy(module, "BaselineTransform", vertical_flip=chance, **options).batch(input, torch.arange(64), 3)
        for chance in (0.0, 1.0, 0.5)
    )
    assert torch.equal(plain.flip(2), turned)
    upside_down = [torch.equal(a, b) for a, b in zip(half, turned, strict=True)]
    assert 16 < sum(upside_down) < 48
    assert torch.equal(half[torch.tensor(upside_down)], turned[torch.tensor(upside_down)])
    both = policy(module, "RandAugmentTransform", vertical_flip=1.0, cutout_size=0, prob=0.0, **options)
    assert torch.equal(both.batch(input, torch.arange(64), 3), turned)


def test_channels_last_input_stays_channels_last():
    made = cifar.BaselineCutoutTransform(padding=0, flip=0.0, mean=[0.5] * 3, std=[0.2] * 3)
    input = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    output = made.batch(input.contiguous(memory_format=torch.channels_last), torch.arange(4), 1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, made.batch(input, torch.arange(4), 1))


IN_CI = dict.fromkeys(("RandAugmentTransform", "AugMixTransform"), pytest.mark.slow)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(module, name, marks=IN_CI.get(name, pytest.mark.nightly) if name in AUTOMATIC else ())
        for module, name in ALL
        if module != "imagenet" or name not in AUTOMATIC  # their batch part is that of CIFAR's
    ],
)
def test_the_batch_part_compiles_fullgraph_once_for_all_epochs(module, name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    size = {"size": 12} if name in AUTOMATIC else {}
    made = policy(module, name, **size)
    compiled = policy(module, name, **size)
    compiled.compile(fullgraph=True, backend="aot_eager")
    input = torch.randint(0, 256, (8, 3, made.size, made.size), dtype=torch.uint8)
    for epoch in range(3):
        key = torch.tensor(stream_key(epoch))
        index = torch.arange(8) + epoch
        assert torch.allclose(compiled(input, index, key), made(input, index, key), atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_keyed_draws_do_not_touch_the_global_generator():
    state = torch.default_generator.get_state()
    cifar.BaselineCutoutTransform().batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2), 1)
    keyed_uniform(1, torch.arange(3), 1)
    assert torch.equal(state, torch.default_generator.get_state())
