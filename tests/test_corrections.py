"""Corrected numbers are other runs: their identity differs where they are on, and no report pairs them."""

from __future__ import annotations

import re

import pytest
from conftest import TINY, runs_in, summary_of
from small_models import small
from test_report import BASE, make_arm, make_run

import report
from crucible import metrics
from crucible.corrections import Correction, option_is, versions_of
from datasets.base_datamodule import BaseDataModule
from lab import config as checking
from lab.experiment import corrected
from models.techniques import TECHNIQUES


def test_only_the_configurations_that_have_the_numbers_are_concerned() -> None:
    config = {"model": {"sam": True, "lr": 0.1, "ema_decay": None}, "data": {"module": {}}}
    known = [
        Correction("model.sam", 2, option_is("model.sam"), "x"),
        Correction("model.sam", 3, option_is("model.lr", 0.1), "y"),
        Correction("model.lr", 2, option_is("model.lr", 0.2), "z"),
        Correction("model.ema_decay", 2, option_is("model.ema_decay"), "z"),
    ]
    assert versions_of(known, config) == {"model.sam": 3}
    assert versions_of([], config) == {}


def test_a_networks_corrections_are_further_ones_than_its_familys() -> None:
    config = small("pyramidnet", "model.shakedrop=true", "trainer.precision=bf16-true")
    assert corrected(config).get("model.shakedrop") == 2
    assert "model.shakedrop" not in corrected(small("pyramidnet", "model.shakedrop=true"))


@pytest.mark.parametrize("option", ["balanced_batches", "random_batches"])
def test_runs_that_draw_with_replacement_are_others_than_those_that_augmented_repeats_alike(
    option: str,
) -> None:
    for value in (True, False):
        config = {"data": {"module": {"balanced_batches": False, "random_batches": False, option: value}}}
        expected = {f"data.module.{option}": 2} if value else {}
        assert versions_of(BaseDataModule.corrections, config) == expected


@pytest.mark.slow
def test_a_correction_is_another_run_and_stands_in_its_summary(
    cli, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = next(kind for kind in TECHNIQUES if "label_smoothing" in kind.__dataclass_fields__)
    commands = {"plain": [], "smooth": ["model.label_smoothing=0.1"]}

    def ids(folder: str) -> dict[str, str]:
        found = {}
        for name, overrides in commands.items():
            place = tmp_path / folder / name
            assert cli(*TINY, *overrides, "trainer.limit_train_batches=1", f"exp_dir={place}").status == 0
            (run,) = runs_in(place)
            found[name] = run.name
            corrected = summary_of(run)["corrected"]
            assert corrected == ({"model.label_smoothing": 2} if folder == "after" and overrides else {})
        return found

    before = ids("before")
    correction = Correction("model.label_smoothing", 2, option_is("model.label_smoothing"), "it was wrong")
    monkeypatch.setattr(owner, "corrections", (correction,))
    after = ids("after")
    assert after["plain"] == before["plain"] and after["smooth"] != before["smooth"]


def test_a_run_does_not_go_on_across_a_correction(cli, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "halfway.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Halfway(Callback):\n"
        "    def on_train_epoch_start(self, trainer, module):\n"
        "        if trainer.current_epoch == 1:\n"
        "            raise RuntimeError('stop here')\n"
    )
    command = [*TINY, "model.label_smoothing=0.1", "trainer.max_epochs=2", "user_dir=mine"]
    assert cli(*command, "+callbacks.halfway._target_=halfway.Halfway").status == 1
    (run,) = runs_in(tmp_path)
    owner = next(kind for kind in TECHNIQUES if "label_smoothing" in kind.__dataclass_fields__)
    correction = Correction("model.label_smoothing", 2, option_is("model.label_smoothing"), "it was wrong")
    monkeypatch.setattr(owner, "corrections", (correction,))
    state = (run / "checkpoints" / "last.ckpt").read_bytes()
    refused = cli(f"run={run}", "user_dir=mine")
    assert refused.status == 2 and len(refused.err.strip().splitlines()) == 1
    assert "model.label_smoothing has been corrected since it was begun: it was wrong" in refused.err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == state
    assert cli(*command, "+callbacks.halfway._target_=halfway.Halfway").status == 1
    assert len(runs_in(tmp_path)) == 2, "the same command is another run"


def test_a_report_refuses_to_pair_runs_of_different_versions(tmp_path, capsys) -> None:
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BASE[:3], settings={"model.mixup": True})
    for seed in (3, 4):
        make_run(tmp_path, "mixup", seed, 0.95, settings={"model.mixup": True}, corrected={"model.mixup": 2})
    assert report.main([f"runs={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"mixup-s\d: the numbers of model\.mixup .*version 1, mixup-s\d has 2", line), line


def test_runs_without_the_corrected_option_stay_comparable(tmp_path) -> None:
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BASE, settings={"model.mixup": True}, corrected={"model.mixup": 2})
    assert report.main([f"runs={tmp_path}"]) == 0


def test_each_correction_names_an_option_that_there_is_and_says_what_was_wrong() -> None:
    from models.base_model import BASICS

    owners = [*BASICS, *TECHNIQUES, BaseDataModule]
    corrections = [c for owner in owners for c in getattr(owner, "corrections", ())]
    for correction in (*corrections, *metrics.CORRECTIONS, *checking.CORRECTIONS):
        assert correction.option.split(".")[0] in (
            "model",
            "data",
            "trainer",
            "metrics",
            "checkpoint",
            "ckpt_path",
        )
        assert correction.version >= 2 and correction.what
