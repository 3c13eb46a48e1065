"""What the trackers get of a run, which W&B server is asked on which way, and that no tracker costs a training."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, runs_in

from crucible.loggers import build_loggers, close_loggers, wandb_mode
from crucible.options import ConfigError
from lab.warm import WarmParent

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
EXTRAS = [name for name in ("tensorboard", "mlflow") if importlib.util.find_spec(name)]


# What they get of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm_parent: WarmParent) -> Path:
    """A run of two epochs of five steps, a row of steps.csv every second one, in each tracker that is installed."""
    folder = tmp_path_factory.mktemp("tracked")
    options = [
        option for option in TINY if not option.startswith(("logger", "callbacks.plots", "trainer.max"))
    ]
    outcome = Command(
        folder, *options, "trainer.max_epochs=2", "trainer.log_every_n_steps=2", "technique=logit_stats",
        *(f"logger.{name}=true" for name in EXTRAS), warm=warm_parent,
    ).outcome()  # fmt: skip
    assert outcome.status == 0, outcome.err
    (found,) = runs_in(folder / "experiments")
    return found


def rows(run: Path, name: str = "metrics.csv") -> list[dict[str, float]]:
    with (run / name).open(newline="", encoding="utf-8") as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


def results(run: Path) -> dict[str, float]:
    """The test's values, and the best validation's."""
    summary = json.loads((run / "summary.json").read_text())
    tested = {k: v for k, v in summary["final"].items() if k.startswith("test/")}
    return {**tested, **{f"best/{k}": v for k, v in summary["best"].items()}}


def expected(run: Path) -> dict[str, list[tuple[float, float]]]:
    """`(step, value)` of all scalars that a tracker is to have."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows(run):
        for name in row.keys() - {"step"}:
            found.setdefault(name, []).append((row["step"], row[name]))
    for row in rows(run, "steps.csv"):
        for name in row.keys() - {"step", "epoch"}:
            found.setdefault(f"step/{name}", []).append((row["step"], row[name]))
    return found | {name: [(10, value)] for name, value in results(run).items()}


