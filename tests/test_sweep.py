"""Sweeps: what is planned, what is skipped, resumed or retried, and each engine started for real."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, Command, Outcome, runs_in, summary_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from record import composed_for
from scipy import stats

from crucible.options import ConfigError
from crucible.run import Damaged, RunDirectory
from lab import executors, planning, sweeps
from lab.cluster import hide_secrets
from lab.executors import LocalExecutor, Work
from lab.experiment import Examiner, Job
from lab.planning import Planned, SweepOptions, combine, expand
from lab.processes import HELD
from lab.remote import SAVE_S, ClusterJob, RemoteJob
from lab.sweeps import stretch

EXTRA = pytest.importorskip  # a machine without the extra skips visibly


def grid(*overrides: str, design: str | None = None) -> planning.Grid:
    return expand(OverridesParser.create().parse_overrides(list(overrides)), design)


# what is planned


@pytest.mark.slow
def test_the_seeds_of_an_arm_are_the_runs_that_they_are_one_by_one(tmp_path: Path) -> None:
    """Composed and checked once where the seed is a number in some places; each where a name is made of it, or
    a value that the run is named by."""
    arms = [
        ["technique=baseline"], ["technique=[mixup,sam]", "model.lr=0.01"], ["arm=own-${seed}"],
        ["data.module.split_seed=${seed}"],
    ]  # fmt: skip
    common = [*TINY, f"exp_dir={tmp_path}"]
    jobs = [[f"seed={seed}", *common, *arm] for seed in (0, 3, 11) for arm in arms]
    composed: list[list[str]] = []

    def compose(overrides: Any) -> Any:
        composed.append(list(overrides))
        return composed_for(list(overrides))

    examiner, swept = Examiner(), ("seed", "technique", "model.lr")
    for overrides in jobs:
        job = examiner.examine_job(compose, overrides, swept)
        alone = Examiner().examine(composed_for(overrides), overrides, swept)
        assert job.run.path == alone.run.path
        assert replace(job, run=alone.run) == alone
    assert [job[-1] for job in composed] == [
        "technique=baseline", "model.lr=0.01", *(2 * ["arm=own-${seed}", "data.module.split_seed=${seed}"]),
        "arm=own-${seed}", "data.module.split_seed=${seed}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="seed must be"):
        examiner.examine_job(compose, ["seed=99999999999", *common, *arms[0]], swept)


def test_all_arms_of_a_seed_come_before_the_next_seed() -> None:
    planned = grid(
        "model=resnet", "technique=baseline,[powergrad,mixup]", "seed=range(2)", "model.lr=0.1,0.2"
    )
    assert planned.swept == ["technique", "seed", "model.lr"]
    assert [" ".join(job) for job in planned.jobs] == [
        f"seed={seed} model=resnet technique={technique} model.lr={lr}"
        for seed in (0, 1)
        for technique in ("baseline", "[powergrad,mixup]")
        for lr in (0.1, 0.2)
    ]


@pytest.mark.parametrize(
    ("design", "arms"),
    [
        ("one_at_a_time", ["baseline", "[a]", "[b]", "[c]"]),
        ("pairs", ["baseline", "[a]", "[b]", "[c]", "[a,b]", "[a,c]", "[b,c]"]),
        ("leave_one_out", ["baseline", "[a,b,c]", "[a,b]", "[a,c]", "[b,c]"]),
    ],
)
@pytest.mark.parametrize("typed", [["baseline", "a", "b", "c"], ["[a,b,c]"], ["a", "[b, c]", "b"]])
def test_a_design_combines_the_techniques_that_are_named(
    design: str, arms: list[str], typed: list[str]
) -> None:
    assert combine(typed, design) == arms


def test_a_longer_run_has_its_schedule_stretched_with_it() -> None:
    config = {
        "trainer": {"max_epochs": 10, "max_steps": -1},
        "model": {
            "warmstart": 2,
            "cooldown": 0,
            "lr_milestones": [5, 8],
            "lr_step_size": None,
            "lr_restarts": None,
        },
    }
    assert stretch(config, 2.03) == [
        "trainer.max_epochs=20", "model.warmstart=4.06", "model.lr_milestones=[10.15, 16.24]",
    ]  # fmt: skip


def test_step_times_are_compared_by_seed_on_one_device(tmp_path: Path) -> None:
    def run(name: str, seconds: float, steps: int, device: str = "gpu") -> RunDirectory:
        directory = RunDirectory(tmp_path / name)
        directory.record({}, [])
        directory.update_summary(wall_time_s=seconds, steps=steps, device=device)
        return directory

    pairs = [
        (run("a", 10, 100), run("b", 40, 200)),  # 2
        (run("c", 10, 100), run("d", 80, 100)),  # 8
        (run("e", 10, 100), run("f", 900, 100, "another")),
    ]
    assert sweeps.step_time_ratio(pairs) == pytest.approx((4.0, 4.0)), "two pairs have no interval"
    third = sweeps.step_time_ratio([*pairs[:2], (run("g", 10, 100), run("h", 40, 100))])
    logs = np.log([2, 8, 4])
    low = stats.ttest_1samp(logs, 0).confidence_interval(0.95).low
    assert third == pytest.approx((4.0, np.exp(low)))
    assert sweeps.step_time_ratio(pairs[2:]) is None


def planned_run(folder: Path, **config: Any) -> Planned:
    options = {"seed": 0, "fresh": False, "data": {"module": {}}, **config}
    job = Job(RunDirectory(folder), options, [], {"arm": "baseline", "kind": "k", "identity": "i"}, 100.0)
    return Planned([], [], job, "new")


def test_the_state_of_a_run_says_what_is_to_be_done(tmp_path: Path) -> None:
    planned = planned_run(tmp_path / "run")
    run = planned.job.run  # type: ignore[union-attr]

    def state(**options: Any) -> str:
        planned.refresh(SweepOptions(**options))
        return planned.state

    assert state() == "new"
    run.record({}, [])
    for status in ("created", "running", "interrupted", "pruned"):
        run.update_summary(status=status)
        assert state() == "resume", status
    run.update_summary(status="failed", reason="the roof")
    assert state() == "failed" and planned.reason == "the roof"
    assert state(retry_failed=True) == "retry"
    run.update_summary(status="finished")
    assert state(retry_failed=True) == "finished"
    run.claim_file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert state() == "held" and "elsewhere" in planned.reason


def test_time_left_is_that_of_the_arms_own_runs_else_of_its_kind(tmp_path: Path) -> None:
    for name, identity, seconds in (("a", "other", 50.0), ("b", "other", 70.0)):
        run = RunDirectory(tmp_path / name)
        run.record({}, [])
        run.update_summary(status="finished", kind="k", identity=identity, steps=100, elapsed_s=seconds)
    measured = planning.Measured()
    planned = planned_run(tmp_path / "new")
    assert measured.seconds(planned) == pytest.approx(60)
    run = RunDirectory(tmp_path / "c")
    run.record({}, [])
    run.update_summary(status="finished", kind="k", identity="i", steps=50, elapsed_s=10.0)
    measured.forget()
    assert measured.seconds(planned) == pytest.approx(20)
    assert measured.bytes(planned) > 0  # type: ignore[operator]
    planned.job.facts["kind"] = "unheard of"  # type: ignore[union-attr, index]
    assert measured.seconds(planned) is None


@pytest.mark.parametrize("recorded", [True, False])
def test_a_dry_run_knows_that_sam_takes_two_passes(
    cli: Callable[..., Outcome], tmp_path: Path, recorded: bool
) -> None:
    """From a finished run of the plain arm: SAM's takes twice as long, every fifth step of it a fifth longer."""
    assert cli(*TINY, "trainer.max_epochs=1").status == 0
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    assert summary["passes"] == 1
    if not recorded:
        del summary["passes"]
    (run / "summary.json").write_text(json.dumps({**summary, "elapsed_s": 20.0}))
    out = cli(
        "-m", *TINY, "trainer.max_epochs=1", "technique=baseline,sam,sam_every_5", "seed=1", "dry_run=true"
    ).out
    times = {line.split()[0]: line.split()[-2] for line in out.splitlines() if line.endswith(" s")}
    assert times == {"baseline": "20", "sam": "40", "sam_every_5": "24"}, out


