"""A run can be killed at any point and goes on as if nothing had happened: bit-identical weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command, nightly, runs_in, summary_of

import main
from crucible.liveness import stopping_signals
from lab.warm import WarmParent

ROOT = Path(main.__file__).parent

# dropout, mixing and drop paths draw random numbers; online norm and momentum carry state
STATEFUL = [
    *TINY, "trainer.max_epochs=3", "model.mixup=true", "model.resnet_dropout=0.2", "model.stochastic_depth=0.2",
    "checkpoint.every_steps=2", "model.warmstart=1", "model.norm=online",
]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for_step(folder: Path, process: Command, step: int) -> Path:
    """Wait until last.ckpt of the run holds at least `step` optimizer steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for run in runs_in(folder):
            file = run / "checkpoints" / "last.ckpt"
            if file.is_file() and torch.load(file, weights_only=True)["global_step"] >= step:
                return run
        time.sleep(0.02)
    pytest.fail(f"never reached step {step}: {process.said if process.poll() is not None else 'too slow'}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, warm_parent: WarmParent) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    whole = Command(folder, *STATEFUL, warm=warm_parent).outcome()
    assert whole.status == 0, whole.err
    return runs_in(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "real"),
    [
        pytest.param(2, False, id="2", marks=pytest.mark.nightly),
        pytest.param(4, False, id="4"),
        pytest.param(8, True, id="8", marks=pytest.mark.nightly),
    ],
)
def test_kill_minus_9_loses_nothing(
    launch, shell, tmp_path: Path, uninterrupted: Path, step: int, real: bool
) -> None:
    process = launch(*STATEFUL, real=real)
    run = wait_for_step(tmp_path, process, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert summary_of(run)["status"] == "running"
    resumed = shell(f"run={run}", "data.module.num_workers=2", real=real)
    assert resumed.status == 0, resumed.err
    assert equal(weights(run), weights(uninterrupted))
    rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP as a terminal has it, for this process and what it starts: the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, *nightly(signal.SIGINT), signal.SIGUSR1, signal.SIGHUP])
def test_a_polite_stop_saves_the_state_says_so_and_the_same_command_goes_on(
    launch, shell, tmp_path: Path, uninterrupted: Path, number: int, hangups: None
) -> None:
    process = launch(*STATEFUL, real=number == signal.SIGHUP)
    run = wait_for_step(tmp_path, process, 3)
    os.kill(process.pid, number)
    assert process.outcome(60).status == 128 + number
    summary = summary_of(run)
    assert summary["status"] == "interrupted" and signal.Signals(number).name in summary["reason"]
    assert not (run / "claim").exists()
    resumed = shell(*STATEFUL)
    assert resumed.status == 0, resumed.err
    assert equal(weights(run), weights(uninterrupted))


@pytest.mark.slow
def test_a_run_in_progress_is_left_alone(launch, shell, tmp_path: Path) -> None:
    process = launch(*TINY, "trainer.max_epochs=500", "checkpoint.every_steps=2")
    wait_for_step(tmp_path, process, 2)
    second = shell(*TINY, "trainer.max_epochs=500", "checkpoint.every_steps=2")
    assert second.status != 0 and "in progress" in second.err


@pytest.mark.slow
def test_worker_count_does_not_change_the_result(shell, tmp_path: Path, uninterrupted: Path) -> None:
    outcome = shell(*STATEFUL, "data.module.num_workers=2")
    assert outcome.status == 0, outcome.err
    assert equal(weights(runs_in(tmp_path)[0]), weights(uninterrupted))


def test_a_crash_is_recorded_with_its_reason(cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "bomb.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Bomb(Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_step == 3:\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    outcome = cli(*TINY, "user_dir=mine", "+callbacks.bomb._target_=bomb.Bomb")
    assert outcome.status == 1
    assert "the roof is on fire" in outcome.err and "Traceback" not in outcome.err
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    assert summary["status"] == "failed" and "the roof is on fire" in summary["reason"]
    assert "Traceback" in (run / "main.log").read_text()
    assert not (run / "claim").exists()


@pytest.mark.parametrize("limit", [3, *nightly(1.0)])
def test_a_crash_in_the_first_batch_of_an_epoch_loses_no_step(cli, tmp_path: Path, limit: float) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "late_bomb.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Bomb(Callback):\n"
        "    def on_train_batch_start(self, trainer, *rest):\n"
        "        if trainer.current_epoch == 2 and Path('bomb').exists():\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    command = [*TINY, "trainer.max_epochs=4", f"trainer.limit_train_batches={limit}"]
    command += ["user_dir=mine", "+callbacks.bomb._target_=late_bomb.Bomb"]
    assert cli(*command, "exp_dir=whole").status == 0
    (tmp_path / "bomb").touch()
    assert cli(*command, "exp_dir=stopped").status == 1
    (tmp_path / "bomb").unlink()
    assert cli(*command, "exp_dir=stopped").status == 0
    (whole,), (stopped,) = runs_in(tmp_path / "whole"), runs_in(tmp_path / "stopped")
    assert equal(weights(whole), weights(stopped))
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (whole, stopped)]
    assert [len(table) for table in rows] == [5, 5]


