"""Automatic augmentation on batches, against torchvision's v2 transforms for tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import nightly
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional._geometry import _affine_grid

from augmentation.automatic import (
    AugMix,
    AutoAugment,
    augmix_strengths,
    deepvoltaire_strengths,
    rand_augment,
    strengths,
    subpolicies,
    trivial_augment,
    uda_rand_augment,
    wide_strengths,
)
from augmentation.operations import GEOMETRIC, Cell, Operations, _grid, inverse_affine
from augmentation.policies import cifar, imagenet
from crucible.keyed import keyed_uniform, stream_key

THEIRS: dict[str, dict] = {
    "RandAugment": v2.RandAugment._AUGMENTATION_SPACE,
    "AutoAugment": v2.AutoAugment._AUGMENTATION_SPACE,
    "TrivialAugment": v2.TrivialAugmentWide._AUGMENTATION_SPACE,
    "AugMix": v2.AugMix._AUGMENTATION_SPACE,
}
AUTOMATIC: dict[str, Callable[[int], nn.Module]] = {
    "RandAugment": rand_augment,
    "RandAugment spread": lambda size: rand_augment(size, 3, 15, 5.0, 0.7, "bilinear", 128),
    "AutoAugment": lambda size: AutoAugment(size, "cifar10"),
    "AutoAugment imagenet": lambda size: AutoAugment(size, "imagenet"),
    "AutoAugment deepvoltaire": lambda size: AutoAugment(
        size, "cifar10", fill=128, operations="deepvoltaire"
    ),
    "RandAugment deepvoltaire": uda_rand_augment,
    "TrivialAugment": trivial_augment,
    "AugMix": lambda size: AugMix(size, size),
}


def varied(channels: int, size: int, n: int = 36) -> torch.Tensor:
    """Noise, smooth pictures, and those with one level, few levels, or a ramp."""
    generator = torch.Generator().manual_seed(channels)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    smooth = torch.rand(n // 2, channels, 4, 4, generator=generator) * 255
    images[: n // 2] = (
        nn.functional.interpolate(smooth, size=(size, size), mode="bilinear").round().to(torch.uint8)
    )
    for place, level in enumerate((0, 77, 255)):
        images[n - 1 - place] = level
    images[n - 4] //= 4
    images[n - 5, 0] = 9
    images[n - 6] = (torch.arange(size) * 255 // (size - 1)).to(torch.uint8)
    return images


def magnitudes(space: dict, name: str, size: int, bins: int) -> list[float]:
    """Of an operation in one of torchvision's spaces, both signs."""
    build, signed = space[name]
    values = build(bins, size, size)
    return [0.0] if values is None else [float(v) * s for v in values for s in ((1, -1) if signed else (1,))]


def reference(
    images: torch.Tensor, cell: Cell, interpolation: str = "nearest", fill: int = 0
) -> torch.Tensor:
    apply = v2.RandAugment()._apply_image_or_video_transform
    return apply(images, *cell[:2], InterpolationMode(interpolation), {torch.Tensor: fill} if fill else {})


def assert_moved_alike(
    output: torch.Tensor, expected: torch.Tensor, cell: Cell, interpolation: str = "nearest"
) -> None:
    """Pixel by pixel the same, but where this processor's matrix product, which torchvision takes, is no plain sum.

    There a pixel's origin differs in its last bit: the nearest pixel may be another one where it lies in the middle
    between two, and a blend of pixels may be rounded to the next level.
    """
    size = output.shape[-1]
    same = torch.ones(size, size, dtype=torch.bool)
    if cell.name in GEOMETRIC:
        matrix = torch.tensor(inverse_affine(cell, size, size)).view(1, 2, 3)
        theirs = _affine_grid(matrix.clone(), size, size, size, size)[0]
        ours = _grid((matrix / (0.5 * size)).view(1, 6), size, size)[0]
        assert (theirs - ours).abs().max() <= 2.0**-22
        same = (theirs == ours).all(dim=-1)
        if interpolation == "nearest":
            place = (ours.double() + 1) * size / 2  # the edges of pixels are whole numbers
            same |= ((place - place.round()).abs() > 1e-5).all(dim=-1)
        else:
            assert ((output.int() - expected.int()).abs() <= 1).all(), cell
    assert torch.equal(output[..., same], expected[..., same]), cell


