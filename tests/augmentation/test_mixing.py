"""Mixup and CutMix against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from augmentation import mixing as mixing_module
from augmentation.mixing import Mix, class_probabilities, cutmix_batch, mixup_batch
from crucible.batch import Batch
from crucible.keyed import stream_key
from crucible.options import ConfigError
from crucible.technique import Setting, assemble

K = 10


def build_mixing(options: Mix, num_classes: int):
    """What the technique adds to the batch stage, as `(input, target, key) -> (input, target)`; None for nothing."""
    stages = assemble({Mix: options}, Setting(num_classes=num_classes), torch.nn.Identity()).batch
    if not stages:
        return None
    (stage,) = stages
    assert (stage.stream, stage.per) == ("mixing", "batch")
    return lambda input, target, key: stage.change(Batch(input, target, torch.arange(len(input))), key)[:2]


def batch(n: int = 32, shape: tuple[int, ...] = (3, 16, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=generator), torch.arange(n) % K


def ids(n: int = 32, spatial: tuple[int, ...] = (16, 16)) -> torch.Tensor:
    """Sample i is filled with the number i, so that each output pixel tells where it came from."""
    return torch.arange(n, dtype=torch.float64).view(n, 1, *(1 for _ in spatial)).expand(n, 1, *spatial)


def test_off_is_none():
    assert build_mixing(Mix(), K) is None


@pytest.mark.parametrize("options", [Mix(mixup=True), Mix(cutmix_alpha=1.0)])
def test_mixing_needs_classes(options):
    with pytest.raises(ConfigError, match=r"model\.(mixup|cutmix_alpha)=.*num_classes"):
        build_mixing(options, 1)


@pytest.mark.parametrize(
    "options",
    [Mix(mixup=True), Mix(cutmix_alpha=1.0), Mix(mixup=True, cutmix_alpha=0.5)],
)
def test_targets_are_probabilities_and_those_of_mixup_have_the_samples_own_label_as_the_largest(options):
    mixing = build_mixing(options, K)
    input, target = batch()
    for key in range(50):
        mixed, probabilities = mixing(input, target, key)
        assert mixed.shape == input.shape
        assert probabilities.dtype == torch.float32
        assert torch.allclose(probabilities.sum(1), torch.ones(32), atol=1e-6)
        own = probabilities.gather(1, target[:, None])
        assert options.cutmix_alpha or (own >= 0.5 - 1e-6).all()
        assert (probabilities >= -1e-6).all()


def test_mixup_mixes_input_and_target_with_one_weight_and_one_permutation():
    input, target = ids().clone(), torch.eye(32)
    mixed, probabilities = mixup_batch(input, target, torch.tensor(0.7), torch.tensor(11))
    partner = torch.where(probabilities == 0.7, 0, probabilities).argmax(
        1
    )  # itself where nothing else is left
    assert sorted(partner.tolist()) == list(range(32))
    expected = 0.7 * torch.arange(32) + 0.3 * partner
    assert torch.allclose(mixed[:, 0, 0, 0].float(), expected.float(), atol=1e-5)


def test_the_weight_is_folded_beta():
    mixing = build_mixing(Mix(mixup=True, mixup_alpha=0.4), K)
    input, target = torch.zeros(2, 1), torch.tensor([0, 1])
    weights = []
    for key in range(3000):
        own = mixing(input, target, key)[1].gather(1, target[:, None])[0].item()
        weights.append(own)
    moved = np.asarray([w for w in weights if w < 1.0])  # own partner: nothing to see
    folded = stats.beta(0.4, 0.4)
    assert abs(len(moved) / 3000 - 0.5) < 0.05
    assert stats.kstest(moved, lambda x: folded.cdf(x) - folded.cdf(1 - x)).pvalue > 1e-3


@pytest.mark.parametrize("spatial", [(64,), (16, 16), (12, 20), (8, 10, 6)])
def test_cutmix_weights_the_target_by_the_area_really_pasted(spatial):
    input, target = ids(spatial=spatial).clone(), torch.eye(32)
    clipped = 0
    for key in range(60):
        weight = torch.tensor(key / 60)
        mixed, probabilities = cutmix_batch(input, target, weight, torch.tensor(key))
        foreign = mixed != input
        moved = foreign.flatten(1).any(1)
        area = foreign.flatten(1).double().mean(1)[moved]
        assert torch.allclose(area, area[:1].expand_as(area))
        assert torch.allclose(1 - probabilities.diagonal()[moved].double(), area, atol=1e-6)
        assert (area <= 1 - weight + 1e-6).all()
        clipped += int(bool(moved.any()) and area[0] < 0.75 * (1 - weight))
        for i in moved.nonzero().flatten().tolist():
            sources = mixed[i][foreign[i]].unique()
            assert len(sources) == 1
            assert probabilities[i, int(sources[0])] > 0
            corners = foreign[i, 0].nonzero()
            box = corners.max(0).values - corners.min(0).values + 1
            assert box.prod() == foreign[i, 0].sum(), "not one box"
    assert clipped > 0, "no box reached over the edge: the case of interest is not covered"


def test_cutmix_boxes_lie_anywhere():
    input, target = ids(2, (8, 8)).clone(), torch.eye(2)
    covered = torch.zeros(8, 8)
    for key in range(400):
        mixed, _ = cutmix_batch(input, target, torch.tensor(0.8), torch.tensor(key))
        covered += (mixed != input)[0, 0]
    assert (covered > 0).all()
    assert torch.allclose(covered, covered.flip(0), atol=60)


SETTINGS = [
    (1.0, (8, 8), 500), (1.0, (32, 32), 500),
    pytest.param(1.0, (13, 40), 500, marks=pytest.mark.slow),
    *(
        pytest.param(alpha, size, 3000, marks=pytest.mark.nightly)
        for alpha in (0.3, 1.0, 4.0) for size in ((8, 8), (32, 32), (13, 40))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("alpha", "size", "count"), SETTINGS)
def test_the_pasted_areas_are_distributed_as_torchvisions(
    alpha: float, size: tuple[int, int], count: int
) -> None:
    mixing = build_mixing(Mix(cutmix_alpha=alpha), 2)
    input, target = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, *size), torch.tensor([0, 1])
    ours = []
    for key in range(4 * count):
        pasted = (mixing(input, target, key)[0] != input)[0, 0]
        partner = mixing_module.mixing_partners(2, torch.tensor(stream_key(key, "pairs")), input.device)
        if partner[0] != 0:  # with itself as its partner there is nothing to see
            ours.append(round(pasted.double().mean().item(), 6))
        if len(ours) == count:
            break
    theirs = v2.CutMix(alpha=alpha, num_classes=2)
    torch.manual_seed(0)
    seen = [torch.empty(2, 1, *size)]
    areas = [round(1 - theirs.make_params(seen)["lam_adjusted"], 6) for _ in range(10 * count)]
    assert np.mean(ours) == pytest.approx(np.mean(areas), abs=5 * np.std(areas) / count**0.5)
    assert max(ours) > 0.5
    # areas are few and discrete, where the test of Kolmogorov and Smirnov errs on the side of acceptance
    assert stats.ks_2samp(ours, areas).pvalue > 1e-3
    if size == (32, 32) and alpha == 1.0:
        assert np.mean(ours) == pytest.approx(0.298, abs=0.05), "the published mean"


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 1.0])
def test_with_both_on_cutmix_gets_its_share_of_the_batches(chance):
    mixing = build_mixing(Mix(mixup=True, mixup_alpha=5.0, cutmix_alpha=1.0, mix_switch_prob=chance), K)
    input, target = ids(8).float(), torch.arange(8)
    cutmix = sum((mixing(input, target, key)[0] % 1 == 0).all().item() for key in range(400))
    assert stats.binomtest(int(cutmix), 400, chance).pvalue > 1e-3


@pytest.mark.parametrize(
    "options", [{"mixup": True}, {"cutmix_alpha": 1.0}, {"mixup": True, "cutmix_alpha": 1.0}]
)
def test_a_share_of_the_batches_is_mixed_and_the_others_are_as_they_were(options):
    always = build_mixing(Mix(**options), K)
    sometimes = build_mixing(Mix(**options, mix_prob=0.3), K)
    input, target = batch(16)
    mixed = 0
    for key in range(300):
        output, probabilities = sometimes(input, target, key)
        assert probabilities.dtype == torch.float32
        assert probabilities.shape == (16, K)
        if output is input:
            assert torch.equal(probabilities, torch.nn.functional.one_hot(target, K).float())
        else:
            mixed += 1
            for ours, theirs in zip((output, probabilities), always(input, target, key), strict=True):
                assert torch.equal(ours, theirs)
    assert stats.binomtest(mixed, 300, 0.3).pvalue > 1e-3


def test_never_mixing_is_allowed():
    input, target = batch()
    mixing = build_mixing(Mix(mixup=True, mix_prob=0.0), K)
    assert all(mixing(input, target, key)[0] is input for key in range(20))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mix_prob", {"mix_prob": 0.5}),
        ("mix_prob", {"mix_prob": 0.0}),
        ("mixup_alpha", {"mixup_alpha": 0.4}),
        ("mixup_alpha", {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}),
        ("mix_switch_prob", {"mix_switch_prob": 0.3}),
        ("mix_switch_prob", {"mix_switch_prob": 0.3, "mixup": True}),
        ("mix_switch_prob", {"mix_switch_prob": 0.3, "cutmix_alpha": 1.0}),
    ],
)
def test_a_chance_without_what_it_is_of_is_refused(name, options):
    with pytest.raises(ConfigError, match=rf"model\.{name}=.* needs "):
        build_mixing(Mix(**options), K)


@pytest.mark.parametrize("options", [Mix(mixup=True), Mix(cutmix_alpha=1.0)])
def test_the_same_key_mixes_the_same_and_another_differently(options):
    mixing = build_mixing(options, K)
    input, target = batch()
    (a, p), (b, q), (c, _) = (mixing(input, target, key) for key in (1, 1, 2))
    assert torch.equal(a, b)
    assert torch.equal(p, q)
    assert not torch.equal(a, c)


def test_probabilities_as_targets_are_mixed_like_indices():
    mixing = build_mixing(Mix(mixup=True), K)
    input, target = batch()
    assert torch.equal(mixing(input, target, 4)[1], mixing(input, class_probabilities(target, K), 4)[1])


def test_inputs_are_not_changed_in_place():
    mixing = build_mixing(Mix(mixup=True, cutmix_alpha=1.0), K)
    input, target = batch()
    kept, labels = input.clone(), target.clone()
    for key in range(6):
        mixing(input, target, key)
    assert torch.equal(input, kept)
    assert torch.equal(target, labels)


def test_cutmix_refuses_input_without_space():
    mixing = build_mixing(Mix(cutmix_alpha=1.0), K)
    with pytest.raises(ConfigError, match=r"model\.cutmix_alpha"):
        mixing(torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64), 0)


def test_half_precision_input_stays_half_and_targets_float32():
    input, target = batch()
    for options in (Mix(mixup=True), Mix(cutmix_alpha=1.0)):
        mixed, probabilities = build_mixing(options, K)(input.bfloat16(), target, 3)
        assert mixed.dtype == torch.bfloat16
        assert probabilities.dtype == torch.float32


def test_mixing_draws_nothing_from_the_global_generators():
    state, legacy = torch.default_generator.get_state(), np.random.get_state()[1].copy()
    build_mixing(Mix(mixup=True), K)(*batch(), 3)
    assert torch.equal(state, torch.default_generator.get_state())
    assert (legacy == np.random.get_state()[1]).all()


@pytest.mark.parametrize("options", [Mix(mixup=True), Mix(cutmix_alpha=1.0)])
def test_mixing_compiles_fullgraph_once_for_all_keys(options, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mix = build_mixing(options, K)
    input, target = batch()
    eager = [mix(input, target, key) for key in range(4)]
    for name in ("mixup_batch", "cutmix_batch"):
        compiled = torch.compile(getattr(mixing_module, name), fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(mixing_module, name, compiled)
    for key in range(4):
        for a, b in zip(eager[key], mix(input, target, key), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
