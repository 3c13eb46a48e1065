"""What the documentation says is what the code does."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import ROOT
from technique_runs import refused_on_the_page
from test_floors import FLOORS

from crucible.configuration import select
from docs import findings_page
from docs.generate import PAGE, TRAIN, refused_pairs, techniques_page, with_options_block

TECHNIQUES = sorted((ROOT / "cli_configs" / "technique").glob("*.yaml"))


@pytest.mark.slow
def test_the_table_of_techniques_is_the_generated_one() -> None:
    assert PAGE.read_text() == techniques_page(), "run python -m docs.generate"
    read, refused = refused_on_the_page(), refused_pairs()  # what the tests read is what is
    assert read.keys() == refused.keys() and all(read[pair] in refused[pair] for pair in refused)


@pytest.mark.parametrize("file", TECHNIQUES, ids=lambda f: f.stem)
def test_a_technique_records_what_it_sets_under_its_own_name(file) -> None:
    text = file.read_text()
    assert text.startswith("# @package _global_\n# ")
    assert f"technique={file.stem}" in text, "the header shows the command"
    content = yaml.safe_load(text)
    assert list(content["techniques"]) == [file.stem]
    for name, value in content["techniques"][file.stem].items():
        assert select(content, name) == value, name


@pytest.mark.parametrize("group", ["model", "data", "technique", "recipe", "env", "debug"])
def test_the_readme_names_every_choice_of_a_group(group: str) -> None:
    """Of recipes the families; docs/reproducing.md names every one."""
    readme = (ROOT / "README.md").read_text()
    for choice in (ROOT / "cli_configs" / group).iterdir():
        name = f"{choice.name}/" if choice.is_dir() else rf"{choice.stem}\b"
        assert re.search(rf"\b{name}", readme), f"{group}={name}"


def test_the_options_in_train_yaml_are_the_generated_ones() -> None:
    text = TRAIN.read_text()
    assert text == with_options_block(text), "run python -m docs.generate"


def test_the_findings_are_what_the_records_say() -> None:
    """Every verdict of `until=decided` is a replay of the runs in the tree."""
    assert findings_page.PAGE.read_text() == findings_page.findings_page(), "run python -m docs.generate"


def test_the_records_of_the_findings_name_no_folder_of_a_machine_and_stay_small() -> None:
    kept = (".json", ".yaml", ".csv", ".npz")  # what else lies there is not committed
    files = [file for file in findings_page.RUNS.rglob("*") if file.suffix in kept]
    absolute = re.compile(rb"[\"' ]/[a-z]")
    assert not [file for file in files if file.suffix != ".npz" and absolute.search(file.read_bytes())]
    assert sum(file.stat().st_size for file in files) < 5_000_000


def test_the_page_of_the_architecture_names_what_there_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:[\w]+/)+(?:[\w.]+)?)`", page)) | set(re.findall(r"\[(\w+/\w+\.py)", page))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_floors_on_the_page_are_those_that_are_kept() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Floors")[1].split("## ")[0]
    rows = [
        tuple(re.findall(r"`([\w.]+)`", line.split("|")[1]))
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    assert [set(row) for row in reversed(rows)] == [set(floor) for floor in FLOORS]


def test_the_dockerfile_installs_by_the_readmes_command() -> None:
    readme, dockerfile = ((ROOT / name).read_text() for name in ("README.md", "Dockerfile"))
    install = next(
        line.strip() for line in readme.splitlines() if line.startswith("    python3 -m venv")
    ).rsplit(" && ", 1)[0]
    assert f"RUN {install}\n" in dockerfile
    assert 'ENTRYPOINT ["python", "main.py"]' in dockerfile


def test_every_page_is_on_the_index_and_links_lead_somewhere() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in link or link.startswith("mailto:") or (page.parent / link).exists(), (
                f"{page.name}: {link}"
            )
