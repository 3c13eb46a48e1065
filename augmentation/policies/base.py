"""What a policy is: a sample part, run per image in the loader's workers, and a batch part on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as v2F

from augmentation.automatic import (
    AugMix,
    AutoAugment,
    Automatic,
    Library,
    rand_augment,
    trivial_augment,
    uda_rand_augment,
)
from augmentation.operations import Interpolation
from crucible.corrections import Correction
from crucible.keyed import keyed_uniform
from crucible.options import ConfigError
from crucible.pictures import Shape, grey

Positive = Annotated[list[float] | None, "(0, inf)", "standard deviation a channel, in units of mean"]
Finite = Annotated[list[float] | None, "(-inf, inf)", "a value a channel"]
Pixels = Annotated[int | None, "[0, inf)"]
SHIFT_AND_CUTOUT = 5  # a sample's draws for these; what comes later draws behind them


class Policy(nn.Module):
    """The preparation of one data set's input. This one only converts to float32 and normalises.

    Args:
        mean: subtracted, a value a channel (or one for all); on the scale 0 to 1 for uint8 input.
        std: divided by, on the same scale. null for either: 0 and 1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, *, mean: Finite = None, std: Positive = None) -> None:
        super().__init__()
        self.channels_given = max(len(mean or ()), len(std or ()))
        scale = 1 / torch.tensor(std or [1.0], dtype=torch.float64)
        shift = -scale * torch.tensor(mean or [0.0], dtype=torch.float64)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)
        # options that were given but that this policy has no use for; BaseDataModule.check refuses them
        self.unused_options: dict[str, Any] = {}

    def sample(self, image: Image.Image | Tensor) -> Tensor:
        """The part done for each sample on the CPU: uint8 (C, H, W) for images, other tensors as they are.

        Randomness comes from torch's default generator, which the caller has keyed.
        """
        return image if isinstance(image, Tensor) else v2F.pil_to_tensor(image)

    @property
    def draws(self) -> int | None:
        """Random numbers that `from_draws` takes for a sample; None: `sample` alone makes it, with draws of its own."""
        return 0 if type(self).sample is Policy.sample else None

    first_draw = 0  # in the row of a sample's random numbers: before it are those of the batch part

    def from_draws(self, image: Image.Image | Tensor, draws: Sequence[float]) -> Tensor:
        """As `sample`, from `draws`, uniform in [0, 1): a loader makes those of a whole batch at once."""
        return self.sample(image)

    def large_enough(self, draws: Sequence[float]) -> Callable[[Shape], Shape] | None:
        """Where a picture may be decoded smaller than it is: from its shape, the least of which `from_draws` with
        these draws enlarges nothing. None: it is decoded whole.
        """
        return None

    def keeps(self, input: Tensor) -> bool:
        """Whether `sample` would hand on such a tensor unchanged, so that a loader may skip it."""
        return type(self).sample is Policy.sample

    def batch(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """The part done for the whole batch on its device; compiles with fullgraph.

        Args:
            input: (N, C, ...) uint8, 0 to 255, or float.
            index: (N,) int64, `Batch.visit`, for per-sample randomness.
            key: of the epoch; a 0-dimensional int64 tensor keeps compiled code from recompiling.

        Returns:
            float32 of the shape of `input`, or of the policy's output size.
        """
        return self.normalize(input)

    def forward(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """As `batch`; what `compile` compiles."""
        return self.batch(input, index, key)

    def normalize(self, input: Tensor) -> Tensor:
        """`(input - mean) / std` in float32; uint8 is divided by 255 first."""
        if self.channels_given > 1 and input.shape[1] != self.channels_given:
            raise ValueError(f"mean and std have {self.channels_given} channels, the input {input.shape[1]}")
        shape = (-1,) + (1,) * (input.ndim - 2)
        scale = self.scale / 255 if input.dtype == torch.uint8 else self.scale
        return (input.float() * scale.view(shape)).add_(self.shift.view(shape))


class ImagePolicy(Policy):
    """A policy for 2-D images. A subclass says in `defaults` which options it uses, and builds `transform`.

    The sample part crops and resizes (`resample`), on tensors, so that it is the same whatever decoded the picture;
        shifts, flips, the operations of automatic augmentation and cutout act on the batch, at a tenth to a hundredth
        of the cost per image. A policy that builds a `transform` has that as its sample part instead.

        Args:
            own: the options of the subclass by name; None means the policy's own default.
            size: height and width of the output in pixels.
            channels: 1 makes grey images, 3 colour ones; null leaves them as they come.
            normalisation: mean and std, a value a channel, on the scale 0 to 1.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    @property
    def crop_draws(self) -> int:
        """Random numbers that `resample` takes."""
        return 0

    def __init__(
        self,
        own: Mapping[str, Any],
        /,
        *,
        size: Annotated[int, "[1, inf)"],
        channels: Literal[1, 3] | None = None,
        **normalisation: Any,
    ) -> None:
        super().__init__(**normalisation)
        self.size = size
        self.channels = channels
        given = {name: value for name, value in own.items() if value is not None}
        self.unused_options = {n: v for n, v in given.items() if n not in self.defaults and v}
        self.options = self.defaults | {n: v for n, v in given.items() if n in self.defaults}
        self.cutout_size: int = self.options.get("cutout_size", 0)
        self.shift_by, self.flip_chance, self.vertical_flip_chance = 0, 0.0, 0.0
        self.transform: Callable[[Any], Any] | None = self.build_transform()
        self.automatic: Automatic | None = self.build_automatic()
        self.automatic_draws = 0 if self.automatic is None else self.automatic.draws
        self.first_draw = SHIFT_AND_CUTOUT + self.automatic_draws + (self.vertical_flip_chance > 0)

    def build_automatic(self) -> Automatic | None:
        """What is drawn for each image, in the batch part."""
        return None

    def build_transform(self) -> Callable[[Any], Any] | None:
        """The sample part on a PIL image; None: `resample`."""
        return None

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size): the whole picture resized.

        Args:
            pixels: of the picture.
            draws: `crop_draws` numbers, uniform in [0, 1).
        """
        return resized(pixels, self.size, self.size)

    def shift_and_flip_batch(self) -> None:
        """Let the batch part do `padding`, `flip` and `vertical_flip`."""
        self.shift_by, self.flip_chance = self.options.get("padding", 0), self.options.get("flip", 0.0)
        self.vertical_flip_chance = self.options.get("vertical_flip", 0.0)

    def sample(self, image: Image.Image | Tensor) -> Tensor:
        """`image` (PIL, or uint8 (C, H, W)) to uint8 (channels, size, size)."""
        if self.transform is None:
            return self.from_draws(image, torch.rand(self.crop_draws, dtype=torch.float32).tolist())
        # always by PIL: torchvision's results on PIL images and on tensors differ
        picture = self._with_channels(v2F.to_pil_image(image) if isinstance(image, Tensor) else image)
        return v2F.pil_to_tensor(self.transform(picture))

    @property
    def draws(self) -> int | None:
        whole = self.transform is None and type(self).sample is ImagePolicy.sample
        return self.crop_draws if whole else None

    def from_draws(self, image: Image.Image | Tensor, draws: Sequence[float]) -> Tensor:
        return self.resample(self._pixels(image), draws)

    def _pixels(self, image: Image.Image | Tensor) -> Tensor:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or len(image) not in (1, 3):
            picture = v2F.to_pil_image(image) if isinstance(image, Tensor) else image
            return v2F.pil_to_tensor(self._with_channels(picture))
        if self.channels is None or len(image) == self.channels:
            return image
        return grey(image) if self.channels == 1 else image.expand(3, -1, -1)

    def _with_channels(self, picture: Image.Image) -> Image.Image:
        if self.channels is None or len(picture.getbands()) == self.channels:
            return picture
        return picture.convert("L" if self.channels == 1 else "RGB")

    def keeps(self, input: Tensor) -> bool:
        if self.transform is not None or input.dtype != torch.uint8:
            return False
        return input.shape[-2:] == (self.size, self.size) and self.channels in (None, input.shape[-3])

    def batch(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """uint8 (N, C, size, size) to normalised float32 of the same shape, augmented and cut out."""
        output = self.normalize(self.augment(input, index, key))
        if not self.cutout_size:
            return output
        draws = keyed_uniform(key, index, SHIFT_AND_CUTOUT)
        return cutout(output, draws[:, 3:], self.cutout_size)

    def augment(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """uint8 (N, C, size, size) to the same: shifted, flipped, and changed by the drawn operations."""
        if not (self.shift_by or self.flip_chance or self.vertical_flip_chance or self.automatic is not None):
            return input
        draws = keyed_uniform(key, index, self.first_draw)
        if self.shift_by or self.flip_chance:
            input = shift_and_flip(input, draws[:, :3], self.shift_by, self.flip_chance)
        behind = SHIFT_AND_CUTOUT + self.automatic_draws
        if self.vertical_flip_chance:
            upside_down = draws[:, behind, None, None, None] < self.vertical_flip_chance
            input = torch.where(upside_down, input.flip(2), input)
        if self.automatic is not None:
            input = self.automatic(input, draws[:, SHIFT_AND_CUTOUT:behind])
        return input


class PhotographPolicy(ImagePolicy):
    """A policy for colour images, which a mirror image and other colours leave what they are.

    Args:
        own: the options of the subclass by name.
        flip: probability of the mirror image.
        vertical_flip: probability of an image upside down.
        cutout_size: side of the square that is cut out, in pixels (paper: 16 for CIFAR-10, 8 for CIFAR-100).
        num_ops: operations of RandAugment that an image gets.
        magnitude: strength of RandAugment's operations, of 30.
        magnitude_std: its spread, drawn for each operation and rounded to 0 to 30 (timm's mstd, on its scale of 10).
        prob: chance of each of RandAugment's operations.
        severity: largest strength of AugMix's operations, of 10.
        mixture_width: chains that AugMix mixes.
        chain_depth: operations of a chain; 0: 1 to 3, drawn for each.
        all_ops: AugMix with brightness, colour, contrast and sharpness, which its paper leaves out as they overlap
            with the corruptions of ImageNet-C.
        interpolation: between pixels: where pictures are resized (bilinear, bicubic, or random: one of the two, drawn
            for each), and where the automatic policies move pixels by parts of one (nearest, bilinear). Given, one
            value is for both, save that nearest is for the latter alone; null: bilinear, there nearest.
        fill: level of what was outside of the image there, 0 to 255.
        operations: whose operations AutoAugment and RandAugment take: torchvision's, or those of
            github.com/DeepVoltaire/AutoAugment (bicubic shears; `fill` there is 128), which RandAugment takes as UDA
            does: 15 of them, Invert and a cutout among them, each at a strength of 1 to 9 of 10 (`prob` there is 0.5).
        common: what every image policy takes.
    """

    def __init__(
        self,
        own: Mapping[str, Any],
        /,
        *,
        flip: Annotated[float | None, "[0, 1]"] = None,
        vertical_flip: Annotated[float | None, "[0, 1]"] = None,
        cutout_size: Pixels = None,
        num_ops: Annotated[int | None, "[1, 16]"] = None,
        magnitude: Annotated[int | None, "[0, 30]"] = None,
        magnitude_std: Annotated[float | None, "[0, inf)"] = None,
        prob: Annotated[float | None, "[0, 1]"] = None,
        severity: Annotated[int | None, "[1, 10]"] = None,
        mixture_width: Annotated[int | None, "[1, 16]"] = None,
        chain_depth: Annotated[int | None, "[0, 16]"] = None,
        all_ops: bool | None = None,
        interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "random"] | None = None,
        fill: Annotated[int | None, "[0, 255]"] = None,
        operations: Library | None = None,
        **common: Any,
    ) -> None:
        shared = {
            "flip": flip, "vertical_flip": vertical_flip, "cutout_size": cutout_size, "num_ops": num_ops,
            "magnitude": magnitude, "magnitude_std": magnitude_std, "prob": prob, "severity": severity,
            "mixture_width": mixture_width, "chain_depth": chain_depth, "all_ops": all_ops,
            "interpolation": interpolation, "fill": fill, "operations": operations,
        }  # fmt: skip
        super().__init__({**own, **shared}, **common)
        if self.options.get("operations") == "deepvoltaire":  # which fix these themselves
            fixed = {"interpolation": interpolation, "magnitude": magnitude, "magnitude_std": magnitude_std}
            self.unused_options |= {name: value for name, value in fixed.items() if value is not None}

    def chosen(self, *names: str) -> dict[str, Any]:
        """Options by name, and those of resampling."""
        if (interpolation := self.options["interpolation"]) not in (known := get_args(Interpolation)):
            raise ConfigError(
                f"interpolation={interpolation}: {type(self).__name__}'s operations take {' or '.join(known)}",
                "docs/data.md",
            )
        return {name: self.options[name] for name in (*names, "interpolation", "fill")}


FLIPS = {"flip": 0.5, "vertical_flip": 0.0}
RESAMPLING = {"interpolation": "nearest", "fill": 0}
RAND_AUGMENT = {"num_ops": 2, "magnitude": 9, "magnitude_std": 0.0, "prob": 1.0, **RESAMPLING}
AUGMIX = {
    "severity": 3, "mixture_width": 3, "chain_depth": 0, "all_ops": False, "interpolation": "bilinear", "fill": 0,
}  # fmt: skip
ON_BATCHES = Correction(
    "data.module.train_transforms._target_", 2, lambda config: True,
    "its operations were those for PIL images, whose pixels differ, and drawn otherwise",
)  # fmt: skip


class AutomaticAutoAugment(PhotographPolicy):
    """A policy with AutoAugment."""

    corrections: ClassVar[tuple[Correction, ...]] = (ON_BATCHES,)
    found_on: ClassVar[Literal["cifar10", "imagenet"]]

    def build_automatic(self) -> Automatic:
        return AutoAugment(
            self.size,
            self.found_on,
            **self.chosen(),
            operations=self.options.get("operations", "torchvision"),
        )


class AutomaticRandAugment(PhotographPolicy):
    """A policy with RandAugment."""

    corrections: ClassVar[tuple[Correction, ...]] = (ON_BATCHES,)

    def build_automatic(self) -> Automatic:
        if self.options.get("operations") == "deepvoltaire":
            num_ops, prob, fill = (self.options[name] for name in ("num_ops", "prob", "fill"))
            return uda_rand_augment(self.size, num_ops, prob, fill)
        return rand_augment(self.size, **self.chosen("num_ops", "magnitude", "magnitude_std", "prob"))


class AutomaticTrivialAugment(PhotographPolicy):
    """A policy with TrivialAugment."""

    def build_automatic(self) -> Automatic:
        return trivial_augment(self.size, **self.chosen())


class AutomaticAugMix(PhotographPolicy):
    """A policy with AugMix."""

    def build_automatic(self) -> Automatic:
        chosen = self.chosen("severity", "mixture_width", "chain_depth", "all_ops")
        return AugMix(self.size, self.size, **chosen)


def resized(
    pixels: Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """uint8 (C, H, W) at another size, with antialias, by the kernel that torchvision takes for tensors.

    PIL's resize of the same name differs by one level here and there.
    """
    if pixels.shape[1:] == (height, width):
        return pixels
    batch = pixels[None]
    if (
        pixels.stride(0) == 1
    ):  # the kernel would turn a crop whose channels lie together into one where they lie apart
        batch = batch.contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(height, width), mode=mode, antialias=True)[0]


def shift_and_flip(input: Tensor, draws: Tensor, by: int, flip_chance: float) -> Tensor:
    """Shift each image by up to `by` pixels along each axis, filling with 0, and mirror it left to right.

    The same as padding by `by`, a random crop of the original size and a random flip.

    Args:
        input: (N, C, H, W).
        draws: (N, 3) uniform in [0, 1): rows, columns, flip.
        by: pixels.
        flip_chance: probability of the mirror image.
    """
    n, c, h, w = input.shape
    if by == 0:
        mirrored = draws[:, 2] < flip_chance
        if (
            input.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # a third of the time of the other form
            output = torch.empty_like(input)
            for image, into, mirror in zip(input, output, mirrored.tolist(), strict=True):
                into.copy_(image.flip(2) if mirror else image)
            return output
        return torch.where(mirrored[:, None, None, None], input.flip(3), input)
    offset = (draws[:, :2] * (2 * by + 1)).long()
    x = torch.arange(w, device=input.device)
    rows = offset[:, :1] + torch.arange(h, device=input.device)
    columns = offset[:, 1:] + torch.where(draws[:, 2:3] < flip_chance, w - 1 - x, x)
    padded = F.pad(input, (by, by, by, by)).reshape(n, c, -1)
    place = rows[:, :, None] * (w + 2 * by) + columns[:, None, :]
    return padded.gather(2, place.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)


def cutout(input: Tensor, draws: Tensor, size: int) -> Tensor:
    """Set a square of each image to 0, the mean colour after normalisation.

    DeVries and Taylor, arXiv 1708.04552. The centre is uniform over the image: the square may hang over
    its edge.

    Args:
        input: (N, C, H, W) float.
        draws: (N, 2) uniform in [0, 1): row and column of the centre.
        size: side of the square in pixels.
    """

    def inside(length: int, draw: Tensor) -> Tensor:
        start = (draw[:, None] * length).long() - size // 2
        position = torch.arange(length, device=input.device)
        return (position >= start) & (position < start + size)

    rows, columns = inside(input.shape[2], draws[:, 0]), inside(input.shape[3], draws[:, 1])
    # masked_fill would return channels_last input in another memory format
    return input * ~(rows[:, :, None] & columns[:, None, :])[:, None]
