"""Tests under corruptions: a table over corruption and severity, recorded cell by cell, and its means."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from augmentation.corruptions import COMMON, SEVERITIES, VERSION
from crucible.configuration import Config, flatten
from crucible.console import console, is_live, print_table, say
from crucible.files import why_not_writable, write_atomically
from crucible.machine import is_child_rank
from crucible.options import ConfigError, signature_options
from crucible.robustness import averages
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from datasets.corrupted import SEE, Cell, wanted_cells
from datasets.ready import ReadyCorruptionsDataModule, find_ready
from datasets.sampling import EvalSampler
from lab.build import build_data, build_trainer, file_fingerprint, with_weights
from lab.recorded import completed
from lab.scoring import data_to_score, of_a_test, trained_classes

SCHEMA = 1
_WNID = re.compile(r"n\d{8}")


def asks_for_corruptions(config: Config) -> bool:
    """Whether the configuration's test is one under corruptions."""
    module = config["data"]["module"]
    return module.get("corruption") is not None or module.get("severity") is not None


class _Corruptible(NamedTuple):
    """The data of a test, where its record belongs, and what is to be said of them."""

    data: Any  # a data module with `corrupt`
    folder: Path
    fingerprint: str
    own: bool
    remarks: list[str]
    ready: bool


def test_corrupted(run: RunDirectory, config: Config, checkpoint: Path, out: Path | None) -> int:
    """Score the test split under each corruption that is asked for, and say and record it as a table.

    Cells that an earlier test of the same weights and data has recorded are not computed again; each one is recorded
    as it comes, so that the same command goes on where it was stopped.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        out: the file to write to; None: `corruptions_<checkpoint>.json` in `RUN/tests/<fingerprint of the data>`.

    Returns:
        the exit status.

    Raises:
        ConfigError: for corruptions that there are not, and data that cannot have them.
    """
    module = config["data"]["module"]
    cells = wanted_cells(module.get("corruption"), module.get("severity"))
    if config["data"]["task"] != "classification":
        raise ConfigError(f"data.module.corruption={module['corruption']}: is for classification", see=SEE)
    config = _plain(config)
    found = _data(run, config, checkpoint)
    path = out or found.folder / f"corruptions_{checkpoint.stem}.json"
    why_not = why_not_writable(path.parent.absolute())
    if out and why_not:
        raise ConfigError(
            f"out={out}: cannot be written ({why_not}); out=FILE writes elsewhere", see="README.md"
        )
    trainer = build_trainer(config, run.path, [], [])
    found.data.corrupt(cells[0])  # data that are no pictures are said before the network is loaded
    model = with_weights(config, checkpoint)
    whole = len(found.data.samples("test"))
    classes = found.data.class_names
    limit = config["trainer"].get("limit_test_batches")
    sampler = EvalSampler(whole, found.data.batch_size, world_size=trainer.world_size)
    facts = {
        "schema": SCHEMA, "checkpoint": checkpoint.name, "weights": file_fingerprint("ckpt_path", str(checkpoint)),
        "data": found.fingerprint, "own_data": found.own, "ready": found.ready, "folder": module.get("data_root_dir"),
        "version": None if found.ready else VERSION, "metrics_asked": sorted(config["metrics"]),
        "limit": limit, "samples": sampler.seen(limit), "read": _read_as(module), "classes": len(classes),
        "imagenet": len(classes) == 1000 and all(_WNID.fullmatch(name) for name in classes),
    }  # fmt: skip
    record, note = _earlier(path, facts)
    missing = [c for c in cells if str(c.severity) not in record["cells"].get(c.corruption, {})]
    clean: list[Cell | None] = [] if found.ready or record["clean"] else [None]
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console(), transient=True, disable=not is_live() or is_child_rank()) as bar:
        task = bar.add_task("", total=len(clean) + len(missing))
        for cell in [*clean, *missing]:
            bar.update(task, description=" ".join(map(str, cell)) if cell else "as they are")
            found.data.corrupt(cell)
            trainer.test(model, datamodule=found.data, verbose=False)
            values = {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()}
            values = {k: v for k, v in values.items() if "/" not in k}
            if cell is None:
                record["clean"] = values
            else:
                record["cells"].setdefault(cell.corruption, {})[str(cell.severity)] = values
            record |= {"averages": averages(record), "time": time.time()}
            if trainer.is_global_zero and not why_not:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(record, indent=2) + "\n")
            bar.advance(task)
    if not is_child_rank():
        known = len(cells) - len(missing)
        computed = f"{known} of {len(cells)} cells were known" if known else ""
        limited = f"on {record['samples']} drawn of {whole} samples" if record["samples"] < whole else ""
        unsaved = f"not recorded: {why_not}; out=FILE writes elsewhere" if why_not else ""
        say(f"test of {run.path.name}/{checkpoint.name} under corruptions")
        for line in filter(None, [note, *found.remarks, limited, computed, unsaved]):
            say(f"  {line}")
        show(record, cells)
        if not why_not:
            say(f"  ->  {path}")
    return 0


