"""What Crucible costs on top of a hand-written loop: an epoch through main.py's path against plain PyTorch.

Both train the same network on the same batches with the same device work (normalisation, forward, loss, backward,
SGD with momentum). The epochs alternate within one fit: after each of Crucible's epochs (default callbacks, progress
bar, metrics.csv, no checkpoint inside the timed part) comes one of the hand-written loop on a copy of the network.

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

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from paired import ratio_interval  # noqa: E402
from torch.nn import functional as F  # noqa: E402

WORKLOAD = [
    "data=synthetic", "data.module.num_samples=10080", "data.module.size=16", "data.module.batch_size=168",
    "model=timm", "model.type=test_resnet", "model.lr=0.01", "logger.wandb=null", "callbacks.plots=null",
    "test_after_training=false", "checkpoint.every=1000000", "checkpoint.keep=none", "metrics=[acc]",
]  # fmt: skip


class HandLoop(Callback):
    """After each of Crucible's epochs, the same epoch by hand; the seconds of both."""

    def __init__(self) -> None:
        self.crucible: list[float] = []
        self.hand: list[float] = []
        self.steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.network = copy.deepcopy(pl_module.model)
        self.loader = trainer.datamodule.train_dataloader()
        self.transform = trainer.datamodule.batch_transform
        options = pl_module.optimizer_options
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay
        )

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
    hand = HandLoop()
    config["callbacks"]["hand"] = {"_target_": "hand"}
    instantiate = tasks.instantiate
    tasks.instantiate = lambda node, **kw: hand if node.get("_target_") == "hand" else instantiate(node, **kw)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        run.record({k: v for k, v in config.items() if k != "callbacks"}, [])
        tasks.train(run, config, None)
    ours, theirs = hand.crucible[2:], hand.hand[2:]
    ratio, low, high = ratio_interval(ours, theirs)
    step_ms = 1000 * sorted(theirs)[len(theirs) // 2] / hand.steps
    differences = sorted(1e6 * (a - b) / hand.steps for a, b in zip(ours, theirs, strict=True))
    text = "\n".join([
        "# Trainer overhead: an epoch through Crucible against a hand-written loop",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, {arguments.threads} thread, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        f"`python benchmarks/trainer_overhead.py --epochs {arguments.epochs} --threads {arguments.threads} "
        f"{' '.join(arguments.overrides)}`".replace(" `", "`"),
        "",
        f"Workload: {' '.join(WORKLOAD[:6])}; {hand.steps} steps an epoch; {len(ours)} pairs of epochs, alternating.",
        "",
        "| step of the hand loop, ms | ratio Crucible / hand | 95% interval | overhead a step, us (median) |",
        "| ---: | ---: | ---: | ---: |",
        f"| {step_ms:.1f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {differences[len(differences) // 2]:.0f} |",
        "",
    ])  # fmt: skip
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