def wandb_records(run: Path) -> Iterator[Any]:
    """The records of the offline run, in the framing of LevelDB's logs: blocks of 32 KiB, a head of 7 bytes a part."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, place, content = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(content)
            content = b""


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def test_wandb_has_an_epoch_as_one_row_over_epochs_and_the_test_in_the_summary(run: Path) -> None:
    history, summary, over, begun = [], {}, {}, []
    for record in wandb_records(run):
        if record.HasField("history"):
            history.append(items(record.history.item))
        elif record.HasField("summary"):
            summary |= items(record.summary.update)
        elif record.HasField("metric"):
            over[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif record.HasField("run"):
            begun.append(record.run)
    epochs = [row for row in history if "train/loss" in row]
    for row, written in zip(epochs, rows(run), strict=True):
        assert {k: row[k] for k in written if k != "step"} == pytest.approx(
            {k: written[k] for k in written if k != "step"}
        )
        assert row["trainer/global_step"] == written["step"]
    steps = [row for row in history if "step/loss" in row]
    assert [row["trainer/global_step"] for row in steps] == [2, 4, 6, 8, 10]
    assert steps[-1] is epochs[-1], "what is of one step is one row"
    assert not any(name.startswith("test/") for row in history for name in row if "confusion" not in name)
    assert {k: summary[k] for k in results(run)} == pytest.approx(results(run))
    assert (over["train*"], over["val*"], over["step/*"]) == ("epoch", "epoch", "trainer/global_step")
    pictures = {name.removesuffix("/_type") for row in history for name in row if name.endswith("/_type")}
    assert pictures == {"first_batch", "val/confusion_matrix", "curves", "test/confusion_matrix"}
    (first,) = begun
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert (
        config["callbacks.progress.refresh_rate"] == 20
        and config["model.lr"]
        and config["arm"] == "logit_stats"
    )
    assert first.display_name == run.name and not first.notes
    names = [first.display_name, first.run_group, first.job_type, first.project, *first.tags]
    assert not any("/home" in name or str(run.parent) in name for name in names)


def test_tensorboard_has_scalars_pictures_and_the_options_with_the_result(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, values in expected(run).items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in values], name
        assert [v for _, v in found] == pytest.approx([v for _, v in values], rel=1e-5), name
    pictures = {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}
    assert pictures == {
        "first_batch": [0],
        "curves": [10],
        "val/confusion_matrix": [10],
        "test/confusion_matrix": [10],
    }
    plugin = events.PluginTagToContent("hparams")
    begun = plugin_data_pb2.HParamsPluginData.FromString(
        plugin["_hparams_/session_start_info"]
    ).session_start_info
    assert begun.hparams["model.lr"].number_value > 0 and begun.hparams["arm"].string_value == "logit_stats"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment
    assert "test/acc" in {info.name.tag for info in experiment.metric_infos}


def test_mlflow_has_parameters_metrics_and_the_files(run: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parents[1] / '.mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("crucible")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == (run.name, "FINISHED")
    assert (
        tracked.data.params["callbacks.progress.refresh_rate"] == "20" and "model.lr" in tracked.data.params
    )
    assert tracked.data.metrics.keys() == expected(run).keys()
    for name, values in expected(run).items():
        found = [(m.step, m.value) for m in client.get_metric_history(tracked.info.run_id, name)]
        assert found == [(step, pytest.approx(value)) for step, value in values], name
    assert [file.path for file in client.list_artifacts(tracked.info.run_id)] == ["plots", "summary.json"]
    summary = Path(tracked.info.artifact_uri.removeprefix("file://")) / "summary.json"
    assert json.loads(summary.read_text())["status"] == "finished"


# MLflow's server comes and goes

MLFLOW = {"mlflow": {"_target_": "crucible.loggers.MLflow"}}


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield {"id": "1a2b3c4d-s0-7", "name": "1a2b3c4d-s0", "config": {"model.lr": 0.1}}
    close_loggers(0)


def test_a_resumed_run_goes_on_as_the_same_one(tmp_path: Path, facts: dict[str, Any]) -> None:
    folder = tmp_path / "digits" / "1a2b3c4d-s0"
    folder.mkdir(parents=True)
    (first,) = build_loggers(MLFLOW, folder, facts)
    close_loggers(143)
    assert first.experiment.get_run(first.version).info.status == "KILLED"
    (second,) = build_loggers(MLFLOW, folder, {**facts, "config": {"model.lr": 0.2, "model.sam": True}})
    again = second.experiment.get_run(second.version)
    assert (second.version, again.info.status) == (first.version, "RUNNING")
    assert again.data.params == {"model.lr": "0.1", "model.sam": "True"}
    (other,) = build_loggers(MLFLOW, folder, {**facts, "id": "1a2b3c4d-s0-8"})
    assert other.version != first.version


def test_what_is_logged_while_the_server_is_away_is_sent_when_it_is_back(
    tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    (logger,) = build_loggers(MLFLOW, tmp_path / "digits" / "1a2b3c4d-s0", facts)
    sent = MlflowClient.log_batch

    def away(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1 / step}, step)
        logger.save()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "connection refused; the training goes on" in said[0]
    monkeypatch.setattr(MlflowClient, "log_batch", sent)
    close_loggers(0)
    history = logger.experiment.get_metric_history(logger.version, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_a_server_that_is_not_there_is_one_line_and_costs_no_training(
    tmp_path: Path, facts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with served(200) as (url, _):
        pass  # nobody listens there any more
    node = {**MLFLOW["mlflow"], "uri": url}
    assert build_loggers({"mlflow": node}, tmp_path, facts) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"MLflow: {url} does not answer; this run is not tracked there"
    ]


# Which W&B server


class served:
    """A server on loopback that answers with one status; `(its address, what it was asked)`."""

    def __init__(self, status: int) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_CONNECT = do_GET

            def log_message(self, *arguments: Any) -> None: ...

        self._server, self._asked = ThreadingHTTPServer(("127.0.0.1", 0), Handler), asked
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def __enter__(self) -> tuple[str, list[str]]:
        return f"http://127.0.0.1:{self._server.server_port}", self._asked

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Without any variable that counts, with a key, and with a home and a folder of its own."""
    names = ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC", *PROXIES, *map(str.upper, PROXIES))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.mark.parametrize(("status", "mode"), [(200, "online"), (404, "online"), (503, "offline")])
