"""What depends on the device: memory format, compilation, float32 products, determinism, generators."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, runs_in
from lightning.pytorch import Callback
from simulated_cuda import simulated_cuda
from technique_runs import built, composed
from torch import Tensor, nn

from crucible.options import ConfigError
from lab import speed, summary
from lab.build import build_data, build_model, build_trainer
from lab.config import resolve
from lab.experiment import identity, kind
from lab.summary import check_input, check_reproducible
from models.base_model import BaseModel

SHORT = ("trainer.max_steps=4", "trainer.limit_train_batches=2", "data.module.batch_size=8")


def resolved(*options: str) -> dict[str, Any]:
    config = composed(options=options)
    data = build_data(config)
    data.check()
    resolve(config, data)
    return config


# The memory format


def layouts(model: BaseModel, optimizer: torch.optim.Optimizer) -> dict[str, list[bool]]:
    """Whether convolutions' weights, their averages, momenta and slow copies are channels_last."""

    def is_last(tensor: Tensor) -> bool:
        return tensor.is_contiguous(memory_format=torch.channels_last)

    weights = {
        n: p for n, p in model.model.named_parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1
    }
    (averaged,) = model.step.weights
    shown = averaged.state_dict()
    return {
        "weights": [is_last(p) for p in weights.values()],
        "average": [is_last(shown[name]) for name in weights],
        "momentum": [is_last(optimizer.state[p]["momentum_buffer"]) for p in weights.values()],
    }


def test_averages_and_momenta_of_a_resumed_training_are_laid_out_as_the_weights(tmp_path: Path) -> None:
    def trained(steps: int, start: Path | None = None) -> Any:
        config = composed("ema", options=(*SHORT, "model.channels_last=true"))
        config["trainer"]["max_steps"] = steps
        model, data, trainer = built(config, tmp_path)
        trainer.fit(model, datamodule=data, ckpt_path=start, weights_only=True)
        return model, trainer

    model, trainer = trained(2)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    fresh = layouts(model, trainer.optimizers[0])
    model, trainer = trained(4, tmp_path / "state.ckpt")
    again = layouts(model, trainer.optimizers[0])
    assert len(fresh["weights"]) > 3
    for seen in (fresh, again):
        assert all(all(last) for last in seen.values()), seen


class Layout(Callback):
    """Of the first convolution's weights, where DDP wraps them, in training and in the test."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def look(self, trainer: Any, model: BaseModel, *_: Any) -> None:
        weight = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
        self.seen.append(weight.is_contiguous(memory_format=torch.channels_last))

    on_train_batch_start = on_test_batch_start = look


def fit_on_two(folder: str) -> None:
    """What each of two processes does."""
    config = composed(options=(*SHORT, "model.channels_last=true", "trainer.devices=2"))
    model, data, trainer = built(config, Path(folder))
    layout = Layout()
    trainer.callbacks.append(layout)  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, datamodule=data)
        trainer.test(model, datamodule=data, verbose=False)
    assert layout.seen and all(layout.seen)
    assert not [str(w.message) for w in said if "strides" in str(w.message)]


@pytest.mark.slow
def test_ddp_gets_weights_in_the_format_that_their_gradients_have(on_two_processes, tmp_path: Path) -> None:
    on_two_processes(fit_on_two, tmp_path)


@pytest.mark.parametrize(("options", "last"), [((), True), (("model.channels_last=false",), False)])
def test_on_a_gpu_channels_come_last_unless_told_otherwise(
    options: tuple[str, ...], last: bool, tmp_path: Path
) -> None:
    with simulated_cuda():
        model, data, trainer = built(composed(options=(*SHORT, *options)), tmp_path)
        layout = Layout()
        trainer.callbacks.append(layout)  # type: ignore[attr-defined]
        trainer.fit(model, datamodule=data)
    assert set(layout.seen) == {last}


# Compilation


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How networks are compiled; they are not."""
    calls: list[dict[str, Any]] = []

    def note(network: nn.Module, **options: Any) -> None:
        calls.append(options)
        network._compiled_call_impl = network._call_impl

    monkeypatch.setattr(nn.Module, "compile", note)
    return calls


@pytest.mark.parametrize(
    ("asked", "recorded", "handed"),
    [
        ("true", True, {}),
        ("default", True, {}),
        ("reduce-overhead", "reduce-overhead", {"mode": "reduce-overhead"}),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", {"mode": "max-autotune-no-cudagraphs"}),
    ],
)
def test_the_mode_of_compilation_is_recorded_and_handed_to_torch(
    asked: str, recorded: Any, handed: dict[str, str], compiled: list[dict[str, Any]]
) -> None:
    with simulated_cuda():
        config = resolved(f"model.compile={asked}")
        assert config["model"]["compile"] == recorded
        build_model(config)
    assert compiled == [handed]


