"""What every network of cli_configs/model can do, whoever wrote it."""

from __future__ import annotations

import copy
import re
from importlib import import_module
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, nightly
from hydra.utils import get_class
from small_models import FAMILIES, SIZE, small
from torch import Tensor, nn

from crucible.configuration import spell_out
from crucible.options import ConfigError, signature_options
from lab.build import build_model
from lab.summary import build_on_meta, check_input, input_shape
from models.base_model import BaseModel
from norms import convert_norm

VARIANTS = [
    ("mobilenet", "model.type=v1"),
    ("regnet", "model.type=X-0.2GF"),
    ("timm", "model.type=test_vit", "+model.timm_kwargs.img_size=32"),
]
CASES = [(family,) for family in FAMILIES] + VARIANTS


def named(case: tuple[str, ...]) -> str:
    return " ".join(case).replace("model.", "")


def _checked_by_its_own_tests(family: str) -> bool:
    """Whether the family's test file runs NetworkChecks, which are those that are marked `others` here, and more."""
    name = {"resnet": "dynamic_resnet", "vgg": "dynamic_vgg"}.get(family, family)
    file = ROOT / "tests" / "models" / f"test_{name}.py"
    return file.is_file() and "(NetworkChecks)" in file.read_text()


OTHERS = [case for case in CASES if not _checked_by_its_own_tests(case[0])]
others = pytest.mark.parametrize("case", OTHERS, indirect=True, ids=named, scope="module")
# built by timm: of its convolutional networks one is compiled in CI
LIKE_ANOTHER = [case for case in OTHERS if case[0] in ("ghostnet", "mobilenet", "regnet", "resnest")][1:]
compiled = pytest.mark.parametrize(
    "case", [nightly(case)[0] if case in LIKE_ANOTHER else case for case in OTHERS], indirect=True, ids=named,
    scope="module",
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=named)
def case(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


@pytest.fixture(scope="module")
def built(case: tuple[str, ...]) -> BaseModel:
    return build_model(small(*case))


@pytest.fixture
def model(built: BaseModel) -> BaseModel:
    return copy.deepcopy(built)


def images(count: int = 4, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, SIZE, SIZE, generator=generator)


def step(model: BaseModel, x: Tensor) -> Tensor:
    """The loss of a training step, after its backward pass."""
    model.train()
    loss = model.criterion(model.outputs(x), torch.arange(len(x)) % model.num_classes)
    loss.backward()
    return loss.detach()


def calibrated(network: nn.Module) -> nn.Module:
    """In evaluation, with norm statistics that fit the images: else deep networks' outputs overflow or vanish."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(images(16))
    return network.eval()


def test_a_training_step_reaches_every_parameter(model: BaseModel) -> None:
    assert torch.isfinite(step(model, images()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@others
def test_in_evaluation_each_sample_is_on_its_own(model: BaseModel) -> None:
    network, x = calibrated(model.model), images()
    with torch.no_grad():
        together = network(x)
        alone = torch.cat([network(sample[None]) for sample in x])
    assert together.shape == (4, 10)
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)


@others
@pytest.mark.slow
def test_channels_last_changes_the_layout_only(model: BaseModel) -> None:
    network = calibrated(model.model)
    with torch.no_grad():
        plain = network(images())
        network.to(memory_format=torch.channels_last)
        other = network(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4)


@others
def test_it_trains_in_bfloat16(model: BaseModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(model, images())
    assert torch.isfinite(loss)
    assert all(p.dtype is torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["online", *nightly("group")])
@others
def test_another_norm_trains_or_is_refused(norm: str, model: BaseModel) -> None:
    try:
        model.model = convert_norm(model.model, norm, **({"num_groups": 2} if norm == "group" else {}))
    except ConfigError as error:
        assert str(error).startswith("model.norm")
        return
    assert torch.isfinite(step(model, images()))
    assert torch.isfinite(model.eval()(images(1))).all()


@others
@pytest.mark.slow
def test_the_state_dict_is_all_there_is(case: tuple[str, ...], model: BaseModel) -> None:
    other = build_model(small(*case))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        expected, before = model.model.eval()(images(2)), other.model.eval()(images(2))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.model(images(2)), expected) and not torch.equal(before, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "outputs"),
    [
        (("data.num_classes=7", "data.input_channels=1"), (2, 7)),
        (("data.task=regression", "metrics=[mse]", "data.num_classes=1", "data.input_channels=5"), (2,)),
    ],
    ids=["7 classes, grey", "regression, 5 channels"],
)
def test_it_fits_the_data(case: tuple[str, ...], overrides: tuple[str, ...], outputs: Any) -> None:
    config = small(*case, *overrides)
    batch = torch.empty(input_shape(config, batch=2), device="meta")
    assert build_on_meta(config).outputs(batch).shape == outputs


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *nightly(4, 8), SIZE])
def test_input_too_small_is_refused_in_one_line(size: int, case: tuple[str, ...], model: BaseModel) -> None:
    config = small(*case, f"data.input_size={size}")
    try:
        copy.deepcopy(model).train()(torch.zeros(2, 3, size, size))
    except ConfigError as refused:  # by the network itself, which knows what it needs
        with pytest.raises(ConfigError, match=re.escape(str(refused))):
            check_input(model, config)
    except (RuntimeError, ValueError, AssertionError):
        with pytest.raises(ConfigError, match=rf"^data\.input_size={size}: .* 3x{size}x{size} \(.+\)$"):
            check_input(model, config)
    else:
        check_input(model, config)


@compiled
@pytest.mark.slow
def test_it_compiles_whole(model: BaseModel) -> None:
    torch._dynamo.reset()
    network = model.model.train()
    torch.manual_seed(0)
    expected = copy.deepcopy(network)(images())
    network.compile(fullgraph=True, backend="eager")
    torch.manual_seed(0)
    torch.testing.assert_close(network(images()), expected)
    assert not any("_orig_mod" in key for key in network.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_its_file_says_what_it_is_and_how_to_run_it(family: str) -> None:
    header = [
        line
        for line in (ROOT / "cli_configs" / "model" / f"{family}.yaml").read_text().splitlines()
        if line.startswith("#")
    ]
    text = " ".join(header)
    assert "arXiv" in text or "github.com" in text
    assert "Typical" in text
    assert any(line.startswith(f"# Command: python main.py model={family} ") for line in header)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_file_states_each_of_its_options_with_its_default(family: str) -> None:
    stated = yaml.safe_load((ROOT / "cli_configs" / "model" / f"{family}.yaml").read_text())
    spell_out(stated)
    options = signature_options(get_class(stated.pop("_target_")))
    own = {n: default for n, (_, default) in options.items() if n not in signature_options(BaseModel)}
    in_the_file = {"cifar_size": None, "timm_kwargs": {}}  # resolved by the input's size; mutable
    own |= {n: value for n, value in in_the_file.items() if n in own}
    assert set(stated) <= set(options)
    assert {n: stated[n] for n in own} == own


SHORT = {
    "resnet": ("depth", "models.dynamic_resnet.ResNet{}", (18, 34, 50, 101, 152)),
    "preact_resnet": ("depth", "models.preact_resnet.PreActResNet{}", (18, 34, 50, 101, 152)),
    "se_resnet": ("depth", "models.se_resnet.SEResNet{}", (18, 34, 50, 101, 152)),
    "oct_resnet": ("depth", "models.oct_resnet.OctResNet{}", (18, 34, 50, 101, 152)),
    "resnext": ("depth", "models.resnext.ResNeXt{}", (50, 101)),
    "lip_resnet": ("depth", "models.lip_resnet.LIPResNet{}", (50, 101)),
    "deformable_resnet": ("depth", "models.deformable_resnet.DeformableResNet{}", (18, 50, 101)),
    "resnet18_wobn": ("depth", "models.fixup_resnet.ResNet{}WithoutNorm", (18, 34)),
    "vgg": ("depth", "models.dynamic_vgg.VGG{}", (16, 19)),
    "pyramidnet": ("type", "models.pyramidnet.PyramidNet{}", (110, 272)),
}
IN_ONE_OPTION = {"cifar_resnet", "wide_resnet"}  # of their own `depth`, and timm's families by `type`


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, Any]]:
    """The options of each family's file."""
    return {f: yaml.safe_load((ROOT / "cli_configs" / "model" / f"{f}.yaml").read_text()) for f in FAMILIES}


@pytest.mark.parametrize("family", SHORT)
def test_a_short_name_is_another_spelling_of_the_target(family: str, files: dict[str, Any]) -> None:
    option, path, values = SHORT[family]
    for value in values:
        short, long = {**files[family], option: value}, {**files[family], "_target_": path.format(value)}
        spell_out(short)
        spell_out(long)
        assert short == long
        assert get_class(short["_target_"]).short == {option: value}
    with pytest.raises(ConfigError, match=rf"model.{option}=7: models.\w+ has {values[0]}, "):
        spell_out({**files[family], option: 7})
    with pytest.raises(ConfigError, match=rf"model.{option}=\[18\]: "):
        spell_out({**files[family], option: [18]})


def test_every_variant_of_every_family_is_named_by_one_option(files: dict[str, Any]) -> None:
    for family, options in files.items():
        by_type = options.get("type") is not None
        assert (family in SHORT) + (family in IN_ONE_OPTION) + by_type == 1, family
        if family in SHORT:
            module = get_class(options["_target_"]).__module__
            classes = {
                n for n, c in vars(import_module(module)).items() if getattr(c, "__module__", "") == module
            }
            _, path, values = SHORT[family]
            variants = {path.format(value).rpartition(".")[2] for value in values}
            named_ones = {n for n in classes if "short" in vars(vars(import_module(module))[n])}
            assert named_ones == variants


def test_what_was_typed_wins_over_the_other_spelling_of_a_file(files: dict[str, Any]) -> None:
    """A recipe's `_target_` yields to a short name; a typed `_target_` to nothing, and both at once must agree."""
    mine = {"_target_": "models.dynamic_resnet.ResNet101", "depth": 50}
    from_a_file = dict(mine)
    spell_out(from_a_file, ["model.depth=50"])
    assert from_a_file == {"_target_": "models.dynamic_resnet.ResNet50"}
    typed = dict(mine)
    spell_out(typed, ["model._target_=models.dynamic_resnet.ResNet101"])
    assert typed == {"_target_": "models.dynamic_resnet.ResNet101"}
    with pytest.raises(
        ConfigError, match=r"model.depth=50 is models.dynamic_resnet.ResNet50, and model._target_="
    ):
        spell_out(dict(mine), ["model.depth=50", "model._target_=models.dynamic_resnet.ResNet101"])


def test_a_network_of_ones_own_keeps_its_own_options(files: dict[str, Any]) -> None:
    own = {**files["resnet"], "_target_": "small_models.SmallResNet"}
    spell_out(own)
    assert own["_target_"] == "small_models.SmallResNet" and "depth" not in own
    asked = {**own, "depth": 50}
    spell_out(asked)
    assert asked["depth"] == 50, "which the check refuses: the class has no such option"
    pyramid = {**files["pyramidnet"], "depth": 29}
    spell_out(pyramid)
    assert pyramid["depth"] == 29, "its own option"
