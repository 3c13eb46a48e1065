"""Memory that runs out: processes that the kernel kills for want of it, and the shared memory of loader workers."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

SHARED = Path("/dev/shm")


def kills() -> int:
    """How many processes the kernel has killed for memory: in this process's control group, and on the machine.

    Two readings tell whether there was one in between. 0 where nothing counts them.
    """
    return sum(_count(file, key) for file, key in _counters())


def _counters() -> list[tuple[Path, str]]:
    found = [(Path("/proc/vmstat"), "oom_kill")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    root = Path("/sys/fs/cgroup")
    for line in lines:
        _, kinds, path = line.split(":", 2)
        # inside a container the group's own path is often not there: what is mounted is the group
        if not kinds:
            found += [(folder / "memory.events", "oom_kill") for folder in _first(root / path[1:], root)]
        elif "memory" in kinds.split(","):
            v1 = root / "memory"
            found += [(folder / "memory.oom_control", "oom_kill") for folder in _first(v1 / path[1:], v1)]
    return found


def _first(*folders: Path) -> list[Path]:
    return [folder for folder in folders if folder.is_dir()][:1]


def _count(file: Path, key: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == key), 0)
    except (OSError, ValueError, IndexError):
        return 0


def ended_by(number: int, before: int) -> str:
    """What a signal that ended a process means, in words.

    Args:
        number: the signal's.
        before: the `kills` when the process began.
    """
    if number == signal.SIGKILL and kills() > before:
        return (
            "killed for want of memory (the kernel killed a process meanwhile): give the job more, or take a smaller "
            "data.module.batch_size with trainer.accumulate_grad_batches, or fewer data.module.num_workers; "
            "the same command goes on from its last state"
        )
    if number == signal.SIGKILL:
        return "killed (SIGKILL), by hand or for want of memory; the same command goes on from its last state"
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended by signal {number}"


def worker_died(text: str) -> str:
    """What an error says of a loader worker that the machine had no memory for, with the way on; else empty."""
    if "shared memory" in text or "Bus error" in text:
        return (
            f"{SHARED} is full, through which loader workers hand on their batches: fewer data.module.num_workers, a "
            "smaller data.module.prefetch_factor, or a container with more of it (docker run --shm-size=8g); "
            "the same command goes on from its last state"
        )
    if re.search(r"worker \(pid(\(s\))? [\d, ]+\) (is killed by signal: Killed|exited unexpectedly)", text):
        return (
            "a loader worker was killed, most likely for want of memory: fewer data.module.num_workers, a smaller "
            "data.module.prefetch_factor, or more memory; the same command goes on from its last state"
        )
    return ""


def shared_memory_free() -> float:
    """Bytes free where processes share memory; infinite where that has no bound of its own."""
    try:
        stat = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return float("inf")
    return stat.f_bavail * stat.f_frsize


def memory_free() -> float:
    """Bytes of memory that new data may take, on this machine and in this control group; infinite where unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024.0
    except (OSError, ValueError, KeyError, IndexError):
        return float("inf")
    for file, _ in _counters():
        try:
            # version 2 of control groups; the word "max" is no bound
            most, used = (int((file.parent / f"memory.{n}").read_text()) for n in ("max", "current"))
        except (OSError, ValueError):
            continue
        free = min(free, max(0, most - used))
    return free
