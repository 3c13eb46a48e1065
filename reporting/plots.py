"""The report's figures: drawn once with matplotlib, as PNG for files and as inline SVG that follows the page.

Text and axes become `currentColor` in the SVG and the colours of arms variables of the page's style, so one drawing
serves a light and a dark page, in the page's own type. Arms keep colour, marker and line through all figures.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from reporting.arms import Arm
from reporting.comparison import Table
from reporting.general import FEWEST, InGeneral
from reporting.remarks import percent

INK = "#1f2328"
BASELINE_COLOUR = "#6e7681"
# After Okabe and Ito (jfly.uni-koeln.de/color), darkened to 3:1 on white; beside each its lighter one for a dark page.
# Colour is never alone: rows have names, and what shares a panel differs in marker and line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5558c", "#a87400", "#3c9ad6", "#5b4b9a", "#7a4a2b")
COLOURS_IN_THE_DARK = ("#4da3dc", "#f08a45", "#2fbf95", "#de94c0", "#e6b23c", "#8ccbf5", "#a697e0", "#c79a78")
BASELINE_IN_THE_DARK = "#9198a1"
MARKERS = ("o", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MOST_PANELS = 9
MOST_LINES = len(COLOURS)
PAPER = "#fdfefd"  # becomes the page's background
WIDTH = 4.8  # inches: with this type it stays readable at the width of a phone
STYLE: Any = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "legend.fontsize": 8.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "text.color": INK, "axes.linewidth": 0.8, "lines.linewidth": 1.5, "grid.color": BASELINE_COLOUR,
    "grid.alpha": 0.3, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "legend.frameon": False, "figure.facecolor": "white", "axes.facecolor": "none", "svg.fonttype": "none",
    "font.family": "DejaVu Sans", "text.parse_math": False,
}  # fmt: skip

Curves = Mapping[str, Mapping[str, NDArray[np.float64]]]  # arm -> column -> (runs, epochs)


class Plot(NamedTuple):
    """A figure for both pages."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def read_curves(table: Table) -> Curves:
    """Each arm's columns of metrics.csv over its runs that count; shorter runs end in NaN."""
    curves: dict[str, dict[str, NDArray[np.float64]]] = {}
    for arm in table.arms.values():
        runs = [run.curves() for run in arm.runs.values()]
        names = sorted({name for run in runs for name in run})
        epochs = max((len(column) for run in runs for column in run.values()), default=0)
        curves[arm.name] = {}
        for name in names:
            block = np.full((len(runs), epochs), np.nan)
            for row, run in zip(block, runs, strict=True):
                column = run.get(name, row[:0])
                row[: len(column)] = column
            if np.isfinite(block).any():
                curves[arm.name][name] = block
    return curves


def draw_all(table: Table) -> list[Plot]:
    """The figures that this table has the numbers for."""
    curves = read_curves(table)
    with mpl.rc_context(STYLE):
        drawn = [
            _differences(table),
            _boxes(table),
            _accuracy_and_time(table),
            *_learning_curves(table, curves),
            _logits(table, curves),
            _calibration(table),
        ]
        return [_rendered(*plot) for plot in drawn if plot is not None]


Drawn = tuple[str, str, str, Figure]


def _rendered(name: str, title: str, caption: str, figure: Figure) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out
    figure.patch.set_alpha(0.0)
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            svg, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--page)").replace("'DejaVu Sans'", "inherit")
    for number, colour in enumerate((BASELINE_COLOUR, *COLOURS)):
        text = text.replace(colour, f"var(--arm{number})")
    text = re.sub(r'\bid="(?!m[0-9a-f]{10}|p[0-9a-f]{10}|C\d)[^"]*"', "", text)  # repeated in every figure
    label = re.sub(r'[<>&"]', " ", title)
    return Plot(
        name, title, caption, png.getvalue(), text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    )


def colours(table: Table) -> dict[str, str]:
    """A colour for each arm: grey for the baseline, the best techniques all different."""
    ranked = _ranked(table)
    order = [*ranked, *(name for name in table.arms if name not in ranked and name != table.baseline)]
    return {table.baseline: BASELINE_COLOUR} | {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(order)}


