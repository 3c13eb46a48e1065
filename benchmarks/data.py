"""What delivering pictures costs: our loaders against torchvision's ImageFolder with PIL, in turn in one run.

Each pair is a pass over the same number of batches by loader workers that live on; both sides end with uint8 batches in
memory, normalisation is on neither, and the flip, which ours does on the device, is done on the CPU within the time.

    python benchmarks/data.py PHOTOGRAPHS [--cifar FOLDER] [--rows ROW ...] [--out FILE]

PHOTOGRAPHS is a folder of original photographs; links to them make as many files as are wanted. FOLDER holds CIFAR-10
as train/<class>/ and test/<class>/ of JPEG files.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from paired import Ratio, paired_times, provenance, ratio_interval, report  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from augmentation.policies import cifar, imagenet  # noqa: E402
from augmentation.policies.base import shift_and_flip  # noqa: E402
from augmentation.policies.default import IdentityTransform  # noqa: E402
from crucible.keyed import keyed_uniform  # noqa: E402
from crucible.listing import image_files  # noqa: E402
from crucible.pictures import decode, decode_with_pil, installed  # noqa: E402
from datasets.base_datamodule import BaseDataModule  # noqa: E402
from datasets.cifar import CIFAR10DataModule  # noqa: E402
from datasets.image_folder import ImageFolderDataModule  # noqa: E402
from datasets.images import ImageFiles  # noqa: E402

CLASSES = 4


def tree_of_links(photographs: Path, root: Path, count: int, largest: int) -> None:
    """`root/<class>/` with links to the photographs, over and over; those of more than `largest` bytes are left out."""
    every = [(photographs / name).resolve() for name in image_files(photographs)]
    files = [file for file in every if file.stat().st_size <= largest]
    for i in range(count):
        folder = root / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:06d}{files[0].suffix}").symlink_to(files[i % len(files)])


def passes(
    loader: DataLoader, batches: int, after: Callable[[Any], Any] = lambda batch: batch
) -> Callable[[], None]:
    """A pass over the first batches of a loader, whose workers live on."""

    def run() -> None:
        for batch in itertools.islice(loader, batches):
            after(batch)

    return run


def rival(root: Path, transforms: list[Any], batch_size: int, workers: int, samples: int) -> DataLoader:
    """torchvision's ImageFolder, PIL, the transforms a reader would write, and uint8 at the end."""
    data = torch.utils.data.Subset(
        ImageFolder(str(root), v2.Compose([*transforms, v2.PILToTensor()])), range(samples)
    )
    return DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )


def flipped(batch: Any) -> torch.Tensor:
    draws = keyed_uniform(1, batch.index, 3)
    return shift_and_flip(batch.input, draws, 0, 0.5)


def shifted(batch: Any) -> torch.Tensor:
    draws = keyed_uniform(1, batch.index, 3)
    return shift_and_flip(batch.input, draws, 4, 0.5)


def photographs(
    args: argparse.Namespace, folder: Path, policy: Any, transforms: list[Any]
) -> tuple[list[float], list[float]]:
    """Seconds of passes over photographs: the rival's, and ours."""
    samples = args.batches * args.batch_size
    data = ImageFolderDataModule(
        name="photographs", data_root_dir=str(folder), batch_size=args.batch_size, num_workers=args.workers,
        train_transforms=policy, test_transforms=imagenet.TestTransform(size=args.size), test_split=0.0, val_split=0.01,
    )  # fmt: skip
    data.setup("fit")
    theirs = rival(folder, transforms, args.batch_size, args.workers, samples)
    return paired_times(passes(theirs, args.batches), passes(data.train_dataloader(), args.batches, flipped),
                        args.repeats, warm_up=1)  # fmt: skip


def row_photographs(args: argparse.Namespace, work: Path) -> Iterator[str]:
    samples = args.batches * args.batch_size
    folder = work / "photographs"
    tree_of_links(args.photographs, folder, int(samples * 1.02) + CLASSES, args.largest)
    crop = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip()]
    arms = {
        "Baseline": (imagenet.BaselineTransform(size=args.size), crop, 1.7),
        "RandAugment": (imagenet.RandAugmentTransform(size=args.size), [*crop, v2.RandAugment()], 2.0),
    }
    for name in args.policies:
        policy, transforms, goal = arms[name]
        theirs, ours = photographs(args, folder, policy, transforms)
        yield line(f"JPEG folder to batch at {args.size}, {name}", theirs, ours, samples, goal)


