"""BaseDataModule: from raw data sets to batches, the same ones whatever machine they are made on."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from augmentation.policies.base import Policy
from augmentation.policies.default import IdentityTransform
from crucible.batch import Batch
from crucible.corrections import Correction, option_is
from crucible.files import missing
from crucible.keyed import stream_key
from crucible.listing import image_files
from crucible.machine import core_count
from crucible.memory import SHARED, shared_memory_free
from crucible.options import ConfigError
from crucible.pictures import Decoder, installed
from crucible.private import keep_queues
from datasets.cache import Cache, OnError, in_memory
from datasets.classes import NUMBERED, listed, match_classes, numbered_classes, read_class_map
from datasets.corrupted import Cell, CorruptedSamples
from datasets.groups import Groups, Joint, groups_of
from datasets.images import (
    SCHEME,
    Arrays,
    ImageFiles,
    Relabelled,
    SampleError,
    fingerprint,
    naming,
    sample_name,
)
from datasets.layout import SplitName
from datasets.samples import Samples
from datasets.sampling import (
    EpochSampler,
    EvalSampler,
    FrozenEpochSampler,
    batches_within,
    fold_out,
    hold_out,
    representative,
    unseparated,
)

Split = Literal["train", "val", "test", "predict"]
log = logging.getLogger("crucible")
_MOST_WORKERS = 16
_OF_DEVICE = 0.25  # of a device's free memory, which cache=auto may fill with data
_DRAWN_ALIKE = "a sample that came up several times in an epoch was augmented alike each time"
_IN_USE = 3  # batches that have left the queue: in the step, on their way to the device, and the next


def _hand_on(batch: Any) -> Any:
    """A batch as it is. A worker's is put where it is shared here, as what fails on its way to the queue is lost."""
    if get_worker_info() is not None:
        for tensor in batch:
            tensor.share_memory_()
    return batch


