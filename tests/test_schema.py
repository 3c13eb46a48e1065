"""The schemas of the configuration files: what stands there is valid, and a slip is found at its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from omegaconf._utils import get_yaml_loader  # of numbers such as 1e-3, which plain YAML 1.1 takes for texts

from docs import schema

CONFIGS = ROOT / "cli_configs"
MINE = """
from dataclasses import dataclass
from typing import Annotated

from crucible.technique import Technique


@dataclass(frozen=True)
class Mine(Technique):
    \"\"\"A technique of one's own.\"\"\"

    mine: Annotated[float, "[0, 1]", "how much of it"] = 0.0
"""


@pytest.fixture(scope="module")
def written() -> dict[str, schema.Schema]:
    return {name: json.loads((ROOT / "docs" / name).read_text()) for name in schema.FILES}


def faults(schemas: dict[str, schema.Schema], text: str, group: str = "") -> dict[int, str]:
    """What an editor would underline: messages by the line, from 1."""
    jsonschema = pytest.importorskip("jsonschema")
    whole, of_model = (schemas[name] for name in schema.FILES)
    chosen = of_model if group == "model" and "@package _global_" not in text else whole
    loader: Any = get_yaml_loader()
    tree, found = yaml.compose(text, Loader=loader), {}
    for error in jsonschema.Draft7Validator(chosen).iter_errors(yaml.load(text, Loader=loader)):
        node, mark = tree, tree.start_mark
        for step in error.absolute_path:
            pairs = node.value
            key, node = next((k, v) for k, v in pairs if k.value == str(step)) if isinstance(step, str) else (
                pairs[step], pairs[step])  # fmt: skip
            mark = key.start_mark
        if error.validator == "additionalProperties":
            wrong = [key for key, _ in node.value if f"'{key.value}'" in error.message]
            mark = wrong[0].start_mark
        found[mark.line + 1] = error.message
    return found


def test_the_schemas_are_the_generated_ones(written: dict[str, schema.Schema]) -> None:
    assert {n: json.loads(schema.as_text(s)) for n, s in schema.schemas().items()} == written, (
        "run python -m docs.generate"
    )


def test_every_configuration_file_is_valid(written: dict[str, schema.Schema]) -> None:
    files = sorted(CONFIGS.rglob("*.yaml"))
    wrong = {
        str(file.relative_to(CONFIGS)): found
        for file in files
        if (found := faults(written, file.read_text(), file.relative_to(CONFIGS).parts[0]))
    }
    assert len(files) > 150 and not wrong


@pytest.mark.parametrize(
    ("group", "name", "right", "wrong"),
    [
        ("technique", "mixup", "  mixup_alpha: 0.2", "  mixup_alhpa: 0.2"),
        ("technique", "powergrad", "  powergrad_alpha: 0.3", "  powergrad_alpha: 1.5"),
        ("", "train", "  accelerator: auto", "  accelerator: gppu"),
        ("", "train", "  max_epochs: 10", "  max_epochs: ten"),
        ("", "train", "fresh: false", "fresh: 3"),
        ("", "train", "  optimizer: SGD ", "  optimizer: 3 "),
        ("model", "resnet", "_target_: models.dynamic_resnet.ResNet18", "depht: 18"),
        ("data", "digits", "    batch_size: 32", "    batch_size: 0"),
        ("technique", "early_stopping", "    patience:", "    patiense:"),
        ("recipe", "cifar_200", "trainer:", "trianer:"),
    ],
)
def test_a_slip_is_found_at_its_line(
    written: dict[str, schema.Schema], group: str, name: str, right: str, wrong: str
) -> None:
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    (line,) = [n for n, each in enumerate(text.splitlines(), 1) if each.startswith(right)]
    assert list(faults(written, text.replace(f"\n{right}", f"\n{wrong}"), group)) == [line]


def test_an_interpolation_may_stand_anywhere(written: dict[str, schema.Schema]) -> None:
    text = (
        "fresh: ${oc.env:FRESH}\ntrainer: {max_epochs: '${epochs}', devices: '???'}\nmodel: {lr: '${lr}'}\n"
    )
    assert not faults(written, text)
    assert faults(written, text.replace("${lr}", "$lr"))


def test_options_say_what_they_mean_and_what_they_are_without(written: dict[str, schema.Schema]) -> None:
    model = written["schema.json"]["properties"]["model"]["properties"]
    assert model["lr"]["default"] == 0.02 and "learning rate" in model["lr"]["description"]
    assert model["lr"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0}
    assert {"enum": ["CosineAnneal", "MultiStep", "Step", "Plateau"]} in model["scheduler"]["anyOf"]
    root = written["schema.json"]["properties"]
    assert root["on_nonfinite"]["default"] == "stop" and "rollback" in root["on_nonfinite"]["description"]
    assert "last good state" in root["on_nonfinite"]["description"], "the lines that go on with it too"
    silent = [
        name
        for name, option in root["trainer"]["properties"].items()
        if name.startswith("log_") and not option
    ]
    assert not silent


def test_a_folder_of_ones_own_is_taken_in(tmp_path: Path) -> None:
    (tmp_path / "technique").mkdir()
    (tmp_path / "technique_that_is_mine.py").write_text(MINE)
    text = "# @package _global_\nmodel:\n  stages: {mine: technique_that_is_mine.Mine}\n  mine: 0.5\n"
    (tmp_path / "technique" / "mine.yaml").write_text(text)
    both = schema.schemas(tmp_path)
    assert both["schema_model.json"]["properties"]["mine"]["description"] == "how much of it"
    assert not faults(both, text) and list(faults(both, text.replace("0.5", "2"))) == [4]
