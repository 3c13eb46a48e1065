"""Any pipeline of albumentations as a policy (the extra `albumentations`)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augmentation.policies.base import Policy
from crucible.files import missing
from crucible.options import ConfigError

EXTRA = "pip install -e '.[albumentations]'"
# what makes floats or tensors: the batch part does that, for the whole batch on its device
_DONE_LATER = ("Normalize", "ToFloat", "ToTensorV2", "ToTensor3D")
_SEE = "docs/data.md"


class AlbumentationsTransform(Policy):
    """A list of albumentations' transforms, applied in order to 8-bit images of any number of channels.

        train_transforms:
          _target_: augmentation.policies.albumentations.AlbumentationsTransform
          transforms:
            - {_target_: albumentations.RandomResizedCrop, size: [32, 32]}
            - {_target_: albumentations.HorizontalFlip, p: 0.5}

    The draws of a sample are keyed like those of the other policies: the transforms' own generators, `random` and
    numpy's global one are functions of (seed, epoch, sample).

    Args:
        transforms: the transforms, or one pipeline (`albumentations.Compose`).
        pipeline_file: a pipeline saved by `albumentations.save`, .json or .yaml, instead.
        size: height and width in pixels that the pipeline must arrive at; null: whatever it makes.
        normalisation: mean and std, a value a channel, on the scale 0 to 1.

    Raises:
        ConfigError: where the package is missing, for what is no pipeline, and for transforms that make floats.
    """

    def __init__(
        self,
        *,
        transforms: list[dict] | dict | None = None,  # nodes in a configuration; their objects in Python
        pipeline_file: str | None = None,
        size: Annotated[int | None, "[1, inf)"] = None,
        **normalisation: Any,
    ) -> None:
        super().__init__(**normalisation)
        if (transforms is None) == (pipeline_file is None):
            raise ConfigError(
                f"{type(self).__name__}: give transforms=[...] or pipeline_file=PATH, one of the two", _SEE
            )
        self.size = size
        self.pipeline = _pipeline(transforms) if pipeline_file is None else _pipeline(_saved(pipeline_file))
        for transform in _each(self.pipeline):
            if type(transform).__name__ in _DONE_LATER:
                raise ConfigError(
                    f"transforms: {type(transform).__name__} makes floats or tensors, which is done on the device "
                    "(mean=, std=); leave it out",
                    _SEE,
                )

    def sample(self, image: Image.Image | Tensor) -> Tensor:
        """`image` (PIL, or uint8 (C, H, W)) to uint8 (C, H', W'), as the pipeline makes it.

        Raises:
            ValueError: for input that is not uint8, and output that is not a uint8 image of as many channels.
        """
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim != 3:
                raise ValueError(
                    f"albumentations takes uint8 images (C, H, W), got {image.dtype} {_shape(image)}"
                )
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        else:
            pixels = np.array(image)
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        key = int(torch.randint(2**62, ()))  # of torch's generator, which the caller has keyed
        # one pair of generators for all: transforms that are seeded one by one would draw alike
        self.pipeline.set_random_state(np.random.Generator(np.random.PCG64(key)), random.Random(key))
        made = self.pipeline(image=pixels)["image"]
        if not isinstance(made, np.ndarray) or made.dtype != np.uint8:
            kind = made.dtype if isinstance(made, (np.ndarray, Tensor)) else type(made).__name__
            raise ValueError(
                f"the transforms make {kind}, not 8-bit images; leave out what converts or normalises"
            )
        made = made[..., None] if made.ndim == 2 else made
        if made.ndim != 3 or made.shape[2] != pixels.shape[2]:
            raise ValueError(
                f"the transforms make {_shape(made)} of {_shape(pixels)}: the channels have to stay"
            )
        if self.size is not None and made.shape[:2] != (self.size, self.size):
            raise ValueError(
                f"the transforms make {made.shape[0]}x{made.shape[1]} pixels, size={self.size}: end them with "
                "albumentations.Resize or a crop, or set size=null"
            )
        return torch.from_numpy(np.ascontiguousarray(made.transpose(2, 0, 1)))


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape))


def _library() -> Any:
    try:
        import albumentations
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"AlbumentationsTransform needs the package {error.name}, which is not installed: {EXTRA}"
        ) from error
    return albumentations


def _pipeline(transforms: Any) -> Any:
    """One Compose of what was given."""
    library = _library()
    given = (
        list(transforms)
        if isinstance(transforms, Sequence) and not isinstance(transforms, str)
        else [transforms]
    )
    for transform in given:
        if not isinstance(transform, (library.BasicTransform, library.BaseCompose)):
            raise ConfigError(
                f"transforms: {transform!r} is no transform of albumentations; one is written "
                "{_target_: albumentations.HorizontalFlip, p: 0.5}",
                _SEE,
            )
    return given[0] if len(given) == 1 and isinstance(given[0], library.Compose) else library.Compose(given)


def _saved(file: str) -> Any:
    path, library = Path(file).expanduser(), _library()
    if not path.is_file():
        raise ConfigError(f"pipeline_file={file}: {missing(path, 'file')}", _SEE)
    try:
        # by names of its own register: nothing that the file names is imported
        return library.load(path, data_format="yaml" if path.suffix in (".yaml", ".yml") else "json")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"pipeline_file={file}: no pipeline that albumentations.save wrote ({reason})", _SEE
        ) from error


def _each(transform: Any) -> Iterator[Any]:
    yield transform
    for inner in getattr(transform, "transforms", ()):
        yield from _each(inner)
