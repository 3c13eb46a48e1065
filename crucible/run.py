"""The run directory: what a run writes, who may write it, and how it is read again.

config.yaml  overrides.yaml  metrics.csv  summary.json  checkpoints/  plots/  main.log  claim  (steps.csv)

Each file is whole at every moment, but for the two that grow (main.log, steps.csv), and so is the record: what the run
is stands in summary.json before config.yaml is there, and a folder is that of a run from config.yaml on. What is
damaged from outside is told apart from what is not there yet: reading it raises `Damaged`, in one line.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from crucible.cells import cell, text_of
from crucible.command_line import command, option
from crucible.configuration import flatten
from crucible.console import epoch_named
from crucible.files import is_abandoned, replacing, temporary_name, write_atomically
from crucible.liveness import lives, this_process
from crucible.metrics import of_split
from crucible.options import ConfigError, is_number
from crucible.writing import unwritable

SCHEMA = 1
HEARTBEAT_S = 15.0
LOST_AFTER_S = 120.0
STEP_COLUMNS = ("epoch", "step", "loss", "lr", "grad_norm", "images_per_s")  # of steps.csv
LOCK_S = 10.0  # a change of hands takes milliseconds
log = logging.getLogger("crucible")
_claims: dict[Path, dict[str, Any]] = {}  # those of this process, by their file


class Held(ConfigError):
    """Another live process holds the run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, see="")


class Damaged(ConfigError):
    """A file of a run's record cannot be read, or is not what belongs there.

    Args:
        file: which.
        why: in a few words.
        way_on: likewise.
    """

    def __init__(self, file: Path, why: str, way_on: str) -> None:
        super().__init__(f"run={file.parent}: {file.name} {why}; {way_on}", see="docs/robustness.md")
        self.file, self.why = file, why


