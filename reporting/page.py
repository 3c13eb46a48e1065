"""What the report says, as a list of blocks; `reporting.rendering` gives them their forms."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from crucible.command_line import command, option
from reporting import remarks
from reporting.answer import Answer, answer, answer_in_general, basics, under_corruptions, varying
from reporting.arms import unit_name
from reporting.comparison import Comparison, Table, formatted_p
from reporting.elsewhere import Elsewhere
from reporting.general import InGeneral
from reporting.mechanism import MEASURES, Mechanism, Spread, to_measure
from reporting.plots import Plot
from reporting.records import LeftOut, Run
from reporting.request import Request
from reporting.robustness import Robustness, corruptions, to_test
from reporting.statistics import PairedT

ALL = "all settings"  # what the pictures over all of them are filed under
LONGEST_NAME = 80  # bytes of a setting's name in a file's
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
class Lead:
    """The paragraph on top: what was compared, and what was found."""

    answer: Answer


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


Block = Heading | Text | Lead | Items | Code | Grid | Picture | Fold


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
    over_all: InGeneral | None = None,
) -> Page:
    """The page of these tables; `plots` by setting, those over all of them by `ALL`."""
    page = Page("Comparison")
    if over_all is not None:
        _add_general(page, over_all, plots.get(ALL, ()))
    for table in tables:
        pictures = {
            p.name: Picture(p, f"plots/{plot_file(table.data, p)}") for p in plots.get(table.data, ())
        }
        _add_table(page, table, pictures, request)
    command = shlex.join(["python", "report.py", *request.arguments])
    written = Text(f"Written {time.strftime('%Y-%m-%d %H:%M')} by `{command}`.")
    if left_out:
        rows = [[_word(str(r.path)), _word(r.status), _word(r.reason)] for r in left_out[:LEFT_OUT_LISTED]]
        grid = Grid(["run", "status", "reason"], rows, frozenset({"run", "status", "reason"}))
        page.add(Heading("Runs left out", 2), grid, brief=True)
        if len(left_out) > LEFT_OUT_LISTED:
            page.add(Text(f"And {len(left_out) - LEFT_OUT_LISTED} more."), brief=True)
    page.add(written)
    return page


def plot_file(data: str, plot: Plot) -> str:
    """The name of the plot's file; letters of any script stay as they are.

    A setting whose name is too long for a file, or has what does not belong in one, is told apart by a hash.
    """
    name = re.sub(r"[^\w.-]+", "-", data)
    if data != ALL and (name != data or len(name.encode()) > LONGEST_NAME):
        cut = name.encode()[:LONGEST_NAME].decode(errors="ignore")
        name = f"{cut}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
    return f"{name}-{plot.name}.png"


def _add_table(page: Page, table: Table, pictures: Mapping[str, Picture], request: Request) -> None:
    def picture(*names: str) -> list[Block]:
        return [pictures[n] for n in names if n in pictures]

    page.add(Heading(table.data, 2), Lead(answer(table, request)), brief=True)
    page.add(*(Text(remark, notice=True) for remark in table.plan.remarks), brief=True)
    if table.comparisons:
        page.add(*picture("differences"), Heading("Verdicts", 3), _verdict_grid(table))
        page.brief.append(
            Items([f"{c.arm}: {c.verdict}" + (f"; {c.cost}" if c.cost else "") for c in table.comparisons])
        )
    if warnings := remarks.warnings(table):
        lines = warnings[:WARNINGS_LISTED]
        if len(warnings) > WARNINGS_LISTED:
            lines = [*lines, f"and {len(warnings) - WARNINGS_LISTED} more of the kind"]
        page.add(Heading("Look at", 3), Items(lines), brief=True)
    page.add(Heading("Arms", 3), _arm_grid(table), brief=True)
    page.add(*picture("runs"))
    if table.comparisons:
        unit = f", in{table.metric.unit}" if table.metric.unit else ""
        page.add(
            Heading(f"Against {table.baseline}, paired by seed{unit}", 3), _comparison_grid(table), brief=True
        )
        page.add(Text(_DETECTABLE + remarks.sd_of_detectable(table)))
        page.add(*(Text(note) for note in remarks.notes(table)), brief=True)
        page.add(Heading("Cost beside the gain", 3), _cost_grid(table), Text(_COST_LABELS), *picture("time"))
    else:
        page.add(*(Text(note) for note in remarks.notes(table)), brief=True)
    if table.robustness:
        _add_robustness(page, table)
    if table.elsewhere:
        _add_elsewhere(page, table)
    if table.mechanism:
        page.add(*_mechanism_blocks(table))
    if table.together:
        page.add(Heading("Two techniques together", 3), _together_grid(table), Text(_TOGETHER))
    if any(name in pictures for name in ("curves_val", "curves_loss", "logits", "calibration")):
        page.add(Heading("Curves", 3), *picture("curves_val", "curves_loss", "logits", "calibration"))
    page.add(Heading("Settings", 3), *_settings_blocks(table))
    page.add(Heading("To reproduce", 3), *_commands(table))


_GENERAL = (
    "Mean of the settings' differences, each counting alike; Student's interval over settings, never narrower than "
    "their own errors allow; *another setting*: what one more of the kind, measured alike, would show 95 times in 100. "
    "*tau*: sd of the true effects between settings; *I2*: share of the variance that is not the seeds'; *differ p*: "
    "Welch's test that all settings have one effect. It holds for settings such as these, if they were not chosen by "
    "what they show."
)


def _add_general(page: Page, found: InGeneral, plots: Sequence[Plot]) -> None:
    """What holds over all settings."""
    page.add(Heading("In general", 2), Lead(answer_in_general(found)), brief=True)
    page.add(*(Picture(p, f"plots/{plot_file(ALL, p)}") for p in plots))
    if not found.techniques:
        return
    metric, rows = found.metric, []

    def shown(value: float, signed: bool = False) -> Cell:
        return metric.formatted(value, signed), value * metric.scale

    for one in found.techniques:
        row = [_word(one.arm), _number(len(one.used), "d")]
        if (all_of := one.combined) is None:
            rows.append([*row, *[("-", math.nan)] * 2, _word(one.verdict), *[("-", math.nan)] * 6])
            continue
        t = all_of.t
        row += [
            shown(float(t.mean), True),
            (metric.formatted_interval(float(t.low), float(t.high)), float(t.low)),
        ]
        row += [_word(one.verdict), _p(one.p_holm), _p(one.p_none)]
        row += [(metric.formatted_interval(float(all_of.low), float(all_of.high)), float(all_of.low))]
        row += [shown(float(all_of.tau)), _number(100 * float(all_of.i2), ".0f"), _p(float(all_of.p))]
        rows.append(row)
    head = [
        "arm",
        "settings",
        "diff",
        "95% interval",
        "verdict",
        "Holm p",
        "margin p",
        "another setting",
        "tau",
    ]
    unit = f", in{metric.unit}" if metric.unit else ""
    page.add(
        Heading(f"Over {len(found.settings)} settings{unit}", 3),
        Grid([*head, "I2, %", "differ p"], rows, frozenset({"arm", "verdict"})),
        brief=True,
    )
    page.add(Text(_GENERAL))
    without = [
        f"{one.arm} in {data}: {verdict}" for one in found.techniques for data, verdict in one.without.items()
    ]
    if without:
        page.add(Text("Without a number there:"), Items(without), brief=True)


_DETECTABLE = (
    "*detectable*: the effect that so many pairs find 4 times in 5 at the level of the verdict, corrected for all "
    "techniques; *alone*: if there were one technique only. *margin p*: that the effect is smaller than the margin, "
    "one-sided and corrected likewise; *Holm p* (*p over all looks*) and *margin p* are held against 0.05."
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
    return formatted_p(value), value


def _verdict_grid(table: Table) -> Grid:
    """The arms: difference, verdict, cost; and under corruptions, where their runs were tested so."""
    under = under_corruptions(table)
    rows = []
    for c in table.comparisons:
        difference = _metric(table, float(c.t.mean), signed=True)
        rows.append([_word(c.arm), difference, _word(c.verdict), _word(c.cost or "-")])
        if under is not None:
            other = next(o for o in under.comparisons if o.arm == c.arm)
            shown = _metric(under, float(other.t.mean), signed=True)
            rows[-1] += [shown, _word(other.verdict)]
    words, corrupted = ["arm", "verdict", "cost"], []
    if under is not None:
        corrupted = ["diff, corrupted", "verdict, corrupted"]
        words.append(corrupted[1])
    return Grid(["arm", "diff", "verdict", "cost", *corrupted], rows, frozenset(words))


def _arm_grid(table: Table) -> Grid:
    rows, differing, tests = [], varying(table), table.robustness
    for arm in table.arms.values():
        described = [_metric(table, v) for v in arm.spread().values()]
        own = basics(table, arm.name)
        rows.append(
            [_word(arm.name), _number(len(arm.runs), "d"), *described, _number(len(arm.diverged), "d")]
            + ([_percent(tests.mean(arm, "acc_corrupted"))] if tests else [])
            + [_word(own.get(name, "-")) for name in differing]
        )
    head = ["arm", "n", "mean", "sd", "median", "min", "max", "diverged"]
    head += [*(["acc corrupted"] if tests else []), *differing]
    return Grid(head, rows, frozenset({"arm", *differing}))


def _comparison_grid(table: Table) -> Grid:
    metric = table.metric
    flips = any(not math.isnan(c.p_flip) for c in table.comparisons)
    new = any(c.images is not None for c in table.comparisons)
    levels = [remarks.percent(c) for c in table.comparisons]
    several = len(set(levels)) > 1
    interval_name = "interval" if several else f"{levels[0]} interval"
    head = ["arm", "pairs", "diff", interval_name, *(["new images"] if new else []), "p"]
    head += [
        *(["flip p"] if flips else []),
        "p over all looks" if any(c.step for c in table.comparisons) else "Holm p",
        *(["margin p"] if table.plan.margin is not None else []),
    ]
    head += ["detectable", "alone"]
    rows = []
    for c, level in zip(table.comparisons, levels, strict=True):
        interval = metric.formatted_interval(float(c.t.low), float(c.t.high))
        if several and interval != "-":
            interval += f" ({level})"
        if c.n == 2:
            interval = "both: " + ", ".join(metric.formatted(float(d), signed=True) for d in c.differences)
        row = [_word(c.arm), _number(c.n, "d"), _metric(table, float(c.t.mean), signed=True)]
        row.append((interval, float(c.t.low)))
        if new:
            low, high = (c.images.low, c.images.high) if c.images else (math.nan, math.nan)
            told = metric.formatted_interval(low, high)
            row.append(("not estimable" if c.images and math.isnan(low) else told, low))
        row += [_p(float(c.t.p)), *([_p(c.p_flip)] if flips else []), _p(c.p_holm)]
        row += [_p(c.p_none)] if table.plan.margin is not None else []
        rows.append([*row, *(_metric(table, d) for d in c.detectable)])
    return Grid(head, rows, frozenset({"arm"}))


def _cost_grid(table: Table) -> Grid:
    against = {c.arm: c for c in table.comparisons}
    rows = []
    for arm in table.arms.values():
        cost, c = arm.costs(), against.get(arm.name)
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


_CORRUPTED = (
    "Means over the 15 common corruptions and their 5 severities (arXiv 1903.12261), compared as the metric above is, "
    "each with its own correction for the number of techniques. *clean*: the same weights on the same images as they "
    "are."
)


def _add_robustness(page: Page, table: Table) -> None:
    found: Robustness = table.robustness
    page.add(
        Heading(
            f"Robustness beside accuracy: {found.weights} weights, {found.samples} test images a cell, in %",
            3,
        ),
        _robustness_grid(table),
        brief=True,
    )
    page.add(Text(_CORRUPTED))
    page.add(*(Text(remark, notice=True) for remark in found.remarks), brief=True)
    if found.without:
        missing = ", ".join(found.without[:10]) + (
            f" and {len(found.without) - 10} more" if found.without[10:] else ""
        )
        runs = [run for arm in table.arms.values() for run in arm.runs.values()]
        page.add(
            Text(
                f"Without a whole test under corruptions: {missing}; `{to_test(runs)}` makes it.", notice=True
            ),
            brief=True,
        )
    for other in found.tables if table.comparisons else ():
        metric = other.metric
        better = "higher" if metric.higher_is_better else "lower"
        margin = "" if other.plan.margin is None else f", margin {metric.formatted(other.plan.margin)} points"
        page.add(
            Text(f"`{metric.name}` against {other.baseline}, in points ({better} is better{margin}):"),
            brief=True,
        )
        page.add(
            _comparison_grid(other), Items([f"{c.arm}: {c.verdict}" for c in other.comparisons]), brief=True
        )
    rows = [
        [_word(name), *(_percent(found.by_corruption(arm, name)) for arm in table.arms.values())]
        for name in corruptions()
    ]
    grid = Grid(["corruption", *table.arms], rows, frozenset({"corruption"}))
    page.add(Fold("Accuracy by corruption, mean over severities and seeds", [grid]))


_ELSEWHERE = (
    "Tests of the same runs on other data, or on their own read otherwise (views of each image, a temperature: "
    "docs/use.md); compared as the metric above is, each with its own correction for the number of techniques. One of "
    "many tables in which a technique stands out may be chance."
)


def _add_elsewhere(page: Page, table: Table) -> None:
    """What the runs' tests on other data say: the arms side by side, then each data set's comparison."""
    several: Sequence[Elsewhere] = table.elsewhere
    heads = [_on(other) for other in several]
    rows = [
        [_word(name), *(_metric(o.table, float(o.table.arms[name].spread()["mean"])) for o in several)]
        for name in table.arms
    ]
    unit = several[0].table.metric.unit
    page.add(
        Heading(f"On other data{f', in{unit}' if unit else ''}", 3),
        Grid(["arm", *heads], rows, frozenset({"arm"})),
        Text(_ELSEWHERE),
        brief=True,
    )
    for other, head in zip(several, heads, strict=True):
        kind, metric = other.kind, other.table.metric
        lines = [f"{c.arm}: {c.verdict}" for c in other.table.comparisons]
        compared: list[Block] = [_comparison_grid(other.table), Items(lines)] if lines else []
        page.add(
            Text(
                f"`{metric.name}` on {head}, {kind.samples} images, {kind.weights} weights of {other.tests} runs, "
                f"against {other.table.baseline}:"
            ),
            *compared,
            *(
                [Text(f"Without this test: {', '.join(other.without[:10])}.", notice=True)]
                if other.without
                else []
            ),
        )


_MEASURED = (
    "A description, without corrections and verdicts: of so many measures some differ by chance. Weights that ship, in "
    "evaluation mode, float32, by the plain loss ({loss}) whatever the technique minimised, over the same {train} "
    "training and {val} validation samples. *gradient*: norm of the mean gradient; *gap*: norm of the difference "
    "between that of validation and that of training samples. *sharpness*: largest eigenvalue of the Hessian of the "
    "training samples' loss. *flips*: share of test images that one of two runs of the arm has right and the other "
    "wrong; *to baseline*: of a run and the baseline's of its seed."
)


def _mechanism_blocks(table: Table) -> Iterable[Block]:
    found: Mechanism = table.mechanism
    heads = [MEASURES[m] for m in found.measures]
    rows = [
        [_word(name), *(_mean_and_sd(of.get(m)) for m in found.measures)]
        for name, of in found.spreads.items()
    ]
    train, val = found.samples
    yield Heading("Mechanism", 3)
    yield Text(_MEASURED.format(loss=found.loss, train=train, val=val))
    yield Grid(["arm", *heads], rows, frozenset({"arm"}))
    shown = [m for m in found.measures if any(m in of for of in found.differences.values())]
    if shown:
        yield Text(f"Mean paired difference to {table.baseline}, with its uncorrected 95% interval:")
        rows = [
            [_word(name), *(_with_interval(of.get(m)) for m in shown)]
            for name, of in found.differences.items()
        ]
        yield Grid(["arm", *(MEASURES[m] for m in shown)], rows, frozenset({"arm"}))
    yield from (Text(remark, notice=True) for remark in found.remarks)
    if found.without:
        more = f" and {len(found.without) - 10} more" if found.without[10:] else ""
        runs = [run for arm in table.arms.values() for run in arm.runs.values()]
        yield Text(
            f"Not measured: {', '.join(found.without[:10])}{more}; `{to_measure(runs)}` does.", notice=True
        )


def _mean_and_sd(spread: Spread | None) -> Cell:
    if spread is None:
        return "-", math.nan
    sd = "" if math.isnan(spread.sd) else f" ± {spread.sd:.2g}"
    return f"{spread.mean:.4g}{sd}", spread.mean


def _with_interval(t: PairedT | None) -> Cell:
    if t is None:
        return "-", math.nan
    interval = "" if math.isnan(t.low) else f" ({t.low:+.2g} to {t.high:+.2g})"
    return f"{t.mean:+.3g}{interval}", float(t.mean)


def _on(other: Elsewhere) -> str:
    return f"{other.kind.name} ({other.kind.how})" if other.kind.how else other.kind.name


def _percent(value: float) -> Cell:
    return _number(100 * value, ".2f")


def _robustness_grid(table: Table) -> Grid:
    """The arms: tests, clean and corrupted accuracy and calibration error, means over seeds."""
    found: Robustness = table.robustness
    shown = {
        "acc clean": "clean_acc", "acc corrupted": "acc_corrupted", "ece clean": "clean_ece",
        "ece corrupted": "ece_corrupted", "mce": "mce",
    }  # fmt: skip
    shown = {n: k for n, k in shown.items() if any(k in t.values for t in found.tests.values())}
    rows = []
    for arm in table.arms.values():
        count = sum(run.path in found.tests for run in arm.runs.values())
        rows.append(
            [_word(arm.name), _number(count, "d"), *(_percent(found.mean(arm, k)) for k in shown.values())]
        )
    return Grid(["arm", "tests", *shown], rows, frozenset({"arm"}))


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
            kept = [
                o for name, o in last.items() if name not in ("seed", "data.module.fold", "exp_dir", "sweep")
            ]
            if kept or arm.name == table.baseline:
                kept += [*_of_the_sweep(last.get("sweep"), run), *_arm_option(run, last)]
            groups[tuple(kept)].append(run)
        for overrides, runs in groups.items():
            if not overrides and arm.name != table.baseline:
                without += [f"{arm.name}, {unit_name(r.unit)}" for r in runs]
                continue
            seeds = sorted({r.unit[0] for r in runs})
            folds = sorted({r.unit[1] for r in runs})
            options = [*overrides, f"seed={','.join(map(str, seeds))}"]
            options += [f"data.module.fold={','.join(map(str, folds))}"] if folds != [0] else []
            lines.append(command("-m", *options))
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


_SWEEPS = {
    "ablation",
    "joblib",
    "optuna",
    "ray",
    "submitit",
}  # what these set, but for the checkpoints, is of a whole sweep


def _of_the_sweep(override: str | None, run: Run) -> Iterable[str]:
    """What a run of a sweep needs to be run without the others: there may be no baseline, and no search."""
    if override is None:
        return
    own = [name for name in re.findall(r"[^\[\],\s]+", override.partition("=")[2]) if name not in _SWEEPS]
    if own:
        yield f"sweep=[{','.join(own)}]"
        yield "baseline=null"
    keep = run.settings.get("checkpoint.keep")
    if keep in ("last", "none"):
        yield f"checkpoint.keep={keep}"


def _arm_option(run: Run, typed: Mapping[str, str]) -> Iterable[str]:
    """A name that comes of what the sweep swept, or of what other runs differ in, is typed."""
    techniques = set(re.findall(r"\w+", typed.get("technique", "").partition("=")[2])) - {"baseline"}
    if "arm" not in typed and set(run.arm.split("+")) != (techniques or run.techniques or {"baseline"}):
        yield option("arm", run.arm)
