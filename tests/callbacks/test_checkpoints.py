"""Which epoch counts as the best."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from callbacks.checkpoints import Checkpoints


def best_of(values: list[float], monitor: str, mode: str | None = None) -> dict[str, float]:
    """What `Checkpoints` takes for the best, where each validation logs the next value."""
    checkpoints = Checkpoints("nowhere", keep="last", monitor=monitor, mode=mode)
    for epoch, value in enumerate(values):
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"),
            sanity_checking=False,
            callback_metrics={monitor: value},
            current_epoch=epoch,
            global_step=epoch,
            is_last_batch=False,
        )
        checkpoints.on_validation_end(trainer, None)  # type: ignore[arg-type]
    return checkpoints.best


@pytest.mark.parametrize(
    ("monitor", "mode", "epoch"),
    [
        ("val/acc", None, 2),
        ("val_raw/loss", None, 1),
        ("val/f1_per_class/loss", None, 2),
        ("val/my_error", None, 2),
        ("val/my_error", "min", 1),
        ("val/loss", "max", 2),
    ],
)
def test_the_best_epoch_is_the_highest_or_the_lowest_by_metric_or_mode(monitor, mode, epoch) -> None:
    values = [0.5, 0.2, 0.9, float("nan"), 0.4]
    assert best_of(values, monitor, mode) == {monitor: values[epoch], "epoch": epoch}


def test_nothing_is_saved_by_the_step_before_the_first_one() -> None:
    """Several batches come before it, where gradients are accumulated."""
    saved: list[int] = []

    class Notes(Checkpoints):
        def save_last(self, trainer) -> None:
            saved.append(trainer.global_step)
            self._written_at = trainer.global_step

    checkpoints = Notes("nowhere", keep="last", every_steps=2)
    for batch in range(1, 25):
        trainer = SimpleNamespace(global_step=batch // 4, is_last_batch=False)
        checkpoints.on_train_batch_end(trainer, None, None, None, batch - 1)  # type: ignore[arg-type]
    assert saved == [2, 4, 6]
