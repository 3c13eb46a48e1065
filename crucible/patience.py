"""How long a value has not been better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """Counts the values in a row that were not better than the best before them.

    Args:
        higher: whether higher is better.
        min_delta: a value is better where it is so by more than this; one that is not finite never is.
    """

    def __init__(self, higher: bool, min_delta: float = 0.0) -> None:
        self._sign = 1.0 if higher else -1.0
        self._min_delta = min_delta
        self.best = -self._sign * math.inf
        self.waited = 0

    def observe(self, value: float) -> None:
        """Take in the next value."""
        if math.isfinite(value) and self._sign * (value - self.best) > self._min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        """Best value and count."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], state["waited"]
