"""Techniques on two processes: both end with the same weights, and have learned; one pair runs them all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, end_group
from technique_runs import TECHNIQUES, built, composed, plain_loss

OPTIONS = ("trainer.devices=2", "data.module.batch_size=8")
# of the images, the loss, the norms, the weights' updates and average, the random numbers, a second network
ONE_OF_EACH_KIND = [
    "distillation", "ema", "ghost_norm", "mixup", "online_norm", "powergrad", "sam", "stochastic_depth",
]  # fmt: skip


def main(teacher: str, out: str, *techniques: str) -> None:
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
    techniques: list[str], tmp_path: Path, teacher: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(teacher), str(tmp_path), *techniques], text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            end_group(rank)
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-2000:] + said[1][-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert list(first) == techniques
    for technique, (world, before, after, weights) in first.items():
        assert world == 2 and weights == second[technique][3], technique
        assert after < before, (technique, before, after)


if __name__ == "__main__":
    main(*sys.argv[1:])
