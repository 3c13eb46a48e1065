"""`until=decided`: which runs a sweep starts, what it says at each look, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Command, Outcome, runs_in, summary_of

from crucible.run import RunDirectory
from lab import deciding, planning
from lab.executors import LocalExecutor
from lab.experiment import Job
from lab.planning import Planned, SweepOptions

NOISE = 0.001 * np.random.default_rng(5).normal(size=(4, 40))
EFFECTS = {
    "baseline": 0.0,
    "mixup": 0.03,
    "powergrad": 0.0012,
    "sam": 0.0,
}  # clear at once, and near the noise
DECIDED = ["sweep=ablation", "technique=baseline,mixup,powergrad", "until=decided", "looks=[3,5,7]"]


class Ended:
    """The handle of a run that is over."""

    def ended(self, timeout: float) -> bool:
        return True

    def outcome(self) -> tuple[str, str]:
        return self.state, self.reason

    def signal(self, number: int) -> None: ...

    def __init__(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason


class Bench:
    """Stands in for the trainings of a sweep: each run ends at once, with the accuracy that its arm and seed have."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.fails: dict[tuple[str, int], str] = {}
        self.status = "failed"  # of those that fail; absent: they never begin
        self.lacks: set[tuple[str, int]] = set()  # they finish without the metric
        self.dies_after: int | None = None

    def accuracy(self, arm: str, seed: int) -> float:
        return 0.9 + EFFECTS[arm] + float(NOISE[list(EFFECTS).index(arm), seed])

    def start(self, executor: LocalExecutor, planned: Planned, slot: int, facts: Mapping[str, Any]) -> Ended:
        if len(self.started) == self.dies_after:
            raise KeyboardInterrupt
        name = planned.arm, planned.unit[0]
        self.started.append(name)
        reason = self.fails.get(name, "")
        if reason and self.status == "absent":
            return Ended("failed", reason)
        run = planned.record(facts)
        state = self.status if reason else "finished"
        final = {} if reason or name in self.lacks else {"test/acc": self.accuracy(*name)}
        run.update_summary(status=state, reason=reason, final=final, elapsed_s=3600.0, steps=6)
        return Ended(state, reason)


def examined(examiner: Any, compose: Any, overrides: list[str], swept: Any, options: SweepOptions) -> Planned:
    """A job without the half second of composing and checking it, which tests/test_sweep.py is about."""
    typed = dict(o.split("=", 1) for o in overrides)
    arm, seed = typed["technique"].strip("[]"), int(typed["seed"])
    run = RunDirectory(Path(typed.get("exp_dir", "experiments")).resolve() / "synthetic" / f"{arm}-s{seed}")
    data = {"num_classes": 10, "task": "classification", "input_dim": 2, "input_channels": 3}
    config = {
        "seed": seed,
        "fresh": False,
        "metrics": ["acc"],
        "data": {**data, "module": {"name": "synthetic"}},
        "model": {"compile": False},
        "trainer": {"accumulate_grad_batches": 1},
    }
    facts = {
        "arm": arm,
        "seed": seed,
        "identity": arm,
        "kind": "k",
        "techniques": [arm],
        "resolved": [],
        "passes": 2.0 if arm == "powergrad" else 1.0,
    }
    planned = Planned(overrides, [], Job(run, config, overrides, facts, 6.0), "new")
    planned.refresh(options)
    return planned


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(planning, "examine", examined)
    monkeypatch.setattr(deciding, "examine", examined)
    monkeypatch.setattr(
        LocalExecutor,
        "start",
        lambda executor, planned, slot, facts: bench.start(executor, planned, slot, facts),
    )
    return bench


@pytest.fixture
def decide(cli: Callable[..., Outcome], bench: Bench) -> Callable[..., Outcome]:
    return lambda *arguments: cli("-m", *TINY, *DECIDED, *arguments)


def verdicts(outcome: Outcome) -> dict[str, str]:
    """The last that was said of each technique."""
    return dict(re.findall(r"^  (\w+): (.*)$", outcome.out, re.MULTILINE))


def plan_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("sweeps/plan-*.json")
    return json.loads(file.read_text())


