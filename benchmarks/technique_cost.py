"""What each technique costs: its training step's time and peak memory relative to the same training without it.

Two whole trainings, with and without the technique, run in two threads of one process and take turns of a few steps,
so that what disturbs the machine disturbs both. The peak memory is what each adds to a process of its own (on a GPU: to
what the allocator holds). docs/techniques.md shows the table.

    python benchmarks/technique_cost.py [--out benchmarks/results/technique_cost.md] [TECHNIQUE ...]
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
from docs.generate import merged, technique_names, technique_settings  # noqa: E402
from lab.build import build_data, build_model, build_trainer  # noqa: E402
from lab.config import check, resolve  # noqa: E402
from models.dynamic_resnet import ResNetModel  # noqa: E402
from models.layers import BasicBlock  # noqa: E402

WORKLOAD = [
    "model=resnet", "model._target_=technique_cost.SmallResNet", "data=digits", "data.input_size=16",
    "data.module.batch_size=32", "data.module.num_workers=0", "model.lr=0.01", "trainer.max_epochs=-1",
    "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "callbacks.progress=null",
    "callbacks.plots=null", "logger.wandb=null",
]  # fmt: skip
MEMORY = ("data.module.batch_size=128",)  # so that activations outweigh the rest
WARM_UP_TURNS = 3


class SmallResNet(ResNetModel):
    """Three residual blocks of 32, 64 and 128 channels."""

    block, layers, width = BasicBlock, (1, 1, 1), 32


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


def composed(technique: str | None, steps: int, folder: Path, *options: str) -> dict[str, Any]:
    """The configuration with a technique, or without."""
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", [*WORKLOAD, f"trainer.max_steps={steps}", *options]))
    config = merged(config, technique_settings(technique)) if technique else config
    if technique == "distillation":
        config["model"]["teacher"] = str(folder / "teacher")
    check(config, [])
    return config


def fit(config: dict[str, Any], folder: Path, *callbacks: Callback) -> Any:
    """Train as main.py does."""
    data = build_data(config)
    data.check()
    resolve(config, data)
    own = [instantiate(node, _convert_="all") for node in config["callbacks"].values() if node]
    trainer = build_trainer(config, folder, [*own, *callbacks], [])
    trainer.fit(build_model(config), datamodule=data)
    return trainer


def record_teacher(folder: Path) -> None:
    """A run of the same network, for distillation."""
    config = composed(None, 1, folder)
    trainer = fit(config, folder)
    run = RunDirectory(folder / "teacher")
    run.record(config, [])
    run.update_summary(status="finished")
    trainer.save_checkpoint(run.checkpoints / "last.ckpt")


def turns(technique: str, steps: int, pairs: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each turn with the technique, and of each without."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    total = steps * (pairs + WARM_UP_TURNS)
    sides = [Turns(steps, first, second), Turns(steps, second, first)]
    failures: list[BaseException] = []

    def run(config: dict[str, Any], side: Turns) -> None:
        try:
            fit(config, folder, side)
        except BaseException as error:
            failures.append(error)
            side.other.release()

    configs = [composed(technique, total, folder), composed(None, total, folder)]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(configs, sides, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sides[0].seconds[WARM_UP_TURNS:], sides[1].seconds[WARM_UP_TURNS:]


def peak_memory(technique: str | None, folder: Path) -> float:
    """MiB that a training of a few steps adds at its peak to what the process holds before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(composed(technique, 4, folder, *MEMORY), folder)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_added_by, (technique, folder))


def _added_by(technique: str | None, folder: Path) -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    fit(composed(technique, 4, folder, *MEMORY), folder)
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record_teacher(folder)
        for technique in arguments.techniques:
            # beside each other: what a process adds depends on what it holds already
            memory, plain = peak_memory(technique, folder), peak_memory(None, folder)
            ratio = ratio_interval(*turns(technique, arguments.steps, arguments.pairs, folder))
            rows.append(
                f"| `{technique}` | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} | {memory / plain:.2f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    text = "\n".join([
        "# What each technique costs, relative to training without it",
        "",
        provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "Workload: a small ResNet (32, 64, 128 channels) on digits of 16x16 pixels in batches of 32; turns of "
        f"{arguments.steps} steps,",
        f"{arguments.pairs} pairs of turns. Peak memory is what the training adds to a process, in batches of 128.",
        "",
        "| technique | step time | 95% interval | peak memory |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ])  # fmt: skip
    report(text, arguments.out)


if __name__ == "__main__":
    main()
