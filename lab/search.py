"""A search by Optuna over what a command line sweeps: ask for values, run, tell; many processes may share a study."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig

from callbacks.pruning import open_study
from crucible import private
from crucible.configuration import check_name
from crucible.console import print_table, say
from crucible.files import write_atomically
from crucible.masking import masked, masked_in
from crucible.metrics import higher_is_better, of_split
from crucible.options import ConfigError, read_options
from crucible.run import LOST_AFTER_S, RunDirectory
from lab.config import SWEEP_OPTIONS
from lab.executors import Executor, Work, freshly_listed
from lab.experiment import Examiner
from lab.planning import TO_RUN, Compose, Planned, SweepOptions, examine
from lab.remote import read_record

if TYPE_CHECKING:
    import optuna

SEE = "cli_configs/sweep/optuna.yaml"
Value = str | int | float


@dataclass(frozen=True)
class SearchOptions:
    """What is searched, and how."""

    n_trials: Annotated[int, "[1, inf)", "of the study, over all processes and earlier calls"] = 20
    metric: Annotated[str | None, "of the last epoch; null: checkpoint.monitor"] = None
    direction: Literal["maximize", "minimize"] | None = None
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband"] | None = "median"
    study: str | None = None
    storage: Annotated[str | None, "any URL of Optuna; null: SQLite in exp_dir/searches"] = None
    seed: Annotated[int | None, "[0, inf)"] = None


def space(overrides: Sequence[Override]) -> dict[str, optuna.distributions.BaseDistribution]:
    """What the overrides sweep, as Optuna's distributions by option.

    Raises:
        ConfigError: where nothing is swept, the seed is, or a sweep has no values to search.
    """
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for override in overrides:
        if not override.is_sweep_override():
            continue
        name = override.get_key_element()
        if name in ("seed", "data.module.fold"):
            raise ConfigError(
                f"{name}: a search has no use for it; search first, then compare over seeds", see=SEE
            )
        found[name] = _distribution(override)
    if not found:
        raise ConfigError(
            "sweep=optuna: nothing is swept; give a space such as 'model.lr=interval(0.01, 0.1)'", SEE
        )
    return found


def _distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """What an override sweeps, as Optuna takes it.

    Raises:
        ConfigError: where that is no value, or no end of values.
    """
    from optuna import distributions

    def refused(allowed: str) -> ConfigError:
        return ConfigError(f"{override.input_line}: {allowed}", see=SEE)

    value: Any = override.value()
    logarithmic = isinstance(value, IntervalSweep) and value.tags == {"log"}
    if getattr(value, "tags", ()) and not logarithmic:
        raise refused("of tags a search knows log of an interval: tag(log, interval(0.001, 0.1))")
    if isinstance(value, (IntervalSweep, RangeSweep)):
        numbers: list[Any] = (
            [value.start, value.end] if isinstance(value, IntervalSweep) else _ends_and_step(value)
        )
        if not numbers or not all(map(math.isfinite, numbers)) or numbers[0] > numbers[1]:
            raise refused(
                "no values to search; interval(a, b) takes finite numbers, the smaller one first, and "
                "range(start, stop, step) steps from start towards stop, which is not reached"
            )
        if logarithmic and numbers[0] <= 0:
            raise refused("a logarithmic interval lies above 0")
        whole = all(isinstance(number, int) for number in numbers)
        kind: Any = distributions.IntDistribution if whole else distributions.FloatDistribution
        if isinstance(value, IntervalSweep):
            return kind(*numbers, log=logarithmic)
        if not value.shuffle:
            return kind(*numbers[:2], step=numbers[2])
    choices = [str(choice) for choice in override.sweep_string_iterator()]
    if not choices:
        raise refused("nothing that there is has such a name")
    return distributions.CategoricalDistribution(choices)


def _ends_and_step(sweep: RangeSweep) -> list[Any]:
    """Least and greatest value of a range, and the step between two; empty where it has none.

    In decimals, as they were typed: with binary ones 0.9 would be in range(0, 0.9, 0.3).
    """
    given = sweep.start, sweep.stop, sweep.step
    start, stop, step = (Decimal(str(number)) for number in given)
    if not all(number.is_finite() for number in (start, stop, step)) or not step:
        return []
    kind = int if all(isinstance(number, int) for number in given) else float
    count = math.ceil((stop - start) / step)
    low, high = sorted((start, start + (count - 1) * step))
    return [kind(low), kind(high), kind(abs(step))] if count > 0 else []


def typed(values: Mapping[str, Value]) -> list[str]:
    """A trial's values as overrides; floats to six digits, so that arms have readable names."""
    return [f"{name}={format(v, '.6g') if isinstance(v, float) else v}" for name, v in values.items()]


