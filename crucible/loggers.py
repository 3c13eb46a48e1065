"""W&B, TensorBoard and MLflow as options; metrics.csv is written in any case."""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import http.client
import importlib.util
import logging
import netrc
import os
import re
import shlex
import ssl
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from crucible import private
from crucible.masking import masked, masked_in
from crucible.metrics import of_split
from crucible.options import ConfigError

log = logging.getLogger("crucible")

WandbMode = Literal["auto", "online", "offline", "disabled"]
ANSWER_S = 3.0  # a server has so long to answer
INIT_S = 30  # W&B has so long to begin a run
SEND_S = 5.0  # MLflow gets what is logged in one request every so many seconds, and at each epoch's end
RETRY_S = 60.0  # a server of MLflow's that failed is asked again after so long
AT_ONCE = 1000  # metrics in a request, the most that MLflow takes
PARAMETERS_AT_ONCE, PARAMETER_LENGTH = 100, 500  # likewise
_NO_ANSWER = (407, 502, 503, 504)  # what a proxy says instead of the server
TAG_LENGTH = 64  # W&B refuses longer ones


# Which server, and whether it is there


def answers(url: str) -> bool:
    """Whether a server answers a request within three seconds, through the proxy that the environment names, if any.

    HTTP_PROXY, HTTPS_PROXY and NO_PROXY count, as for the trackers' own libraries. Any answer of the server's does, a
    refusal too; none is what a proxy says where it does not reach it. Whether to trust a certificate is the library's
    decision.
    """
    try:
        request = Request(url, headers={"User-Agent": "crucible"})
        with build_opener().open(request, timeout=ANSWER_S):  # urlopen goes on with the first call's proxies
            return True
    except HTTPError as error:
        return error.code not in _NO_ANSWER
    except URLError as error:
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _address(name: str, url: str, example: str) -> str:
    """An address of a server, without a slash at its end.

    Raises:
        ConfigError: where it is none.
    """
    try:
        parts = urlsplit(url)
        whole = parts.hostname is not None and parts.scheme in ("http", "https") and (parts.port or 1) > 0
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(f"{name}={masked(url)}: an address is meant, such as {example}", "docs/wandb.md")
    return url.rstrip("/")


def _wandb_settings() -> dict[str, str]:
    """What `wandb login --host` and `wandb offline` have written: of the account, and of this folder, which wins."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    known = configparser.ConfigParser(interpolation=None)
    for file in (Path(folder) / "settings", Path("wandb") / "settings"):
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            known.read(file, encoding="utf-8")
    return dict(known["default"]) if "default" in known else {}


def wandb_server() -> str:
    """The address of the W&B server: of WANDB_BASE_URL, else of `wandb login --host`, else W&B's own.

    Raises:
        ConfigError: where that is no address.
    """
    url = os.environ.get("WANDB_BASE_URL") or _wandb_settings().get("base_url") or "https://api.wandb.ai"
    return _address("WANDB_BASE_URL", url, "https://wandb.example.org")


def has_wandb_key() -> bool:
    """Whether W&B could log in at its server without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / name for name in (".netrc", "_netrc")]
    host = urlsplit(wandb_server()).netloc
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc(file).authenticators(host) is not None
    return False


def _asked_mode(mode: str) -> str:
    """The mode of WANDB_MODE, else of the configuration, else (auto) of `wandb offline` or `wandb online`.

    Raises:
        ConfigError: for a value that is none, and for `online` without a key.
    """
    asked = os.environ.get("WANDB_MODE", "").strip().lower() or mode
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's older words
    if asked not in get_args(WandbMode):
        raise ConfigError(
            f"WANDB_MODE={asked}: must be one of {', '.join(get_args(WandbMode))}", "docs/wandb.md"
        )
    if asked == "auto" and _wandb_settings().get("mode") in ("offline", "disabled"):
        return _wandb_settings()["mode"]
    if asked == "online" and not has_wandb_key():
        raise ConfigError(
            "logger.wandb.mode=online needs WANDB_API_KEY or `wandb login`; use auto or offline"
        )
    return asked


