"""What a save costs that is sealed, fsynced and checked for finite numbers, beside `torch.save`.

States of weights and one moment each. All variants in turn, on the file system of `--folder`:
    python benchmarks/checkpoint_stall.py --rounds 9 --out benchmarks/results/checkpoint_stall.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHY = """\
The save is synchronous. One in another thread would need a copy of the state, would take turns with the steps for the
interpreter, and a run that ends or is stopped would wait for it all the same. What it could save is this stall, once an
epoch (`checkpoint.every`)."""
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402
from paired import provenance, ratio_interval, report  # noqa: E402

from callbacks.checkpoints import AtomicCheckpointIO, Saving  # noqa: E402
from crucible import sealed  # noqa: E402


def state_of(name: str) -> dict[str, Any]:
    weights = getattr(torchvision.models, name)().state_dict()
    moments = {
        n: {"momentum_buffer": torch.randn_like(w)} for n, w in weights.items() if w.is_floating_point()
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments}], "loops": {}}


def synced(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def saves_of(state: dict[str, Any], folder: Path) -> dict[str, Callable[[], object]]:
    plain, other, own = (folder / name for name in ("plain.ckpt", "synced.ckpt", "last.ckpt"))
    return {
        "torch.save": lambda: torch.save(state, plain),
        "torch.save and fsync": lambda: synced(state, other),
        "ours": lambda: AtomicCheckpointIO().save_checkpoint(state, own, Saving(folder / "previous.ckpt")),
        "verified when read": lambda: sealed.damage(own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in ("resnet18", "resnet50"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            saves = saves_of(state_of(name), Path(folder))
            times: dict[str, list[float]] = {kind: [] for kind in saves}
            for _ in range(arguments.rounds + 1):
                for kind, save in saves.items():
                    times[kind].append(seconds(save))
            size = (Path(folder) / "last.ckpt").stat().st_size / 2**20
        times = {kind: values[1:] for kind, values in times.items()}
        for kind, values in times.items():
            ratio = ratio_interval(values, times["torch.save"])
            rows.append(f"| {name}, {size:.0f} MiB | {kind} | {statistics.median(values):.3f} | {ratio} |")
    report(
        "# The stall of a save\n\n"
        f"{provenance()}- Workload: weights and momentum of torchvision's networks, {arguments.rounds} rounds\n"
        "- Ours: finite numbers checked, sealed (CRC-32 of the file), fsync of file and folder, former file kept\n\n"
        "| state | save | seconds, median | to torch.save (95 % interval) |\n"
        "| --- | --- | ---: | ---: |\n" + "\n".join(rows) + "\n\n" + WHY,
        arguments.out,
    )


if __name__ == "__main__":
    main()
