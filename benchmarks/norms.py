"""What each norm costs: its forward and backward against those of batch norm, alternating in one run.

python benchmarks/norms.py --out benchmarks/results/norms.md
python benchmarks/norms.py --network --threads 2 --out benchmarks/results/norms_resnet18.md
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from paired import paired_times, provenance, ratio_interval, report
from torch import Tensor, nn
from torch.autograd import Function

from norms.convert import convert_norm
from norms.online import OnlineNorm

SHAPES = [(128, 64, 32, 32), (64, 256, 14, 14), (32, 2048, 7, 7)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "online (ls)": ("online", {"ecm": "ls"}),
    "online (ac)": ("online", {"ecm": "ac"}),
    "online (none)": ("online", {"ecm": "none"}),
    "ghost (16)": ("ghost", {"ghost_size": 16}),
    "group (32)": ("group", {"num_groups": 32}),
    "layer": ("layer", {}),
    "instance": ("instance", {}),
    "switchable": ("switchable", {}),
    "none": ("none", {}),
}
LOOP = "online (ls), loop over samples"


class LoopFunction(Function):
    """Online normalisation with layer scaling as it is written down: one sample after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, norm: OnlineNorm) -> Tensor:  # type: ignore[override]
        outputs, saved = [], []
        w, b = w.view(-1, 1, 1), b.view(-1, 1, 1)
        for sample in x:
            wide = sample.float()
            mu = wide.mean((1, 2))
            s2 = (wide - mu.view(-1, 1, 1)).square().mean((1, 2))
            inv = torch.rsqrt(norm.var + norm.eps).view(-1, 1, 1)
            y = (wide - norm.m.view(-1, 1, 1)) * inv
            z = w * y + b
            r = torch.rsqrt(z.square().mean() + norm.ls_eps)
            outputs.append((r * z).to(x.dtype))
            saved += [y, inv, r]
            a = norm.alpha_fwd
            norm.var.copy_(a * norm.var + (1 - a) * s2 + a * (1 - a) * (mu - norm.m).square())
            norm.m.lerp_(mu, 1 - a)
        ctx.save_for_backward(w, b, *saved)
        ctx.norm = norm
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, b, *saved = ctx.saved_tensors
        u, v, gain = ctx.norm.u, ctx.norm.v, 1 - ctx.norm.alpha_bkw
        inputs, grad_w, grad_b = [], torch.zeros_like(u), torch.zeros_like(u)
        for t, sample in enumerate(grad):
            y, inv, r = saved[3 * t : 3 * t + 3]
            wide = sample.float()
            z = w * y + b
            dz = r * wide - r**3 * (wide * z).mean() * z
            grad_w += (dz * y).sum((1, 2))
            grad_b += dz.sum((1, 2))
            controlled = w * dz - gain * v.view(-1, 1, 1) * y
            v += (controlled * y).mean((1, 2))
            dx = controlled * inv - gain * u.view(-1, 1, 1)
            u += dx.mean((1, 2))
            inputs.append(dx.to(grad.dtype))
        return torch.stack(inputs), grad_w, grad_b, None


class LoopOnlineNorm(OnlineNorm):
    def forward(self, x: Tensor) -> Tensor:
        return LoopFunction.apply(x, self.weight, self.bias, self)


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed, as a device's allocator does; else page faults are measured."""
    libc = ctypes.CDLL("libc.so.6")
    for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        libc.mallopt(parameter, value)


def pass_of(norm: nn.Module, x: Tensor, grad: Tensor, compiled: bool) -> Callable[[], None]:
    if compiled:
        norm.compile(fullgraph=True, dynamic=False)

    def run() -> None:
        x.grad = None
        norm(x).backward(grad)

    return run


