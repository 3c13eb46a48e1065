"""The examples of docs/extending.md, as they stand."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

from conftest import ROOT, runs_in

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


def test_the_three_examples_run(cli, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine")
    single = [c for c in commands() if "-m" not in c]
    assert len(single) == 3
    model, data, technique = single
    assert cli(*model, *QUICK, "trainer.max_epochs=1").status == 0
    assert cli(*data, *QUICK).status == 0
    outcome = cli(*technique, *QUICK)
    assert outcome.status == 0, outcome.err
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs_in(tmp_path)]
    by_arm = {s["arm"]: s for s in summaries if s["data"] == "stripes"}
    assert set(by_arm) == {"baseline", "gradient_noise"}
    assert by_arm["baseline"]["final"]["test/acc"] > 0.9
    assert by_arm["baseline"]["identity"] != by_arm["gradient_noise"]["identity"]


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
