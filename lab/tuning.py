"""`python main.py task=tune ...`: which learning rate, by a range test of the run that the command would train.

Nothing of that run is made or changed; the test has a folder beside the run's, which no report takes for a run.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_class
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStopping
from matplotlib.figure import Figure

from callbacks.range_test import RangeOptions, RangeTest, horizon, smoothed
from callbacks.unreadable import Unreadable
from crucible.configuration import Config
from crucible.console import say
from crucible.files import replacing, write_atomically
from crucible.machine import is_child_rank, world_size
from crucible.masking import masked
from crucible.options import ConfigError
from crucible.technique import read_techniques
from datasets.base_datamodule import BaseDataModule
from lab.build import build_callback, build_data, build_model, build_trainer
from lab.config import run_length
from lab.experiment import Job, quiet_lightning
from lab.teachers import hand_in_teacher
from models.techniques import technique_kinds
from optimizers.schedules import ScheduleOptions

SEE = "docs/use.md"
_WITHOUT = ("max_time", "min_epochs", "min_steps", "fast_dev_run", "detect_anomaly", "profiler")
_LEAST_FALL = 4.0  # standard deviations of a smoothed loss


@dataclass(frozen=True)
class Curve:
    """The loss as a function of the rate, and what it suggests.

    Both coordinates of a smoothed point are averages with the same weights (the rate's logarithm, the loss), so that
    the smoothing moves nothing along the axis; an average of the losses alone would lag behind the rate.

    Args:
        options: of the test.
        losses: (n,) of its steps; the last may be the first that diverged.
        diverged: whether it is.
    """

    options: RangeOptions
    losses: Sequence[float]
    diverged: bool

    @property
    def rates(self) -> np.ndarray:
        """(n,) float64: `model.lr` of the steps."""
        return np.array([self.options.rate(step) for step in range(len(self.losses))])

    @property
    def smooth(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) rates and (n,) losses of the smoothed points, float64."""
        steps = self.options.steps
        at = np.array(smoothed(np.log(self.rates).tolist(), steps))
        return np.exp(at), np.array(smoothed(self.losses, steps))

    @property
    def lowest(self) -> int:
        """The smoothed point of the lowest loss."""
        return int(np.nanargmin(self.smooth[1]))

    @property
    def falls(self) -> bool:
        """Whether the loss falls by more than it scatters: 4 standard deviations of a smoothed point."""
        rates, losses = self.smooth
        first, last = self._first, self.lowest
        if last <= first:
            return False
        inside = self.rates <= rates[last]
        line = np.interp(np.log(self.rates[inside]), np.log(rates[: last + 1]), losses[: last + 1])
        scatter = (np.asarray(self.losses)[inside] - line).std() / math.sqrt(
            2 * horizon(self.options.steps) - 1
        )
        return bool(losses[first] - losses[last] > _LEAST_FALL * scatter)

    @property
    def _first(self) -> int:
        """The first point that averages a whole horizon of the smoothing."""
        return math.ceil(horizon(self.options.steps)) - 1

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most for the same factor on the rate; None where it does not fall.

        The slope d loss / d log rate is that of a straight line through the points of a horizon to either side, among
        those that average a whole horizon, up to the lowest one.
        """
        if not self.falls:
            return None
        rates, losses = self.smooth
        reach, first, last = max(1, round(horizon(self.options.steps))), self._first, self.lowest
        slopes = []
        for point in range(first, last + 1):
            around = slice(max(first, point - reach), min(last, point + reach) + 1)
            slopes.append(np.polyfit(np.log(rates[around]), losses[around], 1)[0])
        return float(rates[first + int(np.argmin(slopes))])

    @property
    def tenth(self) -> float | None:
        """A tenth of the rate of the lowest smoothed loss, fastai's `minimum`; None where it does not fall."""
        return float(self.smooth[0][self.lowest] / 10) if self.falls else None

    @property
    def remarks(self) -> list[str]:
        """What is to be known of the suggestion, a line each."""
        if not self.falls:
            return [
                "the loss does not fall by more than it scatters; more tune.steps, larger batches or another range may "
                "show where it does"
            ]
        found = []
        if not self.diverged and self.lowest >= len(self.losses) - 1 - self._first:
            found.append(
                f"the loss still falls at tune.max_rate={self.options.max_rate:g}; a higher one shows more"
            )
        steepest = self.steepest
        if steepest is not None and steepest <= self.smooth[0][2 * self._first + 1]:
            found.append(
                f"the loss falls from tune.min_rate={self.options.min_rate:g} on; a lower one shows more"
            )
        return found


def _check(config: Config, data: BaseDataModule, steps: int) -> None:
    """Refuse what has no range test: a training state, and a step that changes in the middle of the curve."""
    if config["ckpt_path"] is not None:
        raise ConfigError(
            f"ckpt_path={config['ckpt_path']}: task=tune trains from the start; model.init_from=RUN takes its weights",
            see=SEE,
        )
    techniques = read_techniques(technique_kinds(config["model"].get("stages")), config["model"])
    turns = {name: at for technique in techniques.values() for name, at in technique.turns.items()}
    for name, at in turns.items():
        if steps > (most := int(at * run_length(config, data).steps_per_epoch)):
            way = f"tune.steps of at most {most}, or " if most >= 10 else ""
            raise ConfigError(
                f"model.{name}={at:g}: what is trained would change at step {most} of the test's {steps}; "
                f"{way}model.{name}=null finds the rate of the epochs before",
                see=SEE,
            )


def range_test(config: Config, options: RangeOptions, folder: Path) -> Curve:
    """Train as the run would from its first step on, but for the rate, and without validation. Collective.

    Init, data order, augmentation, techniques, precision, accumulation and devices are the run's. The schedule, warm-up
    included, makes way for the rising rate. Averages of the weights (EMA, SWA), which act on no step, are left out.

    Args:
        config: plain, checked and resolved; not changed.
        options: of the test.
        folder: for what a callback of the user's may write; not made here.

    Raises:
        ConfigError: where the first loss is not finite, and for an option that cannot be honoured.
    """
    config = copy.deepcopy(config)
    plain = ScheduleOptions(scheduler=None, warmstart=0, lr_interval="step")
    kept = ("lr_scale_batch", "lr_scale_momentum")  # of the rate, not of its course
    names = [f.name for f in fields(ScheduleOptions) if f.name not in kept]
    config["model"].update({name: getattr(plain, name) for name in names})
    trainer = {name: value for name, value in config["trainer"].items() if name not in _WITHOUT}
    config["trainer"] = {
        **trainer, "max_epochs": -1, "max_steps": options.steps, "limit_val_batches": 0,
        "enable_progress_bar": False, "enable_checkpointing": False,
    }  # fmt: skip
    torch.default_generator.manual_seed(config["seed"])
    data = build_data(config)
    model = build_model(config)
    hand_in_teacher(model, config)
    model.step.schedule[:] = [options.schedule(model.optimizer_options.lr)]
    model.step.weights.clear()
    test = RangeTest(options)
    before: list[Callback] = [Unreadable()] if data.on_error == "skip" else []
    callbacks = [*before, *_that_train(config), test]
    with quiet_lightning():
        build_trainer(config, folder, callbacks, []).fit(model, datamodule=data)
    if not math.isfinite(test.losses[0]):
        raise ConfigError(
            "task=tune: the loss of the first step is not finite, before any weight has moved: no rate mends that; "
            f"look at the data, the network and trainer.precision={config['trainer']['precision']}",
            see=SEE,
        )
    return Curve(options, test.losses, test.diverged)


def _that_train(config: Config) -> list[Callback]:
    """The configured callbacks that may act on a step: those of the user's own, and of Lightning's.

    Crucible's only watch, and those that wait for a validation would wait for ever.
    """
    found = []
    for name, node in config["callbacks"].items():
        if node and not node["_target_"].startswith("callbacks."):
            kind = get_class(node["_target_"])
            if not issubclass(kind, (EarlyStopping, Checkpoint)):
                found.append(build_callback(name, node))
    return found


def tune(job: Job, options: RangeOptions) -> None:
    """The range test of a job, shown and written by rank 0. Collective.

    Args:
        job: what the command would train; its run is neither made nor touched.
        options: of the test.

    Raises:
        ConfigError: as `range_test`.
    """
    config = job.config
    folder = job.run.path.with_name(f"{job.run.path.name}-tune")
    data = build_data(config)
    data.check()
    _check(config, data, options.steps)
    first = not is_child_rank()
    if first:
        window, devices = config["trainer"]["accumulate_grad_batches"], world_size(config["trainer"])
        say(
            f"range test of {config['model']['_target_'].removeprefix('models.')} on {data.name}, arm "
            f"{job.facts['arm']}: model.lr from {options.min_rate:g} to {options.max_rate:g} in {options.steps} steps "
            f"of {data.batch_size * window * devices} samples, {config['trainer']['precision']}",
        )
    began = time.monotonic()
    curve = range_test(config, options, folder)
    if first:
        write(curve, job, folder, time.monotonic() - began)
        for remark in curve.remarks:
            say(f"note: {remark}")
        say(f"{suggestion(curve, config['model']['lr'])}  ->  {folder}")


def suggestion(curve: Curve, yours: float) -> str:
    """The line that the test comes to."""
    steepest, tenth = curve.steepest, curve.tenth
    if steepest is None or tenth is None:
        return f"no model.lr suggested; yours is {yours:g}"
    return (
        f"suggested model.lr={steepest:.2g} (where the loss falls steepest), {tenth:.2g} (a tenth of where it is "
        f"lowest); yours is {yours:g}"
    )


def write(curve: Curve, job: Job, folder: Path, seconds: float) -> None:
    """`curve.csv`, `tune.json` and `plots/rate.png`, in place of those of an earlier test of the same run."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    yours, smooth = float(job.config["model"]["lr"]), np.stack(curve.smooth, axis=1)
    with replacing(folder / "curve.csv") as file, file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["step", "lr", "loss", "smoothed_lr", "smoothed_loss"])
        for step, values in enumerate(zip(curve.rates, curve.losses, *smooth.T, strict=True)):
            rows.writerow([step, *(f"{value:.6g}" for value in values)])
    record = {
        **asdict(curve.options), "steepest": curve.steepest, "tenth_of_lowest": curve.tenth, "yours": yours,
        "diverged_at": float(curve.rates[-1]) if curve.diverged else None, "remarks": curve.remarks,
        "run": job.run.path.name, "arm": job.facts["arm"], "overrides": [masked(o) for o in job.overrides],
        "seconds": round(seconds, 1), "time": time.time(),
    }  # fmt: skip
    write_atomically(folder / "tune.json", json.dumps(record, indent=2) + "\n")
    with replacing(folder / "plots" / "rate.png") as file:
        draw(curve, yours, f"{job.config['data']['module']['name']}, {job.facts['arm']}").savefig(
            file, format="png", dpi=150
        )


def draw(curve: Curve, yours: float, title: str) -> Figure:
    """The loss by the rate, as measured and smoothed; what is suggested, and what is set, as upright lines."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    rates, losses = curve.smooth
    axes.plot(curve.rates, curve.losses, color="0.7", linewidth=0.8, label="loss of a step")
    axes.plot(rates, losses, color="C0", label="smoothed")
    marks = [
        ("steepest", curve.steepest, "C2", "-"),
        ("a tenth of the lowest", curve.tenth, "C1", "--"),
        ("yours", yours, "C3", ":"),
    ]
    for name, rate, colour, style in marks:
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle=style, linewidth=1.2, label=f"{name}: {rate:.2g}")
    fallen = np.asarray(curve.losses[: curve.lowest + 1])
    low, high = float(fallen.min()), float(fallen.max())
    room = 0.25 * (high - low) or 1.0
    axes.set(xscale="log", xlabel="model.lr", ylabel="training loss", ylim=(low - room, high + room))
    axes.set_xlim(min(curve.options.min_rate, yours), max(float(curve.rates[-1]), yours))
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
