"""W&B and TensorBoard as options; metrics.csv is written in any case."""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from crucible import private
from crucible.masking import masked, masked_in
from crucible.options import ConfigError

WandbMode = Literal["auto", "online", "offline", "disabled"]
CONNECT_TIMEOUT_S = 3.0
_PORTS = {"http": 80, "https": 443}
TAG_LENGTH = 64  # W&B refuses longer ones


def _server() -> tuple[str, int]:
    """Host and port of the W&B server: of WANDB_BASE_URL, where it is set.

    Raises:
        ConfigError: where that is no address.
    """
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _PORTS:
        raise ConfigError(
            f"WANDB_BASE_URL={masked(url)}: an address is meant, such as https://wandb.example.org"
        )
    return host, port or _PORTS[parts.scheme]


def _way() -> tuple[str, int]:
    """Host and port that a connection to the W&B server opens first: those of a proxy of the environment, if any."""
    host, port = _server()
    proxies = getproxies()
    proxy = proxies.get("http" if port == _PORTS["http"] else "https") or proxies.get("all")
    if not proxy or proxy_bypass(host):
        return host, port
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return parts.hostname or host, parts.port or _PORTS.get(parts.scheme, 1080)
    except ValueError:
        return host, port


def has_wandb_key() -> bool:
    """Whether W&B could log in at its server without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_server()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_answers() -> bool:
    """Whether a connection to the W&B server, or to the proxy before it, opens within three seconds."""
    try:
        with socket.create_connection(_way(), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _asked_mode(mode: str) -> str:
    """The mode of WANDB_MODE, else of the configuration.

    Raises:
        ConfigError: for a value that is none, and for `online` without a key.
    """
    asked = os.environ.get("WANDB_MODE", "").strip().lower() or mode
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's older words
    if asked not in get_args(WandbMode):
        raise ConfigError(
            f"WANDB_MODE={asked}: must be one of {', '.join(get_args(WandbMode))}", "docs/wandb.md"
        )
    if asked == "online" and not has_wandb_key():
        raise ConfigError(
            "logger.wandb.mode=online needs WANDB_API_KEY or `wandb login`; use auto or offline"
        )
    return asked


def wandb_mode(mode: WandbMode) -> str:
    """`online`, `offline` or `disabled`; never one that would prompt or wait.

    WANDB_MODE in the environment decides first; `auto` is online with a key and a server that answers. The server is
    that of WANDB_BASE_URL, reached as HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say.

    Raises:
        ConfigError: for a WANDB_MODE or WANDB_BASE_URL without meaning, and for `online` without a key.
    """
    asked = _asked_mode(mode)
    if asked == "auto":
        return "online" if has_wandb_key() and server_answers() else "offline"
    return asked


class Wandb(WandbLogger):
    """A W&B run for a Crucible run: grouped by data and arm, tagged with techniques and design, the config flat.

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
        private.drop_wandb_argument(self, "anonymous")  # Lightning passes what W&B warns of


class TensorBoard(TensorBoardLogger):
    """TensorBoard events in `folder/tensorboard`.

    Raises:
        ConfigError: where the package is missing.
    """

    def __init__(self, folder: Path | None = None, facts: dict[str, Any] | None = None) -> None:
        _check_tensorboard()
        super().__init__(save_dir=str(folder or "."), name="tensorboard", version="", sub_dir=None)


def check_loggers(nodes: dict[str, Any]) -> None:
    """Refuse, before anything is written, a tracker that could not start.

    Raises:
        ConfigError: for W&B online without a key or a mode or server that is none, or TensorBoard without its package.
    """
    for node in filter(None, nodes.values()):
        if node["_target_"] == "crucible.loggers.Wandb" and _asked_mode(node.get("mode", "auto")) == "auto":
            _server()
        if node["_target_"] == "crucible.loggers.TensorBoard":
            _check_tensorboard()


def _check_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logger.tensorboard needs the extra: pip install -e '.[tensorboard]'", "README.md")


def build_loggers(nodes: dict[str, Any], folder: Path, facts: dict[str, Any]) -> list[Logger]:
    """The loggers of the configuration's `logger` group; those of Crucible are told about the run."""
    loggers = []
    for node in nodes.values():
        if not node:
            continue
        own = str(node["_target_"]).startswith("crucible.loggers.")
        extra = {"folder": folder, "facts": facts} if own else {}
        loggers.append(instantiate(node, **extra, _convert_="all"))
    return loggers


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
    """End the W&B run, so that the next one in this process is its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=status)
