"""The joint recipe on two tiny trees: both sides beside the whole, exact, in every place that shows a metric."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import runs_in, summary_of
from PIL import Image

CLASSES = ["n01", "n02", "n03"]
SMALL = [
    "recipe=stylized/joint", "model=cifar_resnet", "model._target_=models.cifar_resnet.CifarResNet", "model.depth=8",
    "data.num_classes=3", "data.input_size=16", "data.module.batch_size=8", "data.module.num_workers=0",
    "data.module.val_split=0.25", "model.lr_milestones=[0.5]", "model.lr_scale_batch=null", "trainer.max_epochs=2",
    "logger.wandb=null", "callbacks.plots=null", "trainer.enable_progress_bar=false", "metrics=[acc,ece,auroc]",
]  # fmt: skip


def write_trees(folder: Path) -> list[str]:
    """Two trees of the same names: colours, and the same in other colours. The options that name them."""
    generator = np.random.default_rng(0)
    for tree in ("in", "sin"):
        for split, count in (("train", 12), ("val", 3)):
            for label, name in enumerate(CLASSES):
                (folder / tree / split / name).mkdir(parents=True)
                for n in range(count):
                    pixels = generator.integers(0, 160, (20, 20, 3))
                    pixels[..., label] += 90
                    pixels = 255 - pixels if tree == "sin" else pixels
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / tree / split / name / f"{n}.png")
    return [f"data.module.data_root_dir={folder / 'in'}", f"data.module.stylized_root_dir={folder / 'sin'}"]


def test_of(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["metrics"]


test_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_joint_recipe_evaluates_both_sides_and_its_run_is_tested_and_fine_tuned_on_either(
    cli, tmp_path: Path
) -> None:
    trees = write_trees(tmp_path)
    done = cli(*SMALL, *trees, "checkpoint.monitor=val_sin/acc", "model.ema_decay=0.9")
    assert done.status == 0, done.err
    (run,) = runs_in(tmp_path / "experiments")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    summary = summary_of(run)
    for stage in ("val", "val_raw"):
        for row in rows:
            for name in ("acc", "loss"):  # as many pictures on each side
                both = [float(row[f"{stage}_{side}/{name}"]) for side in ("in", "sin")]
                assert float(row[f"{stage}/{name}"]) == pytest.approx(sum(both) / 2, abs=1e-6)
    assert set(summary["best"]) == {"val_sin/acc", "epoch"}
    assert {"test/ece", "test_in/ece", "test_sin/auroc", "val_raw_sin/acc"} <= set(summary["final"])

    # each side by itself is what the joint test says of it
    assert cli(f"run={run}", "task=test", "ckpt_path=last").status == 0
    joint = test_of(run / "test.json")
    for side in ("in", "sin"):
        alone = [f"data.module.data_root_dir={tmp_path / side}", "data.module.stylized_root_dir=null"]
        tested = cli(f"run={run}", "task=test", "ckpt_path=last", f"out={tmp_path / side}.json", *alone)
        assert tested.status == 0, tested.err
        assert test_of(tmp_path / f"{side}.json") == pytest.approx(
            {n.replace(f"_{side}", ""): v for n, v in joint.items() if n.startswith(f"test_{side}/")},
            abs=1e-6,
        )

    tuned = cli(
        "recipe=stylized/finetune", *SMALL[1:], trees[0], f"model.init_from={run}", "trainer.max_epochs=1",
    )  # fmt: skip
    assert tuned.status == 0 and "best.ckpt" in tuned.out, tuned.err
    (of_in,) = runs_in(tmp_path / "experiments" / "imagenet")
    both = cli(f"run={of_in}", "task=test", trees[1])
    assert both.status == 0, both.err
    assert "by group: 9 of in, 9 of sin" in both.out and "test_sin/acc" in both.out

    report = cli(
        f"runs={run.parent}", "metric=test_sin/acc", f"out={tmp_path / 'report'}", script="report.py"
    )
    assert report.status == 0 and "test_sin/acc" in (tmp_path / "report" / "report.md").read_text(), (
        report.err
    )
    refused = cli(*SMALL, *trees, "checkpoint.monitor=val_sketch/acc")
    assert refused.status != 0 and "never logs it" in refused.err
    assert cli(f"runs={run.parent}", "metric=test_sketch/acc", script="report.py").status != 0


@pytest.mark.slow
def test_two_devices_score_each_side_as_one_does(ranks, cli, tmp_path: Path) -> None:
    trees = write_trees(tmp_path)
    # one more picture on one side: odd numbers, and a batch in which a rank has none of a side
    (tmp_path / "sin" / "val" / "n03" / "0.png").unlink()
    done, _ = ranks(*SMALL, *trees, "trainer.devices=2", "data.module.batch_size=3", "trainer.max_epochs=1")
    assert done.status == 0, done.err
    (run,) = runs_in(tmp_path / "experiments")
    final = summary_of(run)["final"]
    assert cli(f"run={run}", "task=test", "ckpt_path=last", "trainer.devices=1").status == 0
    alone = test_of(run / "test.json")
    assert {n for n in alone if n.startswith("test_")} >= {"test_in/acc", "test_sin/auroc", "test_sin/loss"}
    assert {n: final[n] for n in alone} == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_a_side_without_a_sample_is_said_and_has_no_values(cli, tmp_path: Path) -> None:
    trees = write_trees(tmp_path)
    done = cli(
        *SMALL, *trees, "trainer.limit_test_batches=1", "data.module.batch_size=1", "trainer.max_epochs=1"
    )
    assert done.status == 0, done.err
    (run,) = runs_in(tmp_path / "experiments")
    final = summary_of(run)["final"]
    assert len({n.partition("/")[0] for n in final if n.startswith("test")}) == 2
    assert "no sample of this group was evaluated" in (run / "main.log").read_text()