def test_a_decided_arm_gets_no_more_seeds_and_the_report_says_what_the_sweep_said(
    decide: Callable[..., Outcome], cli: Callable[..., Outcome], bench: Bench, tmp_path: Path
) -> None:
    outcome = decide()
    assert outcome.status == 0, outcome.err
    first, then = bench.started[:9], bench.started[9:]
    assert first == [(arm, seed) for seed in range(3) for arm in ("powergrad", "baseline", "mixup")], (
        "all arms of a seed before the next, the longest first"
    )
    assert {arm for arm, _ in then} == {"baseline", "powergrad"}, "the arm that is decided gets no more"
    said = verdicts(outcome)
    assert said["mixup"].startswith("helps by more than 0.30 points (look 1 of 3, 3 seeds, p over all looks ")
    assert "look at 3 seeds, of 3, 5, 7" in outcome.out and "look at 5 seeds, of 3, 5, 7" in outcome.out
    plan = plan_in(tmp_path)
    assert (plan["planned_seeds"], plan["margin_points"], plan["decides"]["metric"]) == (
        [3, 5, 7],
        0.3,
        "test/acc",
    )
    assert plan["decides"]["seeds"] == list(range(7))
    assert set(plan["arms"]) == {"baseline", "mixup", "powergrad"}
    report = cli("runs=experiments", script="report.py").out
    assert all(f"{arm}: {verdict}" in report for arm, verdict in said.items())
    again = decide()
    assert again.status == 0 and verdicts(again) == said and bench.started == [*first, *then], (
        "nothing runs twice"
    )
    assert "nothing is left to run" in again.out


def test_a_sweep_that_was_killed_comes_to_the_same_decisions(
    decide: Callable[..., Outcome], bench: Bench, tmp_path: Path
) -> None:
    whole = decide("exp_dir=whole")
    expected, bench.started = sorted(bench.started), []
    for more in (4, 6, None):
        bench.dies_after = None if more is None else len(bench.started) + more
        outcome = decide("exp_dir=killed")
        assert outcome.status == (0 if more is None else 130)
    assert sorted(bench.started) == expected, "each run that the rule asks for once, and no other"
    assert verdicts(outcome) == verdicts(whole)


@pytest.mark.slow
def test_another_plan_for_the_same_runs_is_refused_in_one_line(
    decide: Callable[..., Outcome], bench: Bench, tmp_path: Path
) -> None:
    bench.dies_after = 1
    assert decide().status == 130
    before = sorted(tmp_path.rglob("*.json"))
    for option, words in {
        "looks=[3,5]": ["looks: [3, 5] here", "[3, 5, 7]"],
        "margin_points=0.5": ["margin_points: 0.5 here", "has 0.3"],
        "technique=baseline,mixup": ["technique: baseline,mixup here"],
        "budget_runs=20": ["a budget: budget_runs here", "has none"],
        "decided_by=val/acc": ["decided_by: val/acc here", "has test/acc"],
    }.items():
        outcome = decide(option)
        assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
        assert all(word in outcome.err for word in words) and "plan-" in outcome.err, outcome.err
    assert sorted(tmp_path.rglob("*.json")) == before and len(bench.started) == 1
    assert decide("seed=range(20,27)", "margin_points=0.5", "dry_run=true").status == 0, (
        "seeds that nobody has seen"
    )


@pytest.mark.parametrize("other", ["baseline,mixup", "baseline,mixup,sam,powergrad"])
def test_a_plan_is_of_its_techniques_whatever_they_are_called(
    decide: Callable[..., Outcome], bench: Bench, tmp_path: Path, other: str
) -> None:
    """All letters of sam are in baseline and mixup."""
    bench.dies_after = 7
    assert decide("technique=baseline,mixup,sam").status == 130
    outcome = decide(f"technique={other}")
    assert outcome.status == 2 and len(bench.started) == 7, outcome.out
    assert f"technique: {','.join(sorted(other.split(',')))} here" in outcome.err
    assert "has baseline,mixup,sam" in outcome.err and plan_in(tmp_path)["arms"] == [
        "baseline",
        "mixup",
        "sam",
    ]


