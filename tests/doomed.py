"""A command that dies before one of its file operations: `python doomed.py FOLDER N ARGUMENTS of main.py`.

The Nth operation under FOLDER does not happen: the process gets SIGKILL. With N=0 it lives, and `FOLDER/operations`
lists them in the end, one a line: the operation and the file's name.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _writes(mode: Any, flags: Any) -> bool:
    return any(letter in str(mode) for letter in "wax+") if mode is not None else bool(flags & WRITING)


def doom(folder: str, number: int) -> None:
    """From now on count what is done to files under `folder`, up to the operation that is the last."""
    done: list[str] = []
    main_thread = threading.main_thread()

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or (event == "open" and not _writes(*arguments[1:3])):
            return
        # heartbeats come by the clock, so that their number differs from run to run
        if threading.current_thread() is not main_thread:
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(folder):
            return
        done.append(f"{event.removeprefix('os.')} {_name(os.fsdecode(path), folder)}")
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)
    if not number:
        file = Path(folder, "operations")
        atexit.register(lambda: file.write_text("".join(f"{line}\n" for line in done[:])))


def _name(path: str, folder: str) -> str:
    """The file's name within its run, without what tells processes and runs apart."""
    parts = Path(path).relative_to(folder).parts[1:]
    named = [".".join(p for p in part.split(".") if not p.isdigit()) for part in parts[-1:]]
    return named[0] if named else "experiments"


if __name__ == "__main__":
    folder, number, *arguments = sys.argv[1:]
    checkout = Path(__file__).resolve().parent.parent
    sys.path[0] = str(checkout)
    sys.argv = [str(checkout / "main.py"), *arguments]
    import main

    doom(folder, int(number))
    sys.exit(main.main())