def compile_settled(folder: Path, on: bool | None, automatic: bool = True) -> Planned:
    planned = planned_run(folder, model={"compile": bool(on)})
    planned.job.facts["resolved"] = [f"compile {'on' if on else 'off'}"] if automatic else []  # type: ignore[union-attr, index]
    return planned


@pytest.mark.parametrize(
    ("automatic", "typed", "again"),
    [
        ([True, False, True], [], [0, 2]),
        ([True, True], [False], []),
        ([False], [True], []),
        ([], [True, False], []),
    ],
)
def test_compile_is_settled_once_a_sweep(
    tmp_path: Path, automatic: list[bool], typed: list[bool], again: list[int]
) -> None:
    """Off for all where it came out on for some only; what was typed stays."""
    planned = [compile_settled(tmp_path / f"a{i}", on) for i, on in enumerate(automatic)]
    planned += [compile_settled(tmp_path / f"t{i}", on, automatic=False) for i, on in enumerate(typed)]
    off = planned_run(tmp_path / "off")
    asked: list[list[str]] = []
    settled = list(planning._compiled_alike(planned, lambda overrides: asked.append(overrides) or off))
    assert asked == [["model.compile=false"]] * len(again)
    assert [i for i, one in enumerate(settled) if one is off] == again


def test_runs_that_differ_by_compile_are_not_of_one_kind() -> None:
    from lab.experiment import kind

    eager = yaml.safe_load((ROOT / "tests/recorded_runs/plain/config.yaml").read_text())
    compiled = {**eager, "model": {**eager["model"], "compile": True}}
    assert kind(compiled) != kind(eager)


