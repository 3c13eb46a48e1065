"""A function of a test file, as one process of several: `python rank.py FILE FUNCTION ARGUMENTS`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(file: str, function: str, *arguments: str) -> None:
    sys.path[1:1] = [str(Path(file).parent), str(Path(__file__).parent.parent)]
    getattr(importlib.import_module(Path(file).stem), function)(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
