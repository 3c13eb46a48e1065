"""The arms of one data set: their runs, what was fixed before these, and the options they were run with."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crucible.configuration import is_semantic
from crucible.options import ConfigError
from reporting import statistics as s
from reporting.contents import DATA, FILES, base_name, by_data, differ_unsaid, identified
from reporting.records import Run, Sweep, Unit
from reporting.request import DEFAULT_MARGIN, SEE, Request


@dataclass
class Arm:
    """The runs of one arm by (seed, fold): those that count, and those that diverged or lack the metric."""

    name: str
    runs: dict[Unit, Run] = field(default_factory=dict)
    diverged: list[Run] = field(default_factory=list)
    incomplete: list[Run] = field(default_factory=list)
    superseded: list[Run] = field(default_factory=list)  # a later run of their seed and fold counts
    dropped: list[Run] = field(default_factory=list)  # their sweep went on without them

    @property
    def values(self) -> NDArray[np.float64]:
        """The metric of the runs that count, as logged, by seed."""
        return np.array([run.value for _, run in sorted(self.runs.items())], dtype=np.float64)

    @property
    def all_runs(self) -> list[Run]:
        """Runs that ended, diverged or not, one a seed and fold."""
        return [*self.runs.values(), *self.diverged, *self.incomplete]

    @property
    def recorded(self) -> list[Run]:
        """And those that their sweep went on without."""
        return [*self.all_runs, *self.dropped]

    @property
    def techniques(self) -> frozenset[str]:
        return next((run.techniques for run in self.recorded), frozenset())

    def spread(self) -> dict[str, float]:
        """Mean, sd, median, min and max of the runs that count, as logged; NaN where there are none."""
        values = self.values
        if not len(values):
            return dict.fromkeys(("mean", "sd", "median", "min", "max"), math.nan)
        return {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
            "median": float(np.median(values)),
            "min": float(values.min()),
            "max": float(values.max()),
        }

    def costs(self) -> dict[str, float]:
        """Seconds of training, images a second, images seen and MiB at the peak: means over the runs that count."""
        runs = list(self.runs.values())
        seen = (r.seconds * r.images_per_s if r.seconds and r.images_per_s else None for r in runs)
        return {
            "time_s": _mean(r.seconds for r in runs),
            "images_per_s": _mean(r.images_per_s for r in runs),
            "images": _mean(seen),
            "memory_mb": _mean(r.memory_mb for r in runs),
        }


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v]
    return sum(known) / len(known) if known else math.nan


def unit_name(unit: Unit) -> str:
    """`seed 3`, or `seed 3 fold 1`."""
    return f"seed {unit[0]}" + (f" fold {unit[1]}" if unit[1] else "")


def ranges(numbers: Sequence[int]) -> str:
    """`0-4,7` of 0, 1, 2, 3, 4, 7."""
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def by_setting(data: str, runs: Sequence[Run], request: Request) -> dict[str, list[Run]]:
    """The runs of a data set by setting: what one baseline is the baseline of.

    Runs of other data of the same name are a setting of their own, but for data that one sweep set out to compare.
    Sweeps whose baselines differ (in network, rate, length; not in techniques alone) are settings of their own, and so
    are networks that share at least two sets of techniques (none, and one): the same arm has one name in each. Else
    networks are arms of one setting, as they are where one sweep of `until=decided` decided over all of them.
    `networks=arms` makes one setting of all, `networks=settings` one of each network.

    Raises:
        ConfigError: for `networks=settings` of what was decided together.
    """
    parts = [("", runs)] if request.networks == "arms" else by_data(runs)
    found: dict[str, list[Run]] = {}
    for name, part in parts:
        found |= _by_plan(f"{data}, data {name}" if name else data, part, request)
    return found


def _by_plan(data: str, runs: Sequence[Run], request: Request) -> dict[str, list[Run]]:
    parts = [] if request.networks == "arms" else _by_baseline(runs)
    if len(parts) < 2:
        return _by_network(data, runs, request)
    found: dict[str, list[Run]] = {}
    for name, (_, part) in zip(_names_of([base for base, _ in parts]), parts, strict=True):
        found |= _by_network(f"{data}, {name}" if name else data, part, request)
    return found


def _by_baseline(runs: Sequence[Run]) -> list[tuple[Run, list[Run]]]:
    """The baselines of the sweeps among the runs that differ, and the runs that belong to each.

    A run belongs to its sweep's; that of no such sweep to the baseline from which it differs least.
    """
    bases: list[Run] = []
    belongs: dict[tuple[float, str], int] = {}
    sweeps = {(r.sweep.created, r.sweep.folder): r.sweep for r in runs if r.sweep is not None}
    for key, sweep in sorted(sweeps.items()):
        listed = [r for r in runs if r.arm == sweep.baseline and r.path.name in sweep.runs]
        own = [
            r
            for r in runs
            if r.arm == sweep.baseline and r.sweep is not None and r.sweep.folder == sweep.folder
        ]
        base = next(iter(own or listed), None)
        if base is not None and sweep.techniques:
            alike = (not _apart(base, other) and not differ_unsaid(base, other) for other in bases)
            same = (i for i, is_alike in enumerate(alike) if is_alike)
            belongs[key] = next(same, len(bases))
            bases += [base] * (belongs[key] == len(bases))
    if len(bases) < 2:
        return []
    parts: list[tuple[Run, list[Run]]] = [(base, []) for base in bases]
    for run in runs:
        place = None if run.sweep is None else belongs.get((run.sweep.created, run.sweep.folder))
        if place is None:
            place = min(range(len(bases)), key=lambda i: len(_differing(run, bases[i])))
        parts[place][1].append(run)
    return parts


def _apart(run: Run, other: Run) -> list[str]:
    """The settings in which two runs differ, but for those that make their arms."""
    owned = run.owned | other.owned
    return [n for n in _differing(run, other) if not is_owned(n, owned)]


def is_owned(name: str, owned: Iterable[str]) -> bool:
    """Whether an option is one of these, or below one."""
    return any(name == own or name.startswith(f"{own}.") for own in owned)


def _names_of(bases: Sequence[Run]) -> list[str]:
    """What tells settings apart, by their baselines: the network's class, and at most three options that are on."""
    differing = sorted({name for pair in itertools.combinations(bases, 2) for name in _apart(*pair)})
    networks = [str(base.settings.get("model._target_")) for base in bases]
    short = {network: network.rpartition(".")[2] for network in networks}
    named = short if len({*short.values()}) == len(short) else {network: network for network in networks}
    names = []
    for base, network in zip(bases, networks, strict=True):
        typed = {o.lstrip("+~").partition("=")[0] for o in base.overrides}
        # what only one network has goes with its name, unless somebody asked for it
        told = (
            n for n in differing
            if n != "model._target_"
            and (n in typed or not n.startswith("model.") or all(n in other.settings for other in bases))
        )  # fmt: skip
        on = [(n, base.settings.get(n)) for n in told if _tells_arms_apart(n, base.settings.get(n))]
        parts = [f"{name.removeprefix('model.')}={as_text(value)}" for name, value in on[:3]]
        names.append(" ".join([named[network], *parts] if len(short) > 1 else parts))
    return [
        name if names.count(name) == 1 else f"{name} ({_same_but_for_the_seed(base)[:8]})".lstrip()
        for name, base in zip(names, bases, strict=True)
    ]


