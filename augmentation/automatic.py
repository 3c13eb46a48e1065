"""Which operations an image gets: RandAugment, AutoAugment, TrivialAugment and AugMix, drawn image by image.

Each is a module from uint8 images and uniform draws, some a sample, to uint8 images; `draws` says how many it uses.
The draws come from the policy's keyed stream, so that an image is changed alike in any batch, on any device, by any
number of processes and after a resume. The operations and their strengths are torchvision's: what is published, on
pictures of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from augmentation.operations import Cell, Interpolation, Operations

Library = Literal["torchvision", "deepvoltaire"]
BINS = 31  # magnitudes 0 to 30
_BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
_WITHOUT_STRENGTH = ("Identity", "AutoContrast", "Equalize", "Invert")
_SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *_BLENDS)
NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *_BLENDS, "Posterize", "Solarize",
    "AutoContrast", "Equalize",
)  # fmt: skip


def _evenly(first: float, last: float, bins: int) -> list[float]:
    return [float(value) for value in torch.linspace(first, last, bins, dtype=torch.float32)]


def _bits(most: int, fewer: int, bins: int) -> list[float]:
    return [
        float(value)
        for value in (most - torch.arange(bins, dtype=torch.float32) / ((bins - 1) / fewer)).round()
    ]


def strengths(height: int, width: int, bins: int = BINS) -> dict[str, list[float]]:
    """Of AutoAugment's and RandAugment's operations (arXiv 1805.09501, table 6), from the weakest on."""
    return {
        "ShearX": _evenly(0, 0.3, bins),
        "ShearY": _evenly(0, 0.3, bins),
        "TranslateX": _evenly(0, 150 / 331 * width, bins),
        "TranslateY": _evenly(0, 150 / 331 * height, bins),
        "Rotate": _evenly(0, 30, bins),
        **dict.fromkeys(_BLENDS, _evenly(0, 0.9, bins)),
        "Posterize": _bits(8, 4, bins),
        "Solarize": _evenly(1, 0, bins),
    }


def wide_strengths() -> dict[str, list[float]]:
    """Of TrivialAugment's operations in its wide space (arXiv 2103.10158, table 6)."""
    return {
        "ShearX": _evenly(0, 0.99, BINS),
        "ShearY": _evenly(0, 0.99, BINS),
        "TranslateX": _evenly(0, 32, BINS),
        "TranslateY": _evenly(0, 32, BINS),
        "Rotate": _evenly(0, 135, BINS),
        **dict.fromkeys(_BLENDS, _evenly(0, 0.99, BINS)),
        "Posterize": _bits(8, 6, BINS),
        "Solarize": _evenly(1, 0, BINS),
    }


def augmix_strengths(height: int, width: int) -> dict[str, list[float]]:
    """Of AugMix's operations (arXiv 1912.02781), of ten."""
    return strengths(height, width, 10) | {
        "TranslateX": _evenly(0, width / 3, 10),
        "TranslateY": _evenly(0, height / 3, 10),
        "Posterize": _bits(4, 4, 10),
    }


def deepvoltaire_strengths(height: int, width: int) -> dict[str, list[float]]:
    """Of the operations of github.com/DeepVoltaire/AutoAugment, of ten: AutoAugment's, as PIL's functions take them."""
    levels = strengths(height, width, 10)
    return levels | {
        # whole pixels: the nearest one is taken
        "TranslateX": [float(round(level)) for level in levels["TranslateX"]],
        "TranslateY": [float(round(level)) for level in levels["TranslateY"]],
        "Solarize": [256 / 255 * level for level in levels["Solarize"]],
    }


def _deepvoltaire(name: str, levels: Mapping[str, Sequence[float]], place: int) -> tuple[Cell, Cell]:
    """Both signs of an operation at a strength of ten; all but rotations, which are counter-clockwise, have two."""
    level = levels[name][place] if name in levels else 0.0
    bicubic = name.startswith("Shear")
    other = -level if name in _SIGNED and name != "Rotate" else level
    return Cell(name, level, bicubic), Cell(name, other, bicubic)


def _weighted(
    names: Sequence[str], levels: Mapping[str, Sequence[float]], weights: Sequence[float]
) -> Iterator[tuple[Cell, float]]:
    """All cells of some operations, each operation as likely as another, its strengths by their weights."""
    each = 1 / len(names)
    for name in names:
        if name in _WITHOUT_STRENGTH:
            yield Cell(name), each
            continue
        for level, weight in zip(levels[name], weights, strict=True):
            if weight and name in _SIGNED:
                yield Cell(name, level), each * weight / 2
                yield Cell(name, -level), each * weight / 2
            elif weight:
                yield Cell(name, level), each * weight


