"""What temperature scaling is given of a validation."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule

from callbacks.calibration import Outputs


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (4, 4)])
def test_logits_and_targets_of_all_batches_are_kept_in_their_shapes(sizes: tuple[int, ...]) -> None:
    outputs, module = Outputs(), LightningModule()
    batches = [{"logits": torch.randn(n, 5), "target": torch.arange(n)} for n in sizes]
    outputs.on_validation_epoch_start(None, module)  # type: ignore[arg-type]
    for number, batch in enumerate(batches):
        outputs.on_validation_batch_end(None, module, batch, None, number)  # type: ignore[arg-type]
    outputs.on_validation_epoch_end(None, module)  # type: ignore[arg-type]
    assert torch.equal(outputs.logits, torch.cat([batch["logits"] for batch in batches]))
    assert torch.equal(outputs.target, torch.cat([batch["target"] for batch in batches]))
