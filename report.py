"""Crucible's report: run directories in, tables of arms, paired statistics, verdicts and plots out.

python report.py runs=experiments/digits
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Sequence

HELP = """\
Crucible's report: which technique helps, by how much, at what cost?

Usage
  python report.py runs=PATH[,PATH...] [OPTION=VALUE ...]

Options
  runs=experiments/digits   folders (or globs) with run directories, searched at any depth
  baseline=baseline         the arm that the others are compared with
  metric=test/acc           any logged final metric: test/acc, val/acc, test/loss, test/mae, ...
  margin_points=0.3         percentage points below which a difference does not matter; fix it before the runs
                            (a sweep's own is used without asking)
  margin=0.02               the same in the unit of the metric, for those that are no percentage: test/loss, test/mae
  checkpoint=last           last: the last epoch's weights are scored; best: those that were best on validation,
                            of all arms alike (checkpoint.keep=best keeps them; python main.py run=RUN task=test
                            scores them)
  networks=settings|arms    settings: a table for each network of a data set; arms: one table of all that is there.
                            Left out: a table for each baseline that a sweep was run against, and for each network
                            that techniques were tried on
  variance=own              own: each arm's; shared: moderated over 3 techniques or more, for few seeds
  out=PATH                  where report.md, report.html, results.csv and plots/ go; default: report/ in the
                            folder of the runs
  wandb=PROJECT             also log the report to W&B as an artifact; offline where there is no key or server
  watch=true                serve the page on this machine only, and keep it true while runs are under way; Ctrl-C
                            ends it. Files are written with out= only, at each change of the report
  port=8000                 of watch=true; default: a free one

Examples
  python report.py runs=experiments/digits
  python report.py runs=experiments/cifar10 metric=val/acc margin_points=0.2
  python report.py runs=experiments/cifar10 metric=test/loss margin=0.02
  python report.py runs=experiments/cifar10 watch=true
  python report.py runs=experiments                         every data set in it, and what holds over all of them
  python report.py 'runs=experiments/*/1a2b*,/other/experiments' baseline=sgd out=comparison

How it compares
  Runs are paired by seed. Each arm's mean difference to the baseline has a 95% interval of Student's t over
  the pairs; p values are corrected for the number of techniques (Holm). Runs that are unfinished, failed or
  diverged are listed, never averaged. Plan 5 seeds an arm, 10 for differences under half a point.
  All of it: docs/report.md
"""


def main(arguments: Sequence[str]) -> int:
    """Write the report that the arguments ask for; the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    from crucible.command_line import explain, wants_tracebacks

    collecting = gc.isenabled()
    gc.disable()  # nothing that was read is garbage; looking for some costs a fifth of the time
    try:
        _report(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if wants_tracebacks():
            raise
        return explain(error)
    finally:
        if collecting:
            gc.enable()
    return 0


def _report(arguments: Sequence[str]) -> None:
    from reporting.request import read_arguments

    request = read_arguments(arguments)
    if request.watching is not None:
        from reporting.live import watch

        gc.enable()  # it goes on for days
        watch(arguments, request, functools.partial(print, flush=True))
        return
    from reporting import files, making, records, rendering

    runs, left_out = records.read_runs(request)
    made = making.made_of(runs, request)
    composed = made.page(left_out, request)
    files.write(composed, made.tables, made.plots, request.out, made.over_all)
    rendering.to_console(composed)
    print(f"\nwritten: {request.out / 'report.md'}, report.html, results.csv, plots/")
    if request.wandb:
        from crucible.loggers import log_report

        print(f"logged: {log_report(request.out, request.wandb, list(request.arguments))}")


if __name__ == "__main__":
    from crucible.writing import outlast_readers

    outlast_readers()
    sys.exit(main(sys.argv[1:]))