def _around(magnitude: int, spread: float) -> list[float]:
    """Chances of the magnitudes 0 to 30: of a normal variable, rounded, what lies outside at the ends."""
    if not spread:
        return [float(place == magnitude) for place in range(BINS)]
    below = [
        0.5 * (1 + math.erf((place + 0.5 - magnitude) / (spread * math.sqrt(2)))) for place in range(BINS - 1)
    ]
    return [after - before for before, after in zip([0.0, *below], [*below, 1.0], strict=True)]


class Automatic(nn.Module):
    """Operations drawn for each image: `(uint8 images, uniform draws) -> uint8 images`.

    Attributes:
        draws: how many it uses a sample.
    """

    draws: int


class Drawn(Automatic):
    """Operations that are drawn independently of each other, by chances that are the same for each.

    Args:
        chances: cells, and how likely each is.
        layers: operations an image gets, one after the other.
        height: of the images, in pixels.
        width: of the images.
        interpolation: where pixels are moved by parts of one.
        fill: level of what was outside of the image.
    """

    upto: Tensor

    def __init__(
        self,
        chances: Sequence[tuple[Cell, float]],
        layers: int,
        height: int,
        width: int,
        interpolation: Interpolation = "nearest",
        fill: int = 0,
    ) -> None:
        super().__init__()
        self.draws = layers
        self.operations = Operations([cell for cell, _ in chances], height, width, interpolation, fill)
        upto = torch.tensor([chance for _, chance in chances], dtype=torch.float64).cumsum(0)
        # a draw is below 1: the last cell needs no bound
        self.register_buffer("upto", (upto / upto[-1])[:-1].float(), persistent=False)

    def cells(self, draws: Tensor) -> Tensor:
        """(N, layers) int64 numbers of cells, of as many uniform draws."""
        return torch.searchsorted(self.upto, draws.contiguous(), right=True)

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 (N, C, H, W) images and their (N, layers) draws to images."""
        return self.operations(images, self.cells(draws))


def rand_augment(
    size: int,
    num_ops: int = 2,
    magnitude: int = 9,
    magnitude_std: float = 0.0,
    prob: float = 1.0,
    interpolation: Interpolation = "nearest",
    fill: int = 0,
) -> Drawn:
    """RandAugment (Cubuk et al., arXiv 1909.13719): some operations of 14, all at one magnitude.

    Args:
        size: height and width of the images.
        num_ops: operations an image gets.
        magnitude: their strength, of 30.
        magnitude_std: its spread (timm's mstd): that of each operation is drawn from a normal distribution and
            rounded to 0 to 30.
        prob: chance of each operation; otherwise nothing happens in its place.
        interpolation: where pixels are moved by parts of one.
        fill: level of what was outside of the image.
    """
    found = _weighted(NAMES, strengths(size, size), _around(magnitude, magnitude_std))
    chances = [(Cell("Identity"), 1 - prob), *((cell, prob * chance) for cell, chance in found)]
    return Drawn(chances, num_ops, size, size, interpolation, fill)


UDA_NAMES = (*(name for name in NAMES if name != "Identity"), "Invert", "Cutout")


def uda_rand_augment(size: int, num_ops: int = 2, prob: float = 0.5, fill: int = 128) -> Drawn:
    """The RandAugment of UDA (Xie et al., arXiv 1904.12848): operations of 15, each at a strength of 1 to 9 of ten.

    As in github.com/jizongFox/uda, and so in MIC-DKFZ/image_classification: of DeepVoltaire's operations all but the
    one that does nothing, and Cutout, whose square of 2 to 20 pixels may hang over the edge.

    Args:
        size: height and width of the images.
        num_ops: operations an image gets.
        prob: chance of each operation; otherwise nothing happens in its place.
        fill: level of what was outside of the image.
    """
    levels = deepvoltaire_strengths(size, size)
    each = prob / len(UDA_NAMES) / 9
    chances = [(Cell("Identity"), 1 - prob)]
    for name in UDA_NAMES:
        for place in range(1, 10):
            if name == "Cutout":
                half = round(20 * place / 9) // 2
                centres = [(row, column) for row in range(size) for column in range(size)]
                chances += [(Cell(name, half, centre=centre), each / size**2) for centre in centres]
            else:
                chances += [(cell, each / 2) for cell in _deepvoltaire(name, levels, place)]
    return Drawn(chances, num_ops, size, size, "nearest", fill)


def trivial_augment(size: int, interpolation: Interpolation = "nearest", fill: int = 0) -> Drawn:
    """TrivialAugment Wide (Müller and Hutter, arXiv 2103.10158): one operation of 14, at any of 31 strengths."""
    chances = list(_weighted(NAMES, wide_strengths(), [1 / BINS] * BINS))
    return Drawn(chances, 1, size, size, interpolation, fill)


# two operations a line, each with its chance and its strength of ten (arXiv 1805.09501, tables 7 and 9)
_SUBPOLICIES = {
    "cifar10": """
        Invert .1 0, Contrast .2 6;         Rotate .7 2, TranslateX .3 9;       Sharpness .8 1, Sharpness .9 3
        ShearY .5 8, TranslateY .7 9;       AutoContrast .5 0, Equalize .9 0;   ShearY .2 7, Posterize .3 7
        Color .4 3, Brightness .6 7;        Sharpness .3 9, Brightness .7 9;    Equalize .6 0, Equalize .5 0
        Contrast .6 7, Sharpness .6 5;      Color .7 7, TranslateX .5 8;        Equalize .3 0, AutoContrast .4 0
        TranslateY .4 3, Sharpness .2 6;    Brightness .9 6, Color .2 8;        Solarize .5 2, Invert 0 0
        Equalize .2 0, AutoContrast .6 0;   Equalize .2 0, Equalize .6 0;       Color .9 9, Equalize .6 0
        AutoContrast .8 0, Solarize .2 8;   Brightness .1 3, Color .7 0;        Solarize .4 5, AutoContrast .9 0
        TranslateY .9 9, TranslateY .7 9;   AutoContrast .9 0, Solarize .8 3;   Equalize .8 0, Invert .1 0
        TranslateY .7 9, AutoContrast .9 0
    """,
    "imagenet": """
        Posterize .4 8, Rotate .6 9;        Solarize .6 5, AutoContrast .6 0;   Equalize .8 0, Equalize .6 0
        Posterize .6 7, Posterize .6 6;     Equalize .4 0, Solarize .2 4;       Equalize .4 0, Rotate .8 8
        Solarize .6 3, Equalize .6 0;       Posterize .8 5, Equalize 1 0;       Rotate .2 3, Solarize .6 8
        Equalize .6 0, Posterize .4 6;      Rotate .8 8, Color .4 0;            Rotate .4 9, Equalize .6 0
        Equalize 0 0, Equalize .8 0;        Invert .6 0, Equalize 1 0;          Color .6 4, Contrast 1 8
        Rotate .8 8, Color 1 2;             Color .8 8, Solarize .8 7;          Sharpness .4 7, Invert .6 0
        ShearX .6 5, Equalize 1 0;          Color .4 0, Equalize .6 0;          Equalize .4 0, Solarize .2 4
        Solarize .6 5, AutoContrast .6 0;   Invert .6 0, Equalize 1 0;          Color .6 4, Contrast 1 8
        Equalize .8 0, Equalize .6 0
    """,
}


def subpolicies(found_on: Literal["cifar10", "imagenet"]) -> list[list[tuple[str, float, int]]]:
    """AutoAugment's 25 pairs of operations: name, chance, strength of ten."""
    pairs = _SUBPOLICIES[found_on].replace("\n", ";").split(";")
    parsed = [[step.split() for step in pair.split(",")] for pair in pairs if pair.strip()]
    return [[(name, float(chance), int(strength)) for name, chance, strength in pair] for pair in parsed]


class AutoAugment(Automatic):
    """AutoAugment (Cubuk et al., arXiv 1805.09501): one of 25 pairs of operations, each with its own chance.

    Args:
        size: height and width of the images.
        found_on: the data that the pairs were found on.
        interpolation: where pixels are moved by parts of one.
        fill: level of what was outside of the image.
        operations: torchvision's, or those of github.com/DeepVoltaire/AutoAugment: shears by PIL's bicubic kernel,
            other moves to the nearest pixel, whole pixels rounded, rotations counter-clockwise only.
    """

    draws = 5  # the pair; chance and sign of each operation
    chances: Tensor

    def __init__(
        self,
        size: int,
        found_on: Literal["cifar10", "imagenet"],
        interpolation: Interpolation = "nearest",
        fill: int = 0,
        operations: Library = "torchvision",
    ) -> None:
        super().__init__()
        as_in_torchvision = operations == "torchvision"
        levels = strengths(size, size, 10) if as_in_torchvision else deepvoltaire_strengths(size, size)
        pairs = subpolicies(found_on)
        cells = [Cell("Identity")]
        for name, _, place in (step for pair in pairs for step in pair):
            if as_in_torchvision:
                level = levels[name][place] if name in levels else 0.0
                cells += [Cell(name, level), Cell(name, -level if name in _SIGNED else level)]
            else:
                cells += _deepvoltaire(name, levels, place)
        self.operations = Operations(cells, size, size, interpolation, fill)
        self.register_buffer(
            "chances",
            torch.tensor([[chance for _, chance, _ in pair] for pair in pairs], dtype=torch.float32),
            persistent=False,
        )

    def cells(self, draws: Tensor) -> Tensor:
        """(N, 2) int64 numbers of cells, of (N, 5) uniform draws."""
        pair = (draws[:, 0] * len(self.chances)).long()
        step = torch.arange(2, device=draws.device)
        cell = 1 + 2 * (2 * pair[:, None] + step) + (draws[:, 3:] < 0.5).long()
        return torch.where(draws[:, 1:3] < self.chances[pair], cell, 0)

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 (N, C, H, W) images and their (N, 5) draws to images."""
        return self.operations(images, self.cells(draws))


class AugMix(Automatic):
    """AugMix (Hendrycks et al., arXiv 1912.02781): a mixture of the image and of chains of operations on it.

    The weights of the chains are drawn from Dirichlet(1, ..., 1), that of their sum from Beta(1, 1), as in the paper.

    Args:
        height: of the images, in pixels.
        width: of the images.
        severity: the largest strength of operations, of ten; uniform up to it.
        mixture_width: chains.
        chain_depth: operations of a chain; 0: 1 to 3, drawn for each.
        all_ops: also the operations that overlap with the corruptions of ImageNet-C: brightness, colour, contrast
            and sharpness, which the paper leaves out.
        interpolation: where pixels are moved by parts of one.
        fill: level of what was outside of the image.
    """

    def __init__(
        self,
        height: int,
        width: int,
        severity: int = 3,
        mixture_width: int = 3,
        chain_depth: int = 0,
        all_ops: bool = False,
        interpolation: Interpolation = "bilinear",
        fill: int = 0,
    ) -> None:
        super().__init__()
        self.mixture_width = mixture_width
        self.chain_depth = chain_depth
        self.layers = chain_depth or 3
        names = [name for name in NAMES if name != "Identity" and (all_ops or name not in _BLENDS)]
        weights = [1 / severity] * severity + [0.0] * (10 - severity)
        found = _weighted(names, augmix_strengths(height, width), weights)
        chances = [(Cell("Identity"), 0.0), *found]  # the first is what a shorter chain has at its end
        self.chains = Drawn(chances, self.layers, height, width, interpolation, fill)
        # a sample's draws: its own weight, bounds between the chains' weights, their lengths, their operations
        self.draws = mixture_width * (2 + self.layers)

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 (N, C, H, W) images and their draws to images."""
        n, width = len(images), self.mixture_width
        share, bounds, depth, rest = draws.split([1, width - 1, width, width * self.layers], dim=1)
        # the spaces between sorted uniform numbers are Dirichlet(1, ..., 1)
        edges = torch.cat((torch.zeros_like(share), bounds.sort(dim=1).values, torch.ones_like(share)), dim=1)
        weights = (edges.diff(dim=1) * (1 - share)).view(n, width, 1, 1, 1)
        cells = self.chains.cells(rest).view(n * width, self.layers)
        if not self.chain_depth:
            place = torch.arange(self.layers, device=images.device)
            cells = torch.where(place < 1 + (depth.reshape(-1, 1) * 3).long(), cells, 0)
        chained = self.chains.operations(images.repeat_interleave(width, dim=0), cells)
        mixture = images * share.view(n, 1, 1, 1)
        for weight, chain in zip(
            weights.unbind(1), chained.view(n, width, *images.shape[1:]).unbind(1), strict=True
        ):
            mixture = mixture + weight * chain
        return mixture.to(torch.uint8)