def wandb_mode(mode: WandbMode) -> str:
    """`online`, `offline` or `disabled`; never one that would prompt or wait.

    WANDB_MODE in the environment decides first; `auto` is online with a key and a server that `answers`.

    Raises:
        ConfigError: for a WANDB_MODE or WANDB_BASE_URL without meaning, and for `online` without a key.
    """
    asked = _asked_mode(mode)
    if asked != "auto":
        return asked
    server = wandb_server()
    if not has_wandb_key():
        return "offline"
    if answers(f"{server}/healthz"):
        return "online"
    log.warning("W&B: %s does not answer; this run is written offline", masked(server))
    return "offline"


# The trackers


class Tracker:
    """What Crucible asks of a tracker of its own, besides what Lightning does."""

    def goes_on_from(self, step: int) -> None:
        """The training begins, or goes on, after optimizer step `step`: what was logged of later ones is void."""

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Show a PNG file under a name such as `val/confusion_matrix`."""

    def log_result(self, values: Mapping[str, float], step: int) -> None:
        """The results of a finished training, once: `test/...` and `best/...`."""

    def close(self, status: int) -> None:
        """The run ends with this exit status, and its summary.json is written."""


class Wandb(WandbLogger, Tracker):
    """A W&B run for a Crucible run: grouped by data and arm, tagged with techniques and design, the config flat.

    Its history has a row a step: an epoch's values of training and validation are one row, over `epoch`; `step/*` are
    over `trainer/global_step`, and in the epoch's row where its last step has some. The test is in the summary.

    Args:
        mode: `auto` (online with a key and a server that answers, else offline), `online`, `offline`, `disabled`.
        project: W&B project.
        entity: W&B team or user; null: the account's own.
        group: null: data name and arm.
        tags: added to the techniques.
        folder: the run directory; files go to `folder/wandb`.
        facts: `{"id", "name", "group", "job_type", "tags", "config"}` of the run; the type of job is the design of
            its sweep.
    """

    def __init__(
        self,
        mode: WandbMode = "auto",
        project: str = "crucible",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        folder: Path | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        facts = facts or {}
        os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(
            name=facts.get("name"),
            id=facts.get("id"),
            project=project,
            entity=entity,
            group=group or facts.get("group"),
            job_type=facts.get("job_type"),
            tags=sorted({tag[:TAG_LENGTH] for tag in (*facts.get("tags", []), *(tags or []))}),
            save_dir=str(folder or "."),
            config=facts.get("config"),
            mode=wandb_mode(mode),
            resume="allow",
        )
        self._row: dict[str, Any] = {}
        self._step: int | None = None
        self._arguments = private.wandb_arguments(self)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for; offline where the server refuses it."""
        if self._experiment is None:
            import wandb

            settings = None if "WANDB_INIT_TIMEOUT" in os.environ else wandb.Settings(init_timeout=INIT_S)
            arguments = {**self._arguments, "settings": settings, "reinit": "finish_previous"}
            try:
                run = wandb.init(**arguments)
            except wandb.Error as error:
                said = " ".join(masked(str(error)).split())[:200]
                log.warning("W&B: %s; this run is written offline", said)
                wandb.teardown()  # which holds the id of the run that was refused
                run = wandb.init(**{**arguments, "mode": "offline"})
            run.define_metric("epoch", hidden=True)
            run.define_metric("trainer/global_step", hidden=True)
            for name in ("train*", "val*", "logits/*", "time/*", "lr"):
                run.define_metric(name, step_metric="epoch")
            run.define_metric("step/*", step_metric="trainer/global_step")
            self._experiment = run
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add to the row of this step, which is sent with `save`, or when another step's values come."""
        values = {k: v for k, v in metrics.items() if not of_split(k, "test")}
        if values.keys() - {"epoch"}:
            self._add(values, step)

    def _add(self, values: Mapping[str, Any], step: int | None) -> None:
        if step is not None and step != self._step:
            self.save()
            self._step = step
        self._row |= values

    @rank_zero_only
    def save(self) -> None:
        """Send the row."""
        if self._row:
            row, self._row = self._row, {}
            self.experiment.log(row if self._step is None else {**row, "trainer/global_step": self._step})

    @rank_zero_only
    def log_picture(self, name: str, file: Path, step: int) -> None:
        from wandb import Image as Picture

        self._add({name: Picture(str(file))}, step)

    @rank_zero_only
    def log_result(self, values: Mapping[str, float], step: int) -> None:
        self.experiment.summary.update(dict(values))

    def finalize(self, status: str) -> None:
        """A fit or a test has ended; the W&B run goes on until `close`."""
        self.save()

    def close(self, status: int) -> None:
        if self._experiment is not None:
            self.save()
            self._experiment.finish(exit_code=status)


