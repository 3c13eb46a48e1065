"""A stop after any batch, also between two batches of one optimizer step: the resumed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from record import tensors
from technique_runs import built, composed

from callbacks.checkpoints import Checkpoints
from callbacks.recorder import GracefulStop, Interrupted

BATCHES = 5
STATES = (
    "state_dict", "averaged_state_dict", "optimizer_states", "lr_schedulers", "train_sums", "global_step", "epoch",
)  # fmt: skip
# dropout draws in the step, momentum and online norm carry state; rates change with the step, gradients are clipped
OPTIONS = (
    "trainer.max_epochs=2", "trainer.max_steps=-1", f"trainer.limit_train_batches={BATCHES}", "model.warmstart=1",
    "model.lr_interval=step", "trainer.gradient_clip_val=0.5",
)  # fmt: skip
VARIANTS = {
    "momentum": ("model.undecay_norm=true",),
    "online_norm_ema": ("model.norm=online", "model.ema_decay=0.9", "model.mixup=true"),
    "adam_lookahead": (
        "model.optimizer=Adam",
        "model.lr=0.003",
        "model.lookahead=true",
        "model.lookahead_k=2",
    ),
    "bf16": ("trainer.precision=bf16-mixed", "model.stochastic_depth=0.2"),
}


class StopBefore(Callback):
    """A signal that arrives while the batch before is trained."""

    def __init__(self, stop: GracefulStop, batch: int) -> None:
        self.stop, self.batch = stop, batch

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            self.stop.received = 15


def wait_for_the_others() -> None:
    if dist.is_initialized():
        dist.barrier()


def numbers(folder: Path, options: tuple[str, ...], stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """All that a run's last state holds, which was stopped before these batches of its whole training."""
    file = folder / "last.ckpt"
    wait_for_the_others()
    file.unlink(missing_ok=True)
    wait_for_the_others()
    for stop in (*stops, None):
        model, data, trainer = built(composed(options=(*OPTIONS, *options)), folder)
        graceful = GracefulStop(Checkpoints(folder, keep="last"), every=1)
        trainer.callbacks += [graceful.checkpoints]
        trainer.callbacks += [graceful] if stop is None else [StopBefore(graceful, stop), graceful]
        wait_for_the_others()
        start = file if file.is_file() else None
        wait_for_the_others()
        if stop is None:
            trainer.fit(model, datamodule=data, ckpt_path=start)
        else:
            with pytest.raises(Interrupted):
                trainer.fit(model, datamodule=data, ckpt_path=start)
            graceful.teardown(trainer, model, "fit")
    state = torch.load(file, weights_only=True)
    assert "accumulation" not in state, "a whole training leaves no open step"
    assert state["train_sums"][0] == 1  # of the last epoch, by rank
    return tensors({name: state.get(name, {}) for name in STATES}) | {
        name: str(state[name]) for name in ("lr_schedulers", "train_sums", "global_step")
    }


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def different(folder: Path, options: tuple[str, ...], *stops: tuple[int, ...]) -> list[Any]:
    whole = numbers(folder, options)
    found = []
    for stop in stops:
        again = numbers(folder, options, stop)
        assert again.keys() == whole.keys()
        wrong = [name for name in whole if not same(again[name], whole[name])]
        found += [(stop, wrong[:3])] if wrong else []
    return found


@pytest.mark.slow
def test_a_stop_inside_an_accumulated_step_loses_nothing(tmp_path: Path) -> None:
    options = ("trainer.accumulate_grad_batches=4", "model.resnet_dropout=0.2")
    assert different(tmp_path, options, (2,), (5,), (7, 8)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_a_stop_after_every_batch_loses_nothing(accumulate: int, variant: str, tmp_path: Path) -> None:
    options = (f"trainer.accumulate_grad_batches={accumulate}", *VARIANTS[variant])
    assert different(tmp_path, options, *((stop,) for stop in range(1, 2 * BATCHES))) == []


def stop_each(folder: str, *stops: str) -> None:
    """What each of the two processes does."""
    for variant, options in RANKS.items():
        wrong = different(Path(folder), (*OF_TWO, *options), *((int(stop),) for stop in stops))
        assert not wrong, (variant, wrong)


OF_TWO = ("trainer.devices=2", "data.module.batch_size=8", "trainer.accumulate_grad_batches=3")
RANKS = {
    "dropout": ("model.resnet_dropout=0.2", "model.ema_decay=0.9"),
    "online_norm": ("model.norm=online",),
}


@pytest.mark.slow
def test_two_processes_keep_their_own_gradients_sums_and_streams(on_two_processes, tmp_path: Path) -> None:
    on_two_processes(stop_each, tmp_path, 4)


@pytest.mark.nightly
def test_two_processes_may_stop_after_every_batch(on_two_processes, tmp_path: Path) -> None:
    on_two_processes(stop_each, tmp_path, *range(1, 2 * BATCHES))