def row_cifar(args: argparse.Namespace, work: Path) -> Iterator[str]:
    data = CIFAR10DataModule(
        name="cifar10", data_root_dir=str(args.cifar), batch_size=512, num_workers=0, num_classes=10,
        train_transforms=cifar.BaselineTransform(), test_transforms=cifar.TestTransform(), val_split=0.1,
    )  # fmt: skip
    data.setup("fit")
    samples = 16 * 512
    transforms = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    theirs = rival(args.cifar / "train", transforms, 512, args.workers, samples)
    times = paired_times(
        passes(theirs, 16), passes(data.train_dataloader(), 16, shifted), args.repeats, warm_up=1
    )
    yield line("CIFAR, Baseline (ours without workers)", *times, samples, 25.0)


def row_decode(args: argparse.Namespace, work: Path) -> Iterator[str]:
    """First decode and warm start of a copy of CIFAR, the train folder's 50,000 files and the test folder's."""
    root = work / "cifar"
    shutil.copytree(args.cifar, root, ignore=shutil.ignore_patterns(".decoded"))

    def start() -> float:
        began = time.perf_counter()
        CIFAR10DataModule(name="cifar10", data_root_dir=str(root), num_classes=10).setup("fit")
        return time.perf_counter() - began

    files = sum(len(names) for _, _, names in os.walk(root))
    first, warm = [], []
    for _ in range(args.repeats_of_starts):
        shutil.rmtree(root / ".decoded", ignore_errors=True)
        first.append(start())
        warm.append(start())
    for what, times, goal in (("first decode", first, 3.0), ("warm start", warm, 1.0)):
        seconds = min(times) * 5e4 / files
        yield f"| {what} of {files} CIFAR JPEGs, a 50,000; of {len(times)} | - | {seconds:.2f} s | - | {goal:g} s |"


def row_listing(args: argparse.Namespace, work: Path) -> Iterator[str]:
    root = work / "listing"
    for c in range(1000):
        folder = root / "train" / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in range(args.files // 1000):
            os.close(os.open(folder / f"n{c:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))

    def plain() -> list[str]:
        return [f"{folder}/{name}" for folder, _, names in os.walk(root) for name in names]

    def ours() -> BaseDataModule:
        data = ImageFolderDataModule(name="listing", data_root_dir=str(root), test_split=0.0)
        data.setup("fit")
        return data

    ours_, plain_ = paired_times(ours, plain, args.repeats, warm_up=1)
    ratio = ratio_interval(ours_, plain_)
    seconds = [f"{np.median(times):.2f} s" for times in (plain_, ours_)]
    yield f"| start-up on {args.files} files, to os.walk | {seconds[0]} | {seconds[1]} | {ratio} | at most 1.5 |"


class OnePicture(ImageFiles):
    """Files whose decoding is replaced by one picture; their names are made, as for reading."""

    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def read(self, index: int) -> torch.Tensor:
        assert self.names[index]
        return self.picture


class Named(BaseDataModule):
    """So many names and nothing else."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    def setup(self, stage: str) -> None:
        names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(self.count)]
        self.train_dataset = OnePicture(
            Path("/nowhere"), names, np.arange(self.count) % 1000, 3, list(map(str, range(1000)))
        )
        self.test_dataset = OnePicture(Path("/nowhere"), names[:1000], np.arange(1000), 3)


def private_dirty(pid: int) -> float:
    """MiB of memory that only this process has written."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Private_Dirty")).split()[1]) / 1024


def row_memory(args: argparse.Namespace, work: Path) -> Iterator[str]:
    data = Named(args.names, name="names", batch_size=args.batch_size, num_workers=args.workers, val_split="test",
                 cache="none", train_transforms=IdentityTransform())  # fmt: skip
    data.setup("fit")
    gc.collect()
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    workers = [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined]
    seen: list[float] = []
    marks = {int(len(loader) * part) for part in (0.05, 0.25, 0.5, 0.75, 0.98)}
    for number, _ in enumerate(itertools.islice(iterator, len(loader) - 1), 1):
        if number in marks:
            seen.append(max(map(private_dirty, workers)))
    shown = ", ".join(f"{value:.1f}" for value in seen)
    what = f"private memory of a worker over an epoch of {args.names} names, MiB at 5, 25, 50, 75, 98 %"
    yield f"| {what} | - | {shown} | +{max(seen) - seen[0]:.1f} MiB | constant |"


