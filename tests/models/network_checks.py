"""What every network must do; a family's tests say how to build a small one of its kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from norms import convert_norm


def images(n: int = 2, channels: int = 3, spatial: tuple[int, ...] = (32, 32), dtype: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, *spatial, generator=generator, dtype=dtype)


def randomised(network: nn.Module) -> nn.Module:
    """The network with values in all places, so that nothing is hidden behind a zero or a one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                bound = math.sqrt(3 / tensor[0].numel())
                tensor.uniform_(-bound, bound)
            elif name.endswith(("bias", "mean")):
                tensor.normal_(std=0.1)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return network


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def multiply_adds(network: nn.Module, *shape: int) -> float:
    """Of the convolutions and linear layers, for one sample, in millions; the network lies on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2e6


def assert_same_function(
    ours: nn.Module,
    theirs: nn.Module,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    spatial: tuple[int, ...] = (32, 32),
) -> None:
    """With the weights of `theirs`, under the names of `ours`, both have the same outputs and gradients."""
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = images(n=4, spatial=spatial)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
    for network in (ours, theirs):
        network.double().train()(x.double()).logsumexp(dim=1).sum().backward()
    expected = renamed({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-9, rtol=1e-7, msg=name)


class NetworkChecks:
    """Subclassed by a family's tests, which say how to build a small network with all of its extras."""

    num_groups: ClassVar[int]  # divides the channels of every norm
    cifar_sizes: ClassVar[tuple[bool, ...]] = (True, False)
    spatial: ClassVar[dict[int, tuple[int, ...]]] = {1: (64,), 2: (32, 32), 3: (16, 16, 16)}

    def build(self, **options: Any) -> nn.Module:
        """A small network of 10 outputs and 3 input channels, unless `options` say otherwise."""
        raise NotImplementedError

    def seeded(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.build(**options)

    @pytest.mark.parametrize("input_dim", [1, 2, 3])
    def test_maps_n_c_spatial_to_n_outputs(self, input_dim: int) -> None:
        for cifar_size in self.cifar_sizes:
            network = self.build(num_outputs=7, input_dim=input_dim, input_channels=5, cifar_size=cifar_size)
            out = network(images(channels=5, spatial=self.spatial[input_dim]))
            out.sum().backward()
            assert out.shape == (2, 7)
            assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    @pytest.mark.slow
    @pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.nightly)])
    def test_compiles_without_a_graph_break(self, training: bool) -> None:
        torch._dynamo.reset()
        network = self.seeded(cifar_size=True).train(training)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.manual_seed(0)
        expected = network(images())
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(images()), expected)

    def test_channels_last_gives_the_same_outputs(self) -> None:
        network = randomised(self.seeded()).eval()
        with torch.no_grad():
            expected = network(images())
            network.to(memory_format=torch.channels_last)
            out = network(images().contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    def test_bfloat16_autocast_stays_near_float32(self) -> None:
        network = self.seeded(cifar_size=True)
        results = []
        for enabled in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                results.append(network.train()(images(n=16)))
        expected, out = results
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.05 * expected.norm()

    @pytest.mark.parametrize("norm", ["online", "group"])
    def test_every_norm_converts(self, norm: str) -> None:
        options = {"num_groups": self.num_groups} if norm == "group" else {}
        network = convert_norm(self.seeded(cifar_size=True), norm, **options)
        assert not any(isinstance(m, _BatchNorm) for m in network.modules())
        network(images()).logsumexp(dim=1).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    def test_state_dict_round_trip(self, tmp_path: Path) -> None:
        network, other = self.build(), self.build()
        network(images())
        torch.save(network.state_dict(), tmp_path / "w.pt")
        other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
        assert torch.equal(other.eval()(images()), network.eval()(images()))

    def test_a_sample_alone_has_its_outputs_in_the_batch(self) -> None:
        network = randomised(self.seeded()).eval()
        with torch.no_grad():
            torch.testing.assert_close(network(images()[:1]), network(images())[:1], atol=1e-5, rtol=1e-4)

    def test_small_input_of_any_size(self) -> None:
        network = self.build(cifar_size=True).eval()
        with torch.no_grad():
            for size in (1, 5, 8, 33):
                assert network(images(spatial=(size, size + 1))).isfinite().all()
