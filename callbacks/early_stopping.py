"""Early stopping: a training that gets no better for a while ends."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from crucible.metrics import higher_is_better
from crucible.patience import Patience


class EarlyStopping(Callback):
    """Ends the training after the validation at which a value has not been better for `patience` validations.

    The schedule keeps the length that was asked for: what ends early has not seen its end. The last epoch is tested as
    always, and best.ckpt is the best one. All ranks have the same value and end together. A resumed run goes on
    counting; one that was killed after the decision ends at once. `trainer.min_epochs` holds.

    Args:
        patience: validations in a row without a better value, after which it ends.
        monitor: of the validation's values; null: `checkpoint.monitor`.
        min_delta: a value counts as better where it is so by more than this.
        mode: which way it is better; null: by the metric.
    """

    def __init__(
        self,
        patience: Annotated[int, "[1, inf)"] = 10,
        monitor: str | None = None,
        min_delta: Annotated[float, "[0, inf)"] = 0.0,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        self.monitor = monitor or "val/loss"
        self.patience = patience
        self._watch = Patience(higher_is_better(self.monitor, mode), min_delta)
        self._stopped = False

    @property
    def reason(self) -> str:
        """Why the training ended before its time, in a few words; empty where it did not."""
        if not self._stopped:
            return ""
        best = "" if math.isinf(self._watch.best) else f"; the best was {self._watch.best:.4g}"
        return f"{self.monitor} was not better in {self._watch.waited} validations{best}"

    def state_dict(self) -> dict[str, Any]:
        """The best value, how many validations ago it was, and whether that ended the training."""
        return {**self._watch.state_dict(), "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._watch.load_state_dict(state_dict)
        self._stopped = self._watch.waited >= self.patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.observe(float(trainer.callback_metrics[self.monitor]))
            self._stopped = self._watch.waited >= self.patience
            trainer.should_stop = trainer.should_stop or self._stopped
