"""EMA and SWA: averages of the weights that are evaluated and shipped, and never disturb the training."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, nightly, runs_in, summary_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from stages import assembled
from technique_runs import QUICK, built, composed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from crucible.corrections import versions_of
from crucible.options import ConfigError
from crucible.run import RunDirectory
from lab.build import build_data, with_weights
from optimizers.averaging import Averaging, WeightAverage, attach_average


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
    average, taken = WeightAverage(net), []
    for t in range(1, 21):
        step(net, optimizer, t)
        if t % 4 == 0:
            average.update()
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


class Tied(nn.Module):
    """One layer under two names, and one storage under two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = self.first
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = nn.Parameter(self.first.weight.data)
        self.same_norm = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.same_norm(self.second(self.norm(self.first(x)))))


def test_a_tensor_under_two_names_is_averaged_and_shown_once() -> None:
    torch.manual_seed(0)
    net = Tied().double()
    net.third.weight = nn.Parameter(net.first.weight.data)
    optimizer = torch.optim.SGD([net.first.weight, net.first.bias, *net.norm.parameters()], lr=0.5)
    average, taken = WeightAverage(net), []
    for t in range(1, 9):
        step(net, optimizer, t)
        average.update()
        taken.append(copy.deepcopy(net).state_dict())
    own = {k: v.clone() for k, v in net.state_dict().items()}
    with average.applied():
        assert all(torch.equal(v, average.state_dict()[k]) for k, v in net.state_dict().items())
        for k, v in net.state_dict().items():
            if v.is_floating_point():
                torch.testing.assert_close(v, torch.stack([w[k] for w in taken]).mean(0), atol=1e-12, rtol=0)
        net.norm.running_mean.fill_(3.0)
        assert float(net.same_norm.running_mean[0]) == 3.0
        with average.applied():  # within itself it changes nothing
            assert float(net.norm.running_mean[0]) == 3.0
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items())
    assert net.first.weight.data_ptr() == net.third.weight.data_ptr()

    again = WeightAverage(copy.deepcopy(net))
    again.load_state_dict(average.state_dict(), average.updates)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in average.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slow_average_in_half_precision_moves_as_the_formula_does(dtype: torch.dtype) -> None:
    net = network().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    average = WeightAverage(net, 0.999, warmup=False)
    attach_average(optimizer, average)
    expected: dict[str, torch.Tensor] = {}
    for t in range(700):
        if t == 300:  # through a checkpoint and back
            state, sums = copy.deepcopy((average.state_dict(), average.sums()))
            average.load_state_dict(state, average.updates, sums)
            assert all(torch.equal(v, average.state_dict()[k]) for k, v in state.items())
        if t:
            for p in net.parameters():
                p.data.add_(0.01)
        else:
            expected = {k: v.double() for k, v in net.state_dict().items()}
        optimizer.step()
        for k, v in net.named_parameters():
            expected[k] += 0.001 * (v.detach().double() - expected[k])
    for k, v in average.state_dict().items():
        assert v.dtype == (dtype if v.is_floating_point() else torch.int64)
        if v.is_floating_point():
            torch.testing.assert_close(average.sums()[k].double(), expected[k], atol=1e-4, rtol=1e-4)
            assert torch.equal(v, average.sums()[k].to(dtype))


NORMS = ("batch", "ghost", "switchable", "online", "group")


