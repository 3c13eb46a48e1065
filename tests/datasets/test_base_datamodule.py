"""BaseDataModule: splits, batches, determinism, checks."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from augmentation.policies import cifar, imagenet
from augmentation.policies.base import Policy
from augmentation.policies.default import IdentityTransform
from crucible.keyed import visited, visits
from crucible.options import ConfigError, signature_options
from datasets.base_datamodule import BaseDataModule, Batch
from datasets.images import Arrays, ImageFiles, SampleError
from datasets.samples import Samples


class Noisy(Policy):
    """Draws from all three generators, as a user's policy may."""

    def sample(self, image: Any) -> Tensor:
        shade = torch.rand(()) + random.random() + float(np.random.rand())
        return super().sample(image).float() + shade


class Pictures(torch.utils.data.Dataset):
    """A user's raw data set: PIL images and numbers, nothing else."""

    def __init__(self, count: int, classes: int = 4) -> None:
        self.count, self.number_of_classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (8, 8), index % 256), index % self.number_of_classes


class Broken(Pictures):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 5:
            raise KeyError("oops")
        return super().__getitem__(index)


class Mine(BaseDataModule):
    """The recipe of the docs: define setup, set train_dataset."""

    def __init__(self, *, count: int = 100, raw: Any = None, **kwargs: Any) -> None:
        super().__init__(**{"name": "mine", "batch_size": 10, "input_channels": 1, "num_workers": 0} | kwargs)
        self.count, self.raw = count, raw

    def setup(self, stage: str) -> None:
        self.train_dataset = Pictures(self.count) if self.raw is None else self.raw


def arrays(count: int = 100, classes: int = 4) -> Arrays:
    inputs = (
        torch.arange(count).remainder(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 32, 32).clone()
    )
    return Arrays(inputs, np.arange(count) % classes, [f"class{i}" for i in range(classes)])


def drawn(module: BaseDataModule, epoch: int = 0) -> list[Batch]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_a_subclass_that_sets_train_dataset_has_all_loaders():
    module = Mine()
    module.check()
    assert module.num_classes == 4
    assert module.class_names == ["0", "1", "2", "3"]
    assert len(module.train_dataloader()) == 9
    assert sum(len(batch.index) for batch in module.val_dataloader()) == 10
    assert module.test_is_val
    assert [b.index.tolist() for b in module.test_dataloader()] == [
        b.index.tolist() for b in module.val_dataloader()
    ]


class Counting(Mine):
    """Counts how often it is set up."""

    times = 0

    def setup(self, stage: str) -> None:
        self.times += 1
        super().setup(stage)


class Heir(Counting):
    """Has no setup of its own."""


def test_a_data_module_is_set_up_once_whoever_asks():
    class Extended(Heir):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.test_dataset = Pictures(20)

    for kind in (Counting, Heir, Extended):
        module = kind(num_classes=4)
        module.check()
        for stage in ("fit", "validate", "test", "predict"):
            module.setup(stage=stage)
        for other in (
            copy.copy(module),
            pickle.loads(pickle.dumps(module)) if kind is not Extended else module,
        ):
            other.setup("fit")
            other.check()
            assert other.times == 1


def test_a_setup_that_failed_is_tried_again():
    class Late(Counting):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            if self.times == 1:
                raise OSError("not yet")

    module = Late()
    with pytest.raises(OSError, match="not yet"):
        module.check()
    module.check()
    assert module.times == 2


def test_a_setup_that_comes_from_a_mixin_runs_once_too():
    class Reads:
        times = 0

        def setup(self, stage: str) -> None:
            self.times += 1
            self.train_dataset = Pictures(100)

    class Mixed(Reads, BaseDataModule):
        pass

    module = Mixed(name="mixed")
    module.check()
    module.setup("fit")
    assert module.times == 1


def test_a_setup_without_training_samples_is_refused():
    class Empty(BaseDataModule):
        def setup(self, stage: str) -> None:
            pass

    with pytest.raises(ConfigError, match=r"data\.module\._target_: the setup of Empty must set"):
        Empty(name="empty").check()


