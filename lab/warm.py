"""Processes that start warm: forked from a parent that has the heavy modules loaded.

A real start pays seconds of imports before its first line of work. `python -m lab.warm SOCKET` pays them once; each
process that its client asks for is then a fork: a session of its own, its own environment, folder and output.
The parent runs one thread and touches nothing of CUDA, else it refuses. It ends when its client does; the
processes that it started go on, as those of a real start would.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from crucible.machine import core_count

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "lab.jobs", "lab.tasks", "lab.sweeps", "datasets.digits", "datasets.synthetic", "models.dynamic_resnet",
    "augmentation.policies", "callbacks.progress", "torchmetrics", "torchvision", "pandas",
)  # fmt: skip
LARGEST = 160_000  # bytes of a request: what a socket takes as one message
UNKNOWN = 1  # the exit status of a process whose parent died first
THREADS = "OMP_NUM_THREADS"
SET_BY_IMPORTS = {"KMP_INIT_AT_FORK"}  # by scikit-learn, in the parent too
READ_AT_LOADING = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "LD_", "PYTHONHASHSEED", "TORCH_")


class Cold(Exception):
    """No warm parent can start this process; a real start can."""


# the client's side


class WarmParent:
    """A warm parent of this process's own; it loads its modules in the background.

    Args:
        environment: the parent's, and so what its libraries read when they are loaded; None: this process's.

    Raises:
        Cold: where the machine has no such processes.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = dict(os.environ if environment is None else environment)
        self._running: dict[
            int, Started
        ] = {}  # by number, which the system gives to others once they have ended
        self._answers: list[Started | str] = []  # to requests: what was started, or why nothing was
        self._alive = True
        paths = [str(ROOT), *_paths(self.environment)]
        told = {**self.environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        # else these start threads when they are loaded, pandas loading pyarrow where it is there
        told = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false", **told}
        if not hasattr(os, "fork") or not hasattr(socket, "SOCK_SEQPACKET"):
            raise Cold("this system forks no processes")
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                server = subprocess.Popen(
                    [sys.executable, "-P", "-m", "lab.warm", str(theirs.fileno())],
                    env=told, pass_fds=[theirs.fileno()], start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise Cold(str(error)) from error
        self._socket, self.pid = ours, server.pid
        self.close = weakref.finalize(self, _close, ours, server)

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: int | None = None,
        errors: int | None = None,
        cwd: str | Path | None = None,
    ) -> Started:
        """Start `python ARGUMENTS`, a script and what it is given, in a session of its own.

        Args:
            arguments: the script's path, and its arguments.
            environment: all of it.
            output, errors: file descriptors; None: where this process's go.
            cwd: its folder; None: this process's.

        Raises:
            Cold: where the parent cannot, or has died.
        """
        self._check(environment)
        request = {
            "arguments": list(arguments), "environment": dict(environment), "cwd": str(cwd or Path.cwd()),
        }  # fmt: skip
        message = json.dumps(request).encode()
        if len(message) > LARGEST:
            raise Cold("its environment is too long")
        try:
            socket.send_fds(
                self._socket, [message], [1 if output is None else output, 2 if errors is None else errors]
            )
        except OSError as error:
            self._alive = False
            raise Cold(f"the warm parent has died ({error})") from error
        while not self._answers:
            if not self._receive(None):
                raise Cold("the warm parent has died")
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            raise Cold(answer)
        return answer

    def _check(self, environment: Mapping[str, str]) -> None:
        if not self._alive:
            raise Cold("the warm parent has died")
        names = {n for n in {*environment, *self.environment} if n.startswith(READ_AT_LOADING)}
        differing = {n for n in names if environment.get(n) != self.environment.get(n)} - SET_BY_IMPORTS
        if environment.get(THREADS, "").isdigit():
            differing.discard(THREADS)
        if differing:
            raise Cold(f"its libraries have read {', '.join(sorted(differing))} already")

    def _receive(self, timeout: float | None) -> bool:
        """Take in one message, waiting for at most `timeout` seconds; whether there was one."""
        if not self._alive:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(timeout):
                return False
        try:
            message = self._socket.recv(LARGEST)
        except OSError:
            message = b""
        if not message:
            self._alive = False
            return False
        answer = json.loads(message)
        if "ended" in answer:
            self._running.pop(answer["ended"]).returncode = answer["status"]
        elif "pid" in answer:
            started = self._running[answer["pid"]] = Started(self, answer["pid"])
            self._answers.append(started)
        else:
            self._answers.append(answer["refused"])
        return True

    def wait_for(self, started: Started, timeout: float | None) -> None:
        """Return when the process has ended and its status is known, or after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while started.returncode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._receive(left) and self._alive:
                return
            if not self._alive and started.returncode is None:
                if _gone(started.pid):
                    started.returncode = UNKNOWN
                elif left is not None and left <= 0:
                    return
                else:
                    time.sleep(0.05 if left is None else min(0.05, left))


class Started:
    """A process that a warm parent started; like `subprocess.Popen` where it is used as one."""

    def __init__(self, parent: WarmParent, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        self._parent.wait_for(self, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        self._parent.wait_for(self, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.returncode


def _close(connection: socket.socket, server: subprocess.Popen[bytes]) -> None:
    connection.close()
    server.kill()  # it may still be loading; what it has started is not its to end
    server.wait()


def _gone(pid: int) -> bool:
    """Whether the process, which is no child of ours, has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


# the parent's side


def _paths(environment: Mapping[str, str]) -> list[str]:
    return [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork what is asked for; returns in each child with its request, and in the parent when its client is gone."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                os.read(woken, 4096)
                _report_the_ended(connection)
            if connection not in ready:
                continue
            message, descriptors, _, _ = socket.recv_fds(connection, LARGEST + 1, 2)
            if not message:
                return None
            begun, begin = os.pipe()
            child = os.fork()
            if child == 0:
                os.setsid()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, descriptor in enumerate(descriptors, 1):
                    os.dup2(descriptor, number)
                for descriptor in {*descriptors, begun, begin, woken, wake} - {1, 2}:
                    os.close(descriptor)
                connection.close()
                return json.loads(message)
            for descriptor in (*descriptors, begin):
                os.close(descriptor)
            os.read(begun, 1)  # it leads its group from here on, and can be signalled
            os.close(begun)
            connection.send(json.dumps({"pid": child}).encode())


def _report_the_ended(connection: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = os.waitstatus_to_exitcode(ended[1])
            connection.send(json.dumps({"ended": ended[0], "status": status}).encode())


def _become(request: Mapping[str, Any]) -> None:
    """Take on what a real start of the process would have found."""
    before, wanted = dict(os.environ), request["environment"]
    os.environ.clear()
    os.environ.update(wanted)
    os.chdir(request["cwd"])
    script = Path(request["arguments"][0])
    own = [str(script.parent), *map(os.path.abspath, _paths(wanted))]
    parents = {str(Path(p).absolute()) for p in _paths(before)}
    sys.path[:] = dict.fromkeys([*own, *(p for p in sys.path if p not in parents)])
    importlib.invalidate_caches()
    sys.argv[:] = request["arguments"]
    if wanted.get(THREADS) not in (None, before.get(THREADS)):
        torch.set_num_threads(int(wanted[THREADS]))
    if "OPENBLAS_NUM_THREADS" not in wanted:
        threads = int(wanted.get(THREADS, 0)) or core_count()
        if threads > 1:
            threadpool_limits(threads, user_api="blas")
    np.random.seed()  # all forks would draw the same
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())  # type: ignore[union-attr]


def _run(request: Mapping[str, Any]) -> int:
    """Run the script as the main program; its exit status."""
    status = 0
    try:
        _become(request)
        runpy.run_path(request["arguments"][0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            sys.stderr.write(f"{stop.code}\n")
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    return status


def _end(status: int) -> None:
    """End as an interpreter does, but for taking all modules apart, which takes a second."""
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def _not_forkable() -> str:
    """Why forks of this process could go wrong; empty: they cannot."""
    if (threads := threading.active_count()) > 1 or (threads := _system_threads()) > 1:
        return f"{threads} threads run in the warm parent"
    return "CUDA is initialised in the warm parent" if torch.cuda.is_initialized() else ""


def _system_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1


def main(descriptor: int) -> int:
    """Load, then serve; the exit status."""
    with socket.socket(fileno=descriptor) as connection:
        connection.set_inheritable(False)
        for name in HEAVY:
            importlib.import_module(name)
        importlib.import_module("lab.tasks").git_state()  # that of the code loaded here
        if reason := _not_forkable():
            connection.send(json.dumps({"refused": reason}).encode())
            return 1
        gc.collect()
        gc.freeze()  # the collector of a child need not touch, and so copy, what it shares
        try:
            request = _serve(connection)
        except (BrokenPipeError, ConnectionResetError):
            return 0
    if request is not None:
        _end(_run(request))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
