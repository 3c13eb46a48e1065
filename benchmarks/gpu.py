"""All that is to be known on a GPU, in one go: each part of it becomes a section of one page.

    python benchmarks/gpu.py --cifar FOLDER --photographs FOLDER        # everything, on a machine with a GPU
    python benchmarks/gpu.py --only resnet18 precision                  # in pieces; a piece replaces its section
    python benchmarks/gpu.py --tiny --out FILE                          # the same code at sizes for a CPU

Each part takes less than ten minutes on a current GPU; `cifar96` goes on where it was stopped. FOLDER holds CIFAR-10 as
train/<class>/ and test/<class>/; photographs are any folder of them. Parts that need what is not given say so.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from data import tree_of_links  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from paired import provenance, ratio_interval  # noqa: E402
from technique_cost import SAYS, composed, fit, total_steps, turns  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from crucible.batch import Batch  # noqa: E402
from datasets.base_datamodule import BaseDataModule  # noqa: E402
from lab.build import build_model  # noqa: E402

# dense bfloat16, TFLOP/s, by the makers' data sheets; the first name that the device's contains
PEAKS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "A10": 125,
}
GOOD = 0.96  # validation accuracy of `cifar96`
HALVES = {"fp16": "16-mixed", "bf16": "bf16-mixed"}


# Parts measured here


class Clock(Callback):
    """Seconds of the steps after the first `warm_up`."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.seconds, self.steps = warm_up, 0.0, 0

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.warm_up:
            self.began = now()
        self.steps = trainer.global_step - self.warm_up

    def on_train_end(self, *rest: Any) -> None:
        self.seconds = now() - self.began


