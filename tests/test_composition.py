"""Every pair of techniques, as a user would ask for it: it trains, or it is refused with one clear line."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch.nn import functional as F

from crucible import config as configuration
from crucible.build import build_data, build_model, build_trainer
from crucible.options import ConfigError

TECHNIQUES = sorted(
    f.stem for f in (ROOT / "cli_configs" / "technique").glob("*.yaml") if f.stem != "baseline"
)
# both set model.norm
NORMS = {t for t in TECHNIQUES if t.endswith("_norm") and t != "undecay_norm"}
SMALL = [
    "model=resnet", "data=synthetic", "data.module.num_samples=512", "data.module.batch_size=16", "data.input_size=8",
    "data.num_classes=4", "data.module.noise=0.5", "model.lr=0.01", "model.warmstart=0", "trainer.max_epochs=-1",
    "trainer.max_steps=30", "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false",
    "callbacks.progress=null", "callbacks.plots=null", "logger.wandb=null",
]  # fmt: skip
OF_THE_RESNET = (
    "cifar_size", "zero_init_residual", "resnet_dropout", "stochastic_depth", "squeeze_excitation", "se_rd_ratio",
    "pretrained",
)  # fmt: skip


def composed(*techniques: str, precision: str = "32-true") -> dict[str, Any]:
    GlobalHydra.instance().clear()
    overrides = [*SMALL, f"technique=[{','.join(techniques)}]", f"trainer.precision={precision}"]
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", overrides))
    config["model"] = {k: v for k, v in config["model"].items() if k not in OF_THE_RESNET}
    config["model"]["_target_"] = "tiny_networks.TinyResNet"
    configuration.check(config, overrides)
    return config


def train(config: dict[str, Any], folder: Any) -> tuple[float, float]:
    """Plain cross-entropy in eval mode on the same training images, before and after 30 steps."""
    data = build_data(config)
    data.check()
    configuration.resolve(config, data)
    model = build_model(config)
    batch = data.samples("train")[(0, list(range(128)))]
    batch = data.batch_transform(batch, "eval", 0)

    def loss() -> float:
        frozen = copy.deepcopy(model.model).eval()
        with torch.no_grad():
            return float(F.cross_entropy(frozen(batch.input), batch.target))

    before = loss()
    callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values() if node]
    trainer = build_trainer(config, folder, callbacks, [])
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 30
    return before, loss()


def conflict(pair: tuple[str, ...]) -> bool:
    return len(NORMS & set(pair)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("first", TECHNIQUES)
def test_a_technique_composes_with_every_other(first: str, precision: str, tmp_path) -> None:
    pairs = [p for p in combinations(TECHNIQUES, 2) if p[0] == first and not conflict(p)]
    for techniques in [(first,), *pairs]:
        before, after = train(composed(*techniques, precision=precision), tmp_path)
        assert after == after and after < before, f"{techniques}: {before:.3f} -> {after:.3f}"


@pytest.mark.parametrize("pair", [p for p in combinations(TECHNIQUES, 2) if conflict(p)], ids="+".join)
def test_two_techniques_that_set_one_option_are_refused_in_one_line(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        composed(*pair)
    line = str(error.value)
    assert "model.norm" in line and pair[0] in line and pair[1] in line and "\n" not in line


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_trains_with_the_network_compiled_whole(technique: str, tmp_path, monkeypatch) -> None:
    config = composed(technique)
    config["model"]["compile"] = True
    compiled: list[bool] = []

    def whole(network: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(True)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    before, after = train(config, tmp_path)
    assert compiled and after < before