@pytest.mark.parametrize("space", ["RandAugment", "TrivialAugment"])
@pytest.mark.parametrize(
    "case", [(3, 20, "by_bucket"), (1, 9, "by_bucket"),
             *nightly(*((c, s, f) for c, s in ((3, 32), (1, 32), (3, 33), (3, 64)) for f in ("by_bucket", "by_mask")))]
)  # fmt: skip
def test_every_operation_at_every_strength_and_sign_is_torchvisions(space, case) -> None:
    channels, size, form = case
    images = varied(channels, size)
    cells = [Cell(name, m) for name in THEIRS[space] for m in magnitudes(THEIRS[space], name, size, 31)]
    cells = [*cells, Cell("Invert")]
    operations = Operations(cells, size, size)
    for number, cell in enumerate(cells):
        output = getattr(operations, form)(images, torch.full((len(images), 1), number))
        assert_moved_alike(output, reference(images, cell), cell)


@pytest.mark.parametrize("form", ["by_bucket", "by_mask"])
@pytest.mark.parametrize(
    ("interpolation", "fill"), [("nearest", 0), ("nearest", 128), ("bilinear", 0), ("bilinear", 128)]
)
def test_interpolation_and_fill_are_torchvisions(interpolation, fill, form) -> None:
    images = varied(3, 20)
    space = THEIRS["TrivialAugment"]
    cells = [Cell(name, m) for name in GEOMETRIC for m in magnitudes(space, name, 20, 5)]
    operations = Operations(cells, 20, 20, interpolation, fill)
    for number, cell in enumerate(cells):
        output = getattr(operations, form)(images, torch.full((len(images), 1), number))
        assert_moved_alike(output, reference(images, cell, interpolation, fill), cell, interpolation)


def test_large_pictures_are_moved_without_kept_places(monkeypatch) -> None:
    images, cells = varied(3, 24), [Cell("Rotate", 17.0), Cell("ShearX", -0.3)]
    numbers = torch.arange(len(images))[:, None] % 2
    kept = Operations(cells, 24, 24)(images, numbers)
    monkeypatch.setattr("augmentation.operations.MOST_PLACES", 0)
    assert torch.equal(Operations(cells, 24, 24)(images, numbers), kept)


def test_the_strengths_are_torchvisions() -> None:
    ours = {
        ("RandAugment", 31): strengths(24, 40),
        ("AutoAugment", 10): strengths(24, 40, 10),
        ("TrivialAugment", 31): wide_strengths(),
        ("AugMix", 10): augmix_strengths(24, 40),
    }
    for (space, bins), levels in ours.items():
        theirs = {name: build(bins, 24, 40) for name, (build, _) in THEIRS[space].items()}
        assert levels == {
            name: [float(v) for v in values] for name, values in theirs.items() if values is not None
        }
    for found_on, policy in (
        ("cifar10", v2.AutoAugmentPolicy.CIFAR10),
        ("imagenet", v2.AutoAugmentPolicy.IMAGENET),
    ):
        expected = [[(name, p, m or 0) for name, p, m in pair] for pair in v2.AutoAugment(policy)._policies]
        assert subpolicies(found_on) == expected


def drawn(automatic: nn.Module, n: int) -> Counter[tuple[str, float]]:
    """The operations that images get, with their strengths to six digits."""
    cells = automatic.cells(keyed_uniform(stream_key("test"), torch.arange(n), automatic.draws))
    return Counter(
        (c.name, round(c.magnitude, 6))
        for c in (automatic.operations.cells[i] for i in cells.flatten().tolist())
    )


def drawn_by_torchvision(transform: nn.Module, n: int) -> Counter[tuple[str, float]]:
    seen: Counter[tuple[str, float]] = Counter()

    def note(image, name, magnitude, interpolation, fill):
        seen[name, round(magnitude, 6)] += 1
        return image

    transform._apply_image_or_video_transform = note
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    torch.manual_seed(0)
    for _ in range(n):
        transform(image)
    return seen


