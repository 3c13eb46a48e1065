"""Fixtures: the command line in process and as a process of its own, small image folders, tiny runs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Inductor compiles in the test's process; what it made is shared by the session's workers and goes with it.

    The techniques of a user's folder join every matrix.
    """
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="inductor")
        os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache.name}
        config.add_cleanup(cache.cleanup)
    if user_dir := config.getoption("--user-dir"):
        from technique_runs import add_techniques

        add_techniques(Path(user_dir).resolve())


def nightly(*values: Any) -> list[Any]:
    """Parameters of a test that belong to its long form."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


# a run of a second or two: learnable, no files, no trackers
TINY = [
    "data=synthetic", "data.module.num_samples=96", "data.module.batch_size=16", "trainer.max_epochs=1",
    "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--user-dir", help="a folder of techniques of one's own, for every matrix of techniques")


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

    def run(*arguments: str) -> Outcome:
        environment = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        monkeypatch.chdir(tmp_path)
        os.environ["HYDRA_FULL_ERROR"] = "0"
        GlobalHydra.instance().clear()
        try:
            status = main.main()
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


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Outcome]:
    """Run `python main.py ARGUMENTS` as a user does, in a process group of its own that ends with the test."""

    def run(
        *arguments: str, script: str = "main.py", timeout: float = 240, env: dict[str, str] | None = None
    ) -> Outcome:
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=tmp_path, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            end_group(process)
        return Outcome(process.returncode, out, err)

    return run


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