def test_two_machines_that_plan_at_once_do_not_both_go_on(
    decide: Callable[..., Outcome], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dry(*arguments: str) -> str:
        outcome = decide(*arguments, "dry_run=true")
        assert outcome.status == 0, outcome.err
        return outcome.out

    dry("technique=baseline,mixup")
    prepare = deciding.Deciding.prepare.__func__  # type: ignore[attr-defined]

    def meanwhile(cls: Any, *arguments: Any) -> Any:
        mine = prepare(cls, *arguments)
        monkeypatch.setattr(deciding.Deciding, "prepare", classmethod(prepare))
        bench.dies_after = 1
        assert decide().status == 130
        return mine

    monkeypatch.setattr(deciding.Deciding, "prepare", classmethod(meanwhile))
    outcome = decide("technique=baseline,mixup")
    assert outcome.status == 2 and "technique: baseline,mixup here" in outcome.err
    assert set(plan_in(tmp_path)["arms"]) == {"baseline", "mixup", "powergrad"}, "one plan is left"
    assert len(bench.started) == 1


def test_runs_from_before_the_plan_are_not_looked_at(
    decide: Callable[..., Outcome], cli: Callable[..., Outcome]
) -> None:
    assert cli("-m", *TINY, "sweep=ablation", "technique=baseline,mixup", "seed=0").status == 0
    outcome = decide()
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1
    assert "mixup, seed 0 was run before this plan" in outcome.err and "'seed=range(7,14)'" in outcome.err
    assert decide("technique=baseline,powergrad", "dry_run=true").status == 0, "the baseline may be known"


def test_a_dry_run_shows_the_plan_and_writes_nothing(decide: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = decide("dry_run=true", "budget_runs=15")
    assert outcome.status == 0, outcome.err
    assert "9 of 9 runs to do" in outcome.out
    assert "2 techniques against baseline, by test/acc, margin 0.3 points" in outcome.out
    assert "looks at 3, 5 and 7 seeds, one arm at a time" in outcome.out
    assert "at most 21 runs, and budget_runs=15" in outcome.out
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("budget", "more"), [("budget_runs=12", "budget_runs=14"), ("budget_hours=12.5", "budget_hours=14")]
)
def test_a_budget_ends_it_between_two_looks_and_can_grow(
    decide: Callable[..., Outcome], bench: Bench, budget: str, more: str
) -> None:
    """A run of the bench takes an hour; after the first look of 9 runs powergrad's next step takes 4."""
    outcome = decide(budget)
    assert outcome.status == 0 and len(bench.started) == 9
    assert f"{budget}: 9 are used, and the next step, powergrad to 5 seeds, takes " in outcome.out
    assert verdicts(outcome)["powergrad"].startswith("undecided: between")
    assert decide(more).status == 0 and len(bench.started) == 13
    outcome = decide(budget)
    assert outcome.status == 0 and len(bench.started) == 13, "the plan has the first budget"
    name = budget.partition("=")[0]
    smaller = decide(f"{name}=11")
    assert smaller.status == 2 and "it can grow only" in smaller.err


def test_a_baseline_that_failed_pauses_the_sweep_and_can_be_dropped(
    decide: Callable[..., Outcome], bench: Bench, cli: Callable[..., Outcome]
) -> None:
    bench.fails["baseline", 1] = "diverged: train/loss is nan"
    outcome = decide("looks=[4,6]", "equal_time=true")
    assert outcome.status == 1 and len(bench.started) == 12, "no seed is spent beyond the look"
    assert "equal_time" not in outcome.out, "nor on a rival of what is not decided"
    assert (
        "paused before the next look" in outcome.err
        and "baseline, seed 1: the baseline's run diverged" in outcome.err
    )
    assert "drop_failed=true" in outcome.err
    report = cli("runs=experiments", script="report.py").out
    assert "mixup: unstable: 1 of 4 baseline runs diverged" in report
    outcome = decide("looks=[4,6]", "drop_failed=true")
    assert outcome.status == 0 and "dropped: baseline, seed 1" in outcome.out
    assert verdicts(outcome)["mixup"].startswith("helps by more than 0.30 points (look 1 of 2, 4 seeds")
    report = cli("runs=experiments", script="report.py").out
    assert f"mixup: {verdicts(outcome)['mixup']}" in report
    assert "baseline, seed 1: the sweep went on without this run" in report


def test_a_technique_that_diverges_is_unstable_and_one_that_fails_is_waited_for(
    decide: Callable[..., Outcome], bench: Bench
) -> None:
    bench.fails |= {("mixup", 1): "diverged: train/loss is nan", ("powergrad", 2): "the roof is on fire"}
    outcome = decide()
    assert outcome.status == 1 and len(bench.started) == 9
    assert "powergrad, seed 2: the roof is on fire" in outcome.err and "look at" not in outcome.out
    bench.fails.pop(("powergrad", 2))
    outcome = decide("retry_failed=true")
    assert verdicts(outcome)["mixup"] == "unstable: 1 of 3 runs diverged"
    assert "look at this: mixup, seed 1 diverged: train/loss is nan" in outcome.out
    assert bench.started.count(("mixup", 1)) == 1 and bench.started.count(("powergrad", 2)) == 2


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (
            "interrupted",
            "the same command goes on with what was interrupted",
        ),  # as where it is killed for its memory
        ("absent", "or never began"),  # as where a cluster takes no job
        ("failed", "retry_failed=true"),
    ],
)
def test_a_run_is_started_once_and_what_has_no_result_pauses_the_sweep(
    decide: Callable[..., Outcome], bench: Bench, tmp_path: Path, status: str, advice: str
) -> None:
    bench.status, bench.fails["mixup", 1] = status, "no reason in particular"
    outcome = decide(*["drop_failed=true"] * (status != "failed"))
    assert outcome.status == 1 and len(bench.started) == 9, outcome.out
    assert "mixup, seed 1: no reason in particular" in outcome.err and advice in outcome.err
    assert "dropped" not in outcome.out, "what may still end well is not given up"
    bench.fails.clear()
    outcome = decide(*["retry_failed=true"] * (status == "failed"))
    assert outcome.status == 0 and bench.started.count(("mixup", 1)) == 2
    assert verdicts(outcome)["mixup"].startswith("helps by more")


