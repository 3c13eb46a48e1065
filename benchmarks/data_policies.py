"""How fast CIFAR's batches are made under each policy, against torchvision's loader.

python benchmarks/data_policies.py [--images 10000] [--repeats 9] [--out benchmarks/results/data_policies.md]

Both sides start from the decoded images in memory (the loader's are PIL pictures of one array, as its CIFAR10 makes
them), use as many worker processes as is said, and end with uint8 batches in memory: no normalisation, no cutout. The
loader runs v2 transforms on PIL images: a crop with padding, a flip, and the automatic policy. Ours are the policies of
`augmentation.policies.cifar` without workers, in one thread. They alternate in one run; a pass is one epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import paired_times, provenance, ratio_interval, report
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from augmentation.policies import cifar
from datasets.images import Arrays
from datasets.samples import Samples
from datasets.sampling import EpochSampler

BATCH = 256
# ours, its goal, and torchvision's own on PIL images
POLICIES: dict[str, tuple[str, float | None, Callable[[], nn.Module] | None]] = {
    "Baseline": ("BaselineTransform", 25, None),
    "RandAugment": ("RandAugmentTransform", 6, v2.RandAugment),
    "AutoAugment": ("AutoAugmentTransform", 6, lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
    "TrivialAugment": ("TrivialAugmentTransform", None, v2.TrivialAugmentWide),
    "AugMix": ("AugMixTransform", None, lambda: v2.AugMix(all_ops=False)),
}


class Pictures(Dataset):
    """What torchvision's CIFAR10 does with an array."""

    def __init__(self, images: np.ndarray, transform: Callable[[Any], Any]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def smooth_noise(n: int) -> np.ndarray:
    """(n, 32, 32, 3) uint8: with structure, so that no operation has an easier time than on photographs."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    images = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def torchvisions(images: np.ndarray, automatic: nn.Module | None, workers: int) -> Callable[[], None]:
    """An epoch of the loader with the usual transforms."""
    steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *([automatic] if automatic else [])]
    loader: DataLoader = DataLoader(
        Pictures(images, v2.Compose([*steps, v2.PILToTensor()])),
        batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip

    def epoch() -> None:
        for batch, _ in loader:
            assert batch.dtype == torch.uint8

    return epoch


def ours(images: np.ndarray, policy: Any) -> Callable[[], None]:
    """An epoch of our loader without workers, and the policy's batch part before normalisation."""
    raw = Arrays(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [i % 10 for i in range(len(images))], []
    )
    samples = Samples(raw, None, policy, "augment", 0)
    assert samples.keeps
    loader: DataLoader = DataLoader(samples, batch_size=None, sampler=EpochSampler(len(images), BATCH, 0))

    def epoch() -> None:
        for batch in loader:
            assert policy.augment(batch.input, batch.index, 7).dtype == torch.uint8

    return epoch


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of epochs")
    parser.add_argument("--workers", type=int, default=2, help="of torchvision's loader")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = smooth_noise(options.images)
    lines = [
        "# Batches of CIFAR under each policy\n",
        provenance(),
        f"torchvision's loader: {options.workers} workers, PIL and v2; ours: no worker. {options.images:,} images of "
        f"32x32 in batches of {BATCH}, uint8 at the end; {options.repeats} pairs of epochs, alternating.\n",
        "| policy | torchvision, images/s | ours, images/s | times as fast (95 %) | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in options.policies:
        target, goal, build = POLICIES[name]
        rival = torchvisions(images, build() if build else None, options.workers)
        mine = ours(images, getattr(cifar, target)())
        slow, fast = paired_times(rival, mine, options.repeats, warm_up=1)
        seen = len(images) // BATCH * BATCH
        rates = [f"{seen / float(np.median(times)):,.0f}" for times in (slow, fast)]
        lines.append(
            f"| {name} | {rates[0]} | {rates[1]} | {ratio_interval(slow, fast)} | {f'{goal:g}' if goal else ''} |"
        )
    report("\n".join(lines), options.out)


if __name__ == "__main__":
    main()
