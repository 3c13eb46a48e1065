"""What a run can be asked to do: train; of recorded ones test, predict, export, describe, measure the mechanism."""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import json
import logging
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from callbacks.calibration import UncalibratedError
from callbacks.checkpoints import Checkpoints
from callbacks.correctness import CorrectnessRecord
from callbacks.early_stopping import EarlyStopping
from callbacks.nonfinite import Guard
from callbacks.pruning import Pruning
from callbacks.real_labels import RealLabels
from callbacks.recorder import Diverged, GoBack, GracefulStop, Recorder
from callbacks.steps import StepRecorder
from callbacks.unreadable import Unreadable
from crucible.cells import cell
from crucible.command_line import explain
from crucible.configuration import Config, flatten
from crucible.console import epoch_named, print_table, say
from crucible.files import replacing, why_not_writable, write_atomically
from crucible.handover import received
from crucible.launch import launch
from crucible.loggers import build_loggers, log_result
from crucible.machine import device_kind, is_child_rank, processor_name, world_size
from crucible.masking import masked_in
from crucible.metrics import build_metrics, of_split, scalars
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.writing import is_of_the_place
from datasets.base_datamodule import BaseDataModule
from datasets.images import sample_name
from datasets.real_labels import real_labels
from lab.build import alone, build_callback, build_data, build_model, build_trainer
from lab.calibration import reader
from lab.card import write_card
from lab.export import export
from lab.mechanism import measure_run
from lab.recorded import EVALUATION_OPTIONS
from lab.robustness import asks_for_corruptions, test_corrupted
from lab.scoring import DataToScore, data_to_score
from lab.speed import faster_here
from lab.states import find_state
from lab.teachers import hand_in_teacher
from lab.use import described_transform, network_facts
from models.base_model import BaseModel
from models.views import views_asked

log = logging.getLogger("crucible")

Runs = Sequence[tuple[RunDirectory, Config, Path]]  # recorded ones, each with its configuration and weights


def train(run: RunDirectory, config: Config, resume: Path | None) -> dict[str, float]:
    """Train, then score the test split with the last weights; the final metrics.

    Args:
        run: where everything is written.
        config: the run's configuration.
        resume: a training state to go on from.

    Raises:
        Diverged: where numbers are not finite and `on_nonfinite` has no other way on.
    """
    options = {
        name: config[name] for name in ("on_nonfinite", "rollback_lr", "rollback_limit") if name in config
    }
    guard = Guard(run, **options)
    loggers = (
        build_loggers(config["logger"], run.path, logger_facts(run, config)) if not is_child_rank() else []
    )
    again = False
    while True:
        try:
            return _train(run, config, resume, guard, loggers, again)
        except GoBack:
            again, resume = True, find_state(run, config)[0]
        gc.collect()  # of the trainer before; its memory on the device too


