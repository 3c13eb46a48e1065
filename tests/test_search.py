"""Searches: the space that is typed, and what becomes of a trial that this process does not run to its end."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Outcome
from hydra.core.override_parser.overrides_parser import OverridesParser

from crucible.run import RunDirectory
from lab import sweeps
from lab.executors import Errand
from lab.planning import Planned
from lab.search import space

optuna = pytest.importorskip("optuna", reason="no Optuna here: pip install -e '.[sweeps]'")

# the space


def swept(value: str) -> tuple[Any, ...]:
    """Kind, least and greatest value, and step or scale of what Optuna is given for a typed value."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna cuts an end off that is not on a step, with a warning
        (found,) = space(OverridesParser.create().parse_overrides([f"a.b={value}"])).values()
    if hasattr(found, "choices"):
        return tuple(found.choices)
    return type(found).__name__[:3], found.low, found.high, "log" if found.log else found.step


SPACES = {
    "range(1, 10, 2)": ("Int", 1, 9, 2),
    "range(10, 1, -2)": ("Int", 2, 10, 2),
    "range(5)": ("Int", 0, 4, 1),
    "range(1e-05, 1e-04, 1e-05)": ("Flo", 1e-05, 9e-05, 1e-05),
    "range(0, 1e-05, 1e-06)": ("Flo", 0.0, 9e-06, 1e-06),
    "range(0, 0.9, 0.3)": ("Flo", 0.0, 0.6, 0.3),
    "range(1.0, 4)": ("Flo", 1.0, 3.0, 1.0),
    "interval(1, 3)": ("Flo", 1.0, 3.0, None),
    "int(interval(1, 3))": ("Int", 1, 3, 1),
    "tag(log, interval(1e-05, 1))": ("Flo", 1e-05, 1.0, "log"),
    "1e-5,1e-4": ("1e-05", "0.0001"),
    "shuffle(range(1))": ("0",),
}


@pytest.mark.parametrize("value", SPACES)
def test_a_space_has_the_numbers_that_were_typed(value: str) -> None:
    assert swept(value) == SPACES[value]


NO_SPACES = {
    "range(5, 1)": "range(start, stop, step)",
    "range(1, 5, 0)": "range(start, stop, step)",
    "range(1.0, 5, -1)": "range(start, stop, step)",
    "shuffle(range(5, 1))": "range(start, stop, step)",
    "range(0, nan)": "finite",
    "interval(10, 1)": "the smaller one first",
    "interval(0, inf)": "finite",
    "tag(log, interval(0, 1))": "above 0",
    "tag(log, interval(-1, 1))": "above 0",
    "tag(lgo, interval(1, 2))": "tag(log, interval(0.001, 0.1))",
    "tag(log, range(1, 9))": "tag(log, interval(0.001, 0.1))",
}


@pytest.mark.parametrize("value", NO_SPACES)
def test_a_space_without_values_is_refused_in_one_line(cli: Callable[..., Outcome], value: str) -> None:
    outcome = cli("-m", "sweep=optuna", f"model.lr={value}", *TINY)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert f"model.lr={value}: " in outcome.err and NO_SPACES[value] in outcome.err


def test_a_pattern_that_no_name_has_is_refused_in_one_line(cli: Callable[..., Outcome]) -> None:
    outcome = cli("-m", "sweep=optuna", "technique=glob(zzz*)", *TINY)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert "technique=glob(zzz*): " in outcome.err


# the trials

KILLED = "interrupted", "its process was killed by signal 9 (as it is done for memory)"


class Ended:
    """A job that has ended, as `outcome` says."""

    def __init__(self, outcome: Callable[[], tuple[str, str]]) -> None:
        self.outcome = outcome

    def ended(self, timeout: float) -> bool:
        return True

    def signal(self, number: int) -> None:
        raise AssertionError


class Engine:
    """Trains nothing: the job of number i ends as the i-th end says, others well, with val/acc 0.5.

    Args:
        ends: a state and a reason, or what to do in place of the job, which gives its handle.
    """

    slots = 1

    def __init__(self, *ends: Any) -> None:
        self.ends, self.started = list(ends), list[Planned]()

    def as_checked_here(self, composed: Any) -> Any:
        return composed

    def describe(self) -> str:
        return "nowhere"

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> Ended:
        end = self.ends.pop(0) if self.ends else ("finished", "")
        if callable(end):
            return end(planned, facts)
        run = planned.record(facts)
        self.started.append(planned)
        run.update_summary(status=end[0], reason=end[1], final={"val/acc": 0.5})
        return Ended(lambda: end)


