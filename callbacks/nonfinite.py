"""Numbers that go wrong: seen without a wait in the step, named by running the step again; stopped, skipped or undone.

A step only leaves numbers on the device: the loss of each batch, and where steps are skipped the largest gradient. They
are read at an epoch's end and before a training state is saved, together with the weights, which no gradient that is
not finite leaves finite. So at most the steps between two such places are wasted, and no state is saved that is not
finite.

What is found then is a place. To name the module, the run goes back to its last good state and trains up to there
again, which every draw being a function of counters makes the same training, and watches that step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.recorder import Diverged, GoBack
from crucible.batch import Batch
from crucible.console import epoch_named
from crucible.finite import all_finite, tensors_in
from crucible.machine import wide
from crucible.run import RunDirectory
from crucible.training import watched
from optimizers.accumulation import pending_batches
from optimizers.undo import UndoneSteps, largest_gradient

log = logging.getLogger("crucible")

OnNonfinite = Literal["stop", "skip", "rollback"]
KEY = "nonfinite"  # in a training state and in the summary
LISTED = 100  # entries of the summary; all are counted
LISTED_AT_ONCE = 10  # skipped steps of one look whose batches are read again
NAMED = 5  # samples in a line
TRIES = 3  # of finding a place again
IN_A_ROW = 10  # skipped steps, or an epoch of them, are no training any more


class Place(NamedTuple):
    """A batch of the training: epoch, number there, the optimizer step that it belongs to, all from 0; and the rate."""

    epoch: int
    batch: int
    step: int
    rate: float


class Trace:
    """Numbers on the device, one a batch or step, brought to the host together."""

    SIZE = 1024

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def add(self, value: Tensor) -> None:
        """Nothing waits."""
        place = self._count % self.SIZE
        if not place:
            self._blocks.append(torch.zeros(self.SIZE, dtype=wide(value.device), device=value.device))
        self._blocks[-1][place].copy_(value)
        self._count += 1

    def read(self, trainer: Trainer) -> tuple[list[float], list[bool]]:
        """The numbers of this rank, and of which any rank's is not finite; and begin anew. Collective."""
        if not self._count:
            return [], []
        values = torch.cat(self._blocks)[: self._count]
        bad = (~values.isfinite()).to(values.dtype)
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        self._blocks, self._count = [], 0
        return values.tolist(), [number > 0 for number in bad.tolist()]


