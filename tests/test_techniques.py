"""Techniques attach themselves: nobody else names their options, what is off adds nothing, one graph serves."""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from small_models import small
from stages import assembled
from torch import Tensor, nn

from crucible.batch import Batch
from crucible.options import ConfigError
from crucible.seams import insert_seams
from crucible.technique import Setting, Step, Technique
from lab.summary import build_on_meta
from models.base_model import BaseModel
from models.techniques import TECHNIQUES

CODE = (
    "crucible",
    "lab",
    "reporting",
    "models",
    "datasets",
    "augmentation",
    "losses",
    "norms",
    "optimizers",
    "callbacks",
)
# words that name other things too: arguments of networks, statistics, the policies' own cutout, gc's freeze
FREE = {"norm", "activation", "cutout_size", "temperature", "freeze"}
STAGES = (
    "network", "raw", "batch", "ready", "loss", "closure", "gradient", "groups", "optimizer", "schedule", "weights",
    "networks",
)  # fmt: skip
DIGITS = Setting(num_classes=3)


def home(kind: type[Technique]) -> Path:
    return Path(kind.__module__.replace(".", "/"))


def named_in(file: Path) -> set[str]:
    """The names in a file that may be options: attributes, keywords, and texts, with or without `model.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.removeprefix("model.").partition("=")[0])
    return found


def test_each_techniques_options_are_named_in_its_own_file_only() -> None:
    elsewhere = []
    for room in CODE:
        for file in (ROOT / room).rglob("*.py"):
            if file.stem == "other_words":  # which answers other works' words by the options' names
                continue
            here = file.relative_to(ROOT).with_suffix("")
            names = named_in(file)
            for kind in TECHNIQUES:
                own = here in (home(kind), home(kind) / "__init__")
                options = {f.name for f in fields(kind)} - FREE
                elsewhere += [f"{file.relative_to(ROOT)}: {n}" for n in names & options if not own]
    assert not elsewhere


def test_base_model_is_short() -> None:
    assert len((ROOT / "models" / "base_model.py").read_text().splitlines()) < 400


def test_off_adds_nothing() -> None:
    step = assembled(DIGITS)
    assert not any(getattr(step, stage) for stage in STAGES) and not step.input_gradient


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_an_option_without_the_one_that_it_needs_is_refused(kind: type[Technique]) -> None:
    for name in kind.needs:
        default = kind.__dataclass_fields__[name].default
        value: Any = {"sam_rho": 0.1, "norm_kwargs": {"eps": 1e-3}, "swa_lr": 0.5, "unfreeze_at": 1}.get(name)
        if value is None:
            value = (
                not default
                if isinstance(default, bool)
                else 1 + (default or 0)
                if isinstance(default, int)
                else 0.7
            )
        with pytest.raises(ConfigError, match=rf"model\.{name}.* needs model\."):
            assembled(DIGITS, **{name: value})


@pytest.mark.parametrize(
    ("values", "passes"), [({}, 1.0), ({"sam": True}, 2.0), ({"sam": True, "sam_every": 5}, 1.2)]
)
def test_the_passes_of_a_step_are_told(values: dict[str, Any], passes: float) -> None:
    techniques = assembled(DIGITS, **values).setting.techniques.values()
    assert 1 + sum(t.passes - 1 for t in techniques) == pytest.approx(passes)


class Net(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, self.num_outputs))


def test_in_a_notebook_the_same_rules_hold() -> None:
    with pytest.raises(ConfigError, match=r"model\.mixup=true mixes class probabilities"):
        Net(task="regression", mixup=True)
    assert Net(compile=True).step.setting.compile is True
    with pytest.raises(ConfigError, match="did you mean mixup"):
        Net(mixupp=True)


def operations(step: Step, x: Tensor, target: Tensor, net: nn.Module) -> int:
    """Operations of the compiled forward pass and loss; fails on a graph break."""
    counts: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        counts.append(sum(n.op in ("call_function", "call_method") for n in graph.graph.nodes))
        return graph.forward

    def forward(step: Step, x: Tensor, target: Tensor) -> Tensor:
        logits = net(x)
        loss = step.criterion(logits, target)
        for term in step.loss:
            loss = term(loss, logits, Batch(x, target, target))
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(partial(forward, step), backend=count, fullgraph=True)
    torch.testing.assert_close(compiled(x, target), forward(step, x, target))
    (only,) = counts
    return only


def test_the_compiled_step_of_what_is_off_has_no_operation_more() -> None:
    net, x, target = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    plain = operations(Step(criterion=assembled(DIGITS).criterion), x, target, net)
    assert operations(assembled(DIGITS, mixup=True, sam=True, ema_decay=0.9), x, target, net) == plain


# Seams


def test_a_seam_mixes_the_features_of_its_place_and_leaves_the_others() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, partner = torch.randn(6, 4).double(), torch.randperm(6)
    plain = network(x)
    seams = insert_seams(network, 2)
    assert len(seams) == 3
    for place in range(3):
        for number, seam in enumerate(seams):
            seam.set(0.7 if number == place else 1.0, partner)
        h = x
        for number, part in enumerate(network):
            if (place, number) in ((0, 0), (1, 1), (2, 3)):
                h = 0.7 * h + 0.3 * h[partner]
            h = nn.functional.linear(h, part.weight, part.bias) if isinstance(part, nn.Linear) else h.tanh()
        torch.testing.assert_close(network(x), h)
    for seam in seams:
        seam.set(1.0, partner)
    assert torch.equal(network(x), plain), "weight 1 leaves the features bit by bit"
    seams[0].set(0.5, partner)
    assert torch.equal(network.eval()(x), plain), "nothing in evaluation"


@pytest.mark.parametrize(
    ("typed", "places"),
    [
        ("resnet", "layer1 layer2"),
        ("preact_resnet model._target_=models.preact_resnet.PreActResNet18", "blocks.1 blocks.3"),
        ("wide_resnet model.depth=28", "blocks.3 blocks.7"),
        ("pyramidnet model.depth=110", "blocks.17 blocks.35"),
        ("laptop model.type=M", "blocks.0 blocks.1"),
        ("vgg model._target_=models.dynamic_vgg.VGG16", "features.6 features.13"),
        ("vgg model._target_=models.dynamic_vgg.VGG16 model.strided=true", "features.5 features.14"),
        ("preact_resnet model._target_=models.preact_resnet.PreActResNet18 model.blur_pool=true", "blocks.1 blocks.3"),
        ("vgg model._target_=models.dynamic_vgg.VGG16 model.blur_pool=true", "features.6 features.13"),
        ("oct_resnet", "layer1 layer2"),
        ("regnet", "s1 s2"),
        ("convnext model.type=atto", "stages.0 stages.1"),
        ("efficientnetv2 model.type=B0", "blocks.0 blocks.1"),
        ("timm model.type=mobilenetv3_small_100", "blocks.0 blocks.1"),
        ("timm model.type=vit_tiny_patch16_224", "blocks.0 blocks.1"),
        ("timm model.type=xcit_nano_12_p16_224", "patch_embed blocks.0"),
        ("timm model.type=densenet121", "features.denseblock1 features.denseblock2"),
        ("timm model.type=cspresnet50", "stages.0 stages.1"),
    ],
)  # fmt: skip
def test_manifold_mixup_mixes_at_the_ends_of_the_first_stages(typed: str, places: str) -> None:
    family, *options = typed.split()
    model = build_on_meta(small(family, "model.manifold_mixup=true", *options))
    assert [seam.place for seam in model.step.inside[0].seams] == ["input", *places.split()]  # type: ignore[attr-defined]


def test_a_stage_of_two_octaves_is_mixed_in_both() -> None:
    class Octaves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x[:, :, ::2]

    network = nn.Sequential(nn.Sequential(nn.Conv1d(3, 4, 1), Octaves()), nn.Conv1d(4, 2, 1))
    _, seam = insert_seams(network, 1)
    x, partner = torch.randn(6, 3, 4), torch.randperm(6)
    seam.set(0.5, partner)
    plain = network[0].eval()(x)
    network[0].train()
    for mixed, whole in zip(network[0](x), plain, strict=True):
        torch.testing.assert_close(mixed, (whole + whole[partner]) / 2)


def test_one_graph_serves_every_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    seams = insert_seams(network, 2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 4)
    for place in range(3):
        for number, seam in enumerate(seams):
            seam.set(0.6 if number == place else 1.0, torch.randperm(6))
        torch.testing.assert_close(compiled(x), network(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_manifold_mixup_mixes_targets_as_features_and_draws_its_layer_on_the_host() -> None:
    step = assembled(DIGITS, manifold_mixup=True)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    for change in step.network:
        change(network)
    (stage,) = step.batch
    seams = stage.change.seams  # type: ignore[attr-defined]
    places = set()
    for key in range(60):
        batch = stage.change(Batch(torch.randn(8, 4), torch.arange(8) % 3, torch.arange(8)), key)
        mixed = [n for n, seam in enumerate(seams) if float(seam.weight) < 1]
        assert len(mixed) == 1
        places.add(mixed[0])
        weight = seams[mixed[0]].weight
        assert float(weight) >= 0.5 and torch.allclose(batch.target.sum(1), torch.ones(8))
        own = torch.eye(3)[torch.arange(8) % 3]
        torch.testing.assert_close(batch.target, weight * own + (1 - weight) * own[seams[0].partner])
    assert places == {0, 1, 2}


@pytest.mark.parametrize("other", [{"mixup": True}, {"cutmix_alpha": 1.0}])
def test_manifold_mixup_does_not_go_with_another_mixing(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.manifold_mixup=true .* does not go with model\.mixup"):
        assembled(DIGITS, manifold_mixup=True, **other)
