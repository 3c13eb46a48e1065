"""A run that is killed before any of its file operations goes on by the same command as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command, nightly
from crashes import CONFIGURATIONS, TINY, contents, differences, killed_before, operations

pytestmark = pytest.mark.slow
OPTIONS = [*TINY, *CONFIGURATIONS["ema, every step"], "trainer.limit_train_batches=2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, warm_parent) -> Callable[..., Command]:
    folder = tmp_path_factory.mktemp("typed")
    return lambda *arguments, **options: Command(folder, *arguments, warm=warm_parent, **options)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    run, done = operations(start, tmp_path_factory.mktemp("whole"), OPTIONS)
    return contents(run), done


@pytest.mark.parametrize("place", ["middle", *nightly("last")])
@pytest.mark.parametrize("kind", ["open", "rename", "link", "remove", "mkdir"])
def test_killed_before_an_operation_of_each_kind(start, whole, tmp_path: Path, kind: str, place: str) -> None:
    """An operation of a kind comes once with each epoch or step."""
    as_it_should_be, done = whole
    at = [number for number, operation in enumerate(done, 1) if operation.split()[0] == kind]
    number = at[len(at) // 2] if place == "middle" else at[-1]
    found = killed_before(start, tmp_path, OPTIONS, number, as_it_should_be)
    assert not found, (number, done[number - 1], found)


def test_a_difference_is_seen(whole) -> None:
    contents, _ = whole
    changed = {**contents, "metrics.csv": contents["metrics.csv"][:-1]}
    assert differences(contents, changed) and not differences(contents, contents)
