from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

import report
from reporting import statistics
from reporting.request import read_arguments

ROOT = Path(report.__file__).parent
BASE = [0.9310, 0.9284, 0.9335, 0.9302, 0.9291]
BETTER = [0.9402, 0.9371, 0.9433, 0.9385, 0.9390]
SAME = [0.9305, 0.9290, 0.9331, 0.9299, 0.9296]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about numbers and words; tests/reporting looks at the pages."""
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])


def shifted(*differences: float) -> list[float]:
    return [b + d for b, d in zip(BASE, differences, strict=True)]


def make_run(
    root: Path,
    arm: str,
    seed: int,
    value: float | None,
    *,
    data: str = "digits",
    techniques: dict | None = None,
    settings: dict | None = None,
    metric: str = "test/acc",
    seconds: float = 10.0,
    name: str | None = None,
    **summary,
) -> Path:
    folder = root / data / (name or f"{arm.replace(' ', '_')}-s{seed}")
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "exp_dir": str(root),
        "data": {"num_classes": 10, "module": {"name": data, "batch_size": 64, "num_workers": seed}},
        "model": {"lr": 0.05, "seed": seed, "mixup": False},
        "trainer": {"max_epochs": 12},
        "techniques": techniques or {},
    }
    for option, setting in (settings or {}).items():
        node = config
        *parents, last = option.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = setting
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text("[]")
    final = {} if value is None else {metric: value}
    contents = {
        "schema": 1, "status": "finished", "reason": "", "run_id": folder.name, "arm": arm, "seed": seed,
        "techniques": sorted(techniques or {}), "final": final, "epochs": 12, "wall_time_s": seconds,
        "device": "cpu", "git": {"commit": "abc", "dirty": False}, "started": time.time(),
        "heartbeat": time.time(), **summary,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(contents))
    return folder


def make_arm(root: Path, arm: str, values: list[float], **options) -> list[Path]:
    return [make_run(root, arm, seed, value, **options) for seed, value in enumerate(values)]


def written(root: Path) -> tuple[dict[str, dict[str, str]], str]:
    """The rows of results.csv by arm, and report.md."""
    with (root / "report" / "results.csv").open(newline="") as stream:
        rows = {row["arm"]: row for row in csv.DictReader(stream)}
    return rows, (root / "report" / "report.md").read_text()


def run_report(root: Path, *arguments: str) -> tuple[dict[str, dict[str, str]], str]:
    assert report.main([f"runs={root}", *arguments]) == 0
    return written(root)


def top(text: str) -> str:
    """The paragraph on top of the page's first table."""
    return text.split("## digits\n\n")[1].splitlines()[0]


# The paragraph on top


def test_the_page_begins_with_what_was_compared_and_what_was_found(tmp_path):
    settings = {"model._target_": "models.dynamic_resnet.ResNet18", "model.optimizer": "SGD"}
    make_arm(tmp_path, "baseline", BASE, settings=settings, peak_memory_mb=100.0, parameters=11_173_962)
    arms = {
        "mixup": BETTER,
        "sam": shifted(-0.021, -0.019, -0.020, -0.018, -0.022),
        "same": shifted(0.0002, -0.0001, 0.0001, 0.0, -0.0002),
        "open": shifted(0.012, -0.010, 0.004, -0.007, 0.009),
    }
    for arm, values in arms.items():
        make_arm(
            tmp_path,
            arm,
            values,
            settings=settings,
            seconds=20 if arm == "mixup" else 10,
            peak_memory_mb=110.0,
        )
    make_arm(tmp_path, "wrecked", [*BETTER[:4], math.nan], settings=settings)
    make_arm(tmp_path, "few", BETTER[:2], settings={**settings, "model.lr": 0.1})
    rows, text = run_report(tmp_path)
    said = top(text)
    for fact in (
        "against baseline", "test/acc in % of the last epoch (higher is better)", "data digits",
        "network ResNet18 (11.17 M parameters)", "12 epochs", "batch size 64", "optimizer SGD",
        "learning rate 0.05 (few: 0.1)", "Seeds 0-4 of baseline", "2 to 5 pairs an arm", "margin 0.30 points",
        f"baseline has {100 * np.mean(BASE):.2f}%",
    ):  # fmt: skip
        assert fact in said, fact
    found = dict(part.split("**: ", 1) for part in said.split(" **")[1:])
    low, high = (100 * float(rows["mixup"][bound]) for bound in ("low", "high"))
    gain = 100 * float(rows["mixup"]["difference"])
    assert found["Helps"].startswith(
        f"mixup by {gain:+.2f} points (95% interval {low:+.2f} to {high:+.2f}), by more than 0.30 points, time x2.00"
    )
    assert found["Helps"].endswith("time x2.00, memory x1.10.")
    assert found["Hurts"].startswith("sam by -2.00 points")
    assert found["No difference larger than 0.30 points"].startswith("same (")
    assert found["Open"].startswith("open, between -") and "not resolvable" in found["Open"]
    assert found["Open"].endswith("it would take more than 50 seeds.")
    assert "wrecked, unstable: 1 of 5 runs diverged" in found["No verdict"]
    assert "few, cannot say (2 pairs); a verdict takes 3 pairs at least" in found["No verdict"]


def test_one_run_of_one_arm_is_described_without_a_word_of_what_it_is_not(tmp_path):
    make_arm(tmp_path, "baseline", BASE[:1])
    said = top(run_report(tmp_path)[1])
    assert said.startswith(
        "baseline, by test/acc in % of the last epoch (higher is better); data digits, 12 epochs"
    )
    assert said.endswith("Seeds 0 of baseline; baseline has 93.10%.")


def test_what_was_typed_of_the_network_stands_beside_its_name(tmp_path):
    """Without its norms a network is another one, and two depths of a family are two."""
    settings = {"model._target_": "models.wide_resnet.WideResNet", "model.norm": "none", "model.depth": 10}
    settings |= {"model.type": "/home/me/own", **{f"model.option_{i}": i for i in range(4)}}
    for arm, values, techniques in (("baseline", BASE, {}), ("mixup", BETTER, {"mixup": {}})):
        for run in make_arm(tmp_path, arm, values, settings=settings, techniques=techniques):
            typed(
                run,
                "model=wide_resnet",
                "model.norm=none",
                "model.depth=10",
                "model.lr=0.05",
                "model.type=/home/me/own",
                *(f"model.option_{i}={i}" for i in range(4)),
                f"technique={arm}",
            )
    said = top(run_report(tmp_path)[1])
    assert "network WideResNet, model.norm=none, model.depth=10, model.type=own, model.option_0=0, " in said
    assert "model.option_2=2, 1 more of the model, 12 epochs" in said


def test_another_network_in_the_folder_goes_by_its_class_and_by_what_differs_beside_it(tmp_path):
    """As one has it after a first run of the default network and an ablation on a smaller one."""
    laptop = {"model._target_": "models.laptop.Laptop", "model.type": "S"}
    make_arm(tmp_path, "baseline", BASE, settings=laptop)
    make_arm(tmp_path, "mixup", BETTER, settings=laptop, techniques={"mixup": {"model.mixup": True}})
    other = {
        "model._target_": "models.dynamic_resnet.ResNet18",
        "model.cifar_size": True,
        "trainer.max_epochs": 10,
    }
    make_run(tmp_path, "baseline", 0, 0.95, settings=other, name="first")
    make_run(tmp_path, "baseline", 0, 0.96, settings={**other, "model.cifar_size": False}, name="second")
    make_run(
        tmp_path, "baseline", 0, 0.97, settings={**other, "model._target_": "models.x.Laptop"}, name="third"
    )
    names = set(run_report(tmp_path)[0]) - {"baseline", "mixup"}
    (longer,) = {name for name in names if " (" in name}
    assert re.fullmatch(r"ResNet18 trainer.max_epochs=10 \([0-9a-f]{8}\)", longer), (
        "two of one name are two arms"
    )
    assert names - {longer} == {"ResNet18 trainer.max_epochs=10", "models.x.Laptop trainer.max_epochs=10"}