class TensorBoard(TensorBoardLogger, Tracker):
    """TensorBoard events in `folder/tensorboard`: scalars over the optimizer step, pictures, at the end the options.

    Raises:
        ConfigError: where the package is missing.
    """

    def __init__(self, folder: Path | None = None, facts: dict[str, Any] | None = None) -> None:
        _check_tensorboard()
        super().__init__(save_dir=str(folder or "."), name="tensorboard", version="", sub_dir=None)
        self._config = (facts or {}).get("config", {})

    @rank_zero_only
    def goes_on_from(self, step: int) -> None:
        if step:  # a writer that begins so has TensorBoard pass over what is already there of later steps
            self.finalize("")
            self._experiment, self._kwargs["purge_step"] = None, step + 1

    @rank_zero_only
    def log_picture(self, name: str, file: Path, step: int) -> None:
        with Image.open(file) as picture:
            self.experiment.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_result(self, values: Mapping[str, float], step: int) -> None:
        # null is no value there
        plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in self._config.items()}
        set_ones = {n: v for n, v in plain.items() if self._config[n] is not None}
        # its scalars too, in a file beside the others
        self.experiment.add_hparams(set_ones, dict(values), run_name=".", global_step=step)

    def close(self, status: int) -> None:
        self.finalize("success" if status == 0 else "failed")


class Unreachable(Exception):
    """A tracker that cannot be opened, and why, in one line."""


