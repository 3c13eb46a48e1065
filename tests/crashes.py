"""Kills of a run: before the Nth of its file operations, or at a moment; and what the resumed run must share with one
that was not killed, which is everything but times. The whole of it: `python benchmarks/crash_matrix.py`.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "data=synthetic", "data.module.num_samples=96", "data.module.batch_size=16", "model=cifar_resnet",
    "model.depth=8", "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false",
    "model.mixup=true", "model.resnet_dropout=0.2",
]  # fmt: skip
DDP = ["trainer.devices=2", "trainer.accelerator=cpu"]
CONFIGURATIONS: dict[str, list[str]] = {
    "plain": ["trainer.max_epochs=3"],
    "ema, every step": ["trainer.max_epochs=2", "technique=ema", "checkpoint.every_steps=1"],
    "swa": ["trainer.max_epochs=4", "technique=swa", "model.swa_start=0.4"],
    "sam, online norm, every 2 steps": [
        "trainer.max_epochs=2", "technique=[sam,online_norm]", "checkpoint.every_steps=2",
    ],
    "loader workers": ["trainer.max_epochs=3", "data.module.num_workers=2", "checkpoint.every_steps=2"],
    "accumulation": ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=4", "checkpoint.every_steps=1"],
    "distillation": ["trainer.max_epochs=3", "technique=distillation", "model.teacher=TEACHER"],
    "only the last kept": ["trainer.max_epochs=3", "checkpoint.keep=last", "checkpoint.every=2"],
    "two processes": ["trainer.max_epochs=3", "checkpoint.every_steps=1", *DDP],
    "two processes, ema": ["trainer.max_epochs=3", "technique=ema", *DDP],
}  # fmt: skip
_NOT_COMPARED = {
    "started", "ended", "elapsed_s", "heartbeat", "wall_time_s", "images_per_s", "peak_memory_mb", "train_seconds",
    "recovered",  # what was repaired, which is of the kill and not of the run
}  # fmt: skip


def _comparable(value: Any, place: str) -> Any:
    """Without times and the place; tensors and arrays as dtype and bytes, so that equal means bit for bit."""
    if isinstance(value, str):
        return value.replace(place, "experiments")
    if isinstance(value, Mapping):
        return {k: _comparable(v, place) for k, v in value.items() if not _is_left_out(k)}
    if isinstance(value, (list, tuple)):
        return [_comparable(v, place) for v in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return (
            str(value.dtype),
            tuple(value.shape),
            value.view(torch.uint8).numpy().tobytes()
            if value.ndim
            else (value.item().hex() if value.is_floating_point() else value.item()),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value


def _is_left_out(name: Any) -> bool:
    return isinstance(name, str) and (name in _NOT_COMPARED or name.startswith("time/"))


def contents(run: Path) -> dict[str, Any]:
    """What a run's folder holds, file by file, without times: checkpoints, table, summary, per-example record."""
    found: dict[str, Any] = {}
    place = str(run.parent.parent)
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_dir() or file.suffix == ".log":
            continue
        if file.suffix == ".ckpt":
            found[name] = _comparable(torch.load(file, map_location="cpu", weights_only=True), place)
        elif file.name == "summary.json":
            found[name] = _comparable(json.loads(file.read_text()), place)
        elif file.suffix == ".csv":
            with file.open(newline="") as stream:
                found[name] = [_comparable(row, place) for row in csv.DictReader(stream)]
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                found[name] = {k: _comparable(arrays[k], place) for k in arrays.files}
        else:
            found[name] = file.read_text().replace(place, "experiments")
    return found


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """The places at which two such contents differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = sorted({*map(str, a), *map(str, b)})
        a, b = {str(k): v for k, v in a.items()}, {str(k): v for k, v in b.items()}
        return [
            place
            for name in names
            for place in (
                differences(a[name], b[name], f"{at}/{name}")
                if name in a and name in b
                else [f"{at}/{name} {'missing' if name in a else 'left over'}"]
            )
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [p for i, pair in enumerate(zip(a, b, strict=True)) for p in differences(*pair, f"{at}[{i}]")]
    if a == b or (a != a and b != b):
        return []
    shown = "" if isinstance(a, (tuple, list)) else f": {str(a)[:60]} and {str(b)[:60]}"
    return [f"{at}{shown}"]


def only_run(folder: Path) -> Path:
    """The one run under `folder`, an `exp_dir`."""
    (config,) = folder.glob("*/*/config.yaml")
    return config.parent


def kill_family(pid: int) -> None:
    """SIGKILL to a process and all that descend from it, at once."""
    table = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, table.splitlines())}
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


# `start(*arguments, script=...)` starts a command whose folder is that of the trial
Start = Callable[..., Any]


def operations(start: Start, folder: Path, options: Sequence[str]) -> tuple[Path, list[str]]:
    """The run in one piece, and the file operations that it did, in their order."""
    outcome = start(str(folder), "0", *options, f"exp_dir={folder}", script="tests/doomed.py").outcome()
    assert outcome.status == 0, outcome.err
    listed = folder / "operations"
    done = listed.read_text().splitlines()
    listed.unlink()
    return only_run(folder), done


def killed_before(
    start: Start, folder: Path, options: Sequence[str], number: int, whole: Mapping[str, Any]
) -> list[str]:
    """Kill the run before its operation `number` and give its command again; in what it differs from `whole`."""
    command = [*options, f"exp_dir={folder}"]
    dead = start(str(folder), str(number), *command, script="tests/doomed.py").outcome()
    if dead.status != -signal.SIGKILL:
        return [f"it was not killed: status {dead.status} {dead.err[-300:]}"]
    return _resumed(start, folder, command, whole)


def killed_after(
    start: Start, folder: Path, options: Sequence[str], seconds: float, whole: Mapping[str, Any]
) -> list[str] | None:
    """Kill the run and all its processes `seconds` after its start; None: it had come to its end."""
    command = [*options, f"exp_dir={folder}"]
    process = start(*command)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    kill_family(process.pid)
    if process.outcome().status == 0:
        return None
    return _resumed(start, folder, command, whole)


def _resumed(start: Start, folder: Path, command: Sequence[str], whole: Mapping[str, Any]) -> list[str]:
    again = start(*command).outcome()
    if again.status != 0:
        return [f"the same command ended with status {again.status}: {again.err.strip()[-300:]}"]
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".lock"))]
    found = differences(dict(whole), contents(only_run(folder)))
    return [*found, *(f"{name} left over" for name in left)]
