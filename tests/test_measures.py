"""Drawn sets of metrics against scikit-learn: whatever else is asked for, and in which precision, and how confident."""

from __future__ import annotations

import copy
import csv
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, nightly, runs_in, summary_of
from lightning.pytorch import Callback, Trainer
from sklearn import metrics as sk
from tiny_networks import TinyResNet
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

import report
from crucible import measures
from crucible.batch import Batch
from crucible.corrections import versions_of
from crucible.measures import Auroc, log_odds
from crucible.metrics import CORRECTIONS, METRICS, build_metrics, remarks, scalars
from crucible.sums import Sums
from lab import config as checking
from models.techniques import TECHNIQUES

NAMES = {task: [row.name for row in METRICS if row.task == task] for task in ("classification", "regression")}
LOGGED = {row.name: row.logged for row in METRICS}
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As Lightning sets it around a step of a run with weights of that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def merged(of_ranks: list[MetricCollection]) -> MetricCollection:
    """One collection with the states of all, reduced as torchmetrics reduces those of several processes."""
    first, *others = of_ranks
    for name, metric in first.items():
        for other in others:
            metric.merge_state(other[name])
    return first


def evaluated(
    names: list[str], task: str, classes: int, precision: str, of_ranks: list[list[tuple[torch.Tensor, ...]]]
) -> dict[str, float]:
    """The metrics of the batches (outputs, target) of each rank, in a module of that precision."""
    collections = []
    for batches in of_ranks:
        module = nn.ModuleDict({"val": build_metrics(names, task, classes)}).to(PRECISIONS[precision])
        collection: MetricCollection = copy.deepcopy(module)["val"]  # type: ignore[assignment]
        with default_dtype(PRECISIONS[precision]):
            for outputs, target in batches:
                wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
                scores = wide.softmax(dim=1) if task == "classification" else wide
                collection.update(scores, target, logits=wide)
        collections.append(collection)
    with default_dtype(PRECISIONS[precision]):
        return {k: float(v) for k, v in scalars(merged(collections).compute()).items()}


def top5(logits: torch.Tensor, target: torch.Tensor) -> float:
    """scikit-learn's; NaN where equal logits leave it open."""
    own = logits.gather(1, target.unsqueeze(1))
    if torch.any(((logits > own).sum(dim=1) < 5) != ((logits >= own).sum(dim=1) <= 5)):
        return math.nan
    return float(sk.top_k_accuracy_score(target, logits.double(), k=5, labels=range(logits.shape[1])))


