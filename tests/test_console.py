"""What people read in a terminal, a file or a pipe."""

from __future__ import annotations

import pytest

from crucible import console
from crucible.console import epoch_named, fitted, print_table, say

LINE = "epoch 3 of 10  train loss 1.2560 acc 0.6034  val loss 1.4672 acc 0.5611  lr 0.02  3.9 s  322 images/s"


@pytest.fixture(params=[20, 40, 80, 200])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(console, "columns", lambda: request.param)
    return request.param


def test_a_line_is_broken_between_its_parts_and_no_number_is(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"\n{LINE}\n  indented 0.1234")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "" and lines[-1] == "  indented 0.1234"
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines[:-1]).split()) == " ".join(LINE.split())
    if width >= 80:
        assert any("val loss 1.4672 acc 0.5611" in line for line in lines)


def test_a_long_word_stays_whole(width: int) -> None:
    path = "/a/path/that/is/to/be/copied/" + "x" * 200
    assert path in fitted(f"written  ->  {path}", width).split()


def test_in_a_file_nothing_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    say(LINE * 5)
    print_table(["arm", *(f"metric{n}" for n in range(40))], [["baseline", *["0.1234"] * 40]])
    assert [len(line) > 300 for line in capsys.readouterr().out.splitlines()] == [True, True, True]


def test_a_table_that_is_too_wide_is_shown_in_parts_that_begin_with_its_first_column(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"m{n}" for n in range(12)]
    print_table(["arm", *names], [["a", *(f"0.{n:04}" for n in range(12))], ["b", *["-"] * 12]])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines[::3]]
    assert all(head[0] == "arm" for head in heads) and [n for head in heads for n in head[1:]] == names
    assert all(f"0.{n:04}" in text.split() for n in range(12))


@pytest.mark.parametrize(
    ("number", "epochs", "name"),
    [(2, 10, "epoch 3 of 10"), (0, 0.5, "epoch 1 of 1"), (4, float("inf"), "epoch 5")],
)
def test_people_count_epochs_from_one(number: int, epochs: float, name: str) -> None:
    assert epoch_named(number, epochs) == name
