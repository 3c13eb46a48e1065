"""Training states: `best.ckpt` and `last.ckpt`, written atomically."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from crucible.files import replacing
from crucible.metrics import higher_is_better


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a killed process leaves the old file whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save `checkpoint` to `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, sync=True) as temporary:
            torch.save(checkpoint, temporary)


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` (to resume from) and `best.ckpt` (the best validation so far).

    Args:
        folder: where to.
        every: epochs between writes of last.ckpt; the last epoch is always written.
        every_steps: also every so many optimizer steps.
        keep: `best`: both files; `last`: no best.ckpt; `none`: last.ckpt while the run lasts.
        monitor: the logged value that says which is best; `lab.config.resolve` settles null.
        mode: which way it is better; null: by the metric (`crucible.metrics.higher_is_better`).
    """

    def __init__(
        self,
        folder: str | Path,
        every: Annotated[int, "[1, inf)"] = 1,
        every_steps: Annotated[int, "[1, inf)"] | None = None,
        keep: Literal["best", "last", "none"] = "best",
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.every = every
        self.every_steps = every_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best: dict[str, float] = {}
        self._improved = False
        self._written_at = -1

    def state_dict(self) -> dict[str, Any]:
        """The best value so far and its epoch."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.best = dict(state_dict["best"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # the outputs' names, without which weights that leave their run are numbers
        if names := getattr(getattr(trainer, "datamodule", None), "class_names", None):
            checkpoint["class_names"] = list(names)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path and Path(trainer.ckpt_path).absolute().parent != self.folder.absolute():
            self.best = {}  # of another run, whose best.ckpt is not this one's

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self.monitor not in trainer.callback_metrics
        ):
            return
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1.0 if higher_is_better(self.monitor, self.mode) else -1.0
        if math.isfinite(value) and (
            self.monitor not in self.best or sign * value > sign * self.best[self.monitor]
        ):
            self.best = {self.monitor: value, "epoch": trainer.current_epoch}
            self._improved = True
        if self._improved and not trainer.is_last_batch:
            self._save_best(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (
            self.every_steps
            and step % self.every_steps == 0
            and step != self._written_at
            and not trainer.is_last_batch
        ):
            self.save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self.save_last(trainer)
        if self._improved:
            self._save_best(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._written_at != trainer.global_step:
            self.save_last(trainer)
        if self.keep == "none" and trainer.is_global_zero:
            (self.folder / "last.ckpt").unlink(missing_ok=True)

    def save_last(self, trainer: Trainer) -> None:
        """Write last.ckpt now (on all ranks together)."""
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
        self._written_at = trainer.global_step

    def _save_best(self, trainer: Trainer) -> None:
        self._improved = False
        if self.keep != "best":
            return
        target, last = self.folder / "best.ckpt", self.folder / "last.ckpt"
        if self._written_at != trainer.global_step:
            trainer.save_checkpoint(target, weights_only=False)
        elif trainer.is_global_zero:  # the same state has just been written as last.ckpt
            with replacing(target, sync=True) as temporary:
                try:
                    os.link(last, temporary)
                except OSError:
                    shutil.copyfile(last, temporary)
