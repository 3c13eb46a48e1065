"""The run directory: what a run writes, who may write it, and how it is read again.

config.yaml  overrides.yaml  metrics.csv  summary.json  checkpoints/  plots/  main.log  claim
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from crucible.cells import cell, text_of
from crucible.files import replacing, temporary_name, write_atomically
from crucible.options import ConfigError

SCHEMA = 1
HEARTBEAT_S = 15.0
LOST_AFTER_S = 120.0
LOCK_S = 10.0  # a change of hands takes milliseconds
log = logging.getLogger("crucible")
_claims: dict[Path, dict[str, Any]] = {}  # those of this process, by their file


class Held(ConfigError):
    """Another live process holds the run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, see="")


class RunDirectory:
    """One run's folder.

    Args:
        path: `exp_dir/<data name>/<run id>`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stop = threading.Event()

    # what lies where

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def claim_file(self) -> Path:
        return self.path / "claim"

    def checkpoint(self, name: str) -> Path:
        """A checkpoint by name (`best`, `last`) or path.

        Raises:
            ConfigError: where there is none of this name.
        """
        named = self.checkpoints / (name if name.endswith(".ckpt") else f"{name}.ckpt")
        found = next((p for p in (named, Path(name)) if p.is_file()), None)
        if found is None:
            there = ", ".join(sorted(p.stem for p in self.checkpoints.glob("*.ckpt"))) or "none"
            raise ConfigError(f"ckpt_path={name}: no such checkpoint in {self.path}; there are: {there}")
        return found

    def pick_checkpoint(self, name: str | None) -> Path:
        """The named checkpoint; without a name best.ckpt, or last.ckpt where the run kept no best.

        Raises:
            ConfigError: where there is none.
        """
        if name not in (None, "best"):
            return self.checkpoint(str(name))
        has_best = (self.checkpoints / "best.ckpt").is_file()
        has_last = (self.checkpoints / "last.ckpt").is_file()
        return self.checkpoint("best" if has_best or (name == "best" and not has_last) else "last")

    # reading

    def config(self) -> dict[str, Any]:
        """The recorded configuration.

        Raises:
            ConfigError: where the folder holds no run.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"run={self.path}: no run there (it has no config.yaml)", see="README.md")
        return yaml.safe_load(file.read_text(encoding="utf-8"))

    def summary(self) -> dict[str, Any]:
        """The recorded summary; empty before the first one is written."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, as texts."""
        file = self.path / "metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return [{text_of(name): text_of(value or "") for name, value in row.items()} for row in rows]

    # writing

    def record(self, config: Mapping[str, Any], overrides: list[str]) -> None:
        """Make the folder and write what the run is."""
        for folder in (self.checkpoints, self.path / "plots"):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_atomically(self.path / "overrides.yaml", yaml.safe_dump(list(overrides)))

    def update_summary(self, **values: Any) -> None:
        """Add to summary.json; the heartbeat is set to now."""
        summary = {"schema": SCHEMA, **self.summary(), **values, "heartbeat": time.time()}
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv whole: a row an epoch, the columns of all rows."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (
            replacing(self.path / "metrics.csv") as file,
            file.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.writer(stream)
            writer.writerow(map(cell, columns))
            writer.writerows([cell(row.get(name, "")) for name in columns] for row in rows)

    # who may write: the claim

    def state(self) -> str:
        """`absent`, `finished`, `running` (a live process holds the claim), or `unfinished`."""
        if not (self.path / "config.yaml").is_file():
            return "absent"
        if self._claim_is_live():
            return "running"
        return "finished" if self.summary().get("status") == "finished" else "unfinished"

    def _read_claim(self) -> dict[str, Any]:
        """The claim as it stands; empty where there is none."""
        try:
            return json.loads(self.claim_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _claim_is_live(self) -> bool:
        """A claim is lost when its heart has stopped, and on its own machine when its process is gone.

        A claim in this process's own number is one of a process before it: the container was restarted.
        """
        claim = self._read_claim()
        try:
            age = self._file_clock() - self.claim_file.stat().st_mtime
        except OSError:
            return False
        if not claim or age >= LOST_AFTER_S:
            return False
        if claim["host"] != socket.gethostname():
            return True
        return claim == _claims.get(self.claim_file) or (
            claim["pid"] != os.getpid() and _process_lives(claim["pid"])
        )

    def _file_clock(self) -> float:
        """Now, by the clock that stamps the files here (a file server's may differ from ours)."""
        probe = temporary_name(self.path.with_name("now"))
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        except OSError:
            return time.time()
        return now

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for the moment in which it changes hands.

        Raises:
            Held: where another process holds it for longer than that.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # beside the folder, which may be put aside meanwhile
        lock, deadline = self.path.with_name(f".{self.path.name}.lock"), time.monotonic() + LOCK_S
        while True:
            try:
                lock.open("x").close()
                break
            except FileExistsError:
                if time.monotonic() > deadline:
                    with contextlib.suppress(OSError):
                        if self._file_clock() - lock.stat().st_mtime > LOCK_S:  # its process died within it
                            lock.unlink(missing_ok=True)
                            continue
                    raise Held(f"{self.path}: another process has just started this run") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def claim(self, **facts: Any) -> None:
        """Become the run's only writer, and say so every 15 seconds until `release`.

        Args:
            facts: what the run's other ranks need to know.

        Raises:
            Held: where a live process holds the run.
        """
        with self.locked():
            self.path.mkdir(exist_ok=True)
            if self._claim_is_live():
                raise Held(f"{self.path}: this run is in progress ({self.holder()})")
            claim = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), **facts}
            write_atomically(self.claim_file, json.dumps(claim))
            _claims[self.claim_file] = claim
        self._stop.clear()
        threading.Thread(target=self._beat, args=(claim,), daemon=True).start()

    def holder(self) -> str:
        """Who holds the claim, in words."""
        claim = self._read_claim()
        return f"on {claim.get('host')}, process {claim.get('pid')}" if claim else "by nobody"

    def _beat(self, claim: dict[str, Any]) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            there = self._read_claim()
            if there and there != claim:  # this machine slept, and another one took over
                log.error("%s: taken over (%s); this process ends", self.path, self.holder())
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(self.claim_file)

    def release(self, pid: int | None = None) -> None:
        """Give the claim back: this process's own, or that of a process of this machine that has ended."""
        self._stop.set()
        claim = self._read_claim()
        ended = (claim.get("host"), claim.get("pid")) == (socket.gethostname(), pid)
        if claim and (claim == _claims.pop(self.claim_file, None) or ended):
            self.claim_file.unlink(missing_ok=True)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
