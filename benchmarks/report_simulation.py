"""Do the report's statistics keep their promises? Tables with known truth, through the report's own functions.

    python benchmarks/report_simulation.py --out benchmarks/results/report_simulation.md

A table is six techniques and a baseline, n seeds each, normal runs; `rho` is the correlation of runs that share a
seed. For every technique the interval should cover its true effect in 95 of 100 cases; in at most 5 of 100 tables
should any technique without effect be called significant, and in at most 6 of 100 should any verdict be wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paired import provenance, report
from reporting import statistics as s

MARGIN = 0.3  # points
EFFECTS = {
    "none": (0.0,) * 6,
    "some": (0.0, 0.0, 0.1, -0.1, 0.6, -0.6),
    "mixed": (0.0, 0.0, 0.3, 0.3, 0.6, 0.6),
    "one just above the margin": (0.0, 0.0, 0.0, 0.0, 0.0, 0.31),
}


class Share(NamedTuple):
    """A share of tables (or the mean over tables of a share of arms) and its Monte-Carlo standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}±{100 * self.error:.1f}"


class Outcome(NamedTuple):
    """What came of a cell's tables.

    `wrong`: any false *helps*, *hurts* or *no difference*. `wrong_size`: any false *by more* or *by less*, which
    is read off one arm's interval and not corrected for the number of arms. `decided`: the share of verdicts
    that are not *undecided*.
    """

    coverage: Share
    family_wise: Share
    wrong: Share
    wrong_size: Share
    decided: Share


def simulate(
    effects: tuple[float, ...], seeds: int, sd: float, rho: float, tables: int, rng: np.random.Generator
) -> Outcome:
    """Simulate the tables of one cell, all at once.

    Args:
        effects: the techniques' true differences to the baseline, in points.
        seeds: pairs.
        sd: of one run, in points.
        rho: correlation of runs of one seed, in [0, 1).
        tables: how many.
        rng: draws.
    """
    truth = np.array(effects)
    shared = rng.normal(size=(tables, 1, seeds)) * np.sqrt(rho)
    runs = sd * (shared + rng.normal(size=(tables, len(effects) + 1, seeds)) * np.sqrt(1 - rho))
    t = s.paired_t(runs[:, 1:] - runs[:, :1] + truth[:, None])
    found = s.findings(t.low, t.high, p := s.holm(t.p), MARGIN, s.ALPHA)
    null = truth == 0
    return Outcome(
        coverage=_share(((t.low <= truth) & (truth <= t.high)).mean(axis=1)),
        family_wise=_share(((p < s.ALPHA) & null).any(axis=1)),
        wrong=_share(wrong(found, truth).any(axis=1)),
        wrong_size=_share(wrong_size(found, truth).any(axis=1)),
        decided=_share((found != "undecided").mean(axis=1)),
    )


def wrong(found: NDArray[Any], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which verdicts the truth contradicts."""
    gain, loss = (np.char.startswith(found, word) for word in ("helps", "hurts"))
    missed = (found == "no difference") & (np.abs(truth) > MARGIN)
    return np.asarray((gain & (truth <= 0)) | (loss & (truth >= 0)) | missed)


def wrong_size(found: NDArray[Any], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which statements about the size the truth contradicts; on the margin itself both of them."""
    more, less = (np.char.endswith(found, word) for word in ("more", "less"))
    return np.asarray((more & (np.abs(truth) <= MARGIN)) | (less & (np.abs(truth) >= MARGIN)))


def _share(of_tables: NDArray[Any]) -> Share:
    values = of_tables.astype(np.float64)
    return Share(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    rows = []
    for name, effects in EFFECTS.items():
        for seeds in (3, 5, 10, 20):
            for sd, rho in ((0.2, 0.0), (0.2, 0.6), (0.5, 0.0)):
                o = simulate(effects, seeds, sd, rho, arguments.tables, rng)
                cells = (name, seeds, sd, rho, *o[:-1], f"{100 * o.decided.value:.0f}")
                rows.append(f"| {' | '.join(map(str, cells))} |")
    listed = "\n".join(f"- *{name}*: {', '.join(map(str, effects))}" for name, effects in EFFECTS.items())
    table = "\n".join(rows)
    text = f"""# The report's statistics on tables with known truth

{arguments.tables:,} tables a row, each six techniques and a baseline; margin {MARGIN} points; percent, with the
Monte-Carlo standard error. Coverage should be 95, the family-wise error at most 5, tables with any wrong verdict (a
false *helps*, *hurts* or *no difference larger than*) at most 6.

*By more* and *by less* than the margin are read off one arm's interval, which is not corrected for the number of
arms. Tables in which any such statement is false are counted apart ("wrong size"): for an effect of exactly the
margin, where both statements are false, up to 2.5 of 100 tables an arm and side.

True effects in points:

{listed}

{provenance()}
| effects | seeds | sd of a run | rho | coverage | family-wise | wrong verdict | wrong size | decided |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""
    report(text, arguments.out)


if __name__ == "__main__":
    main()
