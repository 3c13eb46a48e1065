"""A packed copy against torchvision's ImageFolder on the photographs that it was made of.

    python benchmarks/data_packed.py --photos FOLDER [--copies 25] [--repeats 9] [--out FILE]

Both deliver batches of 256 random crops of 224 pixels, half of them mirrored, uint8 in memory, by 2 workers; neither
normalises. torchvision: ImageFolder with PIL, RandomResizedCrop, RandomHorizontalFlip, PILToTensor, on the originals.
Ours: data=image_folder with the Baseline policy on the pack of the same photographs; the flips are made on the whole
batch, in this process, and timed. One pass over the data is one measurement; passes alternate.

The shards are timed likewise, without a goal: as tar files here, and as Parquet in row groups of 100.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from paired import Ratio, paired_times, provenance, ratio_interval, report
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import v2

from augmentation.policies.base import shift_and_flip
from augmentation.policies.imagenet import BaselineTransform, TestTransform
from crucible.keyed import keyed_uniform
from crucible.listing import image_files
from datasets.image_folder import ImageFolderDataModule
from datasets.shards import ShardsDataModule
from lab.packing import pack

BATCH, SIZE, WORKERS = 256, 224, 2
GOAL = 3.5


class Row(NamedTuple):
    """One line of the table: images/s of both, and how much faster ours is."""

    what: str
    rival: float
    ours: float
    ratio: Ratio


def photographs(source: Path, root: Path, copies: int) -> int:
    """Two classes of `copies` of each photograph in `source`; their number."""
    files = image_files(source)
    for copy in range(copies):
        for number, name in enumerate(files):
            target = root / ("odd" if number % 2 else "even") / f"{copy:04}-{number:04}{Path(name).suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target)
    return copies * len(files)


def packed(root: Path, out: Path, size: int | None = 256) -> Path:
    """The pack of a folder, as `python main.py task=pack` makes it."""
    module = {
        "_target_": "datasets.image_folder.ImageFolderDataModule", "name": "photographs", "data_root_dir": str(root),
        "num_workers": "auto",
    }  # fmt: skip
    options = {"size": size, "quality": 90, "verify": False}
    pack({"out": str(out), "pack": options, "data": {"module": module, "task": "classification"}})
    return out


def as_tar(root: Path, out: Path) -> Path:
    """A folder of two classes as one tar shard."""
    out.mkdir()
    with tarfile.open(out / "train.tar", "w") as tar:
        for name in image_files(root):
            stem = name.replace("/", "-").rpartition(".")[0]
            content = {"jpg": (root / name).read_bytes(), "cls": name.partition("/")[0].encode()}
            for extension, data in content.items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out


def as_parquet(root: Path, out: Path) -> Path:
    """A folder of two classes as one Parquet file."""
    import pyarrow
    import pyarrow.parquet

    out.mkdir()
    names = image_files(root)
    rows = [{"bytes": (root / name).read_bytes(), "path": name} for name in names]
    table = pyarrow.table({"image": rows, "label": [int(name.startswith("odd")) for name in names]})
    pyarrow.parquet.write_table(table, out / "train.parquet", row_group_size=100)
    return out


def rival_pass(root: Path, batches: int) -> Callable[[], None]:
    """One pass of torchvision over a folder."""
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    data = torchvision_datasets.ImageFolder(root, transform)
    loader: Any = DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, drop_last=True
    )

    def run() -> None:
        for number, (input, _) in enumerate(loader):
            assert input.shape == (BATCH, 3, SIZE, SIZE) and input.dtype == torch.uint8
            if number + 1 == batches:
                break

    return run


def our_pass(kind: type, root: Path) -> tuple[Callable[[], None], int]:
    """One pass of ours, and its batches."""
    policies = {"train_transforms": BaselineTransform(size=SIZE), "test_transforms": TestTransform(size=SIZE)}
    module = kind(
        name="photographs", data_root_dir=str(root), batch_size=BATCH, num_workers=WORKERS, test_split=0.0,
        val_split=0.01, cache="none", **policies,
    )  # fmt: skip
    module.check()
    loader = module.train_dataloader()

    def run() -> None:
        for batch in loader:
            draws = keyed_uniform(1, batch.index, 3)
            input = shift_and_flip(batch.input, draws, 0, 0.5)
            assert input.shape == (BATCH, 3, SIZE, SIZE) and input.dtype == torch.uint8

    return run, len(loader)


def packed_rows(source: Path, copies: int, repeats: int, scratch: Path, others: bool = True) -> list[Row]:
    """The rows of the table.

    Args:
        source: folder of photographs.
        copies: of each.
        repeats: pairs of passes.
        scratch: an empty folder.
        others: the shards too.
    """
    root = scratch / "photographs"
    photographs(source, root, copies)
    places = [
        ("packed copy, short side 256, Baseline", ImageFolderDataModule, packed(root, scratch / "pack"))
    ]
    if others:
        whole = packed(root, scratch / "whole", None)
        places += [
            ("packed copy of the files as they were, Baseline", ImageFolderDataModule, whole),
            ("tar shard, Baseline", ShardsDataModule, as_tar(root, scratch / "tar")),
            (
                "Parquet in row groups of 100, Baseline",
                ShardsDataModule,
                as_parquet(root, scratch / "parquet"),
            ),
        ]
    rows = []
    for what, kind, place in places:
        ours, batches = our_pass(kind, place)
        images = batches * BATCH
        times = paired_times(rival_pass(root, batches), ours, repeats, warm_up=1)
        rival_rate, our_rate = (images / statistics.median(seconds) for seconds in times)
        rows.append(Row(what, rival_rate, our_rate, ratio_interval(*times)))
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--copies", type=int, default=25, help="of each photograph")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only-the-pack", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = packed_rows(
            options.photos, options.copies, options.repeats, Path(scratch), not options.only_the_pack
        )
    lines = [
        "# Packed copies and shards", "", provenance(), f"Batches of {BATCH}, {WORKERS} workers, {SIZE} pixels; "
        f"{options.repeats} pairs of passes; the goal for the packed copy is {GOAL}.", "",
        "| what | torchvision, images/s | Crucible, images/s | times as fast [95 %] |", "| --- | ---: | ---: | ---: |",
        *(f"| {row.what} | {row.rival:,.0f} | {row.ours:,.0f} | {row.ratio} |" for row in rows),
    ]  # fmt: skip
    report("\n".join(lines), options.out)


if __name__ == "__main__":
    main()