def expected_of_classes(logits: torch.Tensor, target: torch.Tensor, classes: int) -> dict[str, float]:
    """scikit-learn's values, and Guo et al.'s calibration error."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # of bf16 logits many are equal: what is equal is decided by float32, as in the metric
    p, t = wide.softmax(dim=1), target.numpy()
    confidence, predicted = (x.numpy() for x in p.max(dim=1))
    order = log_odds(wide).double().numpy()
    areas = [sk.roc_auc_score(t == k, order[:, k]) for k in range(classes) if 0 < (t == k).sum() < len(t)]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence[bins == b].astype(float) - (predicted == t)[bins == b]).sum()) for b in range(15)]
    each = sk.f1_score(t, predicted, average=None, labels=range(classes), zero_division=np.nan)
    return {
        "acc": sk.accuracy_score(t, predicted),
        "acc_top5": top5(wide, target),
        "f1": sk.f1_score(t, predicted, average="macro"),
        "precision": sk.precision_score(t, predicted, average="macro", zero_division=0),
        "recall": sk.recall_score(t, predicted, average="macro", zero_division=0),
        "auroc": float(np.mean(areas)) if areas else math.nan,
        "ece": sum(gaps) / len(t),
        **{f"f1_per_class/{k}": value for k, value in enumerate(each) if not math.isnan(value)},
    }


def draw(seed: int) -> tuple[list[str], str, int, str, list[list[tuple[torch.Tensor, ...]]]]:
    """Names, task, classes, precision, and the batches of one or two ranks."""
    g = np.random.default_rng(seed)
    task = str(g.choice(["classification", "classification", "regression"]))
    names = [str(n) for n in g.permutation(NAMES[task])[: g.integers(1, len(NAMES[task]) + 1)]]
    precision = str(g.choice(list(PRECISIONS)))
    dtype = PRECISIONS[precision]
    classes, count = int(g.integers(6, 12)), int(g.integers(30, 1200))
    if task == "classification":
        here = g.permutation(classes)[: g.integers(2, classes + 1)]
        target = torch.tensor(here)[torch.from_numpy(g.integers(0, len(here), count))]
        logits = torch.from_numpy(g.normal(size=(count, classes)))
        logits[torch.arange(count), target] += g.uniform(
            0, 4
        )  # also of networks that are nearly always right
        right = g.integers(0, 30)  # and those that are at first
        logits[torch.arange(right), target[:right]] += 20.0
        if g.random() < 0.3:
            target = target.sort().values  # as folders are
        outputs = (logits * g.choice([0.1, 1.0, 10.0, 30.0])).to(dtype)
    else:
        target = torch.from_numpy(
            g.normal(g.choice([0.0, 5.0, 2000.0]), g.choice([0.01, 1.0, 50.0]), count)
        ).float()
        outputs = (target + target.std() * torch.from_numpy(g.normal(size=count))).to(dtype)
        target = target.to(torch.promote_types(torch.float32, dtype))
    sizes, left = [], count
    while left:
        sizes.append(int(min(left, g.choice([1, 7, 64, 300]))))
        left -= sizes[-1]
    batches = list(zip(outputs.split(sizes), target.split(sizes), strict=True))
    ranks = int(g.integers(1, 3))
    return names, task, classes, precision, [batches[r::ranks] for r in range(ranks)]


@pytest.mark.parametrize("seeds", [range(40), *nightly(range(40, 240))], ids=["40", "200"])
def test_drawn_sets_of_metrics_equal_scikit_learn(seeds: range) -> None:
    for seed in seeds:
        names, task, classes, precision, of_ranks = draw(seed)
        outputs, target = (torch.cat(c) for c in zip(*(b for r in of_ranks for b in r), strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if task == "classification":
                known = expected_of_classes(outputs, target, classes)
            else:
                y, p = target.double().numpy(), outputs.double().numpy()
                known = {
                    "mse": sk.mean_squared_error(y, p), "mae": sk.mean_absolute_error(y, p), "r2": sk.r2_score(y, p),
                }  # fmt: skip
        got = evaluated(names, task, classes, precision, of_ranks)
        wanted = {k: v for k, v in known.items() if any(k.split("/")[0] == LOGGED[n] for n in names)}
        if math.isnan(wanted.get("acc_top5", 0.0)):
            wanted["acc_top5"] = got["acc_top5"]
        assert got == pytest.approx(wanted, rel=2e-6, abs=2e-6, nan_ok=True), (seed, names, precision)


def test_a_metric_does_not_depend_on_which_others_are_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(8, (200,), generator=generator)
    logits = nn.functional.one_hot(target, 8) * 9.0
    logits[100:] = torch.randn(100, 8, generator=generator)  # the first batch is all right
    batches = [list(zip(logits.split(50), target.split(50), strict=True))]
    together = evaluated(NAMES["classification"], "classification", 8, "32-true", batches)
    for name in NAMES["classification"]:
        alone = evaluated([name], "classification", 8, "32-true", batches)
        assert alone and alone.items() <= together.items()


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 30.0, 1000.0])
def test_the_area_under_the_curve_is_that_of_the_ranking_whatever_the_confidence(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(2, (5000,), generator=generator)
    score = torch.randn(5000, generator=generator) + 1.6 * target
    logits = torch.stack((torch.zeros(5000), score * scale), dim=1)
    for capacity in (measures.EXACT_SCORES, 4000):
        metric = Auroc(2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measures, "EXACT_SCORES", capacity)
            for z, t in zip(logits.split(500), target.split(500), strict=True):
                metric.update(z.softmax(dim=1), t, logits=z)
            exact = capacity > logits.numel()
            assert float(metric.compute()) == pytest.approx(
                sk.roc_auc_score(target, score), abs=1e-6 if exact else 3e-4
            )
            assert metric.binned == (None if exact else 2000)


def test_log_odds_are_those_of_the_probabilities_and_go_on_where_these_are_0_and_1() -> None:
    logits = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_odds(3 * logits), (3 * logits).softmax(dim=1).logit().float())
    far = torch.tensor([[0.0, -800.0], [0.0, -900.0], [900.0, 0.0]])
    assert log_odds(far).tolist() == [[800.0, -800.0], [900.0, -900.0], [900.0, -900.0]]


def test_bins_of_ranks_follow_data_that_come_class_by_class(monkeypatch) -> None:
    monkeypatch.setattr(measures, "EXACT_SCORES", 30_000)
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(10).repeat_interleave(2000)
    logits = torch.randn(20_000, 10, generator=generator) * 0.01 - 7.0  # all probabilities are about a tenth
    logits[torch.arange(20_000), target] += 0.008
    ranks = [Auroc(10), Auroc(10)]
    for number, (z, t) in enumerate(zip(logits.split(250), target.split(250), strict=True)):
        ranks[number % 2].update(z.softmax(dim=1), t, logits=z)
    ranks[0].merge_state(ranks[1])
    order = log_odds(logits)
    exact = np.mean([sk.roc_auc_score(target == k, order[:, k]) for k in range(10)])
    assert float(ranks[0].compute()) == pytest.approx(exact, abs=3e-4)


def test_classes_without_samples_are_left_out_and_named() -> None:
    target = torch.tensor([0, 1, 1, 0, 3, 3])
    logits = nn.functional.one_hot(target, 5) * 4.0
    collection = build_metrics(["acc", "f1", "f1_per_class", "auroc"], "classification", 5)
    collection.update(logits.softmax(dim=1), target)
    names = ["ant", "bee", "cat", "dog", "eel"]
    values = scalars(collection.compute(), names)
    assert {k for k in values if "/" in k} == {f"f1_per_class/{name}" for name in ("ant", "bee", "dog")}
    assert float(values["auroc"]) == float(values["f1"]) == 1.0
    (line,) = remarks(collection, names)
    assert sorted(line.partition(":")[0].split(", ")) == ["auroc", "f1", "f1_per_class"]
    assert line.endswith("undefined for, and left out: cat, eel")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("task", NAMES)
def test_outputs_that_are_no_numbers_give_no_number(task: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(8, (60,), generator=generator)
    outputs = torch.randn(60, 8, generator=generator) if task == "classification" else torch.randn(60)
    for where in (slice(3, 4), slice(None)):
        broken = outputs.clone()
        broken[where] = bad
        batches = [list(zip(broken.split(20), target.split(20), strict=True))]
        values = evaluated(NAMES[task], task, 8, "32-true", batches)
        assert len(values) == len(NAMES[task]) + (7 if task == "classification" else 0)
        assert all(math.isnan(v) for v in values.values()), values


def test_the_training_accuracy_of_a_loss_that_is_no_number_is_none() -> None:
    sums = Sums("classification", torch.device("cpu"))
    target = torch.zeros(4, dtype=torch.int64)
    for logits in (torch.eye(4), torch.full((4, 4), math.nan)):
        sums.add(nn.functional.cross_entropy(logits, target), logits, target)
    assert all(math.isnan(float(v)) for v in sums.means().values())


def test_without_float64_states_are_float32(monkeypatch) -> None:
    monkeypatch.setattr(measures, "wide", lambda device: torch.float32)  # as on MPS
    for task, names in NAMES.items():
        collection = build_metrics(names, task, 8).to("cpu")
        outputs = torch.randn(50, 8) if task == "classification" else torch.randn(50)
        target = torch.randint(8, (50,)) if task == "classification" else torch.randn(50)
        collection.update(outputs.softmax(0) if task == "classification" else outputs, target)
        states = [s for m in collection.values() for s in (*m.metric_state.values(), *m._defaults.values())]
        flat = [t for s in states for t in (s if isinstance(s, list) else [s])]
        assert torch.float64 not in {t.dtype for t in flat}
        assert all(v.isfinite() for v in scalars(collection.compute()).values())


@pytest.mark.parametrize(
    ("names", "precision", "concerned"),
    [
        (["acc", "f1", "ece"], "32-true", False),
        (["acc", "f1", "ece"], "bf16-mixed", False),
        (["acc", "f1", "ece"], "bf16-true", True),
        (["acc", "f1"], "bf16-true", False),
        (["acc", "top5", "ece"], "32-true", False),
        (["acc", "top5", "f1"], "32-true", True),
        (["acc", "auroc"], "32-true", True),
        (["mse", "mae"], "32-true", False),
        (["mse", "r2"], "32-true", True),
    ],
)  # fmt: skip
def test_only_runs_whose_metrics_were_wrong_are_other_runs(
    names: list[str], precision: str, concerned: bool
) -> None:
    config = {"metrics": names, "trainer": {"precision": precision}}
    assert versions_of(CORRECTIONS, config) == ({"metrics": 2} if concerned else {})


@pytest.mark.parametrize(
    ("model", "task", "precision", "version"),
    [
        ({}, "classification", "bf16-true", None),
        ({"mixup": True}, "classification", "bf16-true", 2),
        ({"mixup": True}, "classification", "bf16-mixed", None),
        ({}, "regression", "bf16-true", 3),
        ({}, "regression", "32-true", None),
    ],
)
def test_only_runs_whose_targets_were_rounded_are_other_runs(model, task, precision, version) -> None:
    config = {"model": model, "data": {"task": task}, "trainer": {"precision": precision}}
    corrections = [*checking.CORRECTIONS, *(c for kind in TECHNIQUES for c in kind.corrections)]
    own = [c for c in corrections if c.option == "trainer.precision"]
    assert versions_of(own, config) == ({"trainer.precision": version} if version else {})


# In runs


def final_of(run: Path) -> dict[str, float]:
    return summary_of(run)["final"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", *nightly("32-true")])
def test_the_calibration_error_of_a_run_is_that_of_its_record(cli, tmp_path: Path, precision: str) -> None:
    outcome = cli(
        *TINY,
        "data.module.num_samples=2000",
        "trainer.limit_train_batches=5",
        f"trainer.precision={precision}",
    )
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    with np.load(run / "test_correct.npz") as record:
        count, confidence, hits = record["calibration"]
    assert final_of(run)["test/ece"] == pytest.approx(np.abs(confidence - hits).sum() / count.sum(), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_targets_are_not_rounded_to_the_precision_of_the_weights(precision: str) -> None:
    model = TinyResNet(task="regression")
    model.trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)  # type: ignore[assignment]
    for target in (
        torch.tensor([1.001, 1999.3]),
        torch.tensor([[0.3001, 0.6999], [1.0, 0.0]]),
        torch.tensor([3, 7]),
    ):
        batch = model.as_the_weights(Batch(torch.zeros(2, 3, 8, 8), target, torch.arange(2)))
        assert batch.input.dtype == PRECISIONS[precision]
        assert torch.equal(batch.target, target.to(batch.target.dtype)) and torch.equal(
            batch.target.to(target.dtype), target
        )


class SeenTargets(Callback):
    """What the steps of each loop are handed."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.append(batch.target)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.append(batch.target)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_no_loop_of_the_trainer_rounds_targets(precision: str) -> None:
    target = torch.tensor([1.001, 1999.3])
    batches = [Batch(torch.zeros(2, 3, 8, 8), target, torch.arange(2))]
    seen = SeenTargets()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = Trainer(precision=precision, accelerator="cpu", callbacks=[seen], **options)  # type: ignore[arg-type]
    model = TinyResNet(task="regression")
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    trainer.test(model, loader, verbose=False)
    assert len(seen.seen) == 4  # the check before training, training, validation, test
    assert all(torch.equal(each.to(target.dtype), target) for each in seen.seen)


