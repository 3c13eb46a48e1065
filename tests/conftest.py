"""Fixtures: the command line in process and as a process of its own, small image folders, tiny runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from PIL import Image

from crucible.handover import pass_on
from lab.warm import Cold, Started, WarmParent

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# the networks of the recorded runs of these tests, as if they had been typed
pass_on(typed=[f"model._target_=tiny_networks.{name}" for name in ("TinyResNet", "NarrowResNet")])


def pytest_configure(config: pytest.Config) -> None:
    """Inductor compiles in the test's process; what it made is shared by the session's workers and goes with it.

    So do the digests of files, which are otherwise kept in the user's cache. The techniques of a user's folder join
    every matrix.
    """
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="caches")
        os.environ |= {
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache.name}/inductor",
        }
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault(
            "MPLCONFIGDIR", str(users / "matplotlib")
        )  # its list of fonts takes long to make
        os.environ["XDG_CACHE_HOME"] = cache.name
        config.add_cleanup(cache.cleanup)
    if user_dir := config.getoption("--user-dir"):
        from technique_runs import add_techniques

        add_techniques(Path(user_dir).resolve())


def nightly(*values: Any) -> list[Any]:
    """Parameters of a test that belong to its long form."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


# a run of half a second: learnable, no files, no trackers
TINY = [
    "data=synthetic", "data.module.num_samples=96", "data.module.batch_size=16", "trainer.max_epochs=1",
    "model=cifar_resnet", "logger.wandb=null", "callbacks.plots=null",
    "trainer.enable_progress_bar=false",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--user-dir", help="a folder of techniques of one's own, for every matrix of techniques")


@pytest.fixture(autouse=True)
def environment_of_the_session() -> Iterator[None]:
    """What a test leaves in the environment (a command run in its process: what it hands over) ends with it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Outcome:
    """What a command came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run `python main.py ARGUMENTS` in this process; results go to `tmp_path/experiments`."""
    from hydra.core.global_hydra import GlobalHydra

    import main
    import report

    def run(*arguments: str, script: str = "main.py") -> Outcome:
        environment = dict(os.environ)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.chdir(tmp_path)
        os.environ["HYDRA_FULL_ERROR"] = "0"
        GlobalHydra.instance().clear()
        try:
            status = main.main() if script == "main.py" else report.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for logger in logging.Logger.manager.loggerDict.values():
                logger.disabled = False  # type: ignore[union-attr]  # Hydra switches off those it finds
        out, err = capfd.readouterr()
        return Outcome(status, out, err)

    return run


class Command:
    """`python SCRIPT ARGUMENTS` as a user types it, in a process group of its own.

    Args:
        folder: where it is typed.
        arguments: of the script.
        script: of the checkout.
        env: added to this process's.
        warm: starts the process; None: a real start.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: str = "main.py",
        env: Mapping[str, str] | None = None,
        warm: WarmParent | None = None,
    ) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # as long as the command
        command, environment = [str(ROOT / script), *arguments], {**os.environ, **(env or {})}
        outputs = self._out.fileno(), self._err.fileno()
        self._process: subprocess.Popen[bytes] | Started | None = None
        if warm is not None:
            with contextlib.suppress(Cold):
                self._process = warm.start(command, environment, *outputs, cwd=folder)
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment, start_new_session=True,
                stdout=outputs[0], stderr=outputs[1],
            )  # fmt: skip
        self.pid = self._process.pid
        self.poll, self.wait = self._process.poll, self._process.wait

    @property
    def said(self) -> tuple[str, str]:
        """Its output and its errors so far."""
        return tuple(os.pread(f.fileno(), 1 << 24, 0).decode() for f in (self._out, self._err))  # type: ignore[return-value]

    def outcome(self, timeout: float = 240) -> Outcome:
        """What it came to; nothing that it started is left."""
        try:
            status = self.wait(timeout)
        finally:
            self.end()
        return Outcome(status, *self.said)

    def end(self) -> None:
        """Kill it, and whatever it left running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(20)


@pytest.fixture(scope="session")
def warm_parent() -> Iterator[WarmParent]:
    """What the tests' commands are forked from."""
    parent = WarmParent()
    yield parent
    parent.close()


@pytest.fixture
def launch(tmp_path: Path, warm_parent: WarmParent) -> Iterator[Callable[..., Command]]:
    """Start `python main.py ARGUMENTS`; `real=True` for a start as the shell makes it. It ends with the test."""
    commands = []

    def start(*arguments: str, folder: Path = tmp_path, real: bool = False, **options: Any) -> Command:
        commands.append(Command(folder, *arguments, warm=None if real else warm_parent, **options))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


@pytest.fixture
def shell(launch: Callable[..., Command]) -> Callable[..., Outcome]:
    """Run `python main.py ARGUMENTS` to its end."""

    def run(*arguments: str, timeout: float = 240, **options: Any) -> Outcome:
        return launch(*arguments, **options).outcome(timeout)

    return run


@pytest.fixture
def ranks(launch: Callable[..., Command]) -> Callable[..., list[Outcome]]:
    """Run `python main.py ARGUMENTS` as two processes of one job, which torchrun would have started."""

    def run(*arguments: str, timeout: float = 240, port: int = 0, **options: Any) -> list[Outcome]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free.getsockname()[1])}
        shared |= {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        both = [
            launch(*arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
            for rank in range(2)
        ]
        return [rank.outcome(timeout) for rank in both]

    return run


@pytest.fixture
def on_two_processes(ranks: Callable[..., list[Outcome]]) -> Callable[..., None]:
    """Call a function of a test file, with texts, in both of two processes."""

    def call(function: Callable[..., None], *arguments: object) -> None:
        file = function.__code__.co_filename
        both = ranks(file, function.__name__, *map(str, arguments), script="tests/rank.py")
        assert [rank.status for rank in both] == [0, 0], both[0].err + both[1].err

    return call


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to distil from."""
    from technique_runs import make_teacher  # imports this file

    return make_teacher(tmp_path_factory.mktemp("teacher"))


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill whatever the process left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def runs_in(folder: Path) -> list[Path]:
    """The run directories under a folder."""
    return sorted(p.parent for p in folder.rglob("config.yaml"))


def summary_of(run: Path) -> dict[str, Any]:
    """What is in the run's summary.json; nothing where it has none yet."""
    file = run / "summary.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_images(folder: Path, classes: Sequence[str], count: int, size: tuple[int, int] = (40, 48)) -> None:
    """Small JPEGs, a colour a class under noise: `folder/<class>/<n>.jpg`."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            pixels = generator.integers(0, 120, (*size, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{n}.jpg")


@pytest.fixture
def imagenet_folder(tmp_path: Path) -> Iterator[Path]:
    """`train/<class>/`, `val/<class>/` with 3 classes of JPEGs."""
    root = tmp_path / "imagenet"
    for split, count in (("train", 16), ("val", 4)):
        write_images(root / split, ["n01", "n02", "n03"], count)
    return root  # type: ignore[return-value]
