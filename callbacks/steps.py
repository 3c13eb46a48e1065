"""Values by the step, in RUN/steps.csv and the trackers, where `trainer.log_every_n_steps` is set."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from callbacks.logit_stats import total_norm
from crucible.machine import wide
from crucible.run import RunDirectory
from crucible.training import watched
from crucible.writing import fails_together


class StepRecorder(Callback):
    """Adds a row to steps.csv after every `every` optimizer steps, on rank 0; in the trackers it is `step/*`.

    `loss` is the mean over all samples, of all ranks, that were trained on since the row before, `images_per_s` the
    images of all ranks in that time, without validation and what comes between two epochs. `lr` and `grad_norm` are of
    the row's step: the L2 norm of the whole gradient, over ranks and accumulated batches, under SAM the second pass's,
    unscaled, before anything clips or centralises it. All four are read from the device together, once a row.

    A training state holds what the next row has so far, so that a resumed run continues the file as if it had not been
    stopped; rows from after that state are taken out.

    Args:
        run: whose file it is.
        every: steps from one row to the next, counted over the whole training.
    """

    KEY = "steps"  # in a training state

    def __init__(self, run: RunDirectory, every: int) -> None:
        self.run = run
        self.every = every
        self._step = 0
        self._sums = torch.zeros(3)  # of loss, hits and samples in earlier epochs, since the last row
        self._counted: Tensor | None = None  # of the epoch's running sums, what was there at the last row
        self._norm: Tensor | None = None
        self._rate = 0.0
        self._images = 0
        self._seconds = 0.0
        self._since: float | None = None  # when the clock was started

    # The clock, which stands still in a validation and between two epochs

    def _go(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None

    # Where the training begins and goes on

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(self.KEY)
        if state and trainer.is_global_zero:  # what all ranks had
            self._sums = torch.tensor(state["sums"], dtype=torch.float64)
            self._images, self._seconds = state["images"], state["seconds"]

    @fails_together
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._sums = self._sums.to(pl_module.device, wide(pl_module.device))
        if trainer.is_global_zero:
            self.run.cut_steps(self._step)
        self._go()  # Lightning calls no on_train_epoch_start for an epoch resumed in its middle

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._go()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on
        if self._counted is None:  # the model has begun the epoch, or gone on with it, only now
            self._counted = watched(pl_module).running_sums().clone()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._go()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self._sums, self._counted = self._uncounted(pl_module), None

    # In the step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self._norm = total_norm(g for g in gradients if g is not None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += watched(pl_module).batch_samples * trainer.world_size
        step = trainer.global_step
        if step != self._step and step % self.every == 0:
            self._add_row(trainer, pl_module)
        self._step = step

    def _uncounted(self, pl_module: LightningModule) -> Tensor:
        """This rank's sums since the last row, a tensor of its own."""
        if self._counted is None:  # between two epochs
            return self._sums.clone()
        return self._sums + watched(pl_module).running_sums() - self._counted

    def _of_ranks(self, trainer: Trainer, sums: Tensor) -> Tensor:
        return trainer.strategy.reduce(sums, reduce_op="sum") if trainer.world_size > 1 else sums

    @fails_together
    def _add_row(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective. Waits for the device."""
        sums = self._of_ranks(trainer, self._uncounted(pl_module))
        norm = sums.new_zeros(1) if self._norm is None else self._norm.detach().to(sums).reshape(1)
        loss, _, samples, grad_norm = torch.cat((sums, norm)).tolist()
        self._stop()
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "loss": loss / max(samples, 1),
            "lr": self._rate,
            "grad_norm": grad_norm,
            "images_per_s": round(self._images / max(self._seconds, 1e-9), 1),
        }
        self._sums, self._counted = torch.zeros_like(self._sums), watched(pl_module).running_sums().clone()
        self._images, self._seconds, self._norm = 0, 0.0, None
        self._go()
        if trainer.is_global_zero:
            self.run.add_step(row)
            for logger in trainer.loggers:
                values = {
                    f"step/{name}": value for name, value in row.items() if name not in ("epoch", "step")
                }
                logger.log_metrics(values, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        running = self._since is not None
        self._stop()
        sums = self._of_ranks(trainer, self._uncounted(pl_module))
        checkpoint[self.KEY] = {"sums": sums.tolist(), "images": self._images, "seconds": self._seconds}
        if running:
            self._go()
