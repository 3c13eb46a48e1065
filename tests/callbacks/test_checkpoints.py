"""Which epoch counts as the best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, runs_in, summary_of

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
        trainer = SimpleNamespace(
            global_step=batch // 4,
            is_last_batch=False,
            enable_validation=False,
            val_check_batch=10,
            check_val_every_n_epoch=1,
        )
        checkpoints.on_train_batch_end(trainer, None, None, None, batch - 1)  # type: ignore[arg-type]
    assert saved == [2, 4, 6]


@pytest.mark.parametrize("schedule", [[], ["model.scheduler=Plateau", "model.lr_patience=1"]])
def test_a_state_of_a_step_that_is_validated_knows_its_validation(
    cli, tmp_path: Path, schedule: list[str]
) -> None:
    """A run that is killed after it and goes on ends as one that was not."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "killed.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Killed(Callback):\n"
        "    def on_train_batch_start(self, trainer, *rest):\n"
        "        if trainer.global_step == 7 and Path('kill').exists():\n"
        "            Path('kill').unlink()\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    command = [*TINY, "data.module.batch_size=8", "trainer.max_epochs=2", "user_dir=mine", "model.lr=0.3"]
    command += ["+trainer.val_check_interval=2", "checkpoint.every_steps=2", *schedule]
    command += ["+callbacks.killed._target_=killed.Killed"]
    assert cli(*command, "exp_dir=whole").status == 0
    (tmp_path / "kill").touch()
    assert cli(*command, "exp_dir=parts").status == 1
    (parts,) = runs_in(tmp_path / "parts")
    state = torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["validated"]["step"] == state["global_step"] == 6
    assert cli(*command, "exp_dir=parts").status == 0
    (whole,) = runs_in(tmp_path / "whole")
    assert summary_of(parts)["best"] == summary_of(whole)["best"]
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, parts)]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
