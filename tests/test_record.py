"""Eight of the recorded cases again: trained bits, run ids; and recorded run folders go on as they would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, nightly, summary_of
from record import command_ids, digest, machine, recipe_ids, recipes, train_case
from technique_runs import make_teacher

RECORD = json.loads((ROOT / "tests" / "recorded.json").read_text())
CASES = (
    "baseline bf16-mixed", "distillation 32-true", "mixup_cutmix 32-true", "online_norm 32-true", "sam 32-true",
    "swa 32-true", "cutmix+lookahead 32-true", "blur_pool+undecay_norm bf16-mixed",
)  # fmt: skip
# last.ckpt at the end of each recorded run, resumed by the code that had begun it
ENDS = {"plain": ("38eed15c141b0177", 16.586141538465714), "sam_ema": ("4d6ef60aaa8c74be", 22.98081622538093)}
SAME_MACHINE = RECORD["machine"] == machine()


@pytest.mark.slow
def test_trained_states_are_the_recorded_ones(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teaching")
    for case in CASES:
        now, before = train_case(case, tmp_path, teacher), RECORD["states"][case]
        assert now["norm"] == pytest.approx(before["norm"], rel=2e-3), case
        if SAME_MACHINE:
            assert now == before, case


def test_every_recipe_is_recorded() -> None:
    assert recipes() == list(RECORD["recipes"])


@pytest.mark.slow
@pytest.mark.parametrize("every", [6, *nightly(1)])
def test_recipes_have_their_recorded_identity(every: int) -> None:
    few = recipes()[::every]
    assert recipe_ids(few) == {name: RECORD["recipes"][name] for name in few}


@pytest.mark.slow
@pytest.mark.parametrize("every", [8, *nightly(1)])
def test_command_lines_have_their_recorded_run_ids(every: int) -> None:
    few = list(RECORD["commands"])[::every]
    assert command_ids(few) == {command: RECORD["commands"][command] for command in few}


@pytest.mark.parametrize("name", ENDS)
def test_a_recorded_run_folder_resumes_tests_and_reports(cli, name: str, tmp_path: Path) -> None:
    run = tmp_path / "experiments" / "digits" / name
    shutil.copytree(ROOT / "tests" / "recorded_runs" / name, run)
    outcome = cli(f"run={run}")
    assert outcome.status == 0, outcome.err
    summary: dict[str, Any] = summary_of(run)
    assert (summary["status"], summary["epochs"]) == ("finished", 6)
    bits, norm = digest(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True))
    assert norm == pytest.approx(ENDS[name][1], rel=1e-2)
    if SAME_MACHINE:
        assert bits == ENDS[name][0]
    assert cli(f"run={run}", "task=test").status == 0
