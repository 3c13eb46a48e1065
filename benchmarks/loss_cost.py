"""What PowerGrad costs: its forward and backward against those of `F.cross_entropy`.

python benchmarks/loss_cost.py --threads 1 --out benchmarks/results/loss_cost.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from paired import Ratio, paired_times, provenance, ratio_interval, report
from torch import Tensor, nn

from losses.powergrad import PowerGradCrossEntropy

Criterion = Callable[[Tensor, Tensor], Tensor]
CALLS = 10  # of the criterion in one timing: well above the timer's resolution


class SmallNet(nn.Module):
    """Four convolutions on 3x32x32 images: about 20 ms a training step on one CPU core at batch size 32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in [(3, 32, 1), (32, 32, 2), (32, 64, 2), (64, 64, 1)]:
            layers += [
                nn.Conv2d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def criterion_alone(criterion: Criterion, n: int, k: int, device: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator).to(device).requires_grad_()
    target = torch.randint(k, (n,), generator=generator).to(device)

    def run() -> None:
        for _ in range(CALLS):
            logits.grad = None
            criterion(logits, target).backward()

    return run


def training_step(criterion: Criterion, batch: int, compiled: bool, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    network = SmallNet().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32, device=device)
    target = torch.randint(10, (batch,), device=device)
    if compiled:
        network.compile()

    def run() -> None:
        optimizer.zero_grad()
        criterion(network(x), target).backward()
        optimizer.step()

    return run


def measure(runs: list[Callable[[], None]], repeats: int, calls: int) -> tuple[float, float, Ratio]:
    """Median milliseconds of a call of both, and their ratio."""
    times = paired_times(runs[0], runs[1], repeats)
    milliseconds = [1e3 * statistics.median(t) / calls for t in times]
    return milliseconds[0], milliseconds[1], ratio_interval(*times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400, help="pairs of timings a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="batch size of the training step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = []
    for compiled in (False,) if arguments.eager else (False, True):
        criteria: list[Criterion] = [PowerGradCrossEntropy(arguments.alpha), F.cross_entropy]
        if compiled:
            criteria = [torch.compile(criterion, fullgraph=True, dynamic=False) for criterion in criteria]
        mode = "compiled" if compiled else "eager"
        for n, k in ((256, 1000), (512, 10)):
            runs = [criterion_alone(criterion, n, k, arguments.device) for criterion in criteria]
            rows.append((f"criterion alone ({n}, {k})", mode, *measure(runs, arguments.repeats, CALLS)))
        runs = [training_step(c, arguments.batch, compiled, arguments.device) for c in criteria]
        rows.append(("training step, small conv net", mode, *measure(runs, arguments.repeats, 1)))

    lines = [
        "# Cost of PowerGrad",
        "",
        f"Forward and backward of `PowerGradCrossEntropy({arguments.alpha})` against `F.cross_entropy`,"
        " integer targets, float32,",
        f"alternating in one run, {arguments.repeats} pairs a row. Ratio: median of the paired ratios with"
        " its 95 % interval.",
        f"The step is forward, backward and SGD of a net of four convolutions, {arguments.batch} images of"
        " 3x32x32.",
        "",
        provenance(arguments.device),
        "| workload | mode | PowerGrad, ms | cross-entropy, ms | ratio |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {mode} | {a:.3f} | {b:.3f} | {ratio} |" for name, mode, a, b, ratio in rows),
    ]
    report("\n".join(lines), arguments.out)


if __name__ == "__main__":
    main()
