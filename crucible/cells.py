"""Texts as cells of a CSV file that a spreadsheet may open: what it would take for a formula gets an apostrophe."""

from __future__ import annotations

from typing import Any

from crucible.options import is_number

_OPENINGS = ("=", "+", "-", "@", "\t", "\r", "\n")


def _opens_a_formula(text: str) -> bool:
    return text.lstrip("'").startswith(_OPENINGS) and not is_number(text)


def cell(value: Any) -> Any:
    """A value as it is written: a text that would be a formula behind an apostrophe, all else as it is."""
    return f"'{value}" if isinstance(value, str) and _opens_a_formula(value) else value


def text_of(cell: str) -> str:
    """What `cell` was given."""
    return cell[1:] if cell.startswith("'") and _opens_a_formula(cell[1:]) else cell