def test_step_times_of_compiled_runs_are_not_compared_with_others(tmp_path: Path) -> None:
    def run(name: str, seconds: float, compiled: bool) -> RunDirectory:
        directory = RunDirectory(tmp_path / name)
        directory.record({"model": {"compile": compiled}}, [])
        directory.update_summary(wall_time_s=seconds, steps=100, device="gpu")
        return directory

    pairs = [(run("a", 10, False), run("b", 5, True)), (run("c", 10, True), run("d", 20, True))]
    assert sweeps.step_time_ratio(pairs) == pytest.approx((2.0, 2.0))
    assert sweeps.step_time_ratio(pairs[:1]) is None


def test_equal_time_that_adds_no_rival_says_why(tmp_path: Path) -> None:
    def finished(arm: str, seed: int, seconds: float, device: str = "gpu") -> Planned:
        planned = planned_run(tmp_path / f"{arm}-{seed}", seed=seed)
        planned.job.facts["arm"], planned.state = arm, "finished"  # type: ignore[union-attr, index]
        planned.job.run.record({}, [])  # type: ignore[union-attr]
        planned.job.run.update_summary(wall_time_s=seconds, steps=100, device=device)  # type: ignore[union-attr]
        return planned

    options = SweepOptions(baseline="baseline", equal_time=True)
    planned = [finished("baseline", s, 10) for s in (0, 1)]
    assert sweeps.why_none(planned, options) == "no arm but baseline has finished"
    planned += [finished("mixup", s, 10.2) for s in (0, 1)] + [finished("sam", 0, 20, "another")]
    assert sweeps.rivals(lambda overrides: None, planned, options) == {}  # type: ignore[arg-type, return-value]
    why = sweeps.why_none(planned, options)
    assert "no arm's steps surely take over 1.05 times as long: mixup 1.02 (at least 1.02)" in why
    assert "no pair of finished runs on one device, compiled alike, of sam" in why


def test_trackers_group_a_sweeps_runs_by_arm_and_design(tmp_path: Path) -> None:
    from lab.tasks import logger_facts

    run = RunDirectory(tmp_path / "run")
    run.record({}, [])
    run.update_summary(arm="mixup+sam", sweep={"design": "pairs"})
    config = {"data": {"module": {"name": "digits"}}, "techniques": {"mixup": {}, "sam": {}}}
    facts = logger_facts(run, config)
    assert (facts["group"], facts["job_type"]) == ("digits/mixup+sam", "pairs")
    assert facts["tags"] == ["mixup+sam", "mixup", "sam", "pairs"]


# running


