"""The benchmarks that nobody can run here, on a GPU or with other versions, do run: at their smallest, and in part."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))
import gpu
import versions

PARTS = ("precision", "loader")  # those that measure in this process and are quick


def run_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out), *arguments])
    gpu.main()
    return out.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_benchmark_runs_in_pieces_that_complete_one_page(monkeypatch, tmp_path):
    for i in range(8):
        folder = tmp_path / "photographs" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text("of whom and where")
        noise = np.random.default_rng(i).integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg")
    out = tmp_path / "gpu.md"
    first = run_gpu(monkeypatch, out, "--only", "precision")
    assert "| bf16, once | " in first
    page = run_gpu(monkeypatch, out, "--only", "loader", "--photographs", str(tmp_path / "photographs"))
    assert page.index(gpu.PARTS["loader"][0]) < page.index(gpu.PARTS["precision"][0])
    assert first.partition("\n## ")[2] in page
    ratios = [
        line
        for line in page.splitlines()
        if line.startswith(("| a small ResNet", "| ResNet-50 on photographs"))
    ]
    assert len(ratios) == 2
    assert all(float(line.split("|")[2]) > 0 for line in ratios)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, tmp_path):
    page = run_gpu(monkeypatch, tmp_path / "gpu.md", "--peak", "0.1")
    assert all(f"## {title}\n" in page for title, _ in gpu.PARTS.values())
    assert page.count("- Date: ") == len(gpu.PARTS)
    assert "50% after" in page


def test_a_part_of_the_page_takes_the_place_of_the_one_before():
    titles = [title for title, _ in gpu.PARTS.values()]
    page = ""
    for title, line in ((titles[2], "old"), (titles[0], "first"), (titles[2], "new")):
        page = gpu.completed(page, title, [line])
    assert page == f"# On a GPU\n\n## {titles[0]}\n\nfirst\n\n## {titles[2]}\n\nnew\n"


def test_a_gpus_peak_is_that_of_its_longest_name():
    def peak(device: str) -> int:
        return next(value for name, value in gpu.PEAKS.items() if name in device)

    assert peak("NVIDIA H100 PCIe") < peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200")
    assert peak("NVIDIA L40S") > peak("NVIDIA L4")
    assert peak("NVIDIA A100-SXM4-80GB") > peak("NVIDIA A10")


def test_the_operations_of_a_picture_are_those_of_its_network(tmp_path):
    config = gpu.composed(None, 1, tmp_path, workload="resnet18")
    assert gpu.flops_of_a_picture(config, 32) == pytest.approx(
        3 * 2 * 0.556e9, rel=0.02
    )  # 556M multiply-adds


# Versions


def table(*lines: str) -> str:
    shown = dict.fromkeys(versions.SHOWN, "1.0")
    rows, failures = [], []
    for line in lines:
        python, end, tests, *failed = line.split()
        found = versions.Outcome(5, 1, failed)
        rows.append(versions.row(python, end, shown, found, 60.0, tests))
        failures += [f"- {python} | {end} | {tests} | `{name}`" for name in failed]
    return versions.merged("", rows, failures)


def test_a_row_of_the_versions_takes_the_place_of_the_one_of_its_python_end_and_tests():
    before = table("3.13 lowest suite a::b", "3.11 highest suite c::d", "3.13 lowest tests/norms e::f")
    new = versions.row(
        "3.13", "lowest", dict.fromkeys(versions.SHOWN, "1.0"), versions.Outcome(7, 0, []), 60.0, "suite"
    )
    after = versions.merged(before, [new], [])
    assert before.count("| 3.1") == after.count("| 3.1") == 3
    assert "a::b" in before
    assert "a::b" not in after
    assert {"c::d", "e::f"} <= set(after.replace("`", " ").split())
    assert new in after.splitlines()
    assert "Nothing failed." in versions.merged(table("3.11 lowest suite"), [], [])


def test_what_failed_is_read_from_the_report_of_pytest(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_a" name="fine"/>'
        '<testcase classname="tests.test_a" name="wrong"><failure/></testcase>'
        '<testcase classname="tests.test_b" name="broken"><error/></testcase>'
        '<testcase classname="tests.test_b" name="later"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert versions.outcome(report) == versions.Outcome(1, 1, ["tests/test_a::wrong", "tests/test_b::broken"])


def test_this_python_is_found_by_its_version():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert versions.find_python(version) is not None
    assert versions.find_python("3.99") is None
