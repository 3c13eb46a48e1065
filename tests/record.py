"""What must stay as it is while the code is rearranged: trained states, run ids, recorded run folders.

    export PYTHONPATH=.:tests OMP_NUM_THREADS=1
    python tests/record.py write tests/recorded.json     # all of it; before the first move
    python tests/record.py compare tests/recorded.json   # after the last; what a correction changes is written anew

Each trained case is six steps on digits of one technique or of a drawn pair, in fp32 and bf16: a hash of weights,
averages and optimizer state, and their norms. Hashes hold on one kind of machine and one version of torch, norms
everywhere to a few digits. Ids are those of every recipe and of the command lines below, and hold everywhere.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from technique_runs import TECHNIQUES, built, composed, make_teacher

from crucible import configuration
from docs.generate import refused_pairs
from lab.config import SWEEP_OPTIONS, check, resolve
from lab.experiment import Examiner, identity, kind

PRECISIONS = ("32-true", "bf16-mixed")
PAIRS = 40
STEPS = (
    "trainer.max_steps=6", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2", "model.optimizer=Adam",
    "model.lr=0.003",
)  # fmt: skip
STATES = ("state_dict", "averaged_state_dict", "optimizer_states", "lr_schedulers", "train_sums")

# complete commands on embedded data, and fragments put behind them
BASES = (
    "", "model=preact_resnet", "model=wide_resnet data=synthetic", "model=vgg data=synthetic",
    "model=cifar_resnet model.depth=8", "model=timm model.type=resnet10t data=synthetic",
)  # fmt: skip
FRAGMENTS = (
    "", "seed=3", "technique=mixup", "technique=[powergrad,label_smoothing]", "technique=sam model.sam_rho=0.1",
    "technique=ema data.module.batch_size=32 model.ema_decay=0.9", "technique=online_norm trainer.max_epochs=3",
    "model.optimizer=AdamW model.lr=0.001 trainer.precision=bf16-mixed", "technique=[cutout,swa] trainer.max_steps=50",
    "model.scheduler=MultiStep model.warmstart=2 trainer.gradient_clip_val=1.0 callbacks.plots=null",
)  # fmt: skip


def machine() -> str:
    """What the bits of a result depend on: torch, and the processor with all that it can."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model", "stepping", "cpu family", "flags"))})
    processor = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, processor {processor}"


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items: Any = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return {k: v for key, part in items for k, v in tensors(part, f"{name}.{key}").items()}


def digest(state: dict[str, Any]) -> tuple[str, float]:
    """A hash of the named parts of a training state, bit by bit, and the norm of all their numbers."""
    found = tensors({name: state.get(name, {}) for name in STATES})
    text, squares = hashlib.sha256(), 0.0
    for name in sorted(found):
        text.update(name.encode())
        tensor = found[name].detach().contiguous().reshape(-1)
        text.update(tensor.view(torch.uint8).numpy().tobytes())
        squares += float(tensor.double().square().sum()) if tensor.is_floating_point() else 0.0
    return text.hexdigest()[:16], squares**0.5


def trained(techniques: tuple[str, ...], precision: str, folder: Path, teacher: Path) -> dict[str, Any]:
    """Six steps of these techniques: the hash and the norm of what they came to, and the last values logged."""
    options = (*STEPS, f"trainer.precision={precision}")
    model, data, trainer = built(composed(*techniques, teacher=teacher, options=options), folder)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "state.ckpt")
    bits, norm = digest(torch.load(folder / "state.ckpt", weights_only=True))
    logged = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    return {"bits": bits, "norm": norm, "logged": logged}


def new_cases() -> list[str]:
    """Each technique, forty drawn pairs, and none, in each precision."""
    pairs = [pair for pair in combinations(TECHNIQUES, 2) if pair not in refused_pairs()]
    drawn = sorted(random.Random(0).sample(pairs, PAIRS))
    chosen = [(), *((name,) for name in TECHNIQUES), *drawn]
    return [f"{'+'.join(names) or 'baseline'} {precision}" for names in chosen for precision in PRECISIONS]


def train_case(case: str, folder: Path, teacher: Path) -> dict[str, Any]:
    """What the case of this name comes to."""
    names, precision = case.split()
    return trained(() if names == "baseline" else tuple(names.split("+")), precision, folder, teacher)


class _Data:
    """Stands for data that are not here: 50,000 samples of ten classes."""

    name = "stand-in"

    def __init__(self, config: dict[str, Any]) -> None:
        self.batch_size, self.drop_last = (
            config["data"]["module"][name] for name in ("batch_size", "drop_last")
        )
        self.class_names = [str(i) for i in range(config["data"]["num_classes"] or 10)]

    def samples(self, split: str) -> range:
        return range(50_000)

    def groups(self, split: str) -> None:
        return None


def composed_for(overrides: list[str]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        return compose("train", overrides)


def recipes() -> list[str]:
    """The names of all recipes."""
    folder = ROOT / "cli_configs" / "recipe"
    files = (file for file in sorted(folder.rglob("*.yaml")) if not file.name.startswith("_"))
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]


def recipe_ids(names: Sequence[str]) -> dict[str, str]:
    """The identities of recipes, with stand-in data."""
    found = {}
    for name in names:
        config = configuration.to_plain(composed_for([f"recipe={name}", "trainer.sync_batchnorm=false"]))
        for option in SWEEP_OPTIONS:
            config.pop(option)
        check(config, [])
        resolve(config, _Data(config))
        found[name] = identity(config, {"data": "stand-in"}) + " " + kind(config)
    return found


def command_lines() -> list[str]:
    """Sixty of them."""
    return [" ".join([*base.split(), *fragment.split()]) for base in BASES for fragment in FRAGMENTS]


def command_ids(commands: Sequence[str]) -> dict[str, str]:
    """Run id, kind and arm of each command line, on its real data."""
    found = {}
    for command in commands:
        job = Examiner().examine(composed_for(command.split()), command.split())
        found[command] = " | ".join(str(job.facts[k]) for k in ("run_id", "kind", "arm"))
    return found


def main(action: str, file: Path) -> int:
    """Write the record, or say what differs from it; the exit status."""
    before = {} if action == "write" else json.loads(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = make_teacher(folder / "teaching")
        states = {case: train_case(case, folder, teacher) for case in before.get("states") or new_cases()}
    now = {
        "machine": machine(),
        "states": states,
        "recipes": recipe_ids(recipes()),
        "commands": command_ids(command_lines()),
    }
    if action == "write":
        file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return 0
    differing = 0
    for part in ("states", "recipes", "commands"):
        for case in before[part]:
            if before[part][case] != now[part].get(case):
                differing += 1
                print(f"{part}: {case}: {before[part][case]} -> {now[part].get(case)}")
        print(f"{part}: {len(before[part])} compared")
    print(f"{differing} differ ({before['machine']}; now {now['machine']})")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
