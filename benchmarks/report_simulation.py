"""Do the report's statistics keep their promises? Tables with known truth, through the report's own functions.

    python benchmarks/report_simulation.py --out benchmarks/results/report_simulation.md

A table is K techniques and a baseline, normal runs, those of one seed correlated by rho. Looks are planned: an arm
that is decided at one gets no more seeds, the others go on. For every technique the interval at the look where it
ended should cover its true effect in 95 of 100 cases; in at most 5 of 100 tables should any technique without effect
be called significant, and in at most 6 of 100 should any finding be false.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paired import provenance, report
from reporting import statistics as s
from reporting.looks import Looks, replay

MARGIN = 0.3  # points
BEYOND = MARGIN * 1.0001
TECHNIQUES = (1, 3, 6, 10)
PLANS = ((5,), (10,), (20,), (5, 10, 20), (5, 8, 12, 20))
WORST = 10  # cells that are drawn again
SPREADS = (0.07, 0.15, 0.25, 0.42)  # sd of a paired difference, in points


def _mixed(of: float, arms: int) -> list[float]:
    return [of if k % 2 == 0 else -of for k in range(arms)]


# What the effects of K techniques are: the kinds
TRUTHS: dict[str, Callable[[int], list[float]]] = {
    "none": lambda k: [0.0] * k,
    "all just beyond, mixed signs": lambda k: _mixed(BEYOND, k),
    "all just beyond, one sign": lambda k: [BEYOND] * k,
    "one 0, the rest just beyond": lambda k: [0.0, *_mixed(BEYOND, k - 1)],
    "one just beyond, the rest 0": lambda k: [BEYOND, *[0.0] * (k - 1)],
    "half 0, half just beyond": lambda k: [0.0] * (k // 2) + _mixed(BEYOND, k - k // 2),
    "half tiny, half just beyond": lambda k: [0.01] * (k // 2) + _mixed(BEYOND, k - k // 2),
    "all exactly the margin": lambda k: _mixed(MARGIN, k),
    "all just within": lambda k: _mixed(0.9 * MARGIN, k),
    "half the margin": lambda k: _mixed(0.5 * MARGIN, k),
    "all 1.2 margins": lambda k: _mixed(1.2 * MARGIN, k),
    "one 0, the rest 1.2 margins": lambda k: [0.0, *_mixed(1.2 * MARGIN, k - 1)],
    "one 0, the rest 2 margins": lambda k: [0.0, *_mixed(2 * MARGIN, k - 1)],
    "half 0, half 2 margins": lambda k: [0.0] * (k // 2) + _mixed(2 * MARGIN, k - k // 2),
    "one just beyond, the rest 2 margins": lambda k: [BEYOND, *_mixed(2 * MARGIN, k - 1)],
    "a ladder from 0": lambda k: [0.1 * i * (-1) ** i for i in range(k)],
    "thirds: 0, just beyond, 2 margins": lambda k: [(0.0, BEYOND, 2 * MARGIN)[i % 3] for i in range(k)],
}

KNOWN = [
    (name, arms, looks, 0.25)
    for name in ("all just beyond, mixed signs", "one 0, the rest just beyond")
    for arms in (6, 10)
    for looks in ((20,), (5, 10, 20))
]


class Share(NamedTuple):
    """A share of tables (or the mean over tables of a share of arms) and its Monte-Carlo standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}±{100 * self.error:.1f}"


class Outcome(NamedTuple):
    """What came of a cell's tables.

    `wrong`: any false *helps*, *hurts* or *no difference*. `wrong_size`: any of these, or a false *by more* or *by
    less*. `decided`: the share of verdicts that are not *undecided*. `runs`: of the techniques and the baseline.
    """

    coverage: Share
    family_wise: Share
    wrong: Share
    wrong_size: Share
    decided: Share
    runs: float


def simulate(
    effects: Sequence[float],
    looks: Sequence[int],
    spread: float,
    rho: float,
    tables: int,
    rng: np.random.Generator,
) -> Outcome:
    """Simulate the tables of one cell, all at once.

    Args:
        effects: the techniques' true differences to the baseline, in points.
        looks: planned numbers of pairs.
        spread: sd of a paired difference, in points.
        rho: correlation of runs of one seed, in [0, 1).
        tables: how many.
        rng: draws.
    """
    truth = np.array(effects)
    sd = spread / np.sqrt(2 * (1 - rho))
    runs = rng.normal(size=(tables, len(effects) + 1, max(looks)), scale=sd * np.sqrt(1 - rho))
    differences = runs[:, 1:] - runs[:, :1] + truth[:, None]  # what the runs of a seed share cancels
    at: Any
    found: Any
    if len(looks) > 1:
        at = found = replay(differences, Looks(tuple(looks), len(effects), MARGIN))
        used = float(found.runs.mean())
    else:
        at = s.paired_t(differences)
        found, used = s.findings(at, MARGIN), float((len(effects) + 1) * max(looks))
    null = truth == 0
    false, false_size = wrong(found.found, truth), wrong_size(found.found, truth)
    return Outcome(
        coverage=share_of_tables(((at.low <= truth) & (truth <= at.high)).mean(axis=1)),
        family_wise=share_of_tables(((found.p <= s.ALPHA) & null).any(axis=1)),
        wrong=share_of_tables(false.any(axis=1)),
        wrong_size=share_of_tables((false | false_size).any(axis=1)),
        decided=share_of_tables((found.found != "undecided").mean(axis=1)),
        runs=used,
    )


