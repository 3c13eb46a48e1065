"""The run directory: who may write it, on one machine and on several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from crucible import configuration
from crucible.machine import is_child_rank
from crucible.run import LOST_AFTER_S, Held, RunDirectory
from lab import config as config_room
from lab import jobs
from lab.build import build_data
from lab.config import resolve


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.record({"seed": 0}, [])
    return run


def write_claim(run: RunDirectory, age: float = 0.0, **claim: object) -> None:
    run.claim_file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), **claim}))
    then = run.claim_file.stat().st_mtime - age
    os.utime(run.claim_file, (then, then))


def test_a_claim_is_live_while_its_process_lives_and_its_heart_beats(run: RunDirectory) -> None:
    write_claim(run)
    assert run.state() == "running"
    write_claim(run, host="another")
    assert run.state() == "running"
    write_claim(run, age=LOST_AFTER_S + 1, host="another")
    assert run.state() == "unfinished"
    write_claim(run, age=LOST_AFTER_S + 1)
    assert run.state() == "unfinished", "the number may belong to another process by now"
    write_claim(run, pid=2**22 + 1)
    assert run.state() == "unfinished"
    write_claim(run, pid=os.getpid())
    assert run.state() == "unfinished", "process 1 of a container that was started again"


def test_a_claim_is_judged_by_the_clock_of_the_file_system(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_claim(run, host="another")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    assert run.state() == "running"
    assert list(run.path.parent.iterdir()) == [run.path], "nothing is left beside it"


def test_a_claim_is_given_back_by_its_owner_only(run: RunDirectory) -> None:
    write_claim(run)
    run.release()
    assert run.claim_file.exists()
    with pytest.raises(Held):
        run.claim()
    write_claim(run, pid=2**22 + 1)
    run.release(pid=2**22 + 1)
    assert not run.claim_file.exists(), "its process has ended, and its parent says so"
    run.claim(token="t")
    assert run.state() == "running"
    with pytest.raises(Held):
        RunDirectory(run.path).claim()
    run.release()
    assert not run.claim_file.exists()


def test_of_many_processes_that_find_a_lost_run_one_takes_it(run: RunDirectory) -> None:
    write_claim(run, age=LOST_AFTER_S + 1, host="another")
    script = (
        "import sys, time; from crucible.run import RunDirectory, Held\n"
        "run = RunDirectory(sys.argv[1])\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try: run.claim(); time.sleep(2); print('mine')\n"
        "except Held: print('held')\n"
    )
    start = str(time.time() + 3)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(run.path), start], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(5)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(said) == ["held"] * 4 + ["mine"]


@pytest.mark.parametrize(("steps", "compiled"), [(100, False), (10_000, True)])
def test_a_run_bounded_by_steps_is_compiled_when_it_is_long(
    monkeypatch: pytest.MonkeyPatch, steps: int, compiled: bool
) -> None:
    GlobalHydra.instance().clear()
    bound = ["trainer.max_epochs=-1", f"trainer.max_steps={steps}", "trainer.precision=32-true"]
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", [*TINY, *bound]))
    monkeypatch.setattr(config_room, "device_kind", lambda accelerator: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    resolve(config, build_data(config))
    assert config["model"]["compile"] is compiled


def test_another_rank_of_a_finished_run_has_nothing_to_wait_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.update_summary(status="finished")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "WAIT_S", 0.0)
    assert is_child_rank()
    assert jobs.start(run, {"fresh": False}) == 0
