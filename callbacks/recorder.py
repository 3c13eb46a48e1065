"""What a run leaves behind while it goes: metrics.csv, summary.json, and an orderly end when it is stopped."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpoints import Checkpoints
from crucible import private
from crucible.console import epoch_line, epoch_named, speed, split_line
from crucible.liveness import stopping_signals
from crucible.loggers import Tracker
from crucible.metrics import of_split
from crucible.run import RunDirectory
from crucible.training import watched
from crucible.writing import fails_together
from norms import own_streams, set_own_streams

log = logging.getLogger("crucible")


class Interrupted(Exception):
    """The run was asked to stop (`stopping_signals`); its state is in last.ckpt."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number


class Diverged(Exception):
    """Loss, gradient or weights are not finite numbers any more."""


class GoBack(Exception):
    """The training is to be taken up again from its last good state."""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: of the GPU where one is used, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    per_kib = 1 if sys.platform != "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / per_kib


def _column_order(item: tuple[str, float]) -> tuple[int, str, int, str]:
    """train before val and that before its groups, loss before accuracy before the rest."""
    split, _, name = item[0].partition("/")
    splits = ("train", "logits", "val", "val_raw")
    place = splits.index(split) if split in splits else len(splits)
    return place, split, {"loss": 0, "acc": 1}.get(name, 2), name


