"""Sweeps on a real Ray: one of the sweep's own, and two nodes of one cluster on this machine, one of them lost. Each
is a row of benchmarks/results/clusters.md, by its first line."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, runs_in, summary_of

pytest.importorskip("ray", reason="no Ray here: pip install -e '.[ray]'")
pytestmark = pytest.mark.cluster
LONG = ["trainer.max_epochs=40", "checkpoint.every_steps=2"]


def until(condition: Callable[[], Any], timeout: float = 300) -> Any:
    """What the condition gives, once it is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value


class Nodes:
    """A cluster of Ray whose nodes are on this machine, each with one CPU and one GPU by its own word."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        self.environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3",
        }  # fmt: skip
        self._nodes: list[subprocess.Popen[bytes]] = []

    def add(self) -> subprocess.Popen[bytes]:
        """Start another node; the first one is the head."""
        port = self.address.rpartition(":")[2]
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        which = [f"--address={self.address}"] if self._nodes else head
        ray = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--num-cpus=1",
            "--num-gpus=1",
        ]
        log = self._folder / f"node{len(self._nodes)}.out"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*ray, *which], env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        self._nodes.append(node)
        until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, 60)
        assert node.poll() is None, log.read_text()
        return node

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self._nodes):
            end(node)


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def end(node: subprocess.Popen[bytes]) -> None:
    """Kill a node: Ray's processes and its workers, but not what these have started."""
    for pid in descendants(node.pid):
        with contextlib.suppress(OSError):
            if (
                "lab.remote" not in (told := Path(f"/proc/{pid}/cmdline").read_text())
                and "main.py" not in told
            ):
                os.kill(pid, signal.SIGKILL)
    node.wait(20)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        cluster = Nodes(Path(folder))
        yield cluster
        cluster.close()


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [summary_of(run) for run in runs_in(folder / "experiments")]


def test_a_sweep_starts_a_ray_of_its_own(launch: Callable[..., Command], tmp_path: Path) -> None:
    """no cluster: the sweep starts one here and ends it"""
    environment = {"RAY_ADDRESS": "", "HOME": str(tmp_path)}
    command = launch("-m", *TINY, "sweep=ray", "ray.address=local", "seed=0", env=environment)
    outcome = command.outcome(500)
    said = outcome.out + outcome.err
    assert outcome.status == 0 and "1 of 1 runs are finished" in said, said
    assert "ray" not in outcome.err.lower(), "Ray's own lines stay away"
    (summary,) = summaries(tmp_path)
    assert summary["status"] == "finished" and summary["sweep"]["folder"]


@pytest.mark.nightly
def test_the_runs_of_a_lost_node_go_on_on_the_other(
    nodes: Nodes, launch: Callable[..., Command], tmp_path: Path
) -> None:
    """two nodes with a GPU each, one killed: its run goes on on the other from its last state"""
    nodes.add()
    asked = ["sweep=ray", f"ray.address={nodes.address}", "ray.gpus=1", "seed=0,1,2"]
    second = nodes.add()
    command = launch("-m", *TINY, *asked, *LONG, env=nodes.environment)
    until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    end(second)
    outcome = command.outcome(400)
    assert outcome.status == 0, outcome
    assert "goes on elsewhere (1 of 3)" in outcome.out and "3 of 3 runs are finished" in outcome.out
    assert [s["status"] for s in summaries(tmp_path)] == ["finished"] * 3
    logs = [(run / "main.log").read_text() for run in runs_in(tmp_path / "experiments")]
    assert sum("resumes: " in log for log in logs) == 1


@pytest.mark.nightly
def test_ctrl_c_lets_the_runs_of_ray_save_their_states(
    nodes: Nodes, launch: Callable[..., Command], tmp_path: Path
) -> None:
    """Ctrl-C of the sweep: the run saves its state, one that waits is not begun; the same command finishes"""
    nodes.add()
    asked = ["sweep=ray", f"ray.address={nodes.address}", "ray.gpus=1", "seed=0,1"]
    arguments = ["-m", *TINY, *asked, *LONG]
    command = launch(*arguments, env=nodes.environment)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    os.kill(command.pid, signal.SIGINT)
    stopped = command.outcome(120)
    assert stopped.status == 130 and "0 of 2 runs are finished" in stopped.out, stopped
    (summary,) = summaries(tmp_path)
    assert summary["status"] == "interrupted", summary
    assert not list(tmp_path.rglob("claim"))
    again = launch(*arguments, env=nodes.environment).outcome(500)
    assert again.status == 0 and "2 of 2 runs are finished" in again.out, again


BAD = {
    "ray.address=127.0.0.1:1": ["ray.address=127.0.0.1:1", "ray start --head"],
    "ray.address=local ray.gpus=99": ["ray.gpus=99", "99 GPU"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("arguments", BAD)
def test_a_cluster_that_cannot_do_it_is_named(launch: Callable[..., Command], arguments: str) -> None:
    """no cluster at the address; no machine with so many GPUs: one line"""
    outcome = launch("-m", *TINY, "sweep=ray", "seed=0", *arguments.split()).outcome(120)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome
    for part in BAD[arguments]:
        assert part in outcome.err