class FakeHandle:
    def __init__(self, steps: int, outcome: tuple[str, str]) -> None:
        self.steps, self.result, self.signals = steps, outcome, list[int]()

    def ended(self, timeout: float) -> bool:
        self.steps -= 1
        return self.steps <= 0 or bool(self.signals)

    def outcome(self) -> tuple[str, str]:
        return ("interrupted", "") if self.signals else self.result

    def signal(self, number: int) -> None:
        self.signals.append(number)


class FakeExecutor:
    slots = 2

    def __init__(self, outcomes: list[tuple[str, str]]) -> None:
        self.outcomes, self.handles, self.at_once = outcomes, list[FakeHandle](), 0

    def describe(self) -> str:
        return "nowhere"

    def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> FakeHandle:
        running = sum(handle.steps > 0 and not handle.signals for handle in self.handles)
        self.at_once = max(self.at_once, running + 1)
        self.handles.append(FakeHandle(3 + slot, self.outcomes[len(self.handles)]))
        return self.handles[-1]


def test_as_many_at_once_as_there_is_room_for_and_a_failure_ends_nothing(tmp_path: Path) -> None:
    todo = [planned_run(tmp_path / str(i)) for i in range(5)]
    executor = FakeExecutor(
        [("finished", ""), ("failed", "fire"), ("held", ""), ("finished", ""), ("finished", "")]
    )
    ended: list[str] = []
    Work(executor, {}, lambda planned: ended.append(planned.state)).run(iter(todo))
    assert executor.at_once == 2
    assert sorted(ended) == ["failed", "finished", "finished", "finished", "held"]
    assert [planned.state for planned in todo] == ["finished", "failed", "held", "finished", "finished"]


def test_a_run_that_cannot_be_begun_or_read_ends_no_other(tmp_path: Path) -> None:
    todo = [planned_run(tmp_path / str(i)) for i in range(5)]
    bad = Damaged(tmp_path / "summary.json", "is empty", "fresh=true trains it anew")

    class Handle(FakeHandle):
        def outcome(self) -> tuple[str, str]:
            raise bad

    class Executor(FakeExecutor):
        def start(self, planned: Planned, slot: int, facts: Mapping[str, Any]) -> FakeHandle:
            if planned is todo[1]:
                raise bad
            if planned is todo[2]:
                raise PermissionError(13, "Permission denied")
            handle = super().start(planned, slot, facts)
            return Handle(1, ("", "")) if planned is todo[3] else handle

    ended: list[Planned] = []
    Work(Executor([("finished", "")] * 5), {}, ended.append).run(iter(todo))
    assert [one.state for one in todo] == ["finished", "failed", "failed", "failed", "finished"]
    assert len(ended) == 5 and "summary.json" in todo[1].reason and "Permission denied" in todo[2].reason


def test_a_signal_is_handed_on_and_nothing_more_is_started(tmp_path: Path) -> None:
    todo = [planned_run(tmp_path / str(i)) for i in range(5)]
    executor = FakeExecutor([("finished", "")] * 5)
    executor.slots = 3

    def following() -> Iterator[Planned]:
        yield from todo[:2]
        os.kill(os.getpid(), signal.SIGINT)
        yield from todo[2:]

    before = signal.getsignal(signal.SIGINT)
    work = Work(executor, {}, lambda planned: None)
    work.run(following())
    assert work.received == [signal.SIGINT]
    assert all(handle.signals == [signal.SIGINT] for handle in executor.handles)
    assert len(executor.handles) <= 3 and signal.getsignal(signal.SIGINT) is before