def test_batches_are_in_the_storage_dtype_with_indices_of_the_raw_data():
    for batch in (*Mine().train_dataloader(), *Mine().val_dataloader()):
        assert isinstance(batch, Batch)
        assert batch.input.dtype == torch.uint8
        assert batch.input.shape == (10, 1, 8, 8)
        assert batch.index.dtype == batch.target.dtype == torch.int64
        assert torch.equal(batch.input[:, 0, 0, 0].long(), batch.index)
        assert torch.equal(batch.target, batch.index % 4)


def test_regression_targets_are_float32():
    raw = Arrays(torch.randn(50, 3, 7), np.linspace(0, 1, 50))
    batch = next(iter(Mine(raw=raw, task="regression").train_dataloader()))
    assert batch.target.dtype == torch.float32
    assert batch.input.dtype == torch.float32


def test_validation_is_the_same_for_every_run_seed_and_changes_with_the_split_seed():
    def held(**options: int) -> list[int]:
        return sorted(i for b in Mine(**options).val_dataloader() for i in b.index.tolist())

    assert held(seed=0) == held(seed=1)
    assert held(split_seed=0) != held(split_seed=1)
    train = {i for b in Mine().train_dataloader() for i in b.index.tolist()}
    assert train.isdisjoint(held())
    assert len(train) == 90


def test_folds_validate_every_sample_once():
    seen: list[int] = []
    for fold in range(4):
        module = Mine(fold=fold, folds=4)
        held = {i for b in module.val_dataloader() for i in b.index.tolist()}
        assert held.isdisjoint(i for b in drawn(module) for i in b.index.tolist())
        seen += held
    assert sorted(seen) == list(range(100))


def test_val_split_test_trains_on_everything_and_validates_on_the_test_split():
    module = Mine(val_split="test")
    module.setup("fit")
    module.test_dataset = Pictures(20)
    module.check()
    assert len(module.samples("train")) == 100
    assert len(module.samples("val")) == len(module.samples("test")) == 20
    assert not module.test_is_val


def test_a_validation_set_of_its_own_is_used_as_it_is():
    module = Mine()
    module.setup("fit")
    module.val_dataset = Pictures(12)
    assert len(module.samples("train")) == 100
    assert len(module.samples("val")) == 12


REPEATS = [{"random_batches": True}, {"balanced_batches": True}]


@pytest.mark.parametrize("raw", [None, arrays()])
@pytest.mark.parametrize("policy", [Noisy, cifar.RandAugmentTransform, cifar.BaselineTransform])
def test_training_batches_are_the_same_for_any_number_of_workers(raw, policy):
    options = {"raw": raw, "train_transforms": policy(), "random_batches": policy is Noisy}
    assert same(drawn(Mine(**options), epoch=2), drawn(Mine(num_workers=2, **options), epoch=2))


def test_the_workers_of_a_loader_that_an_error_has_left_in_a_circle_are_told_to_end(monkeypatch):
    """Else torch waits for five seconds for each of them."""
    can_be_told = []
    end = _MultiProcessingDataLoaderIter._shutdown_workers

    def watched(iterator):
        if hasattr(iterator, "left_by"):  # no other's, whom the collector finds as well
            can_be_told.extend(queue._close.still_active() for queue in iterator._index_queues)
        end(iterator)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", watched)
    batches = iter(Mine(num_workers=1).train_dataloader())
    batches.left_by = batches
    del batches
    gc.collect()
    assert can_be_told == [True]


@pytest.mark.parametrize("options", [{}, *REPEATS], ids=str)
def test_training_batches_are_the_same_for_any_number_of_ranks(options):
    def ranks(world: int) -> list[Batch]:
        parts = []
        for rank in range(world):
            module = Mine(train_transforms=Noisy(), batch_size=12 // world, **options)
            module.trainer = SimpleNamespace(
                global_rank=rank, world_size=world, current_epoch=0, overfit_batches=0,
                strategy=SimpleNamespace(root_device=torch.device("cpu")),
            )  # fmt: skip
            parts.append(list(module.train_dataloader()))
        return [Batch(*map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]

    assert same(ranks(1), ranks(3))


class Snow(torch.utils.data.Dataset):
    """Pictures of noise, as a loader reads them; four of them are of a class of their own."""

    def __init__(self, count: int = 60) -> None:
        generator = np.random.default_rng(0)
        self.pixels = generator.integers(0, 256, (count, 24, 24), dtype=np.uint8)
        self.targets = np.where(np.arange(count) < 4, 2, np.arange(count) % 2)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])

    def in_memory(self) -> Arrays:
        return Arrays(torch.from_numpy(self.pixels)[:, None], self.targets, ["a", "b", "c"])


