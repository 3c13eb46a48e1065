"""Numbers that are not finite: found without a wait in the step, named, and stopped, skipped or gone back for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, nightly, runs_in, summary_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from record import tensors
from technique_runs import composed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import report
from callbacks.nonfinite import Guard
from crucible.machine import is_out_of_memory
from crucible.run import RunDirectory
from datasets.synthetic import SyntheticDataModule
from lab.build import build_data, build_model, build_trainer
from lab.config import resolve
from lab.jobs import out_of_memory
from models.base_model import BaseModel
from optimizers.undo import Copies, largest_gradient

BAD = 41  # the sample with a pixel that is no number
POISONED = [*TINY, "data.module._target_=test_nonfinite.Poisoned"]


class Poisoned(SyntheticDataModule):
    """One pixel of one training sample is no number."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset.inputs[BAD, 0, 0, 0] = math.nan


def state_of(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What is done about it, as a user sees it


def test_a_run_stops_names_what_did_it_keeps_its_last_good_state_and_says_it_again(
    cli, tmp_path: Path
) -> None:
    late = [*TINY, "trainer.max_epochs=4", "user_dir=mine", "+callbacks.late._target_=late_nan.Late"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "late_nan.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Late(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        if trainer.global_step == 8:\n"
        "            batch.input[2, 0, 0, 0] = float('nan')\n"
    )
    before = 0.0
    for _ in range(2):
        outcome = cli(*late)
        assert outcome.status == 1 and "Traceback" not in outcome.err
        (run,) = runs_in(tmp_path)
        (event,) = summary_of(run)["nonfinite"]
        assert (event["epoch"], event["step"], event["batch"], event["action"]) == (1, 8, 3, "stop")
        assert len(event["samples"]) == 1 and event["module"] == "the input"
        line = outcome.err.strip().splitlines()[-1]
        assert re.search(
            rf"diverged: train/loss is nan in epoch 2, step 8, rate 0\.0\d+; first not finite is the input; "
            rf"sample {event['samples'][0]}; .*on_nonfinite=skip",
            line,
        ), line
        assert summary_of(run)["status"] == "failed" and summary_of(run)["reason"] in line
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 5 and all(t.isfinite().all() for t in state["state_dict"].values())
        before = before or (run / "checkpoints" / "last.ckpt").stat().st_mtime
        assert (run / "checkpoints" / "last.ckpt").stat().st_mtime == before


@pytest.mark.slow
def test_the_first_module_is_named_where_the_input_is_sound(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "model=resnet", "model._target_=test_nonfinite.BreaksInside")
    assert outcome.status == 1
    assert "first not finite is the output of layer2.0.conv1" in outcome.err, outcome.err
    outcome = cli(*TINY, "model=resnet", "model._target_=test_nonfinite.BreaksBackwards")
    assert outcome.status == 1
    assert re.search(r"first not finite is the gradient of the output of \S+", outcome.err), outcome.err


def test_skip_leaves_the_steps_out_and_counts_them(cli, tmp_path: Path, capfd) -> None:
    outcome = cli(*POISONED, "on_nonfinite=skip", "trainer.max_epochs=3")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    assert 1 <= summary["skipped_nonfinite"] <= 3
    assert len(summary["nonfinite"]) == summary["skipped_nonfinite"]
    for event in summary["nonfinite"]:
        assert (event["samples"], event["module"], event["action"]) == ([str(BAD)], "the input", "skip")
    assert math.isfinite(summary["final"]["train/loss"]) and summary["final"]["val/acc"] > 0
    report.main([f"runs={tmp_path / 'experiments'}"])
    page = "".join(p.read_text() for p in tmp_path.rglob("report.md")) + capfd.readouterr().out
    assert f"{summary['skipped_nonfinite']} steps were not finite and left out" in page


def test_rollback_leaves_the_samples_out_for_the_rest_of_the_run(cli, tmp_path: Path) -> None:
    outcome = cli(*POISONED, "on_nonfinite=rollback", "trainer.max_epochs=3")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    (event,) = summary_of(run)["nonfinite"]
    assert event["samples"] == [str(BAD)] and event["action"] == "rollback, the samples left out"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["nonfinite"]["changes"] == [{"samples": [BAD]}]
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_rollback_with_a_rate_changes_the_rate_and_stops_at_its_limit(cli, tmp_path: Path) -> None:
    hot = [*TINY, "model.lr=1e30", "on_nonfinite=rollback", "rollback_lr=1e-16", "trainer.max_epochs=2"]
    assert cli(*hot).status == 0
    (run,) = runs_in(tmp_path)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    changes, rates = state["nonfinite"]["changes"], state["optimizer_states"][0]["param_groups"]
    assert 1 <= len(changes) <= 3 and set(map(str, changes)) == {"{'rate': 1e-16}"}
    assert rates[0]["initial_lr"] == pytest.approx(1e30 * 1e-16 ** len(changes), rel=1e-6)
    outcome = cli(*TINY, "model.lr=1e30", "on_nonfinite=rollback", "rollback_lr=0.5", "rollback_limit=1")
    assert outcome.status == 1 and "after 1 rollbacks (rollback_limit=1)" in outcome.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["on_nonfinite=halt"], "on_nonfinite"),
        (["on_nonfinite=rollback", "rollback_lr=2"], "rollback_lr"),
        (["rollback_lr=0.5"], "rollback_lr=0.5 needs on_nonfinite=rollback"),
        (["on_nonfinite=skip", "rollback_limit=2"], "rollback_limit=2 needs on_nonfinite=rollback"),
    ],
)
def test_what_makes_no_sense_is_refused(cli, tmp_path: Path, typed: list[str], said: str) -> None:
    outcome = cli(*TINY, *typed)
    assert outcome.status == 2 and said in outcome.err and not runs_in(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(8,), *nightly((3,), (3, 8))])
