"""Which samples make which batch, and how data are split."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from crucible.keyed import visited, visits
from datasets.sampling import EpochSampler, EvalSampler, fold_out, hold_out


def global_batches(samples: int, global_batch: int, world: int, epoch: int, **options) -> list[list[int]]:
    per_rank = []
    for rank in range(world):
        sampler = EpochSampler(samples, global_batch // world, 7, rank=rank, world_size=world, **options)
        sampler.set_epoch(epoch)
        per_rank.append([batch for _, batch in sampler])
        assert len(per_rank[-1]) == len(sampler)
    return [list(chain(*parts)) for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("replace", [False, True])
def test_global_batches_are_the_same_for_any_number_of_ranks(replace):
    alone = global_batches(101, 12, 1, 3, replace=replace)
    assert len(alone) == 8
    for world in (2, 3, 4, 6, 12):
        assert global_batches(101, 12, world, 3, replace=replace) == alone


def test_an_epoch_has_each_sample_at_most_once_and_epochs_leave_out_different_ones():
    left_out = set()
    for epoch in range(5):
        drawn = list(chain(*global_batches(101, 12, 1, epoch)))
        assert len(set(drawn)) == 96
        left_out.add(frozenset(set(range(101)) - set(drawn)))
    assert len(left_out) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_last_batch_that_is_kept_has_what_is_left_in_equal_parts(world):
    alone = global_batches(101, 12, 1, 3, drop_last=False)
    assert [len(batch) for batch in alone] == [12] * 8 + [5]
    assert sorted(chain(*alone)) == list(range(101))
    shared = global_batches(101, 12, world, 3, drop_last=False)
    assert shared[:8] == alone[:8] == global_batches(101, 12, 1, 3)
    assert shared[8] == alone[8][: 5 - 5 % world]


def test_a_last_batch_that_is_kept_is_resumed_and_needs_a_sample_for_each_rank():
    whole = EpochSampler(43, 4, 0, drop_last=False)
    assert list(EpochSampler(43, 4, 0, start=(0, 10), drop_last=False)) == list(whole)[10:]
    assert len(global_batches(50, 24, 3, 0, drop_last=False)) == 2
    assert len(global_batches(51, 24, 3, 0, drop_last=False)) == 3


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list:
        sampler = EpochSampler(50, 5, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1)[0][1] != order(1, 1)[0][1]


def test_batches_carry_their_epoch():
    sampler = EpochSampler(20, 5, 0)
    sampler.set_epoch(4)
    assert {epoch for epoch, _ in sampler} == {4}


def test_with_replacement_samples_repeat_and_batches_are_as_many():
    drawn = list(chain(*global_batches(1000, 10, 1, 0, replace=True)))
    assert len(drawn) == 1000
    assert 550 < len(set(visited(np.array(drawn)))) < 700  # 1 - 1/e of them


SKEWED = {"chances": np.repeat([0.01, 1.0], [200, 3])}


@pytest.mark.parametrize("options", [{"replace": True}, SKEWED], ids=["replace", "chances"])
def test_each_time_that_a_sample_comes_up_in_an_epoch_has_a_number_of_its_own(options):
    drawn = list(chain(*global_batches(203, 7, 1, 3, **options)))
    times: dict[int, int] = {}
    expected = []
    for sample in visited(np.array(drawn)).tolist():
        before = times[sample] = times.get(sample, -1) + 1
        expected.append(int(visits(np.array(sample), np.array(before))))
    assert drawn == expected
    assert max(times.values()) >= 3 and len(set(drawn)) == 203
    assert max(times) < 203


@pytest.mark.parametrize("options", [{"replace": True}, SKEWED, {"left_out": [2, 3]}], ids=str)
def test_repeats_are_numbered_alike_for_any_number_of_ranks_and_after_a_resume(options):
    alone = global_batches(203, 12, 1, 3, **options)
    for world in (2, 3):
        assert global_batches(203, 12, world, 3, **options) == alone
    assert global_batches(203, 12, 1, 4, **options) != alone
    whole = EpochSampler(203, 12, 7, **options)
    whole.set_epoch(3)
    assert list(EpochSampler(203, 12, 7, start=(3, 5), **options)) == list(whole)[5:]


@pytest.mark.parametrize("replace", [False, True])
def test_what_stands_in_is_a_further_visit_and_all_others_stay_as_they_were(replace):
    whole = np.concatenate(global_batches(60, 6, 1, 2, replace=replace))
    out = list(range(0, 60, 2))
    others = np.concatenate(global_batches(60, 6, 1, 2, replace=replace, left_out=out))
    stays = visited(whole) % 2 == 1
    assert (others[stays] == whole[stays]).all()
    assert not (visited(others) % 2 == 0).any()
    assert len(set(others.tolist())) == 60
    assert (others[~stays] != visited(others[~stays])).any()


def test_a_resumed_sampler_goes_on_where_it_was_however_often_it_is_iterated():
    whole = EpochSampler(40, 4, 0)
    whole.set_epoch(2)
    resumed = EpochSampler(40, 4, 0, start=(2, 3))
    assert list(resumed) == list(whole)[3:]
    assert list(resumed) == list(whole)[3:]
    assert len(resumed) == 10
    whole.set_epoch(3), resumed.set_epoch(3)
    assert list(resumed) == list(whole)


def test_a_frozen_sampler_repeats_the_first_epochs_order():
    frozen, plain = EpochSampler(40, 4, 0, frozen=True), EpochSampler(40, 4, 0)
    first = [batch for _, batch in plain]
    frozen.set_epoch(5)
    assert [batch for _, batch in frozen] == first


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_evaluation_sees_each_sample_once_in_as_many_batches_on_each_rank(batch_size, world):
    for samples in range(world, 90):
        ranks = [
            [batch for _, batch in EvalSampler(samples, batch_size, rank=rank, world_size=world)]
            for rank in range(world)
        ]
        assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(samples))
        assert len({len(batches) for batches in ranks}) == 1
        sizes = [len(batch) for batches in ranks for batch in batches]
        assert min(sizes) >= 1
        assert max(sizes) <= batch_size + 1
        if samples % (batch_size * world) >= world:
            assert max(sizes) <= batch_size
        assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])


def test_evaluation_on_one_rank_is_in_order():
    assert [i for _, batch in EvalSampler(23, 5) for i in batch] == list(range(23))


def test_fewer_samples_than_ranks_cannot_be_shared_out():
    with pytest.raises(ValueError, match="2 samples for 3"):
        EvalSampler(2, 4, world_size=3)


LABELS = np.repeat([0, 1, 2, 3], [400, 100, 40, 10])


def test_a_hold_out_is_disjoint_complete_and_of_the_size_asked_for():
    for fraction in (0.001, 0.1, 0.25, 0.9):
        kept, held = hold_out(LABELS, fraction, "classification", 0)
        assert len(held) == max(1, round(fraction * 550))
        assert sorted([*kept, *held]) == list(range(550))


def test_a_hold_out_has_each_class_in_proportion():
    _, held = hold_out(LABELS, 0.1, "classification", 0)
    assert np.bincount(LABELS[held]).tolist() == [40, 10, 4, 1]


def test_classes_too_small_for_a_share_are_held_out_by_lot():
    labels = np.repeat(np.arange(100), 5)
    chosen = np.concatenate([labels[hold_out(labels, 0.1, "classification", seed)[1]] for seed in range(20)])
    assert 400 < (chosen < 50).sum() < 600
    singles = np.arange(30)
    assert len(hold_out(singles, 0.2, "classification", 0)[1]) == 6


def test_splits_are_functions_of_their_seed():
    for split in (
        lambda seed: hold_out(LABELS, 0.1, "classification", seed)[1],
        lambda seed: fold_out(LABELS, 1, 5, "classification", seed)[1],
    ):
        assert (split(3) == split(3)).all()
        assert not np.array_equal(split(3), split(4))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_partition_the_samples_in_equal_shares(folds, task):
    parts = [fold_out(LABELS, fold, folds, task, 0) for fold in range(folds)]
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(550))
    for kept, held in parts:
        assert sorted([*kept, *held]) == list(range(550))
        assert abs(len(held) - 550 / folds) < 1
        if task == "classification":
            assert (np.abs(np.bincount(LABELS[held], minlength=4) - np.bincount(LABELS) / folds) < 1).all()


def test_regression_splits_are_spread_over_the_values():
    values = np.random.default_rng(0).lognormal(size=1000).astype(np.float32)
    edges = np.quantile(values, np.linspace(0, 1, 11)[1:-1])
    _, held = hold_out(values, 0.1, "regression", 0)
    assert np.bincount(np.digitize(values[held], edges)).tolist() == [10] * 10
    _, fold = fold_out(values, 0, 5, "regression", 0)
    assert (np.abs(np.bincount(np.digitize(values[fold], edges)) - 20) <= 1).all()