@pytest.mark.parametrize("options", REPEATS, ids=str)
@pytest.mark.parametrize(
    ("raw", "policy", "in_the_loader"),
    [
        (Snow(), Noisy, True),
        (Snow(), lambda: imagenet.BaselineTransform(size=16), True),
        (Snow().in_memory(), lambda: imagenet.BaselineTransform(size=16), False),
        (Snow().in_memory(), lambda: cifar.BaselineCutoutTransform(size=24), False),
    ],
    ids=["generators", "crops", "crops of the batch", "policy of the batch"],
)
def test_what_comes_up_again_in_an_epoch_is_augmented_anew(raw, policy, in_the_loader, options):
    def seen(**options: Any) -> dict[int, Tensor]:
        module = Mine(raw=raw, train_transforms=policy(), batch_size=6, **options)
        found: dict[int, Tensor] = {}
        batches = drawn(module, epoch=3)
        for batch in batches:
            assert batch.target.tolist() == raw.targets[batch.index].tolist()
            inputs = (batch if in_the_loader else module.batch_transform(batch, "train", 3)).input
            found |= dict(zip(batch.visit.tolist(), inputs, strict=True))
        assert len(found) == 6 * len(batches)
        return found

    once, often = seen(), seen(**options)
    assert max(once) < len(raw)
    firsts = [visit for visit in often if visit in once]
    assert len(firsts) >= 20 and all(torch.equal(often[visit], once[visit]) for visit in firsts)
    by_sample: dict[int, list[Tensor]] = {}
    for visit, input in often.items():
        by_sample.setdefault(int(visited(np.array(visit))), []).append(input)
    assert max(map(len, by_sample.values())) >= 4
    for inputs in by_sample.values():
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(inputs, 2))


@pytest.mark.parametrize("options", REPEATS, ids=str)
def test_a_resume_inside_an_epoch_numbers_repeats_as_the_whole_epoch_does(options):
    whole = drawn(Mine(raw=Snow(), train_transforms=Noisy(), **options), epoch=3)
    resumed = Mine(raw=Snow(), train_transforms=Noisy(), **options)
    resumed.load_state_dict({"epoch": 3, "batch": 2, "samples": 54, "global_batch_size": 10})
    assert same(drawn(resumed, epoch=3), whole[2:])


def test_inputs_on_the_device_are_taken_by_sample_however_often_it_comes_up():
    module = Mine(raw=arrays(), random_batches=True, cache="device")
    cpu = torch.device("cpu")
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=1, current_epoch=0, overfit_batches=0, testing=False, validating=False,
        sanity_checking=False, evaluating=False, strategy=SimpleNamespace(root_device=cpu),
    )  # fmt: skip
    batches = drawn(module)
    assert any((batch.visit != batch.index).any() for batch in batches)
    for batch in batches:
        assert len(batch.input) == 0
        moved = module.transfer_batch_to_device(batch, cpu, 0)
        assert torch.equal(moved.input, module.raw.inputs[batch.index])
        assert torch.equal(moved.visit, batch.visit)


def test_a_batch_of_three_is_one_of_first_visits():
    batch = Batch(torch.zeros(3, 1), torch.arange(3), torch.tensor([4, 0, -1]))
    input, target, index = batch
    assert torch.equal(batch.index, index)
    again = visits(torch.tensor([4, 4, 2**31 - 1]), torch.tensor([1, 2**31 - 1, 7]))
    assert len({*again.tolist(), *index.tolist()}) == 6
    assert Batch(input, target, again).index.tolist() == [4, 4, 2**31 - 1]
    named = Batch(input=input, target=target, index=index)
    assert type(named) is Batch and all(a is b for a, b in zip(named, batch, strict=True))
    assert named._replace(index=again).visit is again and named._replace(input=target).visit is index
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(pickle.dumps(batch)), batch, strict=True))


