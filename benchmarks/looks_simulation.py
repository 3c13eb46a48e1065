"""Seeds until it is decided: does the rule keep its promises, and what does it save? Tables with known truth.

    python benchmarks/looks_simulation.py --out benchmarks/results/looks_simulation.md

A table is K techniques and a baseline, normal runs, those of one seed correlated. It goes through the planned looks by
`reporting.looks.replay`, the function that a sweep and the report go by: what is decided or stopped gets no more seeds.
In at most 5 of 100 tables should any *helps* or *hurts* be false (of an effect of 0 or of the other sign), in at most 6
should any finding be (a false *no difference* as well), and the interval that is printed, at whatever look and
for whatever reason an arm ended, should cover its true effect at least 95 times in 100.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paired import provenance, report
from benchmarks.report_simulation import (
    BEYOND,
    MARGIN,
    TECHNIQUES,
    TRUTHS,
    Share,
    share_of_tables,
    wrong,
    wrong_size,
)
from reporting import statistics as s
from reporting.looks import DEFAULT_LOOKS, FUTILITY, Looks, Order, Steps, replay

CHECKED = (
    "none",
    "all just beyond, mixed signs",
    "one 0, the rest just beyond",
    "one just beyond, the rest 0",
    "half 0, half just beyond",
    "one 0, the rest 2 margins",
)
WORST = ("all just beyond, mixed signs", "one 0, the rest just beyond")
OTHERS: tuple[tuple[tuple[int, ...], Order, int | None], ...] = (
    ((5, 10, 20), "together", None),
    (DEFAULT_LOOKS, "by chance", 75),
)
SPREADS = (0.07, 0.15, 0.25, 0.42)  # sd of a paired difference, in points
AGAIN = 5  # cells that are drawn again
PATTERNS = {
    "six of 0": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "0, 0, 0, 0.1, 0.6, -0.6": (0.0, 0.0, 0.0, 0.1, 0.6, -0.6),
    "0, 0.1, 0.3, 0.6, -0.6, 1": (0.0, 0.1, 0.3, 0.6, -0.6, 1.0),
}
RUNS = (
    (0.2, 0.0),
    (0.2, 0.6),
    (0.5, 0.0),
    (0.5, 0.6),
)  # sd of one run in points, correlation of a seed's runs
FIXED = (5, 10, 20)
MOST = 40  # pairs of a fixed design that is looked for


class Outcome(NamedTuple):
    """What came of a cell's tables; `coverage` is that of all printed intervals."""

    coverage: Share
    helps: Share
    wrong: Share
    wrong_size: Share
    decided: Share
    stopped: Share
    runs: float


