"""The ranks of a run: how they start and find one another, and what they do when one of them dies.

None outlives the process that started it, and none waits for ever for one that has died. Why a run failed is said
once, by the rank whose own error it was; of one that could not say it (it was killed, say) by another. They know one
another through a folder in the run's, one file a rank, which a rank takes away when it ends in good order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import DistError, TCPStore

from callbacks.recorder import Diverged
from crucible.command_line import BAD_INPUT
from crucible.files import write_atomically
from crucible.handover import pass_on, received
from crucible.launch import launch
from crucible.liveness import lives, this_process
from crucible.machine import core_count, device_count, world_size
from crucible.memory import ended_by, kills
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.writing import Unwritable

POLL_S = 0.5
OWN_END_S = 3.0  # for a process to come to its own end once another rank, or its parent, has died
FOLLOW_S = 5.0  # for the cause of an error that may be another rank's
SAVE_S = 30.0  # for an orphan to save its state
WAIT_S = 600.0  # for the other ranks to start
SAY_AFTER_S = 5.0
_FOLLOWING = re.compile(
    r"gloo|nccl|socket|broken pipe|connection (closed|reset|refused|was)|timed? ?out|\bpeer\b", re.IGNORECASE
)
log = logging.getLogger("crucible")
_stores: list[TCPStore] = []  # what the ranks meet at lives as long as this process


def open_meeting(address: str, processes: int) -> None:
    """Have the ranks meet at a port of this process, which no other can take."""
    store = TCPStore(
        address, 0, processes, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_S)
    )
    _stores.append(store)
    go_to_meeting(address, store.port)


def go_to_meeting(address: str, port: int) -> None:
    """Let torch look for the other ranks where a process of theirs has opened a meeting."""
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip


def start_others(command: Sequence[str], trainer: Mapping[str, Any]) -> list[subprocess.Popen[bytes]]:
    """Start the other ranks of this machine; this process is its first.

    Args:
        command: what `python` is given.
        trainer: the options of the run's trainer.
    """
    devices, world, node = device_count(trainer), world_size(trainer), launch().node_rank
    if trainer["num_nodes"] == 1:
        open_meeting("127.0.0.1", world)
    if "OMP_NUM_THREADS" not in os.environ:  # each rank with all cores would be slower than with its share
        threads = max(1, core_count() // devices)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    pass_on(place=[node * devices, 0, node, world])
    children = []
    for local in range(1, devices):
        place = [node * devices + local, local, node, world]
        told = replace(received(), place=place, parent=this_process(), does_the_work=True)
        environment = {**os.environ, **told.environment()}
        children.append(subprocess.Popen([sys.executable, *command], env=environment))
    return children


def end_others(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Let the processes come to their end within so many seconds."""
    deadline = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        child.kill()


def end_with_parent(ended: threading.Event, stop: bool) -> None:
    """Watch, in a thread, the process that this one is not to outlive.

    Args:
        ended: set when this process ends on its own.
        stop: ask this process to stop and save its state first, as SIGTERM does.
    """
    parent = received().parent
    if parent is not None:
        threading.Thread(target=_follow, args=(parent, ended, stop), daemon=True).start()


