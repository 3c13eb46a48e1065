"""Which W&B server is asked, on which way, and what of the environment is refused in one line."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from conftest import TINY, runs_in

from crucible import loggers
from crucible.loggers import wandb_mode
from crucible.options import ConfigError

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> pytest.MonkeyPatch:
    """Without any variable that counts, with a key, and with a home of its own."""
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "NETRC", *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return monkeypatch


@pytest.fixture
def asked(environment: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where a connection was tried; none opens."""
    tried: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    environment.setattr(loggers.socket, "create_connection", refuse)
    return tried


@pytest.mark.parametrize(
    ("variables", "way"),
    [
        ({}, ("api.wandb.ai", 443)),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, ("wandb.example.org", 443)),
        ({"WANDB_BASE_URL": "http://tracker:8080/"}, ("tracker", 8080)),
        ({"HTTPS_PROXY": "http://proxy.example.org:3128"}, ("proxy.example.org", 3128)),
        ({"https_proxy": "proxy.example.org:3128"}, ("proxy.example.org", 3128)),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "wandb.ai"}, ("api.wandb.ai", 443)),
        ({"HTTP_PROXY": "http://proxy:3128", "WANDB_BASE_URL": "http://tracker"}, ("proxy", 3128)),
    ],
)  # fmt: skip
def test_auto_tries_the_server_that_is_meant_on_the_way_that_is_meant(
    environment: pytest.MonkeyPatch,
    asked: list[tuple[str, int]],
    variables: dict[str, str],
    way: tuple[str, int],
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert wandb_mode("auto") == "offline" and asked == [way]


def test_auto_is_online_where_the_own_server_answers_and_its_key_is_in_the_netrc(
    environment: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        environment.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode("auto") == "online"
        environment.delenv("WANDB_API_KEY")
        assert wandb_mode("auto") == "offline"
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password key\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert wandb_mode("auto") == "online"


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
