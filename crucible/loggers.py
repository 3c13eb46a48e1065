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
from typing import Any, Literal

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from crucible import private
from crucible.masking import masked_in
from crucible.options import ConfigError

WandbMode = Literal["auto", "online", "offline", "disabled"]
CONNECT_TIMEOUT_S = 3.0
TAG_LENGTH = 64  # W&B refuses longer ones


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_answers(host: str = "api.wandb.ai", port: int = 443) -> bool:
    """Whether a connection opens within three seconds."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def wandb_mode(mode: WandbMode) -> str:
    """`online`, `offline` or `disabled`; never one that would prompt or wait.

    WANDB_MODE in the environment decides first; `auto` is online with a key and a server that answers.

    Raises:
        ConfigError: where `online` is asked for and there is no key.
    """
    mode = os.environ.get("WANDB_MODE", mode)  # type: ignore[assignment]
    if mode == "online" and not has_wandb_key():
        raise ConfigError(
            "logger.wandb.mode=online needs WANDB_API_KEY or `wandb login`; use auto or offline"
        )
    if mode == "auto":
        return "online" if has_wandb_key() and server_answers() else "offline"
    return mode


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
        ConfigError: for W&B online without a key, or TensorBoard without its package.
    """
    for node in filter(None, nodes.values()):
        if node["_target_"] == "crucible.loggers.Wandb" and node.get("mode") == "online":
            wandb_mode("online")
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
