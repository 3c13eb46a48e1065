"""The report as a list of blocks, and its three forms: Markdown, one HTML file, and the console."""

from __future__ import annotations

import html
import math
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crucible.files import write_atomically
from reporting.comparison import Arm, Comparison, Table, unit_name
from reporting.plots import Plot
from reporting.records import LeftOut, Run
from reporting.request import Request

LEFT_OUT_LISTED = 100
WARNINGS_LISTED = 60

Cell = tuple[str, float | str]  # shown, and what a column is sorted by


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph; `notice`: on the face of the report."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Commands, one a line."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table; the first column names the row. `words` are columns of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Picture:
    plot: Plot
    file: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on request."""

    title: str
    blocks: Sequence[Block]


Block = Heading | Text | Items | Code | Grid | Picture | Fold


@dataclass
class Page:
    """All blocks, and those that the console shows."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    brief: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block, brief: bool = False) -> None:
        self.blocks += blocks
        if brief:
            self.brief += blocks


def compose(
    tables: Sequence[Table],
    plots: Mapping[str, Sequence[Plot]],
    left_out: Sequence[LeftOut],
    request: Request,
) -> Page:
    """The page of these tables; `plots` by data set."""
    page = Page("Comparison")
    command = shlex.join(["python", "report.py", *request.arguments])
    page.add(Text(f"Written {time.strftime('%Y-%m-%d %H:%M')} by `{command}`."))
    for table in tables:
        pictures = {
            p.name: Picture(p, f"plots/{plot_file(table.data, p)}") for p in plots.get(table.data, ())
        }
        _add_table(page, table, pictures, request)
    if left_out:
        rows = [[_word(str(r.path)), _word(r.status), _word(r.reason)] for r in left_out[:LEFT_OUT_LISTED]]
        grid = Grid(["run", "status", "reason"], rows, frozenset({"run", "status", "reason"}))
        page.add(Heading("Runs left out", 2), grid, brief=True)
        if len(left_out) > LEFT_OUT_LISTED:
            page.add(Text(f"And {len(left_out) - LEFT_OUT_LISTED} more."), brief=True)
    return page


