"""How trained weights are read in a test or a prediction: several views of an image, and the temperature that fits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from augmentation.five_crops import FiveCrops
from callbacks.calibration import Outputs
from crucible.calibration import RECORD, Calibration, calibrated, known_calibration, recorded_calibrations
from crucible.configuration import Config
from crucible.files import why_not_writable, write_atomically
from crucible.machine import is_child_rank
from crucible.options import ConfigError
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from lab.build import build_data, build_trainer, file_fingerprint, with_weights
from lab.recorded import completed
from lab.scoring import DataToScore
from models.base_model import BaseModel
from models.views import SEE, Views, views_asked


def reader(
    run: RunDirectory, config: Config, checkpoint: Path, found: DataToScore
) -> tuple[BaseModel, Calibration | None, list[str]]:
    """The network with its weights, set to read the data as `tta` and `calibrate` ask, and what is to be said of it.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        found: the data to be read; their evaluation policy is changed where crops are asked for.

    Raises:
        ConfigError: for views that the data do not have, and a temperature that cannot be fitted.
    """
    asked = views_asked(config.get("tta"))
    check_reading(config, asked)
    if config.get("calibrate"):
        metrics = list(dict.fromkeys([*config["metrics"], "ece"]))
        config = {**config, "metrics": metrics, "model": {**config["model"], "metrics": metrics}}
    _show(found.data, asked)
    model = with_weights(config, checkpoint)
    model.views = Views(asked)
    said = [f"the mean over views: {', '.join(asked)}"] if asked else []
    if not config.get("calibrate"):
        return model, None, said
    fit, how = fitted_temperature(run, config, checkpoint, model, found.fingerprint)
    model.views = Views(asked, fit.temperature)
    said.append(
        f"temperature {fit.temperature:.4f}, {how}: there ece {fit.ece_before:.4f} -> {fit.ece_after:.4f}, nll "
        f"{fit.nll_before:.4f} -> {fit.nll_after:.4f}"
    )
    if fit.at_its_bound:
        said.append("the validation samples set it no limit: all are right, or they are alike")
    return model, fit, said


def _show(data: BaseDataModule, asked: Sequence[str]) -> None:
    """Let the data give the views that are made with the sample."""
    if "five_crops" in asked:
        data.test_transforms = FiveCrops(data.test_transforms)


def check_reading(config: Config, asked: Sequence[str]) -> None:
    """Refuse views and a temperature that the task has no place for.

    Raises:
        ConfigError: naming the option.
    """
    if asked and config["data"]["input_dim"] != 2:
        raise ConfigError(f"tta={','.join(asked)}: is for pictures, data.input_dim=2", see=SEE)
    if config.get("calibrate") and config["data"]["task"] != "classification":
        raise ConfigError("calibrate=true: is for classification, whose probabilities it scales", see=SEE)


def fitted_temperature(
    run: RunDirectory, config: Config, checkpoint: Path, model: BaseModel, fingerprint: str
) -> tuple[Calibration, str]:
    """That of the record, or fitted to the run's own validation split and recorded; and how it was found.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        model: with them, and the views that it is read by.
        fingerprint: of the data that the configuration names; where they are the run's own, their validation split is
            taken from there. Empty: unknown.

    Raises:
        ConfigError: where there is no validation split to fit it to, or no temperature fits.
    """
    asked, weights = model.views.asked, file_fingerprint("ckpt_path", str(checkpoint))
    if (known := known_calibration(run.path, weights, asked)) is not None:
        return known, f"recorded, of {known.samples} validation samples"
    moved = fingerprint and fingerprint == run.summary().get("data_fingerprint")
    own = config if moved else completed(run.config())  # the typed ones may only lie elsewhere
    module = {**own["data"]["module"], "batch_size": config["data"]["module"]["batch_size"]}
    data = build_data({**own, "data": {**own["data"], "module": module}})
    _show(data, asked)
    outputs = Outputs()
    trainer = build_trainer(
        {**config, "trainer": {**config["trainer"], "enable_progress_bar": False, "limit_val_batches": None}},
        run.path, [outputs], [],
    )  # fmt: skip
    try:
        data.prepare_data()
        trainer.validate(model, datamodule=data, verbose=False)
    except ConfigError as error:
        raise ConfigError(
            f"calibrate=true: needs the run's validation split, which cannot be read ({error})", see=SEE
        ) from error
    try:
        fit = calibrated(outputs.logits, outputs.target)
    except ValueError as error:
        raise ConfigError(f"calibrate=true: no temperature for {checkpoint}: {error}", see=SEE) from error
    entry = {
        "checkpoint": checkpoint.name, "weights": weights, "tta": list(asked),
        **fit.plain(), "data": data.fingerprint(), "time": time.time(),
    }  # fmt: skip
    if not is_child_rank() and not why_not_writable(run.path):
        text = json.dumps([*recorded_calibrations(run.path), entry], indent=2) + "\n"
        write_atomically(run.path / RECORD, text)
    return fit, f"fitted to {fit.samples} validation samples"