@pytest.mark.parametrize("name", ["RandAugment", "AutoAugment", "AutoAugment imagenet", "TrivialAugment"])
def test_operations_are_drawn_as_often_as_by_torchvision(name) -> None:
    theirs = {
        "RandAugment": v2.RandAugment(),
        "AutoAugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        "AutoAugment imagenet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
        "TrivialAugment": v2.TrivialAugmentWide(),
    }[name]
    n = 4000
    a, b = drawn(AUTOMATIC[name](32), 4 * n), drawn_by_torchvision(theirs, n)
    # where nothing happens, torchvision's AutoAugment calls nothing
    nothing = ("Identity", 0.0)
    if "Auto" in name:
        a.pop(nothing)
    cells = sorted(set(a) | set(b))
    counts = np.array([[a[cell], b[cell]] for cell in cells])
    if name == "TrivialAugment":  # 600 cells: by operation, and by strength
        for part in (0, 1):
            groups = Counter[object](), Counter[object]()
            for cell, pair in zip(cells, counts, strict=True):
                for group, count in zip(groups, pair, strict=True):
                    group[(cell[0], round(cell[1], 1)) if part else cell[0]] += int(count)
            table = np.array([[groups[0][k], groups[1][k]] for k in sorted(groups[0], key=str)])
            assert stats.chi2_contingency(table[table.sum(1) > 40]).pvalue > 1e-3
        assert set(b) <= set(a)
    else:
        assert set(a) == set(b)
        assert stats.chi2_contingency(counts).pvalue > 1e-3


def by_pil(picture: Image.Image, cell: Cell) -> Image.Image:
    """An operation of github.com/DeepVoltaire/AutoAugment, by the functions of PIL that it calls."""
    name, m, size, grey = cell.name, cell.magnitude, picture.size, (128,) * 3
    if name.startswith("Shear"):
        matrix = (1, m, 0, 0, 1, 0) if name == "ShearX" else (1, 0, 0, m, 1, 0)
        return picture.transform(size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=grey)
    if name.startswith("Translate"):  # the picture moves against the numbers of the matrix
        matrix = (1, 0, -m, 0, 1, 0) if name == "TranslateX" else (1, 0, 0, 0, 1, -m)
        return picture.transform(size, Image.AFFINE, matrix, fillcolor=grey)
    if name == "Rotate":
        turned = picture.convert("RGBA").rotate(m)
        return Image.composite(turned, Image.new("RGBA", size, (128,) * 4), turned).convert("RGB")
    if name == "Cutout":
        (row, column), half = cell.centre, cell.magnitude
        box = [
            max(0, column - half),
            max(0, row - half),
            min(size[0], column + half),
            min(size[1], row + half),
        ]
        covered = picture.copy()
        covered.paste((125, 122, 113), box)
        return covered
    functions = {
        "Posterize": lambda: ImageOps.posterize(picture, int(m)),
        "Solarize": lambda: ImageOps.solarize(picture, 255 * m),
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Invert": lambda: ImageOps.invert(picture),
    }
    return functions[name]() if name in functions else getattr(ImageEnhance, name)(picture).enhance(1 + m)


@pytest.mark.parametrize("form", ["by_bucket", "by_mask"])
def test_deepvoltaires_operations_are_pils_to_a_level_and_to_the_neighbours_of_a_turn(form) -> None:
    images = varied(3, 32, 12)
    table = uda_rand_augment(32).operations.cells
    holes = [cell for cell in table if cell.name == "Cutout"]
    moves = [cell for cell in table if cell.name not in ("Cutout", "Identity")]
    assert len(moves) == 9 * 14 * 2 and {cell.magnitude for cell in holes} == {1, 2, 3, 4, 5, 6, 8, 9, 10}
    assert {cell.centre for cell in holes} == {(row, column) for row in range(32) for column in range(32)}
    cells = list(dict.fromkeys([*moves[::3], *holes[:: 32 * 33 + 7]]))
    exact = {"TranslateX", "TranslateY", "Posterize", "Solarize", "Equalize", "Invert", "Cutout"}
    operations = Operations(cells, 32, 32, "nearest", 128)
    elsewhere = Counter[str]()
    for number, cell in enumerate(cells):
        output = getattr(operations, form)(images, torch.full((len(images), 1), number))
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        expected = np.stack([np.asarray(by_pil(picture, cell)) for picture in pictures])
        away = (output.permute(0, 2, 3, 1).int() - torch.from_numpy(expected).int()).abs()
        assert cell.name not in exact or not away.any(), cell
        elsewhere[cell.name] += int((away > 1).sum())
    assert {name for name, count in elsewhere.items() if count} <= {"Rotate", "ShearX", "ShearY"}
    assert max(elsewhere.values()) < 1e-3 * images.numel() * 6  # halves, in float32 and in PIL's fixed point


