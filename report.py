"""Crucible's report: run directories in, tables of arms, paired statistics and verdicts out.

    python report.py runs=experiments/digits

Read, tabulate, compare, write: each step is one section below.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crucible.command_line import explain
from crucible.options import ConfigError, in_interval, suggest

HELP = """\
Crucible's report: which technique helps, by how much, at what cost?

Usage
  python report.py runs=PATH[,PATH...] [OPTION=VALUE ...]

Options
  runs=experiments/digits   folders (or globs) with run directories, searched at any depth
  baseline=baseline         the arm that the others are compared with
  metric=test/acc           any logged final metric: test/acc, val/acc, test/loss, test/mae, ...
  margin_points=0.3         percentage points below which a difference does not matter; fix it before the runs
  out=PATH                  where report.md and results.csv go; default: report/ in the folder of the runs

Examples
  python report.py runs=experiments/digits
  python report.py runs=experiments/cifar10 metric=val/acc margin_points=0.2
  python report.py 'runs=experiments/*/1a2b*,/other/experiments' baseline=sgd out=comparison

How it compares
  Runs are paired by seed. Each arm's mean difference to the baseline has a 95% interval of Student's t over
  the pairs; p values are corrected for the number of techniques (Holm). Runs that are unfinished, failed or
  diverged are listed, never averaged. Plan 5 seeds an arm, 10 for differences under half a point.
"""
SEE = "python report.py --help"
OPTIONS = ("runs", "baseline", "metric", "out", "margin_points")
DEFAULT_METRIC = "test/acc"
DEFAULT_MARGIN = 0.3
FRACTIONS = ("acc", "acc_top5", "f1", "precision", "recall", "auroc", "ece")
HIGHER_IS_BETTER = ("acc", "acc_top5", "f1", "f1_per_class", "precision", "recall", "auroc", "r2")
LOWER_IS_BETTER = ("loss", "mse", "mae", "ece")
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 50
COPIED = 1e-9
OUTLIER_SD = 6.0
FLIP_FROM, FLIP_EXACT_TO = 8, 16

Unit = tuple[int, int]  # (seed, fold): what a technique and the baseline are paired by


def main(arguments: Sequence[str]) -> int:
    """Write the report that the arguments ask for; the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    try:
        request = read_arguments(arguments)
        runs, left_out = read_runs(request)
        tables = [compare(tabulate(data, group, request), request) for data, group in _by_data(runs)]
        write(tables, left_out, request)
    except ConfigError as error:
        return explain(error)
    return 0


# ---------------------------------------------------------------------------------------------- read


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric as the report shows it: fractions in percent, their differences in percentage points."""

    name: str

    @property
    def base(self) -> str:
        """Its name without the split: `acc` of `test/acc`."""
        return self.name.split("/")[1] if "/" in self.name else self.name

    @property
    def higher_is_better(self) -> bool:
        return self.base in HIGHER_IS_BETTER

    @property
    def is_fraction(self) -> bool:
        return self.base in FRACTIONS

    @property
    def scale(self) -> float:
        """From the logged value to the shown one."""
        return 100.0 if self.is_fraction else 1.0

    @property
    def unit(self) -> str:
        """Of shown differences."""
        return " points" if self.is_fraction else ""

    def show(self, value: float, signed: bool = False) -> str:
        """A logged value or difference as text."""
        sign = "+" if signed else ""
        return format(value * self.scale, f"{sign}.2f" if self.is_fraction else f"{sign}.4g")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for. `margin` is in the unit of the logged metric, or None."""

    folders: tuple[Path, ...]
    baseline: str
    baseline_given: bool
    metric: Metric
    margin: float | None
    out: Path
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or diverged run: where it belongs and what came out."""

    path: Path
    data: str
    arm: str
    techniques: tuple[str, ...]
    unit: Unit
    final: Mapping[str, float]
    value: float | None
    diverged: str
    seconds: float | None
    settings: Mapping[str, Any]
    owned: frozenset[str]
    commit: str
    device: str
    started: float


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A run directory that cannot be counted, and why."""

    path: Path
    status: str
    reason: str


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
        given[key] = value
    if "runs" not in given:
        raise ConfigError("runs is missing: python report.py runs=experiments/digits", see=SEE)
    metric = Metric(given.get("metric", DEFAULT_METRIC))
    if metric.base not in HIGHER_IS_BETTER + LOWER_IS_BETTER:
        hint = suggest(metric.base, HIGHER_IS_BETTER + LOWER_IS_BETTER)
        raise ConfigError(f"metric={metric.name}: not a metric with a better direction{hint}", see=SEE)
    folders = _folders(given["runs"])
    out = Path(given["out"]) if "out" in given else _common(folders) / "report"
    return Request(
        folders=folders,
        baseline=given.get("baseline", "baseline"),
        baseline_given="baseline" in given,
        metric=metric,
        margin=_margin(given.get("margin_points"), metric),
        out=out,
        arguments=tuple(arguments),
    )


