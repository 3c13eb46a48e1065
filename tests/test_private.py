"""The private names of other packages that are leaned on are still there, and mean what is taken for granted."""

from __future__ import annotations

import inspect
import platform
import re
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_app, _run_hydra
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.amp import GradScaler

from crucible import composition, private


@pytest.mark.parametrize("name", private.FOREACH)
def test_torch_has_the_kernel_for_many_tensors(name: str) -> None:
    assert callable(getattr(torch, name))


def test_views_share_a_storage_identity_and_copies_do_not() -> None:
    for device in ("cpu", "meta"):
        tensor = torch.zeros(4, device=device)
        assert private.storage_identity(tensor) == private.storage_identity(tensor[1:])
        assert private.storage_identity(tensor) != private.storage_identity(torch.zeros(4, device=device))


def test_the_base_classes_of_norms_and_convolutions() -> None:
    assert isinstance(nn.BatchNorm1d(1), private.AnyBatchNorm)
    assert isinstance(nn.SyncBatchNorm(1), private.AnyBatchNorm)
    assert not isinstance(nn.GroupNorm(1, 1), private.AnyBatchNorm)
    for convolution in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d):
        assert isinstance(convolution(1, 1, 1), private.AnyConvolution)


def test_the_processor_says_whether_it_has_instructions_for_bf16() -> None:
    cpu = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpu.is_file():
        pytest.skip("its flags are read on Linux")
    flags = set(re.search(r"^flags\s*: (.*)$", cpu.read_text(encoding="utf-8"), re.M)[1].split())  # type: ignore[index]
    assert private.has_bf16_instructions() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_the_gradient_scaler_asks_the_optimizer_for_the_flag() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    private.unscale_outside_the_step(optimizer)
    assert optimizer._step_supports_amp_scaling is False
    assert "_step_supports_amp_scaling" in inspect.getsource(GradScaler.step)


def test_a_module_calls_its_compiled_call_where_it_has_one() -> None:
    module = nn.Identity()
    assert module._compiled_call_impl is None
    module._compiled_call_impl = lambda x: x + 1
    assert module(torch.zeros(1)) == 1


def test_lightnings_loop_votes_on_sigterm_by_the_method_that_is_replaced() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=False, accelerator="cpu")
    private.end_sigterm_votes(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_lightnings_closure_keeps_its_result() -> None:
    closure = Closure(lambda: ClosureResult(torch.ones(())))
    closure()
    result = closure._result
    assert result is not None
    assert closure.consume_result() is result


def test_lightning_sets_the_name_of_the_hook_that_logs() -> None:
    assert LightningModule()._current_fx_name is None


def test_lightnings_logger_keeps_what_it_hands_to_wandb(tmp_path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, anonymous=True)
    assert "anonymous" in logger._wandb_init
    kept = private.wandb_arguments(logger)
    assert "anonymous" not in kept and kept["dir"] == str(tmp_path)


def test_a_trial_is_opened_by_its_number_in_the_storage() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study()
    number = private.trial_in_storage(study.ask())
    assert optuna.trial.Trial(study, number).number == 0


def test_hydra_asks_for_the_mode_before_it_composes_and_takes_none_for_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composed = []
    monkeypatch.setattr(composition, "_composed_mode", lambda *arguments: composed.append(arguments))
    monkeypatch.setattr(Hydra, "get_mode", Hydra.get_mode)
    composition.compose_once()
    assert "hydra.get_mode(config_name=config_name, overrides=overrides)" in inspect.getsource(_run_hydra)
    assert "if mode is None" in inspect.getsource(_run_app)
    hydra = Hydra.__new__(Hydra)
    assert hydra.get_mode(config_name="train", overrides=["model.lr=1"]) is None and not composed
    hydra.get_mode(config_name="train", overrides=["hydra.mode=MULTIRUN"])
    assert composed == [(hydra, "train", ["hydra.mode=MULTIRUN"])]
