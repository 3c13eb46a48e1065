"""Makes Hydra hand `python main.py -m ...` over to `lab.sweeps`.

Hydra looks for plugins in the namespace package `hydra_plugins`, which the checkout is on the path with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from crucible.command_line import with_plus


class CrucibleSweeper(Sweeper):
    """Plans the jobs of a multirun and runs each in a process of its own."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Remember how to compose a job's configuration."""
        self._loader, self._master = hydra_context.config_loader, config

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """One job's configuration."""
        overrides = list(overrides)
        while True:
            try:
                return self._loader.load_sweep_config(self._master, overrides)
            except ConfigCompositionException as error:
                changed = with_plus(overrides, error)
                if changed is None:
                    raise
                overrides = changed

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs that the command line's overrides ask for."""
        from lab.sweeps import sweep

        parser = OverridesParser.create(config_loader=self._loader)
        if status := sweep(self.compose, parser.parse_overrides(arguments)):
            raise SystemExit(status)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="crucible",
    node={"_target_": f"{__name__}.CrucibleSweeper"},
    provider="crucible",
)
