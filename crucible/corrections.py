"""Numbers that were corrected: runs from before and after a correction are different runs, and never one comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from crucible.configuration import select

HALF_PRECISION = ("bf16-true", "16-true")  # of weights and sums


class Correction(NamedTuple):
    """A change of what comes out. It stands with what it corrects: in `corrections` of a technique, of the other
    options of a model, of a network or data module, or in a module's `CORRECTIONS`.

    Attributes:
        option: dotted; the one that brings the corrected numbers in.
        version: of these numbers; 2 after the first correction.
        concerns: whether a plain, resolved configuration has them.
        what: that was wrong, in a few words.
    """

    option: str
    version: int
    concerns: Callable[[Mapping[str, Any]], bool]
    what: str


def option_is(option: str, *values: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Concerns the configurations in which a dotted option has one of these values; none: any but off or null."""

    def concerns(config: Mapping[str, Any]) -> bool:
        value = select(config, option)
        return value in values if values else value not in (None, False, 0, 0.0)

    return concerns


def all_of(*conditions: Callable[[Mapping[str, Any]], bool]) -> Callable[[Mapping[str, Any]], bool]:
    """Concerns the configurations that each of these concerns."""
    return lambda config: all(concerns(config) for concerns in conditions)


def rounded_targets(option: str, version: int = 2) -> Correction:
    """Of the float targets that an option brings in, or a value of it: they had the precision of the weights."""
    name, _, value = option.partition("=")
    is_on = option_is(name, value) if value else option_is(name)
    return Correction(
        "trainer.precision", version,
        lambda config: select(config, "trainer.precision") in HALF_PRECISION and is_on(config),
        "float targets were rounded to the weights' dtype",
    )  # fmt: skip


def versions_of(corrections: Iterable[Correction], config: Mapping[str, Any]) -> dict[str, int]:
    """`{option: version}` of the numbers of a configuration; an option without a correction has none."""
    found: dict[str, int] = {}
    for correction in corrections:
        if correction.concerns(config):
            found[correction.option] = max(correction.version, found.get(correction.option, 1))
    return found