def row_profile(args: argparse.Namespace, work: Path) -> Iterator[str]:
    """Where the milliseconds of a photograph go, on either side, in one process without workers."""
    folder, count = work / "profile", args.batch_size
    tree_of_links(args.photographs, folder, int(count * 1.02) + CLASSES, args.largest)
    policy = imagenet.BaselineTransform(size=args.size)
    data = ImageFolderDataModule(
        name="photographs", data_root_dir=str(folder), batch_size=count, num_workers=0, train_transforms=policy,
        test_transforms=imagenet.TestTransform(size=args.size), test_split=0.0, val_split=0.01,
    )  # fmt: skip
    data.setup("fit")
    crop = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip()]
    whole = rival(folder, crop, count, 0, count), data.train_dataloader()
    files = data.train_dataset
    contents = [files.encoded(i) for i in range(count)]
    pictures = [decode(content, 3) for content in contents]
    draws = keyed_uniform(1, torch.arange(count), policy.crop_draws).tolist()
    batch = next(iter(whole[1]))
    parts: dict[str, Callable[[], Any]] = {
        "their all": lambda: next(iter(whole[0])),
        "their decoding": lambda: [decode_with_pil(content, 3) for content in contents],
        "all": lambda: flipped(next(iter(whole[1]))),
        "decoding": lambda: [decode(content, 3) for content in contents],
        "resizing": lambda: [policy.from_draws(p, d) for p, d in zip(pictures, draws, strict=True)],
        "reading": lambda: [files.encoded(i) for i in range(count)],
        "flips": lambda: flipped(batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, part in parts.items():
            began = time.process_time()
            part()
            taken[name].append((time.process_time() - began) / count * 1e3)
    ms = {name: f"{np.median(times):.2f}" for name, times in taken.items()}
    needed = [a + b for a, b in zip(taken["decoding"], taken["resizing"], strict=True)]
    what = "CPU ms of a photograph, in one process"
    for part in ("all", "decoding"):
        ratio = ratio_interval(taken[f"their {part}"], taken[part])
        yield f"| {what}: {part} | {ms[f'their {part}']} | {ms[part]} | {ratio} | - |"
    rest = ", ".join(ms[name] for name in ("resizing", "reading", "flips"))
    yield f"| {what}: crops and resizing, reading, flips | - | {rest} | - | - |"
    bound = ratio_interval(taken["their all"], needed)
    yield f"| {what}: all, were ours decoding, crops and resizing alone | - | - | {bound} | - |"


ROWS = {"photographs": row_photographs, "profile": row_profile, "cifar": row_cifar, "decode": row_decode,
        "listing": row_listing, "memory": row_memory}  # fmt: skip


def line(what: str, theirs: list[float], ours: list[float], samples: int, goal: float) -> str:
    ratio: Ratio = ratio_interval(theirs, ours)
    rates = [f"{samples / float(np.median(times)):.0f}/s" for times in (theirs, ours)]
    return f"| {what} | {rates[0]} | {rates[1]} | {ratio} | {goal:g} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument(
        "--policies", nargs="+", choices=["Baseline", "RandAugment"], default=["Baseline", "RandAugment"]
    )
    parser.add_argument("--repeats", type=int, default=10, help="pairs of passes")
    parser.add_argument("--repeats-of-starts", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="of a pass")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--largest", type=int, default=500_000, help="bytes of a photograph; larger ones are left out"
    )
    parser.add_argument("--files", type=int, default=200_000, help="of the listing")
    parser.add_argument("--names", type=int, default=1_281_167, help="of the test of memory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.cifar is None and {"cifar", "decode"} & set(args.rows):
        parser.error("the rows cifar and decode need --cifar FOLDER")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        lines = [found for row in args.rows for found in ROWS[row](args, Path(work))]
    decoder = "simplejpeg" if installed() else "PIL (simplejpeg is not installed)"
    report(
        "# Delivering pictures: our loaders against torchvision's ImageFolder with PIL\n\n"
        f"{provenance()}- Decoder: {decoder}; {args.workers} workers, batches of {args.batch_size}, "
        f"passes of {args.batches} batches\n"
        f"- Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n\n"
        "| what | theirs | ours | ratio, 95 % interval | goal |\n| --- | ---: | ---: | ---: | ---: |\n"
        + "\n".join(lines)
        + "\n\nTheirs and ours are medians; a ratio is the median of the pairs'. uint8 in memory at the end on both "
        "sides; our flip, which belongs to the device, is done on the CPU within the time.",
        args.out,
    )


if __name__ == "__main__":
    main()
