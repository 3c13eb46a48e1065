"""OnlineNorm is the sequential definition of arXiv 1905.05894, whatever the batch, layout, mode or machinery."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from online_definition import assert_follows, online_norm, step, streams_of
from torch import library, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from norms.online import (
    STREAMS,
    OnlineNorm,
    exclude_streams_from_broadcast,
    recomputation_contexts,
    set_stream_moments,
    stream_moments,
    synchronise_streams,
)


@pytest.mark.parametrize("ecm", ["ls", "ac", "none"])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (7,), (5, 5), (1, 1), (2, 3, 2), "channels_last"],
    ids=lambda s: str(s).replace(" ", ""),
)
@pytest.mark.parametrize("alphas", [(0.999, 0.99), (15 / 16, 7 / 8)])
def test_equals_the_sequential_definition_over_batches_of_any_size(ecm, shape, alphas):
    norm = online_norm(alpha_fwd=alphas[0], alpha_bkw=alphas[1], ecm=ecm, clamp_val=1.5)
    space = (5, 3) if shape == "channels_last" else shape
    batches = [2 * torch.randn(n, 4, *space, dtype=torch.float64) + 1 for n in (3, 1, 8, 130, 5)]
    if shape == "channels_last":
        batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]
    assert_follows(norm, batches, 1e-10)


@pytest.mark.parametrize("scale", [3.5, 13.0])
def test_is_exact_for_large_activations_whose_control_coefficient_is_negative(scale):
    norm = online_norm(alpha_fwd=0.999, alpha_bkw=0.99, ecm="ls")
    x = scale * torch.randn(9, 4, 3, 3, dtype=torch.float64)
    if scale > 10:
        assert (1 - 0.01 * (x * x).mean((2, 3)) < 0).any()
    assert_follows(norm, [x, x[:4]], 1e-10)


def test_float32_stays_close_to_the_definition_with_a_mean_far_from_zero():
    norm = online_norm(dtype=torch.float32)
    with torch.no_grad():
        norm.m.fill_(99.0)
    assert_follows(norm, [torch.randn(n, 4, 6, 6) + 100 for n in (16, 16, 3)], 2e-4)


@pytest.mark.parametrize("size", [3, 12])  # below and above what the CPU kernels read well
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_its_dtype_and_float32_statistics(size, dtype):
    norm = online_norm(dtype=torch.float32)
    exact = copy.deepcopy(norm)
    for _ in range(3):
        x, grad = torch.randn(6, 4, size, size).to(dtype), torch.randn(6, 4, size, size).to(dtype)
        out, dx = step(norm, x, grad)
        wide, wide_dx = step(exact, x.float(), grad.float())
        assert out.dtype == dx.dtype == dtype
        torch.testing.assert_close(out.float(), wide, atol=0.03, rtol=0.02)
        torch.testing.assert_close(dx.float(), wide_dx, atol=0.05, rtol=0.02)
    for name in STREAMS:
        assert getattr(norm, name).dtype == torch.float32
        torch.testing.assert_close(getattr(norm, name), getattr(exact, name), atol=2e-3, rtol=1e-3)


def test_autocast_leaves_the_statistics_in_float32():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), OnlineNorm(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(torch.randn(4, 3, 5, 5))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(getattr(network[1], name).dtype == torch.float32 for name in STREAMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_keeps_float32_streams(dtype):
    norm = OnlineNorm(4)
    norm.m.fill_(1 + 2**-20)
    norm.to(dtype)
    assert norm.weight.dtype == dtype
    assert norm.m.dtype == torch.float32
    assert norm.m[0] == 1 + 2**-20
    step(norm, torch.randn(3, 4, 5, dtype=dtype), torch.ones(3, 4, 5, dtype=dtype))


def test_gradient_accumulation_is_exact():
    whole, parts = online_norm(), online_norm()
    x, grad = torch.randn(2, 10, 4, 3, 3, dtype=torch.float64)
    _, dx = step(whole, x, grad)
    pieces = [step(parts, *piece)[1] for piece in zip(x.split([3, 1, 6]), grad.split([3, 1, 6]), strict=True)]
    torch.testing.assert_close(torch.cat(pieces), dx, atol=1e-12, rtol=1e-12)
    for value, expected in zip(
        (*streams_of(parts), parts.weight.grad, parts.bias.grad),
        (*streams_of(whole), whole.weight.grad, whole.bias.grad),
        strict=True,
    ):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ecm", ["ls", "ac", "none"])
def test_evaluation_normalises_by_the_streams_and_compensates(ecm):
    norm = online_norm(ecm=ecm, clamp_val=1.0).eval()
    norm.m.normal_()
    norm.var.uniform_(0.5, 2)
    before = streams_of(norm)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    z = (x - norm.m[:, None]) / (norm.var[:, None] + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[
        :, None
    ]
    expected = {
        "ls": z / (z.square().mean((1, 2), keepdim=True) + norm.ls_eps).sqrt(),
        "ac": z.clamp(-1, 1),
        "none": z,
    }[ecm]
    torch.testing.assert_close(norm(x), expected)
    norm(x).sum().backward()
    assert all(map(torch.equal, streams_of(norm), before))


def test_a_training_forward_without_gradients_advances_the_statistics_alone():
    norm = online_norm()
    m, _, u, v = streams_of(norm)
    with torch.no_grad():
        norm(torch.randn(5, 4, 3, dtype=torch.float64) + 1)
    assert not torch.equal(norm.m, m)
    assert torch.equal(norm.u, u)
    assert torch.equal(norm.v, v)


def test_without_affine_it_is_the_one_with_ones_and_zeros():
    plain, affine = OnlineNorm(4, affine=False), OnlineNorm(4)
    x, grad = torch.randn(2, 6, 4, 3)
    for found, expected in zip(step(plain, x, grad), step(affine, x, grad), strict=True):
        torch.testing.assert_close(found, expected)
    assert not list(plain.parameters())


def test_an_activation_may_work_in_place_on_the_output():
    for x in (torch.randn(4, 4), torch.randn(4, 4, 3, 3)):
        in_place, plain = OnlineNorm(4), OnlineNorm(4)
        grad = torch.randn_like(x)
        _, dx = step(nn.Sequential(in_place, nn.ReLU(inplace=True)), x, grad)
        _, expected = step(nn.Sequential(plain, nn.ReLU()), x, grad)
        assert torch.equal(dx, expected)


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        pytest.param("aot_eager", (4, 4, 2, 1, 7), id="aot_eager"),
        pytest.param("inductor", (4, 4, 2, 1, 7), id="inductor", marks=pytest.mark.nightly),
    ],
)
def test_compiled_whole_it_equals_eager_with_a_changing_batch_size(backend, sizes):
    torch._dynamo.reset()
    eager = nn.Sequential(online_norm(), nn.ReLU(inplace=True), online_norm(ecm="ac"))
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=backend)
    for n in sizes:
        x, grad = torch.randn(2, n, 4, 3, 3, dtype=torch.float64)
        for found, expected in zip(step(compiled, x, grad), step(eager, x, grad), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, eager.state_dict()[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_it_passes_the_gradient_to_what_lies_below_it(precision):
    """Under torch 2.11 a compiled norm once gave exactly zero here, without a word."""
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), online_norm(dtype=torch.float32), nn.ReLU(), nn.Conv2d(4, 4, 1))
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="eager")
    x = torch.randn(4, 3, 5, 5)
    for network in (eager, compiled):
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            out = network(x)
        out.float().square().sum().backward()
    for found, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert expected.grad.any()
        rounding = 1e-5 if precision == torch.float32 else 0.05
        assert (found.grad - expected.grad).norm() <= rounding * expected.grad.norm()


def test_the_operators_that_are_opaque_to_the_compiler_keep_its_rules():
    means, rows, channels = torch.rand(2, 3, 4), torch.rand(3, 3, 4), torch.rand(4, 4)
    library.opcheck(torch.ops.online_norm.stream.default, (*means, *channels[:2], 0.9, 1e-5))
    transposed = torch.rand(4, 3).t()
    scales = torch.rand(2, 3, 1)
    for r, along in ((None, None), scales):
        control = (means[0], transposed, *rows, *channels[:2], r, along, *channels[2:], 9, 0.9)
        library.opcheck(torch.ops.online_norm.control.default, control)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_forwards_may_precede_two_backwards(compiled):
    norm, reference = online_norm(), online_norm()
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    (call(x[0]).sum() + call(x[1]).square().sum()).backward()
    (reference(x[0]).sum() + reference(x[1]).square().sum()).backward()
    torch.testing.assert_close(norm.weight.grad, reference.weight.grad)
    assert norm.u.isfinite().all()
    assert norm.v.any()


def test_activation_checkpointing_is_bitwise_the_plain_step():
    plain = nn.Sequential(online_norm(), nn.ReLU(), online_norm())
    saving = copy.deepcopy(plain)
    context = partial(recomputation_contexts, saving)
    for _ in range(2):
        x, grad = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
        _, expected = step(plain, x, grad)
        _, dx = step(lambda x: checkpoint(saving, x, use_reentrant=False, context_fn=context), x, grad)
        assert torch.equal(dx, expected)
    assert all(map(torch.equal, saving.state_dict().values(), plain.state_dict().values()))


def test_activation_checkpointing_refuses_to_be_compiled():
    torch._dynamo.reset()
    norm = OnlineNorm(4)
    context = partial(recomputation_contexts, norm)
    run = torch.compile(
        lambda x: checkpoint(norm, x, use_reentrant=False, context_fn=context), backend="aot_eager"
    )
    with pytest.raises(Exception, match="cannot be compiled"):
        run(torch.randn(3, 4, 5, requires_grad=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_the_control_state_of_its_channel(bad):
    norm = online_norm(ecm="none")
    x, grad = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    step(norm, x, grad)
    before = streams_of(norm)
    broken = grad.clone()
    broken[2, 1, 0, 0] = bad
    step(norm, x, broken)
    for name, old in zip(("u", "v"), before[2:], strict=True):
        new = getattr(norm, name)
        assert new[1] == old[1]
        assert (new != old)[[0, 2, 3]].all()
        assert new.isfinite().all()


def test_after_an_overflow_everything_is_finite_at_once():
    norm = online_norm()
    x, grad = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    step(norm, x, torch.full_like(grad, math.inf))
    step(norm, torch.full_like(x, math.inf), grad)
    out, dx = step(norm, x, grad)
    assert out.isfinite().all()
    assert dx.isfinite().all()
    assert all(stream.isfinite().all() for stream in streams_of(norm))


def test_a_change_of_the_loss_scale_is_a_change_of_the_state_that_fades():
    k, batch = 2.0, 50
    settings = {"alpha_fwd": 0.999, "alpha_bkw": 0.99}
    scaled, divided, plain = (online_norm(**settings) for _ in range(3))
    batches = torch.randn(2, 24, batch, 4, 4, dtype=torch.float64)
    for x, grad in batches.transpose(0, 1)[:4]:
        for norm in (scaled, divided, plain):
            step(norm, x, grad)
    with torch.no_grad():  # what the change to scale k means, in units of the unscaled gradient
        divided.u /= k
        divided.v /= k
    gaps = []
    for x, grad in batches.transpose(0, 1)[4:]:
        _, dx = step(scaled, x, k * grad)
        _, expected = step(divided, x, grad)
        _, undisturbed = step(plain, x, grad)
        torch.testing.assert_close(dx / k, expected, atol=1e-12, rtol=1e-10)
        gaps.append(float((dx / k - undisturbed).norm() / undisturbed.norm()))
    assert gaps[0] < 0.2
    assert gaps[-1] < 0.01 * gaps[0]  # after 20 batches of 50: 1000 samples, b^1000 = 4e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_a_copy_streams_on_its_own(duplicate):
    norm = online_norm()
    x, grad = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    step(norm, x, grad)
    before = streams_of(norm)
    other = duplicate(norm)
    step(other, x, grad)
    assert all(map(torch.equal, streams_of(norm), before))
    assert not any(map(torch.equal, streams_of(other), before))


def test_a_restored_norm_continues_bitwise():
    norm = online_norm()
    x, grad = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    step(norm, x, grad)
    other = OnlineNorm(4).double()
    other.load_state_dict(norm.state_dict())
    assert set(norm.state_dict()) == {"weight", "bias", *STREAMS}
    for found, expected in zip(step(other, x, grad), step(norm, x, grad), strict=True):
        assert torch.equal(found, expected)


def test_reads_the_keys_of_the_published_code_and_of_a_batch_norm():
    source = {name: torch.randn(4) for name in STREAMS}
    ones, zeros = torch.ones(4), torch.zeros(4)
    norm = OnlineNorm(4)
    norm.load_state_dict({"weight": ones, "bias": zeros, **{f"norm.{n}": t for n, t in source.items()}})
    assert all(torch.equal(getattr(norm, name), source[name]) for name in STREAMS)

    batch_norm = nn.BatchNorm2d(4)
    batch_norm(torch.randn(5, 4, 3, 3))
    norm.load_state_dict(batch_norm.state_dict())
    assert torch.equal(norm.m, batch_norm.running_mean)
    assert torch.equal(norm.var, batch_norm.running_var)
    assert not norm.u.any()


def test_refuses_input_of_another_width():
    with pytest.raises(ValueError, match="expected"):
        OnlineNorm(4)(torch.randn(2, 3, 5, 5))


def test_streams_of_two_processes_combine_to_those_of_the_union():
    networks = [nn.Sequential(OnlineNorm(3), OnlineNorm(5)) for _ in range(2)]
    for network in networks:
        for norm in network:
            for name in STREAMS:
                getattr(norm, name).uniform_(0.5, 2)
    first, second = (copy.deepcopy(network) for network in networks)
    mean = (stream_moments(first) + stream_moments(second)) / 2
    set_stream_moments(first, mean)
    for norm, a, b in zip(first, *networks, strict=True):
        torch.testing.assert_close(norm.m, (a.m + b.m) / 2)
        torch.testing.assert_close(norm.var, (a.var + b.var) / 2 + ((a.m - b.m) / 2) ** 2)
        torch.testing.assert_close(norm.u, (a.u + b.u) / 2)
        torch.testing.assert_close(norm.v, (a.v + b.v) / 2)


def test_synchronising_a_single_process_changes_nothing():
    norm = online_norm()
    step(norm, *torch.randn(2, 5, 4, 3, dtype=torch.float64))
    before = streams_of(norm)
    synchronise_streams(norm)
    assert all(map(torch.equal, streams_of(norm), before))


def test_only_the_streams_are_kept_out_of_the_broadcast():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(OnlineNorm(3)))
    exclude_streams_from_broadcast(network)
    assert set(network._ddp_params_and_buffers_to_ignore) == {f"1.0.{name}" for name in STREAMS}


def train_on_two(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1), OnlineNorm(3), nn.BatchNorm2d(3))
    alone = copy.deepcopy(network[1])
    exclude_streams_from_broadcast(network)
    wrapped = DistributedDataParallel(network)
    torch.manual_seed(rank + 1)
    for _ in range(3):
        wrapped.zero_grad()
        x = torch.randn(4, 2, 3, 3) + rank
        alone(network[0](x).detach())  # the statistics follow this rank's samples alone
        wrapped(x).square().mul(torch.rand(3, 1, 1)).sum().backward()
    own = {name: getattr(network[1], name).clone() for name in STREAMS}
    synchronise_streams(network)
    result = {
        "alone": {name: getattr(alone, name) for name in STREAMS},
        "own": own,
        "together": {name: getattr(network[1], name).clone() for name in STREAMS},
        "gradient": network[0].weight.grad,
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stream_their_own_samples_until_synchronised(on_two_processes, tmp_path: Path):
    on_two_processes(train_on_two, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for result in (first, second):
        for name in ("m", "var"):
            assert torch.equal(result["own"][name], result["alone"][name])
    assert not torch.equal(first["own"]["m"], second["own"]["m"])
    assert torch.equal(first["gradient"], second["gradient"])
    for name in STREAMS:
        assert torch.equal(first["together"][name], second["together"][name])
    a, b = first["own"], second["own"]
    torch.testing.assert_close(first["together"]["m"], (a["m"] + b["m"]) / 2)
    torch.testing.assert_close(
        first["together"]["var"], (a["var"] + b["var"]) / 2 + ((a["m"] - b["m"]) / 2) ** 2
    )