def draw(
    effects: Sequence[float], seeds: int, spread: float, rho: float, tables: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Differences of techniques and baseline, (tables, K, seeds), in points.

    Args:
        effects: the techniques' true differences.
        seeds: of each arm.
        spread: sd of a paired difference.
        rho: correlation of the runs of one seed; what these share cancels in the differences.
        tables: how many.
        rng: draws.
    """
    sd = spread / np.sqrt(2 * (1 - rho))
    runs = rng.normal(size=(tables, len(effects) + 1, seeds), scale=sd * np.sqrt(1 - rho))
    return np.asarray(runs[:, 1:] - runs[:, :1] + np.array(effects)[:, None])


def simulate(
    effects: Sequence[float],
    looks: Looks,
    spread: float,
    tables: int,
    rng: np.random.Generator,
    budget_runs: int | None = None,
) -> Outcome:
    """Send the tables of one cell through the looks."""
    steps = replay(draw(effects, looks.at[-1], spread, 0.5, tables, rng), looks, budget_runs=budget_runs)
    return outcome(steps, np.array(effects))


def outcome(steps: Steps, truth: NDArray[np.float64]) -> Outcome:
    """What the steps are worth where the effects are known."""
    found = steps.found
    false, directed = wrong(found, truth), np.char.startswith(found, "h")  # helps, hurts
    return Outcome(
        coverage=share_of_tables(((steps.low <= truth) & (truth <= steps.high)).mean(axis=1)),
        helps=share_of_tables((false & directed).any(axis=1)),
        wrong=share_of_tables(false.any(axis=1)),
        wrong_size=share_of_tables((false | wrong_size(found, truth)).any(axis=1)),
        decided=share_of_tables((directed | (found == "no difference")).mean(axis=1)),
        stopped=share_of_tables((found == "stopped").mean(axis=1)),
        runs=float(steps.runs.mean()),
    )


def fixed(d: NDArray[np.float64], n: int) -> float:
    """The share of arms that a design of n seeds decides, at the levels of the looks.

    These flatter it a little: of one look the report asks for half the level before it says *no difference*.
    """
    found = s.findings(s.paired_t(d[..., :n]), MARGIN)
    return float(((found.p <= s.ALPHA) | (found.p_none / 2 <= s.ALPHA)).mean())


def saving(tables: int, rng: np.random.Generator) -> tuple[list[str], str]:
    """Rows of runs and decisions beside those of fixed designs, and what they say."""
    looks = Looks(DEFAULT_LOOKS, 6, MARGIN, FUTILITY, "together")
    rows: list[str] = []
    means: list[list[float]] = []
    for name, effects in PATTERNS.items():
        for sd, rho in RUNS:
            d = draw(effects, MOST, sd * np.sqrt(2 * (1 - rho)), rho, tables, rng)
            got = outcome(replay(d[..., : looks.at[-1]], looks), np.array(effects))
            decided, decides = got.decided.value, [fixed(d, n) for n in FIXED]
            enough = next((n for n in range(3, MOST + 1) if fixed(d, n) >= min(decided, 0.99)), MOST)
            means.append([*decides, decided, got.runs, enough * 7])
            percents = [f"{100 * v:.0f}" for v in (*decides, decided, got.stopped.value)]
            cells = [name, str(sd), str(rho), *percents, f"{got.runs:.0f}", f"{enough} ({enough * 7})"]
            rows.append(f"| {' | '.join(cells)} |")
    five, ten, twenty, decided, runs, known = np.mean(means, axis=0)
    saved, less = 100 * (1 - runs / 140), 100 * (twenty - decided)
    by_fixed = ", ".join(
        f"{n} seeds {100 * part:.0f}% with {7 * n}"
        for n, part in zip(FIXED[::-1], (twenty, ten, five), strict=True)
    )
    text = (
        f"Means over these cells: the looks decide {100 * decided:.0f}% of the arms with {runs:.0f} runs; fixed "
        f'numbers {by_fixed}.\nAgainst "20 to be safe" the looks take {saved:.0f}% fewer runs and decide {less:.0f} '
        "points fewer.\n\n**The honest limit**: whoever knew sd and effects, and fixed for each cell the number of "
        f"seeds that decides as often, would take {known:.0f} runs\n({100 * (runs / known - 1):+.0f}% for the looks). "
        "What they buy is not having to know."
    )
    return rows, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=10_000, help="of each cell")
    parser.add_argument("--again", type=int, default=40_000, help="tables of each of the worst cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng, start = np.random.default_rng(arguments.seed), time.process_time()
    cells: dict[tuple[Any, ...], Outcome] = {}
    rows = []
    designs: list[tuple[str, tuple[int, ...], Order, int | None]] = [
        *((name, DEFAULT_LOOKS, "together", None) for name in CHECKED),
        *((name, *other) for other in OTHERS for name in WORST),
    ]
    for name, at, order, budget in designs:
        for arms in TECHNIQUES if budget is None else (6,):
            keys = [(name, arms, at, order, budget, spread) for spread in SPREADS]
            for key in keys:
                cells[key] = _cell(key, arguments.tables, rng)
            rows.append(_row(keys[0][:5], [cells[key] for key in keys]))
    worst = sorted(cells, key=lambda key: cells[key].wrong.value)[-AGAIN:][::-1]
    again = [_row(key[:5], [_cell(key, arguments.again, rng)], key[5]) for key in worst]
    runs, sentence = saving(arguments.tables, rng)
    head = "coverage | false helps/hurts | any wrong | or wrong size | decided | stopped | runs |"
    rule = f"| --- | ---: | --- |{' ---: |' * 7}"
    table, repeated, savings = ("\n".join(lines) for lines in (rows, again, runs))
    spreads, at_looks = (", ".join(map(str, values)) for values in (SPREADS, DEFAULT_LOOKS))
    text = f"""# Seeds until it is decided, on tables with known truth

Differences are normal, correlated .5 through the baseline; sd of a paired difference {spreads} points,
margin {MARGIN}; an arm is stopped where a decision has a chance below {FUTILITY:.0%}. {len(cells)} cells of
{arguments.tables:,} tables; each row shows the worst of its sds, in percent with the Monte-Carlo standard error
(*decided*, *stopped* and *runs*: means). Promised: the printed interval covers at least 95, a false *helps* or *hurts*
in at most 5 of 100 tables, any wrong finding in at most 6. *Or wrong size* counts a false *by more* or *by less* than
the margin as well. Just beyond is {BEYOND:.5g} points. *budget*: the arms go on one at a time, that with the highest
chance of a decision per run first, until so many runs are used.

{provenance()}- CPU time: {time.process_time() - start:.0f} s

| effects | K | looks | {head}
{rule}
{table}

The worst of so many cells is worse than it is by luck; the {AGAIN} worst, drawn afresh, {arguments.again:,} tables
each:

| effects | K | looks | {head}
{rule}
{repeated}

## Runs beside those of fixed designs

K = 6, effects in points, looks at {at_looks}; sd of one run and correlation of the runs of a seed. Arms decided, in
percent, by fixed numbers of seeds (at the levels of the looks) and by the looks; the last column is the fixed number of
seeds (and runs) that decides as often in that very cell (99% and {MOST} seeds at most).

| effects | sd | rho | fixed 5 | fixed 10 | fixed 20 | looks | stopped | runs | fixed, as many decided |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{savings}

{sentence}"""
    report(text, arguments.out)


def _cell(key: tuple[Any, ...], tables: int, rng: np.random.Generator) -> Outcome:
    name, arms, at, order, budget, spread = key
    looks = Looks(at, arms, MARGIN, FUTILITY, order)
    return simulate(TRUTHS[name](arms), looks, spread, tables, rng, budget)


def _row(key: tuple[Any, ...], cells: Sequence[Outcome], spread: float | None = None) -> str:
    name, arms, at, _, budget = key
    least = min((c.coverage for c in cells), key=lambda c: c.value)
    most = [max(getattr(c, which) for c in cells) for which in ("helps", "wrong", "wrong_size")]
    means = np.mean([(100 * c.decided.value, 100 * c.stopped.value, c.runs) for c in cells], axis=0)
    further = [f"budget {budget}"] if budget else []
    further += [f"sd {spread}"] if spread else []
    shown = "; ".join([", ".join(map(str, at)), *further])
    return f"| {' | '.join(map(str, (name, arms, shown, least, *most, *(f'{m:.0f}' for m in means))))} |"


if __name__ == "__main__":
    main()