@pytest.mark.slow
def test_a_student_and_its_teacher_are_compiled_in_one_mode(
    compiled: list[dict[str, Any]], teacher: Path, tmp_path: Path
) -> None:
    options = (*SHORT, "model.compile=max-autotune-no-cudagraphs")
    model, data, trainer = built(composed("distillation", teacher=teacher, options=options), tmp_path)
    trainer.fit(model, datamodule=data)
    assert compiled == [{"mode": "max-autotune-no-cudagraphs"}] * 2


def test_modes_are_runs_of_their_own_but_for_two_names_of_one() -> None:
    with simulated_cuda():
        runs = {how: resolved(f"model.compile={how}") for how in ("false", "true", "default", "max-autotune")}
    names = {how: (identity(config, {}), kind(config)) for how, config in runs.items()}
    assert names["true"] == names["default"]
    assert len(set(names.values())) == 3


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_with_cuda_graphs_is_refused_without_cuda(mode: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.compile={mode}: its CUDA graphs need a GPU .*this run uses the cpu"
    ):
        resolved(f"model.compile={mode}")


@pytest.mark.parametrize(
    ("mode", "kept"), [(None, True), ("max-autotune-no-cudagraphs", True), ("reduce-overhead", False)]
)
def test_what_a_cuda_graph_returns_is_not_handed_on(mode: Any, kept: bool) -> None:
    class Returning(nn.Module):
        """A network that returns one tensor again and again, as a graph does."""

        def forward(self, x: Tensor) -> Tensor:
            return made

    made = torch.zeros(2, 3)
    model = BaseModel(num_classes=3, compile=mode)
    model.model = Returning()
    assert (model.outputs(torch.zeros(2, 4)) is made) is kept


# Products in float32


def test_the_precision_of_float32_products_is_the_runs(tmp_path: Path) -> None:
    try:
        for asked in ("medium", "highest", "high"):
            build_trainer(resolved(f"matmul_precision={asked}"), tmp_path, [], [])
            assert torch.get_float32_matmul_precision() == asked
        earlier = resolved()
        del earlier["matmul_precision"]  # a run that was recorded before there was the option
        build_trainer(earlier, tmp_path, [], [])
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_lower_precision_is_another_run_of_another_cost() -> None:
    plain, high = resolved(), resolved("matmul_precision=high")
    earlier = {k: v for k, v in plain.items() if k != "matmul_precision"}
    assert identity(earlier, {}) == identity(plain, {}) != identity(high, {})
    assert kind(earlier) == kind(plain) != kind(high)


# Determinism

REFUSED = {
    "blur_pool": (["model.blur_pool=true"], "ReflectionPad", "BlurPool"),
    "deformable": (
        ["model=deformable_resnet", "data=synthetic", "data.input_size=64"], "deform_conv2d", "DeformableConv2d"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_reproducible_is_refused_on_a_gpu_for_what_has_no_deterministic_backward(
    name: str, cli, tmp_path: Path
) -> None:
    options, _, layer = REFUSED[name]
    with simulated_cuda():
        outcome = cli(*TINY[:5], *options, "reproducible=true", "logger.wandb=null")
    assert outcome.status == 2
    assert "error: reproducible=true: " in outcome.err and f"({layer})" in outcome.err
    assert "no deterministic backward pass on CUDA; trainer.accelerator=cpu has one" in outcome.err
    assert len(outcome.err.splitlines()) == 1 and not runs_in(tmp_path)


LAYERS: dict[str, tuple[nn.Module, int]] = {
    "max_pool3d": (nn.MaxPool3d(2), 3),
    "avg_pool3d": (nn.AvgPool3d(2), 3),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(2), 2),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d(2), 3),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d(2), 2),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d(2), 3),
    "reflection_pad1d": (nn.ReflectionPad1d(1), 1),
    "reflection_pad2d": (nn.ReflectionPad2d(1), 2),
    "reflection_pad3d": (nn.ReflectionPad3d(1), 3),
    "upsample_linear1d": (nn.Upsample(scale_factor=2, mode="linear"), 1),
    "upsample_bilinear2d": (nn.Upsample(scale_factor=2, mode="bilinear"), 2),
    "upsample_bicubic2d": (nn.Upsample(scale_factor=2, mode="bicubic"), 2),
    "upsample_trilinear3d": (nn.Upsample(scale_factor=2, mode="trilinear"), 3),
}
FINE: dict[str, tuple[nn.Module, int]] = {
    "max_pool2d": (nn.MaxPool2d(2), 2),
    "avg_pool2d": (nn.AvgPool2d(2), 2),
    "global average": (nn.AdaptiveAvgPool2d(1), 2),
    "nearest": (nn.Upsample(scale_factor=2), 2),
    "replication": (nn.ReplicationPad2d(1), 2),
}


