"""`task=mechanism`: against the dense Hessian, sums over single samples, and what a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Outcome, runs_in
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from datasets.synthetic import SyntheticDataModule
from lab import mechanism
from norms.online import OnlineNorm
from reporting.records import Correctness


class Network(nn.Module):
    """As `BaseModel` evaluates: outputs for a task."""

    def __init__(self, layers: nn.Module, task: str = "classification") -> None:
        super().__init__()
        self.layers, self.task = layers, task

    def outputs(self, input: Tensor) -> Tensor:
        out = self.layers(input)
        return out if self.task == "classification" else out.flatten()

    forward = outputs


def classifier(norm: nn.Module) -> Network:
    """With streamed statistics that are not those of a fresh norm, and dropout."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 3, 3), norm, nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 3)
    )
    network = Network(layers)
    network(2 + 3 * torch.randn(16, 1, 4, 4))
    return network.double().eval()


def samples(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 1, 4, 4, generator=generator).double(),
        torch.randint(3, (count,), generator=generator),
    )


def parted(size: int, count: int = 24) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(size) for part in samples(count)), strict=True))


def dense(network: Network, input: Tensor, target: Tensor) -> Tensor:
    """All eigenvalues, ascending, of the Hessian of the mean loss."""
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])

    def loss(point: Tensor) -> Tensor:
        parts = point.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        out = functional_call(network, weights, (input,))
        return F.cross_entropy(out, target) if network.task == "classification" else F.mse_loss(out, target)

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3), OnlineNorm(3), nn.GroupNorm(1, 3)], ids=lambda n: type(n).__name__
)
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(norm: nn.Module) -> None:
    network = classifier(norm)
    weights = list(network.parameters())
    expected = float(dense(network, *samples())[-1])
    exact = mechanism.sharpness(network, weights, parted(24), tolerance=1e-7, most=400)
    assert exact.converged and exact.value == pytest.approx(expected, rel=1e-4)
    as_recorded = mechanism.sharpness(network, weights, parted(24))
    assert as_recorded.value == pytest.approx(expected, rel=0.02) and as_recorded.iterations < 60


def test_a_larger_negative_eigenvalue_does_not_hide_the_largest() -> None:
    """-|x|^2 (2 r) along w, and 0.5 along b: f = b / 2 - (w x)^2 / 2 at w = 0, b = 0, with the residual r = 3."""

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(4).double()), nn.Parameter(torch.zeros(()).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.b / 2 - (x @ self.w).square() / 2

    network = Network(Valley(), "regression")
    part = torch.ones(1, 4).double(), torch.full((1,), -3.0).double()
    assert dense(network, *part)[[0, -1]].tolist() == pytest.approx([-24.0, 0.5])
    found = mechanism.sharpness(network, list(network.parameters()), [part], tolerance=1e-9, most=200)
    assert found.value == pytest.approx(0.5, abs=0.005)


def test_gradients_are_means_over_single_samples_and_losses_plain() -> None:
    """In evaluation mode, whatever mode the network came in."""
    network = classifier(nn.BatchNorm2d(3)).train()
    values, remarks = mechanism.measure(network, parted(7), parted(5, 11))
    assert not remarks and not network.training
    weights = list(network.parameters())
    gradients = {}
    for split, count in (("train", 24), ("val", 11)):
        input, target = samples(count)
        each = [F.cross_entropy(network(input[i : i + 1]), target[i : i + 1]) for i in range(count)]
        singly = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in each]
        gradients[split] = torch.stack(singly).mean(dim=0)
        assert values[f"loss_{split}"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-12)
        assert values[f"gradient_{split}"] == pytest.approx(float(gradients[split].norm()), rel=1e-10)
    assert values["gradient_gap"] == pytest.approx(
        float((gradients["val"] - gradients["train"]).norm()), rel=1e-10
    )
    cosine = F.cosine_similarity(gradients["val"], gradients["train"], dim=0)
    assert values["gradient_cosine"] == pytest.approx(float(cosine), rel=1e-10)
    logits = network(samples(11)[0])
    assert values["logit_norm"] == pytest.approx(float(logits.norm(dim=1).mean()), rel=1e-12)
    assert values["max_probability_sd"] == pytest.approx(
        float(logits.softmax(1).amax(1).std(correction=0)), rel=1e-12
    )


def test_values_do_not_depend_on_the_size_of_the_batches() -> None:
    network = classifier(nn.BatchNorm2d(3)).float()
    whole, singly = (mechanism.measure(network, parted(size), parted(size, 11))[0] for size in (24, 1))
    assert whole == pytest.approx(singly, rel=1e-4, abs=1e-6)


