"""A technique's state survives a stop: training on from a checkpoint equals training without one, bit by bit."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nightly
from lightning.pytorch.callbacks import Callback
from record import tensors
from technique_runs import TECHNIQUES, built, composed, refused_on_the_page

# those that carry state, or draw random numbers in the step
STATEFUL = ("sam", "online_norm", "ema", "swa", "lookahead", "mixup", "stochastic_depth")
PAIRS = [p for p in combinations(sorted(STATEFUL), 2) if p not in refused_on_the_page()]
# further kinds: a count of steps, statistics in parts, frozen layers, an order, a second network, a weighted loss
OTHER_KINDS = (
    "sam_every_5",
    "ghost_norm",
    "freeze",
    "balanced_sampling",
    "distillation",
    "class_weights",
    "cutout",
)
FIRST_PAIRS = [("mixup", "sam"), ("ema", "lookahead")]  # random numbers and a second pass; two averages
OTHER_PAIRS = [p for p in PAIRS if p not in FIRST_PAIRS]
OPTIONS = ("trainer.max_steps=11", "trainer.limit_train_batches=5", "model.optimizer=Adam", "model.lr=0.003")
STOP = 7  # inside the second epoch of 5 steps


class SaveAt(Callback):
    """Writes a training state after a step, as a preempted run would have."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "techniques",
    [
        *((t,) if t in (*STATEFUL, *OTHER_KINDS) else nightly((t,))[0] for t in TECHNIQUES),
        *FIRST_PAIRS,
        *nightly(*OTHER_PAIRS),
    ],
    ids="+".join,
)
def test_resume_equals_no_interruption(techniques: tuple[str, ...], tmp_path: Path, teacher: Path) -> None:
    whole, stopped = tmp_path / "whole.ckpt", tmp_path / "stopped.ckpt"
    final: list[dict[str, torch.Tensor]] = []
    for start in (None, stopped):
        model, data, trainer = built(composed(*techniques, teacher=teacher, options=OPTIONS), tmp_path)
        if start is None:
            trainer.callbacks.append(SaveAt(stopped))
        trainer.fit(model, datamodule=data, ckpt_path=start)
        assert trainer.global_step == 11
        trainer.save_checkpoint(whole)
        state = torch.load(whole, weights_only=True)
        names = ("state_dict", "averaged_state_dict", "optimizer_states", "lr_schedulers", "train_sums")
        final.append(tensors({name: state.get(name, {}) for name in names}))
    assert final[0].keys() == final[1].keys()
    different = [name for name in final[0] if not torch.equal(final[0][name], final[1][name])]
    assert not different, different[:5]
