"""Jobs on other machines: what their process does when it is asked to stop, and how the sweep knows of their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from crucible.handover import VARIABLE, HandOver
from crucible.run import RunDirectory
from lab import cluster, remote
from lab.remote import RemoteJob, read_record

HELD = 75
SAVES = """
import json, pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"run": None, "status": 143, "reason": "saved"}))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""


def job(folder: Path, code: str, save_s: float = 20.0) -> RemoteJob:
    record, begun = folder / "record.json", folder / "begun"
    return RemoteJob(
        [sys.executable, "-S", "-c", code, str(record), str(begun)], {}, str(record), save_s, HELD
    )


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def test_a_job_that_is_asked_to_stop_ends_when_its_state_is_saved(tmp_path: Path) -> None:
    began = time.monotonic()
    status = job(tmp_path, SAVES).run(lambda: (tmp_path / "begun").exists())
    assert status == 143 and time.monotonic() - began < 15
    assert read_record(tmp_path / "record.json")["reason"] == "saved"


def test_a_run_knows_the_name_of_its_job_and_none_of_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whoever asks where it is; the variables would make it one of several ranks."""
    for name, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[2], 'w'))"
    told = replace(job(tmp_path, code), environment=HandOver(record="there").environment())
    assert told.run(lambda: False) == 0
    environment = json.loads((tmp_path / "begun").read_text())
    assert not [name for name in environment if name.startswith("SLURM_")]
    assert HandOver(**json.loads(environment[VARIABLE])) == HandOver(record="there", job="SLURM job 7_3")


def test_a_job_that_does_not_stop_in_time_is_killed_and_its_run_given_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({}, [])
    run.update_summary(status="running")
    code = (
        "import json, os, pathlib, signal, socket, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"run = pathlib.Path({str(run.path)!r});"
        "(run / 'claim').write_text(json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}));"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'run': str(run), 'status': None, 'reason': ''}));"
        "pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"
    )
    assert job(tmp_path, code, save_s=0.2).run(lambda: (tmp_path / "begun").exists()) == -signal.SIGKILL
    assert run.summary()["status"] == "interrupted" and not run.claim_file.exists()
    assert read_record(tmp_path / "record.json")["status"] == 137


@pytest.mark.parametrize(("number", "state"), [(signal.SIGABRT, "failed"), (signal.SIGKILL, "interrupted")])
def test_a_death_that_the_run_could_not_record_is_recorded(
    tmp_path: Path, number: signal.Signals, state: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({}, [])
    run.update_summary(status="running")
    told = json.dumps({"run": str(run.path), "status": None, "reason": ""})
    code = f"import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text({told!r}); os.kill(os.getpid(), {number:d})"
    job(tmp_path, code).run(lambda: False)
    summary = run.summary()
    assert summary["status"] == state and f"killed by signal {number:d}" in summary["reason"]


def test_a_run_that_a_lost_machine_seems_to_hold_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "AGAIN_S", 0.1)
    code = (
        "import json, pathlib, sys; count = pathlib.Path(sys.argv[2]);"
        "n = len(count.read_text()) if count.exists() else 0; count.write_text('x' * (n + 1));"
        f"told = {{'run': None, 'status': 0 if n == 2 else {HELD}, 'reason': ''}};"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(told)); sys.exit(0 if n == 2 else 2)"
    )
    assert replace(job(tmp_path, code), again=True).run(lambda: False) == 0
    assert len((tmp_path / "begun").read_text()) == 3
    (tmp_path / "begun").unlink()
    first = job(tmp_path, code)
    assert first.run(lambda: False) == 2 and first.was_held(), "a live one is left alone"


def test_a_job_ends_with_the_worker_that_started_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.remote"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job(tmp_path, SAVES))) + "\n")
    process.stdin.flush()
    until((tmp_path / "begun").exists)
    process.stdin.close()  # as the end of the worker does
    assert process.wait(20) == 143
    assert read_record(tmp_path / "record.json")["reason"] == "saved"


def test_what_runs_on_a_node_imports_nothing_heavy() -> None:
    code = (
        "import sys, lab.remote; sys.exit(bool({'torch', 'numpy', 'lightning', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.call([sys.executable, "-c", code], cwd=ROOT) == 0


class Answers:
    """What `squeue` says, one answer a question; the last one for ever."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *answers: str | None, accounting: str | None = None
    ) -> None:
        self._answers, self._accounting = list(answers), accounting
        self.asked: list[str] = []
        monkeypatch.setattr(cluster, "ASK_S", (0.0, 0.0))
        monkeypatch.setattr(cluster.subprocess, "run", self)

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.asked.append(command[0])
        if command[0] == "squeue":
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        else:
            answer = self._accounting
        failed = answer is None
        return SimpleNamespace(
            returncode=int(failed), stdout=answer or "", stderr="no contact" if failed else ""
        )


