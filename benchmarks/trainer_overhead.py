"""What Crucible costs on top of a hand-written loop: an epoch through main.py's path against plain PyTorch.

All train the same network on the same batches with the same device work (normalisation, forward, loss, backward,
SGD with momentum). The epochs alternate within one fit: after each of Crucible's epochs (default callbacks, progress
bar, metrics.csv, no checkpoint inside the timed part) come one of the hand-written loop and one of Lightning alone
(a module of a training step and an optimizer; no callback, logger or progress bar), each on a copy of the network.

    python benchmarks/trainer_overhead.py [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import lightning  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from paired import ratio_interval  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

WORKLOAD = [
    "data=synthetic", "data.module.num_samples=10080", "data.module.size=16", "data.module.batch_size=168",
    "model=timm", "model.type=test_resnet", "model.lr=0.01", "logger.wandb=null", "callbacks.plots=null",
    "test_after_training=false", "checkpoint.every=1000000", "checkpoint.keep=none", "metrics=[acc]",
]  # fmt: skip


class Stopwatch(Callback):
    """The seconds of each epoch of a fit."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


class Alone(LightningModule):
    """A training step and an optimizer, as Lightning's first page has them."""

    def __init__(self, network: nn.Module, transform: Any, options: Any) -> None:
        super().__init__()
        self.network, self.transform, self.options = network, transform, options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = self.transform(batch, "train", 0)
        return F.cross_entropy(self.network(batch.input), batch.target)

    def configure_optimizers(self) -> Any:
        return sgd(self.network, self.options)


def sgd(network: nn.Module, options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay
    )


class Others(Callback):
    """After each of Crucible's epochs, the same epoch by hand and by Lightning alone; the seconds of all."""

    def __init__(self) -> None:
        self.crucible: list[float] = []
        self.hand: list[float] = []
        self.alone = Stopwatch()
        self.steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.network = copy.deepcopy(pl_module.model)
        self.loader = trainer.datamodule.train_dataloader()
        self.transform = trainer.datamodule.batch_transform
        options = pl_module.optimizer_options
        self.optimizer = sgd(self.network, options)
        self.module = Alone(copy.deepcopy(pl_module.model), self.transform, options)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.crucible.append(time.perf_counter() - self.started)
        started = time.perf_counter()
        self.network.train()
        for batch in self.loader:
            batch = self.transform(batch, "train", trainer.current_epoch)
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.network(batch.input), batch.target).backward()
            self.optimizer.step()
        self.hand.append(time.perf_counter() - started)
        self.steps = len(self.loader)
        plain = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[self.alone],
        )  # fmt: skip
        plain.fit(self.module, self.loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="changes to the workload")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from crucible import configuration
    from crucible.run import RunDirectory
    from lab import tasks
    from lab.build import build_data
    from lab.config import check, resolve

    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        overrides = [*WORKLOAD, f"trainer.max_epochs={arguments.epochs + 2}", "trainer.limit_val_batches=0"]
        config = configuration.to_plain(compose("train", [*overrides, *arguments.overrides]))
    check(config, overrides)
    data = build_data(config)
    data.setup("fit")
    resolve(config, data)
    others = Others()
    config["callbacks"]["hand"] = {"_target_": "hand"}
    instantiate = tasks.instantiate
    tasks.instantiate = lambda node, **kw: (
        others if node.get("_target_") == "hand" else instantiate(node, **kw)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        run.record({k: v for k, v in config.items() if k != "callbacks"}, [])
        tasks.train(run, config, None)
    theirs = others.hand[2:]
    step_ms = 1000 * sorted(theirs)[len(theirs) // 2] / others.steps
    rows = []
    for name, seconds in (("Crucible", others.crucible[2:]), ("Lightning alone", others.alone.seconds[2:])):
        ratio, low, high = ratio_interval(seconds, theirs)
        differences = sorted(1e6 * (a - b) / others.steps for a, b in zip(seconds, theirs, strict=True))
        rows.append(
            f"| {name} | {ratio:.3f} | {low:.3f} to {high:.3f} | {differences[len(differences) // 2]:.0f} |"
        )
    text = "\n".join([
        "# Trainer overhead: an epoch through Crucible, and one of Lightning alone, against a hand-written loop",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, {arguments.threads} thread, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, python {platform.python_version()}",
        f"`python benchmarks/trainer_overhead.py --epochs {arguments.epochs} --threads {arguments.threads} "
        f"{' '.join(arguments.overrides)}`".replace(" `", "`"),
        "",
        f"Workload: {' '.join(WORKLOAD[:6])}; {others.steps} steps an epoch, {step_ms:.1f} ms a step by hand; "
        f"{len(theirs)} epochs of each, alternating.",
        "",
        "| | ratio to the hand loop | 95% interval | overhead a step, us (median) |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
    ])  # fmt: skip
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