@pytest.mark.slow
def test_the_next_run_of_a_process_writes_nothing_into_the_log_of_the_one_before(cli, tmp_path: Path) -> None:
    assert cli(*TINY).status == 0
    (first,) = runs_in(tmp_path)
    said = (first / "main.log").read_text()
    assert cli(*TINY, "model.lr=1e30", "trainer.max_epochs=3").status == 1
    assert (first / "main.log").read_text() == said


def test_a_diverged_run_is_a_failed_run(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "model.lr=1e30", "trainer.max_epochs=3")
    assert outcome.status == 1 and "diverged" in outcome.err
    (run,) = runs_in(tmp_path)
    assert "diverged" in summary_of(run)["reason"]


# Whoever reads the output goes away


SAYS = "import sys; from crucible.writing import outlast_readers; outlast_readers()\n" + (
    "for number in range(3):\n    print(number, flush=True); print(number, file=sys.stderr, flush=True)\n"
    "    sys.stdin.readline()\n"
    "open('ended', 'w').close()"
)


@pytest.mark.parametrize(
    "kind",
    [
        "pipe",
        "terminal",
        pytest.param(
            "full disk", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
        ),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_program_says_outlasts_its_reader(kind: str, unbuffered: str, tmp_path: Path) -> None:
    opened = {
        "pipe": os.pipe,
        "terminal": os.openpty,
        "full disk": lambda: (-1, os.open("/dev/full", os.O_WRONLY)),
    }
    reader, writer = opened[kind]()
    program = subprocess.Popen(
        [sys.executable, "-c", SAYS], cwd=tmp_path, stdin=subprocess.PIPE, stdout=writer, stderr=writer,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}, start_new_session=True,
    )  # fmt: skip
    os.close(writer)
    if reader >= 0:
        assert os.read(reader, 1) == b"0"
        os.close(reader)
    program.communicate(b"\n" * 3, timeout=60)
    assert program.returncode == 0 and (tmp_path / "ended").exists()


def test_a_hangup_is_no_stop_where_it_is_ignored_as_under_nohup(hangups: None) -> None:
    assert signal.SIGHUP in stopping_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in stopping_signals()


def test_closed_streams_go_nowhere_and_no_file_gets_their_numbers(tmp_path: Path) -> None:
    says = (
        "import os, sys; from crucible.writing import outlast_readers; outlast_readers()\n"
        "with open('first', 'w') as file:\n"
        "    print('said'); print('said', file=sys.stderr); os.system('echo said; echo said >&2')\n"
        "    file.write(str(file.fileno() > 2))"
    )
    shell = f'exec {sys.executable} -c "$SAYS" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAYS": says}
    assert subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert (tmp_path / "first").read_text() == "True"


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [[], *nightly(["-m", "technique=baseline,mixup", "n_jobs=1"])])
def test_a_training_and_a_sweep_outlast_their_reader(sweep: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        *sweep,
        *TINY,
        "trainer.max_epochs=3",
        f"exp_dir={tmp_path}",
    ]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    assert program.stdout is not None and program.stdout.readline()
    program.stdout.close()
    assert program.wait(timeout=300) == 0
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*/*/summary.json")]
    assert [(r["status"], r["reason"], r["epochs"]) for r in records] == [("finished", "", 3)] * (
        1 + bool(sweep)
    )
    told = subprocess.Popen(
        [sys.executable, str(ROOT / "report.py"), f"runs={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert told.stdout is not None
    told.stdout.close()
    assert told.wait(timeout=120) == 0 and (tmp_path / "report" / "report.md").is_file()
