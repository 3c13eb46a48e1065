"""The report's pages: one HTML file, Markdown with its plots, and the records they are made from."""

from __future__ import annotations

import csv
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

import report
from benchmarks.report_speed import write_runs
from reporting import plots
from reporting.records import parse_config

EFFECTS = {"baseline": 0.0, "cutmix": 0.02, "mixup": 0.012, "cutmix+mixup": 0.035, "a<b|c": -0.02}
VOID = {"meta", "link", "br", "wbr", "path", "use", "rect"}
FIGURES = ("differences", "runs", "time", "curves_val", "curves_loss", "logits", "calibration")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    write_runs(root, EFFECTS, range(4), epochs=25, images=2000, time_ratios={"cutmix": 1.3})
    (root / "cifar10" / "00000009-s0").mkdir()
    for name, text in (
        ("config.yaml", "seed: 0\n"),
        ("summary.json", '{"status": "failed", "reason": "no <memory>"}'),
    ):
        (root / "cifar10" / "00000009-s0" / name).write_text(text)
    assert report.main([f"runs={root}"]) == 0
    return root / "report"


class Page(HTMLParser):
    """Elements, text and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[tuple[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and "data-key" in dict(attrs):
            self.rows[-1].append((dict(attrs)["data-key"] or "", ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "tbody"} <= set(self.open) or {"th", "tbody"} <= set(self.open):
            key, shown = self.rows[-1][-1]
            self.rows[-1][-1] = (key, shown + data)


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_html_is_whole_and_needs_nothing_from_elsewhere(page):
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            link = attributes.get(name) or "#"
            assert link.startswith(("#", "data:")), f"<{tag} {name}={link}>"
    text = "".join(page.words)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_the_html_follows_the_readers_theme_and_the_width_of_the_screen(page):
    text = "".join(page.words)
    assert "prefers-color-scheme:dark" in text and "currentColor" in str(page.elements)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert text.count("overflow-x:auto") >= 2, "wide tables scroll on their own"


def test_all_figures_are_in_the_html_and_in_files(folder, page):
    labels = [a.get("aria-label") for tag, a in page.elements if tag == "svg"]
    assert len(labels) == len(FIGURES) and all(labels)
    for name in FIGURES:
        with Image.open(folder / "plots" / f"cifar10-{name}.png") as picture:
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 8, f"{name} is empty"


def test_the_references_inside_the_figures_lead_somewhere(page):
    ids = Counter(a["id"] for _, a in page.elements if a.get("id"))
    used = {a["xlink:href"][1:] for _, a in page.elements if a.get("xlink:href")}
    used |= set(re.findall(r"url\(#(\w+)\)", str(page.elements)))
    assert used and used <= set(ids)


def test_every_column_of_numbers_can_be_sorted_as_numbers(page):
    heads = [a for tag, a in page.elements if tag == "th" and "aria-sort" in a]
    assert heads and all(a["aria-sort"] == "none" for a in heads)
    rows = [row for row in page.rows if row and row[0][1] == "cutmix"]
    keys = {shown: key for row in rows for key, shown in row}
    for shown, key in keys.items():
        if re.fullmatch(r"[+-]\d+\.\d+", shown):
            assert float(key) == pytest.approx(float(shown), abs=0.006)


def test_names_cannot_break_the_pages(folder, page):
    assert "a<b|c" in {shown for row in page.rows for _, shown in row}
    tables = re.findall(r"(?:^\|.*\|\n)+", (folder / "report.md").read_text(), flags=re.MULTILINE)
    assert tables
    for table in tables:
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table


def test_the_markdown_links_to_its_plots(folder):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (folder / "report.md").read_text())
    assert len(links) == len(FIGURES) and all((folder / link).is_file() for link in links)


def of_its_data(table) -> list[plots.Plot]:
    return [plots.Plot("runs", "Runs", "", table.data.encode(), "<svg></svg>")]


def test_settings_of_any_name_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("reporting.plots.draw_forest", lambda found: None)
    monkeypatch.setattr("reporting.plots.draw_all", of_its_data)
    write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.01}, range(3), data="d0", epochs=3, images=0)
    long = f"digits, betas=[{', '.join(map(str, range(100)))}]"
    names = ["digits", long, f"{long}1", "k=[1,2]", "k=[1 2]", "lr=0.1", "lr 0.1", "ш" * 120, "ш" * 121]
    for number, name in enumerate(names):
        place = shutil.copytree(tmp_path / "d0", tmp_path / f"{number}")
        for file in place.glob("*/config.yaml"):
            config = yaml.safe_load(file.read_text())
            config["data"]["module"]["name"] = name
            file.write_text(yaml.safe_dump(config))
    shutil.rmtree(tmp_path / "d0")
    assert report.main([f"runs={tmp_path}"]) == 0
    files = {file.name: file.read_bytes().decode() for file in (tmp_path / "report/plots").iterdir()}
    assert sorted(files.values()) == sorted(names), "a file each, and nothing beside them"
    assert files["digits-runs.png"] == "digits", "a name that is clean stays"
    assert max(len(name.encode()) for name in files) < 120
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (tmp_path / "report/report.md").read_text())
    assert {Path(link).name for link in links} == files.keys()


def test_data_of_any_script_have_plots_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("reporting.plots.draw_all", of_its_data)
    names = ("данные", "картинки")
    for data in names:
        write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.01}, range(3), data=data, epochs=3, images=0)
    assert report.main([f"runs={tmp_path}"]) == 0
    for name in names:
        assert (tmp_path / "report" / "plots" / f"{name}-runs.png").read_bytes() == name.encode()
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"plots/{name}-runs.png" in text for name in names)


def test_the_numbers_are_those_of_the_records(folder):
    with (folder / "results.csv").open(newline="") as stream:
        rows = {row["arm"]: row for row in csv.DictReader(stream)}
    right = {
        arm: np.stack([_bits(folder.parent / "cifar10" / f"{a:08x}-s{seed}") for seed in range(4)])
        for a, arm in enumerate(EFFECTS)
    }
    base, cutmix = right["baseline"], right["cutmix"]
    reference = stats.ttest_rel(cutmix.mean(axis=1), base.mean(axis=1))
    row = {name: float(rows["cutmix"][name]) for name in ("p", "low", "high", "images_low", "images_high")}
    assert [row["p"], row["low"], row["high"]] == pytest.approx(
        [reference.pvalue, *reference.confidence_interval()], rel=1e-10
    )
    assert row["images_high"] - row["images_low"] > row["high"] - row["low"]
    assert float(rows["baseline"]["noise_floor"]) == pytest.approx(np.sqrt((1 - base.mean()) / 4000))
    assert rows["cutmix"]["verdict"].startswith("helps")


def _bits(run: Path) -> np.ndarray:
    with np.load(run / "test_correct.npz") as record:
        return np.unpackbits(record["correct"], count=int(record["count"]))


def test_two_that_add_up_and_runs_that_failed_are_on_both_pages(folder, page):
    for text in ((folder / "report.md").read_text().replace("&lt;", "<"), "".join(page.words)):
        assert "cutmix+mixup" in text and "adds up within" in text
        assert "Noise floor: 2000 test images" in text
        assert "no <memory>" in text


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("reporting.plots.draw_all", lambda table: [])


def test_correctness_of_other_weights_is_noticed_and_not_used(tmp_path, no_plots):
    write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.02}, range(3), epochs=2, images=500)
    summary = tmp_path / "cifar10" / "00000001-s1" / "summary.json"
    summary.write_text(re.sub(r'"test/acc": [\d.]+', '"test/acc": 0.5', summary.read_text()))
    assert report.main([f"runs={tmp_path}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "mixup, seed 1: test_correct.npz is of other weights" in text
    assert "new images" not in text.split("### Against")[1].splitlines()[2]


def test_one_pair_is_compared_by_image_and_says_what_that_means(tmp_path, no_plots):
    write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.02}, [0], epochs=2, images=500)
    assert report.main([f"runs={tmp_path}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(
        r"mixup: McNemar's p is 0\.\d+: whether these two networks differ, not whether the technique", text
    )
    assert re.search(r"One difference between two runs is known to at best ±\d", text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n  c: [1, 2]\n  d:\n  - x\n  - y: 2\ne: {}\n",
        "a: &id001\n- 1\nb: *id001\n",
        "k: 'quoted: text\n\n  in lines'\nl: \"#no comment\"\nm:\n  'n o': 1\n",
        "# a comment\na:\n  b: 1  # another\n\n  c: |\n    text: not a key\n    more\nd: ~\n",
        "- a list\n- of two\n",
        "",
    ],
)
def test_configurations_are_read_as_yaml_reads_them(text):
    assert parse_config(text) == yaml.safe_load(text)
