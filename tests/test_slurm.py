"""Sweeps and runs on a real SLURM of this machine's own (tests/slurm_cluster.py). Each is a row of
benchmarks/results/clusters.md, by its first line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Command, runs_in, summary_of
from slurm_cluster import Slurm, slurm, why_not

pytestmark = pytest.mark.cluster
SMALL = ["cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.mem_gb=2"]
ASKED = ["sweep=submitit", *SMALL, "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(f"no SLURM here: {reason}")
    with slurm() as started:
        yield started


@pytest.fixture
def sweep(cluster: Slurm, launch: Callable[..., Command]) -> Callable[..., Command]:
    def start(*arguments: str) -> Command:
        return launch("-m", *TINY, *ASKED, *arguments, env=cluster.environment)

    return start


def until(condition: Callable[[], Any], timeout: float = 300) -> Any:
    """What the condition gives, once it is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value


def jobs(cluster: Slurm) -> list[str]:
    """The numbers of all jobs that are not over, in the order of their submission."""
    return sorted(cluster.say("squeue", "--noheader", "--format=%A").split(), key=int)


def fact(cluster: Slurm, job: str, name: str) -> str:
    shown = cluster.say("scontrol", "show", "job", job)
    return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")


def runs_by_seed(folder: Path) -> dict[int, Path]:
    return {int(run.name.rpartition("-s")[2]): run for run in runs_in(folder / "experiments")}


def texts(folder: Path, pattern: str) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.rglob(pattern)))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")["state_dict"]


def test_a_sweep_whose_jobs_are_warned_and_cancelled(cluster: Slurm, sweep, tmp_path: Path) -> None:
    """three jobs: one warned while it imports, one while it trains, one cancelled"""
    command = sweep("seed=0,1,2", "trainer.max_epochs=30", "cluster.signal_delay_s=30")
    early, late, third = until(lambda: len(found := jobs(cluster)) == 3 and found)
    until(lambda: list(tmp_path.rglob(f"{early}_0_log.out")))
    while fact(cluster, early, "Restarts") == "0":  # before its step has begun nobody hears it
        cluster.say("scancel", "--signal=USR2", early)
        time.sleep(0.3)
    until(lambda: (run := runs_by_seed(tmp_path).get(1)) and (run / "checkpoints/last.ckpt").is_file())
    cluster.say("scancel", "--signal=USR2", late)
    warned = time.monotonic()
    until(lambda: fact(cluster, late, "Restarts") == "1")
    assert time.monotonic() - warned < 15, "queued again as soon as its state is saved"
    until(lambda: fact(cluster, third, "JobState") == "RUNNING")
    cluster.say("scancel", third)
    outcome = command.outcome(500)
    said = outcome.out + outcome.err
    assert outcome.status == 1 and "2 of 3 runs are finished" in said, said
    assert f"its job {third} ended as CANCELLED" in said or "seed 2: interrupted" in said, said
    assert "queued again" in said and "sacct" not in said and "Bypassing" not in said, said
    assert "User defined signal 2" in texts(tmp_path, f"{early}_0_log.err"), (
        "it was warned before it could hear"
    )
    states = {seed: summary_of(run).get("status") for seed, run in runs_by_seed(tmp_path).items()}
    assert states[0] == states[1] == "finished" and states.get(2) != "finished", states
    assert "resumes: " in (runs_by_seed(tmp_path)[1] / "main.log").read_text()


def test_ctrl_c_cancels_the_jobs_of_a_sweep(cluster: Slurm, sweep, tmp_path: Path) -> None:
    """Ctrl-C of the sweep: the job saves its state, nothing is left in the queue; the same command finishes"""
    arguments = ["seed=0", "trainer.max_epochs=30"]
    command = sweep(*arguments)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    os.kill(command.pid, signal.SIGINT)
    stopped = command.outcome(120)
    assert stopped.status == 130 and "0 of 1 runs are finished" in stopped.out, stopped
    assert not jobs(cluster)
    (run,) = runs_in(tmp_path / "experiments")
    assert summary_of(run)["status"] == "interrupted" and not (run / "claim").exists()
    again = sweep(*arguments).outcome(500)
    assert again.status == 0 and "to resume" in again.out, again
    assert summary_of(run)["status"] == "finished"


@pytest.mark.nightly
def test_a_run_longer_than_the_time_limit_goes_on_until_it_is_finished(
    cluster: Slurm, sweep, tmp_path: Path
) -> None:
    """a time limit of 2 minutes, warned 30 s before: queued again until it is finished"""
    command = sweep("seed=0", "cluster.timeout_min=2", "cluster.signal_delay_s=30", "trainer.max_epochs=600")
    outcome = command.outcome(1500)
    assert outcome.status == 0 and "queued again" in outcome.out, outcome
    (run,) = runs_in(tmp_path / "experiments")
    assert summary_of(run)["status"] == "finished" and "resumes: " in (run / "main.log").read_text()


