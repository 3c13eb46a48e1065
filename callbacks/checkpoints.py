"""Training states: `last.ckpt`, the one before it, and `best.ckpt`, written atomically and sealed."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from crucible import sealed
from crucible.console import epoch_named
from crucible.files import replacing
from crucible.finite import all_finite, tensors_in
from crucible.metrics import higher_is_better, of_split
from crucible.training import watched
from crucible.writing import Unwritable, unwritable

log = logging.getLogger("crucible")

_MUST_BE_FINITE = ("averaged_state_dict", "average_sums", "optimizer_states")
_LEFT = {"best": ("previous",), "last": ("previous",), "none": ("previous", "last")}


@dataclass
class Saving:
    """One save of a training state, and what came of it.

    Attributes:
        former: where the file that it replaces is kept; None: nowhere.
        infinite: names of buffers that are not finite on purpose, such as masks.
        finite: whether the state was finite; otherwise nothing was written.
        failure: why nothing could be written.
    """

    former: Path | None = None
    infinite: frozenset[str] = frozenset()
    finite: bool = True
    failure: Unwritable | None = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a killed process leaves the old file whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Saving | None = None
    ) -> None:
        """Save `checkpoint` to `path`; of a `Saving`, which learns what came of it, only a finite one."""
        target = Path(path)
        if storage_options is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, target, None)
            return
        saving = storage_options
        weights = [t for name, t in checkpoint["state_dict"].items() if name not in saving.infinite]
        others = [checkpoint.get(name) for name in _MUST_BE_FINITE]
        saving.finite = all_finite(tensors_in([*weights, *others]))
        if saving.finite:
            try:
                target.parent.mkdir(exist_ok=True)
                _write(checkpoint, target, saving.former)
            except OSError as error:
                cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
                needed = sum(tensor.nbytes for tensor in tensors_in(checkpoint))
                saving.failure = unwritable(target, cause, needed)


def _write(checkpoint: dict[str, Any], target: Path, former: Path | None) -> None:
    with replacing(target, sync=True) as temporary:
        sealed.write(checkpoint, temporary)
        if former is not None and target.is_file():
            try:
                with replacing(former) as second_name:
                    os.link(target, second_name)
            except OSError:  # no links there: for the moment of two renames there is no file of this name
                target.replace(former)


def tidy(folder: Path, keep: str) -> None:
    """Remove what `checkpoint.keep` does not leave of a run that has ended."""
    for name in _LEFT[keep]:
        (folder / f"{name}.ckpt").unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` (to resume from) and `best.ckpt` (the best validation so far).

    While the run lives, `previous.ckpt` is the last.ckpt of before, to resume from where that is damaged. A state that
    is not finite is never written.

    Args:
        folder: where to.
        every: epochs between writes of last.ckpt; the last epoch is always written.
        every_steps: also every so many optimizer steps.
        keep: what remains of a finished run. `best`: best.ckpt and last.ckpt; `last`: last.ckpt, and there is never a
            best.ckpt; `none`: nothing.
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
        self._best_step = -1
        self._written_at = -1
        self.run_id = ""  # whose states they are
        self.network: dict[str, Any] = {}  # what a state says of its network, so that it can be used alone
        self._validated: dict[str, Any] = {}  # metrics of the last validation, its epoch and step
        self.refused = False  # the last state was not finite
        self.remarks: list[str] = []  # for the summary
        self._infinite: frozenset[str] = frozenset()
        self._last_is_whole = False

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, its epoch, and the step after which it was reached."""
        return {"best": dict(self.best), "best_step": self._best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.best, self._best_step = dict(state_dict["best"]), state_dict.get("best_step", -1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # the outputs' names, without which weights that leave their run are numbers
        if names := getattr(getattr(trainer, "datamodule", None), "class_names", None):
            checkpoint["class_names"] = list(names)
        if self.run_id:
            checkpoint["run"] = self.run_id
        if self.network:
            checkpoint["network"] = self.network
        checkpoint["validated"] = dict(self._validated)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._validated = dict(checkpoint.get("validated") or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_train_start: a run that was killed after its last step trains no more
        state = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
        if state is not None and state.parent != self.folder.absolute():
            self.best = {}  # of another run, whose best.ckpt is not this one's
        # a last.ckpt that the run does not go on from is damaged, and never becomes the previous one
        self._last_is_whole = state == self.folder.absolute() / "last.ckpt"
        if not all_finite(pl_module.buffers()):
            self._infinite = frozenset(n for n, b in pl_module.named_buffers() if not all_finite([b]))
        if state is not None and self.best and self.keep == "best":
            held = trainer.strategy.broadcast(trainer.is_global_zero and self._mend_best(pl_module))
            self.best = self.best if held else {}

    def _mend_best(self, pl_module: LightningModule) -> bool:
        """Whether best.ckpt holds the state that is known as the best, which it is made of again where it can be."""
        target = self.folder / "best.ckpt"
        shapes = _shapes(pl_module.state_dict())
        if self._is_best(target, shapes):
            return True
        for name in ("last.ckpt", "previous.ckpt"):
            if self._is_best(self.folder / name, shapes):
                _link(self.folder / name, target)
                self.remarks.append(f"best.ckpt was made again, from {name}")
                log.warning("%s", self.remarks[-1])
                return True
        problem = sealed.damage(target) or "holds another state"
        self.remarks.append(
            f"best.ckpt {problem}, and the state of {epoch_named(int(self.best['epoch']))} is nowhere else: the best "
            "is sought anew from here on"
        )
        log.warning("%s", self.remarks[-1])
        return False

    def _is_best(self, file: Path, shapes: dict[str, Any]) -> bool:
        try:
            state = sealed.read(file)
        except sealed.Damaged:
            return False
        if state.get("run", self.run_id) != self.run_id or _shapes(state.get("state_dict", {})) != shapes:
            return False  # of another run, or another network
        own = state.get("callbacks", {}).get(self.state_key, {})
        if self._best_step < 0:  # a state of an earlier version
            return own.get("best") == self.best and state.get("epoch") == self.best.get("epoch")
        return own.get("best") == self.best and state.get("global_step") == self._best_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor in trainer.callback_metrics:
            self._take_in(trainer)
        if trainer.is_last_batch:
            return
        if self._is_due(trainer):
            if (plateau := watched(pl_module).plateau) is not None:
                plateau.observe(trainer)  # the model's turn comes after the callbacks'
            self.save_last(trainer)
        if self._improved:
            self._save_best(trainer)

    def _take_in(self, trainer: Trainer) -> None:
        """Note what the validation that has ended says."""
        assert self.monitor is not None
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if of_split(n, "val")}
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self._validated = {"monitor": self.monitor, "metrics": metrics, **place}
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1.0 if higher_is_better(self.monitor, self.mode) else -1.0
        if math.isfinite(value) and (
            self.monitor not in self.best or sign * value > sign * self.best[self.monitor]
        ):
            self.best = {self.monitor: value, "epoch": trainer.current_epoch}
            self._best_step = trainer.global_step
            self._improved = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a state from before its validation would never have it: where one follows, the state waits for it
        if self._is_due(trainer) and not trainer.is_last_batch and not _is_validated_now(trainer, batch_idx):
            self.save_last(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        # several batches may come before the first step, and after each one
        return bool(self.every_steps and step and step % self.every_steps == 0 and step != self._written_at)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self.save_last(trainer)
        if self._improved:
            self._save_best(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._written_at != trainer.global_step:
            self.save_last(trainer)
        if self.keep == "best" and not self.best and trainer.is_global_zero:
            (self.folder / "best.ckpt").unlink(missing_ok=True)  # of a best that is not known any more

    def save_last(self, trainer: Trainer) -> None:
        """Write last.ckpt now (on all ranks together), unless the state is not finite.

        Raises:
            Unwritable: on all ranks, where it cannot be written.
        """
        if self._save(trainer, "last.ckpt", self.folder / "previous.ckpt" if self._last_is_whole else None):
            self._written_at = trainer.global_step
            self._last_is_whole = True

    def _save(self, trainer: Trainer, name: str, former: Path | None = None) -> bool:
        saving = Saving(former, self._infinite)
        trainer.save_checkpoint(self.folder / name, weights_only=False, storage_options=saving)
        if trainer.world_size > 1:  # rank 0 has written, or not
            saving = trainer.strategy.broadcast(saving)
        if saving.failure is not None:
            raise saving.failure
        if not saving.finite and not self.refused:
            log.warning(
                "the state after step %d is not finite: %s stays as it was", trainer.global_step, name
            )
        self.refused = not saving.finite
        return saving.finite

    def _save_best(self, trainer: Trainer) -> None:
        self._improved = False
        if self.keep != "best":
            return
        if self._written_at != trainer.global_step:
            self._save(trainer, "best.ckpt")
            return
        failure: Unwritable | None = None
        if trainer.is_global_zero:  # the same state has just been written as last.ckpt
            try:
                _link(self.folder / "last.ckpt", self.folder / "best.ckpt")
            except Unwritable as error:
                failure = error
        if trainer.world_size > 1:
            failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise failure


def _is_validated_now(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows a training batch."""
    each, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not isinstance(each, int):  # a float is infinite
        return False
    if every is not None and (trainer.current_epoch + 1) % every:
        return False
    done = batch_idx if every is not None else trainer.fit_loop.epoch_loop.total_batch_idx
    return (done + 1) % each == 0


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _link(source: Path, target: Path) -> None:
    """Let `target` be a second name of the file, or a copy where there are no links."""
    with replacing(target, sync=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