def plot_file(data: str, plot: Plot) -> str:
    """The name of the plot's file."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', data)}-{plot.name}.png"


def _add_table(page: Page, table: Table, pictures: Mapping[str, Picture], request: Request) -> None:
    def picture(*names: str) -> list[Block]:
        return [pictures[n] for n in names if n in pictures]

    page.add(Heading(table.data, 2), Text(f"{_headline(table, request)}."), brief=True)
    page.add(*(Text(remark, notice=True) for remark in table.plan.remarks), brief=True)
    if table.comparisons:
        page.add(Heading("Verdicts", 3), _verdict_grid(table))
        page.brief.append(
            Items([f"{c.arm}: {c.verdict}" + (f"; {c.cost}" if c.cost else "") for c in table.comparisons])
        )
        page.add(*picture("differences"))
    if table.warnings:
        lines = table.warnings[:WARNINGS_LISTED]
        if len(table.warnings) > WARNINGS_LISTED:
            lines = [*lines, f"and {len(table.warnings) - WARNINGS_LISTED} more of the kind"]
        page.add(Heading("Look at", 3), Items(lines), brief=True)
    page.add(Heading("Arms", 3), _arm_grid(table), brief=True)
    page.add(*picture("runs"))
    if table.comparisons:
        unit = f", in{table.metric.unit}" if table.metric.unit else ""
        page.add(
            Heading(f"Against {table.baseline}, paired by seed{unit}", 3), _comparison_grid(table), brief=True
        )
        page.add(Text(_DETECTABLE))
        page.add(*(Text(note) for note in table.notes), brief=True)
        page.add(Heading("Cost beside the gain", 3), _cost_grid(table), Text(_COST_LABELS), *picture("time"))
    else:
        page.add(*(Text(note) for note in table.notes), brief=True)
    if table.together:
        page.add(Heading("Two techniques together", 3), _together_grid(table), Text(_TOGETHER))
    if any(name in pictures for name in ("curves_val", "curves_loss", "logits", "calibration")):
        page.add(Heading("Curves", 3), *picture("curves_val", "curves_loss", "logits", "calibration"))
    page.add(Heading("Settings", 3), *_settings_blocks(table))
    page.add(Heading("To reproduce", 3), *_commands(table))


_DETECTABLE = (
    "*detectable*: the effect that so many pairs find 4 times in 5 at the level of the verdict, corrected for all "
    "techniques; *alone*: if there were one technique only."
)
_COST_LABELS = (
    "*free*: helps, and the time ratio is surely below 1.05. *pays*: helps, and beats the baseline that was "
    "trained for as long. *dominated*: hurts or makes no difference larger than the margin, and takes longer. "
    "Else the *trade-off* is *open*: an arm with the baseline trained for longer settles it. Times compare only "
    "on equal and otherwise idle machines."
)
_TOGETHER = (
    "Interaction: both together, minus each alone, plus neither, by seed; positive: they help each other. "
    "Called synergy or conflict only where the intervals in points and in log error exclude 0 on the same side."
)


def _word(text: str) -> Cell:
    return text, text.lower()


def _number(value: float | None, form: str) -> Cell:
    if value is None or math.isnan(value):
        return "-", math.nan
    return format(value, form), value


def _metric(table: Table, value: float, signed: bool = False) -> Cell:
    return table.metric.formatted(value, signed), value * table.metric.scale


def _p(value: float) -> Cell:
    text = "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
    return text, value


def _headline(table: Table, request: Request) -> str:
    metric, plan = table.metric, table.plan
    better = "higher" if metric.higher_is_better else "lower"
    margin = "none" if plan.margin is None else f"{metric.formatted(plan.margin)}{metric.unit}"
    percent = " in %" if metric.is_fraction else ""
    scored = "of the weights that were best on validation" if request.best else "of the last epoch"
    planned = f"; planned seeds: {' or '.join(map(str, plan.seeds))}" if plan.seeds else ""
    variance = "; variance shared by the arms (moderated)" if request.shared_variance else ""
    what = f"{metric.name}{percent} {scored} ({better} is better)"
    return f"{what}; margin {margin}; baseline: {table.baseline}{planned}{variance}"


def _verdict_grid(table: Table) -> Grid:
    rows = []
    for c in table.comparisons:
        difference = _metric(table, float(c.t.mean), signed=True)
        rows.append([_word(c.arm), difference, _word(c.verdict), _word(c.cost or "-")])
    return Grid(["arm", "diff", "verdict", "cost"], rows, frozenset({"arm", "verdict", "cost"}))


def spread(arm: Arm) -> dict[str, float]:
    """Mean, sd, median, min and max of the runs that count, as logged; NaN where there are none."""
    values = arm.values
    if not len(values):
        return dict.fromkeys(("mean", "sd", "median", "min", "max"), math.nan)
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _arm_grid(table: Table) -> Grid:
    rows = []
    for arm in table.arms.values():
        described = [_metric(table, v) for v in spread(arm).values()]
        rows.append(
            [_word(arm.name), _number(len(arm.runs), "d"), *described, _number(len(arm.diverged), "d")]
        )
    return Grid(["arm", "n", "mean", "sd", "median", "min", "max", "diverged"], rows, frozenset({"arm"}))


def _comparison_grid(table: Table) -> Grid:
    metric = table.metric
    flips = any(not math.isnan(c.p_flip) for c in table.comparisons)
    new = any(c.images is not None for c in table.comparisons)
    percent = f"{100 * (1 - table.plan.level):.3g}%"
    head = ["arm", "pairs", "diff", f"{percent} interval", *(["new images"] if new else []), "p"]
    head += [*(["flip p"] if flips else []), "Holm p", "detectable", "alone"]
    rows = []
    for c in table.comparisons:
        interval = metric.formatted_interval(float(c.t.low), float(c.t.high))
        if c.n == 2:
            interval = "both: " + ", ".join(metric.formatted(float(d), signed=True) for d in c.differences)
        row = [_word(c.arm), _number(c.n, "d"), _metric(table, float(c.t.mean), signed=True)]
        row.append((interval, float(c.t.low)))
        if new:
            low, high = (c.images.low, c.images.high) if c.images else (math.nan, math.nan)
            row.append((metric.formatted_interval(low, high), low))
        row += [_p(float(c.t.p)), *([_p(c.p_flip)] if flips else []), _p(c.p_holm)]
        rows.append([*row, *(_metric(table, d) for d in c.detectable)])
    return Grid(head, rows, frozenset({"arm"}))


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v]
    return sum(known) / len(known) if known else math.nan


def costs(arm: Arm) -> dict[str, float]:
    """Seconds of training, images a second, images seen and MiB at the peak: means over the runs that count."""
    runs = list(arm.runs.values())
    seen = (r.seconds * r.images_per_s if r.seconds and r.images_per_s else None for r in runs)
    return {
        "time_s": _mean(r.seconds for r in runs),
        "images_per_s": _mean(r.images_per_s for r in runs),
        "images": _mean(seen),
        "memory_mb": _mean(r.memory_mb for r in runs),
    }


def _cost_grid(table: Table) -> Grid:
    against = {c.arm: c for c in table.comparisons}
    rows = []
    for arm in table.arms.values():
        cost, c = costs(arm), against.get(arm.name)
        gain = ("-", math.nan) if c is None else _metric(table, float(c.t.mean), signed=True)
        row = [
            _word(arm.name),
            gain,
            _ratio(c),
            _number(cost["time_s"], ",.1f"),
            _number(cost["images_per_s"], ",.0f"),
        ]
        row += [_number(cost["images"] / 1e3, ",.1f"), _number(cost["memory_mb"], ",.0f")]
        rows.append([*row, _word((c.cost if c else "") or "-")])
    head = ["arm", "diff", "time ratio", "time, s", "images/s", "images seen, k", "memory, MiB", "cost"]
    return Grid(head, rows, frozenset({"arm", "cost"}))


def _ratio(c: Comparison | None) -> Cell:
    if c is None or math.isnan(c.ratio.mean):
        return "-", math.nan
    interval = "" if math.isnan(c.ratio.low) else f" ({c.ratio.low:.2f}-{c.ratio.high:.2f})"
    return f"{c.ratio.mean:.2f}{interval}", float(c.ratio.mean)


def _together_grid(table: Table) -> Grid:
    metric = table.metric
    rows = []
    for t in table.together:
        points, logs, best = t.interaction.points, t.interaction.logs, t.interaction.best_single
        row = [_word(t.both), _word(f"{t.one}, {t.other}"), _number(t.n, "d")]
        row.append(_metric(table, float(points.mean), signed=True))
        row.append((metric.formatted_interval(float(points.low), float(points.high)), float(points.low)))
        log = "-" if math.isnan(logs.low) else f"{logs.low:+.3f} to {logs.high:+.3f}"
        row.append((log, float(logs.low)))
        row.append((metric.formatted_interval(float(best.low), float(best.high)), float(best.low)))
        rows.append([*row, _word(t.text)])
    head = [
        "together",
        "alone",
        "seeds",
        "interaction",
        "interval",
        "in -log error",
        "over the better one",
        "so",
    ]
    return Grid(head, rows, frozenset({"together", "alone", "so"}))


def _settings_blocks(table: Table) -> Iterable[Block]:
    differing, equal = table.settings.differing, table.settings.equal
    if differing:
        arms = list(table.arms)
        rows = [[_word(name), *(_word(values[arm]) for arm in arms)] for name, values in differing.items()]
        grid = Grid(["option", *arms], rows, frozenset(["option", *arms]))
        many = len(arms) > 8
        yield Fold(f"{len(rows)} options that differ", [grid]) if many else grid
    else:
        yield Text("No option differs between the arms.")
    lines = [f"`{name}`: {value}" for name, value in equal.items()]
    yield Fold(f"{len(lines)} options that are equal in all arms", [Items(lines)])


def _commands(table: Table) -> Iterable[Block]:
    """The sweeps' own commands; and one for each set of overrides that differs by more than seed and fold."""
    ended = [r for arm in table.arms.values() for r in arm.all_runs]
    sweeps = {r.sweep.command for r in ended if r.sweep is not None and r.sweep.command}
    if sweeps:
        yield Text("The sweep:" if len(sweeps) == 1 else "The sweeps:")
        yield Code(sorted(sweeps))
        yield Text("Arm by arm:")
    lines, without = [], []
    for arm in table.arms.values():
        groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in arm.all_runs:
            last = {o.split("=", 1)[0]: o for o in run.overrides}  # what is given twice counts once
            kept = [o for name, o in last.items() if name not in ("seed", "data.module.fold", "exp_dir")]
            groups[tuple(kept)].append(run)
        for overrides, runs in groups.items():
            if not overrides and arm.name != table.baseline:
                without += [f"{arm.name}, {unit_name(r.unit)}" for r in runs]
                continue
            seeds = sorted({r.unit[0] for r in runs})
            folds = sorted({r.unit[1] for r in runs})
            options = [*overrides, f"seed={','.join(map(str, seeds))}"]
            options += [f"data.module.fold={','.join(map(str, folds))}"] if folds != [0] else []
            lines.append(shlex.join(["python", "main.py", "-m", *options]))
    yield Code(lines)
    commits = sorted({r.commit + ("+changes" if r.dirty else "") for r in ended if r.commit})
    versions = sorted({f"{name} {v}" for r in ended for name, v in r.versions.items()})
    devices = sorted({r.device for r in ended if r.device})
    circumstances = [
        f"{what}: {', '.join(values)}"
        for what, values in (("Commit", commits), ("versions", versions), ("device", devices))
        if values
    ]
    if circumstances:
        yield Text("; ".join(circumstances) + ".")
    if without:
        yield Text(f"No overrides are recorded of {len(without)} runs; their config.yaml holds all options.")