def now() -> float:
    """The time, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def flops_of_a_picture(config: dict[str, Any], size: int) -> float:
    """Floating-point operations of a training step for one picture: forward and backward, a multiply-add as two."""
    network = build_model(config, load=False, compile=False).model
    x = torch.randn(2, config["data"]["input_channels"], size, size)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops() / len(x)


def part_resnet18(args: argparse.Namespace) -> Iterator[str]:
    """Pictures a second of a whole training, and the share of what the device can do at most."""
    yield f"Training through main.py's path: {SAYS[args.workload]}; bf16-mixed."
    yield from (
        "",
        "| mode | pictures/s | ms a step | TFLOP/s | share of peak |",
        "| --- | ---: | ---: | ---: | ---: |",
    )
    warm_up, steps = (1, 3) if args.tiny else (30, 200)
    for compiled in (False, True):
        options = [f"model.compile={str(compiled).lower()}", "trainer.precision=bf16-mixed"]
        with tempfile.TemporaryDirectory() as name:
            config = composed(None, warm_up + steps, Path(name), *options, workload=args.workload)
            rate = flops_of_a_picture(config, config["data"]["input_size"])
            clock = Clock(warm_up)
            fit(config, Path(name), clock)
        pictures = clock.steps * config["data"]["module"]["batch_size"] / clock.seconds
        share = (
            f"{100 * pictures * rate / 1e12 / args.peak:.0f} %" if args.peak else "peak not known (--peak)"
        )
        yield (
            f"| {'compiled' if compiled else 'eager'} | {pictures:.0f} | {1e3 * clock.seconds / clock.steps:.2f} |"
            f" {pictures * rate / 1e12:.3g} | {share} |"
        )


def part_cifar96(args: argparse.Namespace) -> Iterator[str]:
    """Seconds of training until validation reaches 96 %, by a command as a user types it."""
    folder = args.work / ("tiny" if args.tiny else "cifar96")
    options = [
        "model=resnet", f"exp_dir={folder}", "logger.wandb=null", "callbacks.progress=null", "callbacks.plots=null",
    ]  # fmt: skip
    if args.tiny:
        good = 0.5
        options += ["data=digits", "trainer.max_epochs=2", "model.cifar_size=true"]
    elif args.cifar is None:
        yield "Not measured: needs --cifar FOLDER."
        return
    else:
        good = GOOD
        options += [
            "model._target_=models.dynamic_resnet.ResNet18", "model.cifar_size=true", "data=cifar10",
            f"data.module.data_root_dir={args.cifar}", "data.module.batch_size=512", "trainer.max_epochs=60",
            "model.lr=0.4", "model.nesterov=true", "model.weight_decay=0.0005", "model.warmstart=5",
            "trainer.precision=bf16-mixed", "model.compile=true", "technique=[cutout,label_smoothing]",
        ]  # fmt: skip
    command = [sys.executable, str(ROOT / "main.py"), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (table,) = folder.glob("*/*/metrics.csv")
    spent, best = 0.0, 0.0
    found = f"{good:.0%} not reached"
    with table.open() as lines:
        for row in csv.DictReader(lines):
            spent += float(row["time/epoch_s"] or 0)
            accuracy = float(row["val/acc"] or 0)
            if accuracy >= good > best:
                found = f"{good:.0%} after {spent:.0f} s, in epoch {int(row['epoch']) + 1}"
            best = max(best, accuracy)
    shown = " ".join(
        option for option in options if not option.startswith(("exp_dir", "data.module.data_root_dir"))
    )
    yield f"`python main.py {shown}`: {found}; best {best:.4f}, {spent:.0f} s in all. Epochs with their validation."


def part_loader(args: argparse.Namespace) -> Iterator[str]:
    """A training with its own pipeline against the same training on one batch that lies on the device."""
    steps, pairs = (1, 2) if args.tiny else (20, 20)
    yield f"The step with the real pipeline to that with one fixed batch; turns of {steps} steps, {pairs} pairs."
    yield from ("", "| pipeline | ratio | 95 % interval |", "| --- | ---: | ---: |")
    rows = {args.workload: list[str]()}
    if args.photographs:
        rows["photographs"] = []
        if args.tiny:
            rows["photographs"] += [
                "data.input_size=32", "data.module.batch_size=2", "data.module.num_workers=0",
                "model._target_=technique_cost.SmallResNet",
            ]  # fmt: skip
    for workload, options in rows.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if workload == "photographs":
                tree_of_links(args.photographs, folder / "links", 64 if args.tiny else 4096, largest=2**24)
                options = [*options, f"data.module.data_root_dir={folder / 'links'}"]
            configs = [
                composed(None, total_steps(steps, pairs), folder, *options, workload=workload)
                for _ in range(2)
            ]
            fits = [partial(fit, configs[0], folder), partial(fit, configs[1], folder, change=fix_the_batch)]
            ratio = ratio_interval(*turns(fits, steps))
        yield f"| {SAYS[workload]} | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} |"
    if not args.photographs:
        yield "| JPEG photographs | not measured: needs --photographs FOLDER | |"


class Fixed:
    """So many times the same batch."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.times)


def fix_the_batch(data: BaseDataModule) -> None:
    """Train on the first batch over and over, from the device's memory."""
    make = data.train_dataloader

    def fixed() -> Any:
        loader = make()
        batch = next(iter(loader))
        device = data.trainer.strategy.root_device
        return Fixed(Batch(*(part.to(device) for part in batch)), len(loader))

    data.train_dataloader = fixed  # type: ignore[method-assign]


def part_precision(args: argparse.Namespace) -> Iterator[str]:
    """The same training in fp16, with its loss scaler, and in bf16."""
    steps, pairs = (1, 2) if args.tiny else (20, 20)
    if not torch.cuda.is_available():
        yield "fp16 needs a GPU: bf16 against itself, to try the code.\n"
    halves = (
        HALVES if torch.cuda.is_available() else {"bf16, once": "bf16-mixed", "bf16, again": "bf16-mixed"}
    )
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), total_steps(steps, pairs)
        configs = [
            composed(None, total, folder, f"trainer.precision={precision}", workload=args.workload)
            for precision in halves.values()
        ]
        times = turns([partial(fit, config, folder) for config in configs], steps)
    first, second = halves
    medians = [1e3 * statistics.median(t) / steps for t in times]
    yield f"{SAYS[args.workload]}; turns of {steps} steps, {pairs} pairs; not compiled."
    yield from ("", "| precision | ms a step | ratio |", "| --- | ---: | --- |")
    yield f"| {first} | {medians[0]:.2f} | {ratio_interval(*times)} |"
    yield f"| {second} | {medians[1]:.2f} | 1 |"