def test_uda_draws_each_of_its_operations_and_strengths_as_often_and_turns_one_way() -> None:
    automatic = uda_rand_augment(8, num_ops=2, prob=0.5)
    seen = drawn(automatic, 60_000)
    nothing = seen.pop(("Identity", 0.0))
    assert nothing / 120_000 == pytest.approx(0.5, abs=0.01)
    by_name, by_level = Counter[str](), Counter[float]()
    for (name, level), count in seen.items():
        by_name[name] += count
        if name == "Rotate":
            by_level[level] += count
    assert set(by_name) == {
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
        "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert", "Cutout",
    }  # fmt: skip
    assert stats.chisquare(list(by_name.values())).pvalue > 1e-3
    assert sorted(by_level) == pytest.approx([30 * place / 9 for place in range(1, 10)], abs=1e-4)
    assert stats.chisquare(list(by_level.values())).pvalue > 1e-3
    assert deepvoltaire_strengths(32, 32)["TranslateX"] == [0, 2, 3, 5, 6, 8, 10, 11, 13, 15]


def test_autoaugment_with_deepvoltaires_operations_has_the_same_pairs_and_chances() -> None:
    ours, theirs = AUTOMATIC["AutoAugment"](32), AUTOMATIC["AutoAugment deepvoltaire"](32)
    assert torch.equal(ours.chances, theirs.chances)
    a, b = (automatic.operations.cells for automatic in (ours, theirs))
    assert [cell.name for cell in a] == [cell.name for cell in b]
    assert {cell.magnitude > 0 for cell in b if cell.name == "Rotate"} == {True}
    assert {cell.bicubic for cell in b if cell.name.startswith("Shear")} == {True}


def test_spread_and_chance_of_rand_augment() -> None:
    automatic = rand_augment(32, num_ops=1, magnitude=20, magnitude_std=4.0, prob=0.6)
    seen = drawn(automatic, 40_000)
    total = sum(seen.values())
    assert seen["Identity", 0.0] / total == pytest.approx(0.4 + 0.6 / 14, abs=0.01)
    levels = [float(v) for v in torch.linspace(0, 30, 31)]
    angles = np.concatenate([[abs(m)] * count for (name, m), count in seen.items() if name == "Rotate"])
    assert set(angles) <= set(levels)
    assert angles.mean() == pytest.approx(20, abs=0.3)
    assert angles.std() == pytest.approx(4, abs=0.3)
    assert {m for name, m in drawn(rand_augment(32, magnitude=0), 2000) if name == "Rotate"} == {0.0}


def test_a_batch_sees_many_operations() -> None:
    for name in ("RandAugment", "TrivialAugment", "AutoAugment"):
        assert len({operation for operation, _ in drawn(AUTOMATIC[name](32), 512)}) >= 12


@pytest.mark.parametrize("name", list(AUTOMATIC))
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_changed_alike_in_any_batch_and_by_both_forms(name, channels, monkeypatch) -> None:
    automatic, images = AUTOMATIC[name](16), varied(channels, 16)
    images = torch.cat((images, images))
    draws = keyed_uniform(5, torch.arange(len(images)), automatic.draws)
    whole = automatic(images, draws)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape
    for place in (0, 13, 40):
        assert torch.equal(automatic(images[[place]], draws[[place]])[0], whole[place])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(automatic(images[order], draws[order]), whole[order])
    monkeypatch.setattr(Operations, "forward", Operations.by_mask)
    assert torch.equal(automatic(images, draws), whole)


def test_augmix_mixes_the_image_and_its_chains() -> None:
    """By torchvision's formula, with what was drawn."""
    automatic, images = AugMix(16, 16, chain_depth=2), varied(3, 16)
    draws = keyed_uniform(9, torch.arange(len(images)), automatic.draws)
    cells = automatic.chains.cells(draws[:, -6:]).view(-1, 3, 2)
    table = automatic.chains.operations.cells
    for image, own, numbers, result in zip(images, draws, cells, automatic(images, draws), strict=True):
        edges = torch.cat((torch.zeros(1), own[1:3].sort().values, torch.ones(1)))
        mixture = own[0] * image
        for weight, chain in zip(edges.diff() * (1 - own[0]), numbers, strict=True):
            changed = image[None]
            for number in chain.tolist():
                if table[number].name in GEOMETRIC:  # as said above, which a later operation may enlarge
                    changed = Operations([table[number]], 16, 16, "bilinear")(
                        changed, torch.zeros(1, 1).long()
                    )
                else:
                    changed = reference(changed, table[number])
            mixture += weight * changed[0]
        assert torch.equal(mixture.to(torch.uint8), result)


