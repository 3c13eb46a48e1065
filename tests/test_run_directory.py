"""The record of a run: complete at every moment, told apart from another's, and mended or refused where damaged."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import damage
import pytest
import torch
import yaml
from conftest import ROOT, end_group, nightly, summary_of

from crucible import load_run
from crucible.files import replacing, temporary_name
from crucible.liveness import lives, this_process
from crucible.options import ConfigError
from crucible.run import LOST_AFTER_S, SCHEMA, Damaged, Held, RunDirectory
from lab.recorded import completed

STATE = damage.STATE
COMMAND = [*STATE, "technique=[sam,mixup]"]
DEAD = 2**22 + 1  # above the largest number of a process
FACTS = (
    "run_id", "identity", "identity_hash", "seed", "data", "arm", "techniques", "kind", "corrected", "data_fingerprint",
    "classes", "passes",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs with techniques."""
    folder = tmp_path_factory.mktemp("made")
    done = damage.main_in_process(folder, *COMMAND)
    assert done.status == 0, done.err
    (run,) = damage.runs_in(folder)
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The same, where the same command finds it."""
    run = tmp_path / "experiments" / "synthetic" / finished.name
    shutil.copytree(finished, run)
    return run


def set_summary(run: Path, **values: object) -> None:
    summary = {**summary_of(run), **values}
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if v is not None}))


def one_line(outcome: damage.Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


# facts first


def unfinished_states(run: Path) -> Iterator[str]:
    """What processes that were killed while they began a run leave, of this version and of earlier ones."""
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics.csv", "test_correct.npz", "test_correct_best.npz", "test.json"):
        (run / name).unlink(missing_ok=True)
    facts = summary_of(run)
    begun = {k: facts[k] for k in (*FACTS, "schema", "resolved", "options")}
    (run / "summary.json").unlink()
    yield "config.yaml but no summary.json"
    (run / "summary.json").write_text(json.dumps({**begun, "status": "created", "final": {}, "best": {}}))
    (run / "config.yaml").unlink()
    yield "summary.json but no config.yaml"


@pytest.mark.parametrize("state", [0, 1])
@pytest.mark.parametrize("by", ["the same command", "run=RUN"])
def test_a_run_killed_while_it_began_has_all_facts(cli, copied: Path, by: str, state: int) -> None:
    whole = summary_of(copied)
    states = unfinished_states(copied)
    for _ in range(state + 1):
        found = next(states)
    if by == "run=RUN" and "no config.yaml" in found:
        assert RunDirectory(copied).state() == "absent"
        one_line(cli(f"run={copied}"), "no run there")
        return
    outcome = cli(*COMMAND) if by == "the same command" else cli(f"run={copied}")
    assert outcome.status == 0, outcome.err
    again = summary_of(copied)
    assert {name: again.get(name) for name in FACTS} == {name: whole[name] for name in FACTS}
    assert again["status"] == "finished" and again["arm"] == "mixup+sam"
    assert again["final"] == pytest.approx(whole["final"])


class Killed(BaseException):
    """The process ends here."""


def test_a_run_killed_before_any_renaming_is_recorded_whole_or_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, config = Path.replace, {"seed": 0, "model": {"lr": 0.1}}
    for kill in range(4):
        run, renamed = RunDirectory(tmp_path / str(kill)), []

        def killed_before(self: Path, target: Path, kill: int = kill, renamed: list = renamed) -> Path:
            if len(renamed) == kill:
                raise Killed
            renamed.append(target)
            return replace(self, target)

        with monkeypatch.context() as patch, pytest.raises(Killed) if kill < 3 else nullcontext():
            patch.setattr(Path, "replace", killed_before)
            run.record(config, ["seed=0"], status="created", arm="a", identity="i")
        assert run.state() == ("absent" if kill < 3 else "unfinished")
        if run.state() == "absent":
            run.record(config, ["seed=0"], status="created", arm="a", identity="i")
        assert run.summary()["arm"] == "a" and run.config() == config and run.overrides() == ["seed=0"]


# identity


def test_a_folder_of_the_same_eight_digits_is_not_taken_for_this_run(cli, copied: Path) -> None:
    full = summary_of(copied)["identity_hash"]
    assert len(full) == 64 and copied.name == f"{full[:8]}-s0"
    assert "finished before" in cli(*COMMAND).out
    set_summary(copied, identity_hash=full[:8] + "0" * 56)
    one_line(cli(*COMMAND), str(copied), "another run", full[:16], "another exp_dir")


def test_an_older_folder_is_compared_by_its_options_and_then_has_the_hash(cli, copied: Path) -> None:
    full = summary_of(copied)["identity_hash"]
    config = yaml.safe_load((copied / "config.yaml").read_text())
    del config["model"]["swa_start"], config["data"]["module"]["class_map"]  # options of later versions
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    set_summary(copied, identity_hash=None, options=None)
    assert "finished before" in cli(*COMMAND).out
    assert summary_of(copied)["identity_hash"] == full
    set_summary(copied, identity_hash=None)
    config["model"]["lr"] = 0.7
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    one_line(cli(*COMMAND), str(copied), "model.lr is 0.7 there", "another exp_dir")


# versions


def test_a_summary_of_a_later_version_is_refused(cli, copied: Path) -> None:
    set_summary(copied, schema=SCHEMA + 1)
    for command in ([f"run={copied}"], [f"run={copied}", "task=test"]):
        one_line(cli(*command), "summary.json", f"schema {SCHEMA + 1}", "later Crucible")
    with pytest.raises(ConfigError, match="later Crucible"):
        load_run(copied)
    set_summary(copied, schema=0)
    assert "finished before" in cli(f"run={copied}").out


def test_a_recorded_configuration_that_lacks_newer_options_runs(cli, copied: Path) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    gone = ("summary_depth", "reproducible", "user_dir", "model.swa_start", "model.compile", "model.num_classes",
            "data.cv", "data.module.class_map", "data.module.folds", "trainer.profiler", "checkpoint.mode",
            "checkpoint.every_steps", "test_after_training")  # fmt: skip
    for name in gone:
        *groups, leaf = name.split(".")
        node = config
        for group in groups:
            node = node[group]
        del node[leaf]
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    set_summary(copied, options=None, status="interrupted")
    whole = summary_of(copied)["final"]
    for more in ([], ["task=test", "data.module.prefetch_factor=4"]):
        outcome = cli(f"run={copied}", *more)
        assert outcome.status == 0, outcome.err
    assert summary_of(copied)["final"] == pytest.approx(whole)
    assert not (copied / "tests").exists(), "they are the run's own data, read as it read them"
    assert load_run(copied).config["checkpoint"]["mode"] is None


def test_a_recorded_option_that_is_no_more_is_named(cli, copied: Path) -> None:
    text = (copied / "config.yaml").read_text()
    for place, name in (("model:\n", "model.frobnicate"), ("  module:\n", "data.module.frobnicate")):
        indent = " " * (2 + len(place) - len(place.lstrip()))
        (copied / "config.yaml").write_text(text.replace(place, f"{place}{indent}frobnicate: 3\n", 1))
        for task in ("train", "test"):
            one_line(cli(f"run={copied}", f"task={task}"), str(copied), f"{name}=3", "another version")


# damage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.make_run(tmp_path_factory.mktemp("damage") / "made")


QUICK = [
    damage.Case("summary.json", "truncated", "task=test"),
    damage.Case("summary.json", "garbage", "run=RUN"),
    damage.Case("summary.json", "a folder", "report.py"),
    damage.Case("config.yaml", "truncated", "run=RUN"),
    damage.Case("config.yaml", "a list", "load_run"),
    damage.Case("metrics.csv", "garbage", "load_run"),
    damage.Case("overrides.yaml", "garbage", "run=RUN"),
    damage.Case("claim", "empty", "run=RUN"),
    damage.Case("test.json", "a list", "report.py"),
]


def cells() -> list:
    return [*QUICK, *nightly(*(case for case in damage.cases() if case not in QUICK))]


@pytest.mark.parametrize("case", cells(), ids=str)
def test_a_damaged_record_is_mended_or_refused_in_one_line(
    made: Path, tmp_path: Path, case: damage.Case
) -> None:
    assert damage.problem(case, damage.outcome(made, tmp_path, case)) == ""


def test_a_summary_is_made_anew_from_what_the_run_is_and_measured(cli, copied: Path) -> None:
    whole = summary_of(copied)
    (copied / "summary.json").write_text('{"status": "fin')
    outcome = cli(f"run={copied}")
    assert outcome.status == 0 and f"note: {copied}: summary.json is damaged" in outcome.out
    again = summary_of(copied)
    exact = (*FACTS, "status", "epochs", "steps", "final_epochs", "best", "parameters")
    assert {n: again.get(n) for n in exact} == {n: whole[n] for n in exact}
    assert again["final"] == pytest.approx(whole["final"])
    for name in ("wall_time_s", "images_per_s"):
        assert again[name] == pytest.approx(whole[name], rel=0.05), name


def test_a_summary_that_nothing_is_left_to_make_anew_from_is_said(cli, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    (copied / "summary.json").write_bytes(b"")
    one_line(cli(*COMMAND), "summary.json is empty", "no checkpoint is left", "fresh=true")


def test_the_whole_rows_of_metrics_are_kept_and_the_lost_ones_named(cli, copied: Path) -> None:
    text = (copied / "metrics.csv").read_text()
    (copied / "metrics.csv").write_text(text[:-7])
    with pytest.raises(Damaged, match="1 of 2 rows"):
        load_run(copied)
    outcome = cli(f"run={copied}")
    assert "kept are those of epoch 1, the others are lost" in outcome.out
    with (copied / "metrics.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["0"]
    assert (copied / "metrics.csv.damaged-1").read_text() == text[:-7]
    assert "note" not in cli(f"run={copied}").out


def test_a_damaged_neighbour_stops_no_sweep(cli, copied: Path) -> None:
    (copied / "summary.json").write_bytes(b"\0\1")
    planned = cli("-m", *STATE, "seed=1,2", "dry_run=true")
    assert planned.status == 0, planned.err


# times


SLOW = """
import os, signal, time
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_end(self, trainer, *rest):
        time.sleep(0.1)
        if Path("stop").exists() and trainer.global_step == int(Path("stop").read_text()):
            os.kill(os.getpid(), signal.SIGTERM)
