"""The ground of Crucible, and what a notebook needs of the rest.

from crucible import load_run
run = load_run("experiments/digits/1a2b3c4d-s0")
run.predict("photographs").labels
"""

import os
from typing import Any

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # its import asks a server for its newest version, else


def __getattr__(name: str) -> Any:
    # deferred: importing the command line must not import torch
    if name == "load_run":
        from crucible.rooms import import_module

        return import_module("lab.use").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
