"""Made-up data in 1, 2 or 3 dimensions, for trying things out: nothing to download, quick to learn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from crucible.keyed import stream_key
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.images import Arrays


class SyntheticDataModule(BaseDataModule):
    """Fixed random patterns in noise, generated from `split_seed`.

    A sample of class k is pattern k plus normal noise. In regression a sample is `y` times one pattern plus
    noise, with a standard normal target `y`. A quarter as many further samples are the test split.

    Args:
        input_dim: spatial dimensions.
        size: length of each of them.
        num_samples: training samples, validation included.
        noise: standard deviation of the noise; the patterns' is 1.
        kwargs: as for `BaseDataModule`.
    """

    def __init__(
        self,
        *,
        input_dim: Literal[1, 2, 3] = 2,
        size: Annotated[int, "[1, inf)"] = 16,
        num_samples: Annotated[int, "[4, inf)"] = 2000,
        noise: Annotated[float, "[0, inf)"] = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input_dim = input_dim
        self.size = size
        self.num_samples = num_samples
        self.noise = noise

    def setup(self, stage: str) -> None:
        if self.task == "classification" and self.num_classes is None:
            raise ConfigError("data.num_classes is missing: how many classes to make up")
        draw = torch.Generator().manual_seed(stream_key(self.split_seed, "synthetic"))
        count = self.num_classes if self.task == "classification" else 1
        shape = (self.input_channels, *[self.size] * self.input_dim)
        patterns = torch.randn(count or 1, *shape, generator=draw)
        self.train_dataset = self._samples(patterns, self.num_samples, draw)
        self.test_dataset = self._samples(patterns, self.num_samples // 4, draw)

    def _samples(self, patterns: Tensor, count: int, draw: torch.Generator) -> Arrays:
        classes, ones = len(patterns), (1,) * (patterns.ndim - 1)
        noise = self.noise * torch.randn(count, *patterns.shape[1:], generator=draw)
        if self.task == "classification":
            label = torch.arange(count) % classes
            return Arrays(patterns[label] + noise, label.numpy(), [str(i) for i in range(classes)])
        value = torch.randn(count, generator=draw)
        return Arrays(value.view(-1, *ones) * patterns + noise, value.numpy())