def test_augmentation_changes_with_seed_and_epoch():
    def shades(**options: int) -> dict[int, float]:
        epoch = options.pop("epoch", 0)
        batches = drawn(Mine(train_transforms=Noisy(), **options), epoch)
        return {int(i): float(x.mean()) for b in batches for i, x in zip(b.index, b.input, strict=True)}

    base = shades()
    assert shades() == base
    for other in (shades(epoch=1), shades(seed=1)):
        assert other.keys() == base.keys()
        assert not set(other.values()) & set(base.values())
    assert len(set(base.values())) == len(base)


def test_loading_leaves_the_main_processs_generators_alone():
    def states() -> tuple[Any, ...]:
        return (
            torch.default_generator.get_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    before = states()
    for workers in (0, 1):
        module = Mine(train_transforms=Noisy(), test_transforms=Noisy(), num_workers=workers)
        list(module.train_dataloader()), list(module.val_dataloader())
    assert states() == before


def test_arrays_skip_the_sample_part_only_where_it_changes_nothing():
    raw = arrays()
    fast = Mine(raw=raw, train_transforms=cifar.BaselineTransform())
    assert fast.samples("train").keeps
    assert fast._workers(fast.samples("train"), 9) == 0
    resized = Mine(raw=raw, train_transforms=cifar.BaselineTransform(size=16))
    assert not resized.samples("train").keeps
    assert drawn(resized)[0].input.shape == (10, 1, 16, 16)
    batch = drawn(fast)[0]
    assert torch.equal(batch.input, raw.inputs[batch.index])


def test_automatic_workers_are_none_in_memory_and_at_least_one_for_files():
    module = Mine(num_workers="auto", raw=arrays(), test_transforms=cifar.TestTransform(size=16))
    assert module.train_dataloader().num_workers == 0
    loader = module.val_dataloader()
    assert loader.num_workers == 1  # one batch: one worker
    assert loader.persistent_workers


def test_the_batch_part_makes_float32_and_is_keyed_by_epoch_and_index():
    module = Mine(raw=arrays(), train_transforms=cifar.BaselineCutoutTransform(mean=[0.5], std=[0.2]))
    batch = drawn(module)[0]
    first = module.batch_transform(batch, "train", 0)
    assert first.input.dtype == torch.float32
    assert torch.equal(first.index, batch.index)
    assert torch.equal(first.input, module.batch_transform(batch, "train", 0).input)
    assert not torch.equal(first.input, module.batch_transform(batch, "train", 1).input)
    order = torch.randperm(10)
    shuffled = module.batch_transform(Batch(*(part[order] for part in batch)), "train", 0)
    assert torch.equal(shuffled.input, first.input[order])
    plain = module.batch_transform(batch, "eval", 0)
    assert torch.allclose(plain.input, batch.input.float() / 255)


def test_the_batch_part_may_run_first_in_inference_mode_and_then_in_training():
    module = Mine(raw=arrays(), train_transforms=IdentityTransform(mean=[0.5], std=[0.2]))
    batch = drawn(module)[0]
    with torch.inference_mode():
        module.batch_transform(batch, "train", 0)
    weight = torch.ones(1, requires_grad=True)
    (module.batch_transform(batch, "train", 0).input * weight).sum().backward()
    assert weight.grad is not None


def test_samples_pickle_also_after_the_batch_part_ran():
    module = Mine(raw=arrays(), train_transforms=cifar.RandAugmentTransform())
    module.batch_transform(drawn(module)[0], "train", 0)
    again = pickle.loads(pickle.dumps(module.samples("train")))
    assert torch.equal(again[(1, [0, 1])].input, module.samples("train")[(1, [0, 1])].input)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named(tmp_path, workers):
    names = [f"{i}.png" for i in range(20)]
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "7.png").write_bytes(b"nonsense")
    module = Mine(raw=ImageFiles(tmp_path, names, np.arange(20) % 2, 1), num_workers=workers, batch_size=4)
    with pytest.raises(SampleError, match=r"7\.png"):
        list(module.train_dataloader()), list(module.val_dataloader())