class _Loader(DataLoader):
    """Whose workers end at once wherever it is left, in an exception's traceback too."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        keep_queues(iterator)
        return iterator


def _once(setup: Callable[..., None]) -> Callable[..., None]:
    """`setup` that does nothing on a data module that is set up; one that failed may be tried again."""

    @functools.wraps(setup)
    def once(self: BaseDataModule, *args: Any, **kwargs: Any) -> None:
        if self.only_predicts:
            return
        if self._set_up == "under way":  # called by super()
            setup(self, *args, **kwargs)
        elif self._set_up == "no":
            self._set_up = "under way"
            try:
                setup(self, *args, **kwargs)
                if self.train_dataset is None:
                    raise ConfigError(
                        f"data.module._target_: the setup of {type(self).__name__} must set self.train_dataset, "
                        f"whatever the stage",
                        "docs/extending.md",
                    )
                self._match_labels()
                self._read_fast()
            except BaseException:
                self._set_up = "no"
                raise
            self._set_up = "done"

    return once


def _if_read(prepare_data: Callable[[Any], None]) -> Callable[[Any], None]:
    """`prepare_data` that does nothing where the data are not read."""

    @functools.wraps(prepare_data)
    def prepared(self: BaseDataModule) -> None:
        if not self.only_predicts:
            prepare_data(self)

    return prepared


def _targets(raw: Any) -> np.ndarray:
    """All targets of a raw data set; one that does not have them at hand is read."""
    targets = getattr(raw, "targets", None)
    if targets is None:
        targets = []
        for index in range(len(raw)):
            with naming(raw, index):
                targets.append(raw[index][1])
    return np.asarray(targets)


def _refuse_bad_targets(raw: Any, split: str, task: str, classes: int | None) -> None:
    """Of targets at hand: labels are numbers of classes, values are finite."""
    if (targets := getattr(raw, "targets", None)) is None or not len(targets):
        return
    values = np.asarray(targets)
    if values.dtype.kind not in "iufb":
        raise SampleError(
            f"the {split} split of {type(raw).__name__}: its targets are {values.dtype}, not numbers"
        )
    if task == "classification":
        bad = (values < 0) | (values >= classes) | (values % 1 != 0)
        allowed = f"a label is a whole number from 0 to {(classes or 1) - 1} (data.num_classes={classes})"
    else:
        bad, allowed = ~np.isfinite(values), "a value is a finite number"
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        name = f"sample {sample_name(raw, index)} of the {split} split ({type(raw).__name__})"
        raise SampleError(f"{name}: its target is {values[index]}; {allowed}")


# of (N,) targets; the sorted numbers of two parts
Division = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _by_unit(raw: Any, divide: Division) -> Division:
    """A division that leaves versions of one thing together, where the raw data set says which they are."""
    units = getattr(raw, "units", None)
    return divide if units is None else functools.partial(unseparated, np.asarray(units), divide)


class BaseDataModule(LightningDataModule):
    """What every data set shares: splits, order, augmentation, workers, checks.

    A subclass defines `setup`, which runs once for each data module whoever calls it, and sets
    `train_dataset` and, where it has them, `val_dataset` and `test_dataset`: raw data sets that return
    `(input, target)` with a PIL image, a uint8 tensor or a float tensor as input, untransformed.

        class MyData(BaseDataModule):
            def setup(self, stage: str) -> None:
                self.train_dataset = torchvision.datasets.ImageFolder(self.data_path / "train")

    What it does not set is made: validation is held out of the training samples, stratified by class or by
    deciles of the values, or is the test split (`val_split=test`); without a test split, the validation
    split is what `task=test` scores (`test_is_val`). Data with a validation split of their own use that one.
    Raw data sets may have `targets` (all targets; saves reading every sample for the split), `classes` (names
    of the classes), `names` (file names) and `content()` (bytes to fingerprint). Those with `groups` (names) and
    `group_numbers` (N,) are scored by group too (`val_<group>/acc`); `units` (N,) says which samples are versions of
    one thing, which no split separates. `split_folders` says what a packed copy calls each split: as the folder that
    it stands for does.

    Args:
        name: of the data set, also of the folder that its runs go to.
        data_root_dir: the folder of the data; null for data without files.
        batch_size: samples per device.
        train_transforms: policy of the training samples; null: `IdentityTransform`.
        test_transforms: policy of all other samples; null: `IdentityTransform`.
        random_batches: draw training samples with replacement.
        balanced_batches: draw each class as often, its samples alike, with replacement.
        drop_last: leave out of each epoch the samples that do not fill a batch; else they are a smaller one.
        num_workers: loader processes; "auto": none where nothing is left to do per sample, else one a core.
        prefetch_factor: batches each worker holds ready.
        persistent_workers: keep the workers from epoch to epoch.
        pin_memory: page-locked batches; "auto": with a CUDA device.
        val_split: fraction of the training samples, or the test split.
        fold: number of the fold that validates, with `folds` > 1.
        folds: cross-validation over the training samples; 1 is none.
        split_seed: of the hold-out and the folds, apart from `seed` so that all runs validate alike.
        seed: of order and augmentation.
        task: what the targets are.
        num_classes: expected classes; null: as many as are found, which it then holds.
        input_channels: channels of the images, 1 or 3.
        predict_dir: folder of unlabelled images for `task=predict`; null: the test split.
        cache: where pictures of one size are kept, decoded once; none: they are decoded each time. The numbers are
            the same. `auto` takes what fits.
        decoder: of JPEG files; auto takes the quickest that is installed. The pixels are the same.
        on_error: what a sample that cannot be read does: end the run, or be skipped, counted and reported.
        class_map: a YAML file `{name there: class of the network}` for testing on a folder whose classes have
            other names; null as the class leaves one out. Training takes none.
        corruption: for `task=test`: what is done to the test images, one of the 15 of ImageNet-C or of the 4 extra
            ones, several, `all` or `extra`; with `data_root_dir` a folder of ready ones is read. null: nothing.
        severity: of the corruption, 1 to 5; null or all: all five.
        real_labels: for `task=test` on ImageNet's validation images: a ReaL file of labels (a JSON list of lists).

    Raises:
        ConfigError: for options that contradict each other.
    """

    corrections: ClassVar[tuple[Correction, ...]] = tuple(
        Correction(option, 2, option_is(option), _DRAWN_ALIKE)
        for option in ("data.module.balanced_batches", "data.module.random_batches")
    )
    split_folders: ClassVar[Mapping[Split, SplitName]] = {"train": "train", "val": "val", "test": "test"}
    train_dataset: Any = None
    val_dataset: Any = None
    test_dataset: Any = None
    only_predicts = (
        False  # images of `predict_dir`, for a trained network: the data themselves need not be there
    )
    _set_up: Literal["no", "under way", "done"] = "no"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the `setup` of each subclass run once for each data module."""
        super().__init_subclass__(**kwargs)
        owner = next(c for c in cls.__mro__ if "setup" in vars(c))
        # one inherited from another data module is wrapped already; a mixin's is not
        if owner is cls or not issubclass(owner, BaseDataModule):
            setattr(cls, "setup", _once(vars(owner)["setup"]))  # noqa: B010  # to mypy, methods are constants
        if "prepare_data" in vars(cls):
            setattr(cls, "prepare_data", _if_read(vars(cls)["prepare_data"]))  # noqa: B010

    def __init__(
        self,
        *,
        name: str,
        data_root_dir: str | None = None,
        batch_size: Annotated[int, "[1, inf)"] = 128,
        train_transforms: Policy | None = None,
        test_transforms: Policy | None = None,
        random_batches: bool = False,
        balanced_batches: bool = False,
        drop_last: bool = True,
        num_workers: Literal["auto"] | Annotated[int, "[0, inf)"] = "auto",
        prefetch_factor: Annotated[int, "[1, inf)"] = 2,
        persistent_workers: bool = True,
        pin_memory: Literal["auto"] | bool = "auto",
        val_split: Literal["test"] | Annotated[float, "(0, 1)"] = 0.1,
        fold: Annotated[int, "[0, inf)"] = 0,
        folds: Annotated[int, "[1, inf)"] = 1,
        split_seed: Annotated[int, "[0, inf)"] = 0,
        seed: Annotated[int, "[0, inf)"] = 0,
        task: Literal["classification", "regression"] = "classification",
        num_classes: Annotated[int | None, "[1, inf)"] = None,
        input_channels: Annotated[int, "[1, inf)"] = 3,
        predict_dir: str | None = None,
        class_map: str | None = None,
        cache: Cache = "auto",
        decoder: Decoder = "auto",
        on_error: OnError = "raise",
        corruption: str | list[str] | None = None,
        severity: Literal["all"] | Annotated[int, "[1, 5]"] | None = None,
        real_labels: str | None = None,
    ) -> None:
        super().__init__()
        if fold >= folds:
            raise ConfigError(f"data.module.fold={fold} must be below data.cv.k={folds}")
        if folds > 1 and val_split == "test":
            raise ConfigError(f"data.module.val_split=test: with data.cv.k={folds} the folds validate")
        self.name = name
        self.data_root_dir = data_root_dir
        self.batch_size = batch_size
        self.train_transforms = train_transforms or IdentityTransform()
        self.test_transforms = test_transforms or IdentityTransform()
        if balanced_batches and task != "classification":
            raise ConfigError(
                "data.module.balanced_batches=true needs classes, which data.task=regression has none of"
            )
        if balanced_batches and random_batches:
            raise ConfigError(
                "data.module.random_batches=true: data.module.balanced_batches=true draws with replacement already"
            )
        self.random_batches = random_batches
        self.balanced_batches = balanced_batches
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory = pin_memory
        self.val_split = val_split
        self.fold = fold
        self.folds = folds
        self.split_seed = split_seed
        self.seed = seed
        self.task: str = task
        self.num_classes = num_classes
        self.input_channels = input_channels
        self.predict_dir = predict_dir
        self.class_map = class_map
        self.cache: Cache = cache
        self.decoder: Decoder = decoder
        self.on_error: OnError = on_error
        self.corruption = corruption
        self.severity = severity
        self.real_labels = real_labels
        self.cell: Cell | None = None  # what the test images suffer now
        self.trained_classes: list[str] | None = None
        self.elsewhere = False
        self.left_out: frozenset[int] = frozenset()  # samples that train no more, as in `Batch.index`
        self.remarks: list[str] = []  # what a reader should know of how the data were understood
        self._resume: dict[str, int] = {}
        self._divided: tuple[Any, np.ndarray, np.ndarray] | None = None
        self._unlabelled: ImageFiles | None = None
        self._on_device: dict[tuple[str, torch.device], Policy] = {}
        self._stores: dict[
            tuple[int, torch.device], Tensor
        ] = {}  # inputs on a device, by the array that they are of
        self._of_phase: dict[str, Samples] = {}  # what the loaders of each split read

    # Checks, before anything else is built

    def check(self) -> None:
        """Refuse what cannot work, in one line each; afterwards `num_classes` is a number.

        Raises:
            ConfigError: for a missing folder, classes that differ from `num_classes`, or
                policy options that have no effect.
        """
        self._check_policies()
        if self.class_map is not None:
            raise ConfigError(
                f"data.module.class_map={self.class_map}: is for testing a trained network on another folder"
            )
        for option in ("corruption", "severity", "real_labels"):
            if (value := getattr(self, option)) is not None:
                raise ConfigError(
                    f"data.module.{option}={value}: is for testing a trained network: "
                    f"python main.py run=RUN task=test data.module.{option}={value}",
                    "docs/data.md",
                )
        self.prepare_data()
        self._load()
        if self.val_split == "test" and self.test_dataset is None:
            raise ConfigError(f"data.module.val_split=test: {self.name} has no test split")
        if self.folds > 1 and self.val_dataset is not None:
            raise ConfigError(f"data.cv.k={self.folds}: {self.name} has a validation split of its own")
        if self.task == "classification":
            self._check_classes()
        for split in ("train", "val", "test"):
            _refuse_bad_targets(getattr(self, f"{split}_dataset"), split, self.task, self.num_classes)
        self.groups("val"), self.groups("test")
        self.samples("predict")

    def _check_policies(self) -> None:
        for role in ("train_transforms", "test_transforms"):
            policy = getattr(self, role)
            for option, value in getattr(policy, "unused_options", {}).items():
                raise ConfigError(
                    f"data.module.{role}.{option}={value!r}: {type(policy).__name__} makes no use of it"
                )
            given = getattr(policy, "channels_given", 0)
            if given not in (0, 1, self.input_channels):
                raise ConfigError(
                    f"data.module.{role}: mean and std have {given} values, data.input_channels is "
                    f"{self.input_channels}"
                )

    def _check_classes(self) -> None:
        found = len(self.class_names)
        if self.num_classes is None:
            self.num_classes = found
        elif self.num_classes != found:
            where = f" in {self.data_root_dir}" if self.data_root_dir else ""
            raise ConfigError(f"data.num_classes={self.num_classes}: {self.name} has {found} classes{where}")

    @property
    def data_path(self) -> Path:
        """`data_root_dir` as a path.

        Raises:
            ConfigError: where it is not given or not a folder.
        """
        if self.data_root_dir is None:
            raise ConfigError("data.module.data_root_dir is missing: the folder of the data")
        path = Path(self.data_root_dir).expanduser()
        if not path.is_dir():
            raise ConfigError(
                f"data.module.data_root_dir={self.data_root_dir}: {missing(path)}; "
                "give the folder of the data, or set data_dir"
            )
        return path

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of their numbers; empty for regression."""
        if self.task != "classification":
            return []
        if self.trained_classes is not None:
            return list(self.trained_classes)
        self._load()
        names = getattr(self.train_dataset, "classes", None)
        return list(names) if names else [str(i) for i in range(int(self._train_targets().max()) + 1)]

    @property
    def test_is_val(self) -> bool:
        """Whether testing uses the validation samples, for want of a test split."""
        self._load()
        return self.test_dataset is None

    def fingerprint(self, scheme: int = SCHEME) -> str:
        """What the data are, in 16 hexadecimal digits, wherever they lie.

        Arrays are taken whole; of files, the relative names, the targets, and their content in a bounded time.

        Args:
            scheme: of files; 1 is that of older runs, which took the sizes of some thousands.
        """
        self._load()
        return fingerprint([self.train_dataset, self.val_dataset, self.test_dataset], scheme)

    # For a trained network

    def score_for(self, classes: Sequence[str] | None, elsewhere: bool) -> None:
        """Number the labels as a trained network does, by the names of its classes; before `setup`.

        Args:
            classes: the network's, in the order of its outputs; None: unknown, labels are taken by position.
            elsewhere: these are not the data that it was trained on: all that a reader would score is the
                test split, where there is none all images.
        """
        assert self._set_up == "no"
        self.only_predicts = self.predict_dir is not None
        self.trained_classes = list(classes) if classes and self.task == "classification" else None
        self.elsewhere = elsewhere

    def _match_labels(self) -> None:
        known = self.trained_classes
        if known is None:
            return
        class_map, done = read_class_map(self.class_map), {}
        for role in ("train_dataset", "val_dataset", "test_dataset"):
            raw = getattr(self, role)
            found = list(getattr(raw, "classes", None) or [])
            if found and (found != known or class_map):
                if id(raw) not in done:
                    done[id(raw)] = raw, self._relabelled(raw, found, known, class_map)
                setattr(self, role, done[id(raw)][1])

    def _read_fast(self) -> None:
        """Tell the files their decoder, and decode what is to be kept in memory."""
        if self.decoder == "simplejpeg" and installed() is None:
            raise ConfigError(
                "data.module.decoder=simplejpeg: is not installed; pip install -e '.[fast]', or decoder=auto"
            )
        done: dict[int, Any] = {}
        for role in ("train_dataset", "val_dataset", "test_dataset"):
            raw = getattr(self, role)
            if hasattr(raw, "decoder"):
                raw.decoder = self.decoder
            if hasattr(raw, "lenient"):
                raw.lenient = self.on_error == "skip"
            if isinstance(raw, ImageFiles):
                if id(raw) not in done:
                    beside = Path(self.data_root_dir or raw.root).expanduser()
                    done[id(raw)] = raw, in_memory(raw, self.cache, self.on_error, beside)
                setattr(self, role, done[id(raw)][1])

    def check_classes_known(self, classes: Sequence[str], class_map: str | None) -> None:
        """Refuse data of which a trained network does not know a class; labels without names are taken by position.

        Args:
            classes: the network's.
            class_map: a file, as the option of this name.

        Raises:
            ConfigError: for a class that it does not know.
        """
        self._load()
        mapping = read_class_map(class_map)
        for raw in (self.train_dataset, self.val_dataset, self.test_dataset):
            if found := list(getattr(raw, "classes", None) or []):
                self._numbers(raw, found, list(classes), mapping)

    def _numbers(
        self, raw: Any, found: list[str], known: list[str], class_map: dict[str, str | None]
    ) -> np.ndarray:
        """The number in `known` of each class that is found."""
        where = f"data.module.data_root_dir: {getattr(raw, 'root', self.data_root_dir or self.name)}"
        numbers = None if class_map else numbered_classes(found, known)
        if numbers is not None:
            if NUMBERED not in self.remarks:
                self.remarks.append(NUMBERED)
            return numbers
        try:
            return match_classes(found, known, where, "the network has", class_map)
        except ConfigError as error:
            raise ConfigError(f"{error}; data.module.class_map=FILE says what is called what") from None

    def _relabelled(
        self, raw: Any, found: list[str], known: list[str], class_map: dict[str, str | None]
    ) -> Any:
        numbers = self._numbers(raw, found, known, class_map)
        if hasattr(raw, "relabelled"):
            return raw.relabelled(numbers, known)
        return Relabelled(raw, _targets(raw), numbers, known)

    def scored(self) -> list[str]:
        """What a test scores, in a line or two: images and classes, and the classes that are left out."""
        samples = self.samples("test")
        if self.task != "classification":
            return [f"{len(samples)} images"]
        targets = _targets(samples.raw)
        present = set((targets if samples.indices is None else targets[samples.indices]).tolist())
        names = self.class_names
        absent = [name for number, name in enumerate(names) if number not in present]
        lines = [f"{len(samples)} images of {len(names) - len(absent)} of {len(names)} classes"]
        if (groups := self.groups("test")) is not None:
            counts = groups.counts(samples.indices)
            lines.append(f"by group: {', '.join(f'{count} of {name}' for name, count in counts.items())}")
        return [*lines, f"left out, without an image: {listed(absent)}"] if absent else lines

    # Splits

    def hold_out_test(self, raw: ImageFiles | Arrays | Joint, fraction: float) -> None:
        """Set `train_dataset` and `test_dataset` from data without a test split; 0: there is none.

        The test samples are the same for every `split_seed`, so that none of them ever trains. For a network
        that was trained elsewhere, all are test samples.
        """
        self.train_dataset = raw
        if self.elsewhere:
            self.test_dataset = raw
        elif fraction > 0:
            divide = _by_unit(raw, functools.partial(hold_out, fraction=fraction, task=self.task, seed=0))
            kept, held = divide(np.asarray(raw.targets))
            self.train_dataset, self.test_dataset = raw.subset(kept), raw.subset(held)

    def setup(self, stage: str) -> None:
        """Set the raw data sets of all splits; a subclass defines it.

        Args:
            stage: Lightning's fit, validate, test or predict, whichever is first. There is no second call.
        """
        raise NotImplementedError(f"{type(self).__name__} must define setup and set self.train_dataset")

    def _load(self) -> None:
        if self._set_up == "no":
            self.setup("fit")

    def _train_targets(self) -> np.ndarray:
        return _targets(self.train_dataset)

    def _division(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the samples that train, and of those held out."""
        raw = self.train_dataset
        if self._divided is None or self._divided[0] is not raw:
            self._divided = (raw, *_by_unit(raw, self._divide)(self._train_targets()))
        return self._divided[1:]

    def _divide(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.folds > 1:
            if len(targets) < self.folds:
                raise ConfigError(f"data.cv.k={self.folds}: there are only {len(targets)} samples")
            return fold_out(targets, self.fold, self.folds, self.task, self.split_seed)
        assert self.val_split != "test"
        return hold_out(targets, self.val_split, self.task, self.split_seed)

    def groups(self, split: Literal["val", "test"]) -> Groups | None:
        """The groups of a split's samples, by `Batch.index`, that are scored each by itself too; None: there are none.

        Raises:
            ConfigError: for groups that the raw data set declares wrongly.
        """
        return groups_of(self.samples(split).raw)

    def samples(self, split: Split) -> Samples:
        """The samples of a split with their policy; item `(epoch, [places])` is a batch."""
        if split != "train":
            return self.evaluated(split)
        samples = Samples(*self._raw(split), self.train_transforms, "augment", self.seed, split)
        if self.on_error == "skip":
            samples.on_unreadable = "replace"
        return samples

    def evaluated(self, split: Split) -> Samples:
        """The samples of a split, of the training too, as an evaluation reads them."""
        samples = Samples(*self._raw(split), self.test_transforms, "evaluate", self.seed, split)
        if self.on_error == "skip":
            samples.on_unreadable = "drop"
        return samples

    def _raw(self, split: Split) -> tuple[Any, np.ndarray | None]:
        """The raw data set that a split is in, and its numbers there; None: all."""
        if split == "predict" and self.predict_dir is not None:
            self._load()
            return self._images_to_predict(), None
        self._load()
        if split == "train":
            whole = self.val_dataset is not None or (self.val_split == "test" and self.folds == 1)
            return self.train_dataset, None if whole else self._division()[0]
        if split != "val" and self.test_dataset is not None:
            return self.test_dataset, None
        if self.val_dataset is not None:
            return self.val_dataset, None
        if self.val_split == "test":
            return self.test_dataset, None
        return self.train_dataset, self._division()[1]

    def _images_to_predict(self) -> ImageFiles:
        if self._unlabelled is None:
            folder = Path(self.predict_dir or "").expanduser()
            if not folder.is_dir():
                raise ConfigError(f"data.module.predict_dir={self.predict_dir}: no such folder")
            names = image_files(folder)
            if not names:
                raise ConfigError(f"data.module.predict_dir={self.predict_dir}: no images in it")
            unknown = (
                np.full(len(names), -1) if self.task == "classification" else np.full(len(names), np.nan)
            )
            self._unlabelled = ImageFiles(folder, names, unknown, self.input_channels)
            self._unlabelled.decoder = self.decoder
        return self._unlabelled

    def sample_name(self, index: int, split: Split = "predict") -> str:
        """The file of sample `index` (as in `Batch.index`) relative to the data's folder, else its number."""
        return sample_name(self.samples(split).raw, index)

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches, all of one size but for a last one; begins where a restored state ended."""
        samples, (rank, world) = self.samples("train"), self._place()
        whole = self.batch_size * world
        if len(samples) < whole:
            raise ConfigError(
                f"data.module.batch_size={self.batch_size} on {world} devices makes batches of {whole}: "
                f"{self.name} has only {len(samples)} training samples"
            )
        self._count_unreadable(samples)
        self._keep_on_device(samples)
        self._of_phase["train"] = samples
        return self._loader(samples, self._training_order(samples, rank, self._start(len(samples), whole)))

    def _training_order(self, samples: Samples, rank: int, start: tuple[int, int]) -> EpochSampler:
        frozen = getattr(self.trainer, "overfit_batches", 0) > 0
        return (FrozenEpochSampler if frozen else EpochSampler)(
            len(samples),
            self.batch_size,
            self.seed,
            rank=rank,
            world_size=self._place()[1],
            replace=self.random_batches,
            start=start,
            frozen=frozen,
            left_out=self._places_left_out(samples),
            chances=self._chances(),
            drop_last=self.drop_last,
        )

    def _training_labels(self) -> np.ndarray:
        """(N,) int64 of the samples that train, by their places."""
        targets, chosen = self._train_targets(), self.samples("train").indices
        return (targets if chosen is None else targets[chosen]).astype(np.int64)

    def class_counts(self) -> np.ndarray:
        """(K,) int64: how many of the samples that train are of each class."""
        return np.bincount(self._training_labels(), minlength=self.num_classes or 0)

    def _chances(self) -> np.ndarray | None:
        """(N,) of the samples that train; None: they are equal."""
        if not self.balanced_batches:
            return None
        labels = self._training_labels()
        return 1 / np.bincount(labels)[labels]

    def _places_left_out(self, samples: Samples) -> list[int]:
        if not self.left_out or samples.indices is None:
            return sorted(self.left_out)
        return np.flatnonzero(np.isin(samples.indices, sorted(self.left_out))).tolist()

    def training_batch(self, epoch: int, batch: int) -> list[Batch]:
        """One batch of the training as each rank's loader delivered it, read once more."""
        samples = self.samples("train")
        orders = (self._training_order(samples, rank, (epoch, batch)) for rank in range(self._place()[1]))
        return [samples[next(iter(order))] for order in orders]

    def training_batches(self, epoch: int, count: int) -> Iterator[Batch]:
        """The first `count` batches of an epoch once more, at most all of them; apart from the training's loader."""
        samples = self.samples("train")
        order = self._training_order(samples, self._place()[0], (epoch, 0))
        most = batches_within(len(order), getattr(self.trainer, "overfit_batches", 0) or None)
        return itertools.islice(self._loader(samples, order), min(count, most))

    def val_dataloader(self) -> DataLoader:
        """Each validation sample once over all ranks, in order; under `limit_val_batches` a draw of them."""
        return self._evaluation_loader("val")

    def corrupt(self, cell: Cell | None) -> None:
        """Let the test images suffer a corruption from now on; None: none.

        Raises:
            ConfigError: where they are no pictures.
        """
        self.cell = cell
        self._for_evaluation("test")

    def _for_evaluation(self, split: Split) -> Samples | CorruptedSamples:
        samples = self.samples(split)
        return samples if split != "test" or self.cell is None else CorruptedSamples(samples, self.cell)

    def test_dataloader(self) -> DataLoader:
        """Each test sample once over all ranks, in order; under `limit_test_batches` a draw of them."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Each image of `predict_dir`, or test sample, once over all ranks, in order."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: Split) -> DataLoader:
        samples, (rank, world) = self._for_evaluation(split), self._place()
        whole = samples.samples if isinstance(samples, CorruptedSamples) else samples
        if split == "predict":
            whole.on_unreadable = "blank"  # one bad image loses its own row only
        else:
            self._count_unreadable(whole)
            if whole is samples:
                self._keep_on_device(whole)
        self._of_phase[split] = whole
        if len(samples) < world:
            raise ConfigError(
                f"trainer.devices: {self.name} has {len(samples)} {split} samples, fewer than {world} devices"
            )
        sampler = EvalSampler(len(samples), self.batch_size, rank=rank, world_size=world)
        limit = None if split == "predict" else getattr(self.trainer, f"limit_{split}_batches", None)
        if 0 < batches_within(len(sampler), limit) < len(sampler):
            # drawn alike whatever trains, so that runs are compared on the same samples
            targets = _targets(samples.raw)
            of_split = targets if samples.indices is None else targets[samples.indices]
            sampler.order = representative(of_split, self.task, self.split_seed)
        return self._loader(samples, sampler)

    def seen(self, split: Literal["val", "test"]) -> int:
        """The samples of a split, of all ranks, that the trainer's limit leaves."""
        sampler = EvalSampler(len(self.samples(split)), self.batch_size, world_size=self._place()[1])
        return sampler.seen(getattr(self.trainer, f"limit_{split}_batches", None))

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(self, samples: Samples | CorruptedSamples, sampler: EpochSampler | EvalSampler) -> DataLoader:
        workers, prefetch = self._within_shared_memory(samples, sampler, self._workers(samples, len(sampler)))
        return _Loader(
            samples,
            batch_size=None,  # the sampler delivers whole batches
            sampler=sampler,
            collate_fn=_hand_on,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=self.persistent_workers and workers > 0,
            pin_memory=self._on_cuda() if self.pin_memory == "auto" else self.pin_memory,
            generator=torch.Generator(),  # the loader's own draws then leave the global generator alone
        )

    def _on_cuda(self) -> bool:
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type == "cuda"

    def _workers(self, samples: Samples | CorruptedSamples, batches: int) -> int:
        if self.num_workers != "auto":
            return self.num_workers
        if samples.keeps or (isinstance(samples, CorruptedSamples) and samples.few):
            return 0
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return max(1, min(core_count() // processes, _MOST_WORKERS, batches))

    def _within_shared_memory(
        self, samples: Samples | CorruptedSamples, sampler: EpochSampler | EvalSampler, workers: int
    ) -> tuple[int, int]:
        """As many workers and batches ready as there is memory to hand them on through; a loader takes half of it."""
        wanted = workers, self.prefetch_factor
        free = shared_memory_free()
        if not workers or len(sampler) == 0 or free == float("inf"):
            return wanted
        one = samples.example()
        batch = self.batch_size * sum(tensor.nbytes for tensor in one)
        processes = 1 if self.trainer is None else self.trainer.num_devices
        room = int(free / 2 / processes / batch) - _IN_USE
        if room >= workers * self.prefetch_factor:
            return wanted
        workers = min(workers, max(room, 0))
        prefetch = min(self.prefetch_factor, room // workers) if workers else 0
        remark = (
            f"data.module.num_workers={wanted[0]}, prefetch_factor={wanted[1]}: {SHARED} has {free / 2**20:.0f} MiB "
            f"free and a batch takes {batch / 2**20:.1f}: {workers or 'no'} workers here, "
            f"{prefetch} batches ahead each; the numbers stay the same (docker run --shm-size=8g gives more)"
        )
        if remark not in self.remarks:
            self.remarks.append(remark)
            log.warning("%s", remark)
        return workers, prefetch

    def _count_unreadable(self, samples: Samples) -> None:
        if self.on_error == "skip":
            samples.mark_unreadable()

    # Data that lie on the device

    def _keep_on_device(self, samples: Samples) -> None:
        """Let the loader deliver no inputs, where they are taken from a copy on the device."""
        asked = self.cache == "device"
        if not samples.keeps:
            if asked:
                raise ConfigError(
                    f"data.module.cache=device: the {samples.split} samples need work of their own on the CPU "
                    f"({type(samples.policy).__name__}, or data that are not in memory); cache=auto takes what fits"
                )
            return
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if not asked and (self.cache != "auto" or device.type != "cuda"):
            return
        inputs = samples.raw.inputs
        if (id(inputs), device) not in self._stores and device.type == "cuda":
            free, part = torch.cuda.mem_get_info(device)[0], 0.5 if asked else _OF_DEVICE
            if inputs.nbytes > free * part:
                if asked:
                    raise ConfigError(
                        f"data.module.cache=device: the {samples.split} samples take {inputs.nbytes / 2**30:.1f} GiB, "
                        f"half of what {device} has free is {free * part / 2**30:.1f}; cache=memory keeps them here"
                    )
                return
        samples.without_input = True

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device; inputs that are kept there are taken from the copy by `batch.index`."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if not isinstance(moved, Batch) or len(moved.input) == len(moved.target):
            return moved
        inputs = self._stages_samples().raw.inputs
        store = self._stores.get((id(inputs), device))
        if store is None:
            with torch.inference_mode(False):  # evaluation may come first; training reads it, too
                store = self._stores[id(inputs), device] = inputs.to(device)
        repeats = self.random_batches or self.balanced_batches or self.left_out
        # two kernels fewer where no sample comes up twice: then a visit is the sample's number
        return moved._replace(input=store[moved.index if repeats else moved.visit])

    def _stages_samples(self) -> Samples:
        """Those that the trainer's present loop takes its batches from."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.testing:
            return self._of_phase["test"]
        return self._of_phase["val" if trainer.validating or trainer.sanity_checking or trainer.evaluating
                              else "train"]  # fmt: skip

    def unread(self, split: Split) -> Tensor | None:
        """Which samples of a split this process has skipped, (of the raw data,) uint8; None where none may be."""
        samples = self._of_phase.get(split)
        return None if samples is None else samples.unread

    # Resume: the order is a function of the epoch, so that two counters are the whole state

    def state_dict(self) -> dict[str, int]:
        """Epoch and batch that come next, and what they count."""
        trainer = self.trainer
        assert trainer is not None
        epoch: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batch = batches.processed
        # inside an epoch it is started but not yet processed; limit_train_batches may end it early
        inside = epoch.started > epoch.processed and batch < trainer.num_training_batches
        return {
            "epoch": epoch.processed if inside else epoch.started,
            "batch": batch if inside else 0,
            "samples": len(self.samples("train")),
            "global_batch_size": self.batch_size * self._place()[1],
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader begin where `state_dict` says."""
        self._resume = dict(state_dict)

    def _start(self, samples: int, global_batch_size: int) -> tuple[int, int]:
        state, self._resume = self._resume, {}
        epoch, batch = state.get("epoch", 0), state.get("batch", 0)
        if batch and (state["samples"], state["global_batch_size"]) != (samples, global_batch_size):
            raise ConfigError(
                f"data.module.batch_size={self.batch_size}: the checkpoint lies inside an epoch of "
                f"{state['samples']} samples in batches of {state['global_batch_size']}, here are {samples} "
                f"in batches of {global_batch_size}"
            )
        # loaders can also be made anew in a later epoch (reload_dataloaders_every_n_epochs)
        current = 0 if self.trainer is None else self.trainer.current_epoch
        return (epoch, batch) if epoch >= current else (current, 0)

    # The device part

    def batch_transform(self, batch: Batch, stage: Literal["train", "eval"], epoch: int) -> Batch:
        """The policy's batch part on the device that the batch is on; input becomes float32.

        Args:
            batch: as the loaders deliver it.
            stage: train for the training policy, eval for the other one.
            epoch: keys the random draws, together with the seed and `batch.visit`.
        """
        device = batch.input.device
        policy = self._on_device.get((stage, device))
        if policy is None:
            # a copy: workers are handed the original, which has to stay on the CPU. And a normal tensor,
            # also where evaluation comes first and runs in inference mode.
            with torch.inference_mode(False):
                policy = copy.deepcopy(self.train_transforms if stage == "train" else self.test_transforms)
                policy.to(device)
            self._on_device[stage, device] = policy
        key = torch.full((), stream_key(self.seed, "batch", epoch), dtype=torch.int64, device=device)
        # what the loader put together may have a pixel's channels together
        return batch._replace(input=policy(batch.input.contiguous(), batch.visit, key))
