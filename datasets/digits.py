"""The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships: nothing to download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from datasets.base_datamodule import BaseDataModule
from datasets.images import Arrays, with_channels

TEST_FRACTION = 0.2


class DigitsDataModule(BaseDataModule):
    """Ten classes, grey. A stratified fifth, the same for every seed, is the test split.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (its test part).
    """

    def setup(self, stage: str) -> None:
        digits = load_digits()
        # 0 to 16 in the source
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
        raw = Arrays(
            with_channels(images, self.input_channels),
            digits.target,
            [str(name) for name in digits.target_names],
        )
        self.hold_out_test(raw, TEST_FRACTION)