"""


def counted(run: Path) -> tuple[int, float]:
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("Recorder"))
    return state["images"], state["train_seconds"]


@pytest.mark.parametrize("steps", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_the_time_and_images_of_an_epoch_that_was_stopped_are_all_counted(
    cli, tmp_path: Path, steps: int
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "slow.py").write_text(SLOW)
    command = [*STATE, "trainer.max_epochs=1", "user_dir=mine", "+callbacks.slow._target_=slow.Slow"]
    assert cli(*command, "exp_dir=whole").status == 0
    (tmp_path / "stop").write_text(str(steps))
    assert cli(*command, "exp_dir=stopped").status == 128 + signal.SIGTERM
    (tmp_path / "stop").unlink()
    (stopped,) = damage.runs_in(tmp_path / "stopped")
    first = summary_of(stopped)["elapsed_s"]
    assert cli(*command, "exp_dir=stopped").status == 0
    (whole,) = damage.runs_in(tmp_path / "whole")
    assert counted(stopped)[0] == counted(whole)[0] > 0
    (row,), (whole_row,) = RunDirectory(stopped).metrics(), RunDirectory(whole).metrics()
    batches = int(whole_row["step"])
    for seconds in (float(row["time/epoch_s"]), summary_of(stopped)["wall_time_s"], counted(stopped)[1]):
        assert 0.1 * batches <= seconds <= summary_of(stopped)["elapsed_s"]
    images = float(row["time/epoch_s"]) * float(row["time/images_per_s"])
    assert images == pytest.approx(counted(whole)[0], rel=0.01)
    assert summary_of(stopped)["elapsed_s"] > first + 0.1 * (batches - steps)


def test_the_time_of_parts_that_were_killed_counts_by_their_heart(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({"seed": 0}, [])
    run.claim()
    run.count_from(time.time() - 100)
    run.update_summary(status="running")
    assert run.summary()["elapsed_s"] == pytest.approx(100, abs=5)
    run.release()
    set_summary(run.path, heartbeat=time.time() - 1000)
    # its heart beat for 700 seconds more; it was killed 300 seconds ago
    run.claim_file.write_text(json.dumps({**this_process(), "pid": DEAD}))
    os.utime(run.claim_file, (time.time() - 300,) * 2)
    again = RunDirectory(run.path)
    again.claim()
    again.count_from(time.time() - 10)
    again.update_summary(status="finished", ended=time.time())
    assert again.summary()["elapsed_s"] == pytest.approx(100 + 700 + 10, abs=5)
    again.release()
    again.update_summary(rival_of="a")  # of a sweep, later
    assert again.summary()["elapsed_s"] == pytest.approx(810, abs=5)


# temporary files and locks


def test_what_a_killed_process_left_half_written_is_removed_and_a_live_ones_is_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({"seed": 0}, [])
    own = this_process()
    space = "".join(c for c in own.get("space", "") if c.isdigit())
    mark = f"-{own['start']}-{space}" if space else ""
    host, file = socket.gethostname(), "checkpoints/.last.ckpt"

    def left(name: str, age: float = 0.0) -> Path:
        path = run.path / name
        path.write_bytes(b"half a checkpoint")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
        return path

    dead = [
        left(f"{file}.{host}.{DEAD}.tmp"), left(f"{file}.{host}.{DEAD}{mark}.tmp"),
        left(f".summary.json.another.{os.getppid()}.tmp", age=LOST_AFTER_S + 1),
        left(f"plots/.a.png.{host}.{DEAD}.tmp"), left(f"../.now.{host}.{DEAD}.tmp"),
    ]  # fmt: skip
    live = [
        left(f"{file}.{host}.{os.getppid()}.tmp", age=LOST_AFTER_S + 1), left(f"{file}.another.1.tmp"),
        temporary_name(run.checkpoints / "best.ckpt"), left("main.log"),
    ]  # fmt: skip
    live[2].touch()
    if space:
        dead.append(left(f"{file}.{host}.{os.getpid()}-1-{space}.tmp"))  # the number is used again
        live.append(left(f"{file}.{host}.{DEAD}-1-99.tmp"))  # of another container
    run.claim()
    run.release()
    assert [p for p in dead if p.exists()] == []
    assert [p for p in live if not p.exists()] == []


def test_the_lock_of_a_process_that_died_within_it_is_broken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    lock = tmp_path / ".run.lock"
    lock.write_text(json.dumps({**this_process(), "pid": DEAD}))
    began = time.monotonic()
    with run.locked():
        assert json.loads(lock.read_text()) == this_process()
    assert time.monotonic() - began < 5 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr("crucible.run.LOCK_S", 0.2)
    for alive in (
        {**this_process(), "pid": os.getppid(), "start": _start_of_parent()},
        {"host": "another", "pid": 1},
    ):
        lock.write_text(json.dumps(alive))
        os.utime(lock, (time.time() + 60,) * 2)
        with pytest.raises(Held), run.locked():
            pass
        assert json.loads(lock.read_text()) == alive


def _start_of_parent() -> int | None:
    try:
        return int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def test_a_file_that_is_written_to_the_disk_is_synced_before_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        happened.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    with replacing(tmp_path / "a", sync=True) as file:
        file.write_text("a")
    assert happened == ["file", "name", "folder"]
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="a folder stands where"), replacing(tmp_path / "b"):
        pass


# who lives


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.record({"seed": 0}, [])
    return run


def claimed_by(run: RunDirectory, process: dict, age: float = 0.0) -> str:
    run.claim_file.write_text(json.dumps(process))
    os.utime(run.claim_file, (time.time() - age,) * 2)
    return run.state()


def test_a_zombie_is_not_alive(run: RunDirectory) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    child = subprocess.Popen(["sleep", "0"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert claimed_by(run, {"host": socket.gethostname(), "pid": child.pid}) == "unfinished"
    child.wait()


def test_a_number_that_is_used_again_is_another_process(run: RunDirectory) -> None:
    own = this_process()
    if "start" not in own:
        pytest.skip("no /proc here")
    parent = {**own, "pid": os.getppid(), "start": _start_of_parent()}
    assert claimed_by(run, parent) == "running"
    assert claimed_by(run, {**parent, "start": parent["start"] + 1}) == "unfinished"
    for place in ("boot", "space"):  # of another machine or container the heart alone tells
        other = {**parent, place: "another"}
        assert lives(other) is None
        assert claimed_by(run, {**other, "pid": DEAD}) == "running"
        assert claimed_by(run, other, age=LOST_AFTER_S + 1) == "unfinished"
        assert claimed_by(run, {**other, "pid": os.getpid()}) == "running", "another container's process 1"
        run.release(os.getpid())
        assert run.claim_file.exists(), "it is not ours to give back"


def test_where_there_is_no_proc_the_number_has_to_do(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crucible.liveness._place", dict)
    monkeypatch.setattr("crucible.liveness._state_and_start", lambda pid: ("", None))
    monkeypatch.setattr("crucible.liveness._proc_is_of_this_space", lambda: False)
    assert this_process() == {"host": socket.gethostname(), "pid": os.getpid()}
    assert temporary_name(run.path / "a").name == f".a.{socket.gethostname()}.{os.getpid()}.tmp"
    assert claimed_by(run, {**this_process(), "pid": os.getppid()}) == "running"
    assert claimed_by(run, {**this_process(), "pid": DEAD}) == "unfinished"
    run.claim()
    assert run.state() == "running"
    run.release()


HOLD = (
    "import sys\n"
    "from crucible.run import RunDirectory, Held\n"
    "run = RunDirectory(sys.argv[1])\n"
    "try: run.claim(); print('mine', flush=True); sys.stdin.read(); run.release()\n"
    "except Held: print('held', flush=True)\n"
)


def holder(run: RunDirectory, *around: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*around, sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_containers_of_one_name_leave_each_others_run_alone(run: RunDirectory) -> None:
    container = ("unshare", "--pid", "--fork", "--mount-proc")
    try:
        if subprocess.run([*container, "true"], capture_output=True).returncode:
            pytest.skip("unshare --pid is not allowed here (it takes root)")
    except FileNotFoundError:
        pytest.skip("no unshare here")
    first = holder(run, *container)
    try:
        assert first.stdout.readline() == "mine\n"  # type: ignore[union-attr]
        claim = json.loads(run.claim_file.read_text())
        assert claim["pid"] == 1 and claim["host"] == socket.gethostname()
        second = holder(run, *container)
        assert second.communicate("", timeout=60)[0] == "held\n"
        assert holder(run).communicate("", timeout=60)[0] == "held\n"
        assert first.communicate("", timeout=60)[0] == "" and not run.claim_file.exists()
    finally:
        end_group(first)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["took it over", "took it over and has finished"])
def test_a_process_that_slept_for_too_long_ends_when_it_wakes(run: RunDirectory, other: str) -> None:
    """It wakes with a claim of another's, or none, and writes nothing more."""
    quick = "import crucible.run as r; r.HEARTBEAT_S, r.LOST_AFTER_S = 0.1, 0.5\n"
    sleeper = HOLD.replace("from crucible", f"{quick}from crucible")
    process = subprocess.Popen(
        [sys.executable, "-c", sleeper, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "mine\n"  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.8)
        if other == "took it over":
            claimed_by(run, {"host": "another", "pid": 1})
        else:
            run.claim_file.unlink()
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(30) == 1
        assert run.claim_file.exists() == (other == "took it over")
    finally:
        end_group(process)


def test_a_claim_that_was_removed_or_damaged_by_hand_is_written_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crucible.run.HEARTBEAT_S", 0.02)
    run.claim()
    claim = run.claim_file.read_text()
    for harm in (lambda: run.claim_file.unlink(), lambda: run.claim_file.write_text("{")):
        harm()
        deadline = time.monotonic() + 20
        while not (run.claim_file.exists() and run.claim_file.read_text() == claim):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    run.release()
    assert not run.claim_file.exists()


def test_every_option_that_a_recorded_configuration_may_lack_has_a_default() -> None:
    whole = completed({"data": {"num_classes": 7, "task": "classification", "input_dim": 2}, "seed": 5})
    assert (
        whole["model"]["num_classes"] == 7
        and whole["model"]["seed"] == 5
        and whole["data"]["module"]["seed"] == 5
    )
    assert whole["checkpoint"] == {
        "every": 1,
        "every_steps": None,
        "keep": "best",
        "monitor": None,
        "mode": None,
    }
    assert whole["callbacks"] == {} and "design" not in whole and "hydra" not in whole