# Parts that other scripts measure


def by_script(script: str, full: list[str], tiny: list[str]) -> Callable[[argparse.Namespace], Iterator[str]]:
    """The page of another script, from its own process, with these arguments."""

    def part(args: argparse.Namespace) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as name:
            page = Path(name) / "page.md"
            arguments = [word.format(device=args.device) for word in (tiny if args.tiny else full)]
            command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--out", str(page)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            lines = page.read_text().splitlines()
        yield from (
            line.replace(str(page), "FILE") for line in lines[1:] if line.strip() or lines.index(line) > 1
        )

    return part


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[str]]]] = {
    "resnet18": ("ResNet-18 on CIFAR-10's shape: throughput and share of peak", part_resnet18),
    "cifar96": ("ResNet-18 on CIFAR-10: time to 96 %", part_cifar96),
    "resnet50": ("ResNet-50 at 224 against timm's", by_script(
        "models.py",
        ["--models", "ResNet-50, timm's", "--batch", "128", "--size", "224", "--repeats", "40", "--device", "{device}"],
        ["--models", "ResNet-50, timm's", "--batch", "2", "--size", "32", "--repeats", "2", "--modes", "eager",
         "--device", "{device}"],
    )),
    "norms": ("Norms against batch norm", by_script(
        "norms.py",
        ["--repeats", "40", "--device", "{device}"],
        ["--repeats", "2", "--device", "{device}", "--modes", "eager", "--dtypes", "fp32", "--norms", "online (ac)",
         "--small"],
    )),
    "techniques": ("What each technique costs", by_script(
        "technique_cost.py",
        ["--workload", "resnet18", "--pairs", "6"],
        ["mixup", "--pairs", "1", "--steps", "1"],
    )),
    "sam": ("What SAM costs", by_script(
        "technique_cost.py",
        ["sam", "--workload", "resnet18", "--pairs", "40"],
        ["sam", "--pairs", "1", "--steps", "1"],
    )),
    "loss": ("What PowerGrad costs", by_script(
        "loss_cost.py", ["--device", "{device}"], ["--device", "{device}", "--repeats", "2", "--batch", "2", "--eager"],
    )),
    "loader": ("The pipeline against one fixed batch on the device", part_loader),
    "precision": ("fp16 against bf16", part_precision),
}  # fmt: skip


def completed(text: str, title: str, lines: list[str]) -> str:
    """The page with this section in place of the one of its title; sections stand in the order of `PARTS`."""
    sections: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        sections[name] = body.strip()
    sections[title] = "\n".join(lines).strip()
    titles = [title for title, _ in PARTS.values() if title in sections]
    return "\n\n".join(["# On a GPU", *(f"## {title}\n\n{sections[title]}" for title in titles)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as image folders")
    parser.add_argument("--photographs", type=Path, help="photographs, in folders or not")
    parser.add_argument(
        "--peak", type=float, help="TFLOP/s that the device can do at most; default: by its name"
    )
    parser.add_argument("--work", type=Path, help="where the runs of cifar96 are kept; default: nowhere")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: tries the code, on a CPU too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no GPU here: --tiny tries the code on a CPU")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.workload = "small" if args.tiny else "resnet18"
    if args.peak is None and args.device == "cuda":
        args.peak = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        args.work = args.work or Path(name)
        for part in args.only:
            title, measure = PARTS[part]
            began = time.monotonic()
            lines = list(measure(args))
            if measure.__name__.startswith("part_"):
                lines = [*provenance(args.device).splitlines(), "", *lines]
            before = args.out.read_text() if args.out.exists() else ""
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(completed(before, title, lines))
            print(f"{part}: {time.monotonic() - began:.0f} s, in {args.out}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
