"""On a simulated GPU: a step never waits, nothing is left on the host, and launches stay within their budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, nightly, runs_in
from cuda_runs import budget, seen, walk, watched_tasks
from lightning.pytorch import Callback
from simulated_cuda import CudaTensor, simulated_cuda
from technique_runs import FOLDERS, TECHNIQUES
from torch import Tensor, nn

from crucible.metrics import METRICS
from crucible.run import RunDirectory
from models.base_model import BaseModel

KINDS = ("", "sam", "mixup_cutmix", "ema")  # plain; a second pass; on the batch; on the weights


@pytest.mark.parametrize(
    "technique", [name if name in KINDS else nightly(name)[0] for name in ("", *TECHNIQUES)]
)
def test_a_step_in_bf16_does_not_wait_and_launches_what_is_recorded(technique: str, request) -> None:
    teacher = request.getfixturevalue("teacher") if technique == "distillation" else None
    found = walk(*filter(None, [technique]), teacher=teacher)
    assert found.precision == "bf16-mixed"
    assert not found.faults(budget().get(technique))


def test_the_launches_of_every_technique_are_recorded() -> None:
    """Of those that are walked nightly too, but of none from a user's folder."""
    assert set(budget()) == {"", *TECHNIQUES} - {*FOLDERS}, "write them anew as tests/cuda_runs.py says"


@pytest.mark.slow  # a processor is slow in fp16
@pytest.mark.parametrize(
    "technique", ["gradient_clipping", *nightly(*sorted(set(TECHNIQUES) - {"gradient_clipping"}))]
)
def test_a_step_in_fp16_waits_once_for_the_scaler(technique: str, request) -> None:
    teacher = request.getfixturevalue("teacher") if technique == "distillation" else None
    found = walk(technique, teacher=teacher, bf16=False)
    assert found.precision == "16-mixed" and len(found.step) == 2  # in two steps
    assert not found.faults()


@pytest.mark.parametrize(
    "technique", ["random_erasing", *nightly(*sorted(set(TECHNIQUES) - {"random_erasing"}))]
)
def test_a_step_in_fp32_does_not_wait(technique: str, request) -> None:
    teacher = request.getfixturevalue("teacher") if technique == "distillation" else None
    assert not walk(technique, teacher=teacher, options=("trainer.precision=32-true",)).faults()


# The path of the data

IMAGES = ("data=synthetic", "data.input_channels=3", "data.input_size=32", "data.module.num_samples=96")
POLICIES = [
    f"{place}.{name}Transform"
    for place in ("cifar", "imagenet")
    for name in ("Baseline", "BaselineCutout", "AutoAugment", "RandAugment", "TrivialAugment", "AugMix")
]


@pytest.mark.parametrize(
    "policy", [p if p == "cifar.RandAugmentTransform" else nightly(p)[0] for p in POLICIES]
)
def test_policies_act_on_the_device(policy: str) -> None:
    options = tuple(
        f"+data.module.{role}.{option}"
        for role in ("train_transforms", "test_transforms")
        for option in ("mean=[0.5,0.5,0.5]", "std=[0.25,0.25,0.25]", "size=32")
    )
    targets = (
        f"data.module.train_transforms._target_=augmentation.policies.{policy}",
        f"data.module.test_transforms._target_=augmentation.policies.{policy.partition('.')[0]}.TestTransform",
    )
    assert not walk(options=(*IMAGES, *targets, *options)).faults()


@pytest.mark.parametrize("cache", ["device", *nightly("memory", "none")])
def test_pictures_may_lie_on_the_device_or_on_the_host(cache: str) -> None:
    assert not walk(options=(f"data.module.cache={cache}",)).faults()


@pytest.mark.parametrize("task", ["classification", *nightly("regression")])
def test_all_metrics_are_counted_on_the_device(task: str) -> None:
    names = ",".join(row.name for row in METRICS if row.task == task and row.build)
    options = ("data=synthetic", f"data.task={task}", f"metrics=[{names}]")
    assert not walk(options=options).faults()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["skip", *nightly("stop", "rollback")])
def test_whole_runs_are_walked_and_steps_watched_for_what_is_not_finite(
    way: str, cli, tmp_path: Path
) -> None:
    """Composed, trained, checkpointed, tested and recorded by the command that a user types."""
    with simulated_cuda() as device, watched_tasks(device):
        outcome = cli(
            *TINY, "trainer.max_epochs=2", "trainer.limit_train_batches=3", f"on_nonfinite={way}",
            "technique=[ema,mixup]", "callbacks.plots._target_=callbacks.plots.ResultPlots",
        )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    summary = RunDirectory(run).summary()
    assert summary["status"] == "finished" and summary["device"] == "Simulated GPU"
    assert not seen(device, summary["precision"]).faults()