def questions(queue: cluster.Queue, limit: int = 40) -> int:
    return next((n for n in range(1, limit) if queue.has_lost("7")), 0)


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "FAILED"])
def test_a_job_that_ended_badly_is_noticed_without_accounting(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    answers = Answers(monkeypatch, "7|RUNNING|None\n8|RUNNING|None\n", f"7|{state}|why\n8|RUNNING|None\n")
    queue = cluster.Queue()
    queue.add("7", "mine")
    queue.add("8", "another")
    assert questions(queue) == 1 + cluster.GONE_AFTER and not queue.has_lost("8")
    assert queue.remove("7") == cluster.Seen("mine", state, "why", 1 + cluster.GONE_AFTER)
    assert set(answers.asked) == {"squeue"}, "one question for all, and none to accounting"


def test_a_job_that_vanished_is_given_up_and_accounting_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(monkeypatch, "7|RUNNING|None\n", "", accounting="OUT_OF_MEMORY|0:125\n")
    queue = cluster.Queue()
    queue.add("7", "mine")
    assert questions(queue) == 1 + cluster.GONE_AFTER
    assert queue.remove("7").state == "OUT_OF_MEMORY" and answers.asked.count("sacct") == 1


def test_a_controller_that_does_not_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Answers(monkeypatch, "7|RUNNING|None\n", None)
    queue = cluster.Queue()
    queue.add("7", "mine")
    assert questions(queue) == 0
    assert capsys.readouterr().out.count("SLURM does not answer (no contact)") == 1


def test_a_job_that_is_queued_again_is_not_over_and_one_that_is_held_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = "7|PENDING|launch failed requeued held\n"
    Answers(monkeypatch, "7|RUNNING|None\n", "7|CANCELLED|None\n", "7|PENDING|BeginTime\n", held)
    queue = cluster.Queue()
    queue.add("7", "mine")
    assert questions(queue) == 0
    said = capsys.readouterr().out
    assert said.count("mine: job 7 is queued again (BeginTime)") == 1 and "scontrol release 7" in said


def test_slurm_is_not_asked_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(monkeypatch, "7|RUNNING|None\n")
    monkeypatch.setattr(cluster, "ASK_S", (2.0, 60.0))
    queue = cluster.Queue()
    queue.add("7", "mine")
    assert questions(queue) == 0 and len(answers.asked) == 1


def test_the_end_of_a_jobs_script_keeps_the_users_lines_and_its_status() -> None:
    lines = cluster._requeue_what_died_early(["echo mine"])
    script = "\n".join(
        [
            'scontrol() { echo "scontrol $1"; [ $1 = requeue ] || echo JobState=$STATE; }',
            "(exit $DIED)",
            *lines,
        ]
    )

    def run(status: int, state: str, restarts: str = "") -> tuple[int, list[str]]:
        told = {
            **os.environ,
            "STATE": state,
            "DIED": str(status),
            "SLURM_RESTART_COUNT": restarts,
            "SLURM_JOB_ID": "7",
        }
        done = subprocess.run(["bash", "-c", script], env=told, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    died = 128 + signal.SIGUSR2
    assert run(died, "RUNNING") == (died, ["mine", "scontrol requeue"])
    assert run(died, "CANCELLED") == (died, ["mine"])
    assert run(died, "RUNNING", str(cluster.RESTARTS)) == (died, ["mine"])
    assert run(1, "RUNNING") == (1, ["mine"]) and run(0, "RUNNING") == (0, ["mine"])
