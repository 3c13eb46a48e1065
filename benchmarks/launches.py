"""How many kernels a norm launches on a GPU, forward and backward: counted on the CPU, operator by operator.

An operator that makes no view and more than an empty tensor is taken for a launch; so it is for nearly all of them, and
for online norm's own (tests/norms/test_online_kernels.py). No GPU is needed, and nothing is timed.

    python benchmarks/launches.py --out benchmarks/results/launches.md
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from paired import provenance, report  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from norms import online  # noqa: E402
from norms.convert import convert_norm  # noqa: E402

NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "promote_types", "detach")
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch", {}),
    "online, layer scaling": ("online", {"ecm": "ls"}),
    "online, clamping": ("online", {"ecm": "ac"}),
    "online, no compensation": ("online", {"ecm": "none"}),
    "ghost (16)": ("ghost", {"ghost_size": 16}),
    "group (32)": ("group", {"num_groups": 32}),
    "layer": ("layer", {}),
    "instance": ("instance", {}),
    "switchable": ("switchable", {}),
}


class Launches(TorchDispatchMode):
    """Counts, by name, the operators that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in NO_LAUNCH:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def steps_of_online_norm(steps: Any) -> Iterator[None]:
    """Online norm by these steps, whatever the device: `norms.online._OPERATORS` are what a GPU gets."""
    before, online._steps_for = online._steps_for, lambda x: steps
    try:
        yield
    finally:
        online._steps_for = before


def launches(
    norm: nn.Module, shape: tuple[int, ...], channels_last: bool = False
) -> tuple[Counter[str], Counter[str]]:
    """What a forward and a backward of `norm` launch, by name."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(shape).contiguous(memory_format=layout)
    norm(x).backward(grad)  # buffers and gradients exist from here on
    for tensor in (x, *norm.parameters()):
        tensor.grad = None
    with Launches() as forward:
        out = norm(x)
    with Launches() as backward:
        torch.autograd.backward(out, grad)
    return forward.names, backward.names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, (kind, options) in NORMS.items():
        for label, steps in (
            (name, online._OPERATORS),
            *([(f"{name}, operation by operation", online._Steps)] if kind == "online" else []),
        ):
            norm = convert_norm(nn.BatchNorm2d(64), kind, **options)
            with steps_of_online_norm(steps):
                counts = [sum(c.values()) for c in launches(norm, (arguments.batch, 64, 4, 4))]
            rows.append(f"| {label} | {counts[0]} | {counts[1]} | {sum(counts)} |")
    text = "\n".join([
        "# Kernels that a norm launches",
        "",
        provenance(),
        f"Training, one norm, batches of {arguments.batch}, float32, not compiled; counted, not measured on a GPU. "
        '"Operation by operation":',
        "as online norm was on every GPU before it had kernels of its own, and is where Triton is missing.",
        "",
        "| norm | forward | backward | together |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ])  # fmt: skip
    report(text, arguments.out)


if __name__ == "__main__":
    main()