def test_augmix_draws_its_weights_lengths_and_strengths_as_published() -> None:
    automatic, n = AugMix(32, 32), 4000
    draws = keyed_uniform(2, torch.arange(n), automatic.draws)
    seen: list[torch.Tensor] = []
    automatic.chains.operations.forward = lambda images, cells: (seen.append(cells), images)[1]  # type: ignore[method-assign]
    automatic(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), draws)
    lengths = (seen[0] > 0).sum(1)
    assert stats.chisquare(lengths.bincount(minlength=4)[1:].numpy()).pvalue > 1e-3
    table = automatic.chains.operations.cells
    names = Counter(table[i].name for i in seen[0].flatten().tolist() if i)
    assert set(names) == {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Posterize", "Solarize",
                          "AutoContrast", "Equalize"}  # fmt: skip
    assert stats.chisquare(list(names.values())).pvalue > 1e-3
    angles = Counter(
        round(table[i].magnitude, 3) for i in seen[0].flatten().tolist() if table[i].name == "Rotate"
    )
    assert {abs(a) for a in angles} == {0.0, 3.333, 6.667}
    first = draws[:, 1:3].min(1).values.double().numpy()  # a part of Dirichlet(1, 1, 1) is Beta(1, 2)
    assert stats.kstest(first, stats.beta(1, 2).cdf).pvalue > 1e-3
    assert {c.name for c in AugMix(32, 32, all_ops=True).chains.operations.cells} >= {
        "Brightness",
        "Sharpness",
    }


@pytest.mark.parametrize("module", [cifar, imagenet])
@pytest.mark.parametrize("name", ["RandAugment", "AutoAugment", "TrivialAugment", "AugMix"])
def test_the_policy_changes_images_by_key_and_number_alone(module, name) -> None:
    policy = getattr(module, f"{name}Transform")(size=16)
    images, index = varied(3, 16), torch.arange(36) + 1000
    whole = policy.batch(images, index, stream_key(0, 3))
    assert torch.equal(policy.batch(images[5:9], index[5:9], stream_key(0, 3)), whole[5:9])
    assert not torch.equal(policy.batch(images, index, stream_key(0, 4)), whole)
    plain = module.BaselineTransform(size=16)
    assert (policy.augment(images, index, 3) != plain.augment(images, index, 3)).flatten(1).any(
        1
    ).float().mean() > 0.5


@pytest.mark.parametrize("name", ["RandAugment", "AutoAugment", "TrivialAugment", "AugMix"])
def test_images_in_memory_need_no_worker(name) -> None:
    policy = getattr(cifar, f"{name}Transform")()
    assert policy.keeps(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    assert not policy.keeps(torch.zeros(5, 3, 36, 36, dtype=torch.uint8))


@pytest.mark.parametrize("name", nightly("RandAugment", "AutoAugment", "TrivialAugment", "AugMix"))
def test_the_device_form_compiles_to_one_graph_with_nearly_the_results_of_the_other(name) -> None:
    torch._dynamo.reset()
    automatic, images = AUTOMATIC[name](8), varied(3, 8)
    draws = keyed_uniform(5, torch.arange(len(images)), automatic.draws)
    compiled = torch.compile(automatic, fullgraph=True)
    difference = (compiled(images, draws).int() - automatic(images, draws).int()).abs()
    assert (difference > 1).float().mean() < 0.05  # inductor reorders: augmentation/operations.py


def test_an_option_out_of_place_is_said_to_have_no_use() -> None:
    assert cifar.AutoAugmentTransform(magnitude=5).unused_options == {"magnitude": 5}
    assert cifar.TrivialAugmentTransform(num_ops=3, fill=7).unused_options == {"num_ops": 3}
    assert cifar.RandAugmentTransform(severity=2, prob=0.5).unused_options == {"severity": 2}
    assert cifar.AutoAugmentTransform(operations="deepvoltaire", fill=128).unused_options == {}
    assert cifar.RandAugmentTransform(operations="deepvoltaire", magnitude=9, prob=0.5).unused_options == {
        "magnitude": 9
    }
    assert imagenet.AutoAugmentTransform(operations="deepvoltaire").unused_options == {
        "operations": "deepvoltaire"
    }
    assert cifar.AugMixTransform(severity=2, all_ops=True, interpolation="nearest").unused_options == {}