def _margin(text: str | None, metric: Metric) -> float | None:
    if text is None:
        accuracy_like = metric.is_fraction and metric.higher_is_better
        return DEFAULT_MARGIN / metric.scale if accuracy_like else None
    if not metric.is_fraction:
        raise ConfigError(
            f"margin_points={text}: {metric.name} is not a percentage; it has no margin", see=SEE
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not in_interval(value, "(0, 100)"):
        raise ConfigError(f"margin_points must be a number in (0, 100), got {text!r}", see=SEE)
    return value / metric.scale


def _folders(text: str) -> tuple[Path, ...]:
    found: list[Path] = []
    for part in filter(None, text.split(",")):
        pattern = Path(part).expanduser()
        root = Path(pattern.anchor)
        matches = [p for p in sorted(root.glob(str(pattern.relative_to(root)))) if p.is_dir()]
        if not matches:
            raise ConfigError(f"runs={part}: no such folder", see=SEE)
        found += matches
    return tuple(dict.fromkeys(found))


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([f.resolve() for f in folders])) if len(folders) > 1 else folders[0]


def read_runs(request: Request) -> tuple[list[Run], list[LeftOut]]:
    """All runs under the folders: those that count (finished or diverged), and the others.

    Raises:
        ConfigError: where there is no run, or no run has the metric.
    """
    paths = {p.resolve(): p for folder in request.folders for p in _find(folder)}
    if not paths:
        names = ",".join(map(str, request.folders))
        raise ConfigError(f"runs={names}: no run directory there (one has a summary.json)", see=SEE)
    read = [_read_run(path, request.metric) for path in paths.values()]
    runs = [r for r in read if isinstance(r, Run)]
    if runs and all(r.value is None and not r.diverged for r in runs):
        known = sorted({name for run in runs for name in run.final})
        hint = suggest(request.metric.name, known) or "; they have none"
        raise ConfigError(f"metric={request.metric.name}: no finished run has it{hint}", see=SEE)
    return runs, [r for r in read if isinstance(r, LeftOut)]


def _find(folder: Path) -> Iterable[Path]:
    for place, folders, files in os.walk(folder):
        if "summary.json" in files or {"config.yaml", "overrides.yaml"} <= set(files):
            folders.clear()
            yield Path(place)
        else:  # `.old-1`: a run that was run again afresh
            folders[:] = sorted(f for f in folders if f[0] != "." and not re.search(r"\.old-\d+$", f))