# What the tests above would catch


def in_the_loss(act: Callable[[Tensor], Any]) -> Callable[[BaseModel], None]:
    """A plant: `act` sees the logits of each training step."""

    def term(loss: Tensor, logits: Tensor, batch: Any) -> Tensor:
        act(logits)
        return loss

    return lambda model: model.step.loss.append(term)


WAITING = {
    "_local_scalar_dense": lambda logits: logits.mean().item(),
    "copy to the host": lambda logits: logits.detach().cpu(),
    "index by a mask": lambda logits: logits[logits > 0],
    "nonzero": lambda logits: (logits > 0).nonzero(),
    "copy from memory that is not pinned": lambda logits: torch.tensor([1.0], device=logits.device),
}


def test_what_waits_in_a_step_is_found_with_its_line() -> None:
    def all_of_them(logits: Tensor) -> None:
        for act in WAITING.values():
            act(logits)

    faults = walk(plant=in_the_loss(all_of_them)).faults()
    assert len(faults) == 2 * len(WAITING)  # in two steps
    for fault, operator in zip(faults, 2 * list(WAITING), strict=True):
        assert fault.startswith(f"a step waits: {operator} at tests/test_cuda.py:")


@pytest.mark.slow
def test_a_second_wait_beside_the_scalers_is_found() -> None:
    faults = walk(bf16=False, plant=in_the_loss(lambda logits: float(logits.sum()))).faults()
    assert len(faults) == 2 and "tests/test_cuda.py" in faults[0]


def test_a_tensor_left_on_the_host_is_found() -> None:
    with pytest.raises(
        RuntimeError, match=r"Expected all tensors to be on the same device: mul has \(16, 1\)"
    ):
        walk(plant=in_the_loss(lambda logits: logits * torch.ones(len(logits), 1)))


def test_too_many_launches_are_found() -> None:
    def one_by_one(logits: Tensor) -> None:
        for row in logits:
            row.relu()

    (fault,) = walk(plant=in_the_loss(one_by_one)).faults(budget()[""])
    assert fault == f"a step launches {budget()[''] + 16} kernels, {budget()['']} are recorded"


class Curious(Callback):
    """Looks at each batch of validation, more than once."""

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        for row in outputs["logits"][:2]:
            float(row.sum())


def test_waits_in_each_batch_of_validation_are_found() -> None:
    faults = walk(callback=Curious()).faults()
    assert len(faults) == 8  # two in each of two batches in each of two epochs
    assert faults[0].startswith("validation batch 0 waits: _local_scalar_dense at tests/test_cuda.py:")


# The device itself


def test_it_says_that_it_is_a_gpu_and_computes_as_the_processor_does() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    images, target = torch.randn(6, 3, 8, 8), torch.arange(6) % 4

    def trained(network: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), target).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        return [p.detach().cpu() for p in network.parameters()]

    expected = trained(copy.deepcopy(network), images, target)
    with simulated_cuda():
        parameters = list(network.parameters())
        network.cuda()
        assert [p is q for p, q in zip(parameters, network.parameters(), strict=True)] == [True] * len(
            parameters
        )
        assert isinstance(network[0].weight, CudaTensor) and str(network[0].weight.device) == "cuda:0"
        found = trained(network, images.cuda(), target.cuda())
    torch.testing.assert_close(found, expected)
    assert not torch.cuda.is_available(), "the machine is as before"


def test_what_is_made_beside_a_tensor_of_the_device_is_there_too() -> None:
    with simulated_cuda():
        x = torch.arange(4.0, device="cuda")
        made = (
            x.new_zeros(2), x.new_tensor([1.0]), torch.zeros_like(x), nn.functional.one_hot(x.long(), 5),
            torch.tensor([2], device=x.device), torch.ones(3).to(x), torch.as_tensor(x), torch.ones(2, device="cuda"),
        )  # fmt: skip
        assert {str(tensor.device) for tensor in made} == {"cuda:0"}
        x[1] = 7.0
        x[x > 2] = 0.0
        assert x.tolist() == [0.0, 0.0, 2.0, 0.0]
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            x.normal_(generator=torch.Generator())


def test_autocast_acts_by_cudas_lists() -> None:
    with simulated_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.randn(4, 4, device="cuda")
        assert (x @ x).dtype == nn.functional.linear(x, x).dtype == torch.bfloat16
        half = x.bfloat16()
        assert (
            nn.functional.layer_norm(half, (4,)).dtype
            == half.exp().dtype
            == half.softmax(0).dtype
            == torch.float32
        )
        assert half.relu().dtype == torch.bfloat16