def _by_network(data: str, runs: Sequence[Run], request: Request) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[str(run.settings.get("model._target_"))].append(run)
    shared = set.intersection(*({run.techniques for run in group} for group in groups.values()))
    together = _decided_together(groups.values())
    if together and request.networks == "settings":
        raise ConfigError(f"networks=settings: {together} decided over all its networks together", see=SEE)
    as_arms = request.networks == "arms" or (request.networks is None and (len(shared) < 2 or together))
    if len(groups) < 2 or as_arms:
        return {data: list(runs)}
    everywhere = set.intersection(*(_options_of(run.arm) for run in runs))
    short = {network: network.rpartition(".")[2] for network in groups}
    found = {}
    for network, group in sorted(groups.items()):
        own = set.intersection(*(_options_of(run.arm) for run in group)) - everywhere
        name = short[network] if len(set(short.values())) == len(short) else network
        found[f"{data}, {name}"] = [_within(run, own) for run in group]
    return found


def _decided_together(groups: Iterable[Sequence[Run]]) -> str:
    """The sweep of `until=decided` whose techniques are of several of the groups; empty: there is none."""
    arms: dict[Any, list[set[str]]] = defaultdict(list)
    folders = {}
    for group in groups:
        own: dict[Any, set[str]] = defaultdict(set)
        for run in group:
            if run.sweep is not None and run.sweep.decides and run.arm in run.sweep.techniques:
                key = run.sweep.plan
                own[key].add(run.arm)
                folders[key] = run.sweep.folder
        for key, names in own.items():
            arms[key].append(names)
    # sweeps of one network each, planned alike, have the same arms
    parted = (key for key, sets in arms.items() if len(sets) > 1 and not set.intersection(*sets))
    return next((folders[key] for key in parted), "")


