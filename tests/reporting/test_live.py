"""`python report.py watch=true`: what is served, to whom, and that it follows the records."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import report
from benchmarks.report_speed import write_runs
from crucible.liveness import this_process
from reporting import live
from reporting.progress import Progress, progress_of
from reporting.records import read_runs
from reporting.request import read_arguments

EPOCHS = 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two arms of three finished runs."""
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])
    monkeypatch.setattr(live, "REST", 0.0)
    write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.02}, range(3), epochs=EPOCHS, images=0)
    for path in (tmp_path / "cifar10").iterdir():
        change(path, elapsed_s=100.0, steps=1000, kind="k", identity=path.name.partition("-")[0])
    return tmp_path


def change(run: Path, **values: Any) -> None:
    known = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**known, **values}))


def holder() -> dict[str, Any]:
    """A process that lives: a claim in one's own number would be one of before."""
    return {k: v for k, v in this_process().items() if k != "start"} | {"pid": os.getppid()}


def begin(folder: Path, seed: int, status: str = "running", **values: Any) -> Path:
    """A further run of mixup, which a process that lives holds."""
    run = folder / "cifar10" / f"00000001-s{seed}"
    shutil.copytree(folder / "cifar10" / "00000001-s0", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"max_epochs: \d+", f"max_epochs: {EPOCHS}", config))
    head, first, *_ = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text(head + first)
    claim = {**holder(), "since": time.time(), "job": "SLURM job 7_3", "gpus": "2"}
    (run / "claim").write_text(json.dumps(claim))
    now = {"epochs": 1, "steps": 250, "elapsed_s": 30.0, "heartbeat": time.time()}
    change(run, status=status, seed=seed, **{**now, **values})
    return run


def plan(folder: Path, runs: Mapping[Path, str], **facts: Any) -> None:
    """The record of a sweep that is at work in this process."""
    listed = [
        {
            "arm": arm,
            "run": os.path.relpath(path, folder / "sweeps" / "1"),
            "seed": int(path.name[-1]),
            "kind": "k",
            "passes": 1,
            "steps": 1000,
        }
        for path, arm in runs.items()
    ]
    record = {
        "process": this_process(),
        "slots": 2,
        "runs": listed,
        "baseline": "baseline",
        "created": 1.0,
        **facts,
    }
    (folder / "sweeps" / "1").mkdir(parents=True)
    (folder / "sweeps" / "1" / "sweep.json").write_text(json.dumps(record))


class Viewer:
    """Asks for the page, and remembers what it was given last."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.host, self.tag = port, host, ""

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, Mapping[str, str]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.headers)

    def look(self) -> str | None:
        """The page; None where it is the one that this viewer has."""
        status, text, headers = self.ask(**({"If-None-Match": self.tag} if self.tag else {}))
        assert status == (200 if text else 304)
        self.tag = headers["ETag"]
        return text or None


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[live.Watcher, Viewer]]:
    watcher = live.Watcher([f"runs={folder}"])
    with live.serving(watcher, 0) as port:
        yield watcher, Viewer(port)


def now_of(text: str) -> str:
    """The words of what is under way."""
    return " ".join(re.sub(r"<[^>]+>", " ", text.partition(">Now<")[2].partition("<h2>cifar10")[0]).split())


def test_the_page_follows_runs_as_they_begin_go_on_and_fail(
    folder: Path, served: tuple[live.Watcher, Viewer]
) -> None:
    watcher, viewer = served
    assert "Reading the records" in (viewer.look() or "")
    assert watcher.look()
    first = viewer.look() or ""
    assert "nothing is at work, 6 ended" in now_of(first) and "<h3>Verdicts</h3>" in first
    assert not watcher.look() and viewer.look() is None, "nothing is new"
    run = begin(folder, 8)
    begin(folder, 9, status="failed", reason="out of <memory>")
    assert watcher.look()
    now = now_of(viewer.look() or "")
    own = holder()
    for words in (f"{own['host']}, process {own['pid']}; SLURM job 7_3", "mixup, seed 8", f"1 of {EPOCHS} epochs",
                  "GPU 2", "out of &lt;memory&gt;", "1 at work, 6 ended, 1 failed or lost"):  # fmt: skip
        assert words in now, words
    change(run, status="finished")
    (run / "claim").unlink()
    assert watcher.look() and "nothing is at work, 7 ended" in now_of(viewer.look() or "")


def test_a_run_that_dies_without_a_word_is_said_to_be_lost(
    folder: Path, served: tuple[live.Watcher, Viewer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of its changes."""
    monkeypatch.setattr(live, "ALIVE_S", -1.0)
    watcher, viewer = served
    begin(folder, 8)
    watcher.look()
    assert "1 at work" in now_of(viewer.look() or "")
    monkeypatch.setattr("crucible.run.lives", lambda process: False)
    assert watcher.look()
    assert "1 failed or lost" in (now := now_of(viewer.look() or "")) and "stopped without a word" in now