def test_a_dry_run_drops_nothing(decide: Callable[..., Outcome], bench: Bench, tmp_path: Path) -> None:
    bench.fails["powergrad", 2] = "the roof is on fire"
    assert decide().status == 1
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    outcome = decide("drop_failed=true", "dry_run=true")
    assert outcome.status == 0, outcome.err
    assert "to be dropped: powergrad, seed 2" in outcome.out and "look at 3 seeds" in outcome.out
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == before
    outcome = decide("drop_failed=true")
    assert outcome.out.startswith("dropped: powergrad, seed 2")
    assert sum(bool(summary_of(run).get("dropped")) for run in runs_in(tmp_path / "experiments")) == 1


def test_a_finished_run_without_the_metric_is_dropped_as_well_and_not_to_be_retried(
    decide: Callable[..., Outcome], bench: Bench
) -> None:
    bench.lacks.add(("powergrad", 2))
    outcome = decide("looks=[4,6]")
    assert outcome.status == 1 and "powergrad, seed 2: it has no test/acc" in outcome.err
    assert "retry_failed" not in outcome.err and "drop_failed=true" in outcome.err
    outcome = decide("looks=[4,6]", "drop_failed=true")
    assert outcome.status == 0 and outcome.out.count("dropped: powergrad, seed 2") == 1
    assert "powergrad" in verdicts(outcome)


def test_an_arm_that_always_fails_ends_at_the_first_look_and_takes_nobody_along(
    decide: Callable[..., Outcome], bench: Bench, cli: Callable[..., Outcome]
) -> None:
    bench.fails |= {("sam", seed): "it never works" for seed in range(7)}
    outcome = decide("technique=baseline,mixup,sam", "drop_failed=true")
    assert outcome.status == 0 and len(bench.started) == 9, "no seed beyond the first look"
    assert verdicts(outcome)["sam"] == "cannot say (0 pairs)"
    page = cli("runs=experiments", script="report.py").out
    assert "sam: cannot say (0 pairs)" in page and "differs from baseline also in" not in page


