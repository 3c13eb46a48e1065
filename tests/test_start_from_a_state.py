"""`ckpt_path=FILE`: the state gives weights, moments and counters, the configuration the rest, or it is refused."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, nightly, runs_in
from lightning.pytorch.callbacks import Callback
from technique_runs import built, composed

from crucible.options import ConfigError
from lab.states import check_state

HERE = [
    *TINY,
    "model=resnet",
    "model._target_=tiny_networks.TinyResNet",
    "trainer.limit_train_batches=3",
    "test_after_training=false",
]
RUN = [*HERE, "trainer.max_epochs=3"]


def only_new(folder: Path, known: set[Path]) -> Path:
    (run,) = set(runs_in(folder)) - known
    return run


def rates(run: Path) -> list[float]:
    return [float(row["lr"]) for row in csv.DictReader((run / "metrics.csv").open())]


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


class SaveAt(Callback):
    """Writes a training state after a batch, counted over all epochs."""

    def __init__(self, file: Path, batch: int) -> None:
        self.file, self.batch = file, batch

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            trainer.save_checkpoint(self.file)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training states: `ended` after three epochs, `inside` the second, between two batches of one step."""
    folder = tmp_path_factory.mktemp("states")
    common = (
        "data=synthetic", "data.module.num_samples=96", "trainer.max_epochs=3", "trainer.max_steps=-1",
        "trainer.limit_train_batches=3", "model.lr=0.02", "model.warmstart=1",
    )  # fmt: skip
    found = {}
    for name, options in {"ended": (), "inside": ("trainer.accumulate_grad_batches=2",)}.items():
        model, data, trainer = built(composed(options=(*common, *options)), folder)
        found[name] = folder / f"{name}.ckpt"
        trainer.callbacks.append(SaveAt(found[name], 4))
        trainer.fit(model, datamodule=data)
        if name == "ended":
            trainer.save_checkpoint(found[name])
    return found


@pytest.fixture
def ended(states: dict[str, Path]) -> Path:
    return states["ended"]


OTHERWISE = {
    "data.module.batch_size=8": ["data.module.batch_size=8", "after 1 batches of 16"],
    "data.module.num_samples=128": ["86 samples", "115 samples"],
    "seed=1": ["seed=1", "order of seed 0"],
    "trainer.limit_train_batches=1": ["trainer.limit_train_batches=1", "after 1 batches"],
    "trainer.accumulate_grad_batches=3": ["trainer.accumulate_grad_batches=3", "steps of 2 batches"],
    "trainer.precision=bf16-mixed": ["trainer.precision=bf16-mixed", "gradients are those of 32-true"],
}


def test_inside_an_epoch_what_is_left_of_it_must_be_the_same(
    cli, tmp_path: Path, states: dict[str, Path]
) -> None:
    here = [*RUN, "trainer.accumulate_grad_batches=2", f"ckpt_path={states['inside']}"]
    for typed, said in OTHERWISE.items():
        outcome = cli(*here, typed)
        assert outcome.status == 2 and not runs_in(tmp_path), typed
        (line,) = outcome.err.strip().splitlines()
        assert all(part in line for part in said), line
    outcome = cli(*here, "model.lr=0.01")
    assert outcome.status == 0, outcome.err


SAMPLES_LEFT = {  # 86 samples are five batches of 16, and one of 6
    "data.module.drop_last=false": [],
    "data.module.drop_last=true": ["data.module.drop_last=true", "after 5 batches", "5 in an epoch"],
    "trainer.limit_train_batches=0.9": ["trainer.limit_train_batches=0.9", "5 in an epoch"],
    "trainer.overfit_batches=4": ["trainer.overfit_batches=4", "4 in an epoch"],
}


