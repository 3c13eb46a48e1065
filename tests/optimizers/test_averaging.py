"""EMA and SWA: averages of the weights that are evaluated and shipped, and never disturb the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, runs_in
from stages import assembled
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from crucible.options import ConfigError
from crucible.run import RunDirectory
from lab.build import build_data
from lab.tasks import with_weights
from optimizers.averaging import WeightAverage, attach_average


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)).double()
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_follows_its_formula_from_the_first_weights_on(decay: float) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    average = WeightAverage(net, decay)
    attach_average(optimizer, average)
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    for t in range(1, 30):
        step(net, optimizer, t)
        if t == 1:  # the running statistics of the average start where the first forward left them
            expected |= {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
        d = min(decay, (1 + t) / (10 + t))
        for k, v in net.state_dict().items():
            expected[k] = d * expected[k] + (1 - d) * v if v.is_floating_point() else v.clone()
    for k, v in average.state_dict().items():
        torch.testing.assert_close(v, expected[k], atol=1e-12, rtol=0)


def test_without_warmup_ema_is_torchs() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    average = WeightAverage(net, 0.9, warmup=False)
    attach_average(optimizer, average)
    torchs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torchs.update_parameters(net)  # its first update copies
    for t in range(20):
        step(net, optimizer, t)
        torchs.update_parameters(net)
    theirs = dict(torchs.module.named_parameters())
    for name, _ in net.named_parameters():
        torch.testing.assert_close(average.state_dict()[name], theirs[name].detach(), atol=1e-12, rtol=0)


def test_swa_is_the_plain_mean_of_what_was_due() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    average, due, taken = WeightAverage(net), [False], []
    attach_average(optimizer, average, lambda: due[0])
    for t in range(1, 21):
        due[0] = t % 4 == 0
        step(net, optimizer, t)
        if due[0]:
            taken.append({k: v.clone() for k, v in net.state_dict().items()})
    assert average.updates == 5
    for k, v in average.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(v, torch.stack([w[k] for w in taken]).mean(0), atol=1e-12, rtol=0)


def test_applied_trades_the_weights_and_gives_them_back_bit_by_bit() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    average = WeightAverage(net, 0.9)
    attach_average(optimizer, average)
    for t in range(5):
        step(net, optimizer, t)
    own = {k: v.clone() for k, v in net.state_dict().items()}
    averaged = {k: v.clone() for k, v in average.state_dict().items()}
    references = list(net.parameters())
    with torch.inference_mode(), average.applied():
        assert all(torch.equal(v, averaged[k]) for k, v in net.state_dict().items())
        assert all(p is q for p, q in zip(references, net.parameters(), strict=True))
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, averaged[k]) for k, v in average.state_dict().items())
    step(net, optimizer, 9)  # training goes on: the tensors are ordinary ones


def test_a_step_that_the_loss_scaler_skips_is_no_update() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = WeightAverage(net, 0.5)
    attach_average(optimizer, average)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert average.updates == 2


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ema_decay": 0.9, "swa_start": 0.5}, "model.swa_start"),
        ({"swa_lr": 0.5}, "model.swa_start"),
        ({"ema_warmup": False}, "model.ema_decay"),
        ({"ema_decay": 1.0}, "model.ema_decay"),
        ({"swa_start": 1.0}, "model.swa_start"),
    ],
)
def test_what_has_no_meaning_is_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        assembled(**values)


def rows(run: Path) -> list[dict[str, str]]:
    return RunDirectory(run).metrics()


def test_val_is_of_the_average_and_val_raw_of_the_trained_weights(cli, tmp_path: Path) -> None:
    common = [*TINY, "trainer.max_epochs=2", "model.lr=0.05"]
    plain = cli(*common, "exp_dir=plain")
    ema = cli(*common, "exp_dir=ema", "technique=ema", "model.ema_decay=0.5", "model.ema_warmup=false")
    assert plain.status == 0 and ema.status == 0, plain.err + ema.err
    (a,), (b,) = runs_in(tmp_path / "plain"), runs_in(tmp_path / "ema")
    for without, with_ema in zip(rows(a), rows(b), strict=True):
        assert without["val/loss"] == with_ema["val_raw/loss"] != with_ema["val/loss"]
        assert without["train/loss"] == with_ema["train/loss"]

    content = torch.load(b / "checkpoints" / "last.ckpt", weights_only=True)
    trained = torch.load(a / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(content["state_dict"][k], v) for k, v in trained.items())
    assert any(not torch.equal(content["averaged_state_dict"][k], v) for k, v in trained.items())


def test_test_and_predictions_are_of_the_average(cli, tmp_path: Path) -> None:
    assert cli(*TINY, "technique=ema", "trainer.max_epochs=2").status == 0
    (run,) = runs_in(tmp_path)
    after_training = json.loads((run / "summary.json").read_text())["final"]["test/loss"]
    again = cli(f"run={run}", "task=test", "ckpt_path=last")
    assert again.status == 0, again.err
    assert json.loads((run / "test.json").read_text())["metrics"]["test/loss"] == pytest.approx(
        after_training
    )
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    loaded = with_weights(RunDirectory(run).config(), run / "checkpoints" / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in content["averaged_state_dict"].items())


def test_swas_norm_statistics_are_those_of_a_pass_with_the_averaged_weights(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "technique=swa", "model.swa_start=0.4", "trainer.max_epochs=3")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["average_updates"] == 2  # the ends of epochs 1 and 2
    config = RunDirectory(run).config()
    model, data = with_weights(config, run / "checkpoints" / "last.ckpt"), build_data(config)
    data.check()
    kept = {k: v.clone() for k, v in model.model.state_dict().items()}
    update_bn((data.batch_transform(b, "train", 2).input for b in data.training_batches(2, 100)), model.model)
    for name, value in model.model.state_dict().items():
        torch.testing.assert_close(kept[name], value, atol=1e-5, rtol=1e-5)


def test_swa_holds_the_rate_from_its_start_on(cli, tmp_path: Path) -> None:
    outcome = cli(
        *TINY,
        "technique=swa",
        "model.swa_start=0.5",
        "model.swa_lr=0.3",
        "trainer.max_epochs=4",
        "model.lr=0.1",
    )
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    assert [float(r["lr"]) for r in rows(run)][2:] == pytest.approx([0.03, 0.03])
