"""What a table of corruptions comes to in one number; the report reads it without torch.

Hendrycks and Dietterich, arXiv 1903.12261.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# AlexNet's mean error over the five severities of ImageNet-C, published with the benchmark
# (github.com/hendrycks/robustness, "Raw AlexNet errors")
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = ("1", "2", "3", "4", "5")


def averages(record: Mapping[str, Any]) -> dict[str, float]:
    """The means of a record of corruptions; empty where one of the 15 x 5 cells is missing.

    `acc_corrupted` and `ece_corrupted` are plain means over the cells. `mce` is the mean over corruptions of the
    network's error over severities as a share of AlexNet's, only for ImageNet's 1000 classes: for other data there is
    no AlexNet whose errors could be divided by.

    Args:
        record: `cells[corruption][severity][metric]`, and `imagenet`.
    """
    cells = record["cells"]
    table = [[cells.get(name, {}).get(s) for s in SEVERITIES] for name in ALEXNET_ERRORS]
    if any(cell is None for row in table for cell in row):
        return {}

    def means(metric: str) -> list[float]:
        return [sum(cell[metric] for cell in row) / len(row) for row in table]

    found = {f"{metric}_corrupted": sum(means(metric)) / len(table) for metric in ("acc", "ece")}
    if record.get("imagenet"):
        errors = zip(means("acc"), ALEXNET_ERRORS.values(), strict=True)
        found["mce"] = sum((1 - accuracy) / alexnet for accuracy, alexnet in errors) / len(table)
    return found