@pytest.fixture(scope="module")
def before_the_rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training state before the last, smaller batch of an epoch."""
    folder = tmp_path_factory.mktemp("rest")
    options = ("data=synthetic", "data.module.num_samples=96", "data.module.drop_last=false")
    model, data, trainer = built(
        composed(options=(*options, "trainer.max_epochs=1", "model.warmstart=1")), folder
    )
    trainer.callbacks.append(SaveAt(folder / "rest.ckpt", 5))
    trainer.fit(model, datamodule=data)
    return folder / "rest.ckpt"


@pytest.mark.parametrize("typed", SAMPLES_LEFT)
def test_before_the_last_smaller_batch_of_an_epoch_a_run_goes_on_with_it(
    before_the_rest: Path, tmp_path: Path, typed: str
) -> None:
    options = ("data=synthetic", "data.module.num_samples=96", "data.module.drop_last=false", typed)
    config = composed(options=(*options, "trainer.max_epochs=2", "model.warmstart=1"))
    config["ckpt_path"] = str(before_the_rest)
    model, data, _ = built(config, tmp_path)
    if not (said := SAMPLES_LEFT[typed]):
        check_state(config, model, data)
        return
    with pytest.raises(ConfigError) as refused:
        check_state(config, model, data)
    assert all(part in str(refused.value) for part in said), refused.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        [],
        *nightly(
            ["model.lr=0.001", "model.scheduler=null", "model.warmstart=0"],
            ["model.lr=0.05", "model.lr_interval=step", "model.weight_decay=0.1"],
        ),
        ["model.scheduler=MultiStep", "model.lr_milestones=[4]", "model.momentum=0.5"],
        ["data.module.batch_size=8", "trainer.limit_train_batches=6", "model.lr_interval=step"],
    ],
    ids=["longer", "constant", "by_the_step", "multi_step", "other_batches"],
)
def test_what_is_typed_holds_from_the_state_on(cli, tmp_path: Path, ended: Path, typed: list[str]) -> None:
    wanted = [*HERE, *typed, "trainer.max_epochs=6"]
    assert cli(*wanted).status == 0
    (whole,) = runs_in(tmp_path)
    outcome = cli(*wanted, f"ckpt_path={ended}")
    assert outcome.status == 0, outcome.err
    started = only_new(tmp_path, {whole})
    assert rates(started) == rates(whole)[3:]
    groups = [state_of(run)["optimizer_states"][0]["param_groups"] for run in (started, whole)]
    assert groups[0] == groups[1]
    assert state_of(started)["epoch"] == state_of(whole)["epoch"]


REFUSED = {
    "trainer.max_epochs=3": ["trainer.max_epochs=3", "3 epochs behind it"],
    "trainer.max_epochs=2": ["trainer.max_epochs=2", "3 epochs behind it"],
    "trainer.max_steps=9": ["trainer.max_steps=9", "9 steps behind it"],
    "model.optimizer=Adam": ["model.optimizer", "of SGD", "Adam"],
    "model.optimizer=AdamW": ["model.optimizer", "of SGD", "AdamW"],
    "model.undecay_norm=true": ["model.undecay_norm", "one group", "2 groups"],
    "model.layer_decay=0.8": ["model.layer_decay", "one group"],
    "model.lookahead=true": ["model.lookahead", "without Lookahead"],
    "model.squeeze_excitation=true": ["state of another network", "model.init_from"],
    "data.num_classes=4": ["state of another network", "model.init_from"],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_cannot_go_on_is_refused_in_one_line_before_there_is_a_folder(
    cli, tmp_path: Path, ended: Path, typed: str
) -> None:
    outcome = cli(*HERE, "trainer.max_epochs=6", typed, f"ckpt_path={ended}")
    assert outcome.status == 2 and not runs_in(tmp_path)
    (line,) = outcome.err.strip().splitlines()
    assert all(part in line for part in [*REFUSED[typed], str(ended)]), line


def test_the_optimizers_own_options_that_change_its_state_are_refused(cli, tmp_path: Path) -> None:
    adam = [*RUN, "model.optimizer=Adam", "model.lr=0.001"]
    assert cli(*adam).status == 0
    (run,) = runs_in(tmp_path)
    state = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    outcome = cli(*adam, "+model.optimizer_kwargs.amsgrad=true", "trainer.max_epochs=4", state)
    assert outcome.status == 2 and len(runs_in(tmp_path)) == 1
    (line,) = outcome.err.strip().splitlines()
    assert "model.optimizer=Adam" in line and "max_exp_avg_sq" in line
    outcome = cli(*adam, "trainer.max_epochs=4", "+model.optimizer_kwargs.eps=1e-3", state)
    assert outcome.status == 0, outcome.err
    (group,) = state_of(only_new(tmp_path, {run}))["optimizer_states"][0]["param_groups"]
    assert group["eps"] == 1e-3


FILES: dict[str, Any] = {
    "timm": {
        "epoch": 3, "arch": "resnet10t", "state_dict": {"w": torch.zeros(1)}, "optimizer": {"state": {}}, "version": 2,
        "args": argparse.Namespace(lr=0.1), "amp_scaler": {"scale": 1.0}, "state_dict_ema": {"w": torch.zeros(1)},
        "metric": 71.2,
    },
    "weights": {"w": torch.zeros(1)},
    "objects": {"state_dict": {}, "path": Path("code")},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FILES, "damaged"])
def test_a_file_of_another_program_is_refused_in_one_line_that_names_the_way_on(
    cli, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "checkpoint.pth.tar"
    file.write_bytes(b"nothing") if kind == "damaged" else torch.save(FILES[kind], file)
    outcome = cli(*RUN, f"ckpt_path={file}")
    assert outcome.status == 2 and not runs_in(tmp_path)
    (line,) = outcome.err.strip().splitlines()
    assert f"ckpt_path={file}" in line and f"model.init_from={file}" in line
    assert "weights_only" not in line and "\x1b" not in line and len(line) < 400
