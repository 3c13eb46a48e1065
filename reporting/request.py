"""What `report.py` is asked for: its options, read and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crucible.command_line import unquoted
from crucible.files import folders_named, missing, why_not_writable
from crucible.metrics import METRICS, MetricRow, base_name, find_metric
from crucible.options import ConfigError, in_interval, suggest

SEE = "python report.py --help"
OPTIONS = (
    "runs", "baseline", "metric", "out", "margin_points", "margin", "checkpoint", "variance", "networks", "wandb",
    "watch", "port",
)  # fmt: skip
CHOICES = {
    "checkpoint": ("last", "best"), "variance": ("own", "shared"), "networks": ("settings", "arms"),
    "watch": ("true", "false"),
}  # fmt: skip
OF_WATCH = ("watch", "port")  # how the page is shown, not what it says
DEFAULT_METRIC = "test/acc"
DEFAULT_MARGIN = 0.3  # points


@dataclass(frozen=True)
class Metric:
    """A metric as the report shows it: fractions in percent, their differences in percentage points."""

    name: str

    @property
    def _row(self) -> MetricRow:
        row = find_metric(self.name)
        assert row is not None, "read_arguments lets no other through"
        return row

    @property
    def base(self) -> str:
        """Its name without the split: `acc` of `test/acc`."""
        return base_name(self.name)

    @property
    def split(self) -> str:
        """`test` of `test/acc`."""
        return self.name.split("/")[0]

    @property
    def higher_is_better(self) -> bool:
        return self._row.higher_is_better

    @property
    def sign(self) -> int:
        """+1 where higher is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def is_fraction(self) -> bool:
        return self._row.fraction

    @property
    def scale(self) -> float:
        """From the logged value to the shown one."""
        return 100.0 if self.is_fraction else 1.0

    @property
    def unit(self) -> str:
        """Of shown differences."""
        return " points" if self.is_fraction else ""

    @property
    def default_margin(self) -> float | None:
        """As logged; only accuracies and the like have one."""
        return DEFAULT_MARGIN / self.scale if self.is_fraction and self.higher_is_better else None

    def formatted(self, value: float, signed: bool = False) -> str:
        """A logged value or difference as text; `-` for NaN."""
        if math.isnan(value):
            return "-"
        sign = "+" if signed else ""
        return format(value * self.scale, f"{sign}.2f" if self.is_fraction else f"{sign}.4g")

    def formatted_interval(self, low: float, high: float) -> str:
        """Two differences as `+0.10 to +0.52`; `-` for NaN."""
        return (
            "-"
            if math.isnan(low)
            else f"{self.formatted(low, signed=True)} to {self.formatted(high, signed=True)}"
        )


class Watching(NamedTuple):
    """`watch=true`. `port` 0: a free one; `writes`: the report's files too, at each change (`out=`)."""

    port: int
    writes: bool


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `margin` is in the unit of the logged metric; None: not asked."""

    folders: tuple[Path, ...]
    baseline: str
    baseline_given: bool
    metric: Metric
    margin: float | None
    best: bool
    shared_variance: bool
    out: Path
    arguments: tuple[str, ...]
    wandb: str | None = None
    networks: str | None = None  # settings or arms; None: by what was tried on them
    watching: Watching | None = None


def read_arguments(arguments: Sequence[str]) -> Request:
    """The request that `key=value` arguments make.

    Raises:
        ConfigError: one line that says which argument is wrong and what is allowed.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("-")
        if not equals:
            guess = f"runs={argument}" if Path(argument).exists() else f"{argument}=VALUE"
            raise ConfigError(f"{argument}: options are written key=value, such as {guess}", see=SEE)
        if key not in OPTIONS:
            raise ConfigError(f"{argument}: there is no option {key}{suggest(key, OPTIONS)}", see=SEE)
        if not value:
            raise ConfigError(f"{key}= has no value", see=SEE)
        if value not in CHOICES.get(key, (value,)):
            raise ConfigError(f"{key} must be one of {', '.join(CHOICES[key])}, got {value!r}", see=SEE)
        given[key] = unquoted(value)
    if "runs" not in given:
        raise ConfigError("runs is missing: python report.py runs=experiments/digits", see=SEE)
    metric = Metric(given.get("metric", DEFAULT_METRIC))
    if find_metric(metric.name) is None:
        hint = suggest(metric.base, [row.logged for row in METRICS])
        raise ConfigError(f"metric={metric.name}: not a metric with a better direction{hint}", see=SEE)
    folders = _folders(given["runs"])
    out = Path(given["out"]).expanduser() if "out" in given else _common(folders) / "report"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: there is a file of this name; the report is a folder", see=SEE)
    watching = _watching(given)
    if (watching is None or watching.writes) and (reason := why_not_writable(out.absolute())):
        raise ConfigError(f"out={out}: cannot be written ({reason}); out=PATH writes it elsewhere", see=SEE)
    return Request(
        folders=folders,
        baseline=given.get("baseline", "baseline"),
        baseline_given="baseline" in given,
        metric=metric,
        margin=_margin(given, metric),
        best=given.get("checkpoint") == "best",
        shared_variance=given.get("variance") == "shared",
        out=out,
        arguments=tuple(a for a in arguments if a.lstrip("-").partition("=")[0] not in OF_WATCH),
        networks=given.get("networks"),
        wandb=None if given.get("wandb") == "null" else given.get("wandb"),
        watching=watching,
    )


def _watching(given: Mapping[str, str]) -> Watching | None:
    """How the page is shown while runs are under way; None: it is written once."""
    if given.get("watch", "false") == "false":
        if "port" in given:
            raise ConfigError(f"port={given['port']}: is for watch=true, which serves the page", see=SEE)
        return None
    if given.get("wandb", "null") != "null":
        raise ConfigError(
            f"wandb={given['wandb']}: not with watch=true; python report.py without it logs the report",
            see=SEE,
        )
    text = given.get("port", "0")
    if not text.isdecimal() or not (text == "0" or 1 <= int(text) <= 65535):
        raise ConfigError(f"port must be a whole number from 1 to 65535, got {text!r}", see=SEE)
    return Watching(int(text), "out" in given)


def _margin(given: Mapping[str, str], metric: Metric) -> float | None:
    """As logged: `margin_points` of fractions, or `margin` in the unit that the report shows the metric in."""
    name = "margin" if "margin" in given else "margin_points"
    if name not in given:
        return None
    text, most = given[name], "100" if metric.is_fraction else "inf"
    if {"margin", "margin_points"} <= given.keys():
        raise ConfigError("margin and margin_points are two names of one thing; give one", see=SEE)
    if name == "margin_points" and not metric.is_fraction:
        raise ConfigError(
            f"margin_points={text}: {metric.name} is not a percentage; margin={text} is in its own unit",
            see=SEE,
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not in_interval(value, f"(0, {most})"):
        raise ConfigError(f"{name} must be a number in (0, {most}), got {text!r}", see=SEE)
    return value / metric.scale


def _folders(text: str) -> tuple[Path, ...]:
    found: list[Path] = []
    whole = Path(text).expanduser()
    listed = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    for part in [text] if whole.is_dir() else filter(None, listed.split(",")):
        pattern = Path(unquoted(part.strip())).expanduser()
        matches = folders_named(pattern)
        if not matches:
            raise ConfigError(f"runs={part}: {missing(pattern)}; give a folder with runs in it", see=SEE)
        found += matches
    return tuple(dict.fromkeys(found))


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([f.resolve() for f in folders])) if len(folders) > 1 else folders[0]
