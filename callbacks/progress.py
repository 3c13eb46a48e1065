"""Progress of a run: a live line on a terminal, one plain line an epoch anywhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from callbacks.unreadable import skipped
from crucible.console import (
    clock,
    columns,
    console,
    epoch_line,
    epoch_named,
    fitted,
    is_live,
    metrics_shown,
    speed,
    split_line,
)
from crucible.training import watched

REDRAW_S = 0.1
SLOW_S = 1.0  # between redraws, where steps take so long that `refresh_rate` of them are a wait
SHORTEST_BAR, BEFORE_THE_BAR = 8, 4  # columns; what ranks from there on makes room for the bar


class Progress(ProgressBar):
    """Shows the epoch in progress on one live line and leaves one line for each finished epoch.

    A terminal shows both, and what is not wide enough for the live line is left out of it, the least important first;
    a log file (CI, SLURM) gets the finished lines only, without control characters. Ranks other than 0 show nothing.
    Between redraws a step costs a few microseconds; a redraw waits for the device, because it reads the running loss.
    Epoch seconds and images/s leave validation out; images/s counts the images of all ranks.

    Args:
        refresh_rate: steps between redraws of the live line, which are also at least 0.1 s apart. The first step is
            drawn, and one a second where steps are slow.
    """

    def __init__(self, refresh_rate: Annotated[int, "[1, inf)"] = 20) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._enabled = True
        self._live: Live | None = None
        self._title = ""
        self._total: float | None = None
        self._steps = self._images = self._first_step = 0
        self._started = self._redrawn = self._paused_at = self._fit_started = 0.0
        self._rate = 0.0
        self._first_epoch = self._done = 0
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
        title = epoch_named(trainer.current_epoch, watched(pl_module).epochs)
        self._begin(title, self.total_train_batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._enabled:
            self._images += watched(pl_module).batch_samples
            self._steps += 1
            if self._due():
                self._first_step = batch_idx + 1 - self._steps
                shown = metrics_shown(watched(pl_module).running_metrics())
                self._redraw([*shown, f"lr {self._rate:.3g}"], trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        watched(pl_module).log_training()  # of an epoch that was cut, say
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        splits, more = ["train", "val"] if self._validated else ["train"], []
        if unread := skipped(trainer):
            more.append(f"unreadable {unread}")
        done, epochs = trainer.current_epoch + 1, watched(pl_module).epochs
        if done < epochs < math.inf:
            an_epoch = (time.monotonic() - self._fit_started) / (done - self._first_epoch)
            more.append(f"left {clock(an_epoch * (epochs - done))}")
        said = self._speed(trainer.world_size)
        self._finish(epoch_line(trainer.current_epoch, epochs, values, splits, self._rate, said, *more))

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
        elif self._enabled and not trainer.sanity_checking and self._may_redraw():
            self._draw([f"validation {batch_idx + 1}/{sum(trainer.num_val_batches):.0f}"])

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
        self._steps = self._images = self._first_step = self._done = 0
        self._started = self._redrawn = time.monotonic()
        if self._enabled and is_live():
            self._clear()
            self._live = Live(
                console=console(), auto_refresh=False, transient=True
            )  # no thread beside the training
            self._live.start()
            self._draw([f"0/{self._total:.0f}" if self._total else "0"])

    def _count(self, batch: Any, trainer: Trainer) -> None:
        if self._enabled:
            self._images += len(batch.target)
            self._steps += 1
            if self._due():
                self._redraw([], trainer.world_size)

    def _due(self) -> bool:
        if self._live is None:
            return False
        waited = time.monotonic() - self._redrawn
        if self._steps % self.refresh_rate == 0:
            return waited >= REDRAW_S
        return self._steps == 1 or waited >= SLOW_S

    def _may_redraw(self) -> bool:
        return self._live is not None and time.monotonic() - self._redrawn >= REDRAW_S

    def _redraw(self, values: Sequence[str], world_size: int) -> None:
        seconds = time.monotonic() - self._started
        done = self._first_step + self._steps
        left = clock(seconds / self._steps * (self._total - done)) if self._total else "?"
        rate = f"{self._images * world_size / max(seconds, 1e-9):.0f} images/s"
        count = f"{done}/{self._total:.0f}" if self._total else str(done)
        # the numbers are the order in which they are left out, the highest first
        ranked = [
            (0, count),
            *zip((1, 2, 4), values, strict=False),
            (5, rate),
            (3, f"{clock(seconds)}<{left}"),
        ]
        self._draw([text for _, text in ranked], [rank for rank, _ in ranked], done)

    def _draw(self, parts: Sequence[str], ranks: Sequence[int] = (0,), done: int | None = None) -> None:
        assert self._live is not None
        self._redrawn = time.monotonic()
        self._done = self._done if done is None else done
        width = self._live.console.width
        self._live.update(_line(self._title, parts, ranks, self._done, self._total, width), refresh=True)

    def _report(self, trainer: Trainer, split: str) -> None:
        if self._enabled:
            values = {k: float(v) for k, v in trainer.callback_metrics.items()}
            self._finish(split_line(split, values, self._speed(trainer.world_size)))

    def _speed(self, world_size: int) -> str:
        return speed(self._images * world_size, time.monotonic() - self._started)

    def _finish(self, line: str) -> None:
        self._clear()
        if self._enabled:
            self._write(line)

    def _write(self, line: str) -> None:
        text = fitted(line, columns())
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _line(
    title: str, parts: Sequence[str], ranks: Sequence[int], done: int, total: float | None, width: int
) -> RenderableType:
    """The live line: title, bar, and those parts for which there is room; the bar takes what they leave."""
    kept = list(zip(ranks, parts, strict=True))

    def over(room: int) -> bool:
        return len("  ".join([title, *(text for _, text in kept)])) > room

    while max(kept)[0] >= BEFORE_THE_BAR and over(width - SHORTEST_BAR - 2):
        kept.remove(max(kept))
    while len(kept) > 1 and over(width - 1):
        kept.remove(max(kept))
    note = "  ".join(text for _, text in kept)
    room = width - len(title) - len(note) - 4
    line = Table.grid(padding=(0, 2, 0, 0))
    cells: list[RenderableType] = [Text(title, no_wrap=True)]
    if room >= SHORTEST_BAR:
        cells.append(Bar(total=total, completed=done, width=room, pulse=False))
    line.add_row(*cells, Text(note, no_wrap=True))
    return line
