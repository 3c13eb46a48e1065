"""Crucible's entry: compose the configuration, run one task. `python main.py --help` shows how."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from crucible import command_line, completion
from crucible.composition import compose_once
from crucible.writing import outlast_readers

ROOT = Path(__file__).resolve().parent


def compose_and_run() -> int:
    """One composed job: recorded, then run; the exit status. `-m` goes on in hydra_plugins/crucible_sweepers."""
    compose_once()
    statuses: list[int] = []
    raised: list[Exception] = []

    @hydra.main(config_path=str(ROOT / "cli_configs"), config_name="train", version_base="1.3")
    def compose(config: DictConfig) -> None:
        from lab.jobs import run_composed

        try:
            statuses.append(run_composed(config))
        except Exception as error:  # Hydra would print a line of its own above ours
            raised.append(error)

    for _ in range(len(sys.argv)):  # each option may need its + only once
        try:
            compose()
            break
        except Exception as error:
            changed = command_line.with_plus(sys.argv[1:], error)
            if changed is None:
                raise
            sys.argv[1:] = changed
    if raised:
        raise raised[0]
    return max(statuses, default=0)


def complete() -> int:
    """Answer a shell that asks how the line goes on: words to standard output, and never an error."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # what is wrong so far is said when the line is run
    with io.StringIO() as unsaid, contextlib.suppress(Exception), contextlib.redirect_stderr(unsaid):
        for word in completion.values_for(os.environ.get("COMP_LINE", "")):
            print(word)
        compose_and_run()
    return 0


def main() -> int:
    """Run what the command line asks for; the exit status."""
    if completion.asks_what_may_follow(sys.argv[1:]):
        return complete()
    full_error = command_line.wants_tracebacks()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, for one clear line below
    try:
        arguments = command_line.prepare(sys.argv[1:], ROOT)
        if {*completion.FLAGS} & {*arguments}:
            sys.argv = [sys.argv[0], *arguments]  # the script that a shell is to ask, as it was typed
        else:
            sys.argv = [str(ROOT / "main.py"), *arguments]
        if command_line.names_a_run(arguments):
            from lab.jobs import run_recorded

            return run_recorded(arguments)
        return compose_and_run()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if full_error:
            raise
        return command_line.explain(error)


if __name__ == "__main__":
    outlast_readers()
    sys.exit(main())
