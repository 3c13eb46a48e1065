"""What this machine and this process are: devices, cores, the rank among the processes of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crucible.launch import launch
from crucible.options import ConfigError


def device_kind(accelerator: str) -> str:
    """`cuda`, `mps` or `cpu`: what Lightning will choose for `trainer.accelerator`.

    Raises:
        ConfigError: for one that this machine does not have.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    if accelerator in ("gpu", "cuda", "mps"):
        raise ConfigError(f"trainer.accelerator={accelerator}: this machine has none; use auto or cpu")
    return "cpu" if accelerator in ("auto", "cpu") else accelerator


def processor_name() -> str:
    """The processor's model, as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_count(trainer: Mapping[str, Any]) -> int:
    """The devices on one node that `trainer.devices` asks for."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) if device_kind(trainer["accelerator"]) == "cuda" else 1
    if isinstance(devices, int):
        if devices < 1:
            raise ConfigError(f"trainer.devices must be at least 1, a list, or auto, got {devices}")
        return devices
    return len(devices) if isinstance(devices, list) else len([d for d in str(devices).split(",") if d])


def world_size(trainer: Mapping[str, Any]) -> int:
    """The processes of a run, over all nodes."""
    return device_count(trainer) * trainer["num_nodes"]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of a device or of the host that had no memory left."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_child_rank() -> bool:
    """Whether another process of the same run writes its records."""
    return launch().rank > 0


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x`, in float32 where it was narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device, for sums: float64, on MPS float32."""
    return torch.float32 if device.type == "mps" else torch.float64