class ByHand(Callback):
    """The weights after every step, and what each evaluation and each checkpoint should be of.

    Args:
        due: `(epoch, last of its epoch) -> bool`: whether the average takes the weights in.
        decay: of an EMA; None: equal weights.
    """

    def __init__(self, due: Any, decay: float | None) -> None:
        self.due, self.decay = due, decay
        self.sums: dict[str, torch.Tensor] = {}
        self.count = self.epoch = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.decay is not None:
            self.sums = {k: v.detach().double() for k, v in module.model.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if self.due(trainer.current_epoch, last):
            self.count, self.epoch = self.count + 1, trainer.current_epoch
            for k, v in module.model.named_parameters():
                if self.decay is None:
                    self.sums[k] = self.sums.get(k, 0) + v.detach().double()
                else:
                    d = min(self.decay, (1 + self.count) / (10 + self.count))
                    self.sums[k] = d * self.sums[k] + (1 - d) * v.detach().double()

    def average(self) -> dict[str, torch.Tensor]:
        return {k: v / self.count if self.decay is None else v for k, v in self.sums.items()}


def drawn(seed: int) -> dict[str, Any]:
    """A training: which average, norm and precision, how long, how often validated and saved."""
    rng = random.Random(seed)
    steps = rng.randint(3, 5)
    epochs = rng.randint(2, 5)
    cut = rng.choice([None, rng.randint(steps + 1, steps * epochs)])
    pattern = rng.choice([
        [], [f"trainer.check_val_every_n_epoch={rng.randint(2, 6)}"], ["trainer.limit_val_batches=0"],
        ["+trainer.val_check_interval=2"],
    ])  # fmt: skip
    return {
        "kind": rng.choice(["swa", "ema"]),
        "norm": NORMS[seed % len(NORMS)],
        "precision": rng.choice(["32-true", "32-true", "bf16-true"]),
        "start": rng.choice([0.0, 0.4, 0.5]),
        "length": min(epochs, cut / steps) if cut else epochs,  # in epochs
        "options": [
            f"trainer.limit_train_batches={steps}", f"trainer.max_epochs={epochs}",
            f"trainer.max_steps={cut or -1}",
        ],
        "pattern": ["trainer.limit_val_batches=2", *pattern],
    }  # fmt: skip


def trained(case: dict[str, Any], pattern: list[str], folder: Path) -> tuple[dict, dict, ByHand, Any, Any]:
    """The final checkpoint, what was tested, the average by hand, the model and the data."""
    fixed = [*case["options"], f"trainer.precision={case['precision']}", "model.lr=0.1"]
    config = composed(case["kind"], options=(*fixed, "trainer.limit_test_batches=4", *pattern))
    config["model"] |= {"swa_start": case["start"]} if case["kind"] == "swa" else {"ema_decay": 0.9}
    kwargs = {"ghost": {"ghost_size": 4}, "group": {"num_groups": 8}}.get(case["norm"])
    config["model"] |= {"norm": case["norm"], "norm_kwargs": kwargs}
    model, data, trainer = built(config, folder)
    late = case["start"] * case["length"]
    by_hand = (
        ByHand(lambda epoch, last: last and epoch + 1 > late, None)
        if case["kind"] == "swa"
        else ByHand(lambda epoch, last: True, 0.9)
    )
    trainer.callbacks.append(by_hand)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "state.ckpt")
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    return torch.load(folder / "state.ckpt", weights_only=True), tested, by_hand, model, data


@pytest.mark.parametrize("seed", [20, *nightly(*(n for n in range(200) if n != 20))])
def test_what_is_shipped_is_the_average_made_by_hand_however_often_it_was_validated(
    seed: int, tmp_path: Path
) -> None:
    case = drawn(seed)
    state, tested, by_hand, model, data = trained(case, case["pattern"], tmp_path)
    assert state["average_updates"] == by_hand.count or not by_hand.count
    shipped = {k.removeprefix("model."): v for k, v in state["averaged_state_dict"].items()}
    rough = case["precision"] == "bf16-true"
    for name, value in by_hand.average().items() if by_hand.count else ():
        assert shipped[name].dtype == (torch.bfloat16 if rough else torch.float32)
        torch.testing.assert_close(shipped[name].double(), value, atol=1e-5, rtol=0.005 if rough else 1e-5)

    other, otherwise, *_ = trained(case, ["trainer.limit_val_batches=1"], tmp_path)
    for name, value in state["averaged_state_dict"].items():
        assert torch.equal(other["averaged_state_dict"][name], value), name
    assert otherwise == tested

    # the test was of what is shipped: those weights in a network of their own come to the same
    alone = copy.deepcopy(model.model)
    alone.load_state_dict(shipped)
    alone.eval()
    loss = samples = 0.0
    with torch.no_grad():
        for number, raw in enumerate(data.test_dataloader()):
            if number == 4:
                break
            batch = data.batch_transform(raw, "eval", 0)
            logits = alone(batch.input.to(next(alone.parameters()).dtype)).float()
            loss += float(nn.functional.cross_entropy(logits, batch.target, reduction="sum"))
            samples += len(logits)
    assert tested["test/loss"] == pytest.approx(loss / samples, rel=1e-5)

    if case["kind"] == "swa" and by_hand.count and case["norm"] in ("batch", "switchable"):
        refreshed = statistics_by_hand(alone, data, by_hand.epoch)
        for name, value in refreshed.items():
            torch.testing.assert_close(
                shipped[name].double(), value, atol=0.02 if rough else 1e-4, rtol=0.02 if rough else 1e-4
            )