def _train(
    run: RunDirectory, config: Config, resume: Path | None, guard: Guard, loggers: list[Any], again: bool
) -> dict[str, float]:
    torch.default_generator.manual_seed(config["seed"])
    data = build_data(config)
    model = build_model(config, load=resume is None)
    hand_in_teacher(model, config)
    checkpoints = Checkpoints(run.checkpoints, **config["checkpoint"])
    checkpoints.run_id = run.summary().get("run_id", "")
    checkpoints.network = network_facts(config)
    extra = [build_callback(name, node) for name, node in config["callbacks"].items() if node]
    fingerprint = run.summary().get("data_fingerprint", "")
    correctness = CorrectnessRecord(run.path / "test_correct.npz", fingerprint)
    trial = received().trial
    after = [correctness, checkpoints, *([Pruning(trial)] if trial else []), GracefulStop(checkpoints)]
    before: list[Callback] = [Unreadable(run)] if data.on_error == "skip" else []
    every = config["trainer"].get("log_every_n_steps")
    by_step = [StepRecorder(run, every)] if every else []
    callbacks: list[Callback] = [*before, Recorder(run), guard, *by_step, *extra, *after]
    if not config["trainer"].get("enable_progress_bar", True):
        callbacks = [c for c in callbacks if not isinstance(c, ProgressBar)]
    # without ours (callbacks.progress=null) Lightning would show a bar of its own
    shown = {**config["trainer"], "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks)}
    trainer = build_trainer({**config, "trainer": shown}, run.path, callbacks, loggers)
    if trainer.is_global_zero and not is_child_rank() and not again:
        facts = static_facts(config, model)
        run.update_summary(**facts)
        banner(run, config, model, data, resume)
    trainer.fit(model, datamodule=data, ckpt_path=str(resume) if resume else None, weights_only=True)
    if trainer.is_global_zero and checkpoints.remarks:
        run.update_summary(recovered=[*run.summary().get("recovered", []), *checkpoints.remarks])
    if reason := next((c.reason for c in extra if isinstance(c, EarlyStopping)), ""):
        log.warning("ended after %s: %s", epoch_named(trainer.current_epoch - 1, model.epochs), reason)
        if trainer.is_global_zero:
            run.update_summary(ended_early=reason)
    if checkpoints.refused:
        raise Diverged("diverged: the weights are not finite; last.ckpt holds the last state that is")
    if any(weights.active and weights.updates is None for weights in model.step.weights):
        log.warning("the training ended before any weights were averaged: those that ship are the plain ones")
    # a run that was stopped after its last step trains no more: its values are the recorded ones
    final = {**run.summary().get("final", {}), **{k: float(v) for k, v in trainer.callback_metrics.items()}}
    if config["test_after_training"]:
        trainer.test(model, datamodule=data, verbose=False)
        final.update({k: float(v) for k, v in trainer.callback_metrics.items()})
    if trainer.is_global_zero:
        run.update_summary(final=final, best=checkpoints.best)
        tested = (
            {k: v for k, v in final.items() if of_split(k, "test")} if config["test_after_training"] else {}
        )
        log_result(loggers, tested, checkpoints.best, trainer.global_step)
    return final


class Tested(NamedTuple):
    """What a test came to.

    Attributes:
        values: of the metrics, by the names that they are logged under.
        out: the record that they are written to; None where its folder cannot be written.
        said: what was scored, and how, in a few lines.
        images: that were scored.
    """

    values: dict[str, float]
    out: Path | None
    said: list[str]
    images: int


def test(run: RunDirectory, config: Config, checkpoint: Path, out: Path | None = None) -> Tested:
    """Score the test split with the weights of `checkpoint`.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        out: the file to write to; None: `RUN/test.json` for the run's own data, for others the one in
            `RUN/tests/<fingerprint of the data>`.
    """
    found = data_to_score(run, config, checkpoint)
    data, folder = found.data, out.parent if out else found.folder
    why_not = why_not_writable(folder.absolute())
    if out and why_not:
        raise _not_writable(out, why_not)
    out = None if why_not else out or folder / "test.json"
    model, calibration, read = reader(run, config, checkpoint, found)
    plots = [
        instantiate(node, _convert_="all")
        for n, node in config["callbacks"].items()
        if node and n != "progress" and out
    ]
    if (file := config["data"]["module"].get("real_labels")) is not None:
        names = getattr(data.samples("test").raw, "names", None)
        plots.append(RealLabels(real_labels(file, names, data.class_names)))
    if calibration is not None:
        plots.append(UncalibratedError(calibration.temperature))
        if data.test_is_val:
            read.append("the test is on the validation samples, to which the temperature was fitted")
    if out:
        folder.mkdir(parents=True, exist_ok=True)
        plots.append(CorrectnessRecord(folder / f"test_correct_{checkpoint.stem}.npz", found.fingerprint))
    unreadable = Unreadable()
    trainer = build_trainer(
        {**config, "trainer": {**config["trainer"], "enable_progress_bar": False}},
        folder,
        [*plots, unreadable],
        [],
    )
    trainer.test(model, datamodule=data, verbose=False)
    final = {k: float(v) for k, v in trainer.callback_metrics.items()}
    scored = data.scored()
    if unreadable.count:
        scored.append(f"without {unreadable.count} samples that cannot be read (data.module.on_error=skip)")
    if trainer.is_global_zero and out:
        record = {
            "checkpoint": checkpoint.name, "data": found.fingerprint, "own_data": found.own,
            "folder": config["data"]["module"].get("data_root_dir"), "samples": data.seen("test"),
            "scored": [*scored, *read, *found.remarks], "metrics": final, "time": time.time(),
            "tta": list(model.views.asked), "calibration": calibration.plain() if calibration else None,
        }  # fmt: skip
        write_atomically(out, json.dumps(record, indent=2) + "\n")
    if (seen := data.seen("test")) < (whole := len(data.samples("test"))):
        scored = [*scored, f"test on {seen} drawn of {whole} samples"]
    remarks = [] if out else [f"not recorded: {why_not}; out=FILE writes elsewhere"]
    said = [*([] if found.own else [_whose(run, found)]), *scored, *read, *found.remarks, *remarks]
    return Tested(final, out, said, seen)


def _not_writable(out: Path, reason: str) -> ConfigError:
    return ConfigError(f"out={out}: cannot be written ({reason}); out=FILE writes elsewhere", see="README.md")


def _whose(run: RunDirectory, found: DataToScore) -> str:
    known = run.summary().get("data_fingerprint")
    whose = (
        "the run's own data, read otherwise"
        if known == found.fingerprint
        else "other data than the run's own"
    )
    if known is None:
        whose += ", or read otherwise"
    return f"{whose} (fingerprint {found.fingerprint})"


class Scores(NamedTuple):
    """Predictions of a data set in its order: scores (N, K) or (N,), target (N,), number of the sample (N,).

    Scores lie in a file of the temporary folder (`TMPDIR`), so that memory does not bound N; `unread` are the numbers
    of the samples that could not be read, whose rows mean nothing.
    """

    scores: torch.Tensor
    target: torch.Tensor
    sample: torch.Tensor
    unread: tuple[int, ...] = ()


class _Collector(Callback):
    """Puts each batch's scores where they belong, as they come.

    Args:
        numbers: (N,) int64 numbers of the samples, ascending.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers
        self._unread: list[int] = []
        self._scores = self._target = torch.empty(0)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        scores, target, index = (outputs[name].cpu() for name in ("scores", "target", "index"))
        if not len(self._scores):
            with torch.inference_mode(False):  # what comes after the prediction changes them in place
                self._scores = _on_disk((len(self._numbers), *scores.shape[1:]), scores.dtype)
                self._target = torch.empty(len(self._numbers), dtype=target.dtype)
        self._unread += (-1 - index[index < 0]).tolist()
        rows = torch.searchsorted(self._numbers, torch.where(index < 0, -1 - index, index))
        self._scores[rows], self._target[rows] = scores, target

    def scores(self) -> Scores:
        """What has come."""
        return Scores(self._scores, self._target, self._numbers, tuple(sorted(self._unread)))


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in a file that goes with the tensor.

    Raises:
        ConfigError: where the temporary folder has no room for them.
    """
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the mapping outlives it
    except OSError as error:
        raise ConfigError(
            f"TMPDIR={os.environ.get('TMPDIR', '')}: no file can be made there ({error.strerror}), which the scores go "
            "to; TMPDIR=FOLDER is elsewhere",
            see="docs/robustness.md",
        ) from error
    try:
        file.truncate(max(1, size))
        # a write to a mapping for which there is no room kills the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        if is_of_the_place(error):
            file.close()
            raise ConfigError(
                f"TMPDIR={tempfile.gettempdir()}: no room for {size} bytes of scores ({error.strerror}); "
                "TMPDIR=FOLDER is elsewhere",
                see="docs/robustness.md",
            ) from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot allocate
            raise
    data = np.memmap(file, dtype=np.uint8, mode="r+", shape=(max(1, size),))
    return torch.from_numpy(data)[:size].view(dtype).view(shape)


def score(run: RunDirectory, config: Config, checkpoint: Path) -> tuple[Scores, DataToScore]:
    """The weights' scores for the predict split: the test set, or `data.module.predict_dir`.

    Raises:
        ConfigError: where not all of it is to be read.
    """
    _refuse_limit(config, "limit_predict_batches", "all samples are predicted")
    config = alone(config)
    options = {**config["trainer"], "enable_progress_bar": False}
    found = data_to_score(run, config, checkpoint, whole=True)
    model, _, read = reader(run, config, checkpoint, found)
    samples = found.data.samples("predict")
    known = torch.arange(len(samples)) if samples.indices is None else torch.from_numpy(samples.indices)
    collector = _Collector(known.sort().values)
    trainer = build_trainer({**config, "trainer": options}, run.path, [collector], [])
    trainer.predict(model, datamodule=found.data, return_predictions=False)
    return collector.scores(), found._replace(remarks=[*found.remarks, *read])


def _refuse_limit(config: Config, name: str, why: str) -> None:
    limit = config["trainer"].get(name)
    if limit is not None and not (isinstance(limit, float) and limit == 1):
        raise ConfigError(f"trainer.{name}={limit}: {why}; trainer.{name}=null", see="docs/use.md")


def predict(runs: Runs, out: Path | None) -> int:
    """Write a CSV of predictions: sample, target where known, prediction, probabilities; and say where.

    Several runs (the folds of a cross-validation, say) give the mean of their probabilities. What cannot be read has
    no row; it is named at the end, and the exit status is 1.
    """
    if any(asks_for_corruptions(config) for _, config, _ in runs):
        raise ConfigError("data.module.corruption: only task=test takes it", see="docs/data.md")
    if any(config["data"]["module"].get("real_labels") for _, config, _ in runs):
        raise ConfigError("data.module.real_labels: only task=test takes it", see="docs/data.md")
    name = f"predictions{'' if len(runs) == 1 else f'-of-{_together(runs)}'}{_how(runs[0][1])}.csv"
    if out and (reason := why_not_writable(out.parent.absolute())):
        raise _not_writable(out, reason)
    scores, found = average(runs)
    data, out = found.data, out or found.folder / name
    if reason := why_not_writable(out.parent.absolute()):
        raise _not_writable(out, reason)
    out.parent.mkdir(parents=True, exist_ok=True)
    samples = data.samples("predict")
    classification = scores.scores.ndim == 2
    names = (
        list(data.class_names) or [str(k) for k in range(scores.scores.shape[-1])] if classification else []
    )
    unread = set(scores.unread)
    # a name that is no text in UTF-8 is written with escapes
    with (
        replacing(out) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["sample", "target", "prediction", *(cell(f"p({name})") for name in names)])
        for row, target, index in zip(scores.scores, scores.target, scores.sample, strict=True):
            if (number := int(index)) in unread:
                continue
            known = bool(target == target) and not (classification and target < 0)
            if classification:
                label = names[int(target)] if known else ""
                values = [names[int(row.argmax())], *(f"{p:.6g}" for p in row.tolist())]
            else:
                label, values = (f"{float(target):.6g}" if known else ""), [f"{float(row):.6g}"]
            writer.writerow(map(cell, [sample_name(samples.raw, number), label, *values]))
    for line in [*([] if found.own else [_whose(runs[0][0], found), *data.scored()]), *found.remarks]:
        say(f"  {line}")
    say(f"predictions of {_named(runs)}  ->  {out}")
    if unread:
        say(f"{len(unread)} of {len(scores.sample)} samples could not be read and have no row:")
        for number in sorted(unread):
            say(f"  {samples.why_unreadable(number) or sample_name(samples.raw, number)}")
    return 1 if unread else 0


def _how(config: Config) -> str:
    """How predictions are read, for the name of their file."""
    asked = ["calibrate"] if config.get("calibrate") else []
    return "".join(f"-{name}" for name in [*asked, *views_asked(config.get("tta"))])


def _together(runs: Runs) -> str:
    """Which runs, with which weights, are used as one, for the name of their file."""
    beside = runs[0][0].path.parent  # where the file is; a run elsewhere may have the same id
    # weights need not be the run's own: two files elsewhere may have one name
    which = sorted(
        (os.path.relpath(r.path, beside), os.path.relpath(weights, r.path)) for r, _, weights in runs
    )
    return f"{len(runs)}-runs-{hashlib.sha256(json.dumps(which).encode()).hexdigest()[:8]}"


_CHUNK = 1 << 16  # rows of scores that are averaged at once


def average(runs: Runs) -> tuple[Scores, DataToScore]:
    """The mean scores of several runs over the same samples, in the order of the first run's classes.

    Raises:
        ConfigError: where the runs' samples or classes differ.
    """
    first, found = score(*runs[0])
    if len(runs) == 1:
        return first, found
    names, unread = found.data.class_names, set(first.unread)
    total = _on_disk(tuple(first.scores.shape), torch.float64)
    total += first.scores
    for run, config, checkpoint in runs[1:]:
        part, other = score(run, config, checkpoint)
        places, target = None, part.target
        if (theirs := other.data.class_names) != names:
            if sorted(theirs) != sorted(names):
                raise ConfigError(f"run={run.path}: its classes differ from those of {runs[0][0].path}")
            places = torch.tensor([theirs.index(name) for name in names])
            target = torch.where(target < 0, target, places.argsort()[target.clamp(min=0)])
        same = torch.equal(part.sample, first.sample) and torch.equal(
            target.nan_to_num(), first.target.nan_to_num()
        )
        if not same or part.scores.shape != first.scores.shape:
            raise ConfigError(f"run={run.path}: its samples differ from those of {runs[0][0].path}")
        unread |= set(part.unread)
        for begin in range(0, len(total), _CHUNK):
            rows = part.scores[begin : begin + _CHUNK]
            total[begin : begin + _CHUNK] += rows if places is None else rows[:, places]
    for begin in range(0, len(total), _CHUNK):
        first.scores[begin : begin + _CHUNK] = total[begin : begin + _CHUNK] / len(runs)
    return first._replace(unread=tuple(sorted(unread))), found


def test_ensemble(runs: Runs) -> tuple[dict[str, float], DataToScore, int]:
    """Test metrics of the averaged probabilities (or values) of several runs; the data, and how many were scored."""
    scores, found = average(runs)
    if scores.unread:
        raise ConfigError(found.data.samples("predict").why_unreadable(scores.unread[0]), see="")
    config = runs[0][1]
    metrics = build_metrics(config["metrics"], config["data"]["task"], config["data"]["num_classes"])
    metrics.update(scores.scores, scores.target)
    values = scalars(metrics.compute(), found.data.class_names)
    final = {f"test/{k}": float(v) for k, v in values.items()}
    groups = found.data.groups("test")
    for number, name in enumerate(groups.names if groups else ()):
        metrics.reset()
        of_group = torch.from_numpy(groups.numbers)[scores.sample] == number  # type: ignore[union-attr]
        if of_group.any():
            metrics.update(scores.scores[of_group], scores.target[of_group])
            values = scalars(metrics.compute(), found.data.class_names)
            final |= {f"test_{name}/{k}": float(v) for k, v in values.items()}
    return final, found, len(scores.sample)


def test_all(runs: Runs, out: Path | None) -> int:
    """Score the test split, of several runs with the mean of their probabilities; write and say what came out.

    Where the folder cannot be written, the values are said only.
    """
    (run, config, checkpoint), *others = runs
    if asks_for_corruptions(config):
        for name in EVALUATION_OPTIONS:
            if config.get(name):
                raise ConfigError(
                    f"{name}={config[name]}: not with data.module.corruption", see="docs/use.md"
                )
        if others:
            raise ConfigError(
                f"data.module.corruption: {len(runs)} runs are tested as one by the mean of their probabilities, which "
                "has no table of corruptions; each=true tests each run",
                see="docs/data.md",
            )
        return test_corrupted(run, config, checkpoint, out)
    found = _tested(runs, out)
    if not is_child_rank():
        say(f"test of {_named(runs)}")
        _say_tested(found)
    return 0


def _tested(runs: Runs, out: Path | None) -> Tested:
    """A test of one run, or of several by the mean of their probabilities; recorded."""
    (run, config, checkpoint), *others = runs
    if not others:
        return test(run, config, checkpoint, out)
    if config["data"]["module"].get("real_labels"):
        raise ConfigError(
            "data.module.real_labels: is for one run; each=true tests each of several", see="docs/data.md"
        )
    for _, each, _ in runs:
        _refuse_limit(each, "limit_test_batches", f"{len(runs)} runs are tested as one on the whole split")
    final, found, images = test_ensemble(runs)
    said = [*([] if found.own else [_whose(run, found)]), *found.data.scored(), *found.remarks]
    on = "" if found.own else f"-on-{found.folder.name}"
    typed, out = out, out or run.path.parent / f"ensemble-of-{_together(runs)}{on}.json"
    record = {
        "runs": [str(run.path) for run, _, _ in runs],
        "checkpoints": [checkpoint.name for _, _, checkpoint in runs],
        "data": found.fingerprint,
        "metrics": final,
        "scored": said,
    }
    if why_not := why_not_writable(out.parent.absolute()):
        if typed:
            raise _not_writable(out, why_not)
        said.append(f"not recorded: {why_not}; out=FILE writes elsewhere")
        out = None
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(record, indent=2) + "\n")
    return Tested(final, out, said, images)


