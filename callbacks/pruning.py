"""Ends a run of a search that is worse than the others were at the same epoch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from crucible.console import epoch_named
from crucible.training import watched

if TYPE_CHECKING:
    import optuna


def open_study(spec: Mapping[str, Any], create: bool = False) -> optuna.study.Study:
    """The study that a `spec` (name, storage, direction, sampler, seed, pruner, epochs) describes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    local = spec["storage"].startswith("sqlite:")
    storage = optuna.storages.RDBStorage(
        spec["storage"], engine_kwargs={"connect_args": {"timeout": 120}} if local else {}
    )
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=spec["seed"], constant_liar=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=spec["seed"]),
    }
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(max_resource=max(1, spec["epochs"])),
        None: optuna.pruners.NopPruner,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Optuna calls experimental
        parts: dict[str, Any] = {"sampler": samplers[spec["sampler"]](), "pruner": pruners[spec["pruner"]]()}
        if not create:
            return optuna.load_study(study_name=spec["study"], storage=storage, **parts)
        return optuna.create_study(
            study_name=spec["study"],
            storage=storage,
            direction=spec["direction"],
            load_if_exists=True,
            **parts,
        )


class Pruned(Exception):
    """The search's pruner ended the run; its state is in last.ckpt."""


class Pruning(Callback):
    """Reports a value to Optuna after each validated epoch and ends the run where the pruner says so.

    Under DDP rank 0 reports and decides for all ranks.

    Args:
        spec: of the study, for `open_study`; and `metric`, the logged value that is optimised, and `trial`, the
            number in the storage of the trial that the run is.

    Raises:
        Pruned: at the end of an epoch, whose state has been saved by then.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec, self._metric = spec, spec["metric"]
        self._trial: optuna.trial.Trial | None = None
        self._validated = False

    def _open_trial(self) -> optuna.trial.Trial:
        import optuna

        return optuna.trial.Trial(open_study(self._spec), self._spec["trial"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._validated or self._metric not in trainer.callback_metrics:
            return
        prune = False
        if trainer.is_global_zero:
            self._trial = self._trial or self._open_trial()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # an epoch that is trained again after a resume was reported before
                self._trial.report(float(trainer.callback_metrics[self._metric]), trainer.current_epoch)
            last = trainer.current_epoch + 1 >= watched(pl_module).epochs
            prune = not last and self._trial.should_prune()
        if trainer.strategy.reduce_boolean_decision(prune, all=False):
            raise Pruned(f"pruned after {epoch_named(trainer.current_epoch)}: worse than earlier trials were")