class Witness:
    """Sees the first output, or gradient of an output, of a network's modules that is not finite. Each look waits.

    The network runs as written, not compiled, for as long as it is watched.

    Args:
        network: in training.
        gradients: whether they are looked at; under a loss scaler one that is not finite is nothing unusual.
    """

    def __init__(self, network: nn.Module, gradients: bool) -> None:
        self.first = ""
        self.rows: Tensor | None = None  # (N,) bool; of the network's last output those that are not finite
        self._gradients = gradients
        self._network, self._compiled = network, network._compiled_call_impl
        network._compiled_call_impl = None
        self._handles = [network.register_forward_pre_hook(self._see_input)]
        for name, module in network.named_modules():
            self._handles.append(module.register_forward_hook(partial(self._see_output, name)))

    def end(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._network._compiled_call_impl = self._compiled

    def _see_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.first and not all_finite(tensors_in(args)):
            self.first = "the input"

    def _see_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if not self.first and not all_finite([tensor]):
                self.first = f"the output of {name or 'the network'}"
            if self._gradients and tensor.requires_grad:
                tensor.register_hook(partial(self._see_gradient, name))
            if not name and tensor.ndim:
                self.rows = (
                    ~tensor.detach().flatten(1).isfinite().all(1) if tensor.ndim > 1 else ~tensor.isfinite()
                )

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if not self.first and not all_finite([gradient]):
            self.first = f"the gradient of the output of {name or 'the network'}"


def suspects(batch: Batch, rows: Tensor | None = None) -> tuple[str, list[int]]:
    """The samples of a batch that are not finite themselves, and what of them; else by `rows`; else all."""
    for what, part in (("the input", batch.input), ("the target", batch.target)):
        if part.is_floating_point():
            bad = ~part.flatten(1).isfinite().all(1) if part.ndim > 1 else ~part.isfinite()
            if bool(bad.any()):
                return what, batch.index[bad].tolist()
    if rows is not None and rows.shape == batch.index.shape and bool(rows.any()):
        return "", batch.index[rows].tolist()
    return "", batch.index.tolist()


def _poisoned(loss: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """The loss; where it is not finite its gradient is not either, and so that of all ranks and of the whole step."""
    return loss * (loss.detach() * 0 + 1)


class Guard(Callback):
    """Watches that loss, gradient and weights stay finite; one object for all trainers of a run.

    Args:
        run: its summary says what happened.
        on_nonfinite: `stop` ends the run as diverged, its last good state kept; `skip` leaves such steps out;
            `rollback` goes back to the last good state and changes one thing.
        rollback_lr: factor on the rate after a rollback; None: the offending samples are left out instead.
        rollback_limit: rollbacks after which a run stops.
    """

    def __init__(
        self,
        run: RunDirectory,
        on_nonfinite: OnNonfinite = "stop",
        rollback_lr: float | None = None,
        rollback_limit: int = 3,
    ) -> None:
        self.run = run
        self.on_nonfinite = on_nonfinite
        self.rollback_lr = rollback_lr
        self.rollback_limit = rollback_limit
        self.changes: list[dict[str, Any]] = []  # one a rollback: {"samples": [...]}, {"rate": factor}, or {}
        self._suspect: Place | None = None
        self._tries = 0
        # where the run failed before, it is watched at once
        last = (run.summary().get(KEY) or [{}])[-1]
        self._of_before = last.get("action") == "stop" and last.get("batch") is not None
        if self._of_before:
            self._suspect = Place(*(last[name] for name in Place._fields))
        self._begin()

    def _begin(self) -> None:
        self._losses, self._gradients = Trace(), Trace()
        self._batches: list[Place] = []  # of the losses
        self._steps: list[Place] = []  # of the gradients
        self._counts = {"skipped": 0, "in_a_row": 0, "tried": 0, "done": 0}
        self._undone: UndoneSteps | None = None
        self._open_window: dict[str, Tensor] = {}
        self._witness: Witness | None = None
        self._gradient_is_finite = True

    # Of a trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._begin()
        module = watched(pl_module)
        self._rate = module.optimizer_options.lr
        self._apply(trainer, pl_module)
        if self.on_nonfinite == "skip":
            module.skips_nonfinite = True
            module.step.loss.append(_poisoned)
            module.step.optimizer.insert(0, self._undo_steps)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What rollbacks have changed, before optimizer and loaders are made."""
        module = watched(pl_module)
        factor = math.prod(change.get("rate", 1.0) for change in self.changes)
        module.optimizer_options = replace(module.optimizer_options, lr=self._rate * factor)
        samples = [sample for change in self.changes for sample in change.get("samples", ())]
        trainer.datamodule.left_out = frozenset(samples)  # type: ignore[attr-defined]

    def _undo_steps(self, pl_module: Any, optimizer: Optimizer) -> None:
        network, step = pl_module.model, pl_module.step
        self._undone = UndoneSteps(
            optimizer,
            lambda: dict(network.named_buffers()),
            lambda: [tensor for kept in step.kept for tensor in kept()],
        )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(KEY)
        path = trainer.ckpt_path
        if not state or (path and Path(path).absolute().parent != self.run.checkpoints.absolute()):
            return
        self._counts.update(state["counts"])
        self._open_window = state["window"]
        if len(state["changes"]) > len(self.changes):
            self.changes = state["changes"]
        self._apply(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module)
        window: dict[str, Tensor] = {}
        if self._undone is not None and pending_batches(trainer):
            window = dict(self._undone.at_the_start.taken)
        if self.changes or window or any(self._counts.values()):
            checkpoint[KEY] = {"changes": self.changes, "counts": dict(self._counts), "window": window}

    # In the step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._undone is not None:
            self._undone.hang_last()
            if pending_batches(trainer):
                self._undone.begin()
                for name, tensor in self._open_window.items():
                    self._undone.at_the_start.taken[name].copy_(tensor)
        if _scaler(trainer) is not None:
            trainer.optimizers[0].register_step_post_hook(self._count_step)
        # masks that hold infinities on purpose, say
        buffers = watched(pl_module).model.named_buffers()
        self._watched_buffers = {name: b for name, b in buffers if all_finite([b])}

    def _count_step(self, *_: Any) -> None:
        self._counts["done"] += 1

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._place = Place(trainer.current_epoch, batch_idx, trainer.global_step, rate)
        if self._undone is not None and not pending_batches(trainer):
            self._undone.begin()
        if self._suspect is not None and self._witness is None and self._is_near(trainer):
            self._witness = Witness(watched(pl_module).model, gradients=_scaler(trainer) is None)

    def _is_near(self, trainer: Trainer) -> bool:
        """Whether this batch is of the suspected step or of the one before, whose gradient may have done it."""
        suspect, here, window = self._suspect, self._place, trainer.accumulate_grad_batches
        if suspect is None or suspect.batch < 0 or here.epoch != suspect.epoch:
            return False
        return suspect.batch // window - 1 <= here.batch // window

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._counts["tried"] += _scaler(trainer) is not None
        if self._undone is None and self._suspect is None:
            return
        largest = largest_gradient(pl_module.parameters())
        if largest is None:
            return
        if self._undone is not None:
            self._undone.decide(largest.isfinite())
            self._gradients.add(largest)
            self._steps.append(self._place)
        elif _scaler(trainer) is None:
            self._gradient_is_finite = bool(largest.isfinite())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None:
            self._losses.add(loss)
            self._batches.append(self._place)
        if self._undone is not None:
            self._undone.end()
        elif self._suspect is not None:
            self._examine(trainer, pl_module, loss, batch)

    # Where values are logged and states are saved

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)
        if self._counts["tried"] and trainer.is_global_zero:
            self.run.update_summary(skipped_by_scaler=self._counts["tried"] - self._counts["done"])
        if self._suspect is not None and self._suspect.epoch <= trainer.current_epoch:
            self._did_not_come(trainer)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what the steps since the last look have left; waits for the device, collective."""
        batches, self._batches = self._batches, []
        if not batches:
            return
        values, bad = self._losses.read(trainer)
        wrong = [place for place, is_bad in zip(batches, bad, strict=True) if is_bad]
        if self.on_nonfinite == "skip":
            self._look_at_skipped(trainer, pl_module, batches, values, wrong)
        elif not wrong and self._weights_are_finite(trainer, pl_module):
            return
        elif self._tries < TRIES:
            self._go_back(wrong[0] if wrong else batches[0]._replace(epoch=batches[-1].epoch, batch=-1))
        else:
            place = wrong[0] if wrong else batches[-1]
            self._found(trainer, self._event(trainer, place, values[batches.index(place)], "", []))

    def _weights_are_finite(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        finite = all_finite([*pl_module.parameters(), *self._watched_buffers.values()])
        return finite if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(finite)

    def _first_weight(self, pl_module: LightningModule) -> str:
        named = {**dict(watched(pl_module).model.named_parameters()), **self._watched_buffers}
        return next((name for name, tensor in named.items() if not all_finite([tensor])), "")

    def _go_back(self, place: Place) -> None:
        self._suspect, self._of_before = place, False
        self._tries += 1
        named = epoch_named(place.epoch)
        log.info("numbers that are not finite near %s, step %d: watched again", named, place.step)
        raise GoBack

    # Skipped steps

    def _look_at_skipped(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batches: list[Place],
        losses: list[float],
        wrong: list[Place],
    ) -> None:
        steps, self._steps = self._steps, []
        gradients, bad = self._gradients.read(trainer)
        counts = self._counts
        listed: list[dict[str, Any]] = []
        for place, gradient, is_bad in zip(steps, gradients, bad, strict=True):
            first = next((p for p in wrong if (p.epoch, p.step) == (place.epoch, place.step)), None)
            # under a loss scaler a gradient alone is nothing unusual
            if first is None and (not is_bad or _scaler(trainer) is not None):
                counts["in_a_row"] = 0
                continue
            counts["skipped"] += 1
            counts["in_a_row"] += 1
            value = losses[batches.index(first)] if first in batches else gradient
            if len(listed) < LISTED_AT_ONCE:
                listed.append(self._skipped(trainer, first or place, value, first is not None))
        if listed and trainer.is_global_zero:
            self._write(*listed, skipped_nonfinite=counts["skipped"])
        if listed and counts["in_a_row"] >= max(IN_A_ROW, watched(pl_module).steps_per_epoch):
            raise Diverged(
                f"diverged: {_line(listed[-1])}; the last {counts['in_a_row']} steps were all skipped: the weights "
                "themselves give no finite numbers"
            )
        if not self._weights_are_finite(trainer, pl_module):
            where = epoch_named(trainer.current_epoch, watched(pl_module).epochs)
            raise Diverged(
                f"diverged: {self._first_weight(pl_module)} is not finite in {where}, though the gradient of every "
                "step was that was taken; a smaller model.lr may help"
            )

    def _skipped(self, trainer: Trainer, place: Place, value: float, is_loss: bool) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = [suspects(batch) for batch in data.training_batch(place.epoch, place.batch)]
        named = [part for part in found if part[0]] or found
        samples = [sample for _, part in named for sample in part]
        event = self._event(trainer, place, value, named[0][0], samples, is_loss)
        return {**event, "action": "skip"}

    # The step again

    def _examine(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None, batch: Batch
    ) -> None:
        """After each batch of a training that is run again; waits for the device, collective."""
        value = 0.0 if loss is None else float(loss)
        stepped = trainer.global_step > self._place.step
        weights = not stepped or all_finite([*pl_module.parameters(), *self._watched_buffers.values()])
        here = not (math.isfinite(value) and self._gradient_is_finite and weights)
        gradient, self._gradient_is_finite = self._gradient_is_finite, True
        several = trainer.world_size > 1
        found = trainer.strategy.reduce_boolean_decision(here, all=False) if several else here
        witness = self._witness
        if found and witness is None and self._tries < TRIES:
            self._go_back(self._place)
        if found:
            first, samples = suspects(batch, witness.rows if witness else None)
            if witness is not None:
                first = witness.first or first
            if not gradient:
                first = first or _first_gradient(pl_module)
            elif not weights:
                first = first or self._first_weight(pl_module)
            own = here, first, samples, value, gradient
            everyone = _of_all_ranks(trainer, own)
            guilty = [part for part in everyone if not math.isfinite(part[3])] or [
                p for p in everyone if p[0]
            ]
            first = next((part[1] for part in guilty if part[1]), "")
            value = next((part[3] for part in guilty if not math.isfinite(part[3])), value)
            gradient = all(part[4] for part in everyone)
            event = self._event(
                trainer, self._place, value, first, [s for part in guilty for s in part[2]],
                is_loss=not math.isfinite(value), is_gradient=not gradient,
            )  # fmt: skip
            self._found(trainer, event)
        elif witness is not None:
            witness.first = ""  # what is no harm, such as a mask
            self._pass_by(trainer)

    def _pass_by(self, trainer: Trainer) -> None:
        suspect, here, window = self._suspect, self._place, trainer.accumulate_grad_batches
        if suspect is not None and here.batch // window > suspect.batch // window:
            self._did_not_come(trainer)

    def _did_not_come(self, trainer: Trainer) -> None:
        """The suspected step was run again, and all of it was finite."""
        place, self._suspect = self._suspect, None
        if self._witness is not None:
            self._witness.end()
            self._witness = None
        if self._of_before or place is None:  # data or code were mended
            return
        event = self._event(trainer, place, math.nan, "", [])
        event["what"] += ", and was finite when the step was run again"
        if self.on_nonfinite == "stop" or len(self.changes) >= self.rollback_limit:
            self._found(trainer, event)
        self.changes.append({})
        self._tries = 0
        if trainer.is_global_zero:
            self._write({**event, "action": "rollback, nothing changed"})

    def _found(self, trainer: Trainer, event: dict[str, Any]) -> None:
        """Stop, or go back and change one thing."""
        indices = event.pop("indices")
        line = _line(event)
        change: dict[str, Any] = (
            {"samples": indices} if self.rollback_lr is None else {"rate": self.rollback_lr}
        )
        help_ = "on_nonfinite=skip leaves such steps out, on_nonfinite=rollback goes back and on without them"
        if self.on_nonfinite == "rollback":
            help_ = f"this after {len(self.changes)} rollbacks (rollback_limit={self.rollback_limit})"
            there = {s for c in [*self.changes, change] for s in c.get("samples", ())}
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if self.rollback_lr is None and not indices:
                help_ = "which samples did it is not known; rollback_lr=0.5 changes the rate instead"
            elif len(there) >= len(data.samples("train")):
                help_ = "no other samples are left"
            elif len(self.changes) < self.rollback_limit:
                self.changes.append(change)
                self._suspect, self._tries = None, 0
                done = (
                    "the samples left out" if self.rollback_lr is None else f"rate times {self.rollback_lr:g}"
                )
                if trainer.is_global_zero:
                    log.warning("%s; back to the last good state, %s", line, done)
                    self._write({**event, "action": f"rollback, {done}"})
                raise GoBack
        if trainer.is_global_zero:
            self._write({**event, "action": "stop"})
        raise Diverged(f"diverged: {line}; {help_} (see docs/robustness.md)")

    def _event(
        self,
        trainer: Trainer,
        place: Place,
        value: float,
        module: str,
        samples: list[int],
        is_loss: bool = True,
        is_gradient: bool = False,
    ) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        what = f"train/loss is {value}" if is_loss else "the gradient is not finite"
        if not is_loss and not is_gradient and self.on_nonfinite != "skip":
            what = "weights or running statistics are not finite after a finite gradient"
        return {
            **place._asdict(), "what": what, "module": module or None,
            "samples": [data.sample_name(index, "train") for index in samples], "indices": samples,
        }  # fmt: skip

    def _write(self, *events: dict[str, Any], **more: Any) -> None:
        known = self.run.summary().get(KEY) or []
        plain = [{k: v for k, v in e.items() if k != "indices"} for e in events]
        new = [e for e in plain if e not in known]  # a run that was killed and resumed finds them again
        self.run.update_summary(**{KEY: [*known, *new][:LISTED]}, **more)


def _line(event: dict[str, Any]) -> str:
    """An entry of the summary in words."""
    where = f"{epoch_named(event['epoch'])}, step {event['step']}"
    parts = [f"{event['what']} in {where}, rate {event['rate']:.3g}"]
    if event["module"]:
        parts.append(f"first not finite is {event['module']}")
    if names := event["samples"]:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"sample{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}")
    return "; ".join(parts)


def _first_gradient(module: nn.Module) -> str:
    """Of those that are not finite the first that a backward pass comes to."""
    found = [n for n, p in module.named_parameters() if p.grad is not None and not all_finite([p.grad])]
    return f"the gradient of {found[-1].removeprefix('model.')}" if found else ""


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _of_all_ranks(trainer: Trainer, own: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [own]
    found: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(found, own)
    return found
