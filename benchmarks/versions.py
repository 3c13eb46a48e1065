"""Do the tests pass at the ends of what pyproject.toml allows? The quick suite in an environment of the lowest versions
of all direct dependencies and in one of the highest, on each Python that this machine has.

    python benchmarks/versions.py --out benchmarks/results/versions.md
    python benchmarks/versions.py --pythons 3.13 --ends lowest --folder KEPT --out FILE -- tests/norms -k compiled

Each environment is made by uv, which knows how to resolve downwards (a copy of its own is installed), from wheels, but
for two small packages of Python code that have none. What lies in --folder is kept and used again. Rows of FILE that
this call does not make stay. For the nights: an environment is gigabytes, a suite minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
ENDS = {"lowest": "lowest-direct", "highest": "highest"}
SOURCE_ONLY = ("antlr4-python3-runtime", "madgrad")  # pure Python, never published as wheels
SHOWN = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")
HEADER = [
    f"| Python | versions | {' | '.join(SHOWN)} | passed | skipped | failed | minutes | date | tests |",
    "| --- " * (len(SHOWN) + 8) + "|",
]


class Outcome(NamedTuple):
    """Of a session of pytest: counts, and the names of the tests that failed."""

    passed: int
    skipped: int
    failed: list[str]


def find_python(version: str) -> Path | None:
    """An interpreter of this version: by its name, or among those of pyenv; None where there is none that starts."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [
        shutil.which(f"python{version}"),
        *sorted(kept.glob(f"{version}.*/bin/python"), reverse=True),
    ]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
            return Path(candidate)
    return None


def uv_in(folder: Path) -> Path:
    """A uv of our own, installed by pip."""
    tool = folder / "uv"
    if not (tool / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", tool], check=True)
        subprocess.run([tool / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True)
    return tool / "bin" / "uv"


def environment(uv: Path, python: Path, end: str, target: Path) -> Path:
    """The interpreter of an environment with the project's dependencies at one end of what it allows."""
    settings = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_CACHE_DIR": str(target.parent / "cache")}
    interpreter = target / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([uv, "venv", "-q", "--python", python, target], check=True, env=settings)
    from_source = [word for name in SOURCE_ONLY for word in ("--no-binary", name)]
    install = [
        uv, "pip", "install", "-q", "--python", interpreter, "-r", ROOT / "pyproject.toml", "--extra", "test",
        "--resolution", ENDS[end], "--only-binary", ":all:", *from_source,
    ]  # fmt: skip
    subprocess.run(install, check=True, env=settings)
    return interpreter


def versions_in(python: Path) -> dict[str, str]:
    """What is installed of the packages that the table shows."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = subprocess.run(
        [python, "-c", code, *SHOWN], check=True, capture_output=True, text=True
    ).stdout.split()
    return dict(zip(SHOWN, found, strict=True))


def outcome(report: Path) -> Outcome:
    """What a JUnit report of pytest's says."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    names = [f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}" for case in cases]
    bad = [
        n
        for n, case in zip(names, cases, strict=True)
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(len(cases) - skipped - len(bad), skipped, bad)


def row(python: str, end: str, versions: dict[str, str], found: Outcome, seconds: float, what: str) -> str:
    """A row of the table."""
    shown = [versions[name] for name in SHOWN]
    counts = [str(found.passed), str(found.skipped), str(len(found.failed)), f"{seconds / 60:.1f}"]
    return f"| {' | '.join([python, end, *shown, *counts, str(date.today()), what])} |"


def merged(text: str, rows: Sequence[str], failures: Sequence[str]) -> str:
    """The page with these rows in place of those of the same Python, end and tests; what failed stands below."""

    def key(line: str) -> tuple[str, ...]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        return cells[0], cells[-1], cells[1]

    old = [line for line in text.splitlines() if line.startswith("| 3.")]
    table = {key(line): line for line in [*old, *rows]}
    fresh = {(k[0], k[2], k[1]) for k in map(key, rows)}
    kept = [
        line for line in text.splitlines()
        if line.startswith("- ") and tuple(line[2:].split(" | ")[:3]) not in fresh
    ]  # fmt: skip
    failed = [*kept, *failures]
    return "\n".join([
        "# Tests at the lowest and the highest versions",
        "",
        "Made by `python benchmarks/versions.py`: each dependency of pyproject.toml at the lowest version that it",
        "allows (and that has a wheel for that Python), and at the highest. Without tests named: the quick suite.",
        "",
        *HEADER,
        *(table[k] for k in sorted(table)),
        *(["", "What failed (Python | versions | tests | test):", "", *failed] if failed else ["", "Nothing failed."]),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS))
    parser.add_argument("--ends", nargs="+", default=list(ENDS), choices=list(ENDS))
    parser.add_argument("--folder", type=Path, help="where the environments are kept; default: nowhere")
    parser.add_argument("--out", type=Path, help="table to make or to complete")
    parser.add_argument("tests", nargs="*", help="after --: arguments of pytest; default: the quick suite")
    arguments = parser.parse_args()
    pythons = {version: find_python(version) for version in arguments.pythons}
    for version in [v for v, found in pythons.items() if found is None]:
        print(f"Python {version}: not on this machine", file=sys.stderr)
    what = " ".join(arguments.tests) or "quick suite"
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uv = uv_in(folder)
        for version, python in pythons.items():
            for end in arguments.ends if python else ():
                interpreter = environment(uv, python, end, folder / f"{end}-{version}")
                report = Path(name) / f"{end}-{version}.xml"
                command = [interpreter, "-m", "pytest", "-q", f"--junitxml={report}", *arguments.tests]
                start = time.monotonic()
                status = subprocess.run(command, cwd=ROOT).returncode
                if not report.exists():
                    sys.exit(f"Python {version}, {end}: pytest ended with status {status} before any test")
                found = outcome(report)
                failed = failed or status != 0
                line = row(version, end, versions_in(interpreter), found, time.monotonic() - start, what)
                failures = [f"- {version} | {end} | {what} | `{test}`" for test in found.failed]
                print(line, *failures, sep="\n", file=sys.stderr, flush=True)
                if arguments.out:
                    before = arguments.out.read_text() if arguments.out.exists() else ""
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    arguments.out.write_text(merged(before, [line], failures))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
