"""What starts the processes of a run and what ends them: launchers, leftovers, deaths, memory that runs out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Command, Outcome, nightly, runs_in, summary_of, write_images
from test_sweep import planned_run

from crucible import launch as launches
from crucible.handover import HandOver
from crucible.launch import Launch, launch
from crucible.memory import ended_by, worker_died
from crucible.run import Held, RunDirectory
from datasets import base_datamodule
from datasets.synthetic import SyntheticDataModule
from lab import executors, jobs, processes
from lab.executors import LocalExecutor, Work
from lab.planning import Planned, SweepOptions
from lab.ranks import end_with_children

SET = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
    "SLURM_PROCID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost",
}  # fmt: skip

OF_THE_SWEEP = {"folder": "sweeps/1"}


# who started this process


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Launch()),
        ({"RANK": "1"}, Launch()),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Launch()),
        ({"NODE_RANK": "1"}, Launch()),
        ({"NODE_RANK": "1", **SET}, Launch("nodes", 1, 0, 1, 0)),
        ({"RANK": "1", **SET}, Launch("another launcher", 1, 1, 0, 2)),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", **SET, "WORLD_SIZE": "4"},
         Launch("another launcher", 3, 1, 1, 4)),
        ({"RANK": "0", **SET, "WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "one", **SET}, Launch()),
        ({"RANK": "1", **SET, "TORCHELASTIC_RUN_ID": "x"}, Launch("torchrun", 1, 1, 0, 2)),
        ({"TORCHELASTIC_RUN_ID": "x"}, Launch()),
        (STEP, Launch("srun", 1, 1, 0, 2)),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB)}, Launch()),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, Launch()),
        ({**STEP, **HandOver(alone=True).environment()}, Launch()),
        ({"RANK": "1", **SET, **HandOver(does_the_work=True).environment()}, Launch()),
        (HandOver(place=[3, 1, 1, 4]).environment(), Launch("crucible", 3, 1, 1, 4)),
    ],
)  # fmt: skip
def test_a_rank_is_one_of_a_whole_launch(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], found: Launch
) -> None:
    for name in {*os.environ}:
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (*launches._SET, *launches._RANKS):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch() == found


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a1,b[2-3]", "a1"), ("n[03-07,9],m", "n03"), ("n[8,9]-x", "n8-x")]
)
def test_ranks_meet_on_the_first_node(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    assert launches.meeting_point()[0] == first


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}, {"WORLD_SIZE": "2"}]
)
def test_what_another_launch_left_is_said_and_counts_for_nothing(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: dict[str, str]
) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    outcome = cli(*TINY, "trainer.limit_train_batches=1", "test_after_training=false")
    assert outcome.status == 0, outcome.err
    ((name, value),) = left.items()
    assert f"note: {name}={value} in the environment" in outcome.out
    (run,) = runs_in(tmp_path)
    assert summary_of(run)["status"] == "finished" and (run / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("environment", "typed", "parts"),
    [
        (
            {"RANK": "1", **SET},
            [],
            ["trainer.devices=1", "RANK=1", "env -u RANK", "2 processes", "ask for 1"],
        ),
        ({**STEP, "SLURM_NTASKS": "3"}, ["trainer.devices=2"], ["trainer.devices=2", "srun started 3"]),
        ({}, ["trainer.num_nodes=2"], ["trainer.num_nodes=2", "NODE_RANK", "srun"]),
    ],
)
def test_a_launch_that_does_not_fit_is_refused_in_one_line(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    environment: dict[str, str], typed: list[str], parts: list[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = cli(*TINY, "trainer.accelerator=cpu", *typed)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
    assert not runs_in(tmp_path)


SHORT = [*TINY, "trainer.limit_train_batches=1", "test_after_training=false"]


def test_tasks_of_srun_are_runs_of_their_own_and_one_run_has_one_task(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    outcome = cli(*SHORT, "seed=1")  # as `srun -n 2 bash -c 'python main.py seed=$SLURM_PROCID'` does
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    assert run.name.endswith("-s1") and summary_of(run)["status"] == "finished"
    RunDirectory(run).update_summary(status="interrupted")
    (run / "claim").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    again = cli(*SHORT, "seed=1")
    assert again.status == 2 and "in progress" in again.err and len(again.err.splitlines()) == 1


def test_an_allocation_of_several_tasks_without_srun_is_one_process(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_NNODES"):
        monkeypatch.setenv(name, STEP[name])
    monkeypatch.setenv("SLURM_PROCID", "0")
    outcome = cli(*SHORT)
    assert outcome.status == 0 and "srun" not in outcome.err, outcome.err


def test_a_rank_says_what_it_waits_for_and_waits_for_a_stated_time(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As left over by a launcher in full, and of as many processes as are asked for."""
    monkeypatch.setattr(jobs, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(jobs, "WAIT_S", 0.5)
    for name, value in {"RANK": "1", **SET}.items():
        monkeypatch.setenv(name, value)
    outcome = cli(*TINY, "trainer.devices=2", "trainer.accelerator=cpu")
    assert "rank 1: waiting for rank 0 to start" in outcome.out and "at most" in outcome.out
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert "rank 0 did not start" in outcome.err and "another launcher (RANK=1" in outcome.err


# a rank that dies

DYING = """
import os
import signal
from lightning.pytorch.callbacks import Callback


class Dying(Callback):
    def __init__(self, rank: int, how: str):
        self.rank, self.how = rank, how

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == 1:
            if self.how == "raise":
                raise RuntimeError("the roof is on fire")
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def dying(folder: Path, rank: int, how: str) -> list[str]:
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "dying.py").write_text(DYING)
    return [
        f"user_dir={mine}", *TINY, "data.module.batch_size=8", "trainer.devices=2", "trainer.accelerator=cpu",
        f"+callbacks.dying={{_target_: dying.Dying, rank: {rank}, how: {how}}}",
    ]  # fmt: skip


SAID = {"raise": "RuntimeError: the roof is on fire", "exit": "ended", "kill": "killed"}
ALL = [(rank, how) for rank in (0, 1) for how in SAID]
FEW = [(1, "raise"), (0, "kill")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how"), [*FEW, *(pytest.param(*one, marks=pytest.mark.nightly) for one in ALL if one not in FEW)]
)
def test_a_rank_that_dies_is_named_once(
    ranks: Callable[..., list[Outcome]], tmp_path: Path, rank: int, how: str
) -> None:
    """Whoever starts the ranks; here nobody of ours sees the status of their processes."""
    both = ranks(*dying(tmp_path, rank, how))  # a rank that waited for the dead one would not end in time
    errors = [line for outcome in both for line in outcome.err.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: rank {rank}") and SAID[how] in errors[0], errors
    (run,) = runs_in(tmp_path / "experiments")
    summary = summary_of(run)
    assert summary["reason"] in errors[0] and summary["reason"].startswith(f"rank {rank}")
    assert summary["status"] == ("failed" if how == "raise" else "interrupted")
    assert not (run / "claim").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(("rank", "how"), ALL)
def test_a_rank_of_ours_that_dies_is_named_once(
    shell: Callable[..., Outcome], tmp_path: Path, rank: int, how: str
) -> None:
    outcome = shell(*dying(tmp_path, rank, how))
    errors = [line for line in outcome.err.splitlines() if "error:" in line]
    assert len(errors) == 1, outcome.err
    assert errors[0].startswith(f"error: rank {rank}") and SAID[how] in errors[0], errors
    (run,) = runs_in(tmp_path / "experiments")
    summary = summary_of(run)
    assert summary["reason"] in errors[0]
    assert summary["status"] == ("interrupted" if how == "kill" else "failed")
    assert not list(run.glob("ranks.*")) and not (run / "claim").exists()
    assert outcome.status == {"raise": 1, "exit": 1 if rank else 3, "kill": 137}[how]


@pytest.mark.slow
def test_a_taken_port_is_named_in_one_line(ranks: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        both = ranks(*dying(tmp_path, 2, "raise"), port=taken.getsockname()[1], timeout=240)
    errors = [line for outcome in both for line in outcome.err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "MASTER_PORT=" in errors[0] and "another process" in errors[0], errors


# a parent that dies


def ended(run: Path, pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def working(folder: Path, process: Command) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if found := list(folder.rglob("last.ckpt")):
            return found[0].parent.parent
        time.sleep(0.05)
    pytest.fail(f"it did not begin: {process.said}")


LONG = ["trainer.max_epochs=500", "checkpoint.every_steps=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["-m", *TINY, *LONG, "seed=0,1"], *nightly([*TINY, *LONG, "trainer.devices=2", "trainer.accelerator=cpu"])],
    ids=["sweep", "two ranks"],
)  # fmt: skip
def test_kill_minus_9_of_what_started_a_run_ends_it_with_its_state_saved(
    launch: Callable[..., Command], tmp_path: Path, arguments: list[str]
) -> None:
    process = launch(*arguments)
    run = working(tmp_path, process)
    first = json.loads((run / "claim").read_text())["pid"]
    pids = [first, *(int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split())]
    os.kill(process.pid, signal.SIGKILL)
    assert ended(run, pids, 100)
    summary = summary_of(run)
    assert summary["status"] == "interrupted" and not (run / "claim").exists()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 2


# memory that runs out


@pytest.mark.parametrize(("before", "words"), [(0, "want of memory (the kernel"), (1, "by hand or for want")])
def test_a_killed_process_is_said_to_be_and_the_way_on(
    monkeypatch: pytest.MonkeyPatch, before: int, words: str
) -> None:
    monkeypatch.setattr("crucible.memory.kills", lambda: 1)
    assert words in ended_by(signal.SIGKILL, before) and "same command" in ended_by(signal.SIGKILL, before)
    assert "SIGSEGV" in ended_by(signal.SIGSEGV, before)


def test_a_job_that_is_killed_for_memory_is_told_so_and_goes_on_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asleep(*rest: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], start_new_session=True)

    monkeypatch.setattr(processes, "_started", asleep)
    monkeypatch.setattr(processes, "kills", lambda: 0)
    monkeypatch.setattr("crucible.memory.kills", lambda: 1)
    planned = planned_run(tmp_path / "run")
    run = planned.job.run  # type: ignore[union-attr]
    run.record({}, [])
    run.update_summary(status="running")
    process = processes.Process(run)
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.outcome() == 128 + signal.SIGKILL
    assert "want of memory" in process.unsaid and run.summary()["reason"] == process.unsaid
    planned.refresh(SweepOptions())
    assert planned.state == "resume"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "was killed"),
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "was killed"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that", "--shm-size"),
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
            "--shm-size",
        ),
        ("sample 3: ValueError: worker of the month", ""),
    ],
)
def test_a_loader_worker_without_memory_is_told_with_the_way_on(text: str, part: str) -> None:
    assert part in worker_died(text) and bool(worker_died(text)) == bool(part)


@pytest.mark.parametrize(
    ("batches", "wanted", "given"),
    [
        (100, (4, 2), (4, 2)),
        (22, (4, 2), (4, 2)),
        (20, (4, 2), (4, 1)),
        (10, (4, 2), (2, 1)),
        (7, (4, 2), (0, 0)),
    ],
)
def test_loader_workers_keep_within_the_memory_that_they_share(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batches: int,
    wanted: tuple[int, int], given: tuple[int, int],
) -> None:  # fmt: skip
    data = SyntheticDataModule(
        name="s",
        num_samples=64,
        batch_size=8,
        num_classes=2,
        num_workers=wanted[0],
        prefetch_factor=wanted[1],
    )
    batch = sum(tensor.nbytes for tensor in data.samples("train")[(0, list(range(8)))])
    monkeypatch.setattr(base_datamodule, "shared_memory_free", lambda: float(batches * batch))
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor or 0) == given
    assert ("/dev/shm" in caplog.text) == (given != wanted)


SMALL = """
import ctypes, os, runpy, subprocess, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x00020000) or subprocess.run(
    "mount --make-rprivate / && mount -t tmpfs -o size=1m tmpfs /dev/shm", shell=True
).returncode:
    sys.exit(42)