BAD = {
    "until=decide technique=baseline,mixup": ["until", "decided"],
    "looks=[5,8] technique=baseline,mixup": ["looks=[5, 8] is an option of until=decided", "planned_seeds"],
    "budget_runs=5 technique=baseline,mixup": ["budget_runs=5 is an option of until=decided"],
    "until=decided looks=[5] technique=baseline,mixup": ["looks=[5]", "at least two"],
    "until=decided looks=[8,5] technique=baseline,mixup": ["looks=[8, 5]", "ascending"],
    "until=decided looks=[2,5] technique=baseline,mixup": ["looks", "[3, inf)"],
    "until=decided seed=range(5) technique=baseline,mixup": ["seed=range(5): 5 seeds", "last look is at 20"],
    "until=decided seed=3 technique=baseline,mixup": ["seed=3: 1 seed,"],
    "until=decided data.module.fold=0,1 data.cv.k=2 technique=baseline,mixup": ["data.module.fold"],
    "until=decided planned_seeds=5 technique=baseline,mixup": ["planned_seeds=5", "looks="],
    "until=decided decided_by=test/acd technique=baseline,mixup": [
        "decided_by=test/acd",
        "did you mean test/acc",
    ],
    "until=decided metrics=[f1] technique=baseline,mixup": [
        "until=decided: test/acc decides",
        "metrics=['f1']",
    ],
    **{
        f"until=decided decided_by={name} technique=baseline,mixup": [
            f"decided_by: {name} decides",
            "does not log it",
        ]
        for name in ("test/mce", "test/acc_corrupted", "val_raw/acc", "test/acc_top5")
    },
    "until=decided metrics=[f1_per_class] decided_by=test/f1_per_class technique=baseline,mixup": [
        "decided_by: test/f1_per_class decides"
    ],
    "until=decided trainer.limit_test_batches=0 technique=baseline,mixup": ["trainer.limit_test_batches=0"],
    "until=decided looks=[3,4] data=synthetic,digits technique=baseline,mixup": [
        "data=synthetic,digits",
        "one data set",
    ],
    "until=decided looks=[3,4] data.module.name=a,b technique=baseline,mixup baseline='data.module.name=a'": [
        "data.module.name=a,b",
        "one data set",
    ],
    "until=decided test_after_training=false technique=baseline,mixup": ["decided_by=val/acc"],
    "until=decided budget_runs=30 budget_hours=2 technique=baseline,mixup": ["one budget"],
    "until=decided budget_hours=2 equal_time=true technique=baseline,mixup": ["equal_time=true"],
    "until=decided looks=[3,4] budget_runs=5 technique=baseline,mixup": ["budget_runs=5", "takes 6 runs"],
    "until=decided budget_hours=0 technique=baseline,mixup": ["budget_hours", "(0, inf)"],
    "until=decided fresh=true technique=baseline,mixup": ["fresh=true"],
    "until=decided retry_failed=true drop_failed=true technique=baseline,mixup": ["drop_failed=true"],
    "until=decided looks=[3,4] technique=baseline": ["a technique beside baseline"],
    "until=decided looks=[3,4] technique=mixup,sam": ["baseline=baseline"],
    "until=decided looks=[3,4] technique=baseline,mixupp": ["did you mean mixup"],
    "until=decided sweep=optuna model.lr=0.1,0.2": ["a search has no looks"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    cli: Callable[..., Outcome], tmp_path: Path, arguments: str
) -> None:
    if "optuna" in arguments:
        pytest.importorskip("optuna")
    outcome = cli("-m", *arguments.split(), *TINY)
    assert outcome.status == 2, outcome.out + outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for part in BAD[arguments]:
        assert part in outcome.err, outcome.err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.nightly  # CI sees two machines in tests/test_sweep.py, a kill above
def test_two_machines_and_a_kill_come_to_one_end(launch: Callable[..., Command], tmp_path: Path) -> None:
    command = ["-m", *TINY, "sweep=ablation", "technique=baseline,powergrad", "until=decided", "looks=[3,4]"]
    command += ["decided_by=val/loss"]
    killed = launch(*command)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(list(tmp_path.rglob("test_correct.npz"))) < 2:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    for run in runs_in(tmp_path / "experiments"):  # its process group has died with it, on this very machine
        RunDirectory(run).claim_file.unlink(missing_ok=True)
    both = [process.outcome(300) for process in [launch(*command) for _ in range(2)]]
    assert [outcome.status for outcome in both] == [0, 0], both[0].err + both[1].err
    assert verdicts(both[0]) == verdicts(both[1]) != {}
    runs = runs_in(tmp_path / "experiments" / "synthetic")
    looked = 3 if "look 1" in verdicts(both[0])["powergrad"] else 4
    assert len(runs) == 2 * looked, "no run that was not asked for"
    summaries = [summary_of(run) for run in runs]
    assert all(s["status"] == "finished" for s in summaries)
    assert len({s["sweep"]["created"] for s in summaries}) == 1, "one plan"
