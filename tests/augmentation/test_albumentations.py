"""albumentations: any pipeline, keyed by sample, 8-bit images of any channel count in and out, refusals in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from augmentation.policies.albumentations import AlbumentationsTransform
from crucible.keyed import keyed_rng
from crucible.options import ConfigError
from crucible.trust import judge

A = pytest.importorskip("albumentations")

TARGET = "augmentation.policies.albumentations.AlbumentationsTransform"
NODES: list[dict[str, Any]] = [
    {"_target_": "albumentations.RandomCrop", "height": 8, "width": 8},
    {"_target_": "albumentations.OneOf", "p": 1.0, "transforms": [
        {"_target_": "albumentations.HorizontalFlip", "p": 1.0}, {"_target_": "albumentations.GaussNoise", "p": 1.0},
    ]},
    {"_target_": "albumentations.VerticalFlip", "p": 0.5},
]  # fmt: skip


def of_nodes(nodes: list[dict[str, Any]] = NODES, **options: Any) -> AlbumentationsTransform:
    return instantiate({"_target_": TARGET, "transforms": nodes, **options}, _convert_="all")


def image(channels: int, side: int = 12) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(channels).integers(0, 256, (channels, side, side), np.uint8)
    )


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_a_sample_depends_on_its_key_alone(channels: int) -> None:
    policy, again, picture = of_nodes(size=8), of_nodes(size=8), image(channels)

    def drawn(policy: AlbumentationsTransform, keys: list[int]) -> dict[int, torch.Tensor]:
        made = {}
        for key in keys:
            with keyed_rng(key):
                made[key] = policy.sample(picture)
        return made

    forwards, backwards = drawn(policy, list(range(12))), drawn(again, list(range(11, -1, -1)))
    for key, value in forwards.items():
        assert value.dtype == torch.uint8 and value.shape == (channels, 8, 8)
        assert torch.equal(value, backwards[key])
    assert len({value.numpy().tobytes() for value in forwards.values()}) > 6


def test_transforms_draw_apart_and_ones_own_global_draws_are_keyed() -> None:
    class Own(A.ImageOnlyTransform):
        def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
            return img + np.uint8(np.random.randint(100))

    flips = AlbumentationsTransform(transforms=[A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), Own(p=1.0)])
    picture = torch.zeros(1, 2, 2, dtype=torch.uint8)
    picture[0, 0, 0] = 100
    places, added = set(), {}
    for key in range(40):
        with keyed_rng(key):
            made = flips.sample(picture)
        places.add(int(made.argmax()))
        added[key] = int(made.min())
        with keyed_rng(key):
            assert torch.equal(flips.sample(picture), made)
    assert places == {0, 1, 2, 3}, "two flips of one seed would be both or none"
    assert len(set(added.values())) > 10


def test_a_picture_and_a_saved_pipeline_give_what_the_list_gives(tmp_path: Path) -> None:
    listed = of_nodes()
    for name, kind in (("p.json", "json"), ("p.yaml", "yaml")):
        A.save(listed.pipeline, tmp_path / name, data_format=kind)
        saved = AlbumentationsTransform(pipeline_file=str(tmp_path / name))
        picture = Image.fromarray(image(3).permute(1, 2, 0).numpy())
        with keyed_rng(5):
            of_file = saved.sample(picture)
        with keyed_rng(5):
            assert torch.equal(listed.sample(image(3)), of_file)
    with keyed_rng(0):
        assert listed.sample(picture.convert("L")).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("transforms", "size", "message"),
    [
        ([{"_target_": "albumentations.Normalize"}], None, "Normalize makes floats"),
        (["albumentations.HorizontalFlip"], None, "no transform of albumentations"),
        (None, None, "one of the two"),
    ],
)
def test_what_is_no_pipeline_of_images_is_refused(transforms: Any, size: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        of_nodes(transforms, size=size)
    assert isinstance(caught.value.__cause__ or caught.value, ConfigError)


def test_what_a_sample_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="make 8x8 pixels, size=9"):
        of_nodes(size=9).sample(image(3))
    with pytest.raises(ValueError, match=r"takes uint8 images .* torch\.float32"):
        of_nodes().sample(image(3).float())

    class Floats(A.ImageOnlyTransform):
        def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
            return img / np.float32(2)

    with pytest.raises(ValueError, match="make float32"):
        AlbumentationsTransform(transforms=[Floats(p=1.0)]).sample(image(3))
    with pytest.raises(ValueError, match="channels"):
        AlbumentationsTransform(transforms=[A.ToGray(num_output_channels=1, p=1.0)]).sample(image(3))


def test_a_file_names_no_other_code_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    for content in ('{"transform": {"__class_fullname__": "os.system", "p": 1}}', "{", "[]"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="no pipeline that albumentations"):
            AlbumentationsTransform(pipeline_file=str(file))
    with pytest.raises(ConfigError, match=r"pipeline_file=.*gone"):
        AlbumentationsTransform(pipeline_file=str(tmp_path / "gone.json"))


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ConfigError, match=r"albumentations, which is not installed: pip install -e"):
        AlbumentationsTransform(transforms=[object()])


def test_a_record_may_name_transforms_at_any_depth_and_nothing_else() -> None:
    def recorded(nodes: Any) -> dict[str, Any]:
        return {"data": {"module": {"train_transforms": {"_target_": TARGET, "transforms": nodes}}}}

    judge(recorded(NODES), "run=RUN")
    evil = {"_target_": "albumentations.OneOf", "transforms": [{"_target_": "os.system", "command": "true"}]}
    for nodes in (
        [evil],
        [{"_target_": "albumentations.core.serialization.load"}],
        [{"_target_": "albumentations.os"}],
    ):
        with pytest.raises(ConfigError, match="nothing of it was run"):
            judge(recorded(nodes), "run=RUN")