def _plain(config: Config) -> Config:
    """The configuration of one cell's test: without what asks for the table, with the metrics of its cells."""
    module = {**config["data"]["module"], "corruption": None, "severity": None}
    metrics = list(dict.fromkeys([*config["metrics"], "acc", "ece"]))
    trainer = {**config["trainer"], "enable_progress_bar": False}
    return {
        **config, "data": {**config["data"], "module": module}, "metrics": metrics, "trainer": trainer,
        "model": {**config["model"], "metrics": metrics},
    }  # fmt: skip


def _data(run: RunDirectory, config: Config, checkpoint: Path) -> _Corruptible:
    module = config["data"]["module"]
    if find_ready(module.get("data_root_dir")) is not None:
        own = signature_options(BaseDataModule)
        target = f"{ReadyCorruptionsDataModule.__module__}.{ReadyCorruptionsDataModule.__name__}"
        node = {"_target_": target, **{n: v for n, v in module.items() if n in own}}
        ready: Any = build_data({**config, "data": {**config["data"], "module": node}})
        classes, source = trained_classes(run, completed(run.config()), checkpoint)
        ready.score_for(classes, elsewhere=True)
        ready.setup("test")
        remarks = [
            f"ready corrupted images in {module['data_root_dir']}",
            *ready.remarks,
            *filter(None, [source]),
        ]
        return _Corruptible(ready, run.path / "tests" / ready.content, ready.content, False, remarks, True)
    found = data_to_score(run, config, checkpoint)
    own_data = found.fingerprint == run.summary().get(
        "data_fingerprint", found.fingerprint if found.own else None
    )
    folder = run.path / "tests" / found.fingerprint if found.own else found.folder
    whose = [] if own_data else [f"other data than the run's own (fingerprint {found.fingerprint})"]
    return _Corruptible(
        found.data, folder, found.fingerprint, own_data, [*whose, *found.data.scored(), *found.remarks], False
    )


# a limit counts batches, whose size and devices may be others: how many images it leaves says which they are
_MUST_AGREE = {
    "schema": "schema", "weights": "weights", "data": "data", "ready": "ready", "version": "version",
    "metrics_asked": "metrics_asked", "samples": "number of images", "read": "reading of the images",
}  # fmt: skip


def _read_as(module: Mapping[str, Any]) -> str:
    """A digest of the options by which images are drawn and prepared."""
    options = {n: v for n, v in sorted(flatten(dict(module)).items()) if of_a_test(n)}
    return hashlib.sha256(json.dumps(options, default=str).encode()).hexdigest()[:8]


def _earlier(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The record that a test goes on with, and why an earlier one is put away."""
    fresh = {**facts, "clean": {}, "cells": {}, "averages": {}}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        earlier = {"read": facts["read"], **earlier}  # older records do not say it
        differing = [said for n, said in _MUST_AGREE.items() if earlier.get(n) != facts[n]]
        known = {n: dict(earlier[n]) for n in ("clean", "cells", "averages")}
    except FileNotFoundError:
        return fresh, ""
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return fresh, f"{path.name} was damaged, and is made anew"
    if differing:
        return fresh, f"{path.name} was of another {differing[0]}, and is made anew"
    return {**facts, **known}, ""


def show(record: Mapping[str, Any], cells: list[Cell]) -> None:
    """Print the cells asked for, accuracy and calibration error in percent, and the means of the whole record."""
    severities = sorted({c.severity for c in cells})
    mean = len(severities) > 1
    rows: list[list[str]] = []
    if record["clean"]:
        rows.append(["none", *[""] * (len(severities) - 1 + mean), _shown(record["clean"])])
    for name in dict.fromkeys(c.corruption for c in cells):
        row = [record["cells"][name][str(s)] for s in severities]
        means = {k: sum(v[k] for v in row) / len(row) for k in ("acc", "ece")}
        rows.append([name, *map(_shown, row), *([_shown(means)] if mean else [])])
    screen = console()
    screen.print("accuracy / ece in %", style="italic")
    print_table(
        ["corruption", *map(str, severities), *(["mean"] if mean else [])], rows, words=("corruption",)
    )
    for name, value in record["averages"].items():
        made = "; made here, frost drawn: not a paper's" if name == "mce" and not record["ready"] else ""
        say(f"  {name:<24} {value:.4f}   {_MEANING[name]}{made}")
    if not record["averages"] and any(c.corruption in COMMON for c in cells):
        have = sum(len(record["cells"].get(n, {})) for n in COMMON)
        said = (
            f"  no means yet: {have} of {len(COMMON) * len(SEVERITIES)} cells are recorded; data.module.corruption=all "
            "computes the others"
        )
        say(said)


_MEANING = {
    "acc_corrupted": "mean accuracy over 15 corruptions x 5 severities",
    "ece_corrupted": "mean calibration error over them",
    "mce": "mean corruption error, as a share of AlexNet's published errors",
}


def _shown(values: Mapping[str, float]) -> str:
    return f"{100 * values['acc']:.1f} / {100 * values['ece']:.1f}"