# Markdown


def markdown(page: Page) -> str:
    """GitHub's Markdown; pictures are linked from plots/."""
    return "\n".join([f"# {page.title}", "", *(line for b in page.blocks for line in [*_to_markdown(b), ""])])


def _to_markdown(block: Block) -> list[str]:
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {text}"]
        case Text(text, notice):
            return [f"> **Note:** {text}" if notice else text]
        case Items(lines):
            return [f"- {line}" for line in lines]
        case Code(lines):
            return ["```sh", *lines, "```"]
        case Grid(head, rows, words):
            rule = ["---" if name in words else "---:" for name in head]
            cells = [list(head), rule, *([shown for shown, _ in row] for row in rows)]
            return [
                "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in line) + " |"
                for line in cells
            ]
        case Picture(plot, file):
            return [f"![{plot.title}]({file})", "", f"*{plot.title}.* {plot.caption}"]
        case Fold(title, blocks):
            inner = [line for b in blocks for line in [*_to_markdown(b), ""]]
            return [f"<details><summary>{title}</summary>", "", *inner, "</details>"]


# HTML


def to_html(page: Page) -> str:
    """One file with its style, script and pictures in it."""
    body = "\n".join(_to_html(block) for block in page.blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_escape(page.title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_escape(page.title)}</h1>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _inline(text: str) -> str:
    """Escaped, with `code` and *emphasis*."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"(?<![\w*])\*([a-z][^*<]*)\*(?![\w*])", r"<em>\1</em>", marked)


def _verdict_class(text: str) -> str:
    openings = (
        "helps",
        "hurts",
        "no difference",
        "no technique",
        "undecided",
        "unstable",
        "cannot say",
        "synergy",
        "conflict",
    )
    opening = next((o for o in openings if text.startswith(o)), "")
    return f' class="verdict {opening.split()[0]}"' if opening else ""


def _to_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Text(text, notice):
            return f'<p class="notice">{_inline(text)}</p>' if notice else f"<p>{_inline(text)}</p>"
        case Items(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Code(lines):
            return "<pre><code>" + "\n".join(map(_escape, lines)) + "</code></pre>"
        case Grid():
            return _html_grid(block)
        case Picture(plot):
            caption = f"<figcaption><b>{_escape(plot.title)}.</b> {_escape(plot.caption)}</figcaption>"
            return f'<figure><div class="scroll">{plot.svg}</div>{caption}</figure>'
        case Fold(title, blocks):
            inner = "\n".join(map(_to_html, blocks))
            return f"<details><summary>{_escape(title)}</summary>\n{inner}\n</details>"


def _html_grid(grid: Grid) -> str:
    head = "".join(
        f'<th scope="col"{"" if name in grid.words else " class=number"} aria-sort="none">'
        f'<button type="button">{_escape(name)}</button></th>'
        for name in grid.head
    )
    lines = []
    for row in grid.rows:
        cells = []
        for i, (name, (shown, key)) in enumerate(zip(grid.head, row, strict=True)):
            text = (
                f"<span{_verdict_class(shown)}>{_escape(shown)}</span>"
                if name in ("verdict", "so")
                else _escape(shown)
            )
            if i == 0:  # long names may break where they have a joint
                text = re.sub(r"([_+=,/]|\.(?=[a-z]))", r"\1<wbr>", text)
            value = "" if isinstance(key, float) and math.isnan(key) else _escape(str(key))
            css_class = "" if name in grid.words else " class=number"
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            cells.append(f'<{tag}{scope}{css_class} data-key="{value}">{text}</{tag}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--shade:#f6f8fa;
--good:#1a7f37;--bad:#cf222e;--open:#9a6700;--link:#0969da}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;
--shade:#161b22;--good:#3fb950;--bad:#ff7b72;--open:#d29922;--link:#4493f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
main{max-width:62rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.7rem;margin:.5rem 0}
h2{font-size:1.35rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1.08rem;margin:1.8rem 0 .5rem}
p,li{max-width:48rem}
ul{padding-left:1.25rem}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--shade);border-radius:4px}
code{padding:.1em .3em;overflow-wrap:anywhere}
pre{padding:.7rem .9rem;overflow-x:auto}
pre code{padding:0;background:none;overflow-wrap:normal}
.notice{border-left:4px solid var(--open);background:var(--shade);padding:.5rem .8rem;border-radius:0 4px 4px 0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .65rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;white-space:nowrap}
td .verdict,td:last-child{white-space:normal}
td:last-child:not(.number){min-width:11rem}
td .verdict{display:inline-block;min-width:13rem}
.number{text-align:right}
thead th{padding:0;background:var(--shade)}
thead button{all:unset;display:block;box-sizing:border-box;width:100%;padding:.35rem .65rem;cursor:pointer;
font-weight:600}
thead button:focus-visible{outline:2px solid var(--link);outline-offset:-2px}
thead button::after{content:"\\2195";margin-left:.3em;color:var(--soft);opacity:.45;font-weight:400}
th[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
th[aria-sort=descending] button::after{content:"\\2193";opacity:1}
tbody th{font-weight:600;position:sticky;left:0;background:var(--page);white-space:normal;min-width:9rem}
.verdict.helps,.verdict.synergy{color:var(--good);font-weight:600}
.verdict.hurts,.verdict.conflict,.verdict.unstable{color:var(--bad);font-weight:600}
.verdict.undecided,.verdict.cannot{color:var(--open)}
figure{margin:1.2rem 0}
figure svg{display:block;width:100%;max-width:42rem;height:auto;font-family:inherit}
figcaption{color:var(--soft);font-size:.9rem;max-width:48rem;margin-top:.3rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--link)}
@media (max-width:40rem){body{font-size:15px}main{padding:.5rem .75rem 3rem}th,td{padding:.3rem .5rem}
thead button{padding:.35rem .5rem}td .verdict{min-width:0;width:9.5rem}
tbody th{min-width:6rem}td:last-child:not(.number){min-width:6rem}}
@media print{thead button::after{content:""}figure{break-inside:avoid}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.classList.contains("number"), key = row => row.cells[column].dataset.key;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, {numeric: true});
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
"""


# The console


def to_console(page: Page) -> None:
    """Print what the page says in brief: verdicts, tables, notes, warnings."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    for block in page.brief:
        match block:
            case Heading(text):
                console.print(f"\n{text}", style="bold")
            case Text(text):
                console.print(text, soft_wrap=True)
            case Items(lines):
                for line in lines:
                    console.print(f"  - {line}", soft_wrap=True)
            case Grid(head, rows, words):
                grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
                for name in head:
                    grid.add_column(name, justify="left" if name in words else "right", overflow="fold")
                for row in rows:
                    grid.add_row(*(shown for shown, _ in row))
                console.print(grid)


def csv_rows(table: Table) -> Iterable[dict[str, Any]]:
    """A row an arm; values and differences as logged (accuracies are fractions), None where there is none."""
    against = {c.arm: c for c in table.comparisons}
    for arm in table.arms.values():
        row: dict[str, Any] = {"data": table.data, "arm": arm.name, "metric": table.metric.name}
        row |= {"n": len(arm.runs), "diverged": len(arm.diverged), **spread(arm), **costs(arm)}
        row |= {"margin": table.plan.margin, "level": table.plan.level, "noise_floor": table.floor}
        if c := against.get(arm.name):
            row |= {
                "pairs": c.n,
                "difference": c.t.mean,
                "sd_difference": c.t.sd,
                "low": c.t.low,
                "high": c.t.high,
            }
            row |= {"p": c.t.p, "p_flip": c.p_flip, "p_holm": c.p_holm, "correlation": c.correlation}
            row |= {"detectable": c.detectable[0], "detectable_alone": c.detectable[1]}
            if c.images is not None:
                row |= {"images_low": c.images.low, "images_high": c.images.high}
            row |= {
                "time_ratio": c.ratio.mean,
                "time_ratio_low": c.ratio.low,
                "time_ratio_high": c.ratio.high,
            }
            row |= {"verdict": c.verdict, "cost": c.cost}
        yield row


CSV_COLUMNS = (
    "data", "arm", "metric", "n", "diverged", "mean", "sd", "median", "min", "max", "time_s", "images_per_s",
    "images", "memory_mb", "pairs", "difference", "sd_difference", "low", "high", "images_low", "images_high", "p",
    "p_flip", "p_holm", "correlation", "detectable", "detectable_alone", "time_ratio", "time_ratio_low",
    "time_ratio_high", "margin", "level", "noise_floor", "verdict", "cost",
)  # fmt: skip


def results_csv(tables: Sequence[Table]) -> str:
    """results.csv; empty cells for what there is not."""
    import pandas

    rows = [row for table in tables for row in csv_rows(table)]
    table = pandas.DataFrame(rows, columns=list(CSV_COLUMNS)).astype({"pairs": "Int64"})
    return str(table.to_csv(index=False, lineterminator="\n"))


def write(page: Page, tables: Sequence[Table], plots: Mapping[str, Sequence[Plot]], out: Path) -> None:
    """Write report.md, report.html, results.csv and plots/ into the folder `out`."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for data, drawn in plots.items():
        for plot in drawn:
            (out / "plots" / plot_file(data, plot)).write_bytes(plot.png)
    write_atomically(out / "report.md", markdown(page))
    write_atomically(out / "report.html", to_html(page))
    write_atomically(out / "results.csv", results_csv(tables))