def _say_tested(found: Tested) -> None:
    for line in found.said:
        say(f"  {line}")
    for name, value in found.values.items():
        if of_split(name, "test"):
            say(f"  {name:<24} {value:.4f}")
    if found.out:
        say(f"  ->  {found.out}")


def test_on(rows: Mapping[str, Callable[[], Runs]], out: Path | None, what: str = "folder") -> int:
    """Test on several folders, or several weights, one after the other, and put what came out into one table; the worst
    status.

    Each test has its own record, as if it had been asked for alone. What cannot be scored is said in a line, has an
    empty row, and the others go on.

    Args:
        rows: the runs with their configurations for each folder; or those of each weights.
        out: the table; None: `table.csv` in `RUN/tests`, of several runs beside them, of weights beside their folders.
        what: a row is of: `folder` or `weights`.
    """
    found: dict[str, Tested | None] = {}
    runs: Runs = []
    worst = 0
    for root, of_root in rows.items():
        try:
            runs = of_root()
            if asks_for_corruptions(runs[0][1]):
                raise ConfigError(
                    "data.module.corruption: has a table of its own, for one folder", see="docs/use.md"
                )
            tested = found[root] = _tested(runs, None)
        except Exception as error:
            if launch().world > 1 and not isinstance(error, ConfigError):
                raise  # the other ranks have not met it, and wait for this one
            found[root] = None
            if not is_child_rank():
                worst = max(worst, explain(error))
            continue
        if not is_child_rank():
            say(
                f"test of {_named(runs)} on {root}" if what == "folder" else f"test of {root}: {_named(runs)}"
            )
            _say_tested(tested)
    if runs and not is_child_rank():
        name, first = f"table{_how(runs[0][1])}.csv", runs[0][0].path
        if what == "weights":
            beside = first.parent / f"weights-{name}"
        elif len(runs) == 1:
            beside = first / "tests" / name
        else:
            beside = first.parent / f"ensemble-of-{_together(runs)}-{name}"
        _write_table(found, out or beside, what, typed=out is not None)
    return worst