def test_each_run_at_once_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "device_kind", lambda accelerator: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    trainer = {"devices": 2, "accelerator": "auto"}
    executor = LocalExecutor("auto", trainer)
    assert executor.slots == 2
    assert [executor._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4,5", "6,7"]
    assert "sharing 4 GPUs" in LocalExecutor(3, trainer).describe()
    with pytest.raises(ConfigError, match=r"trainer\.devices"):
        LocalExecutor(2, {"devices": [0], "accelerator": "auto"})


BAD = {
    "-m technique=baseline,mixup design=pair": ["design", "did you mean pairs"],
    "-m technique=mixup,sam design=pairs,leave_one_out": ["design", "one value"],
    "-m technique=baseline,mixup design=pairs": ["design=pairs", "2 techniques"],
    "-m seed=0,1 design=one_at_a_time": ["design=one_at_a_time", "technique="],
    "-m model.lr=interval(0.1,0.2)": ["model.lr", "sweep=optuna"],
    "-m technique=mixup,sam sweep=ablation": ["baseline=baseline", "mixup", "sam"],
    "-m technique=mixup,sam equal_time=true": ["baseline=baseline", "mixup"],
    "-m seed=0,1 n_jobs=0": ["n_jobs", "0"],
    "-m seed=0,1 margin_points=-1": ["margin_points", "(0, 100)"],
    "-m model.lr=-1,-1": ["model.lr", "-1"],
    "-m technique=mixupp,mixupp": ["technique=mixupp", "did you mean mixup"],
    "-m seed=0,1 sweep=submitit cluster.partitoin=x": ["cluster.partitoin"],
    "-m seed=0,1 sweep=submitit trainer.num_nodes=2": ["trainer.num_nodes=2"],
    "-m seed=0,1 sweep=submitit trainer.devices=[0,1]": ["trainer.devices=[0,1]", "trainer.devices=2"],
    "-m seed=0,1 sweep=ray trainer.devices=[1]": ["trainer.devices=[1]", "trainer.devices=1"],
    "-m seed=0,1 sweep=ray trainer.devices='0,1'": ["trainer.devices=0,1", "trainer.devices=2"],
    "-m seed=0,1 sweep=submitit cluster.timeout_min=2": [
        "cluster.signal_delay_s=120",
        "cluster.timeout_min=2",
    ],
    "-m seed=0,1 sweep=ray ray.gpu=1": ["ray.gpu"],
    "-m seed=0,1 sweep=ray ray.cpus=-1": ["ray.cpus", "-1"],
    "-m seed=0,1 sweep=[submitit,ray]": ["sweep=[submitit,ray]", "one engine"],
    "-m seed=0,1 sweep=submitit n_jobs=2": ["n_jobs=2", "cluster.jobs_at_once"],
    "-m sweep=optuna": ["nothing is swept"],
    "-m sweep=optuna seed=0,1": ["seed"],
    "-m sweep=optuna model.lr=0.1,0.2 search.metric=test/acc": ["search.metric=test/acc"],
    "-m sweep=optuna model.lr=0.1,0.2 search.pruner=mean": ["search.pruner", "median"],
    "-m sweep=optuna n_jobs=2 trainer.devices=1,2": ["trainer.devices", "equally many"],
    "-m sweep=optuna model.lr=0.1,0.2 equal_time=true": ["equal_time"],
    "design=pairs": ["design", "-m"],
    "dry_run=true": ["dry_run", "-m"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    cli: Callable[..., Outcome], tmp_path: Path, arguments: str
) -> None:
    outcome = cli(*arguments.split(), *TINY)
    assert outcome.status == 2, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for part in BAD[arguments]:
        assert part in outcome.err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("engine", ["submitit", "optuna", "ray"])
def test_a_missing_extra_is_named(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found(name, *rest) if name != engine else None
    )
    outcome = cli("-m", f"sweep={engine}", "model.lr=0.1,0.2", *TINY)
    extra = "ray" if engine == "ray" else "sweeps"
    assert outcome.status == 2 and f".[{extra}]" in outcome.err and f"sweep={engine}" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["n_jobs=2"], "2 at once"),
        (["sweep=submitit", "cluster.executor=local"], "jobs of this machine"),
        (["cluster.partition=other"], "cluster.partition=other: no such option"),
    ],
)
def test_what_a_machine_says_of_its_cluster_makes_no_sweep_one_of_it(
    cli: Callable[..., Outcome], tmp_path: Path, typed: list[str], told: str
) -> None:
    if "sweep=submitit" in typed:
        pytest.importorskip("submitit")
    local = tmp_path / "mine" / "cli_configs" / "local" / "default.yaml"
    local.parent.mkdir(parents=True)
    local.write_text(
        "# @package _global_\ncluster: {partition: gpu}\nray: {address: auto}\nsearch: {study: mine}\n"
    )
    outcome = cli("-m", f"user_dir={tmp_path}/mine", "model.lr=0.1,0.2", *TINY, "dry_run=true", *typed)
    assert told in outcome.out + outcome.err


