"""The run directory: what a run writes, who may write it, and how it is read again.

config.yaml  overrides.yaml  metrics.csv  summary.json  checkpoints/  plots/  main.log  claim
"""

from __future__ import annotations

import csv
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from crucible.options import ConfigError

SCHEMA = 1
HEARTBEAT_S = 15.0
LOST_AFTER_S = 120.0


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader or a killed process never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
            return list(csv.DictReader(stream))

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
        temporary = self.path / f".metrics.csv.{os.getpid()}.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path / "metrics.csv")

    # who may write: the claim

    def state(self) -> str:
        """`absent`, `finished`, `running` (a live process holds the claim), or `unfinished`."""
        if not (self.path / "config.yaml").is_file():
            return "absent"
        if self._claim_is_live():
            return "running"
        return "finished" if self.summary().get("status") == "finished" else "unfinished"

    def _claim_is_live(self) -> bool:
        try:
            claim = json.loads(self.claim_file.read_text(encoding="utf-8"))
            age = time.time() - self.claim_file.stat().st_mtime
        except (OSError, ValueError):
            return False
        if claim["host"] == socket.gethostname():
            return _process_lives(claim["pid"])
        return age < LOST_AFTER_S

    def claim(self, **facts: Any) -> None:
        """Become the run's only writer, and say so every 15 seconds until `release`.

        Args:
            facts: what the run's other ranks need to know.

        Raises:
            ConfigError: where a live process holds the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._claim_is_live():
            raise ConfigError(
                f"{self.path}: this run is in progress (claim of {self.claim_file.read_text().strip()})"
            )
        self.claim_file.unlink(missing_ok=True)
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), **facts})
        try:
            with self.claim_file.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError:
            raise ConfigError(f"{self.path}: another process has just started this run") from None
        self._stop.clear()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self.claim_file)
            except OSError:
                return

    def release(self) -> None:
        """Give the claim back."""
        self._stop.set()
        self.claim_file.unlink(missing_ok=True)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