def _write_table(found: Mapping[str, Tested | None], file: Path, what: str, typed: bool) -> None:
    """Show several tests as a table, and write it as CSV."""
    names = list(
        dict.fromkeys(n for tested in found.values() if tested for n in tested.values if of_split(n, "test"))
    )
    shown = [name for name in names if name.startswith("test/") and name.count("/") == 1]
    table: list[list[str]] = []
    rows: list[list[Any]] = [[what, "images", *names, "record"]]
    for root, tested in found.items():
        values = tested.values if tested else {}
        images = tested.images if tested else ""
        table.append([root, str(images), *(f"{values[n]:.4f}" if n in values else "" for n in shown)])
        rows.append(
            [root, images, *(values.get(n, "") for n in names), str(tested.out or "") if tested else ""]
        )
    print_table([what, "images", *(n.removeprefix("test/") for n in shown)], table, words=(what,))
    if why_not := why_not_writable(file.parent.absolute()):
        if typed:
            raise _not_writable(file, why_not)
        say(f"  not recorded: {why_not}; out=FILE writes elsewhere")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([[cell(value) for value in row] for row in rows])
    say(f"  ->  {file}")


def _named(runs: Runs) -> str:
    return ", ".join(f"{run.path.name}/{checkpoint.name}" for run, _, checkpoint in runs)