sys.argv[0] = MAIN
sys.path.insert(0, os.path.dirname(MAIN))
if FULL:
    from datasets import base_datamodule
    base_datamodule.shared_memory_free = lambda: 1e12
runpy.run_path(MAIN, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("filled_later", [False, True])
def test_a_small_shared_memory_is_seen_or_told_and_never_waited_for(
    launch: Callable[..., Command], tmp_path: Path, filled_later: bool
) -> None:
    main = repr(str(ROOT / "main.py"))
    (tmp_path / "small.py").write_text(SMALL.replace("MAIN", main).replace("FULL", str(filled_later)))
    outcome = launch(
        *SHORT, "data.input_size=96", "data.module.batch_size=32", "data.module.num_workers=8",
        script=str(tmp_path / "small.py"),
    ).outcome()  # fmt: skip
    if outcome.status == 42:
        pytest.skip("a /dev/shm of one's own needs root")
    if filled_later:
        assert outcome.status == 1 and "--shm-size" in outcome.err and len(outcome.err.splitlines()) == 1
    else:
        assert outcome.status == 0 and "note: data.module.num_workers=8" in outcome.out, outcome.err


# two sweeps


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that executors of this process start; each ends at once as the next of `ends` says."""
    runs: list[str] = []

    class Ending:
        def __init__(self, run: RunDirectory, *rest: Any) -> None:
            runs.append(run.path.name)

    monkeypatch.setattr(executors, "Process", Ending)
    monkeypatch.setattr(LocalExecutor, "_warm_parent", lambda self, environment: None)
    return runs


@pytest.mark.parametrize(
    ("before", "meanwhile", "options", "fresh", "state"),
    [
        (None, "finished", SweepOptions(), False, "finished"),
        (None, "finished", SweepOptions(), True, "finished"),
        ("finished", "finished", SweepOptions(), True, "finished"),
        ("failed", "failed", SweepOptions(retry_failed=True), False, "failed"),
        ("failed", "finished", SweepOptions(retry_failed=True), False, "finished"),
        ("failed", "held", SweepOptions(retry_failed=True), False, "held"),
        ("interrupted", "finished", SweepOptions(), False, "finished"),
    ],
)
def test_what_another_sweep_has_run_meanwhile_is_not_run_again(
    tmp_path: Path, started: list[str], before: str | None, meanwhile: str, options: SweepOptions,
    fresh: bool, state: str,
) -> None:  # fmt: skip
    planned = planned_run(tmp_path / "run", fresh=fresh)
    assert planned.job is not None
    run, now = planned.job.run, time.time()
    if before is not None:
        run.record({}, [])
        run.update_summary(status=before, reason="", started=now - 100, ended=now - 90)
    planned.refresh(options)
    assert planned.state in ("new", "resume", "retry")
    run.record({}, [])
    run.update_summary(status=meanwhile, reason="", started=now - (50 if fresh else 100), ended=now - 10)
    if meanwhile == "held":
        run.claim_file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    ended: list[str] = []
    executor = LocalExecutor(1, {"devices": 1, "accelerator": "cpu"})
    Work(
        executor, OF_THE_SWEEP, lambda one: ended.append(one.state), lambda one: one.refresh(options)
    ).run(iter([planned]))  # fmt: skip
    assert ended == [state] and started == [], "examined again under the lock, at the moment of the start"
    assert not list(tmp_path.glob("run.old-*"))


def test_a_run_that_nobody_has_touched_is_put_aside_or_retried(tmp_path: Path) -> None:
    planned: Planned = planned_run(tmp_path / "run", fresh=True)
    assert planned.job is not None
    planned.job.run.record({}, [])
    planned.job.run.update_summary(status="finished", started=1.0, ended=2.0)
    planned.refresh(SweepOptions())
    planned.record(OF_THE_SWEEP)
    assert (tmp_path / "run.old-1").is_dir()
    with pytest.raises(Held):
        planned.job.run.claim_file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        planned.record(OF_THE_SWEEP)


def test_what_is_typed_beside_a_run_reaches_its_processes(cli, tmp_path: Path, monkeypatch) -> None:
    started: list[list[str]] = []

    def start(arguments: list[str], *rest: Any) -> subprocess.Popen[bytes]:
        started.append(arguments[1:])
        return subprocess.Popen(["true"], start_new_session=True)

    monkeypatch.setattr("lab.processes._started", start)
    cli(*TINY, "trainer.devices=2", "trainer.accelerator=cpu")
    (run,) = runs_in(tmp_path)
    typed = ["checkpoint.keep=none", "~callbacks.plots", "data.module.num_workers=1"]
    cli(f"run={run}", *typed)
    assert started == [[f"run={run}"], [f"run={run}", *typed]]


@pytest.mark.parametrize(
    ("command", "said", "status"), [("exit 2", "", 2), ("kill -9 $$", "error: rank 1: ", 1)]
)
def test_a_rank_that_tests_and_has_said_its_error_is_not_named_again(
    monkeypatch, capfd, command: str, said: str, status: int
) -> None:
    ended, statuses = threading.Event(), []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    monkeypatch.setattr("lab.ranks.OWN_END_S", 0)
    monkeypatch.setattr("os._exit", end)
    end_with_children([subprocess.Popen(["sh", "-c", command])], ended)
    assert ended.wait(20) and statuses == [status]
    err = capfd.readouterr().err
    assert err.startswith(said) and bool(err) == bool(said)


@pytest.mark.nightly
def test_a_file_that_one_rank_cannot_read_is_said_once_when_testing(cli, shell, tmp_path: Path) -> None:
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        write_images(tmp_path / "images" / split, ["a", "b"], count, (32, 32))
    of_folder = ["data=image_folder", "data.module.data_root_dir=images", "data.module.batch_size=4"]
    options = ["callbacks.plots=null", "logger.wandb=null", "trainer.max_epochs=1", "model=cifar_resnet"]
    assert cli(*of_folder, *options, "trainer.accelerator=cpu").status == 0
    (run,) = runs_in(tmp_path)
    os.truncate(tmp_path / "images" / "test" / "b" / "3.jpg", 200)
    outcome = shell(f"run={run}", "task=test", "trainer.devices=2")
    assert outcome.status == 2 and outcome.err.count("error:") == 1 and "test/b/3.jpg" in outcome.err
