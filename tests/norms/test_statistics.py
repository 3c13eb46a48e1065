"""Norm statistics of weights that were not trained with them: taken anew, by every norm that has any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from norms import refresh_statistics
from norms.convert import convert_norm
from norms.modules import BatchNorm, GhostBatchNorm, SwitchNorm, SyncBatchNorm
from norms.online import OnlineNorm

C = 5


def batches(sizes: tuple[int, ...] = (8, 8, 6), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(n, C, 4, 4, generator=generator) + 2).to(dtype) for n in sizes]


def of_batch(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    x = x.double().transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, correction=int(unbiased))


def of_parts(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    parts = [of_batch(x[i :: len(x) // size], True) for i in range(len(x) // size)]
    return torch.stack([m for m, _ in parts]).mean(0), torch.stack([v for _, v in parts]).mean(0)


def of_instances(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double().flatten(2)
    return x.mean(2).mean(0), x.var(2).mean(0)


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "torch": (lambda: nn.BatchNorm2d(C), lambda x: of_batch(x, True)),
    "torch, plain average": (lambda: nn.BatchNorm2d(C, momentum=None), lambda x: of_batch(x, True)),
    "torch instance": (lambda: nn.InstanceNorm2d(C, track_running_stats=True), of_instances),
    "batch": (lambda: BatchNorm(C, momentum=0.3), lambda x: of_batch(x, True)),
    "sync": (lambda: SyncBatchNorm(C), lambda x: of_batch(x, True)),
    "ghost": (lambda: GhostBatchNorm(C, ghost_size=2), lambda x: of_parts(x, 2)),
    "switchable": (lambda: SwitchNorm(C), lambda x: of_batch(x, False)),
    "timm": (lambda: BatchNormAct2d(C), lambda x: of_batch(x, True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_each_norm_has_the_plain_mean_over_the_batches(name: str, dtype: torch.dtype) -> None:
    make, by_hand = NORMS[name]
    norm = make().to(dtype)
    norm.running_mean.fill_(7.0)
    norm.running_var.fill_(float("nan"))
    momentum = norm.momentum
    data = batches((8,) * 60 if dtype == torch.bfloat16 else (8, 8, 6), dtype)
    refresh_statistics(norm.eval(), data)
    found = [by_hand(x) for x in data]
    tolerance = 4e-3 if dtype == torch.bfloat16 else 2e-6
    for buffer, parts in zip((norm.running_mean, norm.running_var), zip(*found, strict=True), strict=True):
        expected = torch.stack(parts).mean(0)
        torch.testing.assert_close(buffer.double(), expected, rtol=tolerance, atol=tolerance)
    assert norm.momentum == momentum and not norm.training
    assert not norm._forward_pre_hooks and len(norm._forward_hooks) == 0


def test_a_norm_of_ones_own_with_torchs_convention_is_refreshed_too() -> None:
    norm = EvoNorm2dB0(C)
    data = batches((8, 8))
    refresh_statistics(norm, data)
    expected = torch.stack([of_batch(x, True)[1] for x in data]).mean(0)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_norms_have_mean_and_variance_of_all_samples(dtype: torch.dtype) -> None:
    network = nn.Sequential(OnlineNorm(C), nn.Conv2d(C, C, 1), OnlineNorm(C)).to(dtype)
    for norm in (network[0], network[2]):
        norm.m.fill_(-30.0)
        norm.var.fill_(50.0)
    controls = network[0].u.clone()
    data = batches((8, 8, 6), dtype)
    refresh_statistics(network.train(), data)
    mean, var = of_batch(torch.cat(data), unbiased=False)
    torch.testing.assert_close(network[0].m.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network[0].var.double(), var, rtol=1e-5, atol=1e-5)
    assert torch.equal(network[0].u, controls) and network[0].training and network[2].training

    refresh_statistics(network, data[:1])  # what a later norm gets is normalised as in evaluation
    with torch.no_grad():
        mean, var = of_batch(network.eval()[:2](data[0]), unbiased=False)
    torch.testing.assert_close(network[2].m.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network[2].var.double(), var, rtol=1e-4, atol=1e-5)


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )


def test_of_batch_norms_it_is_torchs_to_the_last_bit() -> None:
    ours, theirs = deep(), deep()
    refresh_statistics(ours, batches())
    update_bn(batches(), theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_what_training_leaves_alone_stays() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[0].eval()
            return self

    unused = nn.BatchNorm2d(C)
    network = Frozen(
        nn.BatchNorm2d(C), nn.BatchNorm2d(C, momentum=0.0), FrozenBatchNormAct2d(C), nn.BatchNorm2d(C)
    )
    for module in (*list(network)[:3], unused):
        module.running_mean.uniform_()
        module.running_var.uniform_()
    network.unused = unused  # registered, never called
    network.forward = lambda x: network[3](network[2](network[1](network[0](x))))  # type: ignore[method-assign]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.eval()
    refresh_statistics(network, batches())
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {f"{i}.num_batches_tracked" for i in range(4)} | {"3.running_mean", "3.running_var"}
    assert "3.running_mean" in changed and not any(m.training for m in network.modules())


@pytest.mark.parametrize("norm", ["batch", "ghost", "switchable", "online"])
def test_nothing_waits_for_the_device(norm: str) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    network = convert_norm(deep(), norm)
    with Reads() as reads:
        refresh_statistics(network, batches())
    assert reads.count == 0


def test_without_statistics_no_batch_is_looked_at() -> None:
    def looked() -> Tensor:
        pytest.fail("a batch was made")
        yield

    refresh_statistics(nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(1, C)), looked())


def test_a_compiled_network_is_refreshed_without_compiling_it_anew() -> None:
    plain, compiled = deep(), deep()
    compiled.compile(backend="eager", fullgraph=True)
    compiled(batches()[0])
    refresh_statistics(compiled, batches((8,) * 12))
    refresh_statistics(plain, batches((8,) * 12))
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name