def test_records_that_are_half_written_or_in_the_way_leave_the_page_standing(
    folder: Path, served: tuple[live.Watcher, Viewer], monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher, viewer = served
    run = begin(folder, 8)
    for name in ("summary.json", "metrics.csv", "config.yaml", "claim"):
        whole = (run / name).read_text()
        for part in ("", whole[: len(whole) // 2], "\x00{"):
            (run / name).write_text(part)
            watcher.look()
        (run / name).write_text(whole)
    watcher.look()
    assert "1 at work" in now_of(viewer.look() or "")

    def broken(*arguments: Any) -> None:
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(live, "progress_of", broken)
        change(run, epochs=2)
        watcher.look()
        text = viewer.look() or ""
    assert "cannot be read as they are" in text and "RuntimeError: unforeseen" in text and "Verdicts" in text
    assert watcher.look() and "unforeseen" not in (viewer.look() or "")


def test_a_folder_without_a_run_is_waited_for(tmp_path: Path) -> None:
    watcher = live.Watcher([f"runs={tmp_path}"])
    assert watcher.look() and b"no run directory there" in watcher.shown.content


def test_only_this_machines_own_user_is_answered_and_only_with_the_page(
    folder: Path, served: tuple[live.Watcher, Viewer], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, viewer = served
    for host, status in {
        "127.0.0.1": 200, "localhost:8000": 200, "[::1]:80": 200, "LOCALHOST": 200,
        "attacker.example": 403, "127.0.0.1.attacker.example:80": 403, "localhost:1:2": 403, "": 403,
    }.items():  # fmt: skip
        assert viewer.ask(Host=host)[0] == status, host
    for path in ("/report.md", "/../../etc/passwd", "/%2e%2e/summary.json", f"{folder}"):
        assert viewer.ask(path)[0] == 404, path
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        assert viewer.ask(method=method)[0] == 405, method
    _, text, headers = viewer.ask()
    assert (
        "script-src 'sha256-" in headers["Content-Security-Policy"]
        and "Access-Control-Allow-Origin" not in headers
    )
    assert not re.search(r'(src|href)="(?!#|data:)', text), "nothing comes from elsewhere"
    with socket.socket() as outside:
        outside.settimeout(1)
        assert outside.connect_ex((_own_address(), viewer.port)) != 0, "loopback only"
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert (viewer.ask()[0] == 403) == (Path("/proc/net/tcp").exists() and os.geteuid() != 0)


def _own_address() -> str:
    """Of this machine on a network; another loopback one where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def test_a_wrong_command_is_said_in_a_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for wrong, said in {
            ("watch=true", f"port={port}"): f"port={port}: Address already in use",
            ("port=8000",): "port=8000: is for watch=true",
            ("watch=true", "port=65536"): "port must be a whole number from 1 to 65535",
            ("watch=maybe",): "watch must be one of true, false",
            ("watch=true", "wandb=here"): "wandb=here: not with watch=true",
        }.items():
            assert report.main([f"runs={folder}", *wrong]) == 2
            assert capfd.readouterr().err.startswith(f"error: {said}")


def test_the_file_is_the_one_that_a_plain_report_writes(folder: Path, tmp_path: Path) -> None:
    def without_time(text: str) -> str:
        return re.sub(r"Written [\d: -]+", "", text)

    watcher = live.Watcher([f"runs={folder}", "watch=true"])
    watcher.look()
    assert not list(folder.glob("**/report.html")), "nothing is written unless it is asked for"
    watching = live.Watcher([f"runs={folder}", "watch=true", "port=9", f"out={tmp_path}/out"])
    watching.look()
    by_watching = (tmp_path / "out" / "report.html").read_text()
    assert report.main([f"runs={folder}", f"out={tmp_path}/out"]) == 0
    assert without_time((tmp_path / "out" / "report.html").read_text()) == without_time(by_watching)


# What is left, and when it ends


def read(folder: Path) -> Progress:
    request = read_arguments([f"runs={folder}"])
    return progress_of(*read_runs(request), request.folders)


def test_the_end_is_what_is_left_at_the_pace_of_its_kind_over_the_workers(folder: Path) -> None:
    """A run at work goes on at its own pace: 250 of 1,000 steps in 30 s; one that waits takes its arm's 100 s."""
    run = begin(folder, 8)
    waiting = [folder / "cifar10" / f"00000001-s{seed}" for seed in (6, 7)]
    plan(
        folder,
        {run: "mixup", **dict.fromkeys(waiting, "mixup"), folder / "cifar10" / "00000000-s0": "baseline"},
    )
    found = read(folder)
    assert [one.share for one in found.running] == [0.25] and len(found.waiting) == 2 and found.workers == 2
    assert found.running[0].left == pytest.approx(90, abs=1)
    # the second worker takes the first that waits (0 to 100 s), the first the other (90 to 190 s)
    assert found.end - found.time == pytest.approx(190, abs=1)


def test_what_a_run_has_left_is_not_known_before_any_of_its_kind_has_steps(folder: Path) -> None:
    """And it is as soon as one that is under way has: in 30 s it makes 250 of 1,000 steps."""
    for path in (folder / "cifar10").iterdir():
        change(path, elapsed_s=None)
    first = begin(folder, 7, steps=0, epochs=0, elapsed_s=None)
    waiting = folder / "cifar10" / "00000001-s9"
    plan(folder, {first: "mixup", waiting: "mixup"})
    found = read(folder)
    assert math.isnan(found.running[0].left) and math.isnan(found.end)
    watcher = live.Watcher([f"runs={folder}"])
    watcher.look()
    shown = now_of(watcher.shown.content.decode())
    assert "all will have ended is not known" in shown and "0 s" not in shown
    begin(folder, 8, elapsed_s=30.0)
    found = read(folder)
    assert [one.left for one in found.running] == pytest.approx([120, 90], abs=1)
    assert found.end - found.time == pytest.approx(210, abs=1)


def test_trouble_that_is_over_is_no_longer_shown(folder: Path) -> None:
    watcher = live.Watcher([f"runs={folder}"])
    watcher.look()
    away = folder.rename(folder.with_name("away"))
    watcher.look()
    assert "cannot be read" in watcher.shown.content.decode()
    away.rename(folder)
    watcher.look()
    assert "cannot be read" not in watcher.shown.content.decode()


def test_the_files_follow_the_runs_that_are_left_out_as_well(folder: Path, tmp_path: Path) -> None:
    run = begin(folder, 8)
    watcher = live.Watcher([f"runs={folder}", "watch=true", "port=9", f"out={tmp_path}/out"])
    watcher.look()
    page = tmp_path / "out" / "report.md"
    assert f"{run} | running" in page.read_text()
    (run / "claim").unlink()
    change(run, status="failed", reason="the roof is on fire")
    watcher.look()
    assert f"{run} | failed | the roof is on fire" in page.read_text()


def test_the_next_look_is_judged_by_the_metric_that_decides(folder: Path) -> None:
    """A run that guesses is none of the pairs, whatever metric the page is read by."""
    decides = {"seeds": list(range(8)), "fold": 0, "metric": "test/acc", "futility": 0.1, "order": "together"}
    facts: dict[str, Any] = {"arms": ["baseline", "mixup"], "planned_seeds": [3, 8], "margin_points": 0.3}
    carried = {**facts, "decides": decides, "baseline": "baseline", "created": 1.0, "rule": 3, "folder": "1"}
    for path in (folder / "cifar10").iterdir():
        final = json.loads((path / "summary.json").read_text())["final"]
        guesses = {"test/acc": 0.1} if path.name == "00000001-s1" else {}
        change(path, sweep=carried, final={**final, "test/loss": 1.0, **guesses})
    request = read_arguments([f"runs={folder}", "metric=test/loss"])
    (look,) = progress_of(*read_runs(request), request.folders).looks
    assert look.steps["mixup"].found == "unstable"


def test_a_sweep_that_was_left_asks_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(folder, {folder / "cifar10" / "00000001-s7": "mixup"})
    assert len(read(folder).waiting) == 1
    monkeypatch.setattr("reporting.progress.lives", lambda process: False)
    assert not read(folder).waiting and math.isnan(read(folder).end)


def test_a_plan_moves_with_its_runs_and_one_of_before_that_names_them_from_the_root_is_read(
    folder: Path,
) -> None:
    waiting = folder / "cifar10" / "00000001-s7"
    plan(folder, {waiting: "mixup"})
    moved = folder.rename(folder.with_name("moved"))
    assert [fact.path for fact in read(moved).waiting] == [moved / "cifar10" / waiting.name]
    file = moved / "sweeps" / "1" / "sweep.json"
    record = json.loads(file.read_text())
    record["runs"][0]["run"] = str(waiting)
    file.write_text(json.dumps(record))
    assert [fact.path for fact in read(moved).waiting] == [waiting]


def test_the_next_look_says_what_it_waits_for(folder: Path) -> None:
    """Three seeds of two arms of a first look at five have ended."""
    decides = {"seeds": list(range(8)), "fold": 0, "metric": "test/acc", "futility": 0.1, "order": "together"}
    facts: dict[str, Any] = {"arms": ["baseline", "mixup"], "planned_seeds": [5, 8], "margin_points": 0.3}
    carried = {**facts, "decides": decides, "baseline": "baseline", "created": 1.0, "rule": 3, "folder": "1"}
    for path in (folder / "cifar10").iterdir():
        change(path, sweep=carried)
    plan(folder, {folder / "cifar10" / "00000001-s3": "mixup"}, **facts, decides=decides, rule=3)
    (look,) = read(folder).looks
    assert (look.seeds, look.number, look.ended, look.asked, list(look.wanted)) == (5, 1, 6, 10, ["mixup"])
    watcher = live.Watcher([f"runs={folder}"])
    watcher.look()
    shown = now_of(watcher.shown.content.decode())
    assert "Look 1 of 2 is at 5 seeds, by test/acc: 6 of its 10 runs have ended; open are mixup" in shown


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        (["1e17"] * 3, 3), (["1e308", "-1e308"], 0), (["1.7e308"] * 2, 0), (["5e-324", "1e-323"], 0), (["0.0"] * 2, 3),
        (["2e-12", "4e-12"], 3), (["1.0", "1.0000000000000002"], 0), (["-3e200", "1e17"], 3), (["0.5", "2.0"], 3),
    ],
)  # fmt: skip
def test_curves_of_any_numbers_leave_the_page_standing(folder: Path, values: list[str], ticks: int) -> None:
    """As of a run under way that diverges; a picture without room for them is left out."""
    rows = ["epoch,step,train/loss", *(f"{e},{25 * e + 25},{value}" for e, value in enumerate(values))]
    (begin(folder, 3) / "metrics.csv").write_text("\n".join(rows) + "\n")
    watcher = live.Watcher([f"runs={folder}"])
    watcher.look()
    page = watcher.shown.content.decode()
    assert "The records cannot be read" not in page and "1 at work" in page
    drawn = re.search(r'<svg role="img" aria-label="Curves so far".*?</svg>', page, re.DOTALL)
    labels = re.findall(r'text-anchor="end">([^<]+)<', drawn[0]) if drawn else []
    assert len(set(labels)) >= ticks and "nan" not in (drawn[0] if drawn else "")


def test_plans_of_the_same_form_have_each_their_own_next_look(folder: Path) -> None:
    """Three seeds of two arms; another network has the same arms and looks, and one seed."""
    decides = {"seeds": list(range(8)), "fold": 0, "metric": "test/acc", "futility": 0.1, "order": "together"}
    facts: dict[str, Any] = {"arms": ["baseline", "mixup"], "planned_seeds": [5, 8], "margin_points": 0.3}
    carried = {**facts, "decides": decides, "baseline": "baseline", "created": 1.0, "rule": 3}
    for path in sorted((folder / "cifar10").iterdir()):
        name = path.name.partition("-")[0]
        own = {"identities": {"baseline": "00000000", "mixup": "00000001"}, "folder": "1"}
        change(path, sweep={**carried, **own}, identity=name)
        if path.name.endswith("-s0"):
            other = shutil.copytree(path, path.with_name(f"1{path.name[1:]}"))
            theirs = {"identities": {"baseline": "10000000", "mixup": "10000001"}, "folder": "2"}
            change(other, sweep={**carried, **theirs}, identity=f"1{name[1:]}")
    looks = sorted((look.ended, look.asked) for look in read(folder).looks)
    assert looks == [(2, 10), (6, 10)]


def test_ctrl_c_ends_it_cleanly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = []

    def interrupted(seconds: float) -> None:
        port = int(re.search(r"http://127.0.0.1:(\d+)/", capfd.readouterr().out)[1])  # type: ignore[index]
        answers.append((port, Viewer(port).ask()[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "time", SimpleNamespace(**{**vars(time), "sleep": interrupted}))
    assert report.main([f"runs={folder}", "watch=true"]) == 0
    assert capfd.readouterr() == ("no longer served\n", "")
    ((port, status),) = answers
    assert status == 200
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", port)) != 0