def test_regression_is_measured_by_the_squared_error() -> None:
    network = Network(nn.Linear(2, 1), "regression").double()
    input, target = torch.randn(6, 2).double(), torch.randn(6).double()
    values, _ = mechanism.measure(network, [(input, target)], [(input, target)])
    extended = torch.cat([input, torch.ones(6, 1).double()], dim=1)
    expected = torch.linalg.eigvalsh(2 * extended.T @ extended / 6)[-1]
    assert values["sharpness"] == pytest.approx(float(expected), rel=1e-2)
    assert values["loss_val"] == pytest.approx(float((network(input) - target).square().mean()))
    assert "logit_norm" not in values and values["gradient_gap"] == 0


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class OnceDifferentiable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)  # type: ignore[no-any-return]


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(x, x.new_zeros(len(x), 2, 2, 2), self.weight)


@pytest.mark.parametrize(("layer", "name"), [(OnceDifferentiable(), "_Once"), (Deformed(), "deform_conv2d")])
def test_an_operation_without_a_second_derivative_is_named(layer: nn.Module, name: str) -> None:
    values, remarks = mechanism.measure(classifier(layer), parted(24), parted(24))
    assert "sharpness" not in values and values["gradient_train"] > 0
    assert remarks == [f"no sharpness: {name} has no second derivative"]


def test_the_samples_are_chosen_by_their_numbers_alone() -> None:
    """Whatever the run's seed; a smaller choice is a part of a larger one."""

    def chosen(split: str, count: int, **options: Any) -> tuple[list[int], str]:
        data = SyntheticDataModule(name="made", num_classes=4, num_samples=200, batch_size=16, **options)
        places, digest = mechanism.subset(data, split, count)
        indices = data.evaluated(split).indices
        return [int(indices[p]) for p in places], digest

    first = chosen("train", 40, seed=0)
    assert first == chosen("train", 40, seed=5, random_batches=True) and first[0] == sorted(set(first[0]))
    assert set(first[0]) < set(chosen("train", 60)[0]) and first[0] != list(range(40))
    assert not set(first[0]) & set(chosen("val", 40)[0])


@pytest.mark.slow
def test_a_command_measures_each_finished_run_once_and_the_report_shows_it(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])
    monkeypatch.setattr("lab.mechanism.MOST", 10)  # iterations
    assert cli("-m", *TINY, "technique=baseline,ema", "seed=0").status == 0
    runs = runs_in(tmp_path)
    pattern = f"run={runs[0].parent}/*"
    refused = cli(pattern, "task=mechanism")
    assert refused.status == 2 and "each=true does it of each" in refused.err
    first = cli(pattern, "task=mechanism", "each=true")
    assert first.status == 0 and "(recorded)" not in first.out, first.err
    records = [json.loads((run / "mechanism.json").read_text()) for run in runs]
    assert records[0]["subsets"] == records[1]["subsets"] and records[0]["data"] == records[1]["data"]
    assert all(record["checkpoint"] == "last.ckpt" for record in records), "what the report scores"
    (runs[1] / "mechanism.json").write_text("{")
    summary = json.loads((runs[0] / "summary.json").read_text())
    again = cli(pattern, "task=mechanism", "each=true")
    assert again.out.count("(recorded)") == 1, "what was damaged is made anew"
    assert json.loads((runs[1] / "mechanism.json").read_text())["values"] == records[1]["values"]
    assert cli(f"runs={tmp_path}/experiments", script="report.py").status == 0
    page = (tmp_path / "experiments" / "report" / "report.md").read_text()
    assert "### Mechanism" in page and f"{records[0]['values']['sharpness']:.4g}" in page
    assert "Not measured" not in page
    other = cli(f"run={runs[0]}", "task=mechanism", "data.module.num_samples=64")
    assert other.status == 2 and "its own data" in other.err
    (runs[0] / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    passed = cli(f"run={runs[0]}", "task=mechanism")
    assert passed.status == 0 and "passed over" in passed.out


def test_flips_are_images_that_one_of_two_runs_has_right() -> None:
    """Of ten images: the arm's two runs differ in 3; from the baseline's of their seeds in 1 and 4."""
    from types import SimpleNamespace

    def run(*wrong: int) -> Any:
        right = np.ones(10, dtype=np.bool_)
        right[list(wrong)] = False
        bits = np.packbits(right).tobytes()
        return SimpleNamespace(
            correctness=Correctness(bits, 10, "those", np.zeros((3, 15))), path=Path("/nowhere")
        )

    from reporting.arms import Arm
    from reporting.mechanism import _flips

    base = Arm("baseline", {(0, 0): run(0), (1, 0): run(1)})
    arm = Arm("mixup", {(0, 0): run(), (1, 0): run(3, 4, 5)})
    found = _flips(arm, base)
    assert found["flips"].mean == pytest.approx(30) and found["flips"].n == 1
    assert found["flips_to_baseline"][:2] == pytest.approx((25.0, np.std([10, 40], ddof=1)))
    assert "flips_to_baseline" not in _flips(base, base)