def _options_of(arm: str) -> set[str]:
    return {part for part in arm.split(" ") if "=" in part}


def _without(arm: str, parts: set[str]) -> str:
    return " ".join(p for p in arm.split(" ") if p not in parts) or "baseline"


def _within(run: Run, own: set[str]) -> Run:
    """A run as one of its setting: its arm's name, and what its sweep planned, without what names the setting."""
    if run.sweep is None or not own:
        return replace(run, arm=_without(run.arm, own))
    sweep, named = run.sweep, {a for a in run.sweep.techniques if own <= _options_of(a)}
    narrowed = replace(
        sweep,
        techniques=frozenset(_without(a, own) for a in named) - {"baseline"},
        rivals={_without(a, own): _without(b, own) for a, b in sweep.rivals.items() if own <= _options_of(a)},
        baseline=None if sweep.baseline is None else _without(sweep.baseline, own),
        identities={_without(a, own): i for a, i in sweep.identities.items() if own <= _options_of(a)},
    )
    return replace(run, arm=_without(run.arm, own), sweep=narrowed)


def name_arms(runs: Sequence[Run]) -> list[Run]:
    """The runs with arms that differ wherever more than the seed does.

    A run that no sweep made is named as a sweep of all these runs would name it: by its techniques and by what was
    typed, unless all of them have it. Of runs with one name and different settings most keep the name; to that of
    the others what differs is added, or their identity where nothing recorded explains why it is another. Runs that
    differ in nothing but the seed are one arm, whatever two sweeps called them.
    """
    named = _one_name_each(
        [run if run.sweep is not None else replace(run, arm=_typed_name(run, runs)) for run in runs]
    )
    named = _with_their_network(named)
    by_arm: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in named:
        by_arm[run.arm][_same_but_for_the_seed(run)].append(run)
    result, names = [], {*by_arm}
    for arm, groups in by_arm.items():
        usual, *others = sorted(groups.values(), key=lambda g: (-len(g), min(r.started for r in g)))
        result += usual
        for group in others:
            differing = _differing(group[0], usual[0])
            if not differing and not differ_unsaid(group[0], usual[0]):
                result += group  # the code's own options have changed, not what was asked for
                continue
            shown, left = _what_differs(group[0], usual[0], differing)
            name = " ".join([*([] if arm == "baseline" and shown else [arm]), *shown])
            if left or name in names:
                more = f"and {left} more " if left else ""
                name += f" {more}({_same_but_for_the_seed(group[0])[:8]})"
            names.add(name)
            result += [replace(run, arm=name) for run in group]
    return result


def _one_name_each(runs: Sequence[Run]) -> list[Run]:
    """The runs of one recorded identity by one name: that of a sweep's baseline, else that which most of them have."""
    names: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        if run.identity:
            planned_baseline = run.sweep is not None and run.arm == run.sweep.baseline
            names[run.identity][run.arm] += 1 + len(runs) * planned_baseline
    best = {identity: found.most_common(1)[0][0] for identity, found in names.items()}
    return [replace(run, arm=best.get(run.identity, run.arm)) for run in runs]