def layered(layer: nn.Module, dims: int) -> tuple[BaseModel, dict[str, Any]]:
    model = BaseModel(num_classes=3, input_dim=dims, input_channels=2)
    model.model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    data = {"input_channels": 2, "input_size": 8, "input_dim": dims}
    model.model(torch.zeros(2, 2, *[8] * dims))
    config = {"reproducible": True, "data": data, "trainer": {"accelerator": "auto"}}
    check_input(model, config)
    return model, config


@pytest.mark.parametrize("name", [*LAYERS, *FINE])
def test_each_layer_is_judged_as_torch_documents_it(name: str) -> None:
    model, config = layered(*{**LAYERS, **FINE}[name])
    check_reproducible(model, config)  # on a CPU all are deterministic
    mended = name == "max_pool3d" and not summary._has_no_deterministic_backward("max_pool3d_with_indices")
    with simulated_cuda():
        if name in FINE or mended:
            check_reproducible(model, config)
        else:
            with pytest.raises(
                ConfigError, match=r"reproducible=true: 0 \(\w+\) calls \w+, which has no deterministic"
            ):
                check_reproducible(model, config)
        check_reproducible(model, {**config, "reproducible": False})


def test_the_names_that_are_looked_up_are_in_torchs_documentation() -> None:
    words = torch.use_deterministic_algorithms.__doc__ or ""
    assert "will throw" in words and "will act" in words
    assert not [name for name in summary._NONDETERMINISTIC.values() if name and name not in words]


# Generators


class Dropping(BaseModel):
    """Half of the input."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=3, **kwargs)
        self.model = nn.Sequential(nn.Dropout(0.5))


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps:0"])
def test_dropout_follows_the_keys_on_every_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever generator the layers draw from there is set to the key of the step."""
    seeds: list[int] = []
    generator = torch.Generator()
    monkeypatch.setattr(torch.mps, "manual_seed", lambda key: (seeds.append(key), generator.manual_seed(key)))
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    model = Dropping(seed=3)
    model._device = torch.device(device)
    drawn = []
    for batch in (0, 1, 0):
        model.reseed("network", 0, batch)
        source = torch.default_generator if device == "cpu" else generator
        drawn.append(torch.rand(5, generator=source))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert len(seeds) == (3 if device.startswith("mps") else 0)


@pytest.mark.parametrize("accelerator", ["xpu", "tpu", "hpu"])
def test_a_device_whose_generators_follow_no_key_is_refused(accelerator: str, cli) -> None:
    outcome = cli(f"trainer.accelerator={accelerator}")
    assert outcome.status == 2
    assert f"trainer.accelerator must be one of auto, cpu, gpu, cuda, mps, got '{accelerator}'" in outcome.err


# bf16 instructions


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The sizes that are measured on a processor with bf16 instructions, where it is 2.5 times as fast."""
    sizes: list[int] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(speed, "bf16_factor", lambda size: sizes.append(size) or 2.5)  # type: ignore[func-returns-value]
    return sizes


def test_the_banner_says_what_would_be_faster_measured_once_a_machine(measured: list[int], cli) -> None:
    options = (*TINY, "trainer.max_steps=1", "test_after_training=false", "data.input_size=32")
    for seed in (0, 1):
        outcome = cli(*options, f"seed={seed}")
        assert outcome.status == 0
        assert (
            "faster trainer.precision=bf16-mixed model.channels_last=true: a step of 3x3 convolutions on 32x32 is 2.5 "
            "times as fast on this processor" in " ".join(outcome.out.split())
        )
    assert measured == [32]


@pytest.mark.parametrize(
    "options",
    [("trainer.precision=32-true",), ("trainer.precision=bf16-mixed",), ("model.channels_last=false",)],
)
def test_what_was_chosen_is_left_alone(options: tuple[str, ...], measured: list[int]) -> None:
    config = composed(options=options)
    data = build_data(config)
    data.check()
    assert not speed.faster_here(config, resolve(config, data)) and not measured


def test_nothing_is_said_without_the_instructions_or_where_they_do_not_pay(
    measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, settled = resolved(), ["precision 32-true"]
    assert speed.faster_here(config, settled)
    monkeypatch.setattr(speed, "WORTH_A_WORD", 3.0)
    assert not speed.faster_here(config, settled)
    monkeypatch.setattr(speed, "WORTH_A_WORD", 1.2)
    monkeypatch.setattr(speed, "has_bf16_instructions", lambda: False)
    assert not speed.faster_here(config, settled)


def test_the_measurement_is_of_both_ways_and_leaves_the_random_numbers_alone() -> None:
    state = torch.default_generator.get_state()
    assert 0.05 < speed.bf16_factor(8) < 50
    assert torch.equal(torch.default_generator.get_state(), state)
