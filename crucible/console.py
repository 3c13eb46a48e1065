"""What people read: as wide as their terminal, unwrapped in a file or a pipe, and no number broken over two lines."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

UNWRAPPED = 10_000  # columns of what is no terminal
_SECOND = ("acc", "mae", "mse", "r2")
_WORDS_AT_LEAST = 16  # columns that a column of words keeps, where it has so many


def columns() -> int | None:
    """Columns of the terminal that standard output is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def is_live() -> bool:
    """Whether lines on standard output can be drawn again."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def console() -> Console:
    """Standard output as it is now: colours and the terminal's width, or neither. Texts are printed as they are."""
    width = columns()
    plain = None if width else False
    return Console(
        file=sys.stdout, width=width or UNWRAPPED, force_terminal=plain, markup=False, highlight=False
    )


def fitted(text: str, width: int | None) -> str:
    """A text in lines of at most `width` columns, broken between its parts, which two spaces divide.

    A part that is longer is broken between words; a longer word, a path say, stays whole. None: no limit.
    """
    if width is None or cell_len(text) <= width:
        return text
    lines: list[str] = []
    for part in re.split(r"(?<=\S)  +(?=\S)", text):
        if lines and cell_len(lines[-1]) + 2 + cell_len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            room = max(1, width - 4)
            broken = textwrap.wrap(part, room, break_long_words=False, break_on_hyphens=False) or [part]
            lines += [f"    {line}" if lines or number else line for number, line in enumerate(broken)]
    return "\n".join(lines)


def say(text: str = "") -> None:
    """Print to standard output, at once, in lines that the terminal has room for (`fitted`)."""
    width = columns()
    sys.stdout.write("".join(f"{fitted(line, width)}\n" for line in text.split("\n")))
    sys.stdout.flush()


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Collection[str] = (),
    *,
    titled: bool = True,
    style: Box | None = None,
) -> None:
    """Print a table; where the terminal is too narrow for its columns, in parts that each begin with the first one.

    Args:
        head: a name for each column, each another.
        rows: of texts, one a column.
        words: columns of words, which are set to the left and may be broken; others are numbers.
        titled: whether the head is shown; otherwise the first column is what the others are called.
        style: the lines that are drawn; None: none.
    """
    screen = console()
    width = screen.width
    own = [max(cell_len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    least = [min(own[i], _WORDS_AT_LEAST) if name in words else own[i] for i, name in enumerate(head)]
    parts: list[list[int]] = []
    for place in range(1, len(head)):
        if not parts or sum(least[i] + 2 for i in [*parts[-1], place]) > width:
            parts.append([0])
        parts[-1].append(place)
    for part in parts or [[0]]:
        table = Table(
            box=style, padding=(0, 2, 0, 0) if style is None else (0, 1), pad_edge=False, show_header=titled
        )
        for i in part:
            folds = head[i] in words
            table.add_column(
                head[i], justify="left" if folds else "right", overflow="fold", no_wrap=not folds, min_width=least[i],
                style=None if titled or i else "bold",
            )  # fmt: skip
        for row in rows:
            table.add_row(*(row[i] for i in part))
        with screen.capture() as drawn:
            screen.print(table)
        # rich fills lines up
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))
    sys.stdout.flush()


# Epochs, and the values of one


def epoch_named(number: int, epochs: float = math.inf) -> str:
    """What people are told of an epoch, which files and programs count from 0: number 2 is `epoch 3 of 10`.

    Args:
        number: of the epoch, from 0.
        epochs: length of the training, of which the last may be a part; infinite where it has none or is not known.
    """
    return f"epoch {number + 1}" + ("" if math.isinf(epochs) else f" of {math.ceil(epochs)}")


def epoch_line(
    number: int,
    epochs: float,
    values: Mapping[str, float],
    splits: Sequence[str],
    rate: float,
    speed: str,
    *more: str,
) -> str:
    """One line on a finished epoch.

    Args:
        number: of the epoch, from 0.
        epochs: length of the training.
        values: logged ones, `train/loss`.
        splits: which are of this epoch: `train`, `val`.
        rate: the learning rate.
        speed: of `speed`.
        more: what else is to be said.
    """
    last = epoch_named(math.ceil(epochs) - 1, epochs) if math.isfinite(epochs) else ""
    parts = [epoch_named(number, epochs).ljust(len(last))]
    parts += [f"{split} {' '.join(shown)}" for split in splits if (shown := metrics_shown(values, split))]
    return "  ".join(part for part in [*parts, f"lr {rate:.3g}", speed, *more] if part)


def split_line(split: str, values: Mapping[str, float], speed: str) -> str:
    """One line on all values of a split, of a test say."""
    own = {k.removeprefix(f"{split}/"): v for k, v in values.items() if k.startswith(f"{split}/")}
    first = sorted(own, key=lambda name: {"loss": 0, "acc": 1}.get(name, 2 + ("/" in name)))
    return "  ".join([split, *(f"{name} {own[name]:.4f}" for name in first), speed])


def metrics_shown(values: Mapping[str, float], split: str = "") -> list[str]:
    """Loss and the metric that is read beside it, `["loss 0.2500", "acc 0.7500"]`, as far as there are such."""
    own = {
        k.removeprefix(f"{split}/"): v for k, v in values.items() if not split or k.startswith(f"{split}/")
    }
    second = next((name for name in _SECOND if name in own), None)
    return [f"{name} {own[name]:.4f}" for name in ("loss", second) if name in own]


def speed(images: float, seconds: float) -> str:
    """Seconds and images/s."""
    return f"{seconds:.1f} s  {images / max(seconds, 1e-9):.0f} images/s"


def clock(seconds: float) -> str:
    """A duration as `1:05` or `2:01:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def lasting(seconds: float) -> str:
    """A duration in words: `45 s`, `12 min`, `3 h 05 min`; `-` for NaN."""
    if math.isnan(seconds):
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