def _read_run(path: Path, metric: Metric) -> Run | LeftOut:
    import yaml

    from crucible.run import RunDirectory

    try:
        summary = RunDirectory(path).summary()
        text = (path / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise ValueError("config.yaml or summary.json is not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return LeftOut(path, "unreadable", " ".join(str(error).split()))
    status, reason = str(summary.get("status", "unfinished")), str(summary.get("reason") or "")
    diverged = ""
    if status == "failed" and reason.startswith("diverged"):
        diverged = reason.removeprefix("diverged").lstrip(": ") or "stopped"
    if status != "finished" and not diverged:
        resume = f"go on with: python main.py run={path}"
        if status == "running":
            lives = RunDirectory(path).state() == "running"
            status, reason = ("running", "") if lives else ("lost", f"stopped without a word; {resume}")
        elif status in ("interrupted", "unfinished"):
            reason = f"{reason}; {resume}" if reason else resume
        return LeftOut(path, status, reason)
    settings = dict(_flatten(config))
    module = (config.get("data") or {}).get("module") or {}
    techniques = tuple(summary.get("techniques") or ())
    arm = str(summary.get("arm") or "+".join(techniques) or "baseline")
    final = {k: float(v) for k, v in (summary.get("final") or {}).items() if isinstance(v, (int, float))}
    value = final.get(metric.name)
    if value is not None and not diverged:
        diverged = _looks_diverged(value, metric, settings.get("data.num_classes"))
    seconds = summary.get("wall_time_s")
    return Run(
        path=path,
        data=str(module.get("name") or path.resolve().parent.name),
        arm=arm,
        techniques=techniques,
        unit=(int(summary.get("seed", config.get("seed", 0)) or 0), int(module.get("fold") or 0)),
        final=final,
        value=value,
        diverged=diverged,
        seconds=float(seconds) if seconds else None,
        settings=settings,
        owned=_owned(arm, config),
        commit=str((summary.get("git") or {}).get("commit") or "")[:10],
        device=str(summary.get("device") or ""),
        started=float(summary.get("started") or 0.0),
    )


def _looks_diverged(value: float, metric: Metric, classes: Any) -> str:
    """Why the final value says that training failed: not a number, or no better than guessing."""
    if not math.isfinite(value):
        return f"{metric.name} is {value}"
    if metric.base == "acc" and isinstance(classes, int) and classes > 1:
        chance = 1 / classes
        if value < chance + 0.02 * (1 - chance):
            return f"{metric.name} is {metric.show(value)}%, which is guessing among {classes} classes"
    return ""


def _flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _owned(arm: str, config: Mapping[str, Any]) -> frozenset[str]:
    """The options that make the arm: those its techniques set, and those its name spells out."""
    techniques = config.get("techniques") or {}
    names = {name for options in techniques.values() for name in options or {}}
    for option in re.findall(r"([\w.]+)=", arm):
        names |= {option, f"model.{option}"}
    return frozenset(names)


def _by_data(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.data].append(run)
    return sorted(groups.items())


# ------------------------------------------------------------------------------------------ tabulate


@dataclasses.dataclass
class Arm:
    """The runs of one arm by (seed, fold): those that count, and those that diverged or lack the metric."""

    name: str
    runs: dict[Unit, Run]
    diverged: list[Run]
    incomplete: list[Run]

    @property
    def values(self) -> list[float]:
        """The metric of the runs that count, as logged."""
        return [run.value for _, run in sorted(self.runs.items()) if run.value is not None]

    @property
    def total(self) -> int:
        """Runs that ended, diverged or not."""
        return len(self.runs) + len(self.diverged) + len(self.incomplete)


@dataclasses.dataclass
class Table:
    """The arms of one data set, what to look at, and (once compared) each technique against the baseline."""

    data: str
    baseline: str
    arms: dict[str, Arm]
    warnings: list[str]
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def tabulate(data: str, runs: Sequence[Run], request: Request) -> Table:
    """Sort the runs of one data set into arms, the baseline first.

    Raises:
        ConfigError: where there are several arms and none is the baseline.
    """
    warnings: list[str] = []
    by_arm: dict[str, dict[Unit, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_arm[run.arm][run.unit].append(run)
    arms = {}
    for name, units in sorted(by_arm.items()):
        arm = arms[name] = Arm(name, {}, [], [])
        for unit, same in sorted(units.items()):
            run = max(same, key=lambda r: (r.started, r.path.name))
            if len(same) > 1:
                others = ", ".join(r.path.name for r in same if r is not run)
                warnings.append(
                    f"{name}, {_unit(unit)}: {len(same)} runs; {run.path.name} counts, not {others}"
                )
            if run.diverged:
                arm.diverged.append(run)
            elif run.value is None:
                arm.incomplete.append(run)
            else:
                arm.runs[unit] = run
    baseline = request.baseline
    if baseline not in arms:
        if len(arms) > 1 or request.baseline_given:
            asked = f"baseline={baseline}: no such arm" if request.baseline_given else "baseline is missing"
            raise ConfigError(f"{asked} in {data}; choose one of: {', '.join(arms)}", see=SEE)
        baseline = next(iter(arms))
    ordered = {baseline: arms[baseline], **arms}
    table = Table(data, baseline, ordered, warnings)
    table.warnings += [*_looks(table, request.metric), *_settings(table), *_circumstances(runs)]
    return table


def _unit(unit: Unit) -> str:
    return f"seed {unit[0]}" + (f" fold {unit[1]}" if unit[1] else "")


def _looks(table: Table, metric: Metric) -> Iterable[str]:
    """Runs and counts that deserve a look."""
    for arm in table.arms.values():
        for run in arm.diverged:
            yield f"{arm.name}, {_unit(run.unit)} diverged: {run.diverged} ({run.path.name})"
        for run in arm.incomplete:
            yield f"{arm.name}, {_unit(run.unit)} has no {metric.name} ({run.path.name})"
    few = [f"{arm.name} ({len(arm.runs)})" for arm in table.arms.values() if len(arm.runs) < 5]
    if few:
        yield f"fewer than 5 runs: {', '.join(few)}"
    base = table.arms[table.baseline]
    for arm in table.arms.values():
        without = sorted(set(arm.runs) - set(base.runs)), sorted(set(base.runs) - set(arm.runs))
        for units, there, lacks in ((without[0], arm, base), (without[1], base, arm)):
            if units:
                listed = ", ".join(map(_unit, units))
                yield f"missing pair: {there.name} has {listed}, {lacks.name} has not; not in the difference"
    yield from _outliers(table)
    if len({unit[1] for arm in table.arms.values() for unit in arm.runs}) > 1:
        yield "folds share training data, so their differences are not independent: intervals are too narrow"


def _outliers(table: Table) -> Iterable[str]:
    import numpy as np

    residuals, candidates = [], []
    for arm in table.arms.values():
        if len(arm.runs) < 3:
            continue
        off = np.abs(np.array(arm.values) - np.median(arm.values))
        candidates += list(zip([arm.name] * len(off), sorted(arm.runs), off, strict=True))
        # of an odd number of runs one is the median itself, which says nothing of the spread
        residuals += sorted(off)[len(off) % 2 :]
    spread = 1.4826 * float(np.median(residuals)) if residuals else 0.0
    for name, unit, off in candidates:
        if spread > 0 and off > OUTLIER_SD * spread:
            where = table.arms[name].runs[unit].path.name
            sds = f"{off / spread:.0f} sd"
            yield f"{name}, {_unit(unit)} lies {sds} from its arm's median: look at this run ({where})"


def _settings(table: Table) -> Iterable[str]:
    """Options, other than the seed and those that make the arm, in which runs differ."""
    from crucible.config import NOT_SEMANTIC

    neutral = {*NOT_SEMANTIC, "data.module.fold"}

    def counts(name: str) -> bool:
        parts = name.split(".")
        return not any(".".join(parts[: i + 1]) in neutral for i in range(len(parts)))

    usual: dict[str, dict[str, Any]] = {}
    for arm in table.arms.values():
        runs = [*arm.runs.values(), *arm.diverged, *arm.incomplete]
        usual[arm.name] = {}
        for name in sorted({n for r in runs for n in r.settings if counts(n)}):
            seen = Counter(repr(r.settings.get(name)) for r in runs)
            usual[arm.name][name] = next(iter(seen.most_common(1)))[0]
            if len(seen) > 1:
                units: dict[str, list[str]] = defaultdict(list)
                for r in runs:
                    units[repr(r.settings.get(name))].append(_unit(r.unit))
                listed = "; ".join(f"{value}: {', '.join(who)}" for value, who in units.items())
                yield f"{arm.name}: its runs differ in {name} ({listed})"
    base = usual[table.baseline]
    base_owned = {n for r in table.arms[table.baseline].runs.values() for n in r.owned}
    for arm in table.arms.values():
        owned = base_owned | {n for r in arm.runs.values() for n in r.owned}
        differing = [
            f"{name} ({usual[arm.name].get(name, 'absent')}, {table.baseline} {base.get(name, 'absent')})"
            for name in sorted({*usual[arm.name], *base})
            if usual[arm.name].get(name) != base.get(name)
            and not any(name == own or name.startswith(f"{own}.") for own in owned)
        ]
        if differing:
            yield f"{arm.name} differs from {table.baseline} also in {', '.join(differing)}"


def _circumstances(runs: Sequence[Run]) -> Iterable[str]:
    commits, devices = ({getattr(r, what) for r in runs} - {""} for what in ("commit", "device"))
    if len(commits) > 1:
        yield f"runs come from {len(commits)} commits of the code: {', '.join(sorted(commits))}"
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        yield f"runs come from different devices ({names}): time ratios compare these too"


# ------------------------------------------------------------------------------------------- compare


@dataclasses.dataclass
class Comparison:
    """A technique against the baseline, pair by pair. Differences are technique minus baseline, as logged."""

    arm: str
    differences: list[float]
    mean: float
    sd: float
    low: float
    high: float
    p: float
    p_flip: float
    p_holm: float
    ratio: float
    ratio_low: float
    ratio_high: float
    verdict: str = dataclasses.field(default="", init=False)

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.differences)


def compare(table: Table, request: Request) -> Table:
    """Add to the table each technique's paired comparison, its verdict, and the notes below them."""
    metric, base = request.metric, table.arms[table.baseline]
    for arm in table.arms.values():
        if arm is not base:
            table.comparisons.append(_pair(arm, base))
    testable = [c for c in table.comparisons if not math.isnan(c.p)]
    for comparison, p in zip(testable, holm([c.p for c in testable]), strict=True):
        comparison.p_holm = p
    sd, freedom = pooled_sd(table)
    for c in table.comparisons:
        c.verdict = _verdict(c, table, metric, request.margin, sd, freedom, len(testable))
        table.warnings += _difference_warnings(c, base, metric)
    table.notes += _notes(table, testable, sd, metric)
    return table


def _pair(arm: Arm, base: Arm) -> Comparison:
    pairs = [(arm.runs[u], base.runs[u]) for u in sorted(set(arm.runs) & set(base.runs))]
    differences = [float(a.value or 0.0) - float(b.value or 0.0) for a, b in pairs]
    mean, sd, low, high, p = paired_t(differences)
    if _copied(differences, sd, base):
        low = high = p = math.nan
    logs = [math.log(a.seconds / b.seconds) for a, b in pairs if a.seconds and b.seconds]
    ratio, _, ratio_low, ratio_high, _ = paired_t(logs)
    ratios = [math.exp(r) for r in (ratio, ratio_low, ratio_high)]
    return Comparison(
        arm.name, differences, mean, sd, low, high, p, sign_flip_p(differences), math.nan, *ratios
    )


def _copied(differences: Sequence[float], sd: float, base: Arm) -> bool:
    return len(differences) > 1 and sd <= COPIED * max(map(abs, base.values))


def paired_t(differences: Sequence[float]) -> tuple[float, float, float, float, float]:
    """`(mean, sd, low, high, p)`: mean and 95% interval of the differences, two-sided p of Student's t.

    NaN for what the differences cannot tell: nothing from none; interval and p only from three on (of two
    the interval is 18 sd wide), and not where they do not vary.
    """
    from scipy.stats import t

    n = len(differences)
    mean = math.fsum(differences) / n if n else math.nan
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else math.nan
    if n < 3 or sd == 0:
        return mean, sd, math.nan, math.nan, math.nan
    error = sd / math.sqrt(n)
    half = float(t.ppf(1 - ALPHA / 2, n - 1)) * error
    return mean, sd, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, n - 1))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the sign-flip test, from 8 differences on; exact to 16, then 65,536 random flips."""
    import numpy as np

    n = len(differences)
    if n < FLIP_FROM:
        return math.nan
    d = np.array(differences)
    if n <= FLIP_EXACT_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, size=(2**FLIP_EXACT_TO, n))
    extreme = np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)
    return float(extreme.mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that keep the family-wise error at their level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def pooled_sd(table: Table) -> tuple[float, int]:
    """`(sd, degrees of freedom)` of a paired difference, from all arms: the two-way (arm, seed) residual.

    For planning only. NaN and 0 where fewer than two seeds are in all arms.
    """
    import numpy as np

    arms = [arm for arm in table.arms.values() if len(arm.runs) > 1]
    if len(arms) < 2:
        return math.nan, 0
    shared = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    if len(shared) < 2:
        return math.nan, 0
    values = np.array([[arm.runs[u].value for u in shared] for arm in arms], dtype=float)
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (len(arms) - 1) * (len(shared) - 1)
    return math.sqrt(2 * float((residual**2).sum()) / freedom), freedom


def power(effect: float, n: int, alpha: float) -> float:
    """The chance that a two-sided paired t over `n` pairs finds an effect of so many sd of the difference.

    The noncentral t as a normal over a chi, summed over 2,000 equally likely chis: accurate to 0.001, and
    finite for any effect, which scipy's `nct` is not.
    """
    import numpy as np
    from scipy.stats import chi2, norm, t

    chi = np.sqrt(chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))
    critical, shift = t.ppf(1 - alpha / 2, n - 1) * chi, effect * math.sqrt(n)
    return float((norm.cdf(shift - critical) + norm.cdf(-shift - critical)).mean())


def needed_pairs(effect: float, alpha: float) -> int | None:
    """The fewest pairs that find the effect (in sd of the difference) 4 times in 5; None above 50."""
    return next((n for n in range(2, MOST_SEEDS + 1) if power(effect, n, alpha) >= POWER), None)


def detectable_effect(n: int, alpha: float) -> float:
    """The effect (in sd of the difference) that `n` pairs find 4 times in 5."""
    from scipy.optimize import brentq

    return float(brentq(lambda effect: power(effect, n, alpha) - POWER, 0.0, 200.0))


def _verdict(
    c: Comparison,
    table: Table,
    metric: Metric,
    margin: float | None,
    sd: float,
    freedom: int,
    techniques: int,
) -> str:
    """The first rule that holds: unstable, cannot say, helps or hurts, no difference, undecided."""
    arm, base = table.arms[c.arm], table.arms[table.baseline]
    for who in (arm, base):
        if who.diverged:
            whose = "" if who is arm else f" {base.name}"
            return f"unstable: {len(who.diverged)} of {who.total}{whose} runs diverged"
    pairs = f"{c.n} pair{'' if c.n == 1 else 's'}"
    if arm.incomplete or base.incomplete:
        return f"cannot say ({metric.name} is not in all runs)"
    if _copied(c.differences, c.sd, base):
        return f"cannot say ({pairs}, all with the same difference)"
    if c.n < 3:
        return f"cannot say ({pairs})"
    unit = metric.unit
    if c.p_holm < ALPHA:
        word = "helps" if (c.mean > 0) == metric.higher_is_better else "hurts"
        if margin is None:
            return word
        shown = f"{metric.show(margin)}{unit}"
        if c.low > margin or c.high < -margin:
            return f"{word} by more than {shown}"
        return f"{word} by less than {shown}" if -margin < c.low and c.high < margin else word
    if margin is not None and -margin < c.low and c.high < margin:
        return f"no difference larger than {metric.show(margin)}{unit}"
    text = (
        f"undecided: between {metric.show(c.low, signed=True)} and {metric.show(c.high, signed=True)}{unit}"
    )
    if c.low > 0 or c.high < 0:
        text += f" (excludes 0 alone, not after correction for {techniques})"
    return text + _more_seeds(c.n, metric, margin, sd, freedom, techniques)


def _more_seeds(
    n: int, metric: Metric, margin: float | None, sd: float, freedom: int, techniques: int
) -> str:
    from scipy.stats import chi2

    if margin is None or not freedom or sd == 0:
        return ""
    alpha = ALPHA / techniques
    # the 80% range of the true sd, given the estimated one
    spread = [sd * math.sqrt(freedom / float(chi2.ppf(q, freedom))) for q in (0.9, 0.1)]
    fewest, most = (needed_pairs(margin / s, alpha) for s in spread)
    about = needed_pairs(margin / sd, alpha)
    if about is None:
        return f"; not resolvable at {metric.show(margin)}{metric.unit} (over {MOST_SEEDS} seeds)"
    more = about - n if about > n else n
    low = max(1, (fewest or about) - n)
    high = f"{max(more, most - n)}" if most else f"over {MOST_SEEDS - n}"
    return f"; about {more} more seeds ({min(low, more)} to {high})"


def _difference_warnings(c: Comparison, base: Arm, metric: Metric) -> Iterable[str]:
    import numpy as np

    if _copied(c.differences, c.sd, base):
        yield f"{c.arm}: every pair differs by the same {metric.show(c.mean, signed=True)}: copied runs?"
    median = float(np.median(c.differences)) if c.n else 0.0
    if c.n >= 3 and c.mean * median < 0:
        yield f"{c.arm}: mean and median of the differences have opposite signs; look at the single runs"
    if not math.isnan(c.p_flip + c.p) and (c.p_flip < ALPHA) != (c.p < ALPHA):
        yield f"{c.arm}: sign-flip test (p {c.p_flip:.3f}) and t test (p {c.p:.3f}) disagree about 0.05"


def _notes(table: Table, testable: Sequence[Comparison], sd: float, metric: Metric) -> Iterable[str]:
    if not testable:
        return
    k, n = len(testable), min(c.n for c in testable)
    note = "Each interval covers its own truth 95% of the time"
    if k > 1:
        note += (
            f"; among {k}, one or more miss in about {100 * (1 - (1 - ALPHA) ** k):.0f} of 100 such tables"
        )
    yield note + ". They say what holds on this test set, over seeds."
    if not math.isnan(sd) and n > 1:
        corrected, alone = (detectable_effect(n, a) * sd for a in (ALPHA / k, ALPHA))
        yield (
            f"With {n} pairs and {k} technique{'' if k == 1 else 's'} this design finds effects above "
            f"{metric.show(corrected)}{metric.unit} 4 times in 5"
            + (f" (one technique alone: {metric.show(alone)}{metric.unit})." if k > 1 else ".")
        )
    if any(c.verdict.startswith(("helps", "hurts")) and c.n <= 5 for c in testable):
        yield "Effects that are significant with 5 pairs or fewer tend to be overstated, by 1.3 to 2 times."


# --------------------------------------------------------------------------------------------- write

Cells = tuple[list[str], list[list[str]]]


def write(tables: Sequence[Table], left_out: Sequence[LeftOut], request: Request) -> None:
    """Print the tables, and write report.md and results.csv."""
    import csv
    import io

    from crucible.run import write_atomically

    request.out.mkdir(parents=True, exist_ok=True)
    write_atomically(request.out / "report.md", _markdown(tables, left_out, request))
    stream = io.StringIO()
    rows = [row for table in tables for row in _csv_rows(table, request.metric)]
    writer = csv.DictWriter(stream, list(_CSV_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(request.out / "results.csv", stream.getvalue())
    _print(tables, left_out, request)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    import statistics as s

    if not values:
        return dict.fromkeys(("mean", "sd", "median", "min", "max"), math.nan)
    sd = s.stdev(values) if len(values) > 1 else math.nan
    return {
        "mean": s.fmean(values),
        "sd": sd,
        "median": s.median(values),
        "min": min(values),
        "max": max(values),
    }


def _seconds(arm: Arm) -> float:
    seconds = [run.seconds for run in arm.runs.values() if run.seconds]
    return sum(seconds) / len(seconds) if seconds else math.nan


def _arm_cells(table: Table, metric: Metric) -> Cells:
    rows = []
    for arm in table.arms.values():
        values = ["-" if math.isnan(v) else metric.show(v) for v in _spread(arm.values).values()]
        rows.append(
            [arm.name, str(len(arm.runs)), *values, str(len(arm.diverged)), _number(_seconds(arm), ".1f")]
        )
    return ["arm", "n", "mean", "sd", "median", "min", "max", "diverged", "time s"], rows


def _comparison_cells(table: Table, metric: Metric) -> Cells:
    flips = any(not math.isnan(c.p_flip) for c in table.comparisons)
    head = ["arm", "pairs", "diff", "95% interval", "p", *(["flip p"] if flips else []), "Holm p"]
    rows = []
    for c in table.comparisons:
        difference = "-" if math.isnan(c.mean) else metric.show(c.mean, signed=True)
        interval = f"{metric.show(c.low, signed=True)} to {metric.show(c.high, signed=True)}"
        ratio = _number(c.ratio, ".2f")
        if not math.isnan(c.ratio_low):
            ratio += f" ({c.ratio_low:.2f}-{c.ratio_high:.2f})"
        if c.n == 2:
            interval = "both: " + ", ".join(metric.show(d, signed=True) for d in c.differences)
        elif math.isnan(c.low):
            interval = "-"
        tested = [_p(c.p), *([_p(c.p_flip)] if flips else []), _p(c.p_holm)]
        rows.append([c.arm, str(c.n), difference, interval, *tested, ratio, c.verdict])
    return [*head, "time ratio", "verdict"], rows


def _headline(table: Table, request: Request) -> str:
    metric = request.metric
    better = "higher" if metric.higher_is_better else "lower"
    margin = "none" if request.margin is None else f"{metric.show(request.margin)}{metric.unit}"
    percent = " in %" if metric.is_fraction else ""
    what = f"{metric.name}{percent} of the last epoch ({better} is better)"
    return f"{what}; margin {margin}; baseline: {table.baseline}"


def _sections(table: Table, request: Request) -> list[tuple[str, Cells]]:
    sections = [("Arms", _arm_cells(table, request.metric))]
    if table.comparisons:
        unit = f", in{request.metric.unit}" if request.metric.unit else ""
        sections.append(
            (f"Against {table.baseline}, paired by seed{unit}", _comparison_cells(table, request.metric))
        )
    return sections


def _left_out_cells(left_out: Sequence[LeftOut]) -> Cells:
    return ["run", "status", "reason"], [[str(r.path), r.status, r.reason] for r in left_out]


def _markdown(tables: Sequence[Table], left_out: Sequence[LeftOut], request: Request) -> str:
    def grid(cells: Cells) -> list[str]:
        head, rows = cells
        lines = [head, ["---"] * len(head), *rows]
        return ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]

    command = " ".join(request.arguments)
    lines = [
        "# Comparison",
        "",
        f"Written {time.strftime('%Y-%m-%d %H:%M')} by `python report.py {command}`.",
        "",
    ]
    for table in tables:
        lines += [f"## {table.data}", "", f"{_headline(table, request)}.", ""]
        for title, cells in _sections(table, request):
            lines += [f"### {title}", "", *grid(cells), ""]
        lines += [line for note in table.notes for line in (note, "")]
        if table.warnings:
            lines += ["### Look at", "", *(f"- {w}" for w in table.warnings), ""]
    if left_out:
        lines += ["## Runs left out", "", *grid(_left_out_cells(left_out)), ""]
    return "\n".join(lines)


_CSV_COLUMNS = (
    "data", "arm", "metric", "n", "diverged", "mean", "sd", "median", "min", "max", "time_s", "pairs",
    "difference", "low", "high", "p", "p_flip", "p_holm", "time_ratio",
    "time_ratio_low", "time_ratio_high", "verdict",
)  # fmt: skip


def _csv_rows(table: Table, metric: Metric) -> Iterable[dict[str, Any]]:
    """A row an arm; values and differences as logged (accuracies are fractions), empty where none."""
    against = {c.arm: c for c in table.comparisons}
    for arm in table.arms.values():
        row: dict[str, Any] = {"data": table.data, "arm": arm.name, "metric": metric.name, "n": len(arm.runs)}
        row |= {"diverged": len(arm.diverged), **_spread(arm.values), "time_s": _seconds(arm)}
        if c := against.get(arm.name):
            row |= {
                "pairs": c.n,
                "difference": c.mean,
                "low": c.low,
                "high": c.high,
                "p": c.p,
                "p_flip": c.p_flip,
            }
            row |= {"p_holm": c.p_holm, "time_ratio": c.ratio, "time_ratio_low": c.ratio_low}
            row |= {"time_ratio_high": c.ratio_high, "verdict": c.verdict}
        yield {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _print(tables: Sequence[Table], left_out: Sequence[LeftOut], request: Request) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)

    def show(title: str, cells: Cells) -> None:
        head, rows = cells
        texts = ("arm", "run", "status", "reason")
        grid = Grid(
            title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for name in head:
            grid.add_column(name, justify="left" if name in texts else "right", overflow="fold")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)

    for table in tables:
        console.print(f"\n{table.data}: {_headline(table, request)}\n")
        for title, (head, rows) in _sections(table, request):
            shown = len(head) - (
                head[-1] == "verdict"
            )  # verdicts are sentences: below, on lines of their own
            show(title, (head[:shown], [row[:shown] for row in rows]))
        width = max((len(c.arm) for c in table.comparisons), default=0)
        for c in table.comparisons:
            console.print(f"{c.arm:{width}}  {c.verdict}", soft_wrap=True)
        for note in table.notes:
            console.print(f"\n{note}")
        if table.warnings:
            console.print("\nLook at")
            for warning in table.warnings:
                console.print(f"  - {warning}", soft_wrap=True)
    if left_out:
        console.print()
        show("Runs left out", _left_out_cells(left_out))
    console.print(f"\nwritten: {request.out / 'report.md'}, {request.out / 'results.csv'}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