class Look(NamedTuple):
    """How an arm is drawn where several share a panel."""

    colour: str
    marker: str
    line: Any


def looks(table: Table) -> dict[str, Look]:
    """Of each arm; no two of the first eight are alike in colour or marker."""
    found, number = {}, 0
    for name, colour in colours(table).items():
        if name == table.baseline:
            found[name] = Look(colour, "s", (0, (3, 2)))
            continue
        found[name] = Look(colour, MARKERS[number % len(MARKERS)], LINES[number % len(LINES)])
        number += 1
    return found


def _ranked(table: Table) -> list[str]:
    """Techniques, the best difference first."""
    sign = table.metric.sign
    known = [c for c in table.comparisons if not math.isnan(c.t.mean)]
    return [c.arm for c in sorted(known, key=lambda c: -sign * float(c.t.mean))]


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _in_lines(name: str, length: int = 22) -> str:
    """A row's name in at most two lines: names of one kind differ at their end."""
    return "\n".join(textwrap.wrap(name, length, max_lines=2, placeholder="…", break_on_hyphens=False))


def _unit(table: Table) -> str:
    return f"{table.metric.name}, %" if table.metric.is_fraction else table.metric.name


def _clear(axes: Axes, which: str) -> None:
    """No grid along one axis: its ticks are names."""
    axes.grid(False, axis=which)  # type: ignore[arg-type]
    axes.tick_params(axis=which, length=0)  # type: ignore[arg-type]


