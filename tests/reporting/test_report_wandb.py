"""report.py wandb=PROJECT: the report as an artifact of a W&B run, without a network."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

import report
from benchmarks.report_speed import write_runs
from crucible.loggers import log_report
from reporting.records import read_runs
from reporting.request import read_arguments


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `digits lab` with a written report, W&B offline and with its own files in `tmp_path`."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "digits lab" / "report"
    (folder / "plots").mkdir(parents=True)
    for name in ("report.md", "report.html", "results.csv", "plots/cost.png"):
        (folder / name).write_text(f"<p>{name}</p>")
    return folder.parent


@pytest.mark.slow
def test_an_offline_report_holds_all_of_its_files_and_is_synced_by_the_command_returned(lab: Path) -> None:
    wandb, sync, place = shlex.split(log_report(lab / "report", "lab", ["runs=digits lab", "wandb=lab"]))
    assert (wandb, sync) == ("wandb", "sync")
    folder = Path(place)
    assert folder.parent == lab / "wandb"
    (record,) = folder.glob("run-*.wandb")
    parts = [b"report-digits-lab", b"report.md", b"report.html", b"results.csv", b"cost.png", b"wandb=lab"]
    for _ in range(100):  # W&B's service, a process of its own, may still be closing the file
        missing = [part for part in parts if part not in record.read_bytes()]
        if not missing:
            break
        time.sleep(0.1)
    assert not missing
    (page,) = (folder / "files" / "media" / "html").glob("report_*.html")
    assert page.read_text() == "<p>report.html</p>"


def test_a_run_that_is_open_in_the_process_stays_apart_and_open(lab: Path, tmp_path: Path) -> None:
    import wandb

    (tmp_path / "other").mkdir()
    with wandb.init(project="other", dir=tmp_path / "other", mode="offline") as other:
        place = Path(shlex.split(log_report(lab / "report", "lab", []))[2])
        assert place.parent == lab / "wandb"
        assert wandb.run is other


def test_where_wandb_is_disabled_nothing_is_written(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_report(lab / "report", "lab", []) == "nowhere, W&B is disabled"
    assert not (lab / "wandb").exists()


def test_the_option_logs_what_was_written(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = []
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])
    monkeypatch.setattr("crucible.loggers.log_report", lambda *given: logged.append(given) or "wandb sync X")
    write_runs(lab, {"baseline": 0.0, "mixup": 0.01}, range(2), epochs=2, images=100)
    arguments = [f"runs={lab}"]
    assert report.main(arguments) == 0
    assert not logged
    assert report.main([*arguments, "wandb=lab"]) == 0
    assert logged == [(lab / "report", "lab", [*arguments, "wandb=lab"])]
    assert capsys.readouterr().out.endswith("logged: wandb sync X\n")


def test_the_files_of_wandb_are_no_runs(lab: Path) -> None:
    write_runs(lab, {"baseline": 0.0, "mixup": 0.01}, range(2), epochs=2, images=100)
    request = read_arguments([f"runs={lab}"])
    before = read_runs(request)
    (lab / "wandb" / "run-1" / "files").mkdir(parents=True)
    (lab / "wandb" / "run-1" / "files" / "config.yaml").write_text("arguments: {value: []}\n")
    after = read_runs(request)
    assert [len(part) for part in after] == [len(part) for part in before] == [4, 0]
