"""Whatever its declaration does not allow, every option refuses in one line that names it.

The values are made from the declarations (tests/declared.py), as scikit-learn tries its estimators.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from declared import Option, Wrong, all_options, plain, put, wrong_values

from crucible.options import ConfigError, read_options
from lab.cluster import ClusterOptions
from lab.config import check
from lab.planning import SweepOptions
from lab.search import SearchOptions
from reporting.request import read_arguments

_OWN_COMMANDS = {
    "sweep": (SweepOptions, ""),
    "search": (SearchOptions, "search"),
    "cluster": (ClusterOptions, "cluster"),
}
_GROUPS = ("model", "data", "data.module", "data.cv", "trainer", "checkpoint", "callbacks", "logger")
_REQUESTS = {
    "runs": ["", "no/such/folder"],
    "metric": ["test/accc", "nonsense", ""],
    "margin": ["abc", "-1", "0", "nan", "inf", "100", ""],
    "margin_points": ["abc", "-1", "0", "nan", "inf", "100", ""],
    "checkpoint": ["bestt", "1", ""],
    "variance": ["mine", ""],
    "baseline": [""],
    "out": [""],
}


def apply(option: Option, value: Any) -> None:
    """Give an option a value, as far as the checks that come before any data is read."""
    if option.room in _OWN_COMMANDS:
        kind, prefix = _OWN_COMMANDS[option.room]
        read_options(kind, {option.name.rpartition(".")[2]: value}, prefix=prefix)
    else:
        check(put(plain(option.base), option.name, value), [])


def complaint(option: Option, wrong: Wrong) -> str | None:
    """What is wrong with how the option takes a wrong value; None where it is refused as it should be."""
    try:
        apply(option, wrong.value)
    except ConfigError as error:
        line = str(error)
        if "\n" in line or len(line) > 700:
            return f"no one line: {line[:60]}"
        if option.name not in line:
            return f"does not name {option.name}: {line[:120]}"
        shown = _as_shown(wrong.value)
        if not any(text in line for text in shown):
            return f"does not show {shown[0]}: {line[:120]}"
        if not any(text in line for text in ("must be", "known:", "did you mean", "needs", ": ", "instead")):
            return f"does not say what is allowed: {line[:120]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "accepted"


def _as_shown(value: Any) -> list[str]:
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    texts = [str(value), repr(value), str(inner), repr(inner)]
    return [text if len(text) < 60 else text[:50] for text in texts] + [str(value).lower()]


def distinct(options: list[Option]) -> list[Option]:
    """One of those that share name and declaration, as the options of a family do."""
    found: dict[Any, Option] = {}
    for option in options:
        found.setdefault((option.name, str(option.annotation)), option)
    return list(found.values())


def _few(option: Option) -> list[Wrong]:
    """Two values, of kinds that change from option to option."""
    values = wrong_values(option.allowed)
    start = sum(map(ord, option.name))
    return [values[(start + i * (len(values) // 2 or 1)) % len(values)] for i in range(2)] if values else []


def test_every_option_declares_its_type_and_its_range() -> None:
    undeclared = [f"{o.room}: {o.name}: {o.annotation}" for o in all_options() if not o.allowed.declared]
    assert not undeclared, undeclared


def test_a_wrong_value_of_any_option_is_refused_in_one_line_that_names_it() -> None:
    wrong = [
        f"{o.name}={str(w.value)[:30]} ({o.room}, {w.kind}): {text}"
        for o in distinct(all_options())
        for w in _few(o)
        if (text := complaint(o, w))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.nightly
def test_every_wrong_value_of_every_option_is_refused_in_one_line_that_names_it() -> None:
    options = all_options()
    assert len(options) > 600
    wrong = [
        f"{o.name}={str(w.value)[:30]} ({o.room}, {w.kind}): {text}"
        for o in options
        for w in wrong_values(o.allowed)
        if (text := complaint(o, w))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("group", _GROUPS)
def test_a_group_that_is_no_mapping_is_refused_by_name(group: str) -> None:
    for value in (None, "abc", 7, [1]):
        with pytest.raises(ConfigError, match=rf"^{re.escape(group)} must be a mapping of options, got "):
            check(put(plain(()), group, value), [])


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in _REQUESTS.items() for t in texts])
def test_a_wrong_request_for_a_report_is_one_line_that_names_it(name: str, text: str, tmp_path: Path) -> None:
    arguments = {"runs": str(tmp_path), name: text}
    with pytest.raises(ConfigError, match=rf"^{name}\b") as error:
        read_arguments([f"{n}={t}" for n, t in arguments.items()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"dampening": "a"}, "model.optimizer_kwargs.dampening must be a number, got 'a'"),
        ({"foreach": 3}, "model.optimizer_kwargs.foreach must be true or false or null, got 3"),
        ({"dampenin": 0.1}, "did you mean dampening"),
    ],
)
def test_an_argument_of_the_optimizer_is_judged_by_its_own_declaration(kwargs: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(put(put(plain(()), "model.optimizer", "SGD"), "model.optimizer_kwargs", kwargs), [])


def test_an_argument_that_only_its_first_use_finds_is_found_before_there_is_a_run() -> None:
    for name in ("Adam", "lamb", "lion"):
        config = put(put(plain(()), "model.optimizer", name), "model.optimizer_kwargs", {"betas": [0.9]})
        with pytest.raises(
            ConfigError, match=rf"model\.optimizer={name} refuses .*model\.optimizer_kwargs=\{{'betas'"
        ):
            check(config, [])


def test_names_of_metrics_are_judged() -> None:
    for value in ([7], "acc", ["accc"], None, [None], {"acc": 1}):
        with pytest.raises(ConfigError, match=r"^metrics"):
            check(put(plain(()), "metrics", value), [])
