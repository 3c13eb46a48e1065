"""Claim: a wrong input is answered by one line that holds the option or file, the value and a way on, and by no run.

Sixty wrong commands by hand, each in this process; exit status 1 where one is answered otherwise:
    python benchmarks/wrong_inputs.py --out benchmarks/results/wrong_inputs.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hydra.core.global_hydra import GlobalHydra  # noqa: E402

import main as entry  # noqa: E402
import report as report_entry  # noqa: E402


class Wrong(NamedTuple):
    """A wrong command: what of option or file, and of the value, its line has to hold."""

    command: str
    holds: tuple[str, ...]


def _of(command: str, *holds: str) -> Wrong:
    return Wrong(command, holds)


# run in a folder with what `prepare` puts into it; those without data= or run= are of data=synthetic
WRONG = (
    # names of options
    _of("model.lrr=1", "model.lrr", "lr"),
    _of("trainer.max_epoch=3", "trainer.max_epoch=3", "max_epochs"),
    _of("modle=resnet", "modle=resnet", "model"),
    _of("+model.shake=true", "model.shake", "shakedrop"),
    _of("data.module.btch_size=3", "data.module.btch_size=3", "batch_size"),
    _of("data=digits data.module.train_transforms.paddng=2", "train_transforms.paddng=2", "padding"),
    _of("technique=online_norm model.norm_kwargs.emc=ac", "emc", "ecm"),
    _of("technique=online_norm model.norm_kwargs.ecm=xx", "ecm", "xx", "ac"),
    _of("--model.lr=1", "--model.lr=1", "model.lr=1"),
    _of("--lr 1", "--lr", "no such flag"),
    _of("--cfg jobs", "jobs", "job, hydra, all"),
    _of("model", "model", "NAME=VALUE"),
    # groups
    _of("model=resnett", "model=resnett", "did you mean resnet"),
    _of("data=cifar", "data=cifar", "cifar10"),
    _of("technique=mixupp", "technique=mixupp", "mixup"),
    _of("model=1", "model=1", "resnet"),
    _of("data=null", "data=null", "digits"),
    # values
    _of("model.lr=abc", "model.lr", "'abc'", "number"),
    _of("model.lr=-1", "model.lr", "-1", "(0, inf)"),
    _of("model.lr=[1,2]", "model.lr", "[1, 2]", "(0, inf)"),
    _of("model.lr=0.1,0.2", "model.lr", "0.1,0.2", "-m"),
    _of("model.optimizer=SDG", "model.optimizer", "SDG", "SGD"),
    _of("model.label_smoothing=1.5", "model.label_smoothing", "1.5", "[0, 1)"),
    _of("model.norm_kwargs=3", "model.norm_kwargs", "3"),
    _of("trainer.max_epochs=1e400", "trainer.max_epochs", "inf", "whole number"),
    _of("trainer.max_epochs=0", "trainer.max_epochs", "0", "[1, inf)"),
    _of("trainer.precision=bf16-mixd", "trainer.precision", "bf16-mixd", "bf16-mixed"),
    _of("trainer.devices=0", "trainer.devices", "0"),
    _of("trainer.limit_val_batches=1.5", "trainer.limit_val_batches", "1.5", "[0, 1]"),
    _of("data.module.batch_size=0", "data.module.batch_size", "0", "[1, inf)"),
    _of("data.module.val_split=2", "data.module.val_split", "2", "(0, 1)"),
    _of("metrics=[accuracy]", "metrics", "accuracy", "acc"),
    _of("seed=-1", "seed", "-1", "4294967295"),
    _of("checkpoint.keep=all", "checkpoint.keep", "all", "best"),
    _of("checkpoint.monitor=val/accuracy", "val/accuracy", "val/acc"),
    _of("callbacks.progress=5", "callbacks.progress", "5", "null"),
    _of("technique=[mixup", "technique=[mixup", "text"),
    # combinations
    _of("model.adaptive_sam=true", "model.adaptive_sam", "model.sam"),
    _of("model.sam=true trainer.accumulate_grad_batches=2", "model.sam", "accumulate_grad_batches"),
    _of("model.optimizer=Adam model.nesterov=true", "model.nesterov", "Adam"),
    _of("equal_time=true", "equal_time=true", "-m"),
    # files and folders
    _of("user_dir=nowhere", "user_dir=nowhere", "no such folder"),
    _of("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt", "no such file"),
    _of("ckpt_path=dangling", "ckpt_path=dangling", "gone", "mend the link"),
    _of("ckpt_path=text.txt", "text.txt", "ckpt_path"),
    _of("model.init_from=nowhere.pt", "model.init_from=nowhere.pt", "no such file"),
    _of("model.init_from=text.txt", "model.init_from", "text.txt"),
    _of("exp_dir=text.txt", "exp_dir=text.txt", "exp_dir=PATH"),
    _of("data.module.name=../../x", "data.module.name", "../../x", "exp_dir"),
    _of("data.module.name=a/b", "data.module.name", "a/b", "exp_dir"),
    _of("data=image_folder data.module.data_root_dir=nowhere", "data_root_dir=nowhere", "no such folder"),
    _of("data=image_folder data.module.data_root_dir=dangling", "data_root_dir=dangling", "gone", "link"),
    _of("data=cifar10 data.module.data_root_dir=/nowhere/at/all", "/nowhere/at/all", "make that folder"),
    _of("user_dir=mine model=broken", "broken.yaml, line 3", "mend"),
    _of("+callbacks.stop._target_=callbacks.nothing.Stop", "callbacks.stop._target_", "callbacks.nothing"),
    _of("+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss,mode:mix}", "mix"),
    _of("+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val_loss}", "val_loss"),
    # recorded runs
    _of("run=nowhere", "run=nowhere", "config.yaml"),
    _of("run=dangling", "run=dangling", "gone", "link"),
    _of("run='nothing/*'", "run=nothing/*", "give a folder"),
    _of("run=nowhere task=tset", "task=tset", "test"),
    # the report
    _of("report.py runs=nowhere", "runs=nowhere", "no such folder"),
    _of("report.py runs=mine out=text.txt/report", "out=text.txt/report", "out=PATH"),
)  # fmt: skip


def prepare(folder: Path) -> None:
    """What the commands name: a link to nothing, a text, a folder with a broken configuration."""
    (folder / "dangling").symlink_to(folder / "gone")
    (folder / "text.txt").write_text("no weights\n")
    models = folder / "mine" / "cli_configs" / "model"
    models.mkdir(parents=True)
    (models / "broken.yaml").write_text("_target_: a.B\nlr: [1, 2\n")


def arguments_of(command: str) -> tuple[str, list[str]]:
    """The script and its arguments, of the data made up for it where it names none."""
    arguments = shlex.split(command)
    if arguments[0] == "report.py":
        return "report.py", arguments[1:]
    own = any(a.startswith(("data=", "run=")) for a in arguments)
    return "main.py", [*([] if own else ["data=synthetic", "logger.wandb=null"]), *arguments]


def answer(command: str) -> tuple[int, str]:
    """The exit status and what went to stderr."""
    script, arguments = arguments_of(command)
    before, path, error = dict(os.environ), list(sys.path), io.StringIO()
    GlobalHydra.instance().clear()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            sys.argv = [script, *arguments]
            status = report_entry.main(arguments) if script == "report.py" else entry.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(before)
            sys.path[:] = path
    return status, error.getvalue()


def faults(wrong: Wrong, status: int, said: str, folder: Path) -> Iterator[str]:
    """What is wrong with an answer."""
    lines = said.strip().splitlines()
    if status != 2:
        yield f"exit status {status}"
    if len(lines) != 1 or "Traceback" in said:
        yield f"{len(lines)} lines"
    yield from (f"lacks {part!r}" for part in wrong.holds if part not in said)
    if "HYDRA_FULL_ERROR" in said or re.search(r"error: \w+Error", said):
        yield "a generic line"
    if any(folder.rglob("config.yaml")):
        yield "a run folder is left"


def main(arguments: Sequence[str]) -> int:
    """Give all commands; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    out = parser.parse_args(arguments).out
    out = out.resolve() if out else None
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        prepare(folder)
        for wrong in WRONG:
            began = time.perf_counter()
            status, said = answer(wrong.command)
            seconds = time.perf_counter() - began
            found = list(faults(wrong, status, said, folder))
            bad += bool(found)
            for fault in found:
                print(f"{wrong.command}: {fault}: {said.strip()}", flush=True)
            line = said.strip().replace(str(ROOT), "CHECKOUT").replace(name, "FOLDER").replace("|", "\\|")
            rows.append(f"| `{wrong.command}` | {line} | {seconds:.1f} |")
    head = [
        "# Wrong inputs", "",
        "`python benchmarks/wrong_inputs.py --out benchmarks/results/wrong_inputs.md`; seconds in one process, whose",
        f"first loads torch. {len(WRONG)} commands, {bad} answered otherwise than by one line that holds the",
        "option or file, the value and a way on, with status 2 and no run folder.", "",
        "| command | answer | seconds |", "| --- | --- | ---: |",
    ]  # fmt: skip
    if out:
        out.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    print(f"{len(WRONG) - bad} of {len(WRONG)} are answered by one line")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