@pytest.mark.slow
def test_a_dry_run_says_what_would_run_and_writes_nothing(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    arguments = [
        "-m",
        *TINY,
        "model=resnet",
        "technique=powergrad,mixup,group_norm,layer_norm",
        "design=pairs",
        "seed=range(2)",
    ]
    outcome = cli(*arguments, "dry_run=true", "sweep=ablation")
    assert outcome.status == 0, outcome.err
    lines = {line.split("  ")[0].strip(): line for line in outcome.out.splitlines()}
    assert {"baseline", "powergrad", "mixup+powergrad", "group_norm+mixup"} <= set(lines)
    assert "0-1" in lines["mixup+powergrad"]
    assert "20 of 20 runs to do" in outcome.out, outcome.out
    assert "impossible" in outcome.out and "model.norm" in outcome.out, "two norms"
    same = cli(
        "-m", "technique=baseline,powergrad", "model.powergrad_alpha=1.0,0.3", *TINY, "dry_run=true"
    ).out
    assert "2 of 2 runs to do" in same and "same run: technique=powergrad model.powergrad_alpha=1.0" in same
    assert not list(tmp_path.rglob("*.json"))


def test_the_yaml_files_state_the_defaults() -> None:
    from lab.cluster import ClusterOptions
    from lab.ray_engine import RayOptions
    from lab.search import SearchOptions

    def stated(name: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "cli_configs" / name).read_text())

    train = stated("train.yaml")
    assert {name: train[name] for name in asdict(SweepOptions())} == asdict(SweepOptions())
    assert stated("sweep/submitit.yaml")["cluster"] == asdict(ClusterOptions())
    assert stated("sweep/ray.yaml")["ray"] == asdict(RayOptions())
    assert stated("sweep/optuna.yaml")["search"] == asdict(SearchOptions())


# for real


@pytest.fixture
def start(launch: Callable[..., Command]) -> Callable[..., Command]:
    """Start a sweep of tiny runs."""
    return lambda *arguments, **options: launch("-m", *TINY, *arguments, **options)


def starts_of(run: Path) -> int:
    """How often the run was begun, by its log."""
    return (run / "main.log").read_text().count(" run: ")


def sweeps_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.rglob("sweeps/*/sweep.json"))]


@pytest.mark.slow
def test_two_machines_share_an_ablation_and_slower_arms_get_their_rival(start, tmp_path: Path) -> None:
    command = [
        "sweep=[ablation,joblib]",
        "n_jobs=2",
        "technique=baseline,sam",
        "seed=0",
        "equal_time=true",
    ]
    command += ["trainer.max_epochs=4", "planned_seeds=5", "margin_points=0.5", "data.module.num_samples=400"]
    both = [process.outcome(580) for process in [start(*command) for _ in range(2)]]
    assert [outcome.status for outcome in both] == [0, 0], both[0].err + both[1].err
    runs = runs_in(tmp_path / "experiments" / "synthetic")
    assert [starts_of(run) for run in runs] == [1] * len(runs), "nothing runs twice"
    summaries = [summary_of(run) for run in runs]
    assert all(s["status"] == "finished" for s in summaries)
    arms = {s["arm"] for s in summaries}
    (rival,) = (arm for arm in arms if arm.startswith("baseline_x"))
    assert arms == {"baseline", "sam", rival}
    config = RunDirectory(next(run for run in runs if summary_of(run)["arm"] == rival)).config()
    ratio = float(rival.removeprefix("baseline_x"))
    assert ratio > 1.2 and config["trainer"]["max_epochs"] == round(4 * ratio)
    assert config["model"]["warmstart"] == pytest.approx(ratio, abs=1e-3)
    assert not list(tmp_path.rglob("best.ckpt")), "an ablation scores the last epoch"
    record = sweeps_in(tmp_path)[0]
    assert (record["margin_points"], record["planned_seeds"], record["baseline"]) == (0.5, 5, "baseline")
    assert record["rivals"] == {"sam": rival}
    of_runs = {
        (tmp_path / "experiments/sweeps" / record["folder"] / run["run"]).resolve() for run in record["runs"]
    }
    assert of_runs and of_runs <= set(runs), (
        "named from the sweep's folder: what is moved, or published, still fits"
    )
    assert {s["sweep"]["folder"] for s in summaries} <= {r["folder"] for r in sweeps_in(tmp_path)}
    assert {Path(run["run"]).name for run in record["runs"]} == {run.name for run in runs}
    assert summaries[0]["sweep"]["margin_points"] == 0.5
    again = start(*command).outcome()
    assert again.status == 0 and "nothing is left to run" in again.out
    assert [starts_of(run) for run in runs] == [1] * len(runs)


