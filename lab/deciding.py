"""`until=decided`: a sweep that starts only the seeds that its plan asks for.

The plan (looks, techniques, margin, metric, seeds) is written before the first run, and a command with another one is
refused. Which runs come next, and what was found, is `reporting.looks.replay` of the records there are: a sweep that
was killed goes on to the same findings, and so do several machines that share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from crucible.command_line import command, typed_here
from crucible.console import say
from crucible.files import write_atomically
from crucible.masking import masked_in
from crucible.metrics import find_metric, of_split
from crucible.options import ConfigError, suggest
from crucible.run import RunDirectory
from lab.config import group_of, is_among, logged_values
from lab.experiment import Examiner
from lab.planning import SEE, Compose, Grid, Planned, SweepOptions, examine, expand, plan
from reporting import remarks
from reporting.arms import Arm, sort_into_arms
from reporting.comparison import Step, compare, steps_of_sweep
from reporting.looks import DEFAULT_LOOKS, FEWEST, FUTILITY
from reporting.records import LeftOut, Run, Sweep, read_run, read_sweep
from reporting.request import Metric, Request
from reporting.statistics import RULE

METRIC = "test/acc"
ONE_DATA_SET = "until=decided compares on one data set; give each a command of its own"
OF_UNTIL = ("looks", "decided_by", "budget_hours", "budget_runs", "drop_failed")


def refuse_without(options: SweepOptions) -> None:
    """Options of `until=decided` mean nothing without it.

    Raises:
        ConfigError: naming the option.
    """
    for name in OF_UNTIL:
        if (value := getattr(options, name)) not in (None, False):
            shown = str(value).lower() if isinstance(value, bool) else value
            more = "; planned_seeds=[...] records the looks of a sweep that runs all its seeds" * (
                name == "looks"
            )
            raise ConfigError(f"{name}={shown} is an option of until=decided{more}", see=SEE)


def looks_and_seeds(
    options: SweepOptions, overrides: Sequence[Override], composed: DictConfig
) -> tuple[Any, ...]:
    """The planned looks, the seeds in their order, and the overrides without those of the seed.

    Raises:
        ConfigError: for what cannot be decided upon.
    """
    looks = tuple(DEFAULT_LOOKS if options.looks is None else options.looks)
    if len(looks) < 2 or list(looks) != sorted(set(looks)):
        raise ConfigError(
            f"looks={list(looks)}: at least two numbers of seeds, ascending, the first at least {FEWEST}",
            see=SEE,
        )
    refused = {
        "planned_seeds": (options.planned_seeds is not None, "until=decided has looks=[...] instead"),
        "fresh": (bool(composed.fresh), "until=decided makes no run of its plan again"),
        "drop_failed": (
            options.drop_failed and options.retry_failed,
            "retry_failed=true asks for the contrary",
        ),
        "equal_time": (
            options.equal_time and _budget(options) is not None,
            "with a budget until=decided runs nothing beside the looks",
        ),
        "budget_hours": (
            options.budget_hours is not None and options.budget_runs is not None,
            "budget_runs is given too; a plan has one budget",
        ),
    }
    for name, (wrong, why) in refused.items():
        if wrong:
            value = getattr(options, name) if hasattr(options, name) else composed[name]
            raise ConfigError(f"{name}={str(value).lower()}: {why}", see=SEE)
    _check_metric(
        options.decided_by or METRIC, composed, "decided_by" if options.decided_by else "until=decided"
    )
    seeds, others = list(range(looks[-1])), []
    for override in overrides:
        name = override.get_key_element()
        if name == "data" and override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: {ONE_DATA_SET}", see=SEE)
        if name == "data.module.fold" and override.is_sweep_override():
            raise ConfigError(
                "data.module.fold: until=decided pairs the arms by their seeds; take one fold", see=SEE
            )
        if name != "seed":
            others.append(override)
            continue
        listed = (
            list(override.sweep_string_iterator())
            if override.is_discrete_sweep()
            else [str(override.value())]
        )
        seeds = [int(seed) for seed in listed if seed.lstrip("-").isdigit()]
        if len(set(seeds)) != len(listed) or len(seeds) != looks[-1]:
            raise ConfigError(
                f"{override.input_line}: {len(listed)} seed{'s' * (len(listed) != 1)}, and the last look is at "
                f"{looks[-1]}; leave it out for 0 to {looks[-1] - 1}, or give 'seed=range(100,{100 + looks[-1]})'",
                see=SEE,
            )
    return looks, tuple(seeds), others


def _check_metric(name: str, composed: DictConfig, option: str) -> None:
    row = find_metric(name)
    if row is None or not of_split(name, "test", "val"):
        logged = [f"{split}/{m}" for split in ("test", "val") for m in ("acc", "loss", "f1", "mae")]
        raise ConfigError(
            f"decided_by={name}: not a metric of the last epoch{suggest(name, logged)}", see=SEE
        )
    if of_split(name, "test") and not composed.test_after_training:
        raise ConfigError(
            f"test_after_training=false: {name} decides; decided_by=val/{row.logged} does without", see=SEE
        )


def _check_logged(name: str, config: Mapping[str, Any], arm: str, option: str) -> None:
    """Refuse a metric that an arm's runs never log, before the first of them is trained."""
    split: Literal["val", "test"] = "test" if of_split(name, "test") else "val"
    values = logged_values(dict(config), split, group_of(name, split))
    if not is_among(name, values):
        raise ConfigError(
            f"{option}: {name} decides, and a run of {arm}, with metrics={config['metrics']}, does not log it; "
            f"decided_by=NAME is one that all log{suggest(name, values)}",
            see=SEE,
        )
    if config["trainer"].get(f"limit_{split}_batches") == 0:
        raise ConfigError(f"trainer.limit_{split}_batches=0: {option}, and {name} decides", see=SEE)