def test_auto_asks_the_server_of_the_base_url(
    environment: pytest.MonkeyPatch, status: int, mode: str
) -> None:
    with served(status) as (url, asked):
        environment.setenv("WANDB_BASE_URL", f"{url}/")
        assert wandb_mode("auto") == mode and asked == ["/healthz"]
    assert wandb_mode("auto") == "offline", "it answers no more"


@pytest.mark.parametrize(
    ("variable", "server", "seen"),
    [
        ("HTTP_PROXY", "http://tracker.invalid", "http://tracker.invalid/healthz"),
        ("https_proxy", "https://tracker.invalid", "tracker.invalid:443"),
        ("HTTPS_PROXY", "", "api.wandb.ai:443"),
    ],
)
def test_auto_asks_through_the_proxy(
    environment: pytest.MonkeyPatch, variable: str, server: str, seen: str
) -> None:
    with served(403) as (proxy, asked):
        environment.setenv(variable, proxy)
        environment.setenv("WANDB_BASE_URL", server)
        # a refusal of the server's is an answer; a tunnel that the proxy refuses leads nowhere
        assert wandb_mode("auto") == ("online" if variable == "HTTP_PROXY" else "offline")
        assert asked == [seen]
        environment.setenv("NO_PROXY", "127.0.0.1")
        with served(200) as (own, directly):
            environment.setenv("WANDB_BASE_URL", own)
            assert wandb_mode("auto") == "online" and directly and len(asked) == 1


def test_the_server_and_its_key_are_found_where_wandb_login_wrote_them(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.delenv("WANDB_API_KEY")
    with served(200) as (url, asked):
        settings = tmp_path / ".config" / "wandb" / "settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[default]\nbase_url = {url}\n")
        assert wandb_mode("auto") == "offline" and not asked
        host = url.removeprefix("http://")
        (tmp_path / ".netrc").write_text(f"machine {host} login user password key\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert wandb_mode("auto") == "online" and asked == ["/healthz"]
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # `wandb offline`
        assert wandb_mode("auto") == "offline" and len(asked) == 1


@pytest.mark.parametrize(("typed", "mode"), [("dryrun", "offline"), ("Offline", "offline"), ("", "disabled")])
def test_the_environment_decides_first_in_any_of_its_words(
    environment: pytest.MonkeyPatch, typed: str, mode: str
) -> None:
    environment.setenv("WANDB_MODE", typed)
    assert wandb_mode("disabled") == mode


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WANDB_MODE", "offlin", "WANDB_MODE=offlin: must be one of auto, online, offline, disabled"),
        ("WANDB_BASE_URL", "wandb.example.org", "WANDB_BASE_URL=wandb.example.org: an address is meant"),
        ("WANDB_BASE_URL", "https://host:port", "WANDB_BASE_URL=https://host:port: an address is meant"),
    ],
)
def test_what_has_no_meaning_is_one_line(
    environment: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    environment.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        wandb_mode("auto")


def test_it_is_refused_before_a_run_folder_is_made(
    cli: Any, tmp_path: Any, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("WANDB_MODE", "offlin")
    outcome = cli(*[option for option in TINY if option != "logger.wandb=null"])
    assert outcome.status == 2 and "WANDB_MODE=offlin" in outcome.err and not runs_in(tmp_path)
