"""The words of the works that the recipes reproduce are answered in one line that says what they are here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from declared import all_options

from crucible import other_words
from crucible.command_line import prepare
from crucible.metrics import METRICS, check_metrics
from crucible.options import ConfigError, signature_options
from norms.modules import GroupNorm
from norms.online import OnlineNorm

# as their READMEs have them, and what has to stand in the answer
OPTIONS = {
    "trainer.logger.project=mine": "logger.wandb.project=mine",
    "model.result_plot=all": "callbacks.plots=null: not",
    "model.result_plot=disable": "here it is callbacks.plots=null",
    "data.module._target_=augmentation.policies.cifar.AutoAugmentTransform":
        "data.module.train_transforms._target_=augmentation.policies.cifar.AutoAugmentTransform",
    "data.module=num_workers 12": "data.module.num_workers=12",
    "trainer.accelerator=CPU": "trainer.accelerator=cpu",
    "model.task=Classification": "data.task=classification",
    "model.apply_shakedrop=True": "model.shakedrop=True",
    "--model.resnet_dropout=0.5": "model.resnet_dropout=0.5",
    "metrics=[acc,pr]": "'pr' is not a metric for classification; here it is precision and recall",
    "metrics=[top5acc]": "'top5acc' is not a metric for classification; here it is top5",
    "seed=False": "seed=0",
}  # fmt: skip
FLAGS = {
    ("--validate",): "python main.py run=RUN task=test",
    ("--resume", "resnet50/model_best.pth.tar"): "model.init_from=resnet50/model_best.pth.tar",
    ("--modify-softmax", "0.25"): "model.powergrad_alpha=0.25",
    ("--logit-stats",): "technique=logit_stats",
    ("--model", "resnet18"): "model.type=resnet18",
    ("--norm-mode", "online"): "model.norm=online",
    ("--afwd", "0.999"): "model.norm_kwargs.alpha_fwd=0.999",
    ("--no-wd",): "model.undecay_norm=true",
    ("--lr=0.4",): "model.lr=0.4",
    ("--crop-pct", "0.95"): "data.module.test_transforms.crop_pct=0.95",
    ("--epochs", "--lr"): "trainer.max_epochs=VALUE",
}


@pytest.mark.parametrize("argument", OPTIONS)
def test_an_option_of_theirs_is_led_home_in_one_line(argument: str, cli, tmp_path: Path) -> None:
    outcome = cli("data=synthetic", argument)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert OPTIONS[argument] in outcome.err
    assert not list(tmp_path.iterdir()), "before a folder is made"


@pytest.mark.parametrize("arguments", FLAGS, ids=" ".join)
def test_a_flag_of_theirs_is_led_home_in_one_line(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(["data=imagenet", *arguments], ROOT)
    assert str(refused.value).startswith(
        f"{arguments[0].partition('=')[0]}: no flag of Crucible's; here it is "
    )
    assert FLAGS[arguments] in str(refused.value) and "\n" not in str(refused.value)


SNIPPETS = {
    "from base_model import BaseModel": "from models.base_model import BaseModel",
    "from .base_datamodule import BaseDataModule": "from datasets.base_datamodule import BaseDataModule",
    "from regularization.sam import SAM": "docs/techniques.md",
}


@pytest.mark.parametrize("line", SNIPPETS)
def test_an_import_of_their_example_is_led_home(line: str, cli, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    name = f"my_network_{abs(hash(line))}"
    (own / f"{name}.py").write_text(f"{line}\n\n\nclass CustomModel(object):\n    pass\n")
    outcome = cli(f"user_dir={own}", f"model._target_={name}.CustomModel")
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert SNIPPETS[line] in outcome.err


def test_a_network_of_ones_own_may_have_such_an_option(cli, tmp_path: Path) -> None:
    """The answer is for what was refused; another mistake beside it has its own."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "plotting_network.py").write_text(
        "from models.cifar_resnet import CifarResNet\n\n\nclass Plotting(CifarResNet):\n"
        "    def __init__(self, result_plot: str = 'val', **kwargs):\n        super().__init__(**kwargs)\n"
    )
    outcome = cli(
        f"user_dir={own}", "model=cifar_resnet", "model._target_=plotting_network.Plotting", "+model.result_plot=all",
        "model.lr=-1",
    )  # fmt: skip
    assert outcome.status == 2 and "model.lr must be" in outcome.err, outcome.err


def test_what_the_answers_name_is_there() -> None:
    """Every option, metric and page of the table."""
    texts = [*other_words._FLAGS.values(), *(t for _, t in other_words._OPTIONS if isinstance(t, str))]
    known = {option.name for option in all_options()} | {"logger.wandb.project", "callbacks.plots"}
    known |= {
        f"model.norm_kwargs.{name}" for kind in (OnlineNorm, GroupNorm) for name in signature_options(kind)
    }
    train = yaml.safe_load((ROOT / "cli_configs" / "train.yaml").read_text())
    for text in texts:
        for name in re.findall(
            r"\b(?:model|data|trainer|callbacks|logger|checkpoint)(?:\.(?!md\b)\w+)+", text
        ):
            there = (
                name in known
                or name.rpartition(".")[0] in known
                or name.split(".")[1] in train[name.split(".")[0]]
            )
            assert there or name in ("model.depth", "model.type", "logger.wandb"), f"{text}: {name}"
        for page in re.findall(r"docs/\w+\.md", text):
            assert (ROOT / page).is_file()
        for technique in re.findall(r"technique=(\w+)", text):
            assert (ROOT / "cli_configs" / "technique" / f"{technique}.yaml").is_file()
    rows = {row.name for row in METRICS}
    for name, here in other_words._METRICS.items():
        assert set(here.split(" and ")) <= rows
        with pytest.raises(ConfigError, match="here it is"):
            check_metrics([name], "classification", 10)