def test_any_other_failure_names_the_sample():
    for read in (
        lambda: Samples(Broken(100), None, IdentityTransform(), "augment", 0)[(0, [4, 5])],
        lambda: Mine(raw=Broken(100)).check(),
    ):
        with pytest.raises(SampleError, match=r"sample 5.* \(Broken\): KeyError: 'oops'"):
            read()


def test_prediction_is_over_the_test_split_or_a_folder(tmp_path):
    module = Mine()
    assert [b.index.tolist() for b in module.predict_dataloader()] == [
        b.index.tolist() for b in module.val_dataloader()
    ]
    assert module.sample_name(7) == "7"
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for task, unknown in (("classification", -1.0), ("regression", float("nan"))):
        module = Mine(predict_dir=str(tmp_path), task=task)
        (batch,) = module.predict_dataloader()
        assert [module.sample_name(i) for i in batch.index.tolist()] == ["a.png", "b.png", "sub/c.png"]
        np.testing.assert_array_equal(batch.target.numpy(), [unknown] * 3)
        assert batch.input.shape == (3, 1, 8, 8)


def test_sample_names_are_of_the_split_asked_for(tmp_path):
    module = Mine(raw=ImageFiles(tmp_path, ["x/1.png", "y/2.png"], [0, 1], 1))
    assert module.sample_name(1, "train") == "y/2.png"


@pytest.mark.parametrize("options", [{}, {"random_batches": True}, {"balanced_batches": True}], ids=str)
@pytest.mark.parametrize("overfit", [0, 2])
def test_training_batches_read_once_more_are_those_that_were_trained_on(
    options: dict[str, Any], overfit: int
) -> None:
    module = Mine(raw=arrays(), **options)
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=1, current_epoch=0, overfit_batches=overfit,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    trained = drawn(module, epoch=3)[: overfit or None]
    assert same(list(module.training_batches(3, 100)), trained)
    assert same(module.training_batch(3, 1), trained[1:2])


def test_overfitting_repeats_the_order_of_the_first_epoch():
    module = Mine()
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=1, current_epoch=0, overfit_batches=2,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    first, later = drawn(module, 0), drawn(module, 3)
    assert [b.index.tolist() for b in first] == [b.index.tolist() for b in later]
    assert isinstance(module.train_dataloader().sampler, torch.utils.data.SequentialSampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 3, "folds": 3}, r"data\.module\.fold=3 must be below data\.cv\.k=3"),
        ({"fold": 1}, r"data\.module\.fold=1 must be below data\.cv\.k=1"),
        ({"folds": 2, "val_split": "test"}, r"data\.module\.val_split=test.*data\.cv\.k=2"),
        ({"num_classes": 5}, r"data\.num_classes=5: mine has 4 classes"),
        ({"val_split": "test"}, r"data\.module\.val_split=test: mine has no test split"),
        ({"folds": 101}, r"data\.cv\.k=101: there are only 100 samples"),
        ({"predict_dir": "/nowhere/at/all"}, r"data\.module\.predict_dir=/nowhere/at/all: no such folder"),
        (
            {"train_transforms": cifar.BaselineTransform(cutout_size=8)},
            r"data\.module\.train_transforms\.cutout_size=8: BaselineTransform makes no use of it",
        ),
        (
            {"test_transforms": cifar.TestTransform(mean=[0.5] * 3)},
            r"data\.module\.test_transforms: mean and std have 3 values, data\.input_channels is 1",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_names_the_option(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Mine(**options).check()
    assert "\n" not in str(caught.value)


def test_too_few_samples_for_the_ranks_are_refused():
    module = Mine(count=20, batch_size=10)
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=3, current_epoch=0, overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.module\.batch_size=10 on 3 devices"):
        module.train_dataloader()
    with pytest.raises(ConfigError, match=r"2 val samples, fewer than 3 devices"):
        module.val_dataloader()


def test_a_subclass_takes_the_options_of_the_base():
    names = signature_options(Mine)
    assert {"count", "batch_size", "fold", "folds", "split_seed", "seed", "predict_dir"} <= set(names)
