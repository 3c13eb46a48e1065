"""What each technique costs: its training step's time and peak memory relative to the same training without it.

Two whole trainings, with and without the technique, run in two threads of one process and take turns of a few steps,
so that what disturbs the machine disturbs both. The peak memory is what each adds to a process of its own (on a GPU: to
what the allocator holds). docs/techniques.md shows the table.

    python benchmarks/technique_cost.py [--workload resnet18] [--out FILE] [TECHNIQUE ...]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from paired import provenance, ratio_interval, report  # noqa: E402

from crucible import configuration  # noqa: E402
from crucible.run import RunDirectory  # noqa: E402
from datasets.base_datamodule import BaseDataModule  # noqa: E402
from datasets.images import Arrays  # noqa: E402
from docs.generate import merged, technique_names, technique_settings  # noqa: E402
from lab.build import build_data, build_model, build_trainer  # noqa: E402
from lab.config import check, resolve  # noqa: E402
from models.dynamic_resnet import ResNetModel  # noqa: E402
from models.layers import BasicBlock  # noqa: E402

QUIET = [
    "model=resnet", "data.module.num_workers=0", "model.lr=0.01", "trainer.max_epochs=-1",
    "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "callbacks.progress=null",
    "callbacks.plots=null", "logger.wandb=null",
]  # fmt: skip
WORKLOADS = {
    "small": [
        "model._target_=technique_cost.SmallResNet", "data=digits", "data.input_size=16", "data.module.batch_size=32",
    ],
    "resnet18": [
        "model._target_=models.dynamic_resnet.ResNet18", "model.cifar_size=true", "data=cifar10",
        "data.module._target_=technique_cost.Pictures", "data.module.name=pictures", "data.module.batch_size=512",
    ],
    "photographs": [  # beside data.module.data_root_dir
        "model._target_=models.dynamic_resnet.ResNet50", "data=image_folder", "data.module.batch_size=128",
        "data.module.train_transforms._target_=augmentation.policies.imagenet.RandAugmentTransform",
        "data.module.num_workers=null",
    ],
}  # fmt: skip
SAYS = {
    "small": "a small ResNet (32, 64, 128 channels) on digits of 16x16 pixels in batches of 32",
    "resnet18": "ResNet-18 with a 3x3 stem on pictures of 3x32x32 in batches of 512, CIFAR's crops and flips",
    "photographs": "ResNet-50 on photographs, RandomResizedCrop to 224 and RandAugment, in batches of 128",
}
MEMORY = {"small": ["data.module.batch_size=128"], "resnet18": []}  # so that activations outweigh the rest
WARM_UP_TURNS = 3


class SmallResNet(ResNetModel):
    """Three residual blocks of 32, 64 and 128 channels."""

    block, layers, width = BasicBlock, (1, 1, 1), 32


class Pictures(BaseDataModule):
    """Pictures of random pixels with the shape, number and dtype of CIFAR-10's: what a step costs does not see them."""

    def __init__(self, *, num_samples: int = 50_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_samples = num_samples

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(0)
        for role, count in (("train", self.num_samples), ("test", self.num_samples // 5)):
            pixels = torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
            labels = torch.arange(count) % 10
            setattr(self, f"{role}_dataset", Arrays(pixels, labels.numpy(), [str(i) for i in range(10)]))


class Turns(Callback):
    """Hands over to the other training after every few steps, and notes how long its own turns took."""

    def __init__(self, steps: int, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.steps, self.mine, self.other = steps, mine, other
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Any, *rest: Any) -> None:
        self.mine.acquire()
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step % self.steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.started)
            self.other.release()
            self.mine.acquire()
            self.started = time.perf_counter()

    def on_train_end(self, *rest: Any) -> None:
        self.other.release()


def composed(
    technique: str | None, steps: int, folder: Path, *options: str, workload: str = "small"
) -> dict[str, Any]:
    """The configuration with a technique, or without."""
    overrides = [*QUIET, *WORKLOADS[workload], f"trainer.max_steps={steps}", *options]
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", overrides))
    config = merged(config, technique_settings(technique)) if technique else config
    if technique == "distillation":
        config["model"]["teacher"] = str(folder / "teacher")
    check(config, [])
    return config


def fit(
    config: dict[str, Any],
    folder: Path,
    *callbacks: Callback,
    change: Callable[[BaseDataModule], None] | None = None,
) -> Any:
    """Train as main.py does; `change` is done to the data module first."""
    data = build_data(config)
    data.check()
    resolve(config, data)
    if change is not None:
        change(data)
    own = [instantiate(node, _convert_="all") for node in config["callbacks"].values() if node]
    trainer = build_trainer(config, folder, [*own, *callbacks], [])
    trainer.fit(build_model(config), datamodule=data)
    return trainer


def record_teacher(folder: Path, workload: str = "small") -> None:
    """A run of the same network, for distillation."""
    config = composed(None, 1, folder, workload=workload)
    trainer = fit(config, folder)
    run = RunDirectory(folder / "teacher")
    run.record(config, [])
    run.update_summary(status="finished")
    trainer.save_checkpoint(run.checkpoints / "last.ckpt")


def turns(fits: Sequence[Callable[[Callback], Any]], steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each turn of `steps` steps of two trainings, each begun by a call with the callback that times it."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    sides = [Turns(steps, first, second), Turns(steps, second, first)]
    failures: list[BaseException] = []

    def run(begin: Callable[[Callback], Any], side: Turns) -> None:
        try:
            begin(side)
        except BaseException as error:
            failures.append(error)
            side.other.release()

    threads = [threading.Thread(target=run, args=pair) for pair in zip(fits, sides, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sides[0].seconds[WARM_UP_TURNS:], sides[1].seconds[WARM_UP_TURNS:]


def total_steps(steps: int, pairs: int) -> int:
    """Of a training that takes so many turns, warm-up included."""
    return steps * (pairs + WARM_UP_TURNS)


def peak_memory(technique: str | None, folder: Path, workload: str = "small") -> float:
    """MiB that a training of a few steps adds at its peak to what the process holds before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(composed(technique, 4, folder, *MEMORY[workload], workload=workload), folder)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_added_by, (technique, folder, workload))


def _added_by(technique: str | None, folder: Path, workload: str) -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    fit(composed(technique, 4, folder, *MEMORY[workload], workload=workload), folder)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("techniques", nargs="*", default=technique_names())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=20, help="turns of each side")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps a turn; a multiple of what every k-th step does"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workload", choices=("small", "resnet18"), default="small")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload = arguments.workload
        record_teacher(folder, workload)
        total = total_steps(arguments.steps, arguments.pairs)
        for technique in arguments.techniques:
            # beside each other: what a process adds depends on what it holds already
            memory, plain = (peak_memory(name, folder, workload) for name in (technique, None))
            configs = [composed(name, total, folder, workload=workload) for name in (technique, None)]
            fits = [partial(fit, config, folder) for config in configs]
            ratio = ratio_interval(*turns(fits, arguments.steps))
            rows.append(
                f"| `{technique}` | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} | {memory / plain:.2f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    text = "\n".join([
        "# What each technique costs, relative to training without it",
        "",
        provenance("cuda" if torch.cuda.is_available() else "cpu"),
        f"Workload: {SAYS[arguments.workload]}; turns of {arguments.steps} steps, {arguments.pairs} pairs of turns.",
        "Peak memory is what the training adds to a process"
        + (", in batches of 128." if arguments.workload == "small" else "."),
        "",
        "| technique | step time | 95% interval | peak memory |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ])  # fmt: skip
    report(text, arguments.out)


if __name__ == "__main__":
    main()
