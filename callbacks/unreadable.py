"""Counts the samples that `data.module.on_error=skip` left out, over all processes, for log, summary and report."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from crucible.run import RunDirectory

KEY = "unreadable"  # in the summary: {split: {"count": n, "samples": [names of the first]}}
LISTED = 20  # names of a split, in the log and in the summary
log = logging.getLogger("crucible")


class Unreadable(Callback):
    """Says which samples could not be read, once each, at the end of an epoch and of a test.

    Args:
        run: its summary gets them; None: they are only said.
    """

    def __init__(self, run: RunDirectory | None = None) -> None:
        self.run = run
        self.found: dict[str, list[int]] = {}  # numbers by split, of all processes
        self.before: dict[str, list[int]] = {}  # those that the state has, from which this process goes on

    @property
    def count(self) -> int:
        """The samples that were skipped so far, each counted once."""
        return sum(map(len, self.found.values()))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        found = {split: self._numbers(trainer, split) for split in ("train", "val")}
        if any(found.values()):
            checkpoint[KEY] = {split: numbers for split, numbers in found.items() if numbers}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.before = checkpoint.get(KEY, {})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(trainer, ("train", "val"))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(trainer, ("test",))

    def _numbers(self, trainer: Trainer, split: str) -> list[int]:
        """Those of a split that could not be read so far, by any process, also before a resume."""
        marks = trainer.datamodule.unread(split)  # type: ignore[attr-defined]
        if marks is None:
            return []
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(
                marks.to(trainer.strategy.root_device, torch.int32), reduce_op="sum"
            )
            assert isinstance(total, torch.Tensor)
            marks = total.cpu()
        return sorted({*self.before.get(split, []), *marks.nonzero().flatten().tolist()})

    def _gather(self, trainer: Trainer, splits: tuple[str, ...]) -> None:
        for split in splits:
            numbers, known = self._numbers(trainer, split), self.found.get(split, [])
            self.found[split] = numbers
            if trainer.is_global_zero and len(numbers) > len(known):
                self._say(trainer.datamodule, split, sorted(set(numbers) - set(known)))  # type: ignore[attr-defined]

    def _say(self, data: Any, split: str, numbers: list[int]) -> None:
        for number in numbers[:LISTED]:
            why = data.samples(split).why_unreadable(number) or data.sample_name(number, split)
            log.warning("skipped: %s", why)
        if len(numbers) > LISTED:
            log.warning("skipped: %d more samples of the %s split", len(numbers) - LISTED, split)
        if self.run is not None:
            listed = {
                name: {"count": len(found), "samples": [data.sample_name(i, name) for i in found[:LISTED]]}
                for name, found in self.found.items()
                if found
            }
            self.run.update_summary(**{KEY: {**(self.run.summary().get(KEY) or {}), **listed}})


def skipped(trainer: Trainer) -> int:
    """The samples that this trainer's run has skipped so far."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.count for callback in callbacks if isinstance(callback, Unreadable))
