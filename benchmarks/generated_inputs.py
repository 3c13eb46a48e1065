"""The table of benchmarks/results/generated_inputs.md: wrong values of every option, and what becomes of them.

python benchmarks/generated_inputs.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from declared import Option, all_options, wrong_values  # noqa: E402
from test_wrong_inputs import complaint  # noqa: E402


def main() -> None:
    """Print it, a room a line."""
    rooms: dict[str, list[Option]] = {}
    for option in all_options():
        rooms.setdefault(option.room.split(".")[0], []).append(option)
    print("| room | options | values | refused in one line | others |\n| --- | ---: | ---: | ---: | --- |")
    for room, options in rooms.items():
        pairs = [(option, wrong) for option in options for wrong in wrong_values(option.allowed)]
        complaints = [text for option, wrong in pairs if (text := complaint(option, wrong))]
        kinds = Counter(text.split(":")[0].split(" ")[0] for text in complaints)
        others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        print(
            f"| {room} | {len(options)} | {len(pairs)} | {len(pairs) - len(complaints)} | {others} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