@pytest.mark.slow
def test_failures_are_listed_and_retried_when_asked_and_ctrl_c_loses_nothing(start, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "bomb.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Bomb(Callback):\n"
        "    def on_train_epoch_start(self, trainer, pl_module):\n"
        "        if pl_module.seed == 1 and trainer.current_epoch == 1 and Path('bomb').exists():\n"
        "            raise RuntimeError('the roof is on fire')\n"
    )
    (tmp_path / "bomb").touch()
    bomb = ["user_dir=mine", "+callbacks.bomb._target_=bomb.Bomb", "seed=0,1,2", "trainer.max_epochs=3"]
    first = start(*bomb, "n_jobs=2", real=True).outcome()
    assert first.status == 1
    assert "1 of the sweep's jobs did not finish" in first.err and "the roof is on fire" in first.err
    statuses = {
        s["seed"]: s["status"] for s in map(summary_of, runs_in(tmp_path / "experiments" / "synthetic"))
    }
    assert statuses == {0: "finished", 1: "failed", 2: "finished"}
    again = start(*bomb).outcome()
    assert again.status == 1 and "0 of 3 runs to do" in again.out and "retry_failed=true" in again.err
    (tmp_path / "bomb").unlink()
    retried = start(*bomb, "retry_failed=true").outcome()
    assert retried.status == 0, retried.err
    runs = runs_in(tmp_path / "experiments" / "synthetic")
    assert all(summary_of(run)["status"] == "finished" for run in runs)
    assert "resumes: " in (next(r for r in runs if r.name.endswith("s1")) / "main.log").read_text()


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_and_the_same_command_goes_on(start, tmp_path: Path) -> None:
    command = ["seed=range(3)", "n_jobs=2", "trainer.max_epochs=40", "checkpoint.every_steps=2"]
    process = start(*command)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(list(tmp_path.rglob("last.ckpt"))) < 2:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    stopped = process.outcome(100)
    assert stopped.status == 130 and "0 of 3 runs are finished" in stopped.out + stopped.err, stopped
    runs = runs_in(tmp_path / "experiments" / "synthetic")
    assert [summary_of(run)["status"] for run in runs] == ["interrupted"] * 2
    assert not list(tmp_path.rglob("claim"))
    planned = start(*command, "dry_run=true").outcome().out
    assert "to resume" in planned and "3 of 3 runs to do" in planned


@pytest.mark.nightly  # the real SLURM of tests/test_slurm.py warns its jobs in CI
def test_a_job_of_submitit_survives_its_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = EXTRA("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        *TINY,
        "trainer.max_epochs=12",
        "checkpoint.every_steps=2",
    ]
    executor = submitit.AutoExecutor(tmp_path / "submitit", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(ClusterJob(RemoteJob(command, {}, str(tmp_path / "record.json"), SAVE_S, HELD)))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.05)
    os.kill(child_of(job), signal.SIGUSR2)
    warned = datetime.now()
    assert job.result() == 0
    said = job.paths.stdout.read_text()
    queued = datetime.fromisoformat(re.search(r"\((\S+ \S+)\) - Requeued job", said)[1])  # type: ignore[index]
    assert (queued - warned).total_seconds() < SAVE_S / 2, "it ends as soon as its state is saved"
    (run,) = runs_in(tmp_path / "experiments")
    log = (run / "main.log").read_text()
    assert summary_of(run)["status"] == "finished"
    assert log.count(" run: ") == 2 and "resumes: " in log