def create_study(spec: Mapping[str, Any]) -> optuna.study.Study:
    """The study, made where it is not there; another process may be making it at the same time."""
    for attempt in range(10):
        try:
            return open_study(spec, create=True)
        except Exception as error:
            if attempt == 9:
                text = " ".join(str(error).split())
                raise ConfigError(
                    masked(f"search.storage={spec['storage']}: {text[:200]}"), see=SEE
                ) from error
            time.sleep(0.5)
    raise AssertionError


def search(
    compose: Compose,
    overrides: Sequence[Override],
    sweep_options: SweepOptions,
    node: Mapping[str, Any],
    executor: Executor,
) -> int:
    """Search until the study has its number of trials, and say which was best; the exit status.

    Raises:
        ConfigError: for what cannot be searched.
        SystemExit: with 128 + the signal's number, where one ended it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("sweep=optuna needs the extra: pip install -e '.[sweeps]'", see="README.md")
    for name in node:
        if name not in SearchOptions.__dataclass_fields__:
            raise ConfigError(f"search.{name}: no such option", see=SEE)
    for name in ("design", "equal_time"):
        if getattr(sweep_options, name):
            raise ConfigError(f"{name} compares arms of a grid; sweep=optuna searches instead", see=SEE)
    options = read_options(SearchOptions, node, prefix="search")
    return Search(compose, overrides, sweep_options, options, executor).run()


class Search:
    """A study and the runs that are its trials."""

    def __init__(
        self,
        compose: Compose,
        overrides: Sequence[Override],
        sweep_options: SweepOptions,
        options: SearchOptions,
        executor: Executor,
    ) -> None:
        self.compose, self.sweep_options, self.options, self.executor = (
            compose,
            sweep_options,
            options,
            executor,
        )
        self.space = space(overrides)
        self._examiner = Examiner()
        fixed = [o for o in overrides if not o.is_sweep_override()]
        own = [o.get_key_element().lstrip("+").split(".")[0] in SWEEP_OPTIONS for o in fixed]
        self.fixed = [str(o.input_line) for o, is_own in zip(fixed, own, strict=True) if not is_own]
        probe = self._examine(typed({name: _first(d) for name, d in self.space.items()}))
        if probe.job is None:
            raise ConfigError(probe.reason)
        config = probe.job.config
        checkpoint = config["checkpoint"]
        self.metric = options.metric or checkpoint["monitor"]
        if of_split(self.metric, "test"):
            raise ConfigError(
                f"search.metric={self.metric}: what is chosen on the test set is not tested by it", SEE
            )
        mode = checkpoint["mode"] if self.metric == checkpoint["monitor"] else None
        higher = higher_is_better(self.metric, mode)
        self.direction = options.direction or ("maximize" if higher else "minimize")
        text = json.dumps([self.fixed, {n: repr(d) for n, d in self.space.items()}, self.metric])
        name = (
            options.study
            or f"{config['data']['module']['name']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        )
        check_name("search.study", name)
        self.folder = probe.job.run.path.parent.parent / "searches" / name
        self.spec = {
            "study": name, "storage": options.storage or f"sqlite:///{self.folder / 'study.db'}", "seed": options.seed,
            "direction": self.direction, "sampler": options.sampler, "pruner": options.pruner, "metric": self.metric,
            "epochs": math.ceil(probe.job.epochs) if math.isfinite(probe.job.epochs) else 1,
        }  # fmt: skip
        self._trials: dict[
            int, optuna.trial.FrozenTrial | optuna.trial.Trial
        ] = {}  # by id of the planned job
        self._asked: set[int] = set()  # numbers of the trials that this process asked for
        self._failures: list[str] = []
        self._interrupted: list[str] = []

    def _checked_here(self, overrides: Sequence[str]) -> DictConfig:
        return self.executor.as_checked_here(self.compose(overrides))

    def _examine(self, values: list[str]) -> Planned:
        swept = [name.lstrip("+") for name in self.space]
        return examine(self._examiner, self._checked_here, [*self.fixed, *values], swept, self.sweep_options)

    def run(self) -> int:
        """Run trials until there are enough of them; the exit status."""
        rows = [[name, str(distribution)] for name, distribution in self.space.items()]
        print_table(["", " "], rows, words=("", " "), titled=False)
        say(
            f"search {self.spec['study']}: {self.direction} {self.metric}, {self.options.n_trials} trials, "
            f"{self.executor.describe()}, pruner {self.options.pruner or 'none'}"
        )
        if self.sweep_options.dry_run:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = create_study(self.spec)
        facts = {"folder": str(self.folder), "design": "search", "created": time.time()}
        work = Work(self.executor, facts, self._ended)
        work.run(self._following())
        status = self._report()
        if work.received:
            raise SystemExit(128 + work.received[0])
        return status

    def _following(self) -> Iterator[Planned]:
        """Trials that died with their process first, then new ones."""
        looked_at: set[int] = set()
        # asked for anew each time: another process may have gone on with one meanwhile, or told it
        while orphan := next((t for t in self._orphans() if t.number not in looked_at), None):
            looked_at.add(orphan.number)
            if (result := self._result(orphan)) is not None:
                self._tell(orphan, result.known()["status"], result.known().get("reason") or "", result)
                continue
            planned = self._examine(orphan.user_attrs["values"])
            if planned.state in TO_RUN:
                say(f"\n[trial {orphan.number + 1}, again] {' '.join(planned.differing)}")
                yield self._of_trial(planned, orphan)
            else:
                self._tell_as_planned(planned, orphan)
        while len(self.study.get_trials(deepcopy=False)) < self.options.n_trials:
            trial = self.study.ask(self.space)
            values = typed(trial.params)
            self._asked.add(trial.number)
            trial.set_user_attr("values", values)
            planned = self._examine(values)
            if planned.job is not None:
                trial.set_user_attr("run", str(planned.job.run.path))
            if planned.state in TO_RUN:
                say(f"\n[trial {trial.number + 1}/{self.options.n_trials}] {' '.join(values)}")
                yield self._of_trial(planned, trial)
            else:  # finished before, impossible, or at work elsewhere
                self._tell_as_planned(planned, trial)

    def _of_trial(self, planned: Planned, trial: Any) -> Planned:
        self._trials[id(planned)] = trial
        planned.errand = _errand(trial)
        if self.options.pruner is not None:
            planned.trial = {**self.spec, "trial": private.trial_in_storage(trial)}
        return planned

    def _orphans(self) -> list[optuna.trial.FrozenTrial]:
        """Trials in progress whose run nobody holds."""
        from optuna.trial import TrialState

        found = []
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            starting = time.time() - began < LOST_AFTER_S  # another process may be about to run it
            runs = self._runs(trial)
            if not runs:
                if not starting:
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            elif all(run.state() != "running" for run in runs) and not (
                starting and all(run.known().get("status", "created") == "created" for run in runs)
            ):
                found.append(trial)
        return found

    def _runs(self, trial: optuna.trial.FrozenTrial) -> list[RunDirectory]:
        """What may be the run of a trial: what its jobs on other machines say that they are, and what was planned."""
        jobs = self.folder / "jobs"
        freshly_listed(jobs)
        told = [read_record(file).get("run") for file in jobs.glob(f"{_errand(trial)}*.json")]
        return [RunDirectory(run) for run in dict.fromkeys([*told, trial.user_attrs.get("run")]) if run]

    def _result(self, trial: optuna.trial.FrozenTrial) -> RunDirectory | None:
        """The run of a trial that has ended as a trial ends, but for its being told."""
        ended = (run for run in self._runs(trial) if run.known().get("status") in ("finished", "pruned"))
        return next(ended, None)

    def _ended(self, planned: Planned) -> None:
        self._tell_as_planned(planned, self._trials.pop(id(planned)))

    def _tell_as_planned(self, planned: Planned, trial: Any) -> None:
        self._tell(trial, planned.state, planned.reason, planned.job.run if planned.job else None)

    def _tell(self, trial: Any, state: str, reason: str, run: RunDirectory | None) -> None:
        """Tell the study, and the reader, what became of a trial.

        Args:
            trial: asked here, or taken over.
            state, reason: of its run, as of a planned job.
            run: that it is; on another machine perhaps not the one that was planned.
        """
        from optuna.trial import Trial, TrialState

        if run is not None and state != "held":
            with contextlib.suppress(RuntimeError):  # another process has told the trial
                in_study = Trial(self.study, private.trial_in_storage(trial))
                in_study.set_user_attr("run", str(run.path))
        value = ((run.known() if run else {}).get("final") or {}).get(self.metric)
        number, named = trial.number, f"trial {trial.number + 1} ({' '.join(trial.user_attrs['values'])})"
        if state == "finished" and value is not None:
            self.study.tell(number, value, skip_if_finished=True)
            say(f"trial {number + 1}: {self.metric} {value:.4f}")
        elif state == "pruned":
            self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
            say(f"trial {number + 1}: {reason}")
        elif state == "interrupted":
            self._interrupted.append(f"{named}: interrupted: {reason}; the same command goes on with it")
            say(f"trial {number + 1}: interrupted; the same command goes on with it")
        elif state == "held" and not self._is_double(trial):
            say(f"trial {number + 1}: {reason}; left to the process there")
        else:
            reason = reason or f"it has no {self.metric}"
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            if state != "held":
                self._failures.append(f"{named}: {state}: {reason}")
            print(f"trial {number + 1}: {state}: {reason}", file=sys.stderr, flush=True)
        self._record()

    def _is_double(self, trial: Any) -> bool:
        """Whether a run that another process holds is another trial's, of the same values: nobody would tell this one.

        Not so of a trial that was taken over: whoever holds its run has taken it over too, or never let it go.
        """
        from optuna.trial import TrialState

        return trial.number in self._asked and any(
            other.number != trial.number and other.user_attrs.get("values") == trial.user_attrs["values"]
            for other in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        )

    def _record(self) -> None:
        """`search.json`: its trials, their runs named from its own folder, as a sweep's record names them."""

        def named(run: str | None) -> str | None:
            return run and os.path.relpath(run, self.folder)

        trials = [
            {"number": t.number, "state": t.state.name.lower(), "value": t.value, "values": t.user_attrs.get("values"),
             "run": named(t.user_attrs.get("run")), "epochs_reported": len(t.intermediate_values)}
            for t in self.study.get_trials(deepcopy=False)
        ]  # fmt: skip
        content = {**self.spec, "n_trials": self.options.n_trials, "trials": trials}
        write_atomically(self.folder / "search.json", json.dumps(masked_in(content), indent=2) + "\n")

    def _report(self) -> int:
        from optuna.trial import TrialState

        self._record()
        states = [t.state for t in self.study.get_trials(deepcopy=False)]
        complete, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
        failed = states.count(TrialState.FAIL)
        interrupted, running = len(self._interrupted), states.count(TrialState.RUNNING)
        counts = f"{complete} complete, {pruned} pruned, {failed} failed"
        counts += f", {interrupted} interrupted" if interrupted else ""
        counts += f", {running - interrupted} open" if running > interrupted else ""  # elsewhere, or orphans
        say(f"\nsearch {self.spec['study']}: {counts}")
        if complete:
            best = self.study.best_trial
            say(f"best: {self.metric} {best.value:.4f} with {' '.join(best.user_attrs['values'])}")
            say(f"  ->  {best.user_attrs['run']}")
        say(f"all trials: {self.folder / 'search.json'}")
        unfinished = [*self._failures, *self._interrupted]
        if unfinished:
            print(f"\n{len(unfinished)} of the trials did not finish:", file=sys.stderr)
            for line in unfinished:
                print(f"  {line}", file=sys.stderr)
        return 0 if complete and not unfinished else 1


def _errand(trial: Any) -> str:
    """How the files of its jobs on other machines begin."""
    return f"trial{trial.number}-"


def _first(distribution: Any) -> Value:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low