class BrokenNetwork(TinyResNet):
    """The first output of each batch is NaN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        return out.masked_fill(torch.arange(len(out), device=out.device).unsqueeze(1) == 0, math.nan)


class BrokenInEvaluation(BrokenNetwork):
    """Only outside of training."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return TinyResNet.forward(self, input) if self.training else super().forward(input)


def test_a_training_loss_that_is_no_number_ends_the_run_and_no_value_of_the_epoch_is_plausible(
    cli, tmp_path: Path
) -> None:
    network = ["model=resnet", "model._target_=test_measures.BrokenNetwork"]
    assert cli(*TINY, *network, "metrics=[acc,top5,f1,precision,recall,auroc,ece]").status == 1
    (run,) = runs_in(tmp_path)
    summary = summary_of(run)
    assert summary["status"] == "failed" and summary["reason"].startswith("diverged: train/loss is nan")
    with (run / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    values = {k: v for k, v in row.items() if k.startswith(("train/", "val/"))}
    assert {"train/acc", "val/acc", "val/auroc"} <= set(values) and set(values.values()) == {"nan"}
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_evaluated_outputs_that_are_no_numbers_are_never_best_and_the_report_calls_the_run_diverged(
    cli, tmp_path: Path, capfd
) -> None:
    network = ["model=resnet", "model._target_=test_measures.BrokenInEvaluation"]
    assert cli(*TINY, *network, "trainer.max_epochs=2").status == 0
    (run,) = runs_in(tmp_path)
    final = final_of(run)
    evaluated = [k for k in final if k.startswith(("val/", "test/"))]
    assert len(evaluated) == 8 and all(math.isnan(final[k]) for k in evaluated)
    assert math.isfinite(final["train/loss"]) and math.isfinite(final["train/acc"])
    assert not (run / "checkpoints" / "best.ckpt").exists()
    with np.load(run / "test_correct.npz") as record:
        right = np.unpackbits(record["correct"], count=int(record["count"]))
        assert record["calibration"][0].sum() < record["count"], "what is no number is in no bin"
        assert record["calibration"][2].sum() == right.sum()
    report.main([f"runs={tmp_path / 'experiments'}"])
    page = "".join(p.read_text() for p in tmp_path.rglob("report.md")) + capfd.readouterr().out
    assert "test/acc is nan" in page


def of_two_ranks(folder: str) -> None:
    """Of one process of two; the second has no sample at first, then more than its share of scores."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(7, (900,), generator=generator)
    logits = torch.randn(900, 8, generator=generator)
    logits[torch.arange(900), target] += 1.0
    y = torch.randn(900, generator=generator) + 2000.0
    prediction = y + torch.randn(900, generator=generator)
    rows = {}
    for case, size, capacity in (("empty", 900, 2**26), ("uneven", 333, 2**26), ("binned", 100, 8000)):
        measures.EXACT_SCORES = capacity
        mine = slice(0, size) if rank == 0 else slice(size, None)
        classes = build_metrics(NAMES["classification"], "classification", 8)
        values = build_metrics(NAMES["regression"], "regression", 8)
        if len(target[mine]):
            classes.update(logits[mine].softmax(dim=1), target[mine], logits=logits[mine])
            values.update(prediction[mine], y[mine])
        rows[case] = {k: float(v) for k, v in scalars({**classes.compute(), **values.compute()}).items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    np.savez(Path(folder, "data.npz"), logits=logits, target=target, y=y, prediction=prediction)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_scikit_learn_does(
    on_two_processes: Callable[..., None], tmp_path: Path
) -> None:
    on_two_processes(of_two_ranks, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    with np.load(tmp_path / "data.npz") as data:
        logits, target, y, p = (torch.from_numpy(data[k]) for k in ("logits", "target", "y", "prediction"))
    known = expected_of_classes(logits, target, 8)
    y, p = y.double().numpy(), p.double().numpy()
    known |= {
        "mse": sk.mean_squared_error(y, p),
        "mae": sk.mean_absolute_error(y, p),
        "r2": sk.r2_score(y, p),
    }
    for case in ("empty", "uneven"):
        assert first[case] == pytest.approx(known, rel=2e-6, abs=2e-6), case
    assert first["binned"] == pytest.approx(known, abs=1e-3)
