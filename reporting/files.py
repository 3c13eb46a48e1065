"""The report's folder: report.md, report.html, results.csv and plots/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crucible.cells import cell
from crucible.files import write_atomically
from reporting.comparison import Table
from reporting.general import InGeneral
from reporting.page import ALL, Page, plot_file
from reporting.plots import Plot
from reporting.rendering import to_html, to_markdown

CSV_COLUMNS = (
    "data", "arm", "metric", "n", "diverged", "mean", "sd", "median", "min", "max", "time_s", "images_per_s",
    "images", "memory_mb", "pairs", "difference", "sd_difference", "low", "high", "images_low", "images_high", "p",
    "p_flip", "p_holm", "p_none", "correlation", "detectable", "detectable_alone", "time_ratio", "time_ratio_low",
    "time_ratio_high", "margin", "level", "look", "seeds_at_look", "seeds_not_used", "chance", "noise_floor", "verdict",
    "cost", "settings", "tau", "i2", "p_settings_differ", "another_low", "another_high",
)  # fmt: skip


def write(
    page: Page,
    tables: Sequence[Table],
    plots: Mapping[str, Sequence[Plot]],
    out: Path,
    over_all: InGeneral | None = None,
) -> None:
    """Write report.md, report.html, results.csv and plots/ into the folder `out`."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for data, drawn in plots.items():
        for plot in drawn:
            write_atomically(out / "plots" / plot_file(data, plot), plot.png)
    write_atomically(out / "report.md", to_markdown(page))
    write_atomically(out / "report.html", to_html(page))
    write_atomically(out / "results.csv", _results_csv(tables, over_all))


def _results_csv(tables: Sequence[Table], over_all: InGeneral | None) -> str:
    """results.csv; empty cells for what there is not."""
    import pandas

    under = [other for table in tables if table.robustness for other in table.robustness.tables]
    under += [other.table for table in tables for other in table.elsewhere]
    rows = [
        {n: cell(value) for n, value in row.items()} for table in [*tables, *under] for row in _rows(table)
    ]
    if over_all is not None:
        rows += [{n: cell(value) for n, value in row.items()} for row in _general_rows(over_all)]
    table = pandas.DataFrame(rows, columns=list(CSV_COLUMNS)).astype(
        dict.fromkeys(("pairs", "settings", "look", "seeds_at_look", "seeds_not_used"), "Int64")
    )
    return str(table.to_csv(index=False, lineterminator="\n"))


def _rows(table: Table) -> Iterable[dict[str, Any]]:
    """A row an arm; values and differences as logged (accuracies are fractions), None where there is none."""
    against = {c.arm: c for c in table.comparisons}
    for arm in table.arms.values():
        row: dict[str, Any] = {"data": table.data, "arm": arm.name, "metric": table.metric.name}
        row |= {"n": len(arm.runs), "diverged": len(arm.diverged), **arm.spread(), **arm.costs()}
        row |= {"margin": table.plan.margin, "noise_floor": table.floor}
        if c := against.get(arm.name):
            row |= {
                "pairs": c.n,
                "difference": c.t.mean,
                "sd_difference": c.t.sd,
                "low": c.t.low,
                "high": c.t.high,
                "level": c.level,
                "p_none": c.p_none,
            }
            row |= {"p": c.t.p, "p_flip": c.p_flip, "p_holm": c.p_holm, "correlation": c.correlation}
            row |= {"detectable": c.detectable[0], "detectable_alone": c.detectable[1]}
            if c.step is not None:
                row |= {"look": c.step.look, "seeds_at_look": c.step.seeds, "seeds_not_used": c.later}
                row |= {"chance": c.step.chance}
            if c.images is not None:
                row |= {"images_low": c.images.low, "images_high": c.images.high}
            row |= {
                "time_ratio": c.ratio.mean,
                "time_ratio_low": c.ratio.low,
                "time_ratio_high": c.ratio.high,
            }
            row |= {"verdict": c.verdict, "cost": c.cost}
        yield row


def _general_rows(found: InGeneral) -> Iterable[dict[str, Any]]:
    """A row a technique over all settings."""
    for one in found.techniques:
        row = {"data": ALL, "arm": one.arm, "metric": found.metric.name, "settings": len(one.used)}
        row |= {"margin": found.margin, "verdict": one.verdict, "p_holm": one.p_holm, "p_none": one.p_none}
        if (all_of := one.combined) is not None:
            t = all_of.t
            row |= {"difference": t.mean, "sd_difference": t.sd, "low": t.low, "high": t.high, "p": t.p}
            row |= {"tau": all_of.tau, "i2": all_of.i2, "p_settings_differ": all_of.p}
            row |= {"another_low": all_of.low, "another_high": all_of.high}
        yield row
