"""Typed options: what is accepted, what is refused, and what the line says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from crucible.options import (
    ConfigError,
    check_arguments,
    check_value,
    in_interval,
    read_options,
    signature_options,
    suggest,
)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("(0, 1]", [1, 0.5, 1e-9], [0, 1.01, float("nan")]), ("[0, inf)", [0, 1e30], [-1e-9, float("inf")])],
)
def test_intervals_read_as_in_mathematics(interval: str, inside: list[float], outside: list[float]) -> None:
    assert all(in_interval(v, interval) for v in inside)
    assert not any(in_interval(v, interval) for v in outside)


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (float, 1, 1.0), (int, 3, 3), (bool, True, True), (str, "a", "a"), (float | None, None, None),
        (Literal["a", "b"] | None, "a", "a"), (list[int], [1, 2], [1, 2]), (dict[str, int], {"a": 1}, {"a": 1}),
        (Annotated[float, "(0, 1]"], 1, 1.0), (Annotated[float | None, "(0, 1]"], None, None),
        (int | Literal["auto"], "auto", "auto"),
    ],
)  # fmt: skip
def test_values_of_the_type_are_accepted(annotation, value, result) -> None:
    accepted = check_value("x", value, annotation)
    assert accepted == result and type(accepted) is type(result)


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (float, "abc", "x must be a number, got 'abc'"),
        (float, True, "x must be a number, got True"),
        (int, 3.5, "x must be a whole number, got 3.5"),
        (bool, "yes", "x must be true or false, got 'yes'"),
        (Annotated[float, "(0, 1]"], 3.0, "x must be in (0, 1], got 3.0"),
        (Annotated[float, "(0, 1]"], "abc", "x must be a number in (0, 1], got 'abc'"),
        (Annotated[float | None, "(0, 1]"], 3.0, "x must be a number or null in (0, 1], got 3.0"),
        (
            Literal["SGD", "Adam"] | None,
            "SDG",
            "x must be one of SGD, Adam or null, got 'SDG'; did you mean SGD?",
        ),
        (list[float], 0.5, "x must be a list (each a number), got 0.5"),
        (list[str], "abc", "x must be a list (each a text), got 'abc'"),
    ],
)
def test_a_refusal_says_what_is_allowed_and_what_was_given(annotation, value, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_value("x", value, annotation)
    assert str(error.value) == text


@dataclass(frozen=True)
class Room:
    rate: Annotated[float, "[0, 1)", "how much"] = 0.5
    name: str = "a"


def test_a_room_takes_its_own_options_and_leaves_the_others() -> None:
    assert read_options(Room, {"rate": 0, "other": 7}) == Room(rate=0.0)
    with pytest.raises(ConfigError, match=r"model\.rate must be in \[0, 1\), got 1"):
        read_options(Room, {"rate": 1})


class Base:
    def __init__(self, depth: int = 3, **kwargs) -> None: ...


class Derived(Base):
    def __init__(self, width: Annotated[int, "[1, 8]"], **kwargs) -> None:
        super().__init__(**kwargs)


class Closed(Base):
    def __init__(self, width: int = 1) -> None:
        super().__init__()


def test_arguments_are_those_of_the_class_and_of_what_it_passes_them_on_to() -> None:
    assert list(signature_options(Derived)) == ["width", "depth"]
    assert list(signature_options(Closed)) == ["width"]
    check_arguments(Derived, {"_target_": "x", "width": 2, "depth": 4}, "model")
    with pytest.raises(ConfigError, match=r"model\.widht=2: Derived has no such option; did you mean width"):
        check_arguments(Derived, {"widht": 2, "width": 1}, "model")
    with pytest.raises(ConfigError, match=r"model\.width is missing"):
        check_arguments(Derived, {}, "model")
    with pytest.raises(ConfigError, match=r"model\.width must be in \[1, 8\], got 9"):
        check_arguments(Derived, {"width": 9}, "model")


def test_suggestions_name_the_nearest_or_all() -> None:
    assert suggest("lrr", ["lr", "momentum"]) == "; did you mean lr?"
    assert suggest("xyz", ["b", "a"]) == "; known: a, b"
