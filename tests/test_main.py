"""main.py end to end: the commands of the README and the design, and what a run leaves behind."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import ROOT, TINY, nightly, runs_in, summary_of, write_images
from record import command_ids

from crucible.handover import VARIABLE, received
from crucible.run import RunDirectory
from lab import tasks
from lab.build import alone
from lab.config import Task
from lab.tasks import OF_TRAINED

QUIET = ["trainer.max_epochs=1", "logger.wandb=null", "trainer.enable_progress_bar=false"]
SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=2",
    "logger.wandb=null",
]


def only_run(folder: Path) -> Path:
    (run,) = runs_in(folder)
    return run


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# what a run leaves behind


def test_a_run_directory_is_complete(cli, tmp_path: Path) -> None:
    outcome = cli(
        *TINY,
        "trainer.max_epochs=2",
        "callbacks.plots={_target_: callbacks.plots.ResultPlots}",
        "exp_dir=results",
    )
    assert outcome.status == 0, outcome.err
    run = only_run(tmp_path / "results")
    assert run.parent.name == "synthetic"
    assert not [p for p in run.rglob("*") if "=" in p.name]
    for name in ("config.yaml", "overrides.yaml", "metrics.csv", "summary.json", "main.log"):
        assert (run / name).is_file(), name
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((run / "plots").glob("*.png"))
    rows = rows_of(run)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for column in (
        "step",
        "train/loss",
        "train/acc",
        "val/loss",
        "val/acc",
        "val/f1",
        "lr",
        "time/epoch_s",
        "time/images_per_s",
    ):
        assert rows[-1][column] != "", column
    assert 0 <= float(rows[-1]["val/acc"]) <= 1
    summary = summary_of(run)
    assert summary["schema"] == 1 and summary["status"] == "finished" and summary["arm"] == "baseline"
    for key in ("final", "best", "epochs", "wall_time_s", "images_per_s", "peak_memory_mb", "parameters", "device",
                "precision", "versions", "git", "seed", "techniques", "heartbeat", "run_id", "identity"):  # fmt: skip
        assert key in summary, key
    assert summary["epochs"] == 2 and "test/acc" in summary["final"]
    assert not (run / "claim").exists()


def test_the_same_command_again_does_not_run_twice_and_fresh_keeps_the_old_folder(
    cli, tmp_path: Path
) -> None:
    cli(*TINY)
    run = only_run(tmp_path)
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = cli(*TINY, "data.module.num_workers=0", "logger.wandb=null")
    assert again.status == 0 and "finished before" in again.out
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert cli(*TINY, "fresh=true").status == 0
    assert {p.name for p in run.parent.iterdir()} == {run.name, f"{run.name}.old-1"}


def test_a_fresh_run_that_a_cluster_stops_and_begins_again_goes_on(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders(job: str, restarts: int) -> list[str]:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        outcome = cli(*TINY, "fresh=true")
        assert outcome.status == 0, outcome.err
        return sorted(run.suffix for run in runs_in(tmp_path))

    assert folders("7", 0) == [""]
    assert folders("7", 1) == [""]
    assert folders("8", 0) == ["", ".old-1"]
    assert folders("8", 0) == ["", ".old-1", ".old-2"], "typed twice in one allocation"
    (tmp_path / "sweep" / "jobs").mkdir(parents=True)
    for record, old in [("0-a.json", 3), ("0-a.json", 3), ("1-a.json", 4)]:
        told = replace(received(), record=str(tmp_path / "sweep" / "jobs" / record))
        monkeypatch.setenv(VARIABLE, told.environment()[VARIABLE])
        assert len(folders("8", 0)) == old + 1


@pytest.mark.slow
def test_what_changes_the_result_changes_the_identity_and_nothing_else_does(cli, tmp_path: Path) -> None:
    plain = " ".join(TINY)
    same = [plain, *(f"{plain} {o}" for o in (
        "data.module.num_workers=0", "checkpoint.keep=last", "model.powergrad_alpha=1.0",
    ))]  # fmt: skip
    other = [f"{plain} {o}" for o in (
        "seed=1", "model.powergrad_alpha=0.3", "data.module.split_seed=1", "model.lr=0.01",
    )]  # fmt: skip
    ids = {command: found.partition(" ")[0] for command, found in command_ids([*same, *other]).items()}
    assert len({ids[command] for command in same}) == 1
    assert len(set(ids.values())) == 5
    assert len({name.split("-")[0] for name in ids.values()}) == 4, "seeds of one arm share the hash"
    cli(*TINY)
    assert only_run(tmp_path).name == ids[plain]


def test_the_arm_is_named_after_techniques_and_options(cli, tmp_path: Path) -> None:
    cli(*TINY, "technique=[powergrad,mixup]", "model.mixup_alpha=0.4")
    summary = summary_of(only_run(tmp_path))
    assert summary["arm"] == "mixup+powergrad mixup_alpha=0.4"
    assert summary["techniques"] == ["mixup", "powergrad"]
    config = yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())
    assert config["model"]["mixup_alpha"] == 0.4 and config["model"]["powergrad_alpha"] == 0.3


def test_a_batch_that_the_data_cannot_fill_is_made_of_all_of_them_and_said_so(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "data.module.batch_size=100000")
    assert outcome.status == 0, outcome.err
    assert "instead of 100000" in outcome.out
    assert any("instead of 100000" in text for text in summary_of(only_run(tmp_path))["resolved"])
    config = yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())
    assert config["data"]["module"]["batch_size"] < 100


def test_logit_statistics_are_in_the_table_for_train_and_validation(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "technique=[logit_stats,mixup]")
    assert outcome.status == 0, outcome.err
    (row,) = rows_of(only_run(tmp_path))
    for name in ("norm", "mean", "max", "var"):
        assert float(row[f"logits/{name}"]) > 0 and float(row[f"val/logits/{name}"]) > 0
    assert float(row["train/grad_norm"]) > 0 and float(row["train/weight_norm"]) > 0


def test_keep_none_leaves_no_training_state(cli, tmp_path: Path) -> None:
    assert cli(*TINY, "checkpoint.keep=none").status == 0
    assert not list((only_run(tmp_path) / "checkpoints").iterdir())


# a recorded run


def test_test_and_predict_need_only_the_run(cli, tmp_path: Path) -> None:
    cli(*TINY)
    run = only_run(tmp_path)
    tested = cli(f"run={run}", "task=test", "ckpt_path=last")
    assert tested.status == 0, tested.err
    record = json.loads((run / "test.json").read_text())
    assert record["checkpoint"] == "last.ckpt"
    assert record["metrics"]["test/acc"] == pytest.approx(summary_of(run)["final"]["test/acc"])
    assert cli(f"run={run}", "task=predict", "ckpt_path=last").status == 0
    with (run / "predictions.csv").open(newline="") as stream:
        predictions = list(csv.DictReader(stream))
    hits = [row["target"] == row["prediction"] for row in predictions]
    assert sum(hits) / len(hits) == pytest.approx(summary_of(run)["final"]["test/acc"])
    probabilities = [float(v) for k, v in predictions[0].items() if k.startswith("p(")]
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)


def test_a_pattern_names_no_run_that_was_put_aside(cli, tmp_path: Path) -> None:
    for name in ("a-s0", "a-s1", "a-s1.old-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    for typed, named in (
        ("a-*", ["a-s0", "a-s1"]),
        ("a-s1.old-1", ["a-s1.old-1"]),
        ("*.old-*", ["a-s1.old-1"]),
    ):
        out = cli(f"run={tmp_path}/{typed}", "task=test", "each=true").out
        assert re.findall(r"(\S+): has no weights yet", out) == [str(tmp_path / name) for name in named]


@pytest.mark.slow
def test_several_runs_give_the_mean_of_their_probabilities(cli, tmp_path: Path) -> None:
    cli(*TINY, "data.cv.k=3")
    cli(*TINY, "data.cv.k=3", "data.module.fold=1")
    runs = runs_in(tmp_path)
    assert len(runs) == 2
    singles = []
    for run in runs:
        cli(f"run={run}", "task=predict", f"out={tmp_path / run.name}.csv")
        with Path(f"{tmp_path / run.name}.csv").open(newline="") as stream:
            singles.append(list(csv.DictReader(stream)))
    out = tmp_path / "both.csv"
    assert cli(f"run={runs[0].parent}/*", "task=predict", f"out={out}").status == 0
    with out.open(newline="") as stream:
        both = list(csv.DictReader(stream))
    column = next(k for k in both[0] if k.startswith("p("))
    for first, second, mean in zip(*singles, both, strict=True):
        assert float(mean[column]) == pytest.approx(
            (float(first[column]) + float(second[column])) / 2, abs=1e-5
        )
    assert cli(f"run={runs[0]},{runs[1]}", "task=test").status == 0


def test_an_error_of_one_run_leaves_the_others_their_tests(cli, tmp_path: Path, monkeypatch) -> None:
    first = trained_and_copied(cli, tmp_path)
    test = tasks.test

    def failing(run: RunDirectory, *arguments: Any) -> Any:
        if run.path == first:
            raise RuntimeError("no such kernel")
        return test(run, *arguments)

    monkeypatch.setattr(tasks, "test", failing)
    outcome = cli(f"run={first.parent}/*", "task=test", "each=true")
    assert outcome.status == 1 and "2 runs, one after the other; not all went well with" in outcome.out
    name, line = outcome.err.strip().splitlines()
    assert name == f"{first}:" and "RuntimeError: no such kernel" in line
    assert not (first / "test.json").exists() and (first.parent / "other" / "test.json").exists()


@pytest.mark.slow
def test_each_of_runs_of_several_devices_is_tested(cli, shell, tmp_path: Path) -> None:
    first = trained_and_copied(cli, tmp_path)
    several = ["trainer.devices=2", "trainer.accelerator=cpu"]
    outcome = shell(f"run={first.parent}/*", "task=test", "each=true", *several, timeout=120)
    assert outcome.status == 0, outcome.err
    both = [json.loads((first.parent / n / "test.json").read_text()) for n in (first.name, "other")]
    assert both[0]["metrics"] == both[1]["metrics"] and both[0]["samples"] == both[1]["samples"]


def test_runs_that_are_used_as_one_have_files_by_which_they_are(cli, tmp_path: Path) -> None:
    first = trained_and_copied(cli, tmp_path)
    shutil.copytree(first, first.parent / "third")
    for other in ("other", "third"):
        assert cli(f"run={first},{first.parent / other}", "task=test").status == 0
    for weights in ("best", "last"):
        assert (
            cli(f"run={first},{first.parent / 'third'}", "task=predict", f"ckpt_path={weights}").status == 0
        )
    assert len(list(first.parent.glob("ensemble-of-2-runs-*.json"))) == 2
    assert len(list(first.glob("predictions-of-2-runs-*.csv"))) == 2


def test_weights_from_two_places_with_one_name_have_files_of_their_own(cli, tmp_path: Path) -> None:
    first = trained_and_copied(cli, tmp_path)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        weights = shutil.copy(first / "checkpoints" / "best.ckpt", tmp_path / place / "x.ckpt")
        assert cli(f"run={first.parent}/*", "task=test", f"ckpt_path={weights}").status == 0
    assert len(list(first.parent.glob("ensemble-of-2-runs-*.json"))) == 2


@pytest.mark.parametrize(("task", "split"), [("test", "test"), ("test", "predict"), ("predict", "predict")])
def test_runs_that_are_used_as_one_read_all_samples(cli, tmp_path: Path, task: str, split: str) -> None:
    first = trained_and_copied(cli, tmp_path)
    for run in runs_in(tmp_path):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["trainer"][f"limit_{split}_batches"] = 1
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = cli(f"run={first.parent}/*", f"task={task}")
    assert outcome.status == 2 and f"trainer.limit_{split}_batches=1" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(first.parent.glob("ensemble*")) and not list(first.glob("predictions*"))
    assert cli(f"run={first.parent}/*", f"task={task}", f"trainer.limit_{split}_batches=null").status == 0


def test_a_prediction_is_of_all_samples_whatever_a_test_is_limited_to(cli, tmp_path: Path) -> None:
    run = trained_and_copied(cli, tmp_path)
    assert cli(f"run={run}", "task=predict").status == 0
    whole = (run / "predictions.csv").read_bytes()
    (run / "predictions.csv").unlink()
    assert cli(f"run={run}", "task=predict", "trainer.limit_test_batches=1").status == 0
    assert (run / "predictions.csv").read_bytes() == whole and not (run / "tests").exists()


@pytest.mark.parametrize(
    ("devices", "one"), [(2, 1), ("2", 1), ([3], [3]), ([1, 2], [1]), ("1,", [1]), ("2,0", [2]), ("auto", 1)]
)
def test_of_devices_that_are_named_one_process_has_the_first(devices: Any, one: Any) -> None:
    trainer = {"devices": devices, "num_nodes": 2, "strategy": "ddp", "precision": "32-true"}
    expected = {"devices": one, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    assert alone({"trainer": trainer})["trainer"] == expected


def test_a_prediction_without_room_for_its_scores_is_refused_in_a_line(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_and_copied(cli, tmp_path)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("os.posix_fallocate", full)
        outcome = cli(f"run={run}", "task=predict")
    assert outcome.status == 2 and "TMPDIR=" in outcome.err and "no room for 960 bytes" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not (run / "predictions.csv").exists()


def test_scores_larger_than_a_file_may_be_are_refused_in_a_line(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = trained_and_copied(cli, tmp_path), tempfile.TemporaryFile

    def limited() -> Any:
        def truncate(size: int) -> None:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        file = made()
        monkeypatch.setattr(file, "truncate", truncate, raising=False)
        return file

    monkeypatch.setattr(tasks.tempfile, "TemporaryFile", limited)
    outcome = cli(f"run={run}", "task=predict")
    assert outcome.status == 2 and "TMPDIR=" in outcome.err and "no room for 960 bytes" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not (run / "predictions.csv").exists()


def trained_and_copied(cli, tmp_path: Path) -> Path:
    """A finished run; beside it is `other`, its copy."""
    assert cli(*TINY).status == 0
    run = only_run(tmp_path)
    shutil.copytree(run, run.parent / "other")
    return run


def test_a_recorded_run_refuses_to_become_another(cli, tmp_path: Path) -> None:
    cli(*TINY)
    run = only_run(tmp_path)
    changed = cli(f"run={run}", "model.lr=0.5")
    assert changed.status != 0 and "model.lr" in changed.err and len(changed.err.strip().splitlines()) == 1
    assert "finished before" in cli(f"run={run}").out


def test_a_recorded_run_is_tested_with_other_metrics_and_nothing_else_is_changed_silently(
    cli, tmp_path: Path
) -> None:
    cli(*TINY)
    run = only_run(tmp_path)
    assert cli(f"run={run}", "task=test", "metrics=[acc,auroc]").status == 0
    assert "test/auroc" in json.loads((run / "test.json").read_text())["metrics"]
    for arguments in (["task=test", "model.lr=0.5"], ["task=predict", "seed=3"], ["seed=3"], ["fresh=true"]):
        refused = cli(f"run={run}", *arguments)
        assert refused.status == 2 and arguments[-1] in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_a_run_that_was_stopped_in_its_test_keeps_what_training_measured(cli, tmp_path: Path) -> None:
    cli(*TINY)
    run = only_run(tmp_path)
    whole = summary_of(run)
    kept = {k: v for k, v in whole["final"].items() if not k.startswith("test/")}
    (run / "summary.json").write_text(json.dumps({**whole, "status": "running", "final": kept}))
    assert cli(f"run={run}").status == 0
    assert summary_of(run)["final"] == pytest.approx(whole["final"])


def test_without_accuracy_the_best_epoch_has_the_lowest_loss(cli, tmp_path: Path) -> None:
    assert cli(*TINY, "metrics=[f1]").status == 0
    run = only_run(tmp_path)
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert set(summary_of(run)["best"]) == {"val/loss", "epoch"}


def test_load_run_gives_the_network_the_config_and_the_table(cli, tmp_path: Path) -> None:
    from crucible import load_run

    cli(*TINY)
    run = only_run(tmp_path)
    loaded = load_run(run, checkpoint="last")
    assert not loaded.model.training
    assert loaded.config["data"]["module"]["name"] == "synthetic"
    assert list(loaded.metrics["epoch"]) == [0]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, saved[k]) for k, v in loaded.model.state_dict().items())


def test_ckpt_path_starts_a_new_run_from_a_training_state(cli, tmp_path: Path) -> None:
    cli(*TINY)
    first = only_run(tmp_path)
    outcome = cli(*TINY, "trainer.max_epochs=2", f"ckpt_path={first / 'checkpoints' / 'last.ckpt'}")
    assert outcome.status == 0, outcome.err
    second = next(run for run in runs_in(tmp_path) if run != first)
    assert [row["epoch"] for row in rows_of(second)] == ["1"]
    assert cli(*TINY, "trainer.max_epochs=2").status == 0
    assert len(runs_in(tmp_path)) == 3, "another start is another run"


def test_init_from_starts_from_another_runs_weights_and_reports_the_head(cli, tmp_path: Path) -> None:
    cli(*TINY)
    weights = only_run(tmp_path) / "checkpoints" / "best.ckpt"
    outcome = cli(*TINY, "data.num_classes=3", "data.module.num_classes=3", f"model.init_from={weights}")
    assert outcome.status == 0, outcome.err
    assert "fc" in outcome.out
    (run,) = (run for run in runs_in(tmp_path) if "contents" in summary_of(run))
    content = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert summary_of(run)["contents"] == {"model.init_from": content}, (
        "for the report, wherever the file lies"
    )


# other inputs


@pytest.mark.slow
def test_images_and_values_from_a_csv_are_a_regression(cli, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", ["a", "b"], 12, (24, 24))
    lines = [f"{'ab'[i % 2]}/{i // 2}.jpg,{i / 7}" for i in range(24)]
    (tmp_path / "pictures" / "labels.csv").write_text("\n".join(["file,value", *lines]))
    outcome = cli(
        "data=image_regression", f"data.module.data_root_dir={tmp_path / 'pictures'}", "data.input_size=16",
        "data.module.batch_size=4", "model.lr=0.001", *QUIET,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    run = only_run(tmp_path)
    assert {"test/mse", "test/mae", "test/r2", "val/loss", "train/mae"} <= set(summary_of(run)["final"])
    assert (run / "plots" / "predictions_test.png").is_file()
    assert cli(f"run={run}", "task=predict").status == 0
    with (run / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert set(rows[0]) == {"sample", "target", "prediction"} and rows[0]["sample"].endswith(".jpg")


@pytest.mark.slow
def test_an_image_folder_without_splits_counts_its_classes_and_predicts_unlabelled_images(
    cli, tmp_path: Path
) -> None:
    write_images(tmp_path / "pictures", ["cat", "dog", "owl"], 12, (30, 20))
    write_images(tmp_path / "unknown", ["x"], 3, (50, 60))
    outcome = cli(
        "data=image_folder", f"data.module.data_root_dir={tmp_path / 'pictures'}", "data.input_size=16",
        "data.module.batch_size=4", *QUIET,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "3 classes found" in outcome.out
    run = only_run(tmp_path)
    predicted = cli(f"run={run}", "task=predict", f"data.module.predict_dir={tmp_path / 'unknown'}")
    assert predicted.status == 0, predicted.err
    with (run / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["sample"] for row in rows] == ["x/0.jpg", "x/1.jpg", "x/2.jpg"]
    assert all(row["prediction"] in ("cat", "dog", "owl") and row["target"] == "" for row in rows)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions_train(cli, tmp_path: Path, dimensions: int) -> None:
    outcome = cli(*TINY, f"data.input_dim={dimensions}", "data.input_size=8", "trainer.limit_train_batches=2")
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_the_debug_groups_run(cli, tmp_path: Path) -> None:
    assert cli(*TINY, "debug=two_steps").status == 0
    assert cli(*TINY, "debug=profile").status == 0
    outcome = cli(*TINY, "debug=overfit", "trainer.max_epochs=40", "data.module.batch_size=8")
    assert outcome.status == 0, outcome.err
    losses = [summary_of(run)["final"]["train/loss"] for run in runs_in(tmp_path)]
    assert min(losses) < 0.1, "one batch can be learnt by heart"


# the design's commands


@pytest.mark.nightly  # CI sees it by the command of the README
def test_the_main_job_learns_the_digits(shell, tmp_path: Path) -> None:
    outcome = shell(real=True)
    assert outcome.status == 0, outcome.err
    assert summary_of(only_run(tmp_path))["final"]["test/acc"] >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [[], ["model.mixup=true", "model.label_smoothing=0.1", "trainer.precision=bf16-mixed"]]
)
def test_the_signature_command_trains_on_an_imagenet_folder(
    shell, tmp_path: Path, imagenet_folder: Path, extra
) -> None:
    outcome = shell(
        "model=resnet", "data=imagenet", "model.powergrad_alpha=0.3", f"data.module.data_root_dir={imagenet_folder}",
        "data.num_classes=3", "data.module.batch_size=4", "data.module.val_split=0.25", *SHORT, *extra,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert summary_of(only_run(tmp_path / "experiments"))["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", *nightly("inductor")])
def test_the_signature_command_compiles(
    cli, tmp_path: Path, imagenet_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, real = [], torch.compile

    def with_backend(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return real(function, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", with_backend)
    outcome = cli(
        "model=resnet", "data=imagenet", "model.powergrad_alpha=0.3", f"data.module.data_root_dir={imagenet_folder}",
        "data.num_classes=3", "data.module.batch_size=4", "data.module.val_split=0.25", "model.compile=true",
        "model._target_=tiny_networks.TinyResNet", *SHORT,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert compiled
    run = only_run(tmp_path / "experiments")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [k for k in state if "_orig_mod" in k], "a compiled run's checkpoint loads into a plain one"


def cifar_folder(tmp_path: Path) -> Path:
    root = tmp_path / "cifar10"
    names = [f"class{i}" for i in range(10)]
    write_images(root / "train", names, 6, (32, 32))
    write_images(root / "test", names, 2, (32, 32))
    return root


DESIGN = {
    "efficientnetv2": ["env=local", "model=efficientnetv2", "data=cifar10", "model.type=M"],
    "resnet50 with sam": [
        "model=resnet", "model._target_=models.dynamic_resnet.ResNet50", "model.sam=True", "model.warmstart=10",
        "trainer.max_epochs=200",
    ],
    "two techniques": ["technique=[powergrad,mixup]", "model.mixup_alpha=0.4"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGN)
def test_a_command_of_the_design_runs(shell, tmp_path: Path, name: str) -> None:
    data = []
    if "data=cifar10" in DESIGN[name]:
        data = [f"data.module.data_root_dir={cifar_folder(tmp_path)}", "data.module.val_split=0.2"]
    outcome = shell(*DESIGN[name], *data, *SHORT, "data.module.batch_size=16", "trainer.limit_test_batches=2")
    assert outcome.status == 0, outcome.err
    assert summary_of(only_run(tmp_path / "experiments"))["status"] == "finished"


@pytest.mark.slow
def test_a_multirun_runs_every_arm_and_seed_and_the_report_compares_them(shell, tmp_path: Path) -> None:
    outcome = shell(
        "-m",
        "model=resnet",
        "technique=baseline,powergrad,[powergrad,mixup]",
        "seed=range(2)",
        *TINY,
        "trainer.limit_train_batches=2",
        timeout=550,
    )
    assert outcome.status == 0, outcome.err
    summaries = [summary_of(run) for run in runs_in(tmp_path / "experiments" / "synthetic")]
    assert len(summaries) == 6
    arms = {s["arm"] for s in summaries}
    assert arms == {"baseline", "powergrad", "mixup+powergrad"}
    assert {s["seed"] for s in summaries if s["arm"] == "powergrad"} == {0, 1}
    report = shell("runs=experiments/synthetic", script="report.py")
    assert report.status == 0, report.err
    text = next((tmp_path / "experiments" / "synthetic").rglob("report.md")).read_text()
    assert all(arm in text for arm in arms)


def test_seed_style_folds_are_a_sweep(cli, tmp_path: Path) -> None:
    for fold in range(2):
        assert cli(*TINY, "data.cv.k=2", f"data.module.fold={fold}").status == 0
    assert len(runs_in(tmp_path)) == 2


@pytest.mark.slow
def test_a_failing_job_does_not_end_the_sweep_and_is_listed(shell, tmp_path: Path) -> None:
    outcome = shell("-m", *TINY, "trainer.limit_train_batches=2", "model.lr=-1,0.02")
    assert outcome.status == 1
    assert len(runs_in(tmp_path / "experiments" / "synthetic")) == 1
    assert "1 of the sweep's jobs did not finish" in outcome.err and "model.lr=-1" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_tasks_are_those_that_are_stated() -> None:
    text = (ROOT / "cli_configs/train.yaml").read_text()
    stated = text.partition("\ntask:")[2].partition("\nsummary_depth:")[0]
    assert get_args(Task) == ("train", *OF_TRAINED, "summary", "pack", "tune")
    assert all(re.search(rf"\b{task}\b", stated.partition("#")[2]) for task in get_args(Task))


def test_the_readme_holds_two_setup_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:45]
    commands = [line.strip() for line in first_screen if line.startswith("    python3 ")]
    assert len(commands) == 2
    assert "main.py" in commands[0] and "pytest" in commands[1]


def test_train_yaml_states_the_defaults_of_the_rooms() -> None:
    import dataclasses

    from models.base_model import BASICS
    from models.techniques import TECHNIQUES

    stated = yaml.safe_load((ROOT / "cli_configs" / "train.yaml").read_text())["model"]
    fields = {f.name: f.default for room in (*BASICS, *TECHNIQUES) for f in dataclasses.fields(room)}
    assert set(fields) <= set(stated), set(fields) - set(stated)
    differing = {n: (stated[n], d) for n, d in fields.items() if stated[n] != d}
    assert not differing


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_batch_has_the_precision_of_the_weights(cli, precision: str) -> None:
    outcome = cli(
        *TINY, f"trainer.precision={precision}", "trainer.limit_train_batches=2", "technique=[mixup,swa]"
    )
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(("typed", "recorded"), [("s3://bucket/x", "s3://bucket/x"), ("here", None)])
def test_a_data_root_that_is_a_url_reaches_the_data_as_typed(
    cli, tmp_path: Path, typed: str, recorded: str | None
) -> None:
    outcome = cli(*TINY, f"+data.module.data_root_dir={typed}")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["module"]["data_root_dir"] == (recorded or str(tmp_path / typed))
