"""What watching for numbers that are not finite costs: a step with `on_nonfinite=stop`, and `skip`, against none.

One process, three trainings of one network on the same batches, each in a thread of its own that is let go for a few
steps at a time, in turn: so what disturbs the machine disturbs all. On a CPU the time is that of the process, which
others on the machine do not add to.

    python benchmarks/guards.py [--out FILE] [OPTION=VALUE ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from paired import provenance, ratio_interval, report  # noqa: E402

WORKLOAD = [
    "data=synthetic", "data.module.num_samples=20160", "data.module.size=16", "data.module.batch_size=168",
    "model=timm", "model.type=test_resnet", "model.lr=0.01", "logger.wandb=null", "callbacks.plots=null",
    "callbacks.progress=null", "trainer.enable_progress_bar=false", "metrics=[acc]", "trainer.limit_val_batches=0",
]  # fmt: skip
ARMS = ("off", "stop", "skip")


class Turns(Callback):
    """Trains `steps` steps when it is let go, then notes their time and waits."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self._left = 0

    def _now(self, trainer: Any) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not self._left:
            self.go.acquire()
            self._left, self._began = self.steps, self._now(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            self.seconds.append(self._now(trainer) - self._began)
            self.done.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("overrides", nargs="*", help="changes to the workload")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from callbacks.nonfinite import Guard
    from crucible import configuration
    from crucible.run import RunDirectory
    from lab.build import build_data, build_model, build_trainer
    from lab.config import check, resolve

    warm_up = 3
    total = (arguments.rounds + warm_up) * arguments.steps
    length = ["trainer.max_epochs=-1", f"trainer.max_steps={total}"]
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", [*WORKLOAD, *length, *arguments.overrides]))
    check(config, [])
    data = build_data(config)
    data.check()
    resolve(config, data)
    turns = {arm: Turns(arguments.steps) for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        threads = []
        for arm in ARMS:
            run = RunDirectory(Path(folder) / arm)
            run.record(config, [])
            guards = [] if arm == "off" else [Guard(run, arm)]  # type: ignore[arg-type]
            own = build_data(config)
            options = {**config["trainer"], "enable_checkpointing": False}
            trainer = build_trainer({**config, "trainer": options}, run.path, [*guards, turns[arm]], [])
            model = build_model(config)
            threads.append(threading.Thread(target=trainer.fit, args=(model,), kwargs={"datamodule": own}))
            threads[-1].start()
        device = trainer.strategy.root_device
        for number in range(arguments.rounds + warm_up):
            order = [ARMS[(number + k) % len(ARMS)] for k in range(len(ARMS))]
            for arm in order:
                turns[arm].go.release()
                turns[arm].done.acquire()
        for thread in threads:
            thread.join()
    measured = {arm: turns[arm].seconds[warm_up:] for arm in ARMS}
    step = 1000 * sorted(measured["off"])[arguments.rounds // 2] / arguments.steps
    rows = []
    for arm in ARMS[1:]:
        ratio, low, high = ratio_interval(measured[arm], measured["off"])
        rows.append(f"| {arm} | {ratio:.4f} | {low:.4f} to {high:.4f} | {1000 * step * (ratio - 1):.0f} |")
    clock = "wall time, synchronised" if device.type == "cuda" else "processor time"
    text = "\n".join([
        "# Watching for numbers that are not finite: a step with `on_nonfinite` against none",
        "",
        provenance(device),
        f"Workload: {' '.join([*WORKLOAD, *arguments.overrides])}; {step:.1f} ms a step without; {clock} of "
        f"{arguments.rounds} rounds of {arguments.steps} steps each, in turn.",
        "",
        "| on_nonfinite | ratio to none | 95% interval | a step, us |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ])  # fmt: skip
    report(text, arguments.out)


if __name__ == "__main__":
    main()
