"""Progress of a run: a live line on a terminal, one plain line an epoch anywhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from callbacks.unreadable import skipped
from crucible.training import watched

REDRAW_S = 0.1
_SECOND = ("acc", "mae", "mse", "r2")


class Progress(ProgressBar):
    """Shows the epoch in progress on one live line and leaves one line for each finished epoch.

    A terminal shows both; a log file (CI, SLURM) gets the finished lines only, without control characters.
    Ranks other than 0 show nothing. Between redraws a step costs a few microseconds; a redraw waits for the
    device, because it reads the running loss. Epoch seconds and images/s leave validation out; images/s
    counts the images of all ranks.

    Args:
        refresh_rate: steps between redraws of the live line, which are also at least 0.1 s apart.
    """

    def __init__(self, refresh_rate: Annotated[int, "[1, inf)"] = 20) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._enabled = True
        self._live: RichProgress | None = None
        self._title = ""
        self._total: float | None = None
        self._steps = self._images = self._first_step = 0
        self._started = self._redrawn = self._paused_at = self._fit_started = 0.0
        self._rate = 0.0
        self._first_epoch = 0
        self._validated = False

    def enable(self) -> None:
        """Show what follows."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._clear()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the live one."""
        if self._enabled:
            self._write(kwargs.get("sep", " ").join(map(str, args)))

    # The four phases: train, validate, test, predict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started, self._first_epoch = time.monotonic(), trainer.current_epoch
        self._begin_epoch(trainer, pl_module)  # an epoch resumed in its middle has no `on_train_epoch_start`

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch(trainer, pl_module)

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        self._begin(_epoch_title(trainer, pl_module), self.total_train_batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._enabled:
            self._images += len(batch.index)
            self._steps += 1
            if self._steps % self.refresh_rate == 0 and self._due():
                self._first_step = batch_idx + 1 - self._steps
                values = watched(pl_module).running_metrics()
                self._redraw(f"{_metrics(values)} lr {self._rate:.3g}  ", trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        watched(pl_module).log_training()  # of an epoch that was cut, say
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        parts = [_epoch_title(trainer, pl_module), _split(values, "train")]
        if self._validated:
            parts.append(_split(values, "val"))
        parts += [f"lr {self._rate:.3g}", self._speed(trainer.world_size)]
        if unread := skipped(trainer):
            parts.append(f"unreadable {unread}")
        done, epochs = trainer.current_epoch + 1, watched(pl_module).epochs
        if done < epochs < math.inf:
            an_epoch = (time.monotonic() - self._fit_started) / (done - self._first_epoch)
            parts.append(f"left {_clock(an_epoch * (epochs - done))}")
        self._finish("  ".join(part for part in parts if part))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.monotonic()
        if trainer.state.fn != "fit":
            self._begin("val", trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            self._count(batch, trainer)
        elif self._enabled and not trainer.sanity_checking and self._due():
            batches = sum(trainer.num_val_batches)
            self._redraw(f"validation {batch_idx + 1}/{batches:.0f}", trainer.world_size, clock=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started += time.monotonic() - self._paused_at if trainer.state.fn == "fit" else 0.0
        self._validated = not trainer.sanity_checking
        if trainer.state.fn != "fit":
            self._report(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(batch, trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predict", trainer.num_predict_batches)

    on_predict_batch_end = on_test_batch_end

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(
            f"predict  {self._images * trainer.world_size} images  {self._speed(trainer.world_size)}"
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clear()

    # What is shown

    def _begin(self, title: str, batches: float | list[int | float]) -> None:
        self._title = title
        total = sum(batches) if isinstance(batches, list) else batches
        self._total = None if total == float("inf") else total
        self._steps = self._images = self._first_step = 0
        self._started = self._redrawn = time.monotonic()
        if self._enabled and _on_terminal():
            self._clear()
            self._live = _live_line()
            self._live.add_task(title, total=self._total, note="")
            self._live.start()
            self._live.refresh()

    def _count(self, batch: Any, trainer: Trainer) -> None:
        if self._enabled:
            self._images += len(batch.index)
            self._steps += 1
            if self._steps % self.refresh_rate == 0 and self._due():
                self._redraw("", trainer.world_size)

    def _due(self) -> bool:
        return self._live is not None and time.monotonic() - self._redrawn >= REDRAW_S

    def _redraw(self, note: str, world_size: int, clock: bool = True) -> None:
        assert self._live is not None
        self._redrawn = time.monotonic()
        seconds = self._redrawn - self._started
        done = self._first_step + self._steps
        if clock:
            left = _clock(seconds / self._steps * (self._total - done)) if self._total else "?"
            rate = f"{self._images * world_size / seconds:.0f} images/s"
            total = f"/{self._total:.0f}" if self._total else ""
            note = f"{done}{total}  {note}{rate}  {_clock(seconds)}<{left}"
        self._live.update(self._live.task_ids[0], completed=done, note=note)
        self._live.refresh()

    def _report(self, trainer: Trainer, split: str) -> None:
        if self._enabled:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/")}
            shown = "  ".join(f"{k.removeprefix(f'{split}/')} {v:.4f}" for k, v in values.items())
            self._finish(f"{split}  {shown}  {self._speed(trainer.world_size)}")

    def _speed(self, world_size: int) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{seconds:.1f} s  {self._images * world_size / seconds:.0f} images/s"

    def _finish(self, line: str) -> None:
        self._clear()
        if self._enabled:
            self._write(line)

    def _write(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _live_line() -> RichProgress:
    text = Column(no_wrap=True)
    return RichProgress(
        TextColumn("{task.description}", table_column=text),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes what the texts leave
        TextColumn("{task.fields[note]}", markup=False, table_column=text),
        console=Console(file=sys.stdout),
        expand=True,
        auto_refresh=False,  # no thread beside the training loop
        transient=True,
    )


def _epoch_title(trainer: Trainer, pl_module: LightningModule) -> str:
    number, epochs = str(trainer.current_epoch + 1), watched(pl_module).epochs
    if math.isinf(epochs):
        return f"epoch {number}"
    last = math.ceil(epochs)
    return f"epoch {number.rjust(len(str(last)))}/{last}"


def _metrics(values: Mapping[str, float]) -> str:
    second = next((name for name in _SECOND if name in values), None)
    names = [name for name in ("loss", second) if name in values]
    return " ".join(f"{name} {values[name]:.4f}" for name in names if name)


def _split(values: Mapping[str, float], split: str) -> str:
    shown = _metrics({k.removeprefix(f"{split}/"): v for k, v in values.items() if k.startswith(f"{split}/")})
    return f"{split} {shown}" if shown else ""


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