@pytest.mark.nightly
def test_a_node_that_is_lost(cluster: Slurm, sweep, tmp_path: Path) -> None:
    """the node killed with all that ran there: its job is queued again, and finishes when the node is back"""
    command = sweep("seed=0", "trainer.max_epochs=30")
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    cluster.lose_node()
    try:
        until(lambda: "queued again" in command.said[0], 120)
    finally:
        cluster.start_node()
    outcome = command.outcome(500)
    assert outcome.status == 0, outcome
    (run,) = runs_in(tmp_path / "experiments")
    assert summary_of(run)["status"] == "finished" and "resumes: " in (run / "main.log").read_text()


def script(folder: Path, *lines: str) -> str:
    file = folder / "job.sh"
    file.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return str(file)


def submitted(cluster: Slurm, folder: Path, script: str, *options: str) -> str:
    """Submit a job script; the job's number."""
    out = f"--output={folder}/job.out"
    number = cluster.say(
        "sbatch", "--parsable", out, "--open-mode=append", f"--chdir={folder}", *options, script
    )
    assert number, "sbatch refused it"
    return number.strip()


def over(cluster: Slurm, job: str) -> bool:
    return fact(cluster, job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "")


@pytest.mark.nightly
def test_two_ranks_under_srun_are_warned_and_go_on_with_the_same_bits(
    cluster: Slurm, tmp_path: Path, launch: Callable[..., Command]
) -> None:
    """srun with two CPU ranks, SIGUSR1: saved, queued again, resumed; the same bits as without"""
    main = f"srun --ntasks=2 {sys.executable} {ROOT / 'main.py'} {' '.join(TINY)} trainer.max_epochs=30"
    ddp = "trainer.devices=2 trainer.accelerator=cpu"
    finals = []
    for name in ("warned", "left"):
        folder = tmp_path / name
        folder.mkdir()
        file = script(folder, f"{main} {ddp}")
        job = submitted(
            cluster, folder, file, "--ntasks=2", "--ntasks-per-node=2", "--export=ALL,OMP_NUM_THREADS=1"
        )
        if name == "warned":
            until(lambda: "epoch" in texts(tmp_path, "metrics.csv"))
            cluster.say("scancel", "--signal=USR1", job)
            until(lambda: fact(cluster, job, "Restarts") == "1", 60)  # noqa: B023
        until(lambda: over(cluster, job), 240)  # noqa: B023
        (run,) = runs_in(folder / "experiments")
        assert summary_of(run)["status"] == "finished", texts(folder, "job.out")
        assert ("resumes: " in (run / "main.log").read_text()) == (name == "warned")
        finals.append(weights(run))
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


@pytest.mark.nightly
def test_tasks_of_one_srun_may_be_runs_of_their_own(cluster: Slurm, tmp_path: Path) -> None:
    """job packing: srun -n2 with seed=$SLURM_PROCID trains two runs"""
    main = f"{sys.executable} {ROOT / 'main.py'} {' '.join(TINY)}"
    file = script(tmp_path, f"srun --ntasks=2 bash -c '{main} seed=$SLURM_PROCID'")
    job = submitted(cluster, tmp_path, file, "--ntasks=2", "--export=ALL,OMP_NUM_THREADS=1")
    try:
        until(lambda: over(cluster, job), 120)
    finally:
        cluster.say("scancel", job)
    states = {seed: summary_of(run)["status"] for seed, run in runs_by_seed(tmp_path).items()}
    assert states == {0: "finished", 1: "finished"}, texts(tmp_path, "job.out")


@pytest.mark.nightly
def test_a_failed_job_is_tried_again_when_asked(cluster: Slurm, sweep, tmp_path: Path) -> None:
    """a process that dies on its node: reported, stays failed, and goes on with retry_failed=true"""
    arguments = ["seed=0", "trainer.max_epochs=30"]
    command = sweep(*arguments)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    (run,) = runs_in(tmp_path / "experiments")
    os.kill(json.loads((run / "claim").read_text())["pid"], signal.SIGABRT)
    failed = command.outcome(500)
    assert failed.status == 1 and "killed by signal 6" in failed.err, failed
    assert summary_of(run)["status"] == "failed"
    kept = sweep(*arguments).outcome(120)
    assert kept.status == 1 and summary_of(run)["status"] == "failed"
    again = sweep(*arguments, "retry_failed=true").outcome(500)
    assert again.status == 0 and summary_of(run)["status"] == "finished", again


def test_what_sbatch_refuses_is_said_in_a_line(sweep) -> None:
    """a partition that there is not: sbatch's own words, and the sweep ends"""
    outcome = sweep("seed=0", "cluster.partition=nowhere").outcome(120)
    assert outcome.status == 1 and "could not be submitted: sbatch: error:" in outcome.out, outcome
    assert "invalid partition" in outcome.err, outcome