def child_of(job: Any) -> int:
    """The process in which submitit's local controller runs the job."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", job.job_id], capture_output=True, text=True, check=True
    )
    return int(listed.stdout.split()[0])


def test_a_password_of_a_searchs_database_is_in_no_file_that_others_can_read(tmp_path: Path) -> None:
    """submitit hands a job over in a pickle, which has to hold it"""
    for name, storage, hidden in (
        ("open", "sqlite:///search.db", False),
        ("closed", "postgresql://user:secret@host/db", True),
    ):
        hide_secrets(tmp_path / name / "submitit", {"study": "s", "storage": storage, "trial": 0})
        assert (tmp_path / name / "submitit").exists() == hidden
    assert (tmp_path / "closed" / "submitit").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_jobs_of_submitit_are_recorded_as_those_of_a_sweep(start, tmp_path: Path) -> None:
    EXTRA("submitit")
    outcome = start(
        "sweep=submitit", "cluster.executor=local", "model.lr=0.01,-1", "technique=baseline,mixup"
    ).outcome()
    said = outcome.out + outcome.err
    assert outcome.status == 1 and said.count("model.lr must be in") >= 2, said
    summaries = [summary_of(run) for run in runs_in(tmp_path / "experiments" / "synthetic")]
    assert {s["arm"] for s in summaries} == {"lr=0.01", "mixup lr=0.01"}
    assert all(s["status"] == "finished" and s["sweep"]["folder"] for s in summaries)
    (record,) = sweeps_in(tmp_path)
    assert sorted(run["state"] for run in record["runs"]) == ["finished", "finished", "refused", "refused"]


@pytest.mark.parametrize(
    ("options", "aim"),
    [
        ("checkpoint.monitor=val/acc", "maximize val/acc"),
        ("checkpoint.monitor=val/loss", "minimize val/loss"),
        ("checkpoint.mode=min", "minimize val/acc"),
        ("checkpoint.mode=min search.metric=val/f1", "maximize val/f1"),
        ("checkpoint.mode=min search.direction=maximize", "maximize val/acc"),
    ],
)
def test_a_search_takes_the_better_way_of_its_metric_or_the_mode_of_the_monitor(cli, options, aim) -> None:
    EXTRA("optuna")
    outcome = cli("-m", "sweep=optuna", "model.lr=0.1,0.2", "dry_run=true", *options.split(), *TINY)
    assert outcome.status == 0 and f": {aim}," in outcome.out, outcome.err


@pytest.mark.slow
def test_two_processes_share_a_study_and_the_pruner_ends_bad_trials(start, tmp_path: Path) -> None:
    optuna = EXTRA("optuna")
    command = [
        "sweep=optuna", "model.lr=1e-7,1e-6,0.02,0.03", "model.label_smoothing=interval(0, 0.1)", "search.n_trials=6",
        "search.study=shared", "search.sampler=random", "trainer.max_epochs=3", "data.module.num_samples=200",
    ]  # fmt: skip
    both = [process.outcome(580) for process in [start(*command) for _ in range(2)]]
    assert [outcome.status for outcome in both] == [0, 0], both[0].err + both[1].err
    folder = tmp_path / "experiments" / "searches" / "shared"
    study = optuna.load_study(study_name="shared", storage=f"sqlite:///{folder / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert 6 <= len(states) <= 7, "one more at most, by the process that asked at the same moment"
    assert set(states) <= {"COMPLETE", "PRUNED"}
    for trial in study.trials:
        summary = summary_of(Path(trial.user_attrs["run"]))
        assert summary["status"] == ("finished" if trial.state.name == "COMPLETE" else "pruned")
        if trial.state.name == "COMPLETE":
            assert trial.value == pytest.approx(summary["final"]["val/acc"])
        assert len(trial.intermediate_values) == summary["epochs"]
    assert study.best_trial.user_attrs["run"] in both[0].out + both[1].out
    runs = [trial.user_attrs["run"] for trial in study.trials]
    assert len(set(runs)) == len(runs), "no two trials are one run"
    recorded = json.loads((folder / "search.json").read_text())["trials"]
    assert {(folder / trial["run"]).resolve() for trial in recorded} <= set(map(Path, runs)), (
        "from its own folder"
    )
    start(*command).outcome()
    assert len(optuna.load_study(study_name="shared", storage=study._storage).trials) == len(states)
    shutil.rmtree(folder)
