"""Our networks against the same networks of torchvision and timm: forward and backward, eager and compiled.

python benchmarks/models.py --threads 2 --batch 8 --size 64 --out benchmarks/results/models.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import torchvision
from paired import Ratio, paired_times, provenance, ratio_interval, report
from torch import nn

from models.dynamic_resnet import ResNet50
from models.preact_resnet import PreActResNet50
from models.wide_resnet import WRN2810


class WideResNet(nn.Module):
    """WRN-28-10 (arXiv 1605.07146) written plainly for this comparison: neither torchvision nor timm has it."""

    def __init__(self, depth: int = 28, widen_factor: int = 10, classes: int = 10) -> None:
        super().__init__()
        widths = [16, *(w * widen_factor for w in (16, 32, 64))]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        blocks = [
            WideBlock(before if i == 0 else after, after, 2 if i == 0 and after != widths[1] else 1)
            for before, after in pairwise(widths)
            for i in range((depth - 4) // 6)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).relu_().mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; the shortcut is projected where the width changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm1(x).relu_()
        shortcut = x if self.project is None else self.project(out)
        return shortcut + self.conv2(self.norm2(self.conv1(out)).relu_())


# ours, theirs, and what theirs is
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "ResNet-50": (
        lambda: ResNet50(num_classes=1000).model,
        torchvision.models.resnet50,
        "torchvision resnet50",
    ),
    "ResNet-50, timm's": (
        lambda: ResNet50(num_classes=1000).model,
        lambda: timm.create_model("resnet50"),
        "timm resnet50",
    ),
    "PreAct ResNet-50": (
        lambda: PreActResNet50(num_classes=1000).model,
        lambda: timm.create_model("resnetv2_50"),
        "timm resnetv2_50",
    ),
    "WRN-28-10": (
        lambda: WRN2810(num_classes=10, cifar_size=True).model,
        WideResNet,
        "a plain one, in this file",
    ),
}


def passes(network: nn.Module, x: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """Forward and backward of a training step."""
    network = network.to(x.device).train()
    if x.is_contiguous(memory_format=torch.channels_last):
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.compile()

    def run() -> None:
        network.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = network(x).float().logsumexp(dim=1).mean()
        loss.backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=100, help="pairs of timings a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels of the two ResNets' images")
    parser.add_argument("--cifar-size", type=int, default=32, help="pixels of the wide ResNet's images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows: list[tuple[str, str, str, str, float, float, Ratio]] = []
    for mode in arguments.modes:
        for name in arguments.models:
            ours, theirs, named = PAIRS[name]
            size = arguments.cifar_size if name == "WRN-28-10" else arguments.size
            x = torch.randn(arguments.batch, 3, size, size, device=arguments.device)
            if x.is_cuda:
                x = x.contiguous(memory_format=torch.channels_last)
            networks = ours(), theirs()
            counts = [sum(p.numel() for p in network.parameters()) for network in networks]
            if counts[0] != counts[1]:
                raise SystemExit(f"{name}: {counts[0]} parameters here, {counts[1]} in {named}")
            torch._dynamo.reset()
            runs = [passes(network, x, mode == "compiled") for network in networks]
            times = paired_times(runs[0], runs[1], arguments.repeats)
            milliseconds = [1e3 * statistics.median(t) for t in times]
            shape = "x".join(map(str, x.shape))
            rows.append((name, named, mode, shape, *milliseconds, ratio_interval(*times)))

    precision = "bfloat16, channels last" if arguments.device != "cpu" else "float32"
    lines = [
        "# Our networks against others' same networks",
        "",
        f"Forward and backward in training mode, {precision}, alternating in one run, {arguments.repeats} pairs a row;",
        "milliseconds are medians. Ratio: median of ours/theirs over the pairs with its 95 % interval. Both have the",
        "same number of parameters, which is checked.",
        "",
        provenance(arguments.device)
        + f"- Others: torchvision {torchvision.__version__.split('+')[0]}, timm {timm.__version__}\n",
        "| network | other | mode | input | ours, ms | other, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {named} | {mode} | {shape} | {a:.2f} | {b:.2f} | {ratio} |"
            for name, named, mode, shape, a, b, ratio in rows
        ),
    ]
    report("\n".join(lines), arguments.out)


if __name__ == "__main__":
    main()
