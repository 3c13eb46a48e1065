"""Ways to damage a checkpoint, and the table of what each comes to: benchmarks/results/damaged_checkpoints.md.

python tests/damage_checkpoints.py benchmarks/results/damaged_checkpoints.md
"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import TINY, Command, Outcome, runs_in, summary_of  # noqa: E402

from callbacks.recorder import Recorder  # noqa: E402
from lab.warm import WarmParent  # noqa: E402

EPOCHS = 4
RUN = [*TINY, f"trainer.max_epochs={EPOCHS}", "test_after_training=false"]
FILES = ("last", "previous", "best")


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    _replace(file, bytes(content))


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # best.ckpt may be a second name of last.ckpt
    file.write_bytes(content)


def _record(file: Path, name: str) -> int:
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(name))
    return info.header_offset + 400 + info.file_size // 2


def _directory(file: Path) -> int:
    with zipfile.ZipFile(file) as archive:
        return archive.start_dir + 20


def _saved(file: Path, content: Any) -> None:
    file.unlink()
    torch.save(content, file)


def _other_network(file: Path) -> None:
    state = {**torch.load(file, weights_only=True)}
    state.pop("run")
    state["state_dict"] = {"model.fc.weight": torch.zeros(2, 2)}
    _saved(file, state)


def _other_run(file: Path) -> None:
    _saved(file, {**torch.load(file, weights_only=True), "run": "12345678-s7"})


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: _replace(file, file.read_bytes()[:-1000]),
    "empty": lambda file: _replace(file, b""),
    "a byte of the data": lambda file: _flip(file, file.stat().st_size // 2),
    "a byte of the pickle": lambda file: _flip(file, _record(file, "data.pkl")),
    "a byte of the directory": lambda file: _flip(file, _directory(file)),
    "a byte of the seal": lambda file: _flip(file, file.stat().st_size - 20),
    "a text": lambda file: _replace(file, b"nothing of the kind\n" * 40),
    "a file of timm": lambda file: _saved(file, {"epoch": 3, "arch": "resnet10t", "state_dict": {}}),
    "another network": _other_network,
    "another run": _other_run,
    "missing": lambda file: file.unlink(),
}  # fmt: skip


def begun(start: Callable[..., Outcome], folder: Path) -> Path:
    """A run that failed in its last epoch but one, with all three checkpoints."""
    here, begin = os.getpid(), Recorder._begin_epoch

    def stop(recorder: Recorder, *rest: Any) -> None:
        assert os.getpid() == here
        if len(recorder.rows) == EPOCHS - 1:
            raise RuntimeError("stopped")
        begin(recorder, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_begin_epoch", stop)
        assert start(*RUN, "exp_dir=begun").status == 1
    (run,) = runs_in(folder / "begun")
    assert {file.stem for file in (run / "checkpoints").iterdir()} == set(FILES)
    return run


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    for name in ("best", "previous"):  # as links, where they were
        for other in ("last", "previous"):
            one, two = (run / "checkpoints" / f"{n}.ckpt" for n in (name, other))
            if name != other and one.samefile(two):
                (folder / "checkpoints" / one.name).unlink()
                os.link(folder / "checkpoints" / two.name, folder / "checkpoints" / one.name)
    return folder


def state_of(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def _short(outcome: Outcome, run: Path) -> str:
    lines = [line for line in outcome.out.splitlines() if line.startswith("note: ")]
    lines += [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    recovered = [text for text in summary_of(run).get("recovered", []) if f"note: {text}" not in lines]
    text = "; ".join([*lines, *recovered]).replace(f"{run}/checkpoints/", "").replace(str(run), "RUN")
    return f"{outcome.status}: {text or 'goes on'}".replace("|", "/")


def main(out: Path) -> None:
    """Write the table."""
    parent = WarmParent()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(*arguments: str) -> Outcome:
            return Command(folder, *arguments, warm=parent).outcome()

        mine = folder / "mine"
        mine.mkdir()
        (mine / "stopping.py").write_text(
            "from lightning.pytorch.callbacks import Callback\n"
            "class Stop(Callback):\n"
            "    def on_train_epoch_start(self, trainer, *rest):\n"
            f"        if trainer.current_epoch == {EPOCHS - 1} and trainer.default_root_dir.find('begun') > 0:\n"
            "            raise RuntimeError('stopped')\n"
        )
        user = [f"user_dir={mine}"]
        assert start(*RUN, *user, "+callbacks.stop._target_=stopping.Stop", "exp_dir=begun").status == 1
        (run,) = runs_in(folder / "begun")
        rows = []
        for file in FILES:
            for kind, damage in DAMAGES.items():
                copied = copy_of(run, folder / f"{file}-{kind}".replace(" ", "-"))
                damaged = copied / "checkpoints" / f"{file}.ckpt"
                damage(damaged)
                tested = start(f"run={copied}", *user, "task=test", f"ckpt_path={file}")
                typed = start(*RUN, "trainer.max_epochs=9", f"ckpt_path={damaged}", "exp_dir=typed")
                resumed = start(f"run={copied}", *user)
                cells = [_short(outcome, copied) for outcome in (resumed, tested, typed)]
                rows.append(f"| {file} | {kind} | " + " | ".join(cells) + " |")
                sys.stdout.write(rows[-1] + "\n")
                shutil.rmtree(folder / "typed", ignore_errors=True)
    parent.close()
    out.write_text(
        "# Damaged checkpoints\n\n"
        f"- Date: {datetime.date.today()}\n- Command: `python tests/damage_checkpoints.py {out}`\n"
        f"- A run of {EPOCHS} epochs that failed in the last; one of its checkpoints is damaged. The number is the "
        "exit status. A damaged file that is not the one to go on from does not matter; best.ckpt is made "
        "again where its state is in another file. `ckpt_path=FILE` starts a new run, for which a state of "
        "another run is good.\n\n"
        "| file | damage | `run=RUN` | `run=RUN task=test ckpt_path=NAME` | `ckpt_path=FILE` |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
