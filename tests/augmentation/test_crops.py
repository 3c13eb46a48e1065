"""Random resized crops of a batch, against torchvision's of each image."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2F

from augmentation.crops import DRAWS, _by_matrices, crop_box, crop_boxes, resized_crops
from augmentation.policies import imagenet
from crucible.keyed import keyed_uniform


def smooth(n: int, height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 70), (90, 20)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    n = 1500
    ours = crop_boxes(keyed_uniform(3, torch.arange(n), DRAWS), height, width, 0.08)
    top, left, h, w = ours.unbind(1)
    assert (ours >= 0).all() and (top + h <= height).all() and (left + w <= width).all() and (h * w > 0).all()
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(8), torch.zeros(3, height, width, dtype=torch.uint8)
    theirs = torch.tensor(
        [[transform.make_params([image])[k] for k in ("top", "left", "height", "width")] for _ in range(n)]
    )
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120), (9, 300), (32, 32)])
def test_boxes_of_one_picture_are_those_of_the_batch(height: int, width: int) -> None:
    draws = keyed_uniform(3, torch.arange(500), DRAWS)
    boxes = crop_boxes(draws, height, width, 0.08)
    assert [list(crop_box(height, width, d, 0.08)) for d in draws.tolist()] == boxes.tolist()


@pytest.mark.parametrize("size", [16, 64])
def test_crops_are_torchvisions_to_a_level(size: int) -> None:
    images = smooth(20, 40, 50)
    boxes = crop_boxes(keyed_uniform(1, torch.arange(20), DRAWS), 40, 50, 0.08)
    expected = torch.stack(
        [v2F.resized_crop(i, *b, size=[size, size]) for i, b in zip(images, boxes.tolist(), strict=True)]
    )
    assert torch.equal(resized_crops(images, boxes, size), expected)
    assert (_by_matrices(images, boxes, size).int() - expected.int()).abs().max() <= 1


def test_images_in_memory_are_cropped_on_the_batch() -> None:
    policy = imagenet.BaselineTransform(size=24)
    images, index = smooth(32, 32, 32), torch.arange(32)
    assert policy.keeps(images)
    assert not policy.keeps(images[0]) and not policy.keeps(images[:, :, :24, :24]), (
        "those go through the sample part"
    )
    assert not imagenet.TestTransform(size=24).keeps(images)
    whole = policy.batch(images, index, 5)
    assert whole.shape == (32, 3, 24, 24)
    assert torch.equal(policy.batch(images[3:5], index[3:5], 5), whole[3:5])
    mirrored = [imagenet.BaselineTransform(size=24, flip=float(f)).augment(images, index, 5) for f in (0, 1)]
    assert torch.equal(mirrored[0].flip(3), mirrored[1])