def wrong(found: NDArray[Any], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which findings the truth contradicts."""
    gain, loss = (np.char.startswith(found, word) for word in ("helps", "hurts"))
    missed = (found == "no difference") & (np.abs(truth) > MARGIN)
    return np.asarray((gain & (truth <= 0)) | (loss & (truth >= 0)) | missed)


def wrong_size(found: NDArray[Any], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which statements about the size the truth contradicts; on the margin itself both of them."""
    more, less = (np.char.endswith(found, word) for word in ("more", "less"))
    return np.asarray((more & (np.abs(truth) <= MARGIN)) | (less & (np.abs(truth) >= MARGIN)))


def share_of_tables(of_tables: NDArray[Any]) -> Share:
    values = of_tables.astype(np.float64)
    return Share(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--again", type=int, default=20_000, help="tables of each of the worst cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    start, rows = time.perf_counter(), []
    cells: dict[tuple[str, int, tuple[int, ...], float], Outcome] = {}
    for name, truths in TRUTHS.items():
        for arms in TECHNIQUES:
            for looks in PLANS:
                for spread in SPREADS:
                    outcome = simulate(truths(arms), looks, spread, 0.5, arguments.tables, rng)
                    cells[name, arms, looks, spread] = outcome
                rows.append(_row(name, arms, looks, [cells[name, arms, looks, sd] for sd in SPREADS]))
    worst = sorted(cells, key=lambda cell: cells[cell].wrong.value)[-WORST:][::-1]
    worst += [cell for cell in KNOWN if cell not in worst]
    again = []
    for name, arms, looks, spread in worst:
        outcome = simulate(TRUTHS[name](arms), looks, spread, 0.5, arguments.again, rng)
        shown = (name, arms, ", ".join(map(str, looks)), spread, outcome.wrong, outcome.wrong_size)
        again.append(f"| {' | '.join(map(str, shown))} |")
    seconds = time.perf_counter() - start
    spreads = ", ".join(map(str, SPREADS))
    table, repeated = "\n".join(rows), "\n".join(again)
    text = f"""# The report's statistics on tables with known truth

{len(TRUTHS)} kinds of truth, K techniques, sd of a paired difference {spreads} points, margin {MARGIN}:
{len(cells):,} cells of {arguments.tables:,} tables, in {seconds:.0f} s on one core. The worst cell of each row is
shown, in percent with the Monte-Carlo standard error; *decided* and *runs* are means. Coverage should be 95 (more
where several looks are planned), the family-wise error at most 5, tables with any wrong finding (a false *helps*,
*hurts* or *no difference larger than*) at most 6. "Wrong size" counts a false *by more* or *by less* as well: where
all but one effect lie just beyond the margin and are found, 5 and 2.5 of 100 add up.

Just beyond is {BEYOND:.5g} points; signs alternate unless said otherwise. An arm that is decided at a look gets no more
seeds. The worst of so many cells is worse than it is by luck, so the {WORST} worst are
drawn afresh, {arguments.again:,} tables each, and with them those that were worst under rule 1:

| effects | K | looks | sd | wrong finding | wrong size |
| --- | ---: | --- | ---: | ---: | ---: |
{repeated}

{provenance()}
| effects | K | looks | coverage | family-wise | wrong finding | wrong size | decided | runs |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}"""
    report(text, arguments.out)


def _row(name: str, arms: int, looks: Sequence[int], cells: Sequence[Outcome]) -> str:
    least = min((c.coverage for c in cells), key=lambda c: c.value)
    most = [
        max(c.family_wise for c in cells),
        max(c.wrong for c in cells),
        max(c.wrong_size for c in cells),
    ]
    decided, runs = np.mean([(c.decided.value, c.runs) for c in cells], axis=0)
    shown = (name, arms, ", ".join(map(str, looks)), least, *most, f"{100 * decided:.0f}", f"{runs:.0f}")
    return f"| {' | '.join(map(str, shown))} |"


if __name__ == "__main__":
    main()