def _of_one(
    task: str, act: Callable[[RunDirectory, Config, Path, Path | None], int], see: str
) -> Callable[[Runs, Path | None], int]:
    """A task on the weights of one run."""

    def of_runs(runs: Runs, out: Path | None) -> int:
        if len(runs) > 1:
            raise ConfigError(
                f"task={task}: is for one run, run= names {len(runs)}; each=true does it of each",
                see=see,
            )
        return act(*runs[0], out)

    return of_runs


# what `run=RUN task=NAME` does with trained weights: writes to the path that is given, or beside the run; its status
OF_TRAINED: dict[str, Callable[[Runs, Path | None], int]] = {
    "test": test_all,
    "predict": predict,
    "export": _of_one("export", export, "docs/export.md"),
    "card": _of_one("card", write_card, "docs/export.md"),
    "mechanism": _of_one("mechanism", measure_run, "docs/report.md"),
}
OF_SEVERAL = ("test", "predict")  # those that take several runs as one; of each of several all do
WEIGHTS = {"mechanism": "last"}  # where none are named; else the best


# what the summary, the loggers and the banner say


def device_name(kind: str) -> str:
    """What a run is computed on, as people call it."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    model = processor_name()
    return f"{model}, {torch.get_num_threads()} threads" if kind == "cpu" else f"{model} ({kind})"


@cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether it has changes; as it was when this process, or its warm parent, asked."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status) if status is not None else None}


def static_facts(config: Config, model: BaseModel) -> dict[str, Any]:
    """What is known of a run before its first step."""
    kind = device_kind(config["trainer"]["accelerator"])
    packages = ("torch", "torchvision", "lightning", "hydra-core", "timm", "torchmetrics")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(kind),
        "devices": world_size(config["trainer"]),
        "precision": str(config["trainer"]["precision"]),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "git": git_state(),
        "transform": described_transform(config),
    }


def without_folders(arm: str) -> str:
    """An arm's name in which a path is the last part of it: a folder of this machine says nothing elsewhere."""
    return re.sub(r"(?<==)(?:[^\s=]*/)+(?=[^\s/]+/*(?:\s|$))", "", arm)


