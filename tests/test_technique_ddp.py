"""Techniques on two processes: both end with the same weights, and have learned; one pair runs them all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from technique_runs import TECHNIQUES, built, composed, plain_loss

OPTIONS = ("trainer.devices=2", "data.module.batch_size=8")
# of the images, the loss, the norms, the weights' updates and average, the random numbers, a second network
ONE_OF_EACH_KIND = [
    "distillation", "ema", "ghost_norm", "mixup", "online_norm", "powergrad", "sam", "stochastic_depth",
]  # fmt: skip


def train_each(teacher: str, out: str, *techniques: str) -> None:
    """What each of the two processes does."""
    results = {}
    for technique in techniques:
        model, data, trainer = built(composed(technique, teacher=Path(teacher), options=OPTIONS), Path(out))
        before = plain_loss(model, data)
        trainer.fit(model, datamodule=data)
        weights = [float(p.detach().double().sum()) for p in model.parameters()]
        results[technique] = [trainer.world_size, before, plain_loss(model, data), weights]
    (Path(out) / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(results))


@pytest.mark.slow
@pytest.mark.parametrize(
    "techniques",
    [
        pytest.param(ONE_OF_EACH_KIND, id="one of each kind"),
        pytest.param(TECHNIQUES, id="all", marks=pytest.mark.nightly),
    ],
)
def test_every_technique_trains_on_two_processes_that_stay_equal(
    techniques: list[str], on_two_processes, tmp_path: Path, teacher: Path
) -> None:
    on_two_processes(train_each, teacher, tmp_path, *techniques)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert list(first) == techniques
    for technique, (world, before, after, weights) in first.items():
        assert world == 2 and weights == second[technique][3], technique
        assert after < before, (technique, before, after)
