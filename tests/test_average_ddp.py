"""On two processes what is recorded is of what is saved, and a killed run comes to the same numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from technique_runs import built, composed

pytestmark = pytest.mark.slow

CASES = {
    "baseline": [(), {}],
    "ema": [("ema",), {"ema_decay": 0.8}],
    "swa": [("swa",), {"swa_start": 0.3}],
    "ema of switchable": [("ema", "switchable_norm"), {"ema_decay": 0.8}],
    "swa of ghost": [("swa", "ghost_norm"), {"swa_start": 0.3}],
    "swa of online": [("swa", "online_norm"), {"swa_start": 0.3}],
}
ONE_OF_EACH_KIND = ["baseline", "ema of switchable", "swa of ghost"]
OPTIONS = (
    "trainer.max_epochs=3", "trainer.max_steps=8", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2",
    "model.lr=0.1", "data.module.batch_size=8",
)  # fmt: skip
STOP = 4  # steps, inside the second epoch


class Keep(Callback):
    """The state after STOP steps, and each validation's loss."""

    def __init__(self, file: Path) -> None:
        self.file, self.losses = file, []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.file)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.losses.append([float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")])


def prepared(case: str, folder: Path, *options: str) -> tuple[Any, Any, Any]:
    techniques, values = CASES[case]
    config = composed(*techniques, options=(*OPTIONS, *options))
    config["model"] |= values
    return built(config, folder)


def train_and_resume(out: str, *cases: str) -> None:
    """What each of the two processes does."""
    results: dict[str, Any] = {}
    for number, case in enumerate(cases):
        kept, last = Path(out) / f"{number}.stopped.ckpt", Path(out) / f"{number}.ckpt"
        for start in (None, kept):
            model, data, trainer = prepared(case, Path(out), "trainer.devices=2")
            watch = Keep(kept if start is None else last)
            trainer.callbacks.append(watch)
            trainer.fit(model, datamodule=data, ckpt_path=start)
            trainer.save_checkpoint(last)
            (tested,) = trainer.test(model, datamodule=data, verbose=False)
            with model._with_shipped():
                buffers = [float(b.double().sum()) for b in model.model.buffers()]
            losses = watch.losses[1:] if start is None else watch.losses
            results.setdefault(case, []).append([tested, losses, buffers])
    (Path(out) / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ONE_OF_EACH_KIND, id="one of each kind"),
        pytest.param([*CASES], id="all", marks=pytest.mark.nightly),
    ],
)
def test_the_recorded_values_are_those_of_the_saved_state_and_come_again_after_a_kill(
    cases: list[str], on_two_processes, tmp_path: Path
) -> None:
    on_two_processes(train_and_resume, tmp_path, *cases)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for number, case in enumerate(cases):
        whole, resumed = first[case]
        assert whole == second[case][0] and resumed == second[case][1], f"{case}: the processes differ"
        assert whole == resumed, f"{case}: a killed run differs"
        model, data, trainer = prepared(case, tmp_path)
        content = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        model.load_state_dict(content["state_dict"])
        model.load_state_dict(content.get("averaged_state_dict", {}), strict=False)
        (alone,) = trainer.test(model, datamodule=data, verbose=False)
        assert alone["test/loss"] == pytest.approx(whole[0]["test/loss"], rel=1e-5), case