def test_a_run_that_went_back_and_was_killed_goes_on_with_the_same_bits(
    cli, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Stopped just after it went back, before anything is saved of that; and in a later epoch."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bomb_at.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Bomb(Callback):\n"
        "    def on_train_batch_start(self, trainer, *rest):\n"
        "        if Path(f'bomb{trainer.global_step}').exists() and trainer.datamodule.left_out:\n"
        "            Path(f'bomb{trainer.global_step}').unlink()\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    command = [*POISONED, "on_nonfinite=rollback", "trainer.max_epochs=3", "user_dir=mine"]
    command += ["+callbacks.bomb._target_=bomb_at.Bomb"]
    assert cli(*command, "exp_dir=whole").status == 0
    for step in stops:
        (tmp_path / f"bomb{step}").touch()
        assert cli(*command, "exp_dir=stopped").status == 1
    assert cli(*command, "exp_dir=stopped").status == 0
    (whole,), (stopped,) = runs_in(tmp_path / "whole"), runs_in(tmp_path / "stopped")
    assert equal(state_of(whole), state_of(stopped))
    assert summary_of(whole)["nonfinite"] == summary_of(stopped)["nonfinite"]


@pytest.mark.slow
def test_it_goes_back_to_a_state_that_is_whole(cli, tmp_path: Path) -> None:
    """A run that has gone on from previous.ckpt, its last.ckpt being damaged."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bad_at.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Bad(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        if trainer.global_step == 8 and Path('bad').exists():\n"
        "            batch.input[2, 0, 0, 0] = float('nan')\n"
        "        if trainer.global_step == 13:\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    command = [*TINY, "trainer.max_epochs=3", "user_dir=mine", "+callbacks.bad._target_=bad_at.Bad"]
    assert "the roof is on fire" in cli(*command).err
    (run,) = runs_in(tmp_path)
    os.truncate(run / "checkpoints" / "last.ckpt", 1000)
    (tmp_path / "bad").touch()
    outcome = cli(*command)
    assert outcome.status == 1 and outcome.err.startswith(
        "error: diverged: train/loss is nan in epoch 2, step 8"
    )


# A skipped step is no step


class Poison(Callback):
    """At one optimizer step the input holds no numbers."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            batch.input[0] = math.nan


class ByHand(Callback):
    """Takes one optimizer step, and puts everything back that it has changed."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def _everything(self, trainer: Any, pl_module: Any) -> list[torch.Tensor]:
        optimizer = trainer.optimizers[0]
        found = [p.data for p in pl_module.model.parameters()] + list(pl_module.model.buffers())
        found += [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
        found += optimizer.state_dict().get("lookahead", {}).get("slow", [])
        for weights in pl_module.step.weights:
            if weights.kind == "EMA" and weights.average is not None:
                found += weights.average.sums().values() or weights.average.tensors()
        return found

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and self.saved is None:
            self.saved = [(t, t.clone()) for t in self._everything(trainer, pl_module)]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step + 1 and self.saved:
            with torch.no_grad():
                for tensor, old in self.saved:
                    tensor.copy_(old)
            self.saved = []


OPTIONS = (
    "trainer.max_steps=7",
    "trainer.limit_train_batches=4",
    "model.lr=0.003",
    "data.module.batch_size=8",
)


def trained(
    folder: Path,
    techniques: tuple[str, ...],
    options: tuple[str, ...],
    callback: Callback,
    guarded: bool,
    plugin: Any = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = composed(*techniques, options=(*OPTIONS, *options))
    config["model"]["_target_"] = "tiny_networks.NarrowResNet"
    data = build_data(config)
    data.check()
    resolve(config, data)
    run = RunDirectory(folder)
    run.record(config, [])
    callbacks = [callback, *([Guard(run, "skip")] if guarded else [])]
    of_the_trainer = {**config["trainer"], "enable_checkpointing": False}
    trainer = build_trainer({**config, "trainer": of_the_trainer}, folder, callbacks, [])
    if plugin is not None:
        trainer.strategy._precision_plugin = plugin
    model = build_model(config)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 7
    trainer.save_checkpoint(folder / "end.ckpt")
    state = torch.load(folder / "end.ckpt", weights_only=True)
    names = ("state_dict", "averaged_state_dict", "optimizer_states", "lr_schedulers")
    return tensors({name: state.get(name, {}) for name in names}), run.summary()


SKIPPED: list[Any] = [
    pytest.param((), (), 3, id="sgd"),
    pytest.param((), ("model.optimizer=AdamW",), 0, id="first-step-of-adamw"),
    *(
        pytest.param(techniques, options, 3, id="+".join((*techniques, *options)), marks=pytest.mark.slow)
        for techniques, options in [
            (("sam",), ()),
            (("ema",), ("model.optimizer=AdamW",)),
            (("swa",), ()),
            (("ema", "lookahead"), ("model.lookahead_k=2",)),
            (("online_norm",), ()),
            (("gradient_centralization", "mixup"), ("trainer.gradient_clip_val=1.0",)),
            ((), ("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=8")),
            ((), ("trainer.precision=bf16-mixed", "model.optimizer=Adam")),
            ((), ("trainer.precision=bf16-true",)),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("techniques", "options", "step"), SKIPPED)
def test_a_skipped_step_equals_one_that_was_left_out_by_hand(
    tmp_path: Path, techniques: tuple[str, ...], options: tuple[str, ...], step: int
) -> None:
    ours, summary = trained(tmp_path / "ours", techniques, options, Poison(step), guarded=True)
    assert summary["skipped_nonfinite"] == 1 and summary["nonfinite"][0]["step"] == step
    if step == 0:  # which makes the moments: all that is left of it is time
        assert all(t.isfinite().all() for t in ours.values() if t.is_floating_point())
        return
    theirs, _ = trained(tmp_path / "theirs", techniques, options, ByHand(step), guarded=False)
    different = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
    assert ours.keys() == theirs.keys() and not different, different[:5]


@pytest.mark.slow
def test_under_a_loss_scaler_its_own_skipping_is_counted_apart(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    state, summary = trained(tmp_path / "overflow", (), (), Poison(-1), guarded=True, plugin=plugin)
    assert summary["skipped_by_scaler"] == 7 and "skipped_nonfinite" not in summary
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
    state, summary = trained(tmp_path / "nan", (), (), Poison(3), guarded=True, plugin=plugin)
    assert summary["skipped_by_scaler"] == 1 and summary["skipped_nonfinite"] == 1
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


def test_under_a_loss_scaler_the_guard_changes_no_step_that_stands(tmp_path: Path) -> None:
    """There an average's and Lookahead's tensors begin between the gradient and the step."""

    def state(guarded: bool) -> dict[str, torch.Tensor]:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
        return trained(tmp_path / str(guarded), ("ema", "lookahead"), (), Poison(-1), guarded, plugin)[0]

    ours, theirs = state(True), state(False)
    different = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
    assert ours.keys() == theirs.keys() and not different, different[:5]


@pytest.mark.slow
def test_an_open_window_of_accumulation_is_resumed_with_what_a_skip_puts_back(cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "window.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        if batch_idx == 4 and Path('stop').exists():\n"
        "            Path('stop').unlink()\n"
        "            raise RuntimeError('the roof is on fire')\n"
        "        if batch_idx == 5:\n"
        "            batch.input[0] = float('nan')\n"
        "    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):\n"
        "        if batch_idx == 3:\n"
        "            trainer.save_checkpoint(f'{trainer.default_root_dir}/checkpoints/last.ckpt')\n"
    )
    command = [*TINY, "trainer.max_epochs=1", "data.module.batch_size=8", "trainer.accumulate_grad_batches=3"]
    command += ["on_nonfinite=skip", "user_dir=mine", "+callbacks.window._target_=window.Stop"]
    assert cli(*command, "exp_dir=whole").status == 0
    (tmp_path / "stop").touch()
    assert cli(*command, "exp_dir=stopped").status == 1
    assert cli(*command, "exp_dir=stopped").status == 0
    (whole,), (stopped,) = runs_in(tmp_path / "whole"), runs_in(tmp_path / "stopped")
    assert summary_of(whole)["skipped_nonfinite"] == summary_of(stopped)["skipped_nonfinite"] == 1
    assert equal(state_of(whole), state_of(stopped))


# What it costs


class HostReads(TorchDispatchMode):
    """Counts the reads of a value on the host."""

    READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_no_value_is_read_in_a_step(tmp_path: Path, mode: Any) -> None:
    config = composed(options=("trainer.max_steps=6",))
    config["model"]["_target_"] = "tiny_networks.NarrowResNet"
    data = build_data(config)
    data.check()
    resolve(config, data)
    run = RunDirectory(tmp_path)
    run.record(config, [])
    reads, after = HostReads(), []

    class Counts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(reads.count)

    trainer = build_trainer(config, tmp_path, [Guard(run, mode), Counts()], [])
    with reads:
        trainer.fit(build_model(config), datamodule=data)
    assert len(after) == 6
    # the first step of a skipping run asks once whether the moments that it makes are sound
    assert len(set(after[1:-1])) == 1, after


def test_bits_are_put_back_or_stay() -> None:
    nan = math.nan
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        tensors_ = {"a": torch.arange(6).to(dtype).view(2, 3), "b": torch.zeros((), dtype=dtype)}
        copies = Copies()
        copies.take(tensors_)
        changed = {k: t.clone() for k, t in tensors_.items()}
        for tensor in changed.values():
            tensor.view(-1)[0] = 7 if dtype == torch.int64 else nan
        kept = {k: t.clone() for k, t in changed.items()}
        copies.put_back(changed, torch.tensor(True))
        assert all(torch.equal(changed[k].nan_to_num(5), kept[k].nan_to_num(5)) for k in kept)
        copies.put_back(changed, torch.tensor(False))
        assert all(torch.equal(changed[k], tensors_[k]) for k in tensors_)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_shows_and_a_large_one_does_not(bad: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))]
    for p in parameters:
        p.grad = torch.full_like(p, 3e38)
    assert bool(largest_gradient(parameters).isfinite())  # type: ignore[union-attr]
    parameters[1].grad[1, 0] = bad  # type: ignore[index]
    assert not bool(largest_gradient(parameters).isfinite())  # type: ignore[union-attr]
    assert largest_gradient([nn.Parameter(torch.zeros(1))]) is None


# Memory


def test_no_memory_left_is_one_line_with_a_way_on(cli, tmp_path: Path, monkeypatch) -> None:
    def full(self: Any, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. " + "GPU 0 " * 80)

    monkeypatch.setattr(BaseModel, "training_step", full)
    outcome = cli(*TINY)
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert outcome.status == 1 and line.startswith("error: out of memory: data.module.batch_size=16")
    assert (
        "data.module.batch_size=8 trainer.accumulate_grad_batches=2 makes the same global batch of 16" in line
    )
    (run,) = runs_in(tmp_path)
    assert summary_of(run)["reason"].startswith("out of memory")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model.sam=true",), "data.module.batch_size=8 is smaller, and another training"),
        (("data.module.batch_size=1",), "one sample is too much"),
        (
            ("data.module.batch_size=33", "trainer.devices=2"),
            "batch_size=11 trainer.accumulate_grad_batches=3",
        ),
    ],
)
def test_the_way_on_fits_the_run(options: tuple[str, ...], said: str) -> None:
    assert said in out_of_memory(composed(options=options))
    errors = (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert all(is_out_of_memory(error) for error in errors) and not is_out_of_memory(RuntimeError("no"))


# Networks that break


def _broken(kind: Callable[..., nn.Module]) -> Any:
    from tiny_networks import NarrowResNet

    class Breaks(NarrowResNet):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            kind(self)

    return Breaks


def _forwards(model: Any) -> None:
    model.model.layer2[0].conv1.register_forward_hook(lambda m, a, out: out * 1e38 * 1e38)


def _backwards(model: Any) -> None:
    def divide(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient / 0)

    model.model.layer2[0].conv1.register_forward_hook(divide)


BreaksInside, BreaksBackwards = _broken(_forwards), _broken(_backwards)


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("stop", marks=pytest.mark.nightly), "skip", "rollback"])
def test_two_processes_agree(ranks, tmp_path: Path, mode: str) -> None:
    """The sample is one rank's; the other sees it in the gradient only."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poisoned.py").write_text(
        "from datasets.synthetic import SyntheticDataModule\n"
        "class Poisoned(SyntheticDataModule):\n"
        "    def setup(self, stage: str) -> None:\n"
        "        super().setup(stage)\n"
        f"        self.train_dataset.inputs[{BAD}, 0, 0, 0] = float('nan')\n"
    )
    command = [*TINY, "data.module._target_=poisoned.Poisoned", "user_dir=mine", "data.module.batch_size=8"]
    command += ["trainer.devices=2", "trainer.max_epochs=2", f"on_nonfinite={mode}"]
    both = ranks(*command)
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    assert [event["samples"] for event in summary["nonfinite"]] == [[str(BAD)]] * len(summary["nonfinite"])
    assert {event["module"] for event in summary["nonfinite"]} == {"the input"}
    if mode == "stop":
        assert [rank.status for rank in both] == [1, 0] and "train/loss is nan" in both[0].err
        return
    assert [rank.status for rank in both] == [0, 0], both[0].err + both[1].err
    assert all(t.isfinite().all() for t in state_of(run).values())
    if mode == "rollback":
        assert len(summary["nonfinite"]) == 1
    else:
        assert summary["skipped_nonfinite"] == len(summary["nonfinite"]) >= 1


@pytest.mark.slow
def test_an_average_whose_norms_are_taken_anew_leaves_the_sample_out_too(cli, tmp_path: Path) -> None:
    outcome = cli(
        *POISONED, "on_nonfinite=skip", "trainer.max_epochs=2", "technique=swa", "model.swa_start=0.5"
    )
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["averaged_state_dict"]
    assert all(t.isfinite().all() for t in state.values())


@pytest.mark.slow
def test_the_network_may_be_compiled(tmp_path: Path, monkeypatch) -> None:
    def whole(network: nn.Module, *args: Any, **kwargs: Any) -> None:
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", whole)
    torch._dynamo.reset()
    ours, _ = trained(tmp_path / "ours", ("ema",), ("model.compile=true",), Poison(3), guarded=True)
    theirs, _ = trained(tmp_path / "theirs", ("ema",), ("model.compile=true",), ByHand(3), guarded=False)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