def test_where_nothing_helps_the_paragraph_says_so(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", shifted(0.012, -0.010, 0.004, -0.007, 0.009))
    assert "**Helps**: no technique is found to." in top(run_report(tmp_path)[1])


# The numbers


def test_an_arm_is_described_by_its_runs(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    row = run_report(tmp_path)[0]["baseline"]
    expected = {"mean": np.mean(BASE), "sd": np.std(BASE, ddof=1), "median": np.median(BASE)}
    for name, value in {**expected, "min": min(BASE), "max": max(BASE), "n": 5, "time_s": 10}.items():
        assert float(row[name]) == pytest.approx(value)
    assert row["difference"] == row["verdict"] == "", "alone, it is compared with nothing"


def test_the_difference_is_scipys_paired_t(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    row = run_report(tmp_path)[0]["mixup"]
    reference = stats.ttest_rel(BETTER, BASE)
    interval = reference.confidence_interval(0.95)
    assert float(row["difference"]) == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    assert [float(row["low"]), float(row["high"])] == pytest.approx([interval.low, interval.high])
    assert float(row["p"]) == float(row["p_holm"]) == pytest.approx(reference.pvalue)


def test_runs_are_paired_by_seed_and_a_missing_pair_is_named(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    for seed in (4, 0, 7, 2):
        make_run(tmp_path, "mixup", seed, 0.95 if seed == 7 else BETTER[seed])
    rows, text = run_report(tmp_path)
    reference = stats.ttest_rel([BETTER[i] for i in (0, 2, 4)], [BASE[i] for i in (0, 2, 4)])
    assert rows["mixup"]["pairs"] == "3" and rows["mixup"]["n"] == "4"
    assert float(rows["mixup"]["p"]) == pytest.approx(reference.pvalue)
    assert "missing pair: mixup has seed 7, baseline has not" in text
    assert "missing pair: baseline has seed 1, seed 3, mixup has not" in text


def test_p_values_are_corrected_over_the_techniques_of_the_table(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    rng = np.random.default_rng(0)
    arms = {f"t{k}": [b + 0.001 * k + 0.001 * rng.normal() for b in BASE] for k in range(4)}
    for name, values in arms.items():
        make_arm(tmp_path, name, values)
    rows, text = run_report(tmp_path)
    p = sorted((stats.ttest_rel(values, BASE).pvalue, name) for name, values in arms.items())
    expected = np.maximum.accumulate([min(1, (4 - i) * value) for i, (value, _) in enumerate(p)])
    for (_, name), value in zip(p, expected, strict=True):
        assert float(rows[name]["p_holm"]) == pytest.approx(value)
    assert "among 4, one or more miss in about 19 of 100 such tables" in text


def test_the_cost_is_the_geometric_mean_of_paired_time_ratios(tmp_path):
    times = [(10, 19), (11, 23), (9, 18), (12, 25)]
    for seed, (base, technique) in enumerate(times):
        make_run(tmp_path, "baseline", seed, BASE[seed], seconds=base)
        make_run(tmp_path, "sam", seed, BETTER[seed], seconds=technique)
    row = run_report(tmp_path)[0]["sam"]
    logs = [math.log(technique / base) for base, technique in times]
    interval = stats.ttest_1samp(logs, 0).confidence_interval()
    expected = [stats.gmean([t / b for b, t in times]), math.exp(interval.low), math.exp(interval.high)]
    columns = ("time_ratio", "time_ratio_low", "time_ratio_high")
    assert [float(row[c]) for c in columns] == pytest.approx(expected)


def test_from_eight_pairs_on_the_sign_flip_test_stands_beside(tmp_path):
    rng = np.random.default_rng(1)
    base = (0.9 + 0.002 * rng.normal(size=9)).tolist()
    make_arm(tmp_path, "baseline", base)
    technique = [b + 0.001 + 0.002 * rng.normal() for b in base]
    make_arm(tmp_path, "mixup", technique)
    rows, text = run_report(tmp_path)
    differences = np.array(technique) - base
    reference = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert float(rows["mixup"]["p_flip"]) == pytest.approx(reference.pvalue)
    assert "| flip p |" in text


@pytest.mark.parametrize(("effect", "pairs", "of_six"), [(2, 5, 7), (1.5, 6, 9), (1, 10, 16), (0.75, 16, 26)])
def test_needed_pairs_reach_a_power_of_four_fifths(effect, pairs, of_six):
    assert statistics.needed_pairs(effect, 0.05) == pairs
    assert statistics.needed_pairs(effect, 0.05 / 6) == of_six
    rng = np.random.default_rng(0)
    p = stats.ttest_1samp(rng.normal(effect, 1, size=(20000, pairs)), 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(statistics.power(effect, pairs, 0.05), abs=0.01)
    assert statistics.detectable_effect(pairs, 0.05) <= effect < statistics.detectable_effect(pairs - 1, 0.05)


def test_effects_beyond_fifty_seeds_are_not_planned_for():
    assert statistics.needed_pairs(0.1, 0.05) is None


# The verdicts


@pytest.mark.parametrize(
    ("technique", "verdict"),
    [
        (BETTER, "helps by more than 0.30 points"),
        ([2 * b - t for b, t in zip(BASE, BETTER, strict=True)], "hurts by more than 0.30 points"),
        (SAME, "no difference larger than 0.30 points"),
        (shifted(0.0018, 0.0022, 0.0019, 0.0021, 0.002), "helps by less than 0.30 points"),
        (shifted(0.002, 0.005, 0.003, 0.004, 0.006), "helps"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_margin(tmp_path, technique, verdict):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", technique)
    assert run_report(tmp_path)[0]["mixup"]["verdict"] == verdict


def test_an_open_comparison_says_between_what_and_how_many_more_seeds(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    differences = np.array([0.006, -0.004, 0.003, -0.001, 0.005])
    make_arm(tmp_path, "mixup", (np.array(BASE) + differences).tolist())
    low, high = 100 * np.array(stats.ttest_1samp(differences, 0).confidence_interval())
    needed = statistics.needed_pairs(0.003 / float(np.std(differences, ddof=1)), 0.05)
    verdict = run_report(tmp_path)[0]["mixup"]["verdict"]
    assert verdict.startswith(
        f"undecided: between {low:+.2f} and {high:+.2f} points; about {needed - 5} more seeds ("
    )


def test_what_only_the_uncorrected_interval_excludes_is_not_claimed(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    differences = np.array([0.007, 0.001, 0.006, 0.0005, 0.005])
    assert 0.025 < stats.ttest_1samp(differences, 0).pvalue < 0.05
    make_arm(tmp_path, "mixup", (np.array(BASE) + differences).tolist())
    make_arm(tmp_path, "cutmix", SAME)
    assert "excludes 0 alone, not after correction for 2" in run_report(tmp_path)[0]["mixup"]["verdict"]


def test_two_pairs_show_both_differences_and_no_verdict(tmp_path):
    make_arm(tmp_path, "baseline", BASE[:2])
    make_arm(tmp_path, "mixup", [BASE[0] + 0.01, BASE[1] + 0.0123])
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["verdict"] == "cannot say (2 pairs)"
    assert rows["mixup"]["low"] == rows["mixup"]["p"] == rows["mixup"]["p_holm"] == ""
    assert "both: +1.00, +1.23" in text


def test_one_pair_has_neither_spread_nor_interval(tmp_path):
    make_run(tmp_path, "baseline", 0, 0.9)
    make_run(tmp_path, "mixup", 0, 0.92)
    row = run_report(tmp_path)[0]["mixup"]
    assert row["verdict"] == "cannot say (1 pair)"
    assert float(row["difference"]) == pytest.approx(0.02)
    assert row["sd"] == row["low"] == row["p"] == row["time_ratio_low"] == ""


def test_copied_runs_are_noticed(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", [b + 0.01 for b in BASE])
    make_arm(tmp_path, "cutmix", BETTER)
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["verdict"] == "cannot say (5 pairs, all with the same difference)"
    assert "mixup: every pair differs by the same +1.00: copied runs?" in text
    assert rows["cutmix"]["p"] == rows["cutmix"]["p_holm"], "what cannot be tested is not corrected for"


@pytest.mark.parametrize("wreck", [math.nan, math.inf, 0.104])
def test_diverged_runs_are_counted_apart(tmp_path, wreck):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "powergrad", [*BETTER[:4], wreck])
    rows, text = run_report(tmp_path)
    row = rows["powergrad"]
    assert row["verdict"] == "unstable: 1 of 5 runs diverged"
    assert (row["n"], row["diverged"], row["pairs"]) == ("4", "1", "4")
    assert float(row["mean"]) == pytest.approx(np.mean(BETTER[:4]))
    assert float(row["p"]) == pytest.approx(stats.ttest_rel(BETTER[:4], BASE[:4]).pvalue)
    assert "powergrad, seed 4 diverged: test/acc is" in text


def test_a_run_that_stopped_because_it_diverged_counts_as_diverged(tmp_path):
    make_arm(tmp_path, "mixup", BETTER)
    make_arm(tmp_path, "baseline", BASE[:4])
    make_run(tmp_path, "baseline", 4, None, status="failed", reason="diverged: train/loss is nan in epoch 2")
    rows, _ = run_report(tmp_path)
    assert rows["mixup"]["verdict"] == "unstable: 1 of 5 baseline runs diverged"


def test_a_metric_that_some_runs_lack_gives_no_verdict(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", [*BETTER[:4], None])
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["verdict"] == "cannot say (test/acc is not in all runs)"
    assert "mixup, seed 4 has no test/acc" in text


def test_of_a_loss_lower_is_better_and_there_is_no_margin(tmp_path):
    make_arm(tmp_path, "baseline", [0.31, 0.30, 0.33, 0.32], metric="test/loss")
    make_arm(tmp_path, "mixup", [0.21, 0.19, 0.24, 0.22], metric="test/loss")
    make_arm(tmp_path, "cutmix", [0.313, 0.298, 0.331, 0.316], metric="test/loss")
    rows, text = run_report(tmp_path, "metric=test/loss")
    assert rows["mixup"]["verdict"] == "helps"
    assert rows["cutmix"]["verdict"].startswith("undecided: between -0.00")
    assert "(lower is better)" in text and "no margin" in text and "points" not in text


@pytest.mark.parametrize(
    ("metric", "scale"), [("test/loss", 0.01), ("test/mae", 1.0), ("test/mse", 1e-5), ("test/r2", 0.1)]
)
def test_a_metric_that_is_no_percentage_takes_a_margin_in_its_own_unit(tmp_path, metric, scale):
    base = [scale * v for v in (31.0, 30.0, 33.0, 32.0, 31.5)]
    make_arm(tmp_path, "baseline", base, metric=metric)
    make_arm(
        tmp_path,
        "a",
        [b + scale * d for b, d in zip(base, (0.1, -0.1, 0.05, 0.1, -0.1), strict=True)],
        metric=metric,
    )
    make_arm(
        tmp_path,
        "b",
        [b - scale * d for b, d in zip(base, (3.1, 2.9, 3.0, 3.2, 2.8), strict=True)],
        metric=metric,
    )
    rows, text = run_report(tmp_path, f"metric={metric}", f"margin={scale}")
    assert rows["a"]["verdict"] == f"no difference larger than {scale:.4g}"
    assert rows["b"]["verdict"] == f"{'hurts' if metric == 'test/r2' else 'helps'} by more than {scale:.4g}"
    assert f"margin {scale:.4g};" in text and "points" not in text


def test_a_margin_in_the_metrics_unit_is_in_points_for_a_percentage(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    assert run_report(tmp_path, "margin=0.2")[0] == run_report(tmp_path, "margin_points=0.2")[0]


def test_the_f1_of_a_class_is_shown_in_percent_like_that_of_all(tmp_path):
    make_arm(tmp_path, "baseline", BASE, metric="test/f1_per_class/cat")
    make_arm(tmp_path, "mixup", BETTER, metric="test/f1_per_class/cat")
    _, text = run_report(tmp_path, "metric=test/f1_per_class/cat")
    assert "test/f1_per_class/cat in % of the last epoch (higher is better); data digits, 12 epochs" in text


# What to look at


def test_a_run_far_from_its_arm_is_pointed_out_but_kept(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", [*BETTER[:4], 0.70])
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["n"] == "5"
    assert "sd from its arm's median: look at this run (mixup-s4)" in text
    assert text.count("look at this run") == 1


def test_settings_that_differ_beside_the_technique_are_named(tmp_path):
    mixup = {"mixup": {"model.mixup": True}}
    make_arm(tmp_path, "baseline", BASE)
    make_arm(
        tmp_path, "mixup", BETTER, techniques=mixup, settings={"model.mixup": True, "trainer.max_epochs": 20}
    )
    make_arm(tmp_path, "lr=0.1", SAME, settings={"model.lr": 0.1})
    watching = {"_target_": "callbacks.early_stopping.EarlyStopping", "patience": 3}
    make_arm(
        tmp_path, "early", SAME, techniques={"early": {"callbacks.early.patience": 3}},
        settings={"callbacks": {"early": watching}},
    )  # fmt: skip
    text = run_report(tmp_path)[1].split("### Look at")[1].split("###")[0]
    assert "mixup differs from baseline also in trainer.max_epochs (20, baseline 12)" in text
    assert "model.mixup" not in text, "a technique's own option is what the arm is about"
    assert "callbacks.early" not in text, "and so is the whole of its callback"
    assert "model.lr" not in text, "so is what the arm's name spells out"
    assert "num_workers" not in text, "workers and paths do not change the result"


def test_an_option_that_older_runs_did_not_have_counts_as_its_default(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER, settings={"model.lookahead": False, "model.lookahead_k": 7})
    text = run_report(tmp_path)[1].split("### Look at")[1].split("###")[0]
    assert "model.lookahead_k (7, baseline 5)" in text and "model.lookahead (" not in text


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("model.lr", 0.2, "lr=0.2"),
        ("trainer.max_epochs", 20, "trainer.max_epochs=20"),
        ("data.module.batch_size", 32, "data.module.batch_size=32"),
        ("model.mixup", True, "mixup=true"),
    ],
)
@pytest.mark.parametrize("arm", ["baseline", "sam"])
def test_two_runs_that_differ_in_more_than_the_seed_are_never_one_arm(tmp_path, arm, option, value, name):
    make_arm(tmp_path, "baseline", BASE)
    if arm == "sam":
        make_arm(tmp_path, arm, BETTER)
    for seed in (0, 5):
        make_run(tmp_path, arm, seed, 0.95, settings={option: value}, name=f"other-s{seed}", started=0.0)
    rows, _ = run_report(tmp_path)
    other = name if arm == "baseline" else f"{arm} {name}"
    assert rows[arm]["n"] == "5" and rows[other]["n"] == "2"
    assert float(rows[other]["mean"]) == pytest.approx(0.95)


def test_what_does_not_change_a_result_parts_no_arm(tmp_path):
    """Workers, an option that older code did not have; nor anything of one identity."""
    make_run(tmp_path, "baseline", 0, 0.91, settings={"model.lookahead": False})
    make_run(tmp_path, "baseline", 1, 0.92)
    make_run(tmp_path, "baseline", 2, 0.93, identity="x")
    make_run(tmp_path, "baseline", 3, 0.93, identity="x", settings={"model.new_option": 7})
    assert {arm: row["n"] for arm, row in run_report(tmp_path)[0].items()} == {"baseline": "4"}


@pytest.mark.parametrize("teacher", ["/runs/1a2b3c4d-s{}/checkpoints/best.ckpt", "/w/t{}.pt"])
def test_a_seeds_own_teacher_parts_no_arm(tmp_path, teacher):
    """Known by the seed in its name, or as one arm of one sweep."""
    sweep = {"arms": ["baseline", "distillation"], "folder": "one", "created": 0.5}
    planned = {"sweep": sweep} if "checkpoints" not in teacher else {}
    for seed, value in enumerate(BASE):
        make_run(tmp_path, "baseline", seed, value, **planned)
        own = {"model.teacher": teacher.format(seed)}
        contents = {"model.teacher": f"{seed}" * 12}
        make_run(
            tmp_path, "distillation", seed, value + 0.01, settings=own, contents=contents,
            identity=f"{seed}" * 8, **planned,
        )  # fmt: skip
    other = {"model.teacher": "/runs/99999999-s0/checkpoints/best.ckpt"}
    make_run(tmp_path, "distillation", 5, 0.9, settings=other, identity="99999999")
    rows = {arm: row["n"] for arm, row in run_report(tmp_path)[0].items()}
    assert rows == {
        "baseline": "5",
        "distillation": "5",
        "distillation teacher=99999999-s0:best.ckpt": "1",
    }


# Content is a setting: where a file lies is none


PRETRAINED = {"model.init_from": "/w/pretrained.pt"}


@pytest.mark.parametrize("identities", [("1" * 8, "2" * 8), ("", "")])
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("model.init_from", "init_from=w.pt"),
        ("ckpt_path", "ckpt_path=w.pt"),
        ("data.module.csv_file", "data.module.csv_file=w.pt"),
        ("data.module.train_shards", "data.module.train_shards=w.pt"),
        ("model.teacher", "teacher=w.pt"),
        ("model.type", "type=w.pt"),
    ],
)
def test_what_a_file_contains_parts_arms_as_any_setting_does(tmp_path, option, name, identities):
    """Seeds from scratch and seeds that start from a file share seeds 3 and 4, and are two arms all the same."""
    for seed in range(5):
        make_run(tmp_path, "baseline", seed, BASE[seed], identity=identities[0], name=f"a-s{seed}")
    for seed in range(3, 6):
        make_run(
            tmp_path, "baseline", seed, 0.95, identity=identities[1], name=f"b-s{seed}",
            settings={option: "/w/w.pt"},
        )  # fmt: skip
    rows, text = run_report(tmp_path)
    assert {arm: row["n"] for arm, row in rows.items()} == {"baseline": "5", name: "3"}
    assert "2 runs;" not in text and f"{option} (w.pt, baseline" in text


def test_sweeps_from_other_weights_are_settings_of_their_own(tmp_path):
    make_study(tmp_path, "first1", drawn(1, online_norm=0.02), SHORT)
    make_study(tmp_path, "second2", drawn(2, online_norm=-0.015), {**SHORT, **PRETRAINED})
    rows = rows_of(tmp_path)
    assert rows["digits", "online_norm"]["verdict"].startswith("helps by more")
    assert rows["digits, init_from=pretrained.pt", "online_norm"]["verdict"].startswith("hurts by more")


def test_one_file_in_two_places_is_one_arm_by_its_recorded_fingerprint(tmp_path):
    """And two files of one name are two arms; so are runs of which nothing but the identity tells them apart."""
    for seed, (path, content, identity) in enumerate(
        [
            ("/w/a.pt", "1" * 12, "1" * 8),
            ("/elsewhere/renamed.pt", "1" * 12, "1" * 8),
            ("/elsewhere/a.pt", "1" * 12, "of other code"),
            ("/w/a.pt", "2" * 12, "2" * 8),
            ("/w/a.pt", "", "3" * 8),
            ("/w/a.pt", "", "1" * 8),
        ]
    ):
        make_run(
            tmp_path, "baseline", seed, BASE[seed % 5], name=f"r-s{seed}", identity=identity, started=seed,
            settings={"model.init_from": path}, contents={"model.init_from": content} if content else {},
            git={"commit": "def" if "code" in identity else "abc"},
        )  # fmt: skip
    rows, _ = run_report(tmp_path)
    assert {arm: row["n"] for arm, row in rows.items()} == {
        "baseline": "4",
        "init_from=a.pt@22222222": "1",
        "init_from=a.pt": "1",
    }


def test_an_identity_that_nothing_recorded_explains_is_an_arm_of_its_own(tmp_path):
    for seed in range(4):
        make_run(
            tmp_path, "baseline", seed, BASE[seed], name=f"r-s{seed}", identity=("1" * 8, "2" * 8)[seed // 3]
        )
    assert {arm: row["n"] for arm, row in run_report(tmp_path)[0].items()} == {
        "baseline": "3",
        "baseline (22222222)": "1",
    }


@pytest.mark.parametrize("what", [{"git": {"commit": "def"}}, {"recognised": "by names"}])
def test_an_identity_that_the_code_explains_parts_no_arm(tmp_path, what):
    for seed in range(4):
        facts = {"identity": "2" * 8, **what} if seed == 3 else {"identity": "1" * 8}
        make_run(tmp_path, "baseline", seed, BASE[seed], name=f"r-s{seed}", **facts)
    assert {arm: row["n"] for arm, row in run_report(tmp_path)[0].items()} == {"baseline": "4"}


def test_a_typed_file_names_an_arm_without_its_folder(tmp_path):
    for seed in range(3):
        make_run(tmp_path, "baseline", seed, BASE[seed])
        for place in ("one", "two"):
            path = f"/{place}/w.pt"
            run = make_run(
                tmp_path / place, "baseline", seed + 3 * (place == "two"), 0.95, settings={"model.init_from": path},
                contents={"model.init_from": "1" * 12}, identity="1" * 8, name=f"{place}-s{seed}",
            )  # fmt: skip
            typed(run, f"model.init_from={path}", f"seed={seed}")
    rows, _ = run_report(tmp_path)
    assert {arm: row["n"] for arm, row in rows.items()} == {"baseline": "3", "init_from=w.pt": "6"}


def typed(run: Path, *overrides: str) -> None:
    (run / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


def test_single_runs_are_named_as_a_sweep_of_them_would_be(tmp_path):
    """What all runs share is no arm, whatever was typed; a typed callback's option is one."""
    mixup = {"mixup": {"model.mixup": True}}
    for seed in range(3):
        shared = ["trainer.max_epochs=12", "model.lr=0.3", f"seed={seed}", "data=digits"]
        lr = {"model.lr": 0.3}
        typed(make_run(tmp_path, "lr=0.3", seed, BASE[seed], settings=lr, name=f"a-s{seed}"), *shared)
        run = make_run(
            tmp_path, "mixup lr=0.3", seed, BETTER[seed], techniques=mixup,
            settings={**lr, "model.mixup": True}, name=f"b-s{seed}",
        )  # fmt: skip
        typed(run, *shared, "technique=mixup")
        run = make_run(
            tmp_path, "lr=0.3", seed, 0.9, settings={**lr, "callbacks": {"x": {"k": 2}}}, name=f"c-s{seed}"
        )
        typed(run, *shared, "callbacks.x.k=2")
    rows, _ = run_report(tmp_path)
    assert {arm: row["n"] for arm, row in rows.items()} == {
        "baseline": "3",
        "mixup": "3",
        "callbacks.x.k=2": "3",
    }


def test_of_two_runs_with_one_seed_the_later_counts(tmp_path):
    make_run(tmp_path, "baseline", 0, 0.91, name="old-s0", started=1.0)
    make_run(tmp_path, "baseline", 0, 0.93, name="new-s0", started=2.0)
    rows, text = run_report(tmp_path)
    assert (rows["baseline"]["n"], float(rows["baseline"]["mean"])) == ("1", 0.93)
    assert "baseline, seed 0: 2 runs; new-s0 counts, not old-s0" in text


def test_a_run_that_its_sweep_dropped_may_be_one_of_several_of_its_seed(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    make_run(tmp_path, "mixup", 3, None, name="again-s3", status="failed", dropped=True)
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["pairs"] == "4"
    assert "mixup, seed 3: 2 runs; again-s3 counts, not mixup-s3" in text


def test_an_arm_that_lost_all_its_runs_has_their_settings(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    for seed in range(3):
        make_run(tmp_path, "sam", seed, None, status="failed", dropped=True)
    _, text = run_report(tmp_path)
    assert "sam, cannot say (0 pairs)" in text and "differs from baseline also in" not in text


def test_folds_of_one_seed_are_pairs_of_their_own(tmp_path):
    for fold in range(3):
        for arm, values in (("baseline", BASE), ("mixup", BETTER)):
            make_run(
                tmp_path, arm, 0, values[fold], name=f"{arm}-f{fold}", settings={"data.module.fold": fold}
            )
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["pairs"] == "3"
    assert "folds share training data" in text


def test_other_code_and_other_machines_are_mentioned(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER, git={"commit": "def"}, device="NVIDIA H200")
    text = run_report(tmp_path)[1]
    assert "runs come from 2 commits of the code: abc, def" in text
    assert "different devices (NVIDIA H200, cpu)" in text


# What is left out


def test_unfinished_failed_and_unreadable_runs_are_listed_with_their_reason(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_run(tmp_path, "a", 0, None, status="failed", reason="CUDA out of memory")
    make_run(tmp_path, "b", 0, None, status="interrupted", reason="stopped by SIGTERM")
    make_run(tmp_path, "c", 0, None, status="running", heartbeat=0)
    live = make_run(tmp_path, "d", 0, None, status="running")
    (live / "claim").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getppid()}))
    (make_run(tmp_path, "e", 0, 0.9) / "summary.json").write_text('{"status": "finis')
    (make_run(tmp_path, "f", 0, 0.9) / "summary.json").unlink()
    (make_run(tmp_path, "g", 0, 0.9) / "config.yaml").unlink()
    make_run(tmp_path, "h", 0, 0.9, name="h-s0.old-1")
    rows, text = run_report(tmp_path)
    assert list(rows) == ["baseline"]
    listed = dict(
        line.split(" | ", 1) for line in text.split("## Runs left out")[1].splitlines() if "-s0 |" in line
    )
    status = {Path(run).name[0]: rest for run, rest in listed.items()}
    assert status["a"] == "failed | CUDA out of memory |"
    assert status["b"].startswith("interrupted | stopped by SIGTERM; go on with: python main.py run=")
    assert status["c"].startswith("lost | stopped without a word")
    assert status["d"] == "running |  |"
    assert status["e"].startswith("unreadable | ") and status["g"].startswith("unreadable | ")
    assert status["f"].startswith("unfinished | ")
    assert "h" not in status, "a run that was replaced is not looked at"


def test_with_nothing_finished_the_report_is_the_list_of_what_is_not(tmp_path):
    make_run(tmp_path, "baseline", 0, None, status="failed", reason="no disk space")
    rows, text = run_report(tmp_path)
    assert rows == {} and "no disk space" in text


# The command line


def test_each_data_set_has_its_own_table(tmp_path):
    for data in ("cifar10", "digits"):
        make_arm(tmp_path, "baseline", BASE, data=data)
        make_arm(tmp_path, "mixup", BETTER, data=data)
    assert report.main([f"runs={tmp_path}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.index("## cifar10") < text.index("## digits")
    assert text.count("helps by more than") == 2


def make_settings(root: Path, shifts: dict[str, float], metric: str = "test/acc", **options) -> None:
    """In each data set mixup has about this effect."""
    for number, (data, shift) in enumerate(shifts.items()):
        make_arm(root, "baseline", BASE, data=data, metric=metric, **options)
        better = shifted(*(shift + 0.0002 * (-number, 1, -1, 2, number)[i] for i in range(5)))
        make_arm(root, "mixup", better, data=data, metric=metric, **options)


def general(root: Path) -> tuple[dict[str, str], str]:
    with (root / "report" / "results.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["data"] == "all settings"]
    return (rows[0] if rows else {}), (root / "report" / "report.md").read_text()


def test_over_three_settings_it_is_said_whether_a_technique_helps_in_general(tmp_path):
    make_settings(tmp_path, {"cifar10": 0.009, "digits": 0.0105, "svhn": 0.012})
    assert report.main([f"runs={tmp_path}"]) == 0
    row, text = general(tmp_path)
    with (tmp_path / "report" / "results.csv").open(newline="") as stream:
        each = [float(r["difference"]) for r in csv.DictReader(stream) if r["pairs"] == "5"]
    reference = stats.ttest_1samp(each, 0)
    assert len(each) == 3 and row["settings"] == "3"
    assert float(row["difference"]) == pytest.approx(np.mean(each))
    assert float(row["p"]) == float(row["p_holm"]) == pytest.approx(reference.pvalue)
    assert row["verdict"] == "helps in general by more than 0.30 points"
    assert (
        "**Helps in general**: mixup, +1.0" in text and "another setting, measured alike, would show" in text
    )
    assert text.index("## In general") < text.index("## cifar10")


def test_a_technique_whose_own_options_differ_between_settings_is_named(tmp_path):
    for data, alpha in (("cifar10", 0.2), ("digits", 0.2), ("svhn", 0.4)):
        make_arm(tmp_path, "baseline", BASE, data=data, settings={"trainer.max_epochs": 12 + len(data)})
        for arm in ("mixup", "sam"):
            options = {"model.mixup_alpha": alpha} if arm == "mixup" else {"model.sam_rho": 0.05}
            make_arm(
                tmp_path, arm, BETTER, data=data, techniques={arm: options},
                settings={"trainer.max_epochs": 12 + len(data), **options},
            )  # fmt: skip
    assert report.main([f"runs={tmp_path}"]) == 0
    text = general(tmp_path)[1].replace("\\", "")
    said = "mixup is not the same in all settings: model.mixup_alpha (cifar10: 0.2; digits: 0.2; svhn: 0.4)"
    assert said in text and "sam is not the same" not in text and "max_epochs (" not in text


def test_two_settings_are_too_few(tmp_path):
    make_settings(tmp_path, {"cifar10": 0.010, "digits": 0.011})
    assert report.main([f"runs={tmp_path}"]) == 0
    row, text = general(tmp_path)
    assert row["verdict"] == "cannot say (2 settings; it takes 3 at least)" and row["p_holm"] == ""
    assert re.search(
        r"\*\*Too few settings .* which takes 3\*\*: mixup \+1\.\d+ \(cifar10\), \+1\.\d+ \(digits\)", text
    )


def test_an_arm_that_is_unstable_in_one_setting_is_not_said_to_help_in_general(tmp_path):
    make_settings(tmp_path, {"cifar10": 0.009, "digits": 0.0105, "svhn": 0.012, "mnist": 0.01})
    make_run(tmp_path, "mixup", 9, None, data="svhn", status="failed", reason="diverged: train/loss is nan")
    assert report.main([f"runs={tmp_path}"]) == 0
    row, text = general(tmp_path)
    assert row["verdict"] == "unstable in svhn" and row["settings"] == "3"
    assert "mixup in svhn: unstable: 1 of 6 runs diverged" in text


def test_losses_of_several_settings_have_no_mean(tmp_path):
    make_settings(tmp_path, {"cifar10": 0.009, "digits": 0.0105, "svhn": 0.012}, metric="test/loss")
    assert report.main([f"runs={tmp_path}", "metric=test/loss"]) == 0
    row, text = general(tmp_path)
    assert not row and "test/loss has another scale in each setting" in text


def test_networks_on_which_techniques_were_tried_are_settings(tmp_path):
    networks = {"ResNet18": "models.dynamic_resnet.ResNet18", "WRN2810": "models.wide_resnet.WRN2810"}
    for name, target in networks.items():
        swept = f"model={name}"
        for arm, values in (("", BASE), ("mixup ", BETTER)):
            make_arm(
                tmp_path, f"{arm}{swept}", values, settings={"model._target_": target},
                techniques={"mixup": {}} if arm else {},
            )  # fmt: skip
    assert report.main([f"runs={tmp_path}"]) == 0
    _, text = general(tmp_path)
    assert "## digits, ResNet18" in text and "## digits, WRN2810" in text and "## In general" in text
    assert text.count("| mixup | +0.92 | helps by more than 0.30 points |") == 2
    assert report.main([f"runs={tmp_path}", "networks=arms", "baseline=model=ResNet18"]) == 0
    _, text = general(tmp_path)
    assert "## digits\n" in text and "| mixup model=WRN2810 |" in text and "## In general" not in text


def test_runs_takes_several_folders_and_globs_and_out_says_where(tmp_path):
    make_arm(tmp_path / "one", "baseline", BASE)
    make_arm(tmp_path / "two", "mixup", BETTER)
    out = tmp_path / "here"
    assert report.main([f"runs={tmp_path}/o*/digits,{tmp_path}/two", f"out={out}"]) == 0
    assert "mixup" in (out / "results.csv").read_text()
    assert report.main([f"runs={tmp_path}/one,{tmp_path}/two"]) == 0
    assert (tmp_path / "report" / "report.md").is_file(), "several folders: beside them"


def test_a_glob_counts_no_run_that_was_put_aside_and_its_own_name_does(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_run(tmp_path, "baseline", 9, 0.5, name="baseline-s9.old-1")
    for typed, runs in (("*", "5"), ("baseline-s9.old-1", "1"), ("*.old-1", "1")):
        assert report.main([f"runs={tmp_path}/digits/{typed}", f"out={tmp_path}/report"]) == 0
        assert written(tmp_path)[0]["baseline"]["n"] == runs, typed


def test_the_report_is_printed_without_control_characters_to_a_file(tmp_path, capsys):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    run_report(tmp_path)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "helps by more than 0.30 points" in out and f"written: {tmp_path / 'report' / 'report.md'}" in out


def test_the_baseline_is_chosen_or_asked_for(tmp_path, capsys):
    make_arm(tmp_path, "sgd", BASE)
    make_arm(tmp_path, "adam", BETTER)
    assert report.main([f"runs={tmp_path}"]) == 2
    assert "baseline is missing in digits; choose one of: adam, sgd" in capsys.readouterr().err
    rows, _ = run_report(tmp_path, "baseline=sgd")
    assert rows["adam"]["verdict"].startswith("helps")
    assert report.main([f"runs={tmp_path}", "baseline=sdg"]) == 2
    assert "baseline=sdg: no such arm in digits; choose one of: adam, sgd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={}"], "there is no option run; did you mean runs?"),
        (["{}"], "options are written key=value, such as runs="),
        (["metric=val/acc"], "runs is missing: python report.py runs="),
        (["runs={}/nothing"], "no such folder"),
        (["runs={}", "metric=test/accc"], "not a metric with a better direction; did you mean acc?"),
        (["runs={}", "metric=val/acc"], "no finished run has it; known: test/acc"),
        (["runs={}", "margin_points=much"], "margin_points must be a number in (0, 100), got 'much'"),
        (["runs={}", "margin_points=-1"], "margin_points must be a number in (0, 100), got '-1'"),
        (
            ["runs={}", "metric=test/loss", "margin_points=1"],
            "test/loss is not a percentage; margin=1 is in its own",
        ),
        (["runs={}", "metric=test/loss", "margin=-1"], "margin must be a number in (0, inf), got '-1'"),
        (["runs={}", "margin=1", "margin_points=1"], "give one"),
        (["runs="], "runs= has no value"),
        (["runs={}", "checkpoint=first"], "checkpoint must be one of last, best, got 'first'"),
        (["runs={}", "checkpoint=best"], "no run has tested its best weights"),
        (["runs={}", "out={}/digits/baseline-s0/summary.json"], "there is a file of this name"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, capsys, arguments, message):
    make_run(tmp_path, "baseline", 0, 0.9)
    assert report.main([a.format(tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err


def test_a_folder_without_runs_is_a_mistake(tmp_path, capsys):
    assert report.main([f"runs={tmp_path}"]) == 2
    assert "no run directory there" in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    heavy = "{'torch', 'lightning', 'scipy', 'rich', 'numpy', 'yaml'}"
    code = f"import sys, report; status = report.main(['--help']); print({heavy} & set(sys.modules), status)"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout.splitlines()[-1] == "set() 0"
    plain = subprocess.run(
        [sys.executable, "report.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert plain.stdout == report.HELP


# What was fixed before the runs


def record_sweep(root: Path, arms: list[str], seeds: int = 5, time: str = "20260101-000000", **facts) -> None:
    folder = root / "sweeps" / time
    folder.mkdir(parents=True)
    runs = [str(root / "digits" / f"{arm}-s{seed}") for arm in arms for seed in range(seeds)]
    record = {"design": "one_at_a_time", "margin_points": 0.5, "planned_seeds": 5, "arms": arms, "runs": runs}
    (folder / "sweep.json").write_text(json.dumps({**record, "created": 1.0, **facts}))


def test_the_margin_that_the_sweep_fixed_is_used_without_asking(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    record_sweep(tmp_path, ["baseline", "mixup"])
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["verdict"] == "helps by more than 0.50 points"
    assert "margin 0.50 points" in text and "planned seeds 5" in text and "Note:" not in text


def test_another_margin_than_the_sweeps_is_said_on_the_face_of_the_report(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    record_sweep(tmp_path, ["baseline", "mixup"])
    text = run_report(tmp_path, "margin_points=0.2")[1]
    face = text.split("### Verdicts")[0]
    assert "asked for a margin of 0.20 points; the sweep fixed 0.50 points before its runs" in face


def test_a_run_may_carry_what_its_sweep_fixed(tmp_path):
    facts = {"design": "pairs", "margin_points": 0.1, "planned_seeds": 5}
    make_arm(tmp_path, "baseline", BASE, sweep=facts)
    make_arm(tmp_path, "mixup", BETTER, sweep=facts)
    assert "margin 0.10 points" in run_report(tmp_path)[1]


def test_without_a_sweep_the_face_says_that_the_margin_is_a_default(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    assert "No sweep recorded a margin" in run_report(tmp_path)[1].split("### Verdicts")[0]


def test_a_look_that_was_not_planned_is_said(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    record_sweep(tmp_path, ["baseline", "mixup"], planned_seeds=3)
    assert "mixup: unplanned look: 5 pairs, planned were 3 (after the last)" in run_report(tmp_path)[1]


def test_seeds_that_a_second_sweep_adds_are_an_unplanned_look(tmp_path):
    for arm, values in (("baseline", BASE), ("mixup", BETTER)):
        make_arm(tmp_path, arm, [*values, *(v + 0.001 for v in values)])
    record_sweep(tmp_path, ["baseline", "mixup"])
    record_sweep(
        tmp_path, ["baseline", "mixup"], seeds=10, time="2", planned_seeds=10, margin_points=0.1, created=2.0
    )
    text = run_report(tmp_path)[1]
    assert "mixup: unplanned look: 10 pairs, planned were 5 (after the last)" in text
    assert "sweeps with different margins (0.10, 0.50); the first sweep's counts" in text


def test_the_sweep_may_name_the_baseline(tmp_path):
    make_arm(tmp_path, "sgd", BASE)
    make_arm(tmp_path, "adam", BETTER)
    record_sweep(tmp_path, ["sgd", "adam"], baseline="sgd")
    assert run_report(tmp_path)[0]["adam"]["verdict"].startswith("helps")


def test_planned_looks_share_the_level(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    differences = np.array([0.007, 0.0015, 0.006, 0.001, 0.005])
    share = 0.5**1.5 - 0.3**1.5  # of the second of three looks
    assert 0.05 * share < stats.ttest_1samp(differences, 0).pvalue < 0.05
    make_arm(tmp_path, "mixup", (np.array(BASE) + differences).tolist())
    record_sweep(tmp_path, ["baseline", "mixup"], planned_seeds=[3, 5, 10])
    rows, text = run_report(tmp_path)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 * share)
    assert [float(rows["mixup"]["low"]), float(rows["mixup"]["high"])] == pytest.approx([low, high])
    assert rows["mixup"]["verdict"].startswith("undecided")
    assert "99.1% interval" in text and "unplanned look" not in text
    assert "3 (0.164), 5 (0.189), 10 (0.646)" in text


def test_arms_that_ended_at_different_looks_are_each_held_to_their_own(tmp_path):
    rng = np.random.default_rng(4)
    base = (0.9 + 0.002 * rng.normal(size=10)).tolist()
    make_arm(tmp_path, "baseline", base)
    early, late = ((np.array(base[:n]) + 0.004 + 0.002 * rng.normal(size=n)).tolist() for n in (5, 10))
    make_arm(tmp_path, "early", early)
    make_arm(tmp_path, "late", late)
    record_sweep(tmp_path, ["baseline", "early", "late"], seeds=10, planned_seeds=[5, 10])
    rows, text = run_report(tmp_path)
    shares = {"early": 0.5**1.5, "late": 1 - 0.5**1.5}
    p = {"early": stats.ttest_rel(early, base[:5]).pvalue, "late": stats.ttest_rel(late, base).pvalue}
    q = sorted((p[arm] / shares[arm], arm) for arm in p)
    expected = {q[0][1]: min(1, 2 * q[0][0]), q[1][1]: min(1, max(2 * q[0][0], q[1][0]))}
    for arm, share in shares.items():
        assert float(rows[arm]["p_holm"]) == pytest.approx(expected[arm])
        assert float(rows[arm]["level"]) == pytest.approx(0.05 * share)
    assert "| interval |" in text and "(98.2%)" in text and "(96.8%)" in text


LOWER = [-0.004, -0.0042, 0.012, -0.0041, -0.0039, -0.0038]  # but for the third, by nearly the same


def make_planned(root: Path, seeds: Iterable[int], recorded: bool, looks: tuple[int, ...] = (5, 20)) -> None:
    """A technique with these differences from the baseline, by seed, and the plan with or without its record."""
    order = list(seeds)
    facts = {"planned_seeds": list(looks), "margin_points": 0.3, "created": 1.0, "rule": 3}
    for arm in ("baseline", "mixup"):
        for seed, difference in zip(order, LOWER, strict=False):
            make_run(root, arm, seed, 0.93 + 0.001 * (seed % 3) + difference * (arm == "mixup"), sweep=facts)
    if recorded:
        runs = [{"run": f"../../digits/{arm}-s{n}", "arm": arm, "seed": n, "fold": 0} for arm in ("baseline", "mixup")
                for n in order]  # fmt: skip
        record_sweep(root, ["baseline", "mixup"], **{**facts, "runs": runs})


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "typed by hand"])
def test_a_planned_look_waits_for_its_seeds_and_reads_no_others(tmp_path, recorded):
    make_planned(tmp_path, range(6), recorded)
    summary = tmp_path / "digits/mixup-s2/summary.json"
    ended = summary.read_text()
    summary.write_text(json.dumps({**json.loads(ended), "status": "running", "final": {}}))
    row = run_report(tmp_path)[0]["mixup"]
    assert row["verdict"] == "no look yet: 4 of 5 seeds; 1 later seed not used", "five others would say hurts"
    assert row["p"] == row["low"] == ""
    summary.write_text(ended)
    row = run_report(tmp_path)[0]["mixup"]
    assert row["verdict"].startswith("undecided: between") and "1 later seed not used" in row["verdict"]
    assert float(row["difference"]) == pytest.approx(np.mean(LOWER[:5]))


def test_a_planned_look_reads_the_seeds_in_the_order_in_which_they_were_recorded(tmp_path):
    make_planned(tmp_path, [9, 3, 7, 1, 5], True, looks=(3, 5))
    shutil.rmtree(tmp_path / "digits/mixup-s5")
    row = run_report(tmp_path)[0]["mixup"]
    assert (row["look"], row["seeds_not_used"]) == ("1", "1")
    assert float(row["difference"]) == pytest.approx(np.mean(LOWER[:3])), "of seeds 9, 3 and 7"


def test_a_finding_at_a_planned_look_outlasts_a_run_that_diverges_later(tmp_path):
    make_planned(tmp_path, [0, 1, 5, 2, 3, 4], False)
    shutil.rmtree(tmp_path / "digits/mixup-s5")
    found = run_report(tmp_path)[0]["mixup"]["verdict"]
    assert found.startswith("hurts") and "(look 1 of 2, 5 seeds" in found
    make_run(tmp_path, "mixup", 5, math.nan)
    assert run_report(tmp_path)[0]["mixup"]["verdict"] == found


def test_no_difference_is_corrected_for_the_number_of_techniques(tmp_path):
    """An interval inside the margin is enough for one technique, and not for the same among six."""
    make_arm(tmp_path, "baseline", BASE)
    near = shifted(0.0012, -0.0011, 0.0016, -0.0012, 0.0013)
    make_arm(tmp_path, "t0", near)
    assert run_report(tmp_path)[0]["t0"]["verdict"] == "no difference larger than 0.30 points"
    for k in range(1, 6):
        make_arm(tmp_path, f"t{k}", BETTER)
    rows, _ = run_report(tmp_path)
    assert rows["t0"]["verdict"].startswith("undecided: between")
    assert "(within ±0.30 points alone, not after correction for 6)" in rows["t0"]["verdict"]
    d = np.array(near) - BASE
    inside = [
        stats.ttest_1samp(d, 0.003, alternative="less").pvalue,
        stats.ttest_1samp(d, -0.003, alternative="greater").pvalue,
    ]
    assert float(rows["t0"]["p_none"]) == pytest.approx(min(1, 2 * 6 * max(inside)))


def test_techniques_that_got_no_further_runs_are_corrected_for(tmp_path):
    """Whoever drops an arm, or whose runs diverge, has looked at it."""
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    make_arm(tmp_path, "wrecked", [math.nan] * 5)
    record_sweep(tmp_path, ["baseline", "mixup", "wrecked"])
    row = run_report(tmp_path)[0]["mixup"]
    assert float(row["p_holm"]) == pytest.approx(2 * float(row["p"]))
    record_sweep(tmp_path, ["baseline", "mixup", "wrecked", "never", "begun"], time="0", created=0.5)
    row = run_report(tmp_path)[0]["mixup"]
    assert float(row["p_holm"]) == pytest.approx(4 * float(row["p"]))


def test_the_report_says_by_which_rule_it_judged(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    record_sweep(tmp_path, ["baseline", "mixup"])
    text = run_report(tmp_path)[1]
    assert "Judged by rule 3" in text and "were planned under rule 1" in text
    record_sweep(tmp_path, ["baseline", "mixup"], time="0", created=0.5, rule=2)
    text = run_report(tmp_path)[1]
    assert "Judged by rule 3" in text and "planned under rule" not in text, "of one look rule 2 said the same"
    record_sweep(tmp_path, ["baseline", "mixup"], time="1", created=0.3, rule=2, planned_seeds=[5, 10])
    assert "were planned under rule 2" in run_report(tmp_path)[1]


# Seeds until it is decided


PLANNED = {
    "seeds": list(range(10, 30)),
    "fold": 0,
    "metric": "test/acc",
    "futility": 0.1,
    "order": "together",
}


def make_decided(root: Path, counts: dict[str, int], **facts) -> dict[str, np.ndarray]:
    """A sweep of `until=decided` with so many seeds of each arm, looks at 5, 8, 12 and 20; the arms' values."""
    rng = np.random.default_rng(3)
    base = 0.9 + 0.002 * rng.normal(size=20)
    effects, noise = {"baseline": 0.0, "strong": 0.02, "weak": 0.002, "noisy": 0.0}, rng.normal(size=(4, 20))
    noise[3] -= noise[3, :8].mean()  # nothing to see at its second look
    spread = {"baseline": 0.0, "strong": 0.0015, "weak": 0.0025, "noisy": 0.03}
    values = {a: base + effects[a] + spread[a] * n for a, n in zip(effects, noise, strict=True)}
    for arm, count in counts.items():
        for seed in range(count):
            make_run(root, arm, 10 + seed, float(values[arm][seed]))
    record_sweep(
        root, list(effects), planned_seeds=[5, 8, 12, 20], margin_points=0.3, rule=3, decides=PLANNED, **facts
    )
    sweep = root / "sweeps/20260101-000000/sweep.json"
    runs = [str(run) for run in (root / "digits").iterdir()]
    sweep.write_text(json.dumps({**json.loads(sweep.read_text()), "runs": runs}))
    return values


def test_each_arm_is_read_at_its_look_with_the_repeated_interval(tmp_path):
    values = make_decided(tmp_path, {"baseline": 8, "strong": 5, "weak": 8, "noisy": 8})
    rows, text = run_report(tmp_path)
    share = (5 / 20) ** 1.5
    test = stats.ttest_rel(values["strong"][:5], values["baseline"][:5])
    interval = test.confidence_interval(1 - 0.05 * share)
    strong = rows["strong"]
    assert [float(strong["low"]), float(strong["high"])] == pytest.approx([interval.low, interval.high])
    assert float(strong["p_holm"]) == pytest.approx(3 * test.pvalue / share), (
        "three techniques, over all looks"
    )
    assert strong["verdict"].startswith(
        "helps by more than 0.30 points (look 1 of 4, 5 seeds, p over all looks "
    )
    assert rows["noisy"]["verdict"].startswith("stopped at 8 seeds: between")
    assert "chance of a decision by 20 seeds" in rows["noisy"]["verdict"]
    assert (rows["weak"]["look"], rows["weak"]["seeds_at_look"]) == ("2", "8")
    assert rows["weak"]["verdict"].startswith("undecided: between")
    assert (
        f"next look at 12 seeds (chance of a decision {float(rows['weak']['chance']):.0%})"
        in rows["weak"]["verdict"]
    )
    assert "Looks planned at 5, 8, 12 and 20 seeds. Seeds beyond 20 can change no finding." in text
    wider = stats.t.isf(0.025 * share, 4) / stats.t.isf(0.025, 4)
    assert f"at 5 seeds it is {wider:.1f} times as wide as for 5 seeds fixed beforehand" in text
    assert "An early *helps* was read because the difference looked large" in text


def test_between_two_looks_no_finding_changes_and_later_seeds_are_named(tmp_path):
    make_decided(tmp_path / "at", {"baseline": 8, "strong": 5, "weak": 8, "noisy": 8})
    make_decided(tmp_path / "later", {"baseline": 11, "strong": 9, "weak": 11, "noisy": 9})
    at, later = (run_report(tmp_path / name)[0] for name in ("at", "later"))
    for arm, extra in (("strong", 4), ("weak", 3), ("noisy", 1)):
        plural = "" if extra == 1 else "s"
        assert later[arm]["verdict"] == f"{at[arm]['verdict']}; {extra} later seed{plural} not used"
        for column in ("pairs", "difference", "low", "high", "p", "p_holm", "level"):
            assert later[arm][column] == at[arm][column], column


def test_before_the_first_look_there_is_no_verdict(tmp_path):
    make_decided(tmp_path, {"baseline": 5, "strong": 4, "weak": 5, "noisy": 5})
    rows, _ = run_report(tmp_path)
    assert rows["strong"]["verdict"] == "no look yet: 4 of 5 seeds"
    assert rows["weak"]["verdict"] == "no look yet: 5 of 5 seeds", "the arms are read together"
    assert rows["weak"]["low"] == rows["weak"]["p"] == ""


def test_a_diverged_run_after_a_finding_does_not_take_it_back(tmp_path):
    make_decided(tmp_path, {"baseline": 8, "strong": 5, "weak": 7, "noisy": 8})
    make_run(tmp_path, "strong", 15, math.nan)
    make_run(tmp_path, "weak", 17, math.nan)
    sweep = tmp_path / "sweeps/20260101-000000/sweep.json"
    runs = [str(run) for run in (tmp_path / "digits").iterdir()]
    sweep.write_text(json.dumps({**json.loads(sweep.read_text()), "runs": runs}))
    rows, _ = run_report(tmp_path)
    assert rows["strong"]["verdict"].startswith("helps by more than 0.30 points (look 1 of 4")
    assert rows["weak"]["verdict"] == "unstable: 1 of 8 runs diverged"


def test_a_seed_that_the_sweep_dropped_is_no_pair_and_no_divergence(tmp_path):
    make_decided(tmp_path, {"baseline": 5, "strong": 5, "weak": 5, "noisy": 5})
    file = tmp_path / "digits/baseline-s11/summary.json"
    failed = {"status": "failed", "reason": "diverged: train/loss is nan", "final": {}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **failed}))
    assert run_report(tmp_path)[0]["strong"]["verdict"].startswith("unstable: 1 of 5 baseline runs diverged")
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropped": True}))
    row = run_report(tmp_path)[0]["strong"]
    assert row["verdict"].startswith("helps") and row["pairs"] == "4"


def test_a_report_of_another_metric_says_that_no_look_was_planned_for_it(tmp_path):
    make_decided(tmp_path, {"baseline": 5, "strong": 5, "weak": 5, "noisy": 5})
    for file in (tmp_path / "digits").glob("*/summary.json"):
        summary = json.loads(file.read_text())
        summary["final"]["val/acc"] = summary["final"]["test/acc"] + 0.01
        file.write_text(json.dumps(summary))
    text = run_report(tmp_path, "metric=val/acc")[1]
    assert (
        "The sweep decided by test/acc, which says how many seeds each arm got"
        in text.split("### Verdicts")[0]
    )
    assert "(look 1 of 4, 5 seeds)" in text and "next look" not in text, "no seeds follow for this metric"


# Several sweeps in one report: each against its own baseline, at its own looks


def make_study(root: Path, name: str, arms: dict[str, list[float]], settings: dict, **facts) -> None:
    """A sweep of `until=decided` at 5, 8 and 12 seeds, as the lab records it: runs are found by their identity."""
    identities = {arm: f"{name[-1]}{number:07d}" for number, arm in enumerate(arms)}
    runs = [
        make_run(
            root, arm, seed, value, settings={**settings, **({"model.lr": 0.05 + 0.001 * number} if number else {})},
            techniques={arm: {"model.lr": 1}} if number else {}, identity=identities[arm],
            name=f"{identities[arm]}-s{seed}",
        )
        for number, (arm, values) in enumerate(arms.items())
        for seed, value in enumerate(values)
    ]  # fmt: skip
    decides = {**PLANNED, "seeds": list(range(12))}
    folder = root / "sweeps" / name
    folder.mkdir(parents=True)
    record = {
        "arms": list(arms), "baseline": next(iter(arms)), "planned_seeds": [5, 8, 12], "margin_points": 0.3, "rule": 3,
        "decides": decides, "identities": identities, "runs": list(map(str, runs)), "created": float(name[-1]), **facts,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(record))


def drawn(seed: int, **effects: float) -> dict[str, list[float]]:
    """Eight seeds of a baseline near 0.9 and of arms with these effects."""
    rng = np.random.default_rng(seed)
    base = 0.9 + 0.002 * rng.normal(size=8)
    return {
        arm: list(base + effect + 0.002 * rng.normal(size=8) * (arm != "baseline"))
        for arm, effect in {"baseline": 0.0, **effects}.items()
    }


SHORT, LONG = {"trainer.max_epochs": 4}, {"trainer.max_epochs": 30}
OF_A_FINDING = ("verdict", "difference", "low", "high", "p", "p_holm", "pairs", "look", "margin_p")


def rows_of(root: Path, *arguments: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of results.csv by setting and arm."""
    assert report.main([f"runs={root}", *arguments]) == 0
    with (root / "report" / "results.csv").open(newline="") as stream:
        return {(row["data"], row["arm"]): row for row in csv.DictReader(stream)}


def test_sweeps_of_other_settings_are_read_together_as_each_is_alone(tmp_path):
    short = drawn(1, mixup=0.02, cutmix=0.001, sam=-0.004, powergrad=0.0, smooth=0.002)
    long = drawn(2, mixup=-0.015, powergrad=0.0012)
    for where in ("alone", "together"):
        make_study(tmp_path / where, "first1", short, SHORT)
        make_study(tmp_path / where if where == "together" else tmp_path / "other", "second2", long, LONG)
    together = rows_of(tmp_path / "together")
    for root, epochs, arms in (("alone", 4, short), ("other", 30, long)):
        alone = rows_of(tmp_path / root)
        for arm in arms:
            mine = together[f"digits, trainer.max_epochs={epochs}", arm]
            assert {n: mine[n] for n in OF_A_FINDING if n in mine} == {
                n: alone["digits", arm][n] for n in OF_A_FINDING if n in mine
            }, arm
    assert together["digits, trainer.max_epochs=4", "mixup"]["verdict"].startswith("helps by more")
    assert together["digits, trainer.max_epochs=30", "mixup"]["verdict"].startswith("hurts by more")
    text = (tmp_path / "together" / "report" / "report.md").read_text()
    assert "## In general" in text and "differs from baseline also in" not in text


def test_in_one_table_no_arm_has_the_finding_of_another_sweeps_arm_of_that_name(tmp_path):
    few, many = drawn(1, mixup=0.0008), drawn(2, mixup=0.0, **{f"t{i}": 0.0 for i in range(9)})
    make_study(tmp_path / "alone", "first1", many, SHORT)
    make_study(tmp_path / "together", "first1", many, SHORT)
    make_study(tmp_path / "together", "second2", few, LONG)
    alone, together = rows_of(tmp_path / "alone"), rows_of(tmp_path / "together", "networks=arms")
    for arm in many:
        mine, own = together["digits", arm], alone["digits", arm]
        assert (mine["verdict"], mine["p_holm"]) == (own["verdict"], own["p_holm"]), arm
    text = (tmp_path / "together" / "report" / "report.md").read_text()
    assert (
        "mixup trainer.max_epochs=30, trainer.max_epochs=30: their looks were planned against another baseline than "
        "baseline, against which nothing was planned for them; baseline=trainer.max_epochs=30 shows what "
        "was decided" in text.replace("\\", "")
    )


def test_in_one_table_the_longer_baseline_of_another_sweep_is_no_technique_either(tmp_path):
    arms = drawn(1, mixup=0.02)
    arms["baseline_x2.00"] = [value + 0.02 for value in arms["baseline"]]
    for name, settings in (("first1", SHORT), ("second2", LONG)):
        make_study(tmp_path, name, arms, settings, rivals={"mixup": "baseline_x2.00"})
    rows = rows_of(tmp_path, "networks=arms")
    longer = [row["verdict"] for (_, arm), row in rows.items() if arm.startswith("baseline_x2.00")]
    assert len(longer) == 2 and all(verdict.startswith("no technique") for verdict in longer)


def test_a_setting_of_another_network_names_what_was_typed_of_it(tmp_path):
    make_study(tmp_path, "first1", drawn(1, mixup=0.02), {"model._target_": "models.laptop.Laptop"})
    wide = {
        "model._target_": "models.wide_resnet.WRN2810",
        "model.depth": 10,
        "model.widen_factor": 2,
        "model.x": 3,
    }
    make_study(tmp_path, "second2", drawn(2, mixup=0.02), wide)
    for run in (tmp_path / "digits").glob("2*"):
        (run / "overrides.yaml").write_text("[model=wide_resnet, model.depth=10, model.widen_factor=2]")
    settings = {data for data, _ in rows_of(tmp_path)} - {"all settings"}
    assert settings == {"digits, Laptop", "digits, WRN2810 depth=10 widen_factor=2"}


def test_another_baseline_than_the_planned_one_has_no_planned_looks(tmp_path):
    make_study(tmp_path, "first1", drawn(1, mixup=0.02, sam=0.0), SHORT)
    planned = rows_of(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "look 1 of 3" in planned["digits", "mixup"]["verdict"] and "planned against another" not in text
    rows = rows_of(tmp_path, "baseline=sam")
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "baseline, mixup: their looks were planned against another baseline than sam, against which nothing was "
        "planned for them; baseline=baseline shows what was decided" in text
    )
    means = {arm: float(row["mean"]) for (_, arm), row in rows.items()}
    assert float(rows["digits", "baseline"]["difference"]) == pytest.approx(means["baseline"] - means["sam"])


def test_sweeps_of_one_baseline_stay_in_one_table_each_at_its_own_looks(tmp_path):
    both = drawn(3, mixup=0.02, sam=0.001)
    make_study(tmp_path, "first1", {"baseline": both["baseline"], "mixup": both["mixup"]}, SHORT)
    make_study(tmp_path, "second2", {"baseline": [], "sam": both["sam"]}, SHORT)
    file = tmp_path / "sweeps" / "second2" / "sweep.json"
    record = json.loads(file.read_text())
    record["identities"]["baseline"] = "10000000"
    record["runs"] += [str(run) for run in (tmp_path / "digits").glob("10000000-s*")]
    file.write_text(json.dumps(record))
    rows = rows_of(tmp_path)
    assert {data for data, _ in rows} == {"digits"}
    assert "look 1 of 3" in rows["digits", "mixup"]["verdict"]
    assert "look 2 of 3, 8 seeds" in rows["digits", "sam"]["verdict"]


def test_runs_of_one_identity_are_one_arm_whatever_two_sweeps_called_them(tmp_path):
    make_study(tmp_path, "first1", drawn(1, mixup=0.02), SHORT)
    for seed in (1000, 1001):
        make_run(
            tmp_path, "lr=0.05", seed, 0.9, settings=SHORT, identity="10000000", name=f"10000000-s{seed}"
        )
    rows = rows_of(tmp_path)
    assert {arm for _, arm in rows} == {"baseline", "mixup"}
    assert float(rows["digits", "baseline"]["n"]) == 10
    assert "look 1 of 3" in rows["digits", "mixup"]["verdict"]


def test_an_arm_of_another_network_than_the_baselines_names_it(tmp_path):
    make_study(tmp_path, "first1", drawn(1, mixup=0.02), {"model._target_": "models.laptop.Laptop"})
    for arm, lr in (("lr=0.2", 0.2), ("lr=0.4", 0.4)):
        run = make_run(tmp_path, arm, 7, 0.9, settings={"model._target_": "models.vgg.VGG", "model.lr": lr})
        sweep = {"arms": ["lr=0.2", "lr=0.4"], "folder": "pilot", "created": 0.5}
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "sweep": sweep}))
    assert {"lr=0.2 VGG", "lr=0.4 VGG"} < {arm for _, arm in rows_of(tmp_path)}


@pytest.mark.parametrize("recorded", ["sam", "sam trainer.max_epochs=30"])
def test_a_run_typed_by_hand_belongs_to_the_setting_that_it_differs_least_from(tmp_path, recorded):
    make_study(tmp_path, "first1", drawn(1, mixup=0.02), SHORT)
    make_study(tmp_path, "second2", drawn(2, mixup=0.02), LONG)
    run = make_run(tmp_path, recorded, 0, 0.9, settings=LONG, techniques={"sam": {"model.sam": True}})
    (run / "overrides.yaml").write_text("[technique=sam, trainer.max_epochs=30]")
    rows = rows_of(tmp_path)
    assert ("digits, trainer.max_epochs=30", "sam") in rows
    assert ("digits, trainer.max_epochs=4", "sam") not in rows


# Other data of the same name


def test_runs_of_other_data_of_the_same_name_are_never_paired(tmp_path):
    """Not by their name alone: a folder or a table has changed between two commands."""
    make_arm(tmp_path, "baseline", BASE, data_fingerprint="1" * 16)
    make_arm(tmp_path, "mixup", BETTER, data_fingerprint="2" * 16)
    rows = rows_of(tmp_path)
    assert {key: row["pairs"] for key, row in rows.items()} == {
        ("digits, data 11111111", "baseline"): "",
        ("digits, data 22222222", "mixup"): "",
    }
    text = (tmp_path / "report" / "report.md").read_text()
    assert "these had the data of fingerprint 22222222. Runs of other data are not paired with them" in text
    rows = rows_of(tmp_path, "networks=arms")
    assert rows["digits", "mixup"]["pairs"] == "5", "asked for in one table"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "mixup: 5 of 5 pairs are of other data than those of baseline (22222222, there 11111111)" in text


def test_a_baseline_of_other_data_is_none_and_the_message_says_so(tmp_path, capsys):
    make_arm(tmp_path, "baseline", BASE, data_fingerprint="1" * 16)
    for arm in ("mixup", "sam"):
        make_arm(tmp_path, arm, BETTER, data_fingerprint="2" * 16)
    assert report.main([f"runs={tmp_path}"]) == 2
    assert (
        "baseline is missing in digits, data 22222222; choose one of: mixup, sam; runs of other data are not paired "
        "with these" in capsys.readouterr().err
    )


def test_seeds_after_a_change_of_the_data_do_not_supersede_those_before_it(tmp_path):
    for print_, shift in (("1" * 16, 0.0), ("2" * 16, 0.03)):
        for arm, values in (("baseline", BASE), ("mixup", BETTER)):
            for seed, value in enumerate(values):
                make_run(
                    tmp_path, arm, seed, value + shift, data_fingerprint=print_,
                    name=f"{arm}-{print_[0]}-s{seed}",
                )  # fmt: skip
    rows = rows_of(tmp_path)
    for name, shift in (("digits, data 11111111", 0.0), ("digits, data 22222222", 0.03)):
        assert rows[name, "mixup"]["pairs"] == "5"
        assert float(rows[name, "baseline"]["mean"]) == pytest.approx(np.mean(BASE) + shift)


@pytest.mark.parametrize("other", ["1" * 16, None])
def test_the_same_data_and_those_without_a_fingerprint_are_one_setting(tmp_path, other):
    make_arm(tmp_path, "baseline", BASE, data_fingerprint="1" * 16)
    make_arm(tmp_path, "mixup", BETTER, **({"data_fingerprint": other} if other else {}))
    rows, text = run_report(tmp_path)
    assert rows["mixup"]["pairs"] == "5" and "fingerprint" not in text


def test_a_run_without_a_fingerprint_counts_with_those_whose_files_have_its_names(tmp_path):
    table = {n: {"data.module.csv_file": f"/{n}/{n}.csv"} for n in "ab"}
    make_arm(tmp_path, "baseline", BASE, data_fingerprint="1" * 16, settings=table["a"])
    make_arm(tmp_path, "sam", BASE[:2], data_fingerprint="2" * 16, settings=table["b"])
    make_arm(tmp_path, "mixup", BETTER, settings={"data.module.csv_file": "/elsewhere/a.csv"})
    make_arm(tmp_path, "cutmix", BETTER, settings={"data.module.csv_file": "/elsewhere/c.csv"})
    rows = rows_of(tmp_path)
    assert rows["digits, data 11111111", "mixup"]["pairs"] == "5"
    assert rows["digits, data 11111111", "cutmix"]["pairs"] == "5", "with most"
    assert ("digits, data 22222222", "sam") in rows
    text = (tmp_path / "report" / "report.md").read_text()
    assert "10 of these runs recorded no fingerprint of their data" in text


def test_data_that_one_sweep_set_out_to_compare_are_paired_and_the_face_says_so(tmp_path):
    sweep = {"arms": ["baseline", "stylized"], "folder": "one", "created": 0.5, "baseline": "baseline"}
    make_arm(tmp_path, "baseline", BASE, data_fingerprint="1" * 16, sweep=sweep)
    make_arm(tmp_path, "stylized", BETTER, data_fingerprint="2" * 16, sweep=sweep)
    make_arm(tmp_path, "mixup", BETTER, data_fingerprint="3" * 16)
    rows = rows_of(tmp_path)
    assert rows["digits, data 11111111, 22222222", "stylized"]["pairs"] == "5"
    assert ("digits, data 33333333", "mixup") in rows
    text = (tmp_path / "report" / "report.md").read_text()
    assert "stylized: 5 of 5 pairs are of other data than those of baseline" in text


def test_the_sd_behind_what_is_detectable_is_named(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER)
    rows, text = run_report(tmp_path)
    sd = 100 * np.std(np.array(BETTER) - BASE, ddof=1)
    assert (
        f"sd of a paired difference of {sd:.2f} points, pooled over all arms (4 degrees of freedom)" in text
    )
    expected = statistics.detectable_effect(5, 0.05) * sd / 100
    assert float(rows["mixup"]["detectable"]) == pytest.approx(expected)


# The last epoch's weights, or for all arms those that were best on validation


def score_best(run: Path, value: float) -> None:
    (run / "test.json").write_text(json.dumps({"checkpoint": "best.ckpt", "metrics": {"test/acc": value}}))


def test_best_on_validation_scores_the_tested_best_weights(tmp_path):
    for arm, values in (("baseline", BASE), ("mixup", BETTER)):
        for run, value in zip(make_arm(tmp_path, arm, [0.5] * 5), values, strict=True):
            score_best(run, value)
    rows, text = run_report(tmp_path, "checkpoint=best")
    assert float(rows["mixup"]["difference"]) == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    assert "of the weights that were best on validation" in text
    assert rows["mixup"]["verdict"].startswith("helps")


def test_a_test_of_other_data_is_not_the_runs(tmp_path, capsys):
    runs = [
        run
        for arm, values in (("baseline", BASE), ("mixup", BETTER))
        for run in make_arm(tmp_path, arm, values, data_fingerprint="own")
    ]
    for run, value in zip(runs, [*BASE, *BETTER], strict=True):
        record = {"checkpoint": "best.ckpt", "metrics": {"test/acc": value}, "data": "own"}
        (run / "test.json").write_text(json.dumps(record))
    whole = run_report(tmp_path, "checkpoint=best")[0]["mixup"]
    foreign = {"checkpoint": "best.ckpt", "metrics": {"test/acc": 0.1}, "data": "another"}
    (runs[-1] / "test.json").write_text(json.dumps(foreign))
    rows, text = run_report(tmp_path, "checkpoint=best")
    assert int(rows["mixup"]["pairs"]) == int(whole["pairs"]) - 1
    assert "test.json is of other data than the run's" in text and f"run={runs[-1]} task=test" in text


def test_an_older_test_of_other_images_is_told_by_the_images(tmp_path):
    runs = [r for arm in ("baseline", "mixup") for r in make_arm(tmp_path, arm, BASE)]
    for run, value in zip(runs, BASE * 2, strict=True):
        score_best(run, value)
        for file, samples in (("test_correct.npz", "own"), ("test_correct_best.npz", "own")):
            np.savez(run / file, count=10, samples=samples)
    np.savez(runs[-1] / "test_correct_best.npz", count=10, samples="others")
    rows, text = run_report(tmp_path, "checkpoint=best")
    assert int(rows["mixup"]["pairs"]) == len(BASE) - 1
    assert "test.json is of other data than the run's" in text


def test_an_interval_for_new_images_that_cannot_be_told_is_called_so(tmp_path):
    gained_by = np.repeat([0, 1, 2], [50, 100, 150])
    for seed in range(3):
        for arm in ("baseline", "mixup"):
            right = np.arange(600) < 300
            right[300:] = (gained_by == seed) if arm == "mixup" else False
            run = make_run(tmp_path, arm, seed, float(right.mean()))
            blocks = np.stack([np.full(15, 40), np.full(15, 20), np.full(15, 20)])
            np.savez(
                run / "test_correct.npz",
                correct=np.packbits(right),
                count=600,
                samples="own",
                calibration=blocks,
            )
    rows, text = run_report(tmp_path)
    assert "| not estimable |" in text and "*Not estimable*: the seeds vary more than the images do" in text
    assert rows["mixup"]["verdict"]


def test_weights_selected_on_the_test_images_get_no_verdict(tmp_path):
    settings = {"data.module.val_split": "test"}
    for arm, values in (("baseline", BASE), ("mixup", BETTER)):
        for run, value in zip(make_arm(tmp_path, arm, values, settings=settings), values, strict=True):
            score_best(run, value)
    assert run_report(tmp_path)[0]["mixup"]["verdict"].startswith("helps"), "the last epoch is not selected"
    assert run_report(tmp_path, "checkpoint=best")[0]["mixup"]["verdict"] == "cannot say (selected on test)"


# Cost beside the gain


@pytest.mark.parametrize(
    ("values", "ratio", "label"),
    [
        (BETTER, 1.01, "free"),
        (BETTER, 0.5, "free"),
        (BETTER, 2.0, "trade-off open"),
        (SAME, 1.5, "dominated"),
        (SAME, 1.0, "trade-off open"),
        ([2 * b - t for b, t in zip(BASE, BETTER, strict=True)], 1.5, "dominated"),
    ],
)
def test_the_cost_is_weighed_against_the_gain(tmp_path, values, ratio, label):
    for seed in range(5):
        seconds = 100 + seed
        make_run(tmp_path, "baseline", seed, BASE[seed], seconds=seconds)
        make_run(tmp_path, "sam", seed, values[seed], seconds=seconds * ratio * (1 + 0.001 * seed))
    assert run_report(tmp_path)[0]["sam"]["cost"] == label


def test_what_beats_the_baseline_trained_for_as_long_pays(tmp_path):
    for seed in range(5):
        make_run(tmp_path, "baseline", seed, BASE[seed], seconds=100 + seed)
        make_run(tmp_path, "sam", seed, BETTER[seed], seconds=2.03 * (100 + 1.01 * seed))
        make_run(tmp_path, "baseline_x2.03", seed, SAME[seed], seconds=2.05 * (100 + 0.98 * seed))
    rows, text = run_report(tmp_path)
    assert rows["sam"]["cost"] == "pays (beats baseline_x2.03)"
    rival = rows["baseline_x2.03"]
    assert rival["cost"] == "" and rival["verdict"].startswith("no technique")
    assert rival["p_holm"] == "" and rows["sam"]["p_holm"] == rows["sam"]["p"], "nothing is corrected for it"
    assert "baseline_x2.03 differs" not in text


def test_the_cost_columns_are_means_over_the_runs(tmp_path):
    for seed, memory in enumerate((100.0, 200.0, 300.0)):
        make_run(tmp_path, "baseline", seed, BASE[seed], seconds=10, images_per_s=50.0, peak_memory_mb=memory)
    row = run_report(tmp_path)[0]["baseline"]
    assert [float(row[n]) for n in ("time_s", "images_per_s", "images", "memory_mb")] == [10, 50, 500, 200]


def test_runs_that_were_compiled_share_no_time_ratio_with_others(tmp_path):
    for seed in range(4):
        make_run(tmp_path, "baseline", seed, BASE[seed], seconds=100)
        make_run(tmp_path, "sam", seed, BETTER[seed], seconds=150, settings={"model.compile": True})
        make_run(tmp_path, "mixup", seed, BETTER[seed], seconds=110, settings={"model.compile": False})
    rows, text = run_report(tmp_path)
    assert rows["sam"]["time_ratio"] == "" and float(rows["mixup"]["time_ratio"]) == pytest.approx(1.1)
    assert "some runs were compiled (sam), others not" in text


# Two techniques together


def make_two_by_two(root: Path, both: list[float]) -> None:
    techniques = {"mixup": {"model.mixup": True}, "sam": {"model.sam": True}}
    make_arm(root, "baseline", BASE)
    make_arm(root, "mixup", BETTER, techniques={"mixup": techniques["mixup"]})
    make_arm(root, "sam", shifted(0.002, 0.004, 0.003, 0.003, 0.0025), techniques={"sam": techniques["sam"]})
    make_arm(root, "mixup+sam", both, techniques=techniques)


def test_techniques_that_add_up_are_said_to(tmp_path):
    sums = [m + d for m, d in zip(BETTER, (0.0021, 0.0039, 0.0032, 0.0029, 0.0024), strict=True)]
    make_two_by_two(tmp_path, sums)
    sam = shifted(0.002, 0.004, 0.003, 0.003, 0.0025)
    interaction = np.array(sums) - BETTER - sam + BASE
    low, high = 100 * np.array(stats.ttest_1samp(interaction, 0).confidence_interval())
    text = run_report(tmp_path)[1]
    assert f"adds up within ±{max(abs(low), abs(high)):.2f} points" in text
    assert f"{low:+.2f} to {high:+.2f}" in text


@pytest.mark.parametrize(("gain", "word"), [(0.02, "synergy"), (-0.02, "conflict")])
def test_techniques_that_help_or_hinder_each_other_are_said_to(tmp_path, gain, word):
    noise = (0.0011, -0.0008, 0.0004, 0.0007, -0.0012)
    make_two_by_two(tmp_path, [m + 0.003 + gain + e for m, e in zip(BETTER, noise, strict=True)])
    assert f"| {word} |" in run_report(tmp_path)[1]


HELPED = [m + 0.023 + e for m, e in zip(BETTER, (0.0011, -0.0008, 0.0004, 0.0007, -0.0012), strict=True)]


def of_both(text: str) -> list[str]:
    """The cells of the row of two techniques together."""
    section = text.split("### Two techniques together")[1]
    return [cell.strip() for cell in re.search(r"\| mixup\+sam \|.*", section)[0].strip("|").split("|")]


@pytest.mark.parametrize(
    ("arm", "value", "more", "said"),
    [
        ("sam", math.nan, (), "unstable: 1 of 6 sam runs diverged"),
        ("mixup+sam", math.nan, (), "unstable: 1 of 6 runs diverged"),
        ("baseline", None, (), "cannot say (test/acc is not in all runs)"),
        ("mixup", 0.94, ("metric=val/acc", "checkpoint=best"), "cannot say (selected on val)"),
    ],
)
def test_two_techniques_together_are_judged_by_the_rules_of_each(tmp_path, arm, value, more, said):
    make_two_by_two(tmp_path, HELPED)
    make_run(tmp_path, arm, 5, value)
    for file in (tmp_path / "digits").glob("*/summary.json"):
        summary = json.loads(file.read_text())
        file.write_text(json.dumps({**summary, "best": {"val/acc": summary["final"].get("test/acc")}}))
    assert of_both(run_report(tmp_path, *more)[1])[-1] == said


def test_two_techniques_that_are_copies_of_runs_are_no_synergy(tmp_path):
    make_two_by_two(tmp_path, [b + 0.05 for b in BASE])
    assert of_both(run_report(tmp_path)[1])[-1] == "cannot say (5 seeds, all with the same difference)"


def test_two_techniques_together_are_read_at_their_look(tmp_path):
    make_two_by_two(tmp_path, HELPED)
    arms = ["baseline", "mixup", "sam", "mixup+sam"]
    record_sweep(tmp_path, arms, planned_seeds=[5, 10])
    at = of_both(run_report(tmp_path)[1])
    assert (at[2], at[-1]) == ("5", "synergy")
    interaction = np.array(HELPED) - BETTER - shifted(0.002, 0.004, 0.003, 0.003, 0.0025) + BASE
    low, high = 100 * np.array(stats.ttest_1samp(interaction, 0).confidence_interval(1 - 0.05 * 0.5**1.5))
    assert at[4] == f"{low:+.2f} to {high:+.2f}"
    for arm in arms:
        for seed, value in ((5, 0.5), (6, 0.9)):
            make_run(
                tmp_path, arm, seed, value, techniques={t: {} for t in arm.split("+") if t != "baseline"}
            )
    assert of_both(run_report(tmp_path)[1]) == at, "later seeds change nothing"
    shutil.rmtree(tmp_path / "digits/sam-s2")
    waiting = of_both(run_report(tmp_path)[1])
    assert waiting[-1] == "no look yet: 4 of 5 seeds" and waiting[4:7] == ["-"] * 3


# Warnings


def test_seeds_that_do_not_vary_are_noticed(tmp_path):
    make_arm(tmp_path, "baseline", [0.93] * 5)
    make_arm(tmp_path, "mixup", BETTER)
    assert "baseline: all seeds have the same test/acc; is the seed used?" in run_report(tmp_path)[1]


def test_seeds_that_have_as_many_images_right_by_chance_are_not_suspected(tmp_path):
    for seed, loss in enumerate((0.31, 0.32)):
        make_run(tmp_path, "baseline", seed, 0.93, final={"test/acc": 0.93, "test/loss": loss})
    assert "is the seed used" not in run_report(tmp_path)[1]


def test_a_moderated_variance_is_declared(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k, arm in enumerate(("baseline", "a", "b", "c")):
        make_arm(tmp_path, arm, (0.93 + 0.003 * k + 0.002 * rng.normal(size=3)).tolist())
    own = run_report(tmp_path)[0]
    rows, text = run_report(tmp_path, "variance=shared")
    assert rows["a"]["difference"] == own["a"]["difference"] and rows["a"]["low"] != own["a"]["low"]
    assert "variance shared by the arms" in text
    make_arm(tmp_path / "two", "baseline", BASE)
    make_arm(tmp_path / "two", "a", BETTER)
    capsys.readouterr()
    assert report.main([f"runs={tmp_path}/two", "variance=shared"]) == 2
    assert "variance=shared needs 3 techniques or more" in capsys.readouterr().err


# Settings and commands


def test_the_page_names_the_settings_that_differ_and_those_that_do_not(tmp_path):
    make_arm(tmp_path, "baseline", BASE)
    make_arm(tmp_path, "mixup", BETTER, settings={"model.mixup": True})
    text = run_report(tmp_path)[1].split("### Settings")[1]
    differing, equal = text.split("<details>")
    assert "| model.mixup | false | true |" in differing
    assert "`trainer.max_epochs`: 12" in equal and "`model.mixup`" not in equal


def test_the_page_ends_with_the_commands_that_made_the_runs(tmp_path):
    for arm, values in (("baseline", BASE), ("powergrad+mixup", BETTER)):
        for seed, run in enumerate(make_arm(tmp_path, arm, values)):
            technique = "[powergrad,mixup]" if arm != "baseline" else "baseline"
            overrides = [f"technique={technique}", f"seed={seed}", "data=digits"]
            (run / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    text = run_report(tmp_path)[1]
    assert "python main.py -m technique=baseline data=digits seed=0,1,2,3,4" in text
    assert "python main.py -m 'technique=[powergrad,mixup]' data=digits seed=0,1,2,3,4" in text


def test_the_commands_begin_with_the_sweeps_own_and_give_each_option_once(tmp_path):
    command = "python main.py -m technique=baseline 'seed=range(5)' trainer.max_epochs=8"
    for seed, run in enumerate(make_arm(tmp_path, "baseline", BASE)):
        overrides = ["trainer.max_epochs=8", "exp_dir=/of/mine", f"seed={seed}", "trainer.max_epochs=14"]
        (run / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    record_sweep(tmp_path, ["baseline"], command=command)
    text = run_report(tmp_path)[1].split("### To reproduce")[1]
    assert text.index(command) < text.index("python main.py -m trainer.max_epochs=14 seed=0,1,2,3,4")


def test_the_arguments_take_what_is_meant(tmp_path: Path) -> None:
    for name in ("a,b", "[old]", "x-s1", "x-s2", "x-s3"):
        (tmp_path / name).mkdir()
    for typed, found in (
        ("a,b", ["a,b"]), ("[old]", ["[old]"]), ("x-s[12]", ["x-s1", "x-s2"]), ("'a,b'", ["a,b"]),
    ):  # fmt: skip
        typed = f"'{tmp_path}/a,b'" if typed.startswith("'") else f"{tmp_path}/{typed}"
        request = read_arguments([f"runs={typed}", "wandb=null", f"out={tmp_path}/out"])
        assert [f.name for f in request.folders] == found and request.wandb is None
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert report.main([f"runs={tmp_path}", f"out={tmp_path}/file/report"]) == 2
    error = capsys.readouterr().err
    assert "out=" in error and "out=PATH" in error and len(error.splitlines()) == 1
