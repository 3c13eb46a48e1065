"""Random resized crops of a batch, against torchvision's of each image."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2F

from augmentation.crops import DRAWS, MODES, _by_matrices, crop_box, crop_boxes, resized_crops
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


@pytest.mark.parametrize("aspects", [(1.0, 1.0), (0.5, 3.0)])
def test_aspects_of_boxes_are_those_asked_for(aspects: tuple[float, float]) -> None:
    draws = keyed_uniform(4, torch.arange(300), DRAWS)
    boxes = crop_boxes(draws, 400, 400, 0.1, aspects)
    aspect = boxes[:, 3] / boxes[:, 2]
    assert aspect.min() >= aspects[0] - 0.02 and aspect.max() <= aspects[1] + 0.06
    assert aspect.min() < aspects[0] + 0.05 and aspect.max() > aspects[1] - 0.3
    assert [list(crop_box(400, 400, d, 0.1, aspects)) for d in draws.tolist()] == boxes.tolist()


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_crops_are_torchvisions_to_a_level(size: int, share: float) -> None:
    images, bicubic = smooth(20, 40, 50), torch.arange(20) % 2 < 2 * share - 0.5
    boxes = crop_boxes(keyed_uniform(1, torch.arange(20), DRAWS), 40, 50, 0.08)
    modes = [v2.InterpolationMode(MODES[b]) for b in bicubic.tolist()]
    assert bicubic.float().mean() == share
    expected = torch.stack(
        [
            v2F.resized_crop(i, *b, size=[size, size], interpolation=mode)
            for i, b, mode in zip(images, boxes.tolist(), modes, strict=True)
        ]
    )
    assert torch.equal(resized_crops(images, boxes, size, bicubic), expected)
    off = (_by_matrices(images, boxes, size, bicubic).int() - expected.int()).abs()
    assert off.max() <= (2 if share else 1)
    assert off.float().mean() < 0.25
    if not share:
        assert torch.equal(resized_crops(images, boxes, size), expected)


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
    drawn = imagenet.BaselineTransform(size=24, interpolation="random").batch(images, index, 5)
    same = (drawn == whole).flatten(1).all(1)
    assert 4 < same.sum() < 28, "each image is resized bilinear or bicubic, in the box that it had"
    mirrored = [imagenet.BaselineTransform(size=24, flip=float(f)).augment(images, index, 5) for f in (0, 1)]
    assert torch.equal(mirrored[0].flip(3), mirrored[1])
