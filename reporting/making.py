"""From the runs that were read to the page: what a report is made of, in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reporting import comparison, elsewhere, general, mechanism, page, plots, robustness
from reporting.records import LeftOut, Run
from reporting.request import Request


@dataclass(frozen=True)
class Made:
    """The tables of some runs, their plots by data set, and what holds over several settings."""

    tables: Sequence[comparison.Table]
    plots: Mapping[str, Sequence[plots.Plot]]
    over_all: general.InGeneral | None

    def page(self, left_out: Sequence[LeftOut], request: Request) -> page.Page:
        """What is said of them, and of the runs that do not count."""
        return page.compose(self.tables, self.plots, left_out, request, self.over_all)


def made_of(runs: Sequence[Run], request: Request) -> Made:
    """Compare the runs and draw what there is to draw.

    Raises:
        ConfigError: for what cannot be compared.
    """
    tables = comparison.compare(runs, request)
    over_all = general.in_general(tables)
    for table in tables:
        table.robustness = robustness.robustness_of(table, request)
        table.elsewhere = elsewhere.elsewhere_of(table, request)
        table.mechanism = mechanism.mechanism_of(table, request)
    drawn = {table.data: plots.draw_all(table) for table in tables}
    if over_all is not None and (forest := plots.draw_forest(over_all)):
        drawn[page.ALL] = [forest]
    return Made(tables, drawn, over_all)