def norm_table(arguments: argparse.Namespace) -> list[str]:
    wanted = [
        name for name in [*NORMS, LOOP] if not arguments.norms or name.startswith(tuple(arguments.norms))
    ]
    rows = []
    for shape in [(4, 32, 4, 4)] if arguments.small else SHAPES:
        for dtype_name in arguments.dtypes:
            x = torch.randn(shape, device=arguments.device, dtype=DTYPES[dtype_name]).requires_grad_()
            grad = torch.randn_like(x)
            for mode in arguments.modes:
                for name in wanted:
                    if name == LOOP and mode == "compiled":
                        continue
                    torch._dynamo.reset()
                    batch = nn.BatchNorm2d(shape[1]).to(arguments.device)
                    if name == LOOP:
                        norm: nn.Module = LoopOnlineNorm(shape[1]).to(arguments.device)
                    else:
                        kind, options = NORMS[name]
                        norm = convert_norm(nn.BatchNorm2d(shape[1]), kind, **options).to(arguments.device)
                    runs = [pass_of(n, x, grad, mode == "compiled") for n in (norm, batch)]
                    repeats = max(3, arguments.repeats // 10) if name == LOOP else arguments.repeats
                    times = paired_times(runs[0], runs[1], repeats, warm_up=3)
                    mine, base = (1e3 * statistics.median(t) for t in times)
                    rows.append(
                        f"| {'x'.join(map(str, shape))} | {dtype_name} | {mode} | {name} | {mine:.2f} | {base:.2f}"
                        f" | {ratio_interval(*times)} |"
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
    return [
        f"Forward and backward of a norm alone, alternating with `nn.BatchNorm2d`, {arguments.repeats} pairs a row"
        " (a tenth for the loop).",
        "Ratio: median of the paired ratios with its 95 % interval. bf16: input and gradient; scale, shift and"
        " statistics are float32.",
        "",
        "| shape | dtype | mode | norm | ms | batch norm, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def network_table(arguments: argparse.Namespace) -> list[str]:
    """A compiled ResNet-18 with 3x3 stem: the first step, which compiles, and the steady step."""
    import torch._inductor.config

    from models.dynamic_resnet import ResNet18

    torch._inductor.config.force_disable_caches = True
    x = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
    torch.compile(nn.BatchNorm2d(3))(x.cpu()).sum().backward()  # the compiler's own start belongs to neither
    rows, runs, first = [], [], []
    for kind in ("online", "batch"):
        network = convert_norm(ResNet18(cifar_size=True).model, kind).to(arguments.device)
        network.compile(fullgraph=True, dynamic=False)

        def run(network: nn.Module = network) -> None:
            network.zero_grad()
            network(x).square().mean().backward()

        start = time.perf_counter()
        run()
        first.append(time.perf_counter() - start)
        runs.append(run)
    times = paired_times(runs[0], runs[1], arguments.repeats, warm_up=1)
    for name, started, seconds in zip(("online", "batch"), first, times, strict=True):
        rows.append(f"| {name} | {started:.1f} | {statistics.median(seconds):.3f} |")
    return [
        f"ResNet-18 with a 3x3 stem on {arguments.batch} images of 3x32x32, float32, forward and backward, compiled"
        f" without caches, {arguments.repeats} pairs.",
        f"Steady step, online to batch: {ratio_interval(*times)}; first step: {first[0] / first[1]:.2f}.",
        "",
        "| norm | first step, s | steady step, s |",
        "| --- | --- | --- |",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="pairs of timings a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="one small shape, to try the script")
    parser.add_argument("--norms", nargs="*", default=[], help="only norms whose name starts so")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--network", action="store_true", help="a compiled ResNet-18 instead of single norms")
    parser.add_argument("--batch", type=int, default=128, help="batch size of the ResNet-18")
    parser.add_argument(
        "--default-allocator", action="store_true", help="let the C library return freed memory"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep = sys.platform == "linux" and arguments.device == "cpu" and not arguments.default_allocator
    if keep:
        keep_freed_memory()
    allocator = "keeps freed memory (mallopt)" if keep else "default"
    table = network_table(arguments) if arguments.network else norm_table(arguments)
    lines = ["# Cost of the norms", "", provenance(arguments.device) + f"- Allocator: {allocator}\n", *table]
    report("\n".join(lines), arguments.out)


if __name__ == "__main__":
    main()
