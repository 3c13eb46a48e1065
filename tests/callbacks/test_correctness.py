"""The record of which test images a run got right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, summary_of

from callbacks.correctness import ExampleHits


def bits(file: Path) -> np.ndarray:
    with np.load(file) as record:
        return np.unpackbits(record["correct"], count=int(record["count"])).astype(bool)


def only_run(folder: Path) -> Path:
    (summary,) = folder.glob("experiments/*/*/summary.json")
    return summary.parent


def test_each_sample_counts_once_in_the_order_of_the_numbers():
    metric = ExampleHits()
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    metric.update(logits, torch.tensor([0, 0, 0]), torch.tensor([7, 2, 5]))
    metric.update(logits[:1], torch.tensor([0]), torch.tensor([7]))
    index, hit, confidence = metric.compute()
    assert index.tolist() == [2, 5, 7]
    assert hit.tolist() == [False, True, True]
    assert confidence == pytest.approx(torch.tensor([3.0, 1.0, 2.0]).sigmoid().numpy())


def test_a_run_records_which_test_images_it_got_right(cli, tmp_path):
    assert cli(*TINY).status == 0
    run = only_run(tmp_path)
    final = summary_of(run)["final"]
    assert bits(run / "test_correct.npz").mean() == pytest.approx(final["test/acc"], abs=1e-6)
    with np.load(run / "test_correct.npz") as record:
        count, confidence, hits = record["calibration"]
        assert count.sum() == record["count"]
    error = np.abs(confidence - hits).sum() / count.sum()
    assert error == pytest.approx(final["test/ece"], abs=1e-5), "the bins of the calibration error"


def test_a_later_test_of_other_weights_has_its_own_record(cli, tmp_path):
    assert cli(*TINY).status == 0
    run = only_run(tmp_path)
    before = (run / "test_correct.npz").read_bytes()
    assert cli(f"run={run}", "task=test").status == 0
    tested = json.loads((run / "test.json").read_text())["metrics"]
    assert bits(run / "test_correct_best.npz").mean() == pytest.approx(tested["test/acc"], abs=1e-6)
    assert (run / "test_correct.npz").read_bytes() == before


@pytest.mark.slow
def test_the_record_of_two_processes_is_that_of_one(cli, ranks, tmp_path):
    # no training: both test the same first weights; 10 test images of 3 a batch leave an uneven rest
    steps = ["trainer.limit_train_batches=1", "model.lr=1e-12", "data.module.batch_size=3"]
    records = []
    for devices in (1, 2):
        command = [*TINY, *steps, f"trainer.devices={devices}", f"exp_dir={tmp_path}/{devices}"]
        outcome = cli(*command) if devices == 1 else ranks(*command)[0]
        assert outcome.status == 0, outcome.err
        (file,) = (tmp_path / str(devices)).glob("*/*/test_correct.npz")
        with np.load(file) as record:
            records.append({name: record[name] for name in record.files})
    one, two = records
    assert one["count"] == two["count"] and one["samples"] == two["samples"]
    assert (one["correct"] == two["correct"]).all()
    assert two["calibration"] == pytest.approx(one["calibration"], abs=1e-4)