def logger_facts(run: RunDirectory, config: Config) -> dict[str, Any]:
    """Name, group, tags and flat configuration for the experiment trackers."""
    summary = run.summary()
    arm, sweep = without_folders(summary.get("arm", "baseline")), summary.get("sweep") or {}
    flat = flatten({k: v for k, v in config.items() if k not in ("logger", "techniques")})
    return {
        "name": run.path.name,
        "id": f"{run.path.name}-{summary.get('started', 0):.0f}",  # the same after a resume, another when run afresh
        "group": f"{config['data']['module']['name']}/{arm}",
        "job_type": sweep.get("design") or "run",
        "tags": [arm, *(config.get("techniques") or {}), *([sweep["design"]] if sweep else [])],
        "config": masked_in({**flat, "arm": arm}),
    }


def banner(
    run: RunDirectory,
    config: Config,
    model: BaseModel,
    data: BaseDataModule,
    resume: Path | None,
) -> None:
    """What is about to be trained, on what, and where it is written."""
    trainer = config["trainer"]
    devices = world_size(trainer)
    batch = data.batch_size * devices * trainer["accumulate_grad_batches"]
    device = device_name(device_kind(trainer["accelerator"]))
    sizes = ", ".join(f"{len(data.samples(split))} {split}" for split in ("train", "val", "test"))
    parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "model": f"{config['model']['_target_'].removeprefix('models.')}, {parameters / 1e6:.2f} M parameters",
        "data": f"{config['data']['module']['name']}: {sizes}",
        "arm": f"{run.summary().get('arm')}, seed {config['seed']}",
        "device": f"{devices} x {device}" if devices > 1 else device,
        "precision": str(trainer["precision"]),
        "batch": f"{batch}"
        + (f" = {data.batch_size} x {batch // data.batch_size}" if batch != data.batch_size else ""),
        "run": str(run.path),
    }
    if resolved := run.summary().get("resolved"):
        rows["resolved"] = ", ".join(resolved)
        if faster := faster_here(config, resolved):
            rows["faster"] = faster
    if resume:
        rows["resumes"] = str(resume)
    for name, value in rows.items():
        log.info("%s: %s", name, value)
    print_table(["", " "], list(rows.items()), words=("", " "), titled=False)
    if model.weights_report:
        log.info(model.weights_report)
        say(model.weights_report)