def _with_their_network(runs: Sequence[Run]) -> list[Run]:
    """To the arms of sweeps of another network than the baseline's, which name it nowhere, that network."""
    networks = {str(run.settings.get("model._target_")) for run in runs if run.arm == "baseline"}
    if len(networks) != 1:
        return list(runs)
    (usual,) = networks
    result = []
    for run in runs:
        network = str(run.settings.get("model._target_"))
        short = network.rpartition(".")[2]
        told = network == usual or any(
            part.startswith("model=") or short in part for part in run.arm.split(" ")
        )
        result.append(run if told or run.sweep is None else replace(run, arm=f"{run.arm} {short}"))
    return result


def _what_differs(run: Run, usual: Run, differing: Sequence[str]) -> tuple[list[str], int]:
    """At most three parts of a name, and how many options are left out of it.

    Another network goes by its class, and what only one of the two networks has goes with it.
    """
    parts, first = [], "model._target_"
    if first in differing:
        network, other = (str(r.settings.get(first)) for r in (run, usual))
        short = network.rpartition(".")[2]
        parts.append(network if short == other.rpartition(".")[2] else short)
        differing = [
            n for n in differing
            if n != first and not (n.startswith("model.") and (n in run.settings) != (n in usual.settings))
        ]  # fmt: skip
    parts += [f"{n.removeprefix('model.')}={as_text(run.settings.get(n))}" for n in differing]
    return parts[:3], len(parts[3:])


def _typed_name(run: Run, runs: Sequence[Run]) -> str:
    """The arm of a run that no sweep made; as recorded where nothing typed is known, or where it was typed itself."""
    typed = {o.lstrip("+~").partition("=")[0]: o.partition("=")[2] for o in run.overrides}
    parts = run.arm.split(" ")
    for name, value in {} if "arm" in typed else typed.items():
        if "." not in name or not is_setting(name):
            continue
        mine, short = run.settings.get(name), name.removeprefix("model.")
        part = recorded = f"{short}={value}"
        if name in run.files:  # one file may lie in several places
            part = f"{short}={mine}"
            parts = [part if p == recorded else p for p in parts]
        if all(other.settings.get(name) == mine for other in runs):
            parts = [p for p in parts if p != part]
        elif part not in parts:
            parts.append(part)
    return " ".join(p for p in parts if p != "baseline") or "baseline"


