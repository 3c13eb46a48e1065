"""AugMix's consistency loss against its formula, and the three views in a batch."""

from __future__ import annotations

import pytest
import torch
from stages import assembled
from torch.nn import functional as F

from augmentation.augmix import VIEWS, jensen_shannon
from crucible.batch import Batch
from crucible.keyed import visits
from crucible.options import ConfigError
from crucible.technique import Setting

SETTING = Setting(num_classes=5)


def images(n: int = 12, channels: int = 3, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    return Batch(input, torch.arange(n) % 5, torch.arange(n) + 100)


def published(logits: torch.Tensor) -> torch.Tensor:
    """As in the authors' description: KL of each view to the logarithm of the clamped mean, by F.kl_div."""
    views = [part.softmax(dim=1) for part in logits.chunk(3)]
    mixture = (sum(views) / 3).clamp(1e-7, 1).log()
    return sum(F.kl_div(mixture, view, reduction="batchmean") for view in views) / 3


def test_the_divergence_is_the_papers() -> None:
    logits = 4 * torch.randn(3 * 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(jensen_shannon(logits), published(logits))
    same = logits[:7].repeat(3, 1)
    assert jensen_shannon(same).abs() < 1e-7, "the mean is clamped there"
    apart = 50 * torch.eye(3).repeat_interleave(4, dim=0)
    assert float(jensen_shannon(apart)) == pytest.approx(1.0986, abs=1e-3), "at most log 3"
    assert jensen_shannon(apart.bfloat16()).dtype == torch.float32
    assert torch.autograd.gradcheck(jensen_shannon, logits[:6].requires_grad_())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_becomes_the_clean_images_and_two_views(channels: int) -> None:
    (stage,) = assembled(SETTING, augmix_weight=12.0).raw
    assert stage.per == "sample"
    batch = images(channels=channels)
    input, target, index = stage.change(batch, 3)
    assert input.dtype == torch.uint8
    clean, first, second = input.chunk(VIEWS)
    assert torch.equal(clean, batch.input)
    for a, b in ((clean, first), (clean, second), (first, second)):
        assert (a != b).flatten(1).any(1).float().mean() > 0.8
    assert torch.equal(target, batch.target.repeat(3)) and torch.equal(index, batch.index.repeat(3))
    some = Batch(*(part[[7, 2]] for part in batch))
    assert torch.equal(
        stage.change(some, 3).input, input.view(3, 12, channels, 16, 16)[:, [7, 2]].flatten(0, 1)
    )
    assert not torch.equal(stage.change(batch, 4).input, input)
    again = stage.change(batch._replace(visit=visits(batch.index, torch.ones(12, dtype=torch.int64))), 3)
    assert (again.input != input).flatten(1).any(1)[12:].float().mean() > 0.8
    assert torch.equal(again.index, index)


def test_the_loss_is_the_clean_images_criterion_and_the_weighted_divergence() -> None:
    step = assembled(SETTING, augmix_weight=2.0, label_smoothing=0.1)
    logits, target = torch.randn(12, 5), torch.arange(12) % 4
    (term,) = step.loss
    loss = term(step.criterion(logits, target), logits, images())
    expected = F.cross_entropy(logits[:4], target[:4], label_smoothing=0.1) + 2 * published(logits)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("setting", "values", "says"),
    [
        (Setting(task="regression"), {}, "class probabilities"),
        (Setting(num_classes=1), {}, "class probabilities"),
        (Setting(num_classes=5, input_dim=1), {}, "data.input_dim is 1"),
        (Setting(num_classes=5, input_channels=2), {}, "data.input_channels 2"),
        (SETTING, {"mixup": True}, "choose one"),
        (SETTING, {"cutmix_alpha": 1.0}, "choose one"),
        (SETTING, {"manifold_mixup": True}, "choose one"),
    ],
)
def test_what_has_no_meaning_is_refused(setting: Setting, values: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=f"model.augmix_weight=12 .*{says}"):
        assembled(setting, augmix_weight=12.0, **values)


def test_float_input_is_refused() -> None:
    (stage,) = assembled(SETTING, augmix_weight=12.0).raw
    with pytest.raises(ConfigError, match="needs uint8 images: the input is float32"):
        stage.change(images()._replace(input=torch.rand(12, 3, 16, 16)), 3)
