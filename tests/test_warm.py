"""Warm starts: each process is as much its own as after a real start, and nothing is lost with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import ROOT

from crucible.run import RunDirectory
from lab.processes import HELD, Process
from lab.warm import Cold, Started, WarmParent

Start = Callable[..., Started]


@pytest.fixture
def start(warm_parent: WarmParent, tmp_path: Path) -> Start:
    """Start a script of these lines; what it says goes to `said` in its folder."""

    def run(
        *lines: str, environment: Mapping[str, str] | None = None, by: WarmParent | None = None
    ) -> Started:
        script = tmp_path / "script.py"
        script.write_text("import os, signal, sys, time\n" + "\n".join(lines))
        with (tmp_path / "said").open("ab") as file:
            told = {**os.environ, **(environment or {})}
            return (by or warm_parent).start(
                [str(script), "a=1"], told, file.fileno(), file.fileno(), cwd=tmp_path
            )

    return run


def gone(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('no')", 1),
        ("raise RuntimeError('fire')", 1),
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_the_exit_status_or_the_signal_is_reported(start: Start, line: str, status: int) -> None:
    process = start(line)
    assert process.wait(60) == status and process.poll() == status


def test_a_process_has_a_session_an_environment_threads_and_a_folder_of_its_own(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "only_there.py").write_text("")
    process = start(
        "import only_there, torch",
        "print(os.getsid(0), os.getpgid(0), os.getpid(), __name__, sys.argv[1:], os.environ['MINE'],",
        "      torch.get_num_threads(), os.getcwd(), torch.cuda.is_initialized(), __spec__)",
        environment={"MINE": "yes", "OMP_NUM_THREADS": "2", "PYTHONPATH": "mine"},
    )
    assert process.wait(60) == 0, (tmp_path / "said").read_text()
    one = process.pid
    expected = f"{one} {one} {one} __main__ ['a=1'] yes 2 {tmp_path} False None\n"
    assert (tmp_path / "said").read_text() == expected
    assert start("assert 'MINE' not in os.environ and 'only_there' not in sys.modules").wait(60) == 0


def test_what_it_says_and_its_traceback_go_to_its_file_and_its_end_is_an_orderly_one(
    start: Start, tmp_path: Path
) -> None:
    process = start("import atexit", "atexit.register(print, 'last')", "print('first')", "1 / 0")
    assert process.wait(60) == 1
    said = (tmp_path / "said").read_text()
    lines = said.splitlines()
    assert lines.index("first") < lines.index("last") and "ZeroDivisionError" in said


def test_a_group_is_signalled_from_the_moment_it_is_started(start: Start) -> None:
    for _ in range(5):
        process = start("time.sleep(60)")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_waiting_ends_in_time(start: Start) -> None:
    process = start("time.sleep(60)")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_a_number_that_the_system_gives_again_is_another_process(start: Start) -> None:
    """in a sweep of thousands of jobs a running one was taken for an earlier one that had ended"""
    last, first = Path("/proc/sys/kernel/ns_last_pid"), start("pass")
    assert first.wait(60) == 0
    if not os.access(last, os.W_OK):
        pytest.skip("the system's next process number is root's to set")
    for _ in range(50):  # other processes may start meanwhile
        last.write_text(str(first.pid - 1))
        again = start("time.sleep(60)")
        running = again.poll() is None
        os.killpg(again.pid, signal.SIGKILL)
        assert running and again.wait(60) == -signal.SIGKILL
        if again.pid == first.pid:
            return
    pytest.skip("the number was not given again")


def test_what_libraries_have_read_already_needs_a_real_start(start: Start) -> None:
    with pytest.raises(Cold, match="MKL_NUM_THREADS"):
        start("pass", environment={"MKL_NUM_THREADS": "3"})


def test_what_an_import_sets_in_either_process_needs_none(start: Start) -> None:
    assert start("pass", environment={"KMP_INIT_AT_FORK": "FALSE"}).wait(60) == 0


@pytest.mark.slow
def test_a_killed_parent_takes_no_process_with_it_and_the_next_start_is_a_real_one(
    start: Start, tmp_path: Path
) -> None:
    parent = WarmParent()
    process = start("time.sleep(1.5)", "open('done', 'w').close()", by=parent)
    os.kill(parent.pid, signal.SIGKILL)
    assert process.poll() is None
    assert process.wait(60) is not None and (tmp_path / "done").exists()
    with pytest.raises(Cold):
        start("pass", by=parent)
    run = RunDirectory(tmp_path / "run")
    run.record({}, [])
    real = Process(run, output=tmp_path / "console.log", warm=parent)
    assert isinstance(real._process, subprocess.Popen)
    real.signal(signal.SIGKILL)
    assert real.ended(60) and real.outcome() == 128 + signal.SIGKILL
    parent.close()


@pytest.mark.slow
def test_a_parent_ends_with_its_client_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys; from lab.warm import WarmParent\n"
        "parent = WarmParent()\n"
        f"open({str(tmp_path / 'script.py')!r}, 'w').close()\n"
        f"parent.start([{str(tmp_path / 'script.py')!r}], os.environ).wait()\n"
        "print(parent.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    client = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert client.returncode == -signal.SIGKILL, client.stderr
    assert gone(int(client.stdout))
    parent = WarmParent()
    parent.close()
    assert gone(parent.pid)


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_left_to_it_whatever_the_status_says(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({}, [])
    run.update_summary(status="running", reason="")
    process = Process(run)  # ends at once: the record is no configuration
    assert process.ended(60)
    run.claim()
    try:
        assert process.outcome() == HELD
        assert run.summary()["status"] == "running" and run.state() == "running"
    finally:
        run.release()


def test_a_process_knows_the_commit_of_the_code_that_it_was_loaded_with(start: Start, tmp_path: Path) -> None:
    process = start(
        "import subprocess",
        "subprocess.run = None  # nothing is asked any more",
        "from lab.tasks import git_state",
        "sys.exit(0 if 'commit' in git_state() else 3)",
    )
    assert process.wait(60) == 0, (tmp_path / "said").read_text()