def _same_but_for_the_seed(run: Run) -> str:
    """Equal for runs that differ in nothing that changes the result but their seed and fold."""
    if identified(run):
        return run.identity
    settings = {n: v for n, v in run.settings.items() if _tells_arms_apart(n, v)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _differing(run: Run, other: Run) -> list[str]:
    """The settings in which two runs differ."""
    names = {*run.settings, *other.settings}
    return sorted(
        n
        for n in names
        if (mine := run.settings.get(n)) != (others := other.settings.get(n))
        and (_tells_arms_apart(n, mine) or _tells_arms_apart(n, others))
    )


def _tells_arms_apart(name: str, value: Any) -> bool:
    """Not what is off, which an option was before there was one."""
    return is_setting(name) and value not in (None, False)


def sort_into_arms(runs: Sequence[Run]) -> dict[str, Arm]:
    """The arms by name; of several runs of one seed and fold the last that was started counts."""
    by_arm: dict[str, dict[Unit, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_arm[run.arm][run.unit].append(run)
    arms = {}
    for name, units in sorted(by_arm.items()):
        arm = arms[name] = Arm(name)
        for unit, same in sorted(units.items()):
            run = max(same, key=lambda r: (r.started, r.path.name))
            arm.superseded += [r for r in same if r is not run]
            if run.dropped:
                arm.dropped.append(run)
            elif run.diverged:
                arm.diverged.append(run)
            elif run.value is None:
                arm.incomplete.append(run)
            else:
                arm.runs[unit] = run
    return arms


def check_versions(runs: Sequence[Run]) -> None:
    """Refuse runs from before and after a correction of numbers that both have.

    Raises:
        ConfigError: naming a run on each side.
    """
    for option in sorted({option for run in runs for option in run.corrected}):
        seen: dict[str, Run] = {}
        for run in runs:
            other = seen.setdefault(as_text(run.settings.get(option)), run)
            before, after = sorted((run, other), key=lambda r: r.corrected.get(option, 1))
            versions = [r.corrected.get(option, 1) for r in (before, after)]
            if versions[0] != versions[1]:
                raise ConfigError(
                    f"runs={before.path}: the numbers of {option} have been corrected since (version {versions[0]}, "
                    f"{after.path.name} has {versions[1]}); run it again, or report the older runs apart",
                    see="CHANGELOG.md",
                )


def choose_baseline(data: str, arms: Mapping[str, Arm], runs: Sequence[Run], request: Request) -> str:
    """As asked for, else as the first sweep recorded it, else the arm `baseline`, else the only arm.

    Raises:
        ConfigError: where there is no such arm.
    """
    first = first_sweep(runs)
    recorded = first.baseline if first is not None and not request.baseline_given else None
    for name in (recorded, request.baseline):
        if name is not None and name in arms:
            return name
    if len(arms) > 1 or request.baseline_given:
        asked = (
            f"baseline={request.baseline}: no such arm" if request.baseline_given else "baseline is missing"
        )
        apart = (
            "; runs of other data are not paired with these" if any(DATA in r.settings for r in runs) else ""
        )
        raise ConfigError(f"{asked} in {data}; choose one of: {', '.join(arms)}{apart}", see=SEE)
    return next(iter(arms))


# What was fixed before the runs


class Plan(NamedTuple):
    """What was fixed before the runs.

    Attributes:
        margin: as logged; None: none.
        seeds: planned, or the planned looks.
        techniques: how many the first sweep planned, 0 where none says.
        rule: of the verdicts, by which the first sweep was planned; None: no sweep.
        remarks: for the face of the report.
    """

    margin: float | None
    seeds: tuple[int, ...]
    techniques: int
    rule: int | None
    remarks: tuple[str, ...]

    def share(self, seeds: int) -> float:
        """The share of the error that a look at so many seeds may spend."""
        return s.share_of(seeds, self.seeds)

    def level(self, seeds: int) -> float:
        """An interval at so many seeds covers 1 less this."""
        return s.ALPHA * self.share(seeds)


def first_sweep(runs: Iterable[Run]) -> Sweep | None:
    """The earliest: only what it fixed was fixed before anything was seen."""
    sweeps = [run.sweep for run in runs if run.sweep is not None]
    return min(sweeps, key=lambda w: (w.created, w.folder), default=None)


def plan_of(runs: Sequence[Run], request: Request) -> Plan:
    """Margin and seeds as the first sweep fixed them, where the request does not say otherwise."""
    metric = request.metric
    sweeps = {run.sweep.folder: run.sweep for run in runs if run.sweep is not None}
    first = first_sweep(run for run in runs if run.sweep and run.sweep.decides) or first_sweep(runs)
    recorded = first.margin_points if first and metric.default_margin is not None else None
    remarks = []
    if request.margin is not None:
        margin: float | None = request.margin
        asked = f"{metric.formatted(request.margin)}{metric.unit}"
        if recorded is None:
            remarks.append(f"The margin of {asked} was asked for now; no sweep recorded one before its runs.")
        elif not math.isclose(recorded / metric.scale, request.margin):
            remarks.append(
                f"This report was asked for a margin of {asked}; the sweep fixed {recorded:.2f} points before "
                "its runs. A margin chosen after a look at the results proves nothing."
            )
    elif recorded is not None:
        margin = recorded / metric.scale
    elif first is not None and first.decides is not None:
        margin = None
    else:
        margin = metric.default_margin
        if margin is not None:
            remarks.append(
                f"No sweep recorded a margin before its runs; {DEFAULT_MARGIN:.2f} points is the default."
            )
    if len({w.margin_points for w in sweeps.values()}) > 1 and recorded is not None:
        listed = ", ".join(
            sorted(f"{w.margin_points:.2f}" for w in sweeps.values() if w.margin_points is not None)
        )
        remarks.append(
            f"The runs come from sweeps with different margins ({listed}); the first sweep's counts."
        )
    if any(run.sweep is None for run in runs) and first is not None:
        outside = sum(run.sweep is None for run in runs)
        remarks.append(f"{outside} of {len(runs)} runs belong to no recorded sweep.")
    if first is not None and first.decides is not None and first.decides.metric != metric.name:
        remarks.append(
            f"The sweep decided by {first.decides.metric}, which says how many seeds each arm got; this report is of "
            f"{metric.name}, for which no look was planned."
        )
    planned = s.looks_of(first.planned) if first else ()
    techniques = len(first.techniques) if first else 0
    return Plan(margin, planned, techniques, first.rule if first else None, tuple(remarks))


def said_of_the_data(arms: Mapping[str, Arm], baseline: str) -> Iterable[str]:
    """For the face of the report, where data of this name were not the same for all runs."""
    runs = [run for arm in arms.values() for run in arm.recorded]
    names = sorted({str(run.settings[DATA]) for run in runs if DATA in run.settings})
    if not names:
        return
    folders = sorted({base_name(run.settings.get("data.module.data_root_dir")) for run in runs} - {""})
    where = f" ({', '.join(folders)})" if folders else ""
    yield (
        f"Not all runs on data of this name had the same data: these had the data of fingerprint {' and '.join(names)}"
        f"{where}. Runs of other data are not paired with them, unless one sweep planned both."
    )
    if unknown := sum(not run.data_fingerprint for run in runs):
        yield f"{unknown} of these runs recorded no fingerprint of their data, and are taken to be of them."
    base = arms[baseline].runs
    for arm in arms.values():
        pairs = [(run, base[unit]) for unit, run in arm.runs.items() if unit in base]
        other = [(mine.settings[DATA], theirs.settings[DATA]) for mine, theirs in pairs]
        differ = sorted({f"{mine}, there {theirs}" for mine, theirs in other if mine != theirs})
        if differ:
            count = sum(mine != theirs for mine, theirs in other)
            yield (
                f"{arm.name}: {count} of {len(pairs)} pairs are of other data than those of {baseline} "
                f"({'; '.join(differ)}): the difference is one of the data too, and perhaps of the test images."
            )


# The options


@dataclass
class Settings:
    """Options of the arms: those that differ between arms, and those that are the same everywhere."""

    differing: dict[str, dict[str, str]]  # option -> arm -> value
    equal: dict[str, str]


def settings_of(arms: Mapping[str, Arm], baseline: str) -> Settings:
    """The options of the arms' runs; `baseline` names the arm whose values the equal ones are."""
    values_of = {arm.name: usual(arm) for arm in arms.values()}
    differing, equal = {}, {}
    for name in sorted({name for values in values_of.values() for name in values}):
        known = {values_of[arm][name] for arm in arms if name in values_of[arm]}
        # what an option was before there was one
        off = known.pop() if known in ({"null"}, {"false"}) else "absent"
        values = {arm: values_of[arm].get(name, off) for arm in arms}
        if len(set(values.values())) > 1:
            differing[name] = values
        else:
            equal[name] = values[baseline]
    return Settings(differing, equal)


def usual(arm: Arm) -> dict[str, str]:
    """Each option's most frequent value in the arm, as text; of an arm that lost all its runs, in those."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in arm.all_runs or arm.dropped:
        for name, value in run.settings.items():
            counts[name][as_text(value)] += 1
    return {name: values.most_common(1)[0][0] for name, values in counts.items() if is_setting(name)}


def is_setting(name: str) -> bool:
    """Whether an option is one of the arm's settings; the fold is what arms are paired by."""
    return (is_semantic(name) or name in FILES) and name != "data.module.fold"


def as_text(value: Any) -> str:
    """As one would write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