def _budget(options: SweepOptions) -> str | None:
    return next(
        (name for name in ("budget_hours", "budget_runs") if getattr(options, name) is not None), None
    )


@dataclass
class Deciding:
    """The arms of such a sweep on their way through the looks.

    Attributes:
        facts: the plan, as every record of the sweep has it.
        planned: the jobs looked at so far, whatever became of them.
    """

    compose: Compose
    options: SweepOptions
    swept: Sequence[str]
    facts: dict[str, Any]
    planned: list[Planned]
    file: Path
    _jobs: dict[tuple[str, int], Planned] = field(default_factory=dict)
    _typed: dict[str, list[str]] = field(default_factory=dict)
    _read: dict[Path, Run] = field(default_factory=dict)
    _told: dict[str, tuple[str, int]] = field(default_factory=dict)
    _examiner: Examiner = field(default_factory=Examiner)
    _dropped: set[Path] = field(default_factory=set)  # by this command
    _recorded: bool = False
    _stands: str = ""  # why the budget ends it

    @classmethod
    def prepare(
        cls,
        compose: Compose,
        overrides: Sequence[Override],
        options: SweepOptions,
        composed: DictConfig,
        own: Any,
    ) -> Deciding:
        """The plan that a command makes, beside those that are recorded. Nothing is written.

        Args:
            compose: a job's configuration.
            overrides: of the command.
            options: of the sweep.
            composed: with what is not swept.
            own: leaves the sweep's own options out of a job's overrides.

        Raises:
            ConfigError: for what cannot be decided upon, or has been planned otherwise.
        """
        looks, seeds, others = looks_and_seeds(options, overrides, composed)
        grid = expand(others, options.design)
        arms, swept = [own(job) for job in grid.jobs], [*grid.swept, "seed"]
        jobs = [[f"seed={seed}", *arm] for seed in seeds[: looks[0]] for arm in arms]
        planned = plan(compose, Grid(jobs, swept, grid.generated), options)
        for one in planned:
            if one.state == "refused":
                raise ConfigError(f"{one.name()}: {one.reason}", see=SEE)
        baseline, metric = str(options.baseline), Metric(options.decided_by or METRIC)
        fold = next(one.unit[1] for one in planned if one.job)
        identities = {one.arm: str(one.job.facts["identity"]) for one in planned if one.job}
        if len(identities) < 2:
            raise ConfigError(
                f"until=decided needs a technique beside {baseline}: technique={baseline},A,B", see=SEE
            )
        by_arm = {one.arm: one.job.config for one in planned if one.job}
        data = list(dict.fromkeys(str(config["data"]["module"]["name"]) for config in by_arm.values()))
        if len(data) > 1:
            raise ConfigError(f"data.module.name={','.join(data)}: {ONE_DATA_SET}", see=SEE)
        for arm, config in by_arm.items():
            _check_logged(metric.name, config, arm, "decided_by" if options.decided_by else "until=decided")
        facts = {
            "arms": list(identities), "baseline": baseline, "planned_seeds": list(looks),
            "margin_points": options.margin_points if metric.default_margin is not None else None,
            "decides": {
                "seeds": list(seeds), "fold": fold, "metric": metric.name, "futility": FUTILITY,
                "order": "together" if _budget(options) is None else "by chance",
            },
            "budget_hours": options.budget_hours, "budget_runs": options.budget_runs,
            "rule": RULE, "created": time.time(), "identities": identities,
        }  # fmt: skip
        folder = Path(composed.exp_dir).expanduser().resolve() / "sweeps"
        self = cls(compose, options, swept, facts, planned, folder / f"plan-{_name_of(facts)}.json")
        for one in planned:
            if one.job is not None:
                self._jobs[one.arm, one.unit[0]] = one
                self._typed.setdefault(one.arm, [o for o in one.overrides if not o.startswith("seed=")])
        self._agree()
        if (runs := options.budget_runs) is not None and runs < (first := looks[0] * len(identities)):
            raise ConfigError(
                f"budget_runs={runs}: the first look takes {first} runs, {looks[0]} seeds of {len(identities)} arms",
                see=SEE,
            )
        return self

    def _agree(self) -> None:
        """Take over the plan that is recorded; refuse one that differs from it.

        Raises:
            ConfigError: in one line, what differs from which plan.
        """
        seeds, pairs = set(self.facts["decides"]["seeds"]), _pairs(self.facts)
        planned = False
        for file in sorted(self.file.parent.glob("plan-*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(file.read_text(encoding="utf-8"))
                if not pairs & _pairs(known) or not seeds & set(known["decides"]["seeds"]):
                    continue
                self._refuse_other(known, file)
                self.facts |= {"created": known["created"]}
                planned = True
        if planned:
            return
        for one in self.planned:  # records that came without their plan carry it
            if one.job is None or one.arm == self.facts["baseline"] or one.state == "new":
                continue
            carried = one.job.run.known().get("sweep") or {}
            if carried.get("decides") != self.facts["decides"] or set(carried["arms"]) != set(
                self.facts["arms"]
            ):
                fresh = max(seeds) + 1
                raise ConfigError(
                    f"{one.name()} was run before this plan ({one.job.run.path}); looks are for runs that nobody "
                    f"has seen: 'seed=range({fresh},{fresh + len(seeds)})'",
                    see=SEE,
                )
            self._refuse_other({"identities": self.facts["identities"], **carried}, one.job.run.path)
            self.facts |= {"created": carried["created"]}

    def _refuse_other(self, known: Mapping[str, Any], file: Path) -> None:
        mine = self.facts
        shown = {
            "technique": lambda f: Names(f["arms"]),
            "baseline": lambda f: f["baseline"],
            "looks": lambda f: f["planned_seeds"],
            "margin_points": lambda f: f["margin_points"],
            "decided_by": lambda f: f["decides"]["metric"],
            "seed": lambda f: f["decides"]["seeds"],
            "data.module.fold": lambda f: f["decides"]["fold"],
            "a budget": lambda f: _kind_of_budget(f),
            "the rule": lambda f: (f["rule"], f["decides"]["futility"]),
        }
        for name, value in shown.items():
            here, there = value(mine), value(known)
            if here != there:
                raise ConfigError(
                    f"{name}: {here} here, but the plan of these runs, made before the first of them, has {there} "
                    f"({file}); seeds that nobody has seen make a plan of their own",
                    see=SEE,
                )
        for name in ("budget_hours", "budget_runs"):
            if mine[name] is not None and mine[name] < known[name]:
                raise ConfigError(
                    f"{name}={mine[name]}: the plan has {known[name]} ({file}); it can grow only", see=SEE
                )

    def record(self) -> None:
        """Write the plan, unless it is there.

        Raises:
            ConfigError: where another machine has planned otherwise; both may be told so, and neither plan is left.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {**self.facts, "command": command(*typed_here())}
        text = json.dumps(masked_in(content), indent=2) + "\n"
        mine = self.file.with_name(f".{self.file.stem}-{socket.gethostname()}-{os.getpid()}")
        write_atomically(mine, text)
        ours = not self.file.exists()
        try:
            os.link(mine, self.file)  # the first one stays
        except FileExistsError:
            ours = False
        except OSError:  # a file system without links
            if ours:
                write_atomically(self.file, text)
        finally:
            mine.unlink()
        try:
            self._agree()
        except ConfigError:
            if ours:
                self.file.unlink(missing_ok=True)
            raise
        self._recorded = True
        self._write_drops()

    @property
    def looks(self) -> list[int]:
        return list(self.facts["planned_seeds"])

    def describe(self) -> list[str]:
        """The plan, for the reader."""
        metric, margin = self.facts["decides"]["metric"], self.facts["margin_points"]
        *before, last = self.looks
        arms, kind = len(self.facts["arms"]), _budget(self.options)
        said = (
            "no margin, so that no difference is never said" if margin is None else f"margin {margin} points"
        )
        most = f"at most {last * arms} runs" + (f", and {kind}={self.facts[kind]}" if kind else "")
        order = ", one arm at a time: that with the highest chance of a decision per run" if kind else ""
        return [
            f"until decided: {arms - 1} technique{'' if arms == 2 else 's'} against {self.facts['baseline']}, by "
            f"{metric}, {said}",
            f"looks at {', '.join(map(str, before))} and {last} seeds{order}; {most}; stopped where the chance of a "
            f"decision is below {FUTILITY:.0%}",
        ]

    def ending(self) -> str:
        """Why nothing more is asked for."""
        return self._stands or "until decided: no arm asks for more seeds"

    # What comes next

    def asked(self) -> list[Planned]:
        """The jobs that the rule asks for and that have not come to an end; none: the sweep is over.

        It reads the records, and prints what a look has found that has been reached. What `drop_failed` drops is
        written once the plan is: until then it is assumed.
        """
        while True:
            steps = self._replay()
            self._tell(steps)
            wanted = {arm: step.wanted for arm, step in steps.items() if step.wanted}
            if not wanted or not self._affordable(steps, wanted):
                return []
            asked = self._missing(wanted)
            failed = [one for one in asked if self.options.drop_failed and self._can_be_dropped(one)]
            for one in failed:
                assert one.job is not None
                self._dropped.add(one.job.run.path)
                self._read.pop(one.job.run.path, None)
                say(f"{'to be ' * self.options.dry_run}dropped: {one.name()}: {one.reason}")
            self._write_drops()
            if asked and not failed:  # else there is more to read than before
                return asked

    @staticmethod
    def _can_be_dropped(one: Planned) -> bool:
        """Not what never began, as where a cluster takes no job."""
        known = one.job.run.known() if one.job is not None else {}
        return one.state == "failed" and known.get("status") in ("failed", "finished")

    def _write_drops(self) -> None:
        if self._recorded:
            for path in self._dropped:
                if not (run := RunDirectory(path)).known().get("dropped"):
                    run.update_summary(dropped=True)

    def _missing(self, wanted: Mapping[str, int]) -> list[Planned]:
        """Jobs up to the wanted seeds that are not known yet to have ended, all arms of a seed together.

        Of these the longest first, so that at the end of a look nobody waits for one that was begun last.
        """
        arms = {self.facts["baseline"]: max(wanted.values()), **wanted}
        seeds = enumerate(self.facts["decides"]["seeds"])
        jobs = [
            one
            for number, seed in seeds
            for one in sorted(
                (self._job(arm, seed) for arm, most in arms.items() if number < most), key=_shortness
            )
        ]
        found, ended = [], self._runs()
        for one in jobs:
            assert one.job is not None
            run = ended.get(one.job.run.path)
            wrecked = run is not None and bool(run.diverged) and one.arm == self.facts["baseline"]
            ended_well = run is not None and (run.value is not None or bool(run.diverged)) and not wrecked
            if run is not None and (run.dropped or ended_well):
                continue
            one.refresh(self.options)
            if run is not None and one.state == "finished":
                one.state, one.reason = "failed", f"it has no {self.facts['decides']['metric']}"
            if run is not None and wrecked:
                one.reason = f"the baseline's run diverged: {run.diverged}"
            found.append(one)
        return found

    def _job(self, arm: str, seed: int) -> Planned:
        if (arm, seed) not in self._jobs:
            one = examine(
                self._examiner, self.compose, [f"seed={seed}", *self._typed[arm]], self.swept, self.options
            )
            if one.job is None:
                raise ConfigError(f"{one.name()}: {one.reason}", see=SEE)
            self._jobs[arm, seed] = one
            self.planned.append(one)
        return self._jobs[arm, seed]

    def _affordable(self, steps: Mapping[str, Step], wanted: Mapping[str, int]) -> bool:
        """Whether the budget has the next step in it; as the steps before it were paid for, so that all agree."""
        runs, hours = self.options.budget_runs, self.options.budget_hours
        done = {arm: step.seeds for arm, step in steps.items()}
        base = max(done.values())
        new = {arm: most - done[arm] for arm, most in wanted.items()}
        new[self.facts["baseline"]] = max(0, max(wanted.values()) - base)
        what = f"the next step, {', '.join(wanted)} to {max(wanted.values())} seeds, "
        if runs is not None and base:
            used, needs = sum(done.values()) + base, sum(new.values())
            if used + needs > runs:
                self._stands = f"budget_runs={runs}: {used} are used, and {what}takes {needs}"
                return False
        if hours is not None and base:
            mean, spent = {}, 0.0
            for arm, count in {**done, self.facts["baseline"]: base}.items():
                paths = [self._job(arm, seed).job for seed in self.facts["decides"]["seeds"][:count]]
                took = [float(job.run.known().get("elapsed_s") or 0.0) / 3600 for job in paths if job]
                spent += sum(took)
                mean[arm] = sum(took) / len(took)
            needs_hours = sum(count * mean[arm] for arm, count in new.items())
            if spent + needs_hours > hours:
                self._stands = (
                    f"budget_hours={hours}: {spent:.3g} are used, and {what}takes about {needs_hours:.2g}"
                )
                return False
        return True

    # What the records say

    def _request(self) -> Request:
        metric = Metric(self.facts["decides"]["metric"])
        baseline = str(self.facts["baseline"])
        return Request((), baseline, True, metric, None, False, False, Path(), (), networks="arms")

    def _sweep(self) -> Sweep:
        return read_sweep(self.facts, str(self.file))

    def _runs(self) -> dict[Path, Run]:
        """The runs that have ended, by folder, as the report reads them."""
        request, sweep = self._request(), self._sweep()
        for (arm, _), one in self._jobs.items():
            assert one.job is not None
            run = one.job.run
            known = self._read.get(run.path)
            if known is not None and (known.dropped or not known.diverged):
                continue
            if run.known().get("status") not in ("finished", "failed"):
                continue
            read = read_run(run.path, request, (), dropped=run.path in self._dropped)
            if not isinstance(read, LeftOut):
                self._read[run.path] = replace(read, arm=arm, sweep=sweep, path=run.path)
        return self._read

    def _replay(self) -> dict[str, Step]:
        metric, margin = Metric(self.facts["decides"]["metric"]), self.facts["margin_points"]
        arms: Mapping[str, Arm] = sort_into_arms(list(self._runs().values()))
        scaled = None if margin is None else margin / metric.scale
        return steps_of_sweep(self._sweep(), arms, str(self.facts["baseline"]), metric.sign, scaled)

    def _tell(self, steps: Mapping[str, Step]) -> None:
        """Print what was found at the looks that have been reached since, and what to look at before more is spent."""
        now = {arm: (step.found, step.look) for arm, step in steps.items()}
        if now == self._told or not any(step.look for step in steps.values()):
            return
        before, self._told = self._told, now
        (table,) = compare(list(self._runs().values()), self._request())
        reached = sorted({steps[arm].seeds for arm in now if now[arm] != before.get(arm)})
        say(f"\nlook at {' and '.join(map(str, reached))} seeds, of {', '.join(map(str, self.looks))}")
        for c in table.comparisons:
            say(f"  {c.arm}: {c.verdict}")
        for warning in remarks.before_more_seeds(table):
            say(f"  look at this: {warning}")
        say()


class Names(frozenset[str]):
    """Names in no order, which a message shows as they are typed."""

    def __str__(self) -> str:
        return ",".join(sorted(self))


def _shortness(one: Planned) -> float:
    return -float(one.job.facts.get("passes") or 1.0) if one.job is not None else 0.0


def _pairs(facts: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The comparisons of a plan: identities of baseline and technique."""
    identities = facts["identities"]
    base = identities[facts["baseline"]]
    return {(base, other) for arm, other in identities.items() if arm != facts["baseline"]}


def _name_of(facts: Mapping[str, Any]) -> str:
    text = json.dumps([sorted(_pairs(facts)), sorted(facts["decides"]["seeds"])])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _kind_of_budget(facts: Mapping[str, Any]) -> str:
    return next((name for name in ("budget_hours", "budget_runs") if facts[name] is not None), "none")