def statistics_by_hand(network: nn.Module, data: Any, epoch: int) -> dict[str, torch.Tensor]:
    """The mean over the batches of each norm's batch statistics, all computed outside the norms."""
    network = copy.deepcopy(network).train()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0].double().transpose(0, 1).flatten(1)
            unbiased = int(isinstance(module, nn.modules.batchnorm._BatchNorm))
            seen.setdefault(name, []).append((x.mean(1), x.var(1, correction=unbiased)))

        return hook

    for name, module in network.named_modules():
        if hasattr(module, "running_mean"):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        for raw in data.training_batches(epoch, 100):
            batch = data.batch_transform(raw, "train", epoch)
            network(batch.input.to(next(network.parameters()).dtype))
    return {
        f"{name}.{kind}": torch.stack([pair[i] for pair in pairs]).mean(0)
        for name, pairs in seen.items()
        for i, kind in enumerate(("running_mean", "running_var"))
    }


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
    after_training = summary_of(run)["final"]["test/loss"]
    again = cli(f"run={run}", "task=test", "ckpt_path=last")
    assert again.status == 0, again.err
    assert json.loads((run / "test.json").read_text())["metrics"]["test/loss"] == pytest.approx(
        after_training
    )
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    loaded = with_weights(RunDirectory(run).config(), run / "checkpoints" / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in content["averaged_state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("techniques", ["swa", "[swa,manifold_mixup]"])
def test_swas_norm_statistics_are_those_of_a_pass_with_the_averaged_weights(
    cli, tmp_path: Path, techniques: str
) -> None:
    outcome = cli(*TINY, f"technique={techniques}", "model.swa_start=0.4", "trainer.max_epochs=3")
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


def test_an_epochs_weights_are_averaged_where_a_loss_scaler_leaves_its_last_step_out(tmp_path: Path) -> None:
    config = composed("swa", options=(*QUICK, "trainer.max_steps=-1", "trainer.max_epochs=2"))
    config["model"]["swa_start"] = 0.0
    model, data, trainer = built(config, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # too large for any step of this length
    trainer.strategy._precision_plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer.fit(model, datamodule=data)
    assert [weights.updates for weights in model.step.weights] == [2]


def test_batches_for_norm_statistics_are_made_outside_of_the_networks_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*QUICK, "trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.precision=bf16-true")
    config = composed("swa", options=options)
    config["model"]["swa_start"] = 0.0
    model, data, trainer = built(config, tmp_path)
    made: list[torch.dtype] = []
    transform = data.batch_transform

    def seen(*args: Any) -> Any:
        made.append(torch.get_default_dtype())
        return transform(*args)

    ran: list[torch.dtype] = []
    monkeypatch.setattr(data, "batch_transform", seen)
    model.model.register_forward_pre_hook(lambda *_: ran.append(torch.get_default_dtype()))
    trainer.fit(model, datamodule=data)
    assert set(made) == {torch.float32} and set(ran) == {torch.bfloat16}


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


@pytest.mark.parametrize(
    ("model", "trainer", "corrected"),
    [
        ({"ema_decay": 0.9}, {}, False),
        ({"ema_decay": 0.9}, {"precision": "bf16-true"}, True),
        ({"ema_decay": 0.9}, {"devices": 2}, True),
        ({"ema_decay": 0.9, "norm": "group"}, {"devices": 2}, False),
        ({"swa_start": 0.5}, {}, False),
        ({"swa_start": 0.5, "norm": "online"}, {}, True),
        ({"swa_start": 0.5}, {"check_val_every_n_epoch": 4}, True),
        ({"swa_start": 0.5}, {"max_steps": 50}, True),
        ({"swa_start": 0.5}, {"overfit_batches": 2}, True),
        ({"swa_start": 0.5, "manifold_mixup": True}, {}, True),
        ({"swa_start": 0.5}, {"precision": "bf16-mixed"}, False),
        ({}, {"precision": "bf16-true", "devices": 2, "max_steps": 50}, False),
    ],
)
def test_only_averages_whose_numbers_changed_are_other_runs(
    model: dict, trainer: dict, corrected: bool
) -> None:
    config = {"model": model, "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", **trainer}}
    assert bool(versions_of(Averaging.corrections, config)) == corrected


@pytest.mark.parametrize(
    ("policy", "trainer", "version"),
    [
        ("imagenet.BaselineTransform", {"precision": "16-mixed", "accelerator": "cuda"}, 4),
        ("imagenet.BaselineTransform", {"precision": "bf16-mixed"}, None),
        ("imagenet.BaselineTransform", {"precision": "32-true", "accelerator": "cuda"}, None),
        ("cifar.AutoAugmentTransform", {"precision": "64-true"}, 4),
        ("cifar.AutoAugmentTransform", {"precision": "bf16-mixed"}, None),
    ],
)
def test_only_statistics_of_images_that_changed_are_other_runs(
    policy: str, trainer: dict, version: int | None
) -> None:
    config = {
        "model": {"swa_start": 0.5},
        "data": {"module": {"train_transforms": {"_target_": f"augmentation.policies.{policy}"}}},
        "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", **trainer},
    }
    assert versions_of(Averaging.corrections, config).get("model.swa_start") == version