def hold(run: RunDirectory) -> None:
    """Another live process takes the run."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.claim_file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))


@pytest.fixture
def search(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Outcome, Engine]]:
    """Search for a rate by an engine whose jobs end as is said."""

    def run(*ends: Any, trials: int = 2, study: str = "s", rates: str = "interval(0.1, 0.2)") -> Any:
        engine = Engine(*ends)
        monkeypatch.setattr(sweeps, "LocalExecutor", lambda n_jobs, trainer: engine)
        named = [f"search.study={study}", f"search.n_trials={trials}", "checkpoint.monitor=val/acc"]
        return cli("-m", "sweep=optuna", f"model.lr={rates}", *named, *TINY), engine

    return run


def trials(folder: Path, study: str = "s") -> list[Any]:
    database = folder / "experiments" / "searches" / study / "study.db"
    return optuna.load_study(study_name=study, storage=f"sqlite:///{database}").trials


def states(folder: Path, study: str = "s") -> list[str]:
    return [trial.state.name for trial in trials(folder, study)]


def test_a_trial_that_was_killed_is_counted_named_and_gone_on_with(search: Any, tmp_path: Path) -> None:
    outcome, _ = search(KILLED)
    assert outcome.status == 1 and "1 complete, 0 pruned, 0 failed, 1 interrupted" in outcome.out
    (values,) = trials(tmp_path)[0].user_attrs["values"]
    assert "1 of the trials did not finish" in outcome.err
    assert f"trial 1 ({values}): interrupted: {KILLED[1]}; the same command goes on" in outcome.err
    outcome, engine = search()
    assert outcome.status == 0 and "2 complete, 0 pruned, 0 failed\n" in outcome.out, outcome.err
    assert states(tmp_path) == ["COMPLETE"] * 2 and len(engine.started) == 1


@pytest.mark.parametrize("when", ["while another one runs", "at the same moment"])
def test_an_orphan_that_another_process_goes_on_with_is_left_to_it(
    search: Any, tmp_path: Path, when: str
) -> None:
    search(KILLED, KILLED)
    second = RunDirectory(trials(tmp_path)[1].user_attrs["run"])

    def meanwhile(planned: Planned, facts: Mapping[str, Any]) -> Ended:
        hold(second)
        return engine_of_one.start(planned, 0, facts)

    engine_of_one = Engine()
    ends = [meanwhile] if when == "while another one runs" else [("finished", ""), meanwhile]
    outcome, _ = search(*ends)
    assert outcome.status == 0 and "0 failed, 1 open" in outcome.out, outcome.err
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]
    second.claim_file.unlink()
    search()
    assert states(tmp_path) == ["COMPLETE"] * 2


def test_an_orphan_that_another_process_has_told_meanwhile_is_not_run(search: Any, tmp_path: Path) -> None:
    search(KILLED, KILLED)
    engine_of_one = Engine()

    def meanwhile(planned: Planned, facts: Mapping[str, Any]) -> Ended:
        database = tmp_path / "experiments" / "searches" / "s" / "study.db"
        optuna.load_study(study_name="s", storage=f"sqlite:///{database}").tell(1, 0.7)
        return engine_of_one.start(planned, 0, facts)

    outcome, engine = search(meanwhile)
    assert outcome.status == 0 and not engine.started, outcome.err
    assert [trial.value for trial in trials(tmp_path)] == [0.5, 0.7]


def test_an_orphan_whose_run_was_pruned_is_told_and_not_trained_on(search: Any, tmp_path: Path) -> None:
    search(("finished", ""), KILLED)
    RunDirectory(trials(tmp_path)[1].user_attrs["run"]).update_summary(status="pruned", reason="worse")
    outcome, engine = search()
    assert outcome.status == 0 and not engine.started and "trial 2: worse" in outcome.out
    assert states(tmp_path) == ["COMPLETE", "PRUNED"]


def test_a_trial_asked_here_fails_only_where_its_run_is_another_trials(search: Any, tmp_path: Path) -> None:
    search(KILLED, trials=1, rates="choice(0.1)")
    hold(RunDirectory(trials(tmp_path)[0].user_attrs["run"]))
    outcome, _ = search(trials=2, rates="choice(0.1)")
    assert states(tmp_path) == ["RUNNING", "FAIL"], "of the same values: the first one is told by its process"
    outcome, _ = search(trials=1, rates="choice(0.1)", study="other")
    assert "1 open" in outcome.out
    assert states(tmp_path, "other") == ["RUNNING"], "nobody else tells it; the same command will"


def elsewhere(seen: bool, **summary: Any) -> Callable[[Planned, Mapping[str, Any]], Ended]:
    """A job on a machine where it is another run; `seen`: by the process that asked for it, to its end."""

    def start(planned: Planned, facts: Mapping[str, Any]) -> Ended:
        errand, planned_run = Errand(planned, facts, 1), planned.job.run  # type: ignore[union-attr]
        run = RunDirectory(planned_run.path.with_name(f"{planned_run.path.name}-elsewhere"))
        run.record({}, [])
        run.update_summary(**summary)
        errand.record.write_text(
            json.dumps({"run": str(run.path), "status": 0 if seen else None, "reason": ""})
        )
        return Ended(lambda: errand.outcome("failed", "") if seen else KILLED)

    return start


def test_a_trial_names_the_run_that_it_was_on_its_machine(search: Any, tmp_path: Path) -> None:
    outcome, _ = search(elsewhere(True, status="finished", reason="", final={"val/acc": 0.6}), trials=1)
    (trial,) = trials(tmp_path)
    assert outcome.status == 0 and trial.value == 0.6
    assert trial.user_attrs["run"].endswith("-elsewhere") and f"->  {trial.user_attrs['run']}" in outcome.out
    folder = tmp_path / "experiments" / "searches" / "s"
    (recorded,) = json.loads((folder / "search.json").read_text())["trials"]
    assert (folder / recorded["run"]).resolve() == Path(trial.user_attrs["run"])


def test_an_orphan_is_the_run_that_its_job_says_it_is(search: Any, tmp_path: Path) -> None:
    search(elsewhere(False, status="running"), trials=1)
    (run,) = map(RunDirectory, (tmp_path / "experiments").glob("*/*-elsewhere"))
    hold(run)
    outcome, engine = search(trials=1)
    assert not engine.started and states(tmp_path) == ["RUNNING"], "its job has outlived who asked for it"
    run.update_summary(status="finished", reason="", final={"val/acc": 0.6})
    run.claim_file.unlink()
    outcome, engine = search(trials=1)
    (trial,) = trials(tmp_path)
    assert outcome.status == 0 and not engine.started, outcome.err
    assert trial.value == 0.6 and trial.user_attrs["run"] == str(run.path)
