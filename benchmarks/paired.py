"""Paired timing: two workloads alternate in one run, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median of paired ratios with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_times(
    run_a: Callable[[], object], run_b: Callable[[], object], repeats: int, warm_up: int = 10
) -> tuple[list[float], list[float]]:
    """Seconds of each call of `run_a` and `run_b`, in pairs that start with a and b in turn.

    Work queued on a CUDA device is waited for.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def seconds(run: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start

    for _ in range(warm_up):
        run_a()
        run_b()
    times_a, times_b = [], []
    for i in range(repeats):
        if i % 2:
            times_b.append(seconds(run_b))
            times_a.append(seconds(run_a))
        else:
            times_a.append(seconds(run_a))
            times_b.append(seconds(run_b))
    return times_a, times_b


def ratio_interval(times_a: Sequence[float], times_b: Sequence[float]) -> Ratio:
    """The median of a/b over the pairs; the interval holds for any distribution (order statistics)."""
    ratios = sorted(a / b for a, b in zip(times_a, times_b, strict=True))
    n = len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def paired_ratio(
    run_a: Callable[[], object], run_b: Callable[[], object], repeats: int, warm_up: int = 10
) -> Ratio:
    """How much longer `run_a` takes than `run_b`: the median ratio and its 95 % interval."""
    return ratio_interval(*paired_times(run_a, run_b, repeats, warm_up))


def provenance(device: torch.device | str = "cpu") -> str:
    """Markdown lines that say when, where and with what a table was measured."""
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    return f"- Date: {date.today()}\n- Device: {hardware}\n- Versions: {versions}\n- Command: `{command}`\n"


def report(text: str, out: Path | None) -> None:
    """Print `text`, and write it to the file `out` if there is one."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