def _follow(parent: Mapping[str, Any], ended: threading.Event, stop: bool) -> None:
    while lives(parent) is not False:
        if ended.wait(POLL_S):
            return
    if stop:
        log.error("the process that started this one has ended (%s): it stops", parent["pid"])
        os.kill(os.getpid(), signal.SIGTERM)
    ended.wait(SAVE_S if stop else OWN_END_S)
    if stop and ended.is_set():
        return  # it is writing what became of it
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def end_with_children(children: Sequence[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """Watch, in a thread, the ranks that this process has started: without one of them the others wait for ever.

    Args:
        children: from the first rank on.
        ended: set when this process ends on its own.
    """
    if children:
        threading.Thread(target=_mourn, args=(children, ended), daemon=True).start()


def _mourn(children: Sequence[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    began = kills()
    while not ended.wait(POLL_S):
        dead = next(
            (_Dead(rank, child.poll()) for rank, child in enumerate(children, 1) if child.poll()), None
        )
        if dead is None or ended.wait(OWN_END_S):
            continue
        status = dead.status or 0
        how = ended_by(-status, began) if status < 0 else f"ended with status {status}"
        if status not in (1, BAD_INPUT):  # else it has said why
            print(f"error: rank {dead.rank}: {how}", file=sys.stderr, flush=True)
        end_others(children, 0)
        os._exit(max(status, 1))


class Cause(NamedTuple):
    """Why a run did not go on.

    Attributes:
        reason: in a line.
        said: another process has told the user, or will.
        killed: a process was killed; nothing is known to be wrong with the run.
    """

    reason: str
    said: bool = False
    killed: bool = False


class _Dead(NamedTuple):
    rank: int
    status: int | None  # of its process, negative for a signal; None: not known here


def last_word(run: RunDirectory, name: str) -> Cause | None:
    """What a rank of the start `name` has said of its error."""
    try:
        content = json.loads((_folder(run, name) / "error.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Cause(content["reason"], True, content["killed"])


def clear_away(run: RunDirectory, name: str) -> None:
    """Remove what the ranks of the start `name` have left."""
    shutil.rmtree(_folder(run, name), ignore_errors=True)


def clear_away_earlier(run: RunDirectory, name: str) -> None:
    """Remove what the ranks of all other starts have left; the run is this process's, started as `name`."""
    for folder in run.path.glob("ranks.*"):
        if folder != _folder(run, name):  # a rank of this start may have come before this one
            shutil.rmtree(folder, ignore_errors=True)


def _folder(run: RunDirectory, name: str) -> Path:
    return run.path / f"ranks.{name}"


class Ranks:
    """This process among those of a run, from its start until `leave` or `cause`.

    Args:
        run: that they train.
        name: of this start of the run, which they have in common.
        children: the ranks that this process has started, from the first on.
    """

    def __init__(
        self, run: RunDirectory, name: str, children: Sequence[subprocess.Popen[bytes]] = ()
    ) -> None:
        self.run, self.children = run, children
        self._name, self._folder, self._launch = name, _folder(run, name), launch()
        self._ended, self._speaking, self._kills = threading.Event(), threading.Lock(), kills()
        self._known: dict[int, dict[str, Any]] = {}
        self._dead_since: float | None = None
        self._conclude: Callable[[Cause], None] = lambda cause: None
        started_by_rank_0 = self._launch.by == "crucible" and self._launch.local_rank > 0
        end_with_parent(self._ended, stop=not started_by_rank_0)
        if self._launch.world > 1:
            self._folder.mkdir(exist_ok=True)
            write_atomically(self._entry(self._launch.rank), json.dumps(this_process()))

    def watch(self, conclude: Callable[[Cause], None]) -> None:
        """Look, in a thread, after the other ranks.

        Args:
            conclude: records why the run ends, where this process itself cannot any more: it waits in a collective
                for a rank that has died.
        """
        self._conclude = conclude
        if self._launch.world > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """This process ends in good order."""
        self._ended.set()
        if self._launch.world > 1:
            self._entry(self._launch.rank).unlink(missing_ok=True)
        end_others(self.children, 2 * FOLLOW_S)
        if self._launch.rank == 0 and self._launch.world > 1:
            clear_away(self.run, self._name)

    def cause(self, error: BaseException, text: str) -> Cause:
        """Why this process does not go on: its own error, or another rank's that this one only follows from.

        Args:
            error: what was raised here.
            text: it, in a line.
        """
        with self._speaking:
            self._ended.set()
        if self._launch.world == 1:
            return Cause(text)
        shared = isinstance(error, (Diverged, Unwritable))  # every rank has it
        if shared and self._launch.rank > 0:
            return Cause(text, said=True)
        deadline = time.monotonic() + (FOLLOW_S if follows(error) else 0)
        while time.monotonic() < deadline:
            if (found := last_word(self.run, self._name)) is not None:
                return found
            if (dead := self._dead()) is not None:
                return self._cause_of_death(dead)
            time.sleep(0.05)
        of_all = shared or isinstance(error, ConfigError)  # it is no matter of one rank
        return self._tell(Cause(text if of_all else f"rank {self._launch.rank}: {text}"))

    def failed(self) -> None:
        """What is to be said and recorded of this process's error has been; the ranks that it started end."""
        end_others(self.children, OWN_END_S)

    # the others

    def _entry(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _missing(self) -> list[int]:
        """The ranks that have not started yet."""
        for rank in range(self._launch.world):
            if rank not in self._known:
                with contextlib.suppress(OSError, ValueError):
                    self._known[rank] = json.loads(self._entry(rank).read_text(encoding="utf-8"))
        return [rank for rank in range(self._launch.world) if rank not in self._known]

    def _dead(self) -> _Dead | None:
        """A rank that has ended and not in good order; one on another machine is not seen."""
        self._missing()
        first = self._launch.rank + 1
        for rank, child in enumerate(self.children, first):
            status = child.poll()
            if status is not None and (status != 0 or self._entry(rank).exists()):
                return _Dead(rank, status)
        for rank, process in self._known.items():
            if (
                rank != self._launch.rank
                and lives(process) is False
                and self._entry(rank).exists()
                and not first <= rank < first + len(self.children)
            ):
                return _Dead(rank, None)
        return None

    def _watch(self) -> None:
        began, met, said = time.monotonic(), False, False
        patience = SAY_AFTER_S * (6 if self._launch.by == "crucible" else 1)  # we know that they are starting
        while not self._ended.wait(POLL_S):
            dead = self._dead()
            if dead is not None or last_word(self.run, self._name) is not None:
                if not self._ended.wait(OWN_END_S):
                    self._give_up(dead)
                return
            waited = time.monotonic() - began
            if not met and not (missing := self._missing()):
                met = True
            elif not met and waited > WAIT_S:
                self._give_up(_Dead(missing[0], None), f"did not start within {WAIT_S:.0f} s")
            elif not met and waited > patience and not said:
                said = True
                names = ", ".join(map(str, missing))
                print(
                    f"rank {self._launch.rank}: waiting for rank {names} of {self._launch.world} to start "
                    f"(at most {WAIT_S:.0f} s)", flush=True,
                )  # fmt: skip

    def _give_up(self, dead: _Dead | None, why: str = "") -> None:
        """The main thread waits for what will not come; this one ends the process."""
        with self._speaking:
            if self._ended.is_set():
                return
            found = last_word(self.run, self._name)
            if found is None and dead is not None:
                found = self._tell(Cause(f"rank {dead.rank} {why}")) if why else self._cause_of_death(dead)
            cause = found or Cause("another rank has ended", said=True)
            with contextlib.suppress(Exception):
                self._conclude(cause)
            self.failed()
            os._exit(128 + signal.SIGKILL if cause.killed else 1)

    # what is said

    def _tell(self, cause: Cause) -> Cause:
        """Say it for all ranks, unless another one has said something."""
        try:
            with (self._folder / "error.json").open("x", encoding="utf-8") as stream:
                json.dump({"reason": cause.reason, "killed": cause.killed}, stream)
        except FileExistsError:
            time.sleep(0.1)  # it may be half written
            return last_word(self.run, self._name) or cause._replace(said=True)
        except OSError:
            pass
        return cause

    def _cause_of_death(self, dead: _Dead) -> Cause:
        """Of a rank that could not say it itself."""
        for _ in range(10):  # its own word may still be on its way
            if (found := last_word(self.run, self._name)) is not None:
                return found
            time.sleep(0.1)
        rank, status = dead
        if rank == 0 and self._launch.by == "crucible":  # the process that started the run sees it better
            return Cause("rank 0 has ended", said=True)
        killed = status == -signal.SIGKILL
        if status is None:
            killed, how = True, ended_by(signal.SIGKILL, self._kills)
            how = f"ended without a word, most likely {how}"
        elif status < 0:
            how = ended_by(-status, self._kills)
        else:
            how = f"ended with status {status} and no error of its own; {self.run.path / 'main.log'} may say more"
        cause = self._tell(Cause(f"rank {rank}: {how}", killed=killed))
        if rank == 0 and not cause.said:
            self._record_for_rank_0(cause)
        return cause

    def _record_for_rank_0(self, cause: Cause) -> None:
        """The one that keeps the run's record has died, and no process of ours started it."""
        status = "interrupted" if cause.killed else "failed"
        self.run.update_summary(status=status, reason=cause.reason, ended=time.time())
        self.run.release(self._known[0]["pid"])


def follows(error: BaseException | None) -> bool:
    """Whether an error may come of another rank's end."""
    while error is not None:
        if isinstance(error, DistError | ConnectionError) or (
            isinstance(error, RuntimeError) and _FOLLOWING.search(str(error))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