class RunDirectory:
    """One run's folder.

    Args:
        path: `exp_dir/<data name>/<run id>`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stop = threading.Event()
        self._counted_from: float | None = None
        self._sign_of_life: float | None = None
        self._last: dict[str, Any] = {}  # summary as it was last read or written here

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
            Damaged: where the file is not whole.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            raise ConfigError(
                f"run={self.path}: no run there (it has no config.yaml)", see="docs/training.md"
            )
        way_on = "the command that made the run writes it again"
        if typed := self._command():
            way_on += f": {typed}"
        text = _text(file, way_on)
        config = _parsed(file, text, lambda text: yaml.load(text, _LOADER), way_on)
        if not isinstance(config, dict):
            raise Damaged(file, f"is no mapping but {_kind(config)}", way_on)
        recorded, there = self.known().get("options"), len(flatten(config))
        if isinstance(recorded, int) and (there < recorded or not text.endswith("\n")):
            raise Damaged(file, f"is cut off: it has {there} of {recorded} options", way_on)
        return config

    def _resuming(self) -> str:
        return command(option("run", self.path))

    def _command(self) -> str:
        """What was typed, where that is known."""
        try:
            return command(*self.overrides())
        except Damaged:
            return ""

    def overrides(self) -> list[str]:
        """What was typed for the run; empty where no file says it.

        Raises:
            Damaged: where that cannot be read.
        """
        file = self.path / "overrides.yaml"
        if not file.exists():
            return []
        way_on = "config.yaml holds all options; the command that made the run writes it again"
        overrides = _parsed(file, _text(file, way_on), lambda text: yaml.load(text, _LOADER), way_on)
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise Damaged(file, "is no list of texts", way_on)
        return overrides

    def summary(self) -> dict[str, Any]:
        """The recorded summary; empty before the first one is written.

        Raises:
            Damaged: where it cannot be read.
            ConfigError: where a later version of Crucible wrote it.
        """
        file = self.path / "summary.json"
        if not file.exists():
            return {}
        way_on = f"{self._resuming()} makes it anew from config.yaml, metrics.csv and last.ckpt"
        summary = _parsed(file, _text(file, way_on), json.loads, way_on)
        if not isinstance(summary, dict):
            raise Damaged(file, f"is no mapping but {_kind(summary)}", way_on)
        schema = summary.get("schema", SCHEMA)
        if not isinstance(schema, int):
            raise Damaged(file, f"has schema {schema!r}", way_on)
        if schema > SCHEMA:
            raise ConfigError(
                f"run={self.path}: summary.json has schema {schema}, of a later Crucible; this one reads up to "
                f"{SCHEMA}: git pull, or another exp_dir",
                see="CHANGELOG.md",
            )
        self._last = summary
        return dict(summary)

    def known(self) -> dict[str, Any]:
        """The recorded summary, as far as it can be read: empty where it is damaged."""
        try:
            return self.summary()
        except ConfigError:
            return {}

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, as texts.

        Raises:
            Damaged: where one is not whole.
        """
        rows, why = self._readable_metrics()
        if why:
            way_on = f"{self._resuming()} keeps the rows that can be read"
            raise Damaged(self.path / "metrics.csv", why, way_on)
        return rows

    def _readable_metrics(self) -> tuple[list[dict[str, str]], str]:
        """The whole rows of metrics.csv, and what is wrong with the rest."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return [], ""
        try:
            text = _text(file, "")
        except Damaged as error:
            return [], error.why
        lines = text.split("\n")
        try:
            head, *cells = list(csv.reader(lines[:-1])) or [[]]
        except csv.Error:  # of bytes that are no text
            return [], "is damaged, it is no table"
        if "epoch" not in head:
            return [], "has no head"
        rows: list[dict[str, str]] = []
        for row in cells:
            if len(row) == len(head) and all(is_number(value) for value in row if value):
                rows.append(dict(zip(map(text_of, head), row, strict=True)))
        rows = [row for row in rows if row["epoch"].isdigit()]
        lost = len(cells) - len(rows) + bool(lines[-1])
        return rows, f"has {lost} of {len(rows) + lost} rows that are not whole" if lost else ""

    # writing

    def record(self, config: Mapping[str, Any], overrides: list[str], **facts: Any) -> None:
        """Make the folder and write what the run is, `facts` into summary.json.

        config.yaml comes last: where it is, the rest is. A process that is killed before leaves a folder that counts
        as absent.
        """
        for folder in (self.checkpoints, self.path / "plots"):
            folder.mkdir(parents=True, exist_ok=True)
        config = dict(config)
        summary = {"schema": SCHEMA, **facts, "options": len(flatten(config)), "heartbeat": time.time()}
        self._write_summary(summary, sync=True)
        self._put_aside("overrides.yaml", "config.yaml")
        write_atomically(self.path / "overrides.yaml", yaml.safe_dump(list(overrides)), sync=True)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False), sync=True)

    def complete(
        self,
        config: Mapping[str, Any],
        overrides: list[str] | None,
        facts: Callable[[list[dict[str, str]]], Mapping[str, Any]],
    ) -> list[str]:
        """Make the record of a run that was begun whole again; what is whole stays.

        Args:
            config: of the run, which holds for config.yaml where that is missing or damaged.
            overrides: likewise for overrides.yaml; None: what was typed is not known.
            facts: of the rows of metrics.csv, what the summary should say of the run; asked for where it does not.

        Returns:
            what was made anew, in a line each.
        """
        said: list[str] = []
        try:
            summary = self.summary()
        except Damaged as error:
            summary = {}
            said.append(f"summary.json {error.why}; it is made anew from metrics.csv and what the run is")
        else:
            said += (
                []
                if summary
                else ["summary.json was missing; it is made anew from metrics.csv and what the run is"]
            )
        rows, why = self._readable_metrics()
        if rows and not summary and not any(self.checkpoints.glob("*.ckpt")):
            way_on = "no checkpoint is left to go on from; fresh=true trains it anew"
            raise Damaged(self.path / "summary.json", said[0].partition(";")[0].partition(" ")[2], way_on)
        own = {} if summary else self._as_it_stands(rows)
        if own or not {"run_id", "identity", "arm", "seed"} <= summary.keys():
            missing = {**facts(rows), **own, "options": len(flatten(dict(config)))}
            self._write_summary({"schema": SCHEMA, **missing, **summary}, sync=True)
        for name, read, content in (
            ("overrides.yaml", self.overrides, overrides),
            ("config.yaml", self.config, dict(config)),
        ):
            try:
                if (self.path / name).exists():
                    read()
                    continue
                why_not = "was missing"
            except Damaged as error:
                why_not = error.why
            if content is None:
                if why_not != "was missing":
                    said.append(f"{name} {why_not}; what was typed is lost, config.yaml holds all options")
                    self._put_aside(name, always=True)
                continue
            said.append(f"{name} {why_not}; it is written again from this command")
            self._put_aside(name)
            write_atomically(self.path / name, yaml.safe_dump(content, sort_keys=False), sync=True)
        if why:
            kept = ", ".join(epoch_named(int(row["epoch"])) for row in rows) or "none"
            said.append(f"metrics.csv {why}; kept are those of {kept}, the others are lost")
            self._put_aside("metrics.csv", always=True)
            if rows:
                self.write_metrics(rows)
        return said

    def _as_it_stands(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        """What the rows of metrics.csv say of a run whose summary is lost."""
        known: dict[str, Any] = {"status": "unfinished", "reason": "its summary.json was lost", "final": {}}
        with contextlib.suppress(OSError):
            known["started"] = (self.path / "config.yaml").stat().st_mtime
        values = {
            name: [(row["epoch"], float(row[name])) for row in rows if row.get(name)]
            for name in (rows or [{}])[0]
        }
        final = {n: of[-1] for n, of in values.items() if of and of_split(n, "train", "val", "logits")}
        if final:
            known["final"] = {name: value for name, (_, value) in final.items()}
            known["final_epochs"] = {
                n.partition("/")[0]: int(e) for n, (e, _) in final.items() if n[:7] != "logits/"
            }
        if rows and all(values.get(name) for name in ("step", "time/epoch_s", "time/images_per_s")):
            seconds = [value for _, value in values["time/epoch_s"]]
            images = sum(s * r for s, (_, r) in zip(seconds, values["time/images_per_s"], strict=True))
            known |= {
                "epochs": int(rows[-1]["epoch"]) + 1, "steps": int(values["step"][-1][1]),
                "wall_time_s": round(sum(seconds), 2), "images_per_s": round(images / max(sum(seconds), 1e-9), 1),
            }  # fmt: skip
        return known

    def _put_aside(self, *names: str, always: bool = False) -> None:
        """Let nothing that could not be replaced stand where these files go; what is damaged is kept beside."""
        for name in names:
            file = self.path / name
            if file.is_dir() or (always and file.exists()):
                number = 1
                while (aside := file.with_name(f"{name}.damaged-{number}")).exists():
                    number += 1
                file.rename(aside)

    def update_summary(self, **values: Any) -> None:
        """Add to summary.json.

        By the holder of the claim the heartbeat is set to now, and `elapsed_s` to what all parts of the run took.
        """
        self._end_if_taken_over()
        try:
            before = self.summary()
        except Damaged:
            before = dict(self._last)
        now = time.time()
        if self._counted_from is not None:
            values |= {"heartbeat": now, "elapsed_s": round(now - self._counted_from, 2)}
        self._write_summary({**before, **values, "schema": SCHEMA}, sync="status" in values)

    def _write_summary(self, summary: dict[str, Any], sync: bool) -> None:
        self._put_aside("summary.json")
        text = json.dumps(summary, indent=2, default=str) + "\n"
        write_atomically(self.path / "summary.json", text, sync=sync)
        self._last = summary

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv whole: a row an epoch, the columns of all rows."""
        self._end_if_taken_over()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (
            replacing(self.path / "metrics.csv") as file,
            file.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.writer(stream)
            writer.writerow(map(cell, columns))
            writer.writerows([cell(row.get(name, "")) for name in columns] for row in rows)

    def cut_steps(self, last: int) -> None:
        """Take the rows after optimizer step `last` out of steps.csv, if there is one, and what is not whole."""
        file = self.path / "steps.csv"
        if not file.is_file():
            return
        self._end_if_taken_over()
        head, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
        if head.split(",") != list(STEP_COLUMNS):
            lines = []
        rows = [line.split(",") for line in lines]
        kept = [
            r for r in rows if len(r) == len(STEP_COLUMNS) and all(map(is_number, r)) and float(r[1]) <= last
        ]
        write_atomically(file, "".join(",".join(row) + "\n" for row in (STEP_COLUMNS, *kept)))

    def add_step(self, row: Mapping[str, Any]) -> None:
        """Add a row of `STEP_COLUMNS` to the end of steps.csv.

        Raises:
            Unwritable: where it cannot be.
        """
        self._end_if_taken_over()
        file = self.path / "steps.csv"
        try:
            with file.open("a", encoding="utf-8") as stream:
                head = "" if stream.tell() else ",".join(STEP_COLUMNS) + "\n"
                stream.write(head + ",".join(str(row[name]) for name in STEP_COLUMNS) + "\n")
        except OSError as error:
            raise unwritable(file, error) from error

    # who may write: the claim

    def state(self) -> str:
        """`absent`, `finished`, `running` (a live process holds the claim), or `unfinished`.

        A folder of which nothing counts yet, because its maker was killed at once, is absent.
        """
        if not self.path.is_dir():
            return "absent"
        if self._claim_is_live():
            return "running"
        status = self.known().get("status")
        begun = status not in (None, "created") or any(self.checkpoints.glob("*.ckpt"))
        if not (begun or (self.path / "config.yaml").exists()):
            return "absent"
        return "finished" if status == "finished" else "unfinished"

    def read_claim(self) -> dict[str, Any]:
        """The claim as it stands: who holds the run, since when; empty where there is none that can be read."""
        try:
            claim = json.loads(self.claim_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        known = (
            isinstance(claim, dict)
            and isinstance(claim.get("host"), str)
            and isinstance(claim.get("pid"), int)
        )
        return claim if known else {}

    def _claim_is_live(self) -> bool:
        """A claim is lost when its heart has stopped, and on its own machine when its process is gone.

        Of a process of another machine or container the heart alone tells; so it does of a claim that is damaged.
        A claim in this process's own number is one of a process before it: the container was restarted.
        """
        claim = self.read_claim()
        try:
            age = self._file_clock() - self.claim_file.stat().st_mtime
        except OSError:
            return False
        if age >= LOST_AFTER_S:
            return False
        if not claim or (alive := lives(claim)) is None:
            return True
        return claim == _claims.get(self.claim_file) or (claim["pid"] != os.getpid() and alive)

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
                with lock.open("x", encoding="utf-8") as stream:
                    json.dump(this_process(), stream)
                break
            except FileExistsError:
                if self._break(lock):
                    continue
                if time.monotonic() > deadline:
                    raise Held(f"{self.path}: another process has just started this run") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def _break(self, lock: Path) -> bool:
        """Take away the lock of a process that has ended within it; of several that find it, one does."""
        try:
            judged = lock.stat()
            holder = json.loads(lock.read_text(encoding="utf-8") or "null")
            alive = lives(holder) if isinstance(holder, dict) else None
            if alive or (alive is None and self._file_clock() - judged.st_mtime <= LOCK_S):
                return False
            mine = temporary_name(lock)
            lock.rename(mine)
            if (taken := mine.stat()).st_ino == judged.st_ino and taken.st_mtime == judged.st_mtime:
                mine.unlink()
                return True
            with contextlib.suppress(FileExistsError):  # another one was quicker, and this is its lock
                os.link(mine, lock)
            mine.unlink()
        except (OSError, ValueError, KeyError):
            return False
        return False

    def claim(self, **facts: Any) -> None:
        """Become the run's only writer, and say so every 15 seconds until `release`.

        What a process that was killed left half written is removed.

        Args:
            facts: what the run's other ranks need to know.

        Raises:
            Held: where a live process holds the run.
        """
        with self.locked():
            self.path.mkdir(exist_ok=True)
            if self._claim_is_live():
                raise Held(f"{self.path}: this run is in progress ({self.holder()})")
            with contextlib.suppress(OSError):
                self._sign_of_life = self.claim_file.stat().st_mtime
            self._clear_temporaries()
            self._put_aside("claim")
            claim = {**this_process(), "since": time.time(), **facts}
            write_atomically(self.claim_file, json.dumps(claim))
            _claims[self.claim_file] = claim
        self._stop.clear()
        threading.Thread(target=self._beat, args=(claim,), daemon=True).start()

    def clear_up(self) -> None:
        """Remove what a process has left that was killed at its very end: its claim, and files half written."""
        if not os.access(self.path, os.W_OK):
            return
        with contextlib.suppress(OSError, Held), self.locked():
            if not self._claim_is_live():
                self.claim_file.unlink(missing_ok=True)
                self._clear_temporaries()

    def count_from(self, started: float) -> None:
        """Let `elapsed_s` go on from where it stood; after a part that was killed, from its last sign of life.

        Args:
            started: seconds since the epoch at which this part was asked for.
        """
        summary = self.summary()
        elapsed, counted_until = summary.get("elapsed_s"), summary.get("heartbeat", 0.0)
        # the heart beat on after the last update; or a parent saw the end
        seen = [t for t in (self._sign_of_life, summary.get("ended")) if t is not None]
        unseen = max([0.0, *(t - counted_until for t in seen)]) if elapsed is not None else 0.0
        self._counted_from = started - (elapsed or 0.0) - unseen

    def holder(self) -> str:
        """Who holds the claim, in words."""
        claim = self.read_claim()
        if claim:
            return f"on {claim['host']}, process {claim['pid']}"
        if self.claim_file.exists():
            return f"its claim cannot be read; {LOST_AFTER_S:.0f} s after it was written it counts no more"
        return "by nobody"

    def _beat(self, claim: dict[str, Any]) -> None:
        beaten = time.time()
        while not self._stop.wait(HEARTBEAT_S):
            self._end_if_taken_over()
            if self.read_claim() != claim and not self._stop.is_set():
                # removed or damaged by hand; or, while this machine slept, by one that took over and has finished
                if time.time() - beaten > LOST_AFTER_S:
                    self._taken_over()
                with contextlib.suppress(OSError, ConfigError), self.locked():
                    if not self.read_claim():
                        write_atomically(self.claim_file, json.dumps(claim))
            with contextlib.suppress(OSError):
                os.utime(self.claim_file)
                beaten = time.time()

    def _end_if_taken_over(self) -> None:
        """A process that slept for so long that another one took its run writes nothing more."""
        own, there = _claims.get(self.claim_file), self.read_claim()
        if own is not None and there and there != own:
            self._taken_over()

    def _taken_over(self) -> NoReturn:
        log.error("%s: taken over (%s); this process ends", self.path, self.holder())
        os._exit(1)

    def release(self, pid: int | None = None) -> None:
        """Give the claim back: this process's own, or that of a process of this machine that has ended."""
        self._stop.set()
        self._counted_from = None
        own = _claims.pop(self.claim_file, None)
        with contextlib.suppress(OSError, Held), self.locked():
            claim = self.read_claim()
            ended = claim.get("pid") == pid and lives(claim) is False if claim else False
            if claim and (claim == own or ended):
                self.claim_file.unlink(missing_ok=True)

    def _clear_temporaries(self) -> None:
        """Remove what killed processes left half written here, never a live one's."""
        now, beside = self._file_clock(), (".now.*.tmp", f".{self.path.name}.lock.*.tmp")
        found = [file for pattern in beside for file in self.path.parent.glob(pattern)]
        for folder in (self.path, self.checkpoints, self.path / "plots", *self.path.glob("tests/*")):
            found += folder.glob(".*.tmp")
        for file in found:
            with contextlib.suppress(OSError):
                if is_abandoned(file, now - file.stat().st_mtime, LOST_AFTER_S):
                    file.unlink()


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _text(file: Path, way_on: str) -> str:
    """The content of a record's file, which ends with a whole line.

    Raises:
        Damaged: where it cannot be read.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except IsADirectoryError:
        raise Damaged(file, "is a folder", way_on) from None
    except UnicodeDecodeError:
        raise Damaged(file, "is damaged, it is no text", way_on) from None
    except OSError as error:
        raise Damaged(file, f"cannot be read ({error.strerror})", way_on) from None
    if not text.strip():
        raise Damaged(file, "is empty", way_on)
    return text


def _parsed(file: Path, text: str, parse: Callable[[str], Any], way_on: str) -> Any:
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        raise Damaged(file, "is damaged, it cannot be parsed", way_on) from None


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "a mapping", str: "a text", type(None): "nothing"}
    return names.get(type(value), "a number")
