"""Every command and hint that the report prints is executed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import TINY, Outcome, nightly, runs_in, summary_of

import report
from lab import sweeps
from lab.planning import Planned

Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps whose runs are recorded as finished with made-up results, not trained."""

    def finish(self: sweeps.Sweep, planned: list[Planned]) -> int:
        for number, one in enumerate(planned):
            if one.job is not None:
                run = one.job.record()
                final = {"test/acc": 0.8 + 0.001 * (number * 7 % 11)}
                run.update_summary(status="finished", final=final, steps=10, wall_time_s=1.0)
        self.record.write()
        return 0

    monkeypatch.setattr(sweeps.Sweep, "run", finish)


def commands_of(text: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]


def execute(cli: Cli, command: str, *further: str) -> Outcome:
    """What a shell makes of a printed `python main.py ...`."""
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    return cli(*arguments, *further)


SWEPT: Mapping[str, list[str]] = {
    "techniques": ["sweep=ablation", "technique=baseline,mixup,[mixup,sam]"],
    "a design": ["sweep=ablation", "technique=mixup,sam", "design=pairs"],
    "options": ["sweep=ablation", "baseline='lr=0.1'", "model.lr=0.1,0.02", "technique=baseline,mixup"],
    "a list and a text": ["technique=mixup", "model.nesterov=true,false", "data.module.batch_size=16,8"],
    "folds": [
        "sweep=[ablation,joblib]",
        "n_jobs=2",
        "technique=baseline,mixup",
        "data.module.fold=0,1",
        "data.cv.k=3",
    ],
}


@pytest.mark.parametrize(
    "swept",
    [
        pytest.param("techniques", marks=pytest.mark.slow),
        *nightly("options", "a design", "a list and a text", "folds"),
    ],
)
def test_the_commands_of_the_page_make_the_runs_of_the_page(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: None, swept: str
) -> None:
    """All of them: the sweep's own, and each arm's alone, with the same run ids and the same arms."""
    done = cli("-m", *TINY, *SWEPT[swept], "seed=0,1")
    assert done.status == 0, done.err
    runs = {run.name: summary_of(run)["arm"] for run in runs_in(tmp_path)}
    arms = set(runs.values())
    baseline = next((arm for arm in ("baseline", "lr=0.1") if arm in arms), min(arms))
    assert report.main([f"runs={tmp_path}/experiments", f"baseline={baseline}"]) == 0
    text = (tmp_path / "experiments" / "report" / "report.md").read_text()
    lines = commands_of(text)
    assert len(lines) == 1 + len(arms)
    planned: list[Planned] = []
    print_plan = sweeps.print_plan
    monkeypatch.setattr(sweeps, "print_plan", lambda p, *rest: (planned.extend(p), print_plan(p, *rest)))
    for line in lines:
        planned.clear()
        outcome = execute(cli, line, "dry_run=true")
        assert outcome.status == 0, f"{line}: {outcome.err}"
        assert "nothing is left to run" in outcome.out, f"{line}: {outcome.out}"
        for one in planned:
            if one.job:
                assert runs[one.job.run.path.name] == one.arm, line


def test_the_page_names_the_command_that_wrote_it(cli: Cli, tmp_path: Path, recorded: None) -> None:
    cli("-m", *TINY, "technique=baseline,mixup", "seed=0,1")
    out = tmp_path / "a report"
    assert report.main([f"runs={tmp_path}/experiments", f"out={out}"]) == 0
    command = re.search(r"Written .* by `(.*)`", (out / "report.md").read_text())
    assert command is not None
    _, script, *arguments = shlex.split(command[1])
    assert script == "report.py" and report.main(arguments) == 0


@pytest.mark.slow
def test_the_hints_on_the_way_to_the_best_weights_lead_there(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = [*TINY, "exp_dir=some results", "trainer.max_epochs=1"]
    assert cli(*train, "checkpoint.keep=last").status == 0
    ask = [f"runs={tmp_path}/some results", "checkpoint=best"]
    assert report.main(ask) == 2
    refusal = capfd.readouterr().err
    assert "checkpoint.keep=best fresh=true" in refusal and "none has kept them" in refusal
    assert cli(*train, "checkpoint.keep=best", "fresh=true").status == 0
    assert report.main(ask) == 2
    hint = re.search(r"(python main.py .*) does, for one run", capfd.readouterr().err)
    assert hint is not None and execute(cli, hint[1]).status == 0
    assert report.main(ask) == 0
    assert "of the weights that were best on validation" in capfd.readouterr().out


@pytest.mark.slow
def test_the_hint_beside_an_unfinished_run_finishes_it(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TINY, "exp_dir=some results", "trainer.max_epochs=1").status == 0
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    (run / "summary.json").write_text(json.dumps({**summary, "status": "interrupted", "reason": "SIGTERM"}))
    assert report.main([f"runs={tmp_path}/some results"]) == 0
    text = (tmp_path / "some results" / "report" / "report.md").read_text()
    hint = re.search(r"go on with: (.*?) \|", text)
    assert hint is not None and execute(cli, hint[1]).status == 0
    assert summary_of(run)["status"] == "finished"
