"""Options that are no fact of a run, and recorded configurations completed: what reads a run needs no more of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from crucible.configuration import Config, flatten, select

# what `python main.py -m` does with its jobs (`lab.sweeps`)
SWEEP_OPTIONS = (
    "design", "dry_run", "retry_failed", "baseline", "equal_time", "margin_points", "planned_seeds", "until", "looks",
    "decided_by", "budget_hours", "budget_runs", "drop_failed", "n_jobs", "cluster", "ray", "search",
)  # fmt: skip
PACK_OPTIONS = ("out", "pack")  # of task=pack (`lab.packing`)
TUNE_OPTIONS = ("tune",)  # of task=tune (`lab.tuning`)
EVALUATION_OPTIONS = ("calibrate", "tta")  # of task=test, task=predict and task=export
EXPORT_OPTIONS = ("format", "export")  # of task=export (`lab.export`)
TASK_OPTIONS = PACK_OPTIONS + TUNE_OPTIONS + EVALUATION_OPTIONS + EXPORT_OPTIONS  # none of them changes a run


@cache
def _defaults() -> dict[str, Any]:
    file = Path(__file__).resolve().parent.parent / "cli_configs" / "train.yaml"
    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))
    others = ("defaults", "hydra", *SWEEP_OPTIONS, *TASK_OPTIONS)
    return flatten({k: v for k, v in defaults.items() if k not in others})


def completed(recorded: Config) -> Config:
    """A recorded configuration with today's defaults of the options that its version did not have yet.

    They change nothing: the default of a new option is what was before there was one.
    """
    whole = copy.deepcopy(recorded)
    later: dict[str, str] = {}
    for name, default in _defaults().items():
        room = name.partition(".")[0]
        if room in ("callbacks", "logger", "techniques"):
            whole.setdefault(room, {})
        elif isinstance(default, str) and default.startswith("${"):
            later[name] = default[2:-1]
        else:
            _set_default(whole, name, copy.deepcopy(default))
    for name, source in later.items():
        _set_default(whole, name, select(whole, source))
    return whole


def _set_default(node: dict[str, Any], name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            return
    node.setdefault(leaf, value)