def _differences(table: Table) -> Drawn | None:
    shown = [c for name in _ranked(table) for c in table.comparisons if c.arm == name]
    if not shown:
        return None
    metric, palette, scale = table.metric, colours(table), table.metric.scale
    figure = Figure(figsize=(WIDTH, 1.1 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    margin = table.plan.margin
    if margin is not None:
        axes.axvspan(-margin * scale, margin * scale, color=BASELINE_COLOUR, alpha=0.18, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    for row, c in enumerate(reversed(shown)):
        colour = palette[c.arm]
        axes.plot(c.differences * scale, [row - 0.24] * c.n, "|", color=colour, markersize=5, alpha=0.7)
        if not math.isnan(c.t.low):
            axes.plot([c.t.low * scale, c.t.high * scale], [row, row], color=colour, linewidth=2.2)
        said = c.finding.startswith(("helps", "hurts"))
        face = colour if said else PAPER
        axes.plot(c.t.mean * scale, row, "o", color=colour, markerfacecolor=face, markersize=6)
    axes.set_yticks(range(len(shown)), [_in_lines(c.arm) for c in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    _clear(axes, "y")
    better = "higher" if metric.higher_is_better else "lower"
    unit = f",{metric.unit}" if metric.unit else ""
    label = f"difference to {_short(table.baseline, 20)} in {metric.name}{unit} ({better} is better)"
    figure.supxlabel(label, fontsize=9.5)  # of the figure: long names leave the axes little room
    band = "" if margin is None else " The band is the margin."
    levels = sorted({percent(c) for c in shown})
    caption = (
        f"Mean paired difference with its {' or '.join(levels)} interval; ticks are single seeds. "
        f"Filled: helps or hurts.{band}"
    )
    return "differences", f"Differences to {table.baseline}", caption, figure


def _boxes(table: Table) -> Drawn | None:
    arms = [arm for arm in table.arms.values() if len(arm.runs)]
    if not arms:
        return None
    palette = colours(table)
    order = [table.baseline, *_ranked(table)]
    arms.sort(key=lambda arm: order.index(arm.name) if arm.name in order else len(order))
    figure = Figure(figsize=(WIDTH, 1.0 + 0.36 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(reversed(arms)):
        colour, values = palette[arm.name], arm.values * table.metric.scale
        if len(values) >= 3:
            line = {"color": colour, "linewidth": 1.3}
            axes.boxplot(
                [values], positions=[row], orientation="horizontal", widths=0.5, showfliers=False, manage_ticks=False,
                boxprops=line, whiskerprops=line, capprops=line, medianprops={"color": colour, "linewidth": 2.6},
            )  # fmt: skip
        spread = np.linspace(-0.13, 0.13, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, row + spread, "o", color=colour, markersize=3.6, alpha=0.75, markeredgewidth=0)
    axes.set_yticks(range(len(arms)), [_in_lines(arm.name) for arm in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    _clear(axes, "y")
    axes.set_xlabel(_unit(table))
    caption = "Every run that counts; box: quartiles and median, whiskers to 1.5 box lengths."
    return "runs", "Runs of each arm", caption, figure


def _accuracy_and_time(table: Table) -> Drawn | None:
    drawn_as, scale = looks(table), table.metric.scale
    points: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = []
    for arm in table.arms.values():
        runs = [run for run in arm.runs.values() if run.seconds]
        if runs:
            seconds = np.array([run.seconds for run in runs], dtype=np.float64)
            points.append(
                (arm.name, seconds, np.array([run.value for run in runs], dtype=np.float64) * scale)
            )
    if len(points) < 2:
        return None
    longest = max(seconds.mean() for _, seconds, _ in points)
    unit, per = ("h", 3600.0) if longest > 7200 else ("min", 60.0) if longest > 300 else ("s", 1.0)
    helped = {c.arm for c in table.comparisons if c.finding.startswith("helps")}
    rows = -(-len(points) // 3)
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    for name, seconds, values in points:
        (colour, marker, _), filled = drawn_as[name], name in helped or name == table.baseline
        axes.errorbar(
            seconds.mean() / per, values.mean(), xerr=_sd(seconds) / per, yerr=_sd(values), elinewidth=1,
            fmt=marker, color=colour, markersize=6.5,
            markerfacecolor=colour if filled else PAPER, label=_short(name, 24),
        )  # fmt: skip
    axes.set(xlabel=f"training time, {unit}", ylabel=_unit(table))
    if len(points) <= 2 * MOST_LINES:
        _legend_below(figure, axes)
    caption = "Means over seeds, bars: ±1 sd of a run. Filled: the baseline, and arms that helped."
    return (
        "time",
        "Accuracy against training time" if table.metric.base == "acc" else "Result against training time",
        caption,
        figure,
    )


def draw_forest(found: InGeneral) -> Plot | None:
    """A panel for each technique: its difference in each setting, their mean, and what another setting would show."""
    shown = [one for one in found.techniques if one.combined is not None]
    if not shown:
        return None
    scale = found.metric.scale
    rows = [len(one.used) + 1 for one in shown]
    height = 0.32 if any("\n" in _in_lines(name) for one in shown for name in one.used) else 0.23
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + sum(0.42 + height * n for n in rows)), layout="constrained")
        grid = figure.subplots(
            len(shown), 1, sharex=True, squeeze=False, height_ratios=[n + 0.8 for n in rows]
        )[:, 0]
        for number, (axes, one) in enumerate(zip(grid, shown, strict=True)):
            assert one.combined is not None
            colour, t = COLOURS[number % len(COLOURS)], one.combined.t
            if found.margin is not None:
                reach = found.margin * scale
                axes.axvspan(-reach, reach, color=BASELINE_COLOUR, alpha=0.18, linewidth=0)
            axes.axvline(0, color=INK, linewidth=1)
            names = [*one.used, "mean"]
            for row, c in zip(range(len(names) - 1, 0, -1), one.used.values(), strict=True):
                axes.plot([c.t.low * scale, c.t.high * scale], [row, row], color=colour, linewidth=1.4)
                axes.plot(c.t.mean * scale, row, "s", color=colour, markersize=4.5)
            other = [float(b) * scale for b in (one.combined.low, one.combined.high)]
            low, mean, high = (float(b) * scale for b in (t.low, t.mean, t.high))
            if len(one.used) >= FEWEST:  # of two, either would be wider than the picture
                axes.plot(other, [0, 0], color=INK, linewidth=0.9, linestyle=(0, (1, 1.2)))
                axes.fill([low, mean, high, mean], [0, 0.3, 0, -0.3], color=INK, linewidth=0)
            else:
                axes.plot(mean, 0, "D", color=INK, markerfacecolor=PAPER, markersize=5)
            axes.set_yticks(range(len(names)), [_in_lines(n) for n in reversed(names)])
            axes.set_ylim(-0.6, len(names) - 0.4)
            axes.set_title(_short(one.arm, 60), fontsize=9.5, loc="left")
            _clear(axes, "y")
        unit = f",{found.metric.unit}" if found.metric.unit else ""
        better = "higher" if found.metric.higher_is_better else "lower"
        figure.supxlabel(f"difference in {found.metric.name}{unit} ({better} is better)", fontsize=9.5)
        caption = (
            "Squares: each setting's mean paired difference with its interval. Diamond: the mean over settings and its "
            "95% interval; dotted: what another setting, measured alike, would show. Of two settings only their mean "
            "is drawn."
        )
        return _rendered("forest", "Each technique over the settings", caption, figure)


def _sd(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


# Curves: a panel an arm, the baseline grey in each; the same for any number of arms


def _mean_and_sd(block: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Epoch numbers, mean and sd over runs, of the epochs that have values."""
    there = np.isfinite(block).any(axis=0)
    kept = block[:, there]
    mean = np.nanmean(kept, axis=0)
    count = np.isfinite(kept).sum(axis=0)
    sd = np.sqrt(np.nansum((kept - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
    return np.flatnonzero(there) + 1, mean, sd


def _band(axes: Axes, block: NDArray[np.float64], look: Look, scale: float, label: str) -> None:
    epochs, mean, sd = _mean_and_sd(block)
    colour, marker, line = look
    every = max(1, len(epochs) // 6)
    axes.plot(
        epochs,
        mean * scale,
        color=colour,
        label=label,
        linestyle=line,
        marker=marker,
        markersize=3.5,
        markevery=every,
    )
    if len(block) > 1:
        axes.fill_between(
            epochs, (mean - sd) * scale, (mean + sd) * scale, color=colour, alpha=0.2, linewidth=0
        )


def _panels(table: Table, curves: Curves, column: str, scale: float) -> Figure | None:
    arms = _with_curve(table, curves, column)[:MOST_PANELS]
    base = curves[table.baseline].get(column)
    if not arms:
        arms = [table.baseline] if base is not None else []
    if not arms:
        return None
    drawn_as = looks(table)
    columns = {1: 1, 2: 2, 4: 2}.get(len(arms), 3)
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + (1.75 if columns > 1 else 2.6) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(grid, arms, strict=False):
        if base is not None and name != table.baseline:
            _band(axes, base, drawn_as[table.baseline], scale, table.baseline)
        _band(axes, curves[name][column], drawn_as[name]._replace(line="-"), scale, name)
        axes.set_title(_short(name, 24 if columns > 1 else 60), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid[len(arms) :]:
        axes.set_visible(False)
    for i, axes in enumerate(grid[: len(arms)]):  # the lowest panel of each column has the axis
        axes.tick_params(labelbottom=i + columns >= len(arms))
    figure.supxlabel("epoch", fontsize=9.5)
    _zoom(grid[0], [curves[n][column] * scale for n in arms] + ([] if base is None else [base * scale]))
    return figure


def _zoom(axes: Axes, blocks: Sequence[NDArray[np.float64]]) -> None:
    """Long runs: leave the first tenth out of the scale, where it would flatten the rest."""
    epochs = max(block.shape[1] for block in blocks)
    if epochs < 20:
        return
    late = np.concatenate([block[:, epochs // 10 :].ravel() for block in blocks])
    late = late[np.isfinite(late)]
    if late.size:
        low, high = np.quantile(late, [0.005, 0.995])
        pad = 0.08 * (high - low) or 1e-3
        axes.set_ylim(low - pad, high + pad)


def _learning_curves(table: Table, curves: Curves) -> list[Drawn]:
    metric, drawn = table.metric, []
    for name, column, scale, title, unit in (
        (
            "curves_val",
            f"val/{metric.base}",
            metric.scale,
            "Learning curves: validation",
            "%" if metric.is_fraction else "",
        ),
        ("curves_loss", "train/loss", 1.0, "Learning curves: training loss", ""),
    ):
        figure = _panels(table, curves, column, scale)
        beyond = len(_with_curve(table, curves, column)) - MOST_PANELS
        more = f" The {beyond} arms with the worst differences are not shown." if beyond > 0 else ""
        if figure is not None:
            figure.supylabel(f"{column}, {unit}" if unit else column, fontsize=9.5)
            caption = f"Mean over seeds, band: ±1 sd of a run; grey, dashed: {table.baseline}.{more}"
            drawn.append((name, title, caption, figure))
    return drawn


def _with_curve(table: Table, curves: Curves, column: str) -> list[str]:
    return [name for name in _ranked(table) if column in curves.get(name, {})]


def _overlay(table: Table) -> list[str]:
    """The arms of a figure with all arms in one panel: the baseline and as many techniques as have a colour."""
    return [table.baseline, *_ranked(table)[:MOST_LINES]]


def _logits(table: Table, curves: Curves) -> Drawn | None:
    shown = [arm for arm in _overlay(table) if arm in curves]
    names = [n for n in ("norm", "mean", "max", "var") if any(f"logits/{n}" in curves[arm] for arm in shown)]
    if not names:
        return None
    drawn_as = looks(table)
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, name in zip(grid, names, strict=False):
        for arm in shown:
            block = curves[arm].get(f"logits/{name}")
            if block is not None:
                _band(axes, block, drawn_as[arm], 1.0, _short(arm, 24))
        axes.set_title(f"logits/{name}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(names) - 2) : len(names)]:
        axes.set_xlabel("epoch")
    _legend_below(figure, grid[0])
    caption = "Statistics of the training logits: mean over seeds, band: ±1 sd of a run."
    return "logits", "Logit statistics", caption, figure


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


def _calibration(table: Table) -> Drawn | None:
    drawn_as = looks(table)
    with_error = [
        (name, errors)
        for name in [table.baseline, *_ranked(table)]
        if (errors := _calibration_errors(table.arms[name])).size
    ]
    binned = {
        name: np.sum(blocks, axis=0)
        for name in _overlay(table)
        if (blocks := [r.correctness.calibration for r in table.arms[name].runs.values() if r.correctness])
    }
    if not with_error and not binned:
        return None
    panels: list[Callable[[Axes], Any]] = []
    if binned:
        panels.append(lambda axes: _reliability(axes, binned, drawn_as))
    if with_error:
        panels.append(lambda axes: _error_dots(axes, with_error, drawn_as))
    heights = [3.0] * bool(binned) + [0.7 + 0.26 * len(with_error)] * bool(with_error)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, draw in zip(grid, panels, strict=True):
        draw(axes)
    caption = "Below: expected calibration error of each run." if binned and with_error else ""
    if binned:
        shares = (
            "Share of right answers by confidence, all seeds together (under the diagonal: overconfident)."
        )
        caption = f"{shares} {caption}"
    return "calibration", "Calibration", caption.strip(), figure


def _calibration_errors(arm: Arm) -> NDArray[np.float64]:
    return np.array([r.final["test/ece"] for r in arm.runs.values() if "test/ece" in r.final])


def _reliability(axes: Axes, binned: Mapping[str, NDArray[np.float64]], drawn_as: Mapping[str, Look]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for name, (count, confidence, hits) in binned.items():
        kept = count >= max(10.0, 0.002 * count.sum())  # rare confidences are noise
        colour, marker, line = drawn_as[name]
        axes.plot(
            confidence[kept] / count[kept], hits[kept] / count[kept], color=colour, linestyle=line, marker=marker,
            markersize=4, label=_short(name, 24),
        )  # fmt: skip
    axes.set(xlabel="confidence", ylabel="share of right answers", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(loc="upper left", fontsize=8)


def _error_dots(
    axes: Axes, with_error: Sequence[tuple[str, NDArray[np.float64]]], drawn_as: Mapping[str, Look]
) -> None:
    for row, (name, errors) in enumerate(reversed(with_error)):
        axes.plot(
            errors,
            [row] * len(errors),
            "o",
            color=drawn_as[name].colour,
            markersize=4,
            alpha=0.7,
            markeredgewidth=0,
        )
        axes.plot(errors.mean(), row, "|", color=drawn_as[name].colour, markersize=13, markeredgewidth=2.2)
    axes.set_yticks(range(len(with_error)), [_in_lines(name, 24) for name, _ in reversed(with_error)])
    axes.set_xlim(left=0)
    _clear(axes, "y")
    axes.set_xlabel("test/ece")