class Recorder(Callback):
    """Writes a row of metrics.csv, the summary and a line of main.log after each epoch, on rank 0.

    The trackers get the row as it is in metrics.csv, once, at the optimizer step of the epoch's end, and the values of
    a validation within the epoch at its step.

    Args:
        run: where to.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self.train_seconds = 0.0
        self.images = 0
        self._open = False  # an epoch is under way
        self._earlier = 0.0  # seconds of it, in a part of the run before this one
        self._epoch_started = 0.0
        self._paused = 0.0
        self._validation_started: float | None = None
        self._lr = 0.0
        self._test_started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Training time and images of the epochs so far, and the time of the one under way.

        The images of that one are in the state already, as Lightning's count of batches.
        """
        seconds = self._epoch_seconds() if self._open else 0.0
        return {"train_seconds": self.train_seconds, "images": self.images, "epoch_seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.train_seconds, self.images = state_dict["train_seconds"], state_dict["images"]
        self._earlier = state_dict.get("epoch_seconds", 0.0)  # states of earlier versions have none

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watched(pl_module).hands_on_rows = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = self.run.metrics()
        self.rows = [dict(row) for row in known if int(row["epoch"]) < trainer.current_epoch]
        if trainer.global_step and trainer.is_global_zero:
            named = epoch_named(trainer.current_epoch, watched(pl_module).epochs)
            log.info("goes on with %s, after step %d", named, trainer.global_step)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, Tracker):
                logger.goes_on_from(trainer.global_step)
        # Lightning calls no on_train_epoch_start for an epoch resumed in its middle
        self._begin_epoch(self._earlier)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch(0.0)

    def _begin_epoch(self, earlier: float) -> None:
        self._open, self._earlier, self._paused, self._validated = True, earlier, 0.0, False
        self._epoch_started, self._validation_started = time.monotonic(), None

    def _epoch_seconds(self) -> float:
        """Of the epoch under way, in all parts of the run, without validation."""
        until = time.monotonic() if self._validation_started is None else self._validation_started
        return self._earlier + until - self._epoch_started - self._paused

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation_started is not None:
            self._paused += time.monotonic() - self._validation_started
            self._validation_started = None
        self._validated = True
        if trainer.state.fn == "fit" and not (trainer.sanity_checking or trainer.is_last_batch):
            self._hand_on(
                trainer, {k: float(v) for k, v in trainer.callback_metrics.items() if of_split(k, "val")}
            )

    def _hand_on(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """Give the trackers a row."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step)
            logger.save()

    @fails_together
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watched(pl_module).log_training()  # of an epoch that was cut, say
        # Lightning keeps the values of an earlier epoch's validation
        fresh = ("train", "logits", *(("val",) if self._validated else ()))
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if of_split(k, *fresh)}
        seconds, self._open = self._epoch_seconds(), False
        # also those before a stop within the epoch, which the state brings back
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        # the last batch may be a smaller one (drop_last=false)
        images = min(batches * data.batch_size * trainer.world_size, len(data.samples("train")))
        self.train_seconds += seconds
        self.images += images
        if trainer.is_global_zero:
            row = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                **dict(sorted(values.items(), key=_column_order)),
                "lr": self._lr,
                "time/epoch_s": round(seconds, 3),
                "time/images_per_s": round(images / max(seconds, 1e-9), 1),
            }
            shown, epochs = (["train", "val"] if self._validated else ["train"]), watched(pl_module).epochs
            said = speed(images, seconds)
            log.info(epoch_line(trainer.current_epoch, epochs, values, shown, self._lr, said))
            self._hand_on(trainer, {k: v for k, v in row.items() if k != "step"})
            self.rows.append(row)
            self.run.write_metrics(self.rows)
            summary = self.run.summary()
            splits = {name.partition("/")[0] for name in values if not name.startswith("logits/")}
            self.run.update_summary(
                **self.totals(trainer, pl_module),
                final={**summary.get("final", {}), **values},
                final_epochs={
                    **summary.get("final_epochs", {}),
                    **dict.fromkeys(splits, trainer.current_epoch),
                },
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._test_started = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            values = {k: float(v) for k, v in trainer.callback_metrics.items()}
            images = trainer.datamodule.seen("test")  # type: ignore[attr-defined]
            log.info(split_line("test", values, speed(images, time.monotonic() - self._test_started)))

    def totals(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the summary says of the run so far.

        `wall_time_s` is the training time of what is in the weights, without validation, in all parts of the run. Work
        that was lost with a killed process and trained again counts once; `elapsed_s` has both.
        """
        checkpoints = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        return {
            "epochs": trainer.current_epoch + 1,
            "steps": trainer.global_step,
            "best": checkpoints.best if checkpoints else {},
            "wall_time_s": round(self.train_seconds, 2),
            "images_per_s": round(self.images / max(self.train_seconds, 1e-9), 1),
            "peak_memory_mb": round(peak_memory_mb(pl_module.device), 1),
        }


class GracefulStop(Callback):
    """Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP ends the run between two steps, its state in last.ckpt; Ctrl-C twice: at once.

    SLURM's warning (`--signal=USR1@90`) and its preemption arrive as SIGUSR1 and SIGTERM, a closed terminal as SIGHUP.

    Lightning's own handler hangs under DDP, where the ranks must agree on the step at which they stop.

    Args:
        checkpoints: writes the state.
        every: steps between the agreements of several ranks.
    """

    def __init__(self, checkpoints: Checkpoints, every: int = 4) -> None:
        self.checkpoints = checkpoints
        self.every = every
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._streams: Tensor | None = None  # (ranks, n); of the state that is saved, or resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        streams, self._streams = self._streams, None
        if streams is not None and len(streams) == trainer.world_size:
            set_own_streams(pl_module, streams[trainer.global_rank])
        for number in stopping_signals():
            self._previous[number] = signal.signal(number, self._receive)
        # Lightning's own vote, a collective and a wait for the device in every step, has nothing left to decide
        private.end_sigterm_votes(trainer)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            stop = bool(self.received)
        else:
            asked = bool(self.received)
            stop = batch_idx % self.every == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)
        if stop:
            if trainer.world_size > 1 and (own := own_streams(pl_module)).numel():
                # a state holds what the ranks have in common; without the stop each had gone on with its own
                self._streams = torch.atleast_2d(trainer.strategy.all_gather(own)).cpu()
            # after a GoBack the last good state is there, and meets the same numbers again
            with contextlib.suppress(GoBack):
                self.checkpoints.save_last(trainer)
            raise Interrupted(self.received or signal.SIGTERM)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._streams is not None:
            checkpoint["streams"] = self._streams

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._streams = checkpoint.get("streams")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, GoBack):  # this process goes on, with another trainer
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
