"""The notebook of the first hour, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, nightly, runs_in

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
SHORTER = {"trainer.max_epochs=4": "trainer.max_epochs=2", "seed=range(3)": "seed=range(2)"}


@pytest.mark.slow
@pytest.mark.parametrize("shortened", [True, *nightly(False)])
def test_the_notebook_trains_compares_reports_and_predicts(
    shortened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("EXPERIMENT_LOCATION", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout, whichever is installed
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if shortened:
        for cell in notebook.cells:
            for long, short in SHORTER.items():
                cell.source = cell.source.replace(long, short)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
    printed = ["".join(str(o) for o in cell.get("outputs", [])) for cell in notebook.cells]
    assert not any("Traceback" in text or "error:" in text for text in printed)
    # two arms, of which the first run is the baseline's of seed 0
    assert len(runs_in(tmp_path / "first_hour" / "digits")) == (4 if shortened else 6)
    assert (tmp_path / "first_hour" / "report" / "report.html").is_file()
    assert sum(" differs" in text or "diff" in text for text in printed) >= 1
    assert "probability" in printed[-2]
