"""Trained weights meet data: labels by the names of the classes, and whose record it is that comes out."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from crucible.configuration import Config, flatten, is_semantic
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.trust import judge
from datasets.base_datamodule import BaseDataModule
from datasets.images import SCHEME, SampleError
from lab.build import build_data
from lab.experiment import identity
from lab.recorded import EVALUATION_OPTIONS, completed
from models.weights import named_classes

# what of the data's options leaves a test as it is
_NOT_OF_A_TEST = ("train_transforms", "random_batches", "drop_last", "batch_size", "predict_dir")

# what says which data they are
_PLACES = (
    "data_root_dir", "stylized_root_dir", "csv_file", "train_shards", "val_shards", "test_shards", "classes_file",
    "class_map", "_target_",
)  # fmt: skip


class DataToScore(NamedTuple):
    """The data that a run's weights are to be scored on.

    Args:
        data: set up, its labels numbered as the network's outputs.
        folder: where the record belongs: the run's for its own data, else `RUN/tests/<fingerprint>`.
        fingerprint: of the data.
        own: whether they are the run's own, read as the run itself tests them.
        remarks: what has to be said of them.
    """

    data: BaseDataModule
    folder: Path
    fingerprint: str
    own: bool
    remarks: list[str]


def data_to_score(run: RunDirectory, config: Config, checkpoint: Path, *, whole: bool = False) -> DataToScore:
    """The data of a configuration for the weights of a recorded run.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        whole: all of the split is read, whatever `trainer.limit_test_batches` says.

    Raises:
        ConfigError: for data that cannot be read, and classes that the network does not know.
    """
    as_recorded = run.config()
    judge({n: as_recorded.get(n) for n in ("model", "data", "user_dir")}, f"run={run.path}")
    recorded = completed(as_recorded)
    limits = (None if whole else c["trainer"].get("limit_test_batches") for c in (recorded, config))
    before, now = ({**_flat(c), "limit": limit} for c, limit in zip((recorded, config), limits, strict=True))
    changed = {n: now.get(n) for n in before.keys() | now.keys() if before.get(n) != now.get(n)}
    moved = any(now.get(n) != before.get(n) for n in _PLACES)
    classes, source = trained_classes(run, recorded, checkpoint)
    options = {n: v for n, v in changed.items() if n == "limit" or of_a_test(n)}
    options |= {n: config[n] for n in EVALUATION_OPTIONS if config.get(n)}
    given = "given" in run.known()  # weights from elsewhere: no data are those of a training here
    if config["data"]["module"].get("predict_dir") is not None:
        if recorded["data"]["task"] == "classification" and not classes:
            classes = [str(number) for number in range(recorded["data"]["num_classes"])]
        return DataToScore(
            _data(config, classes, elsewhere=False), run.path, "", True, [source] if source else []
        )
    data = _data(config, classes, elsewhere=False)
    known, remarks = run.summary().get("data_fingerprint"), [source] if source and moved else []
    own = True
    if given:
        data = _data(config, classes, elsewhere=True)
        data.prepare_data()
        own = data.fingerprint() == known
        remarks = [*data.remarks, *remarks]
    elif moved:
        try:
            own = _is_the_runs(run, recorded, data)
        except ConfigError:  # it has no training images, say
            own = False
        if not own:
            data = _data(config, classes, elsewhere=True)
            data.prepare_data()
            own = data.fingerprint() == known  # it has been downloaded
            remarks = [*data.remarks, *remarks]
    else:
        data.prepare_data()
        if known and not options and data.fingerprint() != known:
            own = False
            remarks.append("these data have changed since the training, which may have seen some of them")
    content = data.fingerprint()
    if own and not options:
        return DataToScore(data, run.path, content, True, remarks)
    text = json.dumps(options, sort_keys=True, default=str)
    name = f"{content}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if options else content
    return DataToScore(data, run.path / "tests" / name, content, False, remarks)


def data_if_there(run: RunDirectory, config: Config, checkpoint: Path) -> tuple[DataToScore | None, str]:
    """`data_to_score`; None, and why, where the data cannot be read here."""
    try:
        found = data_to_score(run, config, checkpoint)
        found.data.samples("predict")
    except (ConfigError, SampleError, OSError) as error:
        return None, str(error)
    return found, ""


def trained_classes(run: RunDirectory, recorded: Config, checkpoint: Path) -> tuple[list[str] | None, str]:
    """The names of a network's classes in the order of its outputs, and what is to be said where they are a guess.

    They stand in the checkpoint and in the run's summary; those of older runs are read from the recorded
    folder of the data. None where that is gone, too.
    """
    if recorded["data"]["task"] != "classification":
        return None, ""
    if names := named_classes(checkpoint) or run.summary().get("classes"):
        return list(names), ""
    count, folder = recorded["data"]["num_classes"], recorded["data"]["module"].get("data_root_dir")
    with contextlib.suppress(ConfigError, OSError):
        data = build_data(recorded)
        if len(data.class_names) == count:
            return (
                data.class_names,
                f"the classes' names are those in {folder or 'the data'}: the run recorded none",
            )
    return None, "labels are taken by position: the run recorded no names of classes, and its data are gone"


def _data(config: Config, classes: list[str] | None, elsewhere: bool) -> BaseDataModule:
    data = build_data(config)
    data.score_for(classes, elsewhere)
    return data


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(config["data"]["module"])


def of_a_test(name: str) -> bool:
    """Whether an option of the data's module changes what a test reads."""
    return is_semantic(f"data.module.{name}") and not name.startswith(_NOT_OF_A_TEST)


def _is_the_runs(run: RunDirectory, recorded: Config, data: BaseDataModule) -> bool:
    """Whether data that lie elsewhere are those of the run; of one without a fingerprint, its id tells."""
    summary = run.summary()
    if known := summary.get("data_fingerprint"):
        return data.fingerprint() == known
    versions, own = summary.get("corrected") or {}, summary.get("identity")
    if any(identity(recorded, {"data": data.fingerprint(s)}, versions) == own for s in (1, SCHEME)):
        return True
    with contextlib.suppress(ConfigError, OSError):
        return build_data(recorded).fingerprint() == data.fingerprint()
    return False
