"""Who a process is, so that another one can tell whether it still lives, and never takes another for it.

A number alone does not say: numbers are used again, after a restart of the machine at once, and each container counts
its own. Linux's /proc has what is missing; where there is none (macOS), the number has to do.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PLACE = (
    "boot",
    "space",
)  # where a number means a process: the start of the machine, the namespace of its numbers


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a process to end in good order: Ctrl-C, SIGTERM, SLURM's SIGUSR1, SIGHUP of a closed terminal.

    The last not where it is ignored, which is what `nohup` asks for.
    """
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *hangup


def this_process() -> dict[str, Any]:
    """This process: `host`, `pid`, and where /proc says it `boot`, `space` (of numbers) and `start` (since boot)."""
    own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), **_place()}
    start = _start("self")
    return own if start is None else {**own, "start": start}


def lives(process: Mapping[str, Any]) -> bool | None:
    """Whether a process that `this_process` described lives; None where that cannot be told from here.

    That is so of another machine, and of another container, also one of the same name. A zombie does not live.
    """
    place = _place()
    known = {name: process[name] for name in _PLACE if name in process}
    if process["host"] != socket.gethostname() or (known and known != place):
        return None
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    if not _proc_is_of_this_space():
        return True
    state, start = _state_and_start(str(process["pid"]))
    return state not in ("Z", "X") and process.get("start", start) == start


def _place() -> dict[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"boot": boot, "space": str(Path("/proc/self/ns/pid").readlink())}
    except OSError:
        return {}


def _proc_is_of_this_space() -> bool:
    """Not so where a container has numbers of its own and another's /proc."""
    try:
        return str(Path("/proc/self").readlink()) == str(os.getpid())
    except OSError:
        return False


def _start(pid: str) -> int | None:
    return _state_and_start(pid)[1]


def _state_and_start(pid: str) -> tuple[str, int | None]:
    """`R`, `S`, `Z`, ... and the clock's ticks from boot to the start; empty and None where they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])  # behind the name, which may hold blanks: fields 3 and 22
    except (OSError, IndexError, ValueError):
        return "", None
