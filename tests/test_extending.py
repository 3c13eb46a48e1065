"""The examples of docs/extending.md, as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, runs_in, summary_of

PAGE = (ROOT / "docs" / "extending.md").read_text()
QUICK = ["logger.wandb=null", "trainer.enable_progress_bar=false"]


def write_examples(folder: Path) -> None:
    for block in re.findall(r"```\w+\n(# file: .*?)```", PAGE, re.DOTALL):
        first, _, text = block.partition("\n")
        file = folder / first.removeprefix("# file: ").strip()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def commands() -> list[list[str]]:
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    python main.py ")]
    return [shlex.split(line)[2:] for line in lines]


def summaries(folder: Path) -> dict[str, dict]:
    read = [summary_of(run) for run in runs_in(folder)]
    return {s["arm"]: s for s in read if s["data"] == "stripes"}


@pytest.mark.slow
def test_a_model_and_a_data_set_of_ones_own_run(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    model, data = [c for c in commands() if "-m" not in c and not any("technique" in o for o in c)]
    assert cli(*model, *QUICK, "trainer.max_epochs=1").status == 0
    assert cli(*data, *QUICK).status == 0
    assert summaries(tmp_path)["baseline"]["final"]["test/acc"] > 0.9


@pytest.mark.slow
def test_four_techniques_of_ones_own_run_and_compose_with_built_in_ones(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    asked = [c for c in commands() if "-m" not in c and any("technique" in o for o in c)]
    for command in asked:
        outcome = cli(*command, *QUICK)
        assert outcome.status == 0, outcome.err
    by_arm = summaries(tmp_path)
    assert set(by_arm) == {"input_penalty", "checkerboard+mixup", "extragradient", "sam+tail_average"}
    assert len({s["identity"] for s in by_arm.values()}) == 4
    assert all(s["final"]["test/acc"] > 0.9 for s in by_arm.values()), by_arm
    assert "val_raw/acc" in by_arm["sam+tail_average"]["final"], "an average is evaluated beside the weights"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["model.input_penalty=-1"], r"model.input_penalty must be in [0, inf), got -1"),
        (["model.input_penaltyy=1"], "input_penalty"),
        (["model.compile=true"], "InputPenalty cannot be compiled"),
        (["model.stages.input_penalty=techniques_of_mine.Nothing"], "techniques_of_mine has no Nothing"),
        (["model.stages.input_penalty=tiny.Tiny"], "must be a subclass of crucible.technique.Technique"),
    ],
)
def test_a_technique_of_ones_own_is_refused_in_one_line(
    cli, tmp_path: Path, typed: list[str], said: str
) -> None:
    write_examples(tmp_path / "mine")
    outcome = cli("user_dir=mine", "model=tiny", "data=stripes", "technique=input_penalty", *typed, *QUICK)
    assert outcome.status == 2
    assert said in outcome.err and outcome.err.count("\n") == 1


def test_a_technique_that_cannot_be_compiled_settles_compile_to_off_with_a_word(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    outcome = cli(
        "user_dir=mine",
        "model=tiny",
        "data=stripes",
        "technique=input_penalty",
        "trainer.max_epochs=1",
        *QUICK,
    )
    assert "compile off, InputPenalty cannot be compiled" in " ".join(outcome.out.split())


def test_an_average_of_ones_own_excludes_another_one(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    outcome = cli("user_dir=mine", "model=tiny", "data=stripes", "technique=[tail_average,ema]", *QUICK)
    assert outcome.status == 2 and "one average" in outcome.err


@pytest.mark.slow
def test_an_ablation_compares_a_technique_of_ones_own_with_a_built_in_one(shell, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    (sweep,) = [c for c in commands() if "-m" in c]
    outcome = shell(*sweep, *QUICK, "seed=0,1", "trainer.max_epochs=1")
    assert outcome.status == 0, outcome.err
    assert set(summaries(tmp_path)) == {"baseline", "input_penalty", "mixup"}
    report = shell("runs=experiments/stripes", script="report.py")
    assert report.status == 0 and "input_penalty" in report.out, report.err


def test_the_models_own_options_are_checked_like_any_other(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    outcome = cli("user_dir=mine", "model=tiny", "model.width=0", *QUICK)
    assert outcome.status != 0
    assert "model.width" in outcome.err and "[1, 512]" in outcome.err and "0" in outcome.err


def test_the_data_module_is_set_up_once_a_run(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    file = tmp_path / "mine" / "stripes.py"
    counted = 'def setup(self, stage: str) -> None:\n        open("set-ups", "a").write("1")\n'
    file.write_text(file.read_text().replace("def setup(self, stage: str) -> None:\n", counted))
    sys.modules.pop("stripes", None)
    outcome = cli("user_dir=mine", "model=tiny", "data=stripes", "trainer.max_epochs=1", *QUICK)
    assert outcome.status == 0, outcome.err
    # the module that is examined, and the one that trains, validates and tests
    assert (tmp_path / "set-ups").read_text() == "11"
