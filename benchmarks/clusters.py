"""The table of what was run on a real SLURM and a real Ray of this machine, from the results of the tests.

pytest -n0 -m cluster --junitxml=clusters.xml tests/test_slurm.py tests/test_ray.py    # nightly ones too: 10 minutes
python benchmarks/clusters.py clusters.xml > benchmarks/results/clusters.md
"""

from __future__ import annotations

import ast
import datetime
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def first_lines() -> dict[str, str]:
    """What each test says of itself, by its name."""
    found = {}
    for file in ("test_slurm", "test_ray"):
        for node in ast.walk(ast.parse((ROOT / "tests" / f"{file}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{file}.{node.name}"] = (ast.get_docstring(node) or node.name).splitlines()[0]
    return found


def main(files: list[str]) -> None:
    """Print the table of some results, the later ones in place of the earlier."""
    said, rows = first_lines(), {}
    for file in files:
        for case in ET.parse(file).iter("testcase"):
            name, _, values = case.attrib["name"].partition("[")
            engine = case.attrib["classname"].rpartition(".")[2]
            outcome = next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "passed")
            if any(child.get("type") == "pytest.xfail" for child in case):
                outcome = "fails, as expected"
            what = said[f"{engine}.{name}"] + (f" ({values.rstrip(']')})" if values else "")
            engine = {"test_slurm": "SLURM", "test_ray": "Ray"}[engine]
            rows[engine, what] = f"| {engine} | {what} | {outcome} | {float(case.attrib['time']):.0f} |"
    print(
        f"# Sweeps and runs on a real SLURM and a real Ray\n\n{datetime.date.today()}, `benchmarks/clusters.py`.\n"
    )
    print("| engine | what | outcome | s |\n| --- | --- | --- | --- |")
    print("\n".join(rows[key] for key in sorted(rows, key=lambda key: key[0], reverse=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
