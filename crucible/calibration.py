"""Temperature scaling: one number that makes a classifier's confidence fit how often it is right."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crucible.measures import CalibrationError
from crucible.options import ConfigError

RECORD = "calibration.json"  # in a run's folder
COLDEST, HOTTEST = 0.01, 100.0
_ITERATIONS = 200
_CERTAIN = 1e-6  # nats; where all samples are right, colder is always likelier


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does on the samples that it was fitted to.

    Attributes:
        temperature: what logits are divided by.
        samples: N.
        ece_before: expected calibration error in 15 bins of confidence (arXiv 1706.04599, equation 3), in [0, 1].
        ece_after: at the temperature.
        nll_before: mean negative log-likelihood, in nats.
        nll_after: at the temperature.
    """

    temperature: float
    samples: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float

    def plain(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)

    @property
    def at_its_bound(self) -> bool:
        """Whether the likelihood has no maximum in the range: all samples are right, or they tell nothing."""
        return self.nll_after < _CERTAIN or not COLDEST * 1.001 < self.temperature < HOTTEST * 0.999


def recorded_calibrations(folder: Path) -> list[dict[str, Any]]:
    """What the folder of a run records: fields of `Calibration`, `weights` (a digest) and `tta` (names of views).

    Raises:
        ConfigError: where the record is damaged.
    """
    file, wanted = folder / RECORD, {field.name for field in fields(Calibration)}
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if isinstance(content, list) and all(
            wanted | {"weights", "tta"} <= entry.keys() for entry in content
        ):
            return content
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"calibrate=true: {file} is damaged; remove it, and it is made anew", see="docs/use.md")


def known_calibration(folder: Path, weights: str, views: Sequence[str]) -> Calibration | None:
    """That of these weights, read by these views, in the folder of their run; None: there is none.

    Args:
        folder: the run's.
        weights: digest of the checkpoint.
        views: of `tta`, sorted.

    Raises:
        ConfigError: where the record is damaged.
    """
    for entry in recorded_calibrations(folder):
        if (entry["weights"], entry["tta"]) == (weights, list(views)):
            return Calibration(**{field.name: entry[field.name] for field in fields(Calibration)})
    return None


def calibrated(logits: Tensor, target: Tensor) -> Calibration:
    """The temperature with the highest likelihood (Guo et al., arXiv 1706.04599, section 4.2), by LBFGS in float64.

    Args:
        logits: (N, K) float, finite.
        target: (N,) int64.

    Raises:
        ValueError: where a logit is not finite, or there is no sample.
    """
    if not len(logits) or not bool(logits.isfinite().all()):
        raise ValueError("there is no sample" if not len(logits) else "an output is not a finite number")
    with torch.inference_mode(False):
        logits, target = logits.detach().to("cpu", torch.float64).clone(), target.detach().cpu().clone()
        temperature = _fitted(logits, target)
    before, after = (_quality(logits / t, target) for t in (1.0, temperature))
    return Calibration(temperature, len(logits), before[0], after[0], before[1], after[1])


def _fitted(logits: Tensor, target: Tensor) -> float:
    assert COLDEST * HOTTEST == 1
    bound = math.log(HOTTEST)
    # of the logarithm, in which T and 1 / T are alike far from 1
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=_ITERATIONS, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.clamp(-bound, bound).exp(), target)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return math.exp(max(-bound, min(bound, float(log_temperature.detach()))))


def _quality(logits: Tensor, target: Tensor) -> tuple[float, float]:
    error = CalibrationError()
    error.update(logits.softmax(dim=1), target)
    return float(error.compute()), float(F.cross_entropy(logits, target))
