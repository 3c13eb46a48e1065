"""Training on the simulated GPU: what a steady step launches and waits for, and the recorded budget of launches.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/cuda_runs.py     # writes tests/launches.json anew

Launches are those of one step in the second epoch, with the loading of the next batch: of the tiny network of
`technique_runs`, in bf16-mixed, by technique. A change that needs more of them fails the test until it is written anew.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from conftest import ROOT
from lightning.pytorch import Callback
from simulated_cuda import SimulatedCuda, Wait, simulated_cuda
from technique_runs import TECHNIQUES, built, composed, make_teacher

from models.base_model import BaseModel

BUDGET = ROOT / "tests" / "launches.json"
TOLERANCE = 1.1  # versions of torch split an operator in two, or make one of two
SHORT = ("trainer.max_steps=6", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2")
STEPS = ("step3", "step4")  # of the second epoch, when all is warm; the last one's end is the epoch's
Plant = Callable[[BaseModel], None]


@dataclass(frozen=True)
class Walk:
    """What was seen of a training.

    Attributes:
        step: waits in two steady steps, and in what lies between them.
        validation: waits in each batch of validation, of all epochs together.
        launches: of one steady step.
        precision: of the trainer.
    """

    step: list[Wait]
    validation: list[list[Wait]]
    launches: int
    precision: str

    def faults(self, budget: int | None = None) -> list[str]:
        """What is wrong, in a line each: waits in a step, more than one a batch of validation, too many launches."""
        # the scaler of fp16 asks once a step whether the gradients are finite
        scaler = [wait for wait in self.step if wait.operator == "_local_scalar_dense" and _of_scaler(wait)]
        allowed = len(STEPS) if self.precision == "16-mixed" else 0
        found = [f"a step waits: {wait.operator} at {wait.where}" for wait in self.step if wait not in scaler]
        found += ["a step waits for the scaler more than once"] * (len(scaler) > allowed)
        for number, waits in enumerate(self.validation):
            if len(waits) > 1:
                found += [
                    f"validation batch {number} waits: {wait.operator} at {wait.where}" for wait in waits
                ]
        if budget is not None and self.launches > budget * TOLERANCE:
            found.append(f"a step launches {self.launches} kernels, {budget} are recorded")
        return found


def _of_scaler(wait: Wait) -> bool:
    return wait.where.endswith(" optimizer_step")


class Phases(Callback):
    """Tells the device what happens."""

    def __init__(self, device: SimulatedCuda) -> None:
        self.device, self.steps, self.evaluated = device, 0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.device.phase = f"step{self.steps}"

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # what follows is the loading of the next batch, or the end of an epoch
        self.device.phase = "end of epoch" if trainer.is_last_batch else f"step{self.steps}"
        self.steps += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.device.phase = f"validation{self.evaluated}"
        self.evaluated += 1

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.device.phase = "end of validation"


def seen(device: SimulatedCuda, precision: str) -> Walk:
    """What a device that has been walked on says."""
    validation = [device.waited(f"validation{number}") for number in range(4)]  # two in each of two epochs
    return Walk(device.waited(*STEPS), validation, device.launched(*STEPS) // len(STEPS), precision)


@contextlib.contextmanager
def watched_tasks(device: SimulatedCuda) -> Iterator[None]:
    """Trainings by `main.py` tell the device what happens."""
    from lab import tasks  # which is heavy

    build = tasks.build_trainer

    def watching(config: Any, folder: Path, callbacks: list[Callback], loggers: list[Any]) -> Any:
        return build(config, folder, [Phases(device), *callbacks], loggers)

    with patch.object(tasks, "build_trainer", watching):
        yield


def walk(
    *techniques: str,
    options: tuple[str, ...] = (),
    bf16: bool = True,
    teacher: Path | None = None,
    plant: Plant | None = None,
    callback: Callback | None = None,
) -> Walk:
    """Train six steps with techniques on the simulated GPU.

    Args:
        techniques: by name.
        options: further overrides.
        bf16: whether the GPU has it.
        teacher: a run's folder, for distillation.
        plant: changes the model before the training.
        callback: is called in the training.
    """
    with tempfile.TemporaryDirectory() as folder, simulated_cuda(bf16) as device:
        config = composed(*techniques, teacher=teacher, options=(*SHORT, *options))
        model, data, trainer = built(config, Path(folder))
        trainer.callbacks[:0] = [Phases(device)]  # type: ignore[attr-defined]
        trainer.callbacks += [callback] if callback else []  # type: ignore[attr-defined]
        if plant:
            plant(model)
        try:
            trainer.fit(model, datamodule=data)
        except RuntimeError as error:
            # the teardown fails next: weights that the traceback holds cannot be moved back to the host
            raise _first(error) from None
        assert trainer.strategy.root_device.type == "cuda"
        return seen(device, str(config["trainer"]["precision"]))


def _first(error: BaseException) -> BaseException:
    return error if error.__context__ is None else _first(error.__context__)


def budget() -> Mapping[str, int]:
    """The recorded launches of a step, by technique; `""` is none."""
    recorded: dict[str, int] = json.loads(BUDGET.read_text(encoding="utf-8"))
    return recorded


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder))
        launches = {name: walk(*filter(None, [name]), teacher=teacher).launches for name in ("", *TECHNIQUES)}
    BUDGET.write_text(json.dumps(launches, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