class MLflow(MLFlowLogger, Tracker):
    """An MLflow run for a Crucible run: the flat configuration as parameters, metrics by the optimizer step.

    A server that does not answer costs no training: what is logged is kept, and sent once it answers again.

    Args:
        uri: tracking server or store; null: MLFLOW_TRACKING_URI, else the SQLite file `exp_dir/.mlflow/mlflow.db`.
        experiment: MLflow experiment; it is made where it is missing.
        folder: the run directory; its summary.json and plots/ are the artifacts.
        facts: of the run, as for `Wandb`.

    Raises:
        Unreachable: where nothing can be logged.
    """

    def __init__(
        self,
        uri: str | None = None,
        experiment: str = "crucible",
        folder: Path | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        _check_mlflow()
        self.folder, self._facts = (folder or Path()).absolute(), facts or {}
        self._pending: list[Any] = []
        self._sent, self._again, self._troubled = time.monotonic(), 0.0, False
        # a few seconds for a server that hangs instead of minutes, in which nothing would be trained
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._store() / 'mlflow.db'}"
        self._shown = masked(uri)
        if uri.startswith(("http://", "https://")) and not answers(f"{uri.rstrip('/')}/health"):
            raise Unreachable(f"{self._shown} does not answer")
        try:
            with self._alone(uri):
                run_id = self._run(uri, experiment)
            super().__init__(experiment_name=experiment, tracking_uri=uri, run_id=run_id)
        except Exception as error:
            raise Unreachable(f"{self._shown}: {_in_a_line(error)}") from error

    def _store(self) -> Path:
        """Where a local store is; hidden, as the artifacts of a run are no run to the report."""
        return self.folder.parents[min(1, len(self.folder.parents) - 1)] / ".mlflow"

    @contextlib.contextmanager
    def _alone(self, uri: str) -> Iterator[None]:
        """While this process makes the tables of a local store, no other job of a sweep does."""
        if not uri.startswith("sqlite:"):
            yield
            return
        self._store().mkdir(parents=True, exist_ok=True)
        with (self._store() / "lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _run(self, uri: str, experiment: str) -> str:
        """The id of the MLflow run: of this Crucible run, where it goes on, else a new one."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        client = MlflowClient(uri)
        local = (self._store() / "artifacts").as_uri() if uri.startswith("sqlite:") else None
        known = client.get_experiment_by_name(experiment)
        if known is None:
            # another job may have been faster
            with contextlib.suppress(MlflowException):
                client.create_experiment(experiment, artifact_location=local)
            known = client.get_experiment_by_name(experiment)
        number, own = known.experiment_id, str(self._facts.get("id", ""))
        found = client.search_runs([number], f"tags.`crucible.id` = '{own}'", max_results=1) if own else []
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {
                "crucible.id": own,
                "group": self._facts.get("group"),
                "job_type": self._facts.get("job_type"),
                "tags": ", ".join(dict.fromkeys(self._facts.get("tags", []))),
            }
            run = client.create_run(
                number, tags={k: v for k, v in tags.items() if v}, run_name=self._facts.get("name")
            )
        # a parameter is written once: where the run goes on with others they stay as they were
        new = [
            Param(_mlflow_name(name), str(value)[:PARAMETER_LENGTH])
            for name, value in self._facts.get("config", {}).items()
            if _mlflow_name(name) not in run.data.params
        ]
        for first in range(0, len(new), PARAMETERS_AT_ONCE):
            client.log_batch(run.info.run_id, params=new[first : first + PARAMETERS_AT_ONCE])
        return str(run.info.run_id)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep the values, and send what is kept where it is time."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(_mlflow_name(k), float(v), now, step or 0) for k, v in metrics.items()]
        if time.monotonic() - self._sent >= SEND_S:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Send what is kept, unless the server has just failed."""
        if self._pending and time.monotonic() >= self._again:
            self._send()

    def _send(self) -> None:
        try:
            while self._pending:
                self.experiment.log_batch(self.run_id, metrics=self._pending[:AT_ONCE])
                del self._pending[:AT_ONCE]
        except Exception as error:  # whatever it is, the training is worth more
            self._again = time.monotonic() + RETRY_S
            if not self._troubled:
                said = _in_a_line(error)
                log.warning("MLflow: %s: %s; the training goes on, values are sent later", self._shown, said)
            self._troubled = True
        else:
            if self._troubled:
                log.info("MLflow: %s takes values again", self._shown)
            self._troubled, self._sent = False, time.monotonic()

    @rank_zero_only
    def log_result(self, values: Mapping[str, float], step: int) -> None:
        self.log_metrics(values, step)

    def finalize(self, status: str = "success") -> None:
        """A fit or a test has ended; the MLflow run goes on until `close`."""
        self.save()

    def close(self, status: int) -> None:
        self._send()
        if self._pending:
            log.warning("MLflow: %d values were not sent; metrics.csv has them", len(self._pending))
            return
        ended = "FINISHED" if status == 0 else "KILLED" if status >= 128 else "FAILED"
        try:
            if (self.folder / "summary.json").is_file():
                self.experiment.log_artifact(self.run_id, str(self.folder / "summary.json"))
            if (self.folder / "plots").is_dir():
                self.experiment.log_artifacts(self.run_id, str(self.folder / "plots"), "plots")
            self.experiment.set_terminated(self.run_id, ended)
        except Exception as error:
            log.warning("MLflow: %s: %s; the run's files are not there", self._shown, _in_a_line(error))


def _in_a_line(error: BaseException) -> str:
    return " ".join(masked(str(error) or type(error).__name__).split())[:200]


def _mlflow_name(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)


def check_loggers(nodes: dict[str, Any]) -> None:
    """Refuse, before anything is written, a tracker that could not start.

    Raises:
        ConfigError: for W&B online without a key or a mode or server that is none, or a tracker without its package.
    """
    for node in filter(None, nodes.values()):
        if node["_target_"] == "crucible.loggers.Wandb" and _asked_mode(node.get("mode", "auto")) == "auto":
            wandb_server()
        if node["_target_"] == "crucible.loggers.TensorBoard":
            _check_tensorboard()
        if node["_target_"] == "crucible.loggers.MLflow":
            _check_mlflow()


def _check_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logger.tensorboard needs the extra: pip install -e '.[tensorboard]'", "README.md")


def _check_mlflow() -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("logger.mlflow needs the extra: pip install -e '.[mlflow]'", "docs/wandb.md")


_open: list[Tracker] = []  # of the run in this process


def build_loggers(nodes: dict[str, Any], folder: Path, facts: dict[str, Any]) -> list[Logger]:
    """The loggers of the configuration's `logger` group; those of Crucible are told about the run.

    One that cannot be reached is left out, in one line.
    """
    loggers: list[Logger] = []
    for node in filter(None, nodes.values()):
        own = str(node["_target_"]).startswith("crucible.loggers.")
        extra = {"folder": folder, "facts": facts} if own else {}
        try:
            loggers.append(instantiate(node, **extra, _convert_="all"))
        except InstantiationException as error:
            if not isinstance(error.__cause__, Unreachable):
                raise
            log.warning("MLflow: %s; this run is not tracked there", error.__cause__)
    _open[:] = [logger for logger in loggers if isinstance(logger, Tracker)]
    return loggers


def log_picture(loggers: Iterable[Logger], name: str, file: Path, step: int) -> None:
    """Show a PNG file in the trackers that show pictures."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.log_picture(name, file, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)], step)


def log_result(
    loggers: Iterable[Logger], test: Mapping[str, float], best: Mapping[str, float], step: int
) -> None:
    """Give the trackers the results of a finished training: `test/...`, and `best/...` of the best validation."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.log_result({**test, **{f"best/{k}": v for k, v in best.items()}}, step)
        elif test:
            logger.log_metrics(dict(test), step)


def log_report(folder: Path, project: str, arguments: list[str]) -> str:
    """Log a written report to W&B: its page, and all of its files as the artifact `report-<folder of the runs>`.

    Args:
        folder: with report.md, report.html, results.csv and plots/; the W&B run is written beside it.
        project: W&B project.
        arguments: those of report.py, recorded as the configuration.

    Returns:
        where it went: the page of the W&B run, or the command that uploads an offline one.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    folder = folder.resolve()
    name = f"report-{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.parent.name) or 'runs'}"
    mode: Any = wandb_mode("auto")
    run = wandb.init(
        project=project,
        name=name,
        job_type="report",
        dir=folder.parent,
        mode=mode,
        config={"arguments": masked_in(arguments)},
        reinit="create_new",  # a run that is open in this process is not the report's
    )
    artifact = wandb.Artifact(name, type="report")
    for file in ("report.md", "report.html", "results.csv"):
        artifact.add_file(str(folder / file))
    artifact.add_dir(str(folder / "plots"), name="plots")
    run.log_artifact(artifact)
    run.log({"report": wandb.Html(str(folder / "report.html"), inject=False)})
    page, written = run.url, run.settings.sync_dir
    run.finish()
    if mode == "offline":
        return f"wandb sync {shlex.quote(str(written))}"
    return str(page) if mode == "online" else "nowhere, W&B is disabled"


def close_loggers(status: int) -> None:
    """End the runs of the trackers, so that the next ones in this process are their own."""
    for tracker in _open:
        tracker.close(status)
    _open.clear()
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:  # of a logger that is not Crucible's
        wandb.finish(exit_code=status)
