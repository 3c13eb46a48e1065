"""Knowledge distillation: the published loss, a teacher that is asked once a batch and leaves no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import TINY, runs_in
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from crucible.batch import Batch
from crucible.options import ConfigError
from datasets.synthetic import SyntheticDataModule
from lab.teachers import find_teacher, load_teacher
from losses.distillation import Distil, Distillation, distillation_loss
from models.base_model import BaseModel

SMALL = [*TINY, "data.input_size=8", "data.num_classes=4", "data.module.noise=0.5"]
NETWORK = """
from torch import nn
from models.base_model import BaseModel


class Small(BaseModel):
    def __init__(self, width: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.model = nn.Sequential(
            nn.Conv2d(self.input_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * width, self.num_outputs),
        )
"""


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (z.double().div(temperature).exp() for z in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum() / len(p)


# The loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_value_and_gradient_are_those_of_the_definition(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    got, expected = (f(student, teacher, temperature) for f in (distillation_loss, by_definition))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(got, student)
    p, q = (z.div(temperature).softmax(1) for z in (teacher, student))
    torch.testing.assert_close(gradient, temperature * (q - p) / len(p), rtol=1e-10, atol=1e-12)


def test_at_high_temperature_it_matches_logits_as_the_paper_derives() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, 1e5), student)
    centred = [z - z.mean(1, keepdim=True) for z in (student, teacher)]
    torch.testing.assert_close(gradient, (centred[0] - centred[1]) / student.numel(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = logits(0, dtype), logits(1, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = distillation_loss(student, teacher, 4.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_definition(student, teacher, 4.0), rtol=1e-5, atol=1e-7)


def test_confident_teachers_stay_finite() -> None:
    student, teacher = torch.tensor([[0.0, 300.0]]).requires_grad_(), torch.tensor([[300.0, 0.0]])
    loss = distillation_loss(student, teacher, 1.0)
    loss.backward()
    assert loss == 300 and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_weight_is_the_teachers_share(weight: float) -> None:
    network = nn.Linear(3, 5).double()
    distillation = Distillation(Distil("x", weight, 2.0))
    distillation.network = network
    x, student = torch.randn(6, 3, dtype=torch.float64), logits(0)
    batch = Batch(x, torch.arange(6), torch.arange(6))
    distillation.observe(batch)
    loss = F.cross_entropy(student, torch.arange(6) % 5)
    expected = (1 - weight) * loss + weight * by_definition(student, network(x), 2.0)
    torch.testing.assert_close(distillation.loss(loss, student, batch), expected, rtol=1e-12, atol=1e-14)


# In training


class Tiny(BaseModel):
    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = nn.Sequential(
            nn.Conv2d(self.input_channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(dropout), nn.Linear(32, self.num_outputs),
        )  # fmt: skip


def make(**options: Any) -> Tiny:
    torch.manual_seed(0)
    values = {"num_classes": 4, "input_channels": 1, "lr": 0.1, "scheduler": None, "warmstart": 0, **options}
    teacher = values.pop("teacher", None)
    model = Tiny(**values, teacher=None if teacher is None else "some")
    if isinstance(teacher, nn.Module):
        model.learn_from(teacher)
    return model


class Watch(Callback):
    """The batches, the losses, and what the teacher was asked."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.asked: list[Tensor] = []
        self.network: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if (taught := pl_module.step.networks.get("teacher")) is not None:
            self.network = taught.network
            self.network.register_forward_hook(lambda _, inputs, __: self.asked.append(inputs[0]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def fit(model: BaseModel, *callbacks: Callback, **options: Any) -> Trainer:
    values = {"name": "synthetic", "num_samples": 80, "batch_size": 8, "num_classes": 4, "size": 8}
    data = SyntheticDataModule(**values, input_channels=1)  # type: ignore[arg-type]
    data.check()
    trainer = Trainer(
        max_epochs=options.pop("max_epochs", 1), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        **options,
    )  # fmt: skip
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=data)
    return trainer


@pytest.fixture
def teacher() -> Tiny:
    """A network that was trained before."""
    torch.manual_seed(7)
    network = Tiny(num_classes=4, input_channels=1, dropout=0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(
    "techniques",
    [{}, {"mixup": True, "mixup_alpha": 1.0}, {"powergrad_alpha": 0.3, "label_smoothing": 0.1}],
    ids=str,
)
def test_a_step_is_that_of_the_definition(teacher: Tiny, techniques: dict[str, Any]) -> None:
    model = make(teacher=teacher, distillation_weight=0.7, temperature=3.0, momentum=0.0, **techniques)
    reference, watch = copy.deepcopy(model), Watch()
    fit(model, watch, limit_train_batches=2, limit_val_batches=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, weight_decay=5e-4)
    teacher.eval()
    for batch, seen in zip(watch.batches, watch.losses, strict=True):
        optimizer.zero_grad()
        out = reference(batch.input)
        p, q = (teacher(batch.input).detach() / 3).softmax(1), (out / 3).softmax(1)
        divergence = (p * (p / q).log()).sum(1).mean()
        loss = 0.3 * reference.criterion(out, batch.target) + 0.7 * 9 * divergence
        assert seen == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_where_features_are_mixed_the_teachers_probabilities_are_mixed_as_the_targets(teacher: Tiny) -> None:
    model = make(teacher=teacher, distillation_weight=1.0, temperature=3.0, manifold_mixup=True)
    expected: list[float] = []

    class Mixed(Watch):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            (mixing,) = module.step.inside
            probabilities = mixing.mix((self.network(batch.input) / 3).softmax(1))
            assert not torch.equal(probabilities, (self.network(batch.input) / 3).softmax(1))
            expected.append(
                9 * float(F.kl_div((logits[-1] / 3).log_softmax(1), probabilities, reduction="batchmean"))
            )

    logits: list[Tensor] = []
    model.model.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    watch = Mixed()
    fit(model, watch, limit_val_batches=0)
    assert watch.losses == pytest.approx(expected, rel=1e-4) and len(expected) > 1


@pytest.mark.parametrize("options", [{}, {"sam": True}, {"mixup": True}], ids=str)
def test_the_teacher_sees_each_batch_once_as_the_student_does(teacher: Tiny, options: dict[str, Any]) -> None:
    watch = Watch()
    trainer = fit(make(teacher=teacher, **options), watch)
    assert len(watch.asked) == len(watch.batches) == trainer.global_step > 1
    assert all(torch.equal(x, batch.input) for x, batch in zip(watch.asked, watch.batches, strict=True))


def test_the_teacher_stays_as_it_is_and_out_of_the_students_tree(teacher: Tiny) -> None:
    before, model = copy.deepcopy(teacher.state_dict()), make(teacher=teacher)
    seen: dict[str, Any] = {}

    class Checkpoint(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.update(
                trainer._checkpoint_connector.dump_checkpoint(),
                teacher=pl_module.step.networks["teacher"].network,
            )
            seen["parameters"] = {id(p) for p in pl_module.parameters()}

    fit(model, Checkpoint())
    assert seen["teacher"] is teacher and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), before.values(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert seen["state_dict"].keys() == make().state_dict().keys()
    assert not seen["parameters"] & {id(p) for p in teacher.parameters()}
    assert model.step.networks["teacher"].network is None, "its memory is free after training"


def test_weight_zero_is_bitwise_the_training_without_a_teacher(teacher: Tiny) -> None:
    one, other = make(teacher=teacher, distillation_weight=0.0, dropout=0.3), make(dropout=0.3)
    fit(one)
    fit(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weight_one_at_temperature_one_drives_the_student_to_the_teachers_probabilities(
    teacher: Tiny,
) -> None:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def distance(model: BaseModel) -> float:
        with torch.no_grad():
            return float(distillation_loss(model.eval()(x), teacher.eval()(x), 1.0))

    taught, alone = make(teacher=teacher, distillation_weight=1.0, temperature=1.0), make()
    start = distance(make())
    fit(taught, max_epochs=8)
    fit(alone, max_epochs=8)
    assert distance(taught) < 0.5 * min(start, distance(alone))


def test_evaluation_is_plain(teacher: Tiny) -> None:
    model = make(teacher=teacher)
    trainer = fit(model)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    with torch.no_grad():
        (batch,) = data.val_dataloader()
        batch = data.batch_transform(batch, "eval", 0)
        expected = float(F.cross_entropy(model.eval()(batch.input), batch.target))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def test_student_and_teacher_compile_whole(teacher: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def whole(network: nn.Module, *_: Any, **__: Any) -> None:
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", whole)
    model, plain = make(teacher=teacher), make(teacher=teacher)
    model.model.compile()
    fit(plain, limit_train_batches=2, limit_val_batches=0)
    assert compiled == [model.model]
    fit(model, limit_train_batches=2, limit_val_batches=0)
    assert compiled == [model.model, teacher.model]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_computes_in_the_trainers_precision(teacher: Tiny) -> None:
    watch, dtypes = Watch(), []
    teacher.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    fit(make(teacher=teacher), watch, precision="bf16-mixed", limit_train_batches=2, limit_val_batches=0)
    assert dtypes == [torch.bfloat16] * 2 and all(loss == loss for loss in watch.losses)


# Where teachers come from, and what cannot teach


@pytest.mark.parametrize("name", ["distillation_weight", "temperature"])
def test_its_options_need_a_teacher(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"model.{name}=0.9 needs model.teacher: .*: a run, a run's checkpoint"
    ):
        make(**{name: 0.9})


@pytest.mark.parametrize(("name", "value"), [("temperature", 0), ("distillation_weight", 1.5)])
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model.{name} must be .* got {value}"):
        make(teacher="some", **{name: value})


def test_regression_has_nothing_to_distil() -> None:
    with pytest.raises(ConfigError, match=r"model.teacher=some has no meaning with data.task=regression"):
        make(teacher="some", task="regression")


def test_a_network_of_timm_with_weights_from_a_file(tmp_path: Path) -> None:
    theirs = timm.create_model("test_resnet", num_classes=4, in_chans=1).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    teacher = find_teacher(f"timm:test_resnet@{tmp_path}/weights.pth")
    torch.manual_seed(0)
    ours, draw = load_teacher(teacher, num_classes=4, input_channels=1, input_dim=2), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(draw, torch.rand(1)), "building it draws nothing from the training's generator"
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(
        ConfigError, match=r"model.teacher=timm:test_resnet@.* \(head of another size.* 4 in the file"
    ):
        load_teacher(teacher, num_classes=5, input_channels=1, input_dim=2)
    with pytest.raises(ConfigError, match="it has 2 input dimensions, the data have 3"):
        load_teacher(teacher, num_classes=4, input_channels=1, input_dim=3)
    state = {k: v for k, v in theirs.state_dict().items() if "running" not in k}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"not the network's for these data \(missing in the file"):
        load_teacher(teacher, num_classes=4, input_channels=1, input_dim=2)
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(
        ConfigError, match=r"^model.teacher=timm:test_resnet@\S*weights.pth: it is no file of torch"
    ):
        load_teacher(teacher, num_classes=4, input_channels=1, input_dim=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet81", "model.teacher=timm:resnet81: timm has no such model; did you mean .*resnet"),
        ("timm:resnet18@gone.pth", "model.teacher=timm:resnet18@.*gone.pth: no such file"),
        ("nowhere/at/all", "model.teacher=.*/nowhere/at/all: no run there"),
        ("alone.ckpt", "model.teacher=.*/alone.ckpt: not in a run's folder"),
    ],
)
def test_what_is_not_there_is_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.ckpt").touch()
    with pytest.raises(ConfigError, match=message) as error:
        find_teacher(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classes", "channels", "message"),
    [(10, 3, "it has 1000 classes, the data have 10"), (1000, 1, "it has 3 input channels, the data have 1")],
)
def test_timms_own_weights_are_for_their_own_data(classes: int, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.teacher=timm:resnet18: {message}"):
        load_teacher(find_teacher("timm:resnet18"), num_classes=classes, input_channels=channels, input_dim=2)


# From the command line


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    folder = tmp_path / "mine"
    (folder / "cli_configs" / "model").mkdir(parents=True)
    (folder / "small.py").write_text(NETWORK)
    (folder / "cli_configs" / "model" / "small.yaml").write_text("_target_: small.Small\nwidth: 8\n")
    return [f"user_dir={folder}", *SMALL, "model=small"]


def config_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.slow
def test_from_teacher_to_student_and_on_without_the_teacher(
    cli: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    outcome = cli(*small, "model.width=16", "model.ema_decay=0.5", "trainer.max_epochs=2")
    assert outcome.status == 0, outcome.err
    (teacher,) = runs_in(tmp_path / "experiments")
    file = teacher / "checkpoints" / "best.ckpt"
    content = file.read_bytes()
    technique = [*small, "technique=distillation"]

    outcome = cli(*technique)
    assert outcome.status == 2 and "needs model.teacher" in outcome.err and "\n" not in outcome.err.strip()
    for other, reason in (
        ("data.num_classes=5", "it has 4 classes, the data have 5"),
        ("+data.module.train_transforms.mean=[0.5]", "normalised with mean None, here .* is [0.5]"),
    ):
        outcome = cli(*technique, f"model.teacher={teacher}", other)
        assert outcome.status == 2 and reason.split(" .* ")[0] in outcome.err, outcome.err
    assert runs_in(tmp_path / "experiments") == [teacher]

    outcome = cli(
        *technique, f"model.teacher={teacher.relative_to(tmp_path)}", "model.sam=true", "model.mixup=true"
    )
    assert outcome.status == 0, outcome.err
    (student,) = set(runs_in(tmp_path / "experiments")) - {teacher}
    assert config_of(student)["model"]["teacher"] == str(file), "the weights themselves, absolute"
    assert file.read_bytes() == content
    state = torch.load(student / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {"model.0.weight", "model.0.bias", "model.4.weight", "model.4.bias"}

    copied = tmp_path / "elsewhere"
    teacher.rename(copied)
    outcome = cli(
        *technique, f"model.teacher={copied}/checkpoints/best.ckpt", "model.sam=true", "model.mixup=true"
    )
    assert "finished before" in outcome.out, "the same teacher at another place is the same run"
    (mine,) = (option for option in small if option.startswith("user_dir="))
    assert cli(f"run={student}", "task=test", mine).status == 0
    assert cli(f"run={student}", "task=predict", mine).status == 0
    recorded = json.loads((student / "test.json").read_text())["metrics"]["test/loss"]
    assert recorded == recorded

    outcome = cli(*technique, f"model.teacher={student}", "model.sam=true", "model.mixup=true")
    assert outcome.status == 0 and len(runs_in(tmp_path / "experiments")) == 2, (
        "another teacher is another run"
    )


@pytest.mark.slow
def test_a_resumed_student_ends_as_one_that_was_not_stopped(
    cli: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    theirs = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    command = [*small, "trainer.max_epochs=2", "model.teacher=timm:test_resnet@weights.pth", "model.sam=true"]
    stop = tmp_path / "mine" / "stop.py"
    stop.write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_step == 8 and not Path('stopped').exists():\n"
        "            Path('stopped').touch()\n"
        "            raise RuntimeError('stopped')\n"
    )
    command += ["+callbacks.stop._target_=stop.Stop", "checkpoint.every_steps=2"]
    assert cli(*command, "exp_dir=first").status == 1
    assert cli(*command, "exp_dir=first").status == 0
    assert cli(*command, "exp_dir=second").status == 0
    one, other = (
        torch.load(runs_in(tmp_path / name)[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("first", "second")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_one_step_of_two_processes_equals_one_step_of_one_also_in_its_rate(
    cli: Callable[..., Any], ranks: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict(), tmp_path / "w.pth")
    command = [*small, f"model.teacher=timm:test_resnet@{tmp_path}/w.pth", "model.distillation_weight=0.9"]
    command += ["model.lr_scale_batch=32", "trainer.limit_train_batches=1", "test_after_training=false"]
    one = cli(*command, "data.module.batch_size=16", f"exp_dir={tmp_path}/one")
    two, _ = ranks(*command, "data.module.batch_size=8", "trainer.devices=2", f"exp_dir={tmp_path}/two")
    assert one.status == 0 and two.status == 0, one.err + two.err
    single, double = (
        torch.load(runs_in(tmp_path / name)[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, atol=1e-6, rtol=0)
