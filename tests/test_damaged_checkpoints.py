"""A checkpoint is believed only when whole; a run goes on from one that is, and never begins anew in silence."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, nightly, runs_in
from damage_checkpoints import DAMAGES, EPOCHS, FILES, RUN, begun, copy_of, state_of, summary_of

from callbacks.checkpoints import AtomicCheckpointIO, Checkpoints, Saving
from crucible import sealed
from crucible.finite import all_finite, tensors_in
from crucible.run import RunDirectory

IN_CI = {
    "last": ["a byte of the data"],
    "previous": [],
    "best": ["missing"],
}


def equal(one: Path, other: Path) -> bool:
    a, b = (state_of(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def epochs_in(run: Path) -> list[str]:
    return [row["epoch"] for row in RunDirectory(run).metrics()]


def check_whole(run: Path, whole: Path) -> None:
    """The run ended as one that nothing happened to."""
    assert equal(run, whole)
    assert epochs_in(run) == [str(epoch) for epoch in range(EPOCHS)]
    assert {file.stem for file in (run / "checkpoints").iterdir()} == {"last", "best"}
    best = state_of(run / "checkpoints" / "best.ckpt")["callbacks"]["Checkpoints"]["best"]
    assert best == summary_of(run)["best"] == summary_of(whole)["best"]


@pytest.fixture
def stopped(cli, tmp_path: Path) -> Path:
    return begun(cli, tmp_path)


@pytest.fixture
def whole(cli, tmp_path: Path) -> Path:
    assert cli(*RUN, "exp_dir=whole").status == 0
    (run,) = runs_in(tmp_path / "whole")
    return run


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    state = {"state_dict": {"w": torch.randn(400, 40)}, "loops": {}, "run": "a"}
    sealed.write(state, file)
    assert sealed.damage(file) == "" and torch.equal(
        torch.load(file, weights_only=True)["state_dict"]["w"], state["state_dict"]["w"]
    )
    os.link(file, tmp_path / "other.ckpt")
    shutil.copy(file, tmp_path / "third.ckpt")
    assert not sealed.damage(tmp_path / "other.ckpt") and not sealed.damage(tmp_path / "third.ckpt")
    DAMAGES[kind](file)
    assert bool(sealed.damage(file)) != (kind in ("another network", "another run", "a file of timm"))


@pytest.mark.parametrize("step", [97, *nightly(1)])
def test_no_flipped_byte_passes(step: int, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    sealed.write({"state_dict": {"w": torch.randn(30)}, "loops": {}}, file)
    content = file.read_bytes()
    for at in [*range(0, len(content), step), *range(len(content) - 60, len(content))]:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert sealed.damage(file), at
        file.write_bytes(content[:at])
        assert sealed.damage(file), at


def test_a_checkpoint_of_before_is_believed_where_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"w": torch.randn(1000)}, file)
    assert sealed.damage(file) == ""
    DAMAGES["a byte of the data"](file)
    assert "damaged" in sealed.damage(file)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_nothing_had_happened(
    cli, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    for file, kinds in IN_CI.items():
        for kind in kinds:
            _check(cli, stopped, whole, tmp_path / f"{file}-{kind}".replace(" ", "-"), file, kind)


def _check(cli: Any, stopped: Path, whole: Path, folder: Path, file: str, kind: str) -> None:
    run = copy_of(stopped, folder)
    damaged = run / "checkpoints" / f"{file}.ckpt"
    DAMAGES[kind](damaged)
    outcome = cli(f"run={run}")
    assert outcome.status == 0, outcome.err
    if file == "last":
        (line,) = [line for line in outcome.out.splitlines() if line.startswith("note: last.ckpt")]
        assert f"goes on from previous.ckpt, after epoch {EPOCHS - 2} of " in line
        assert line.removeprefix("note: ") in summary_of(run)["recovered"]
        assert line.removeprefix("note: ") in (run / "main.log").read_text()
    check_whole(run, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_every_checkpoint(
    cli, stopped: Path, whole: Path, tmp_path: Path, file: str, kind: str
) -> None:
    _check(cli, stopped, whole, tmp_path / "copy", file, kind)


@pytest.mark.slow
def test_without_a_whole_checkpoint_the_run_is_refused_and_left_as_it_is(cli, stopped: Path) -> None:
    folder = stopped / "checkpoints"
    for name, kind in zip(FILES, ("truncated", "empty", "a text"), strict=True):
        DAMAGES[kind](folder / f"{name}.ckpt")
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    outcome = cli(f"run={stopped}")
    (line,) = outcome.err.strip().splitlines()
    assert outcome.status == 2 and "fresh=true" in line and str(stopped) in line
    for text in ("last.ckpt is truncated", "previous.ckpt is empty", "best.ckpt is no file of torch"):
        assert text in line
    assert before == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    assert summary_of(stopped)["status"] == "failed" and len(epochs_in(stopped)) == EPOCHS - 1
    for arguments in ((f"run={stopped}", "task=test"), (*RUN, f"ckpt_path={folder / 'last.ckpt'}")):
        outcome = cli(*arguments)
        (line,) = outcome.err.strip().splitlines()
        assert outcome.status == 2 and ".ckpt: it is " in line
    for file in folder.iterdir():
        file.unlink()
    outcome = cli(f"run={stopped}")
    assert outcome.status == 0 and f"metrics.csv has {EPOCHS - 1} epochs" in outcome.out
    assert epochs_in(stopped) == [str(epoch) for epoch in range(EPOCHS)]


def test_what_is_asked_for_by_name_is_refused_with_the_good_ones_beside_it(cli, stopped: Path) -> None:
    best = stopped / "checkpoints" / "best.ckpt"
    DAMAGES["a byte of the pickle"](best)
    for arguments in ((f"run={stopped}", "task=test"), (*RUN, "exp_dir=new", f"ckpt_path={best}")):
        outcome = cli(*arguments)
        (line,) = outcome.err.strip().splitlines()
        assert outcome.status == 2 and f"ckpt_path={best}: it is damaged" in line
        assert "whole beside it: last.ckpt, previous.ckpt" in line
    assert not (stopped.parents[2] / "new").exists()


@pytest.mark.slow
def test_a_kill_between_last_and_best_leaves_no_best_of_before(
    cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints._save_best
    writes = [2]

    def stop(checkpoints: Checkpoints, trainer: Any) -> None:
        writes[0] -= 1
        if not writes[0]:
            raise RuntimeError("killed")
        save(checkpoints, trainer)

    monkeypatch.setattr(Checkpoints, "_save_best", stop)
    command = [*RUN, "exp_dir=killed"]
    assert cli(*command).status == 1
    assert cli(*command).status == 0
    (run,) = runs_in(tmp_path / "killed")
    check_whole(run, whole)
    assert "best.ckpt was made again, from last.ckpt" in summary_of(run)["recovered"]


def test_a_kill_between_last_and_best_of_the_last_epoch_leaves_a_best_too(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(checkpoints: Checkpoints, trainer: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_save_best", stop)
        assert cli(*TINY).status == 1
    assert cli(*TINY).status == 0
    (run,) = runs_in(tmp_path)
    best, last = (state_of(run / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] and summary_of(run)["best"]["epoch"] == 0


@pytest.mark.slow
def test_a_state_that_is_not_finite_never_replaces_one_that_is(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Checkpoints.on_train_batch_end

    def spoil(checkpoints: Checkpoints, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == 5:
            with torch.no_grad():
                next(buffer for name, buffer in module.named_buffers() if "running_var" in name).fill_(
                    float("inf")
                )
        end(checkpoints, trainer, module, *rest)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", spoil)
    outcome = cli(*TINY, "trainer.max_epochs=1", "checkpoint.every_steps=1", "test_after_training=false")
    assert outcome.status == 1 and "diverged" in outcome.err
    (run,) = runs_in(tmp_path)
    state = state_of(run / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


@pytest.mark.parametrize("name", ["state_dict", "averaged_state_dict", "optimizer_states"])
def test_a_file_is_not_replaced_by_a_state_that_is_not_finite(tmp_path: Path, name: str) -> None:
    file = tmp_path / "last.ckpt"
    good = {n: {"x": torch.ones(3)} for n in ("state_dict", "averaged_state_dict", "optimizer_states")}
    AtomicCheckpointIO().save_checkpoint(good, file, Saving())
    before, saving = file.read_bytes(), Saving()
    AtomicCheckpointIO().save_checkpoint(
        {**good, name: {"x": torch.tensor([1.0, float("nan")])}}, file, saving
    )
    assert not saving.finite and file.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_number_that_is_not_finite_is_seen_and_no_large_one(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for size in (1, 7, 1000):
        for bad in ("nan", "inf", "-inf"):
            tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype, device=device)
            tree = {"a": [torch.ones(3, device=device), torch.ones(2, dtype=torch.int64)], "b": {"c": tensor}}
            assert all_finite(tensors_in(tree))
            tensor[size // 2] = float(bad)
            assert not all_finite(tensors_in(tree))


# what cannot be written


class Full:
    """No space for files whose names begin with one of these, as on a full disk."""

    def __init__(self, *names: str, number: int = errno.ENOSPC) -> None:
        self.names, self.number = names, number

    def refuse(self, file: object) -> None:
        name = Path(str(file)).name.lstrip(".")
        if name.startswith(self.names):
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("names", "number", "said"),
    [
        (("last.ckpt",), errno.ENOSPC, "last.ckpt: no space left on the device (2 MB needed)"),
        (("metrics.csv", "summary.json"), errno.EDQUOT, "the quota of the disk is used up"),
        (("config.yaml",), errno.EROFS, "config.yaml: the file system is read-only"),
    ],
    ids=["checkpoint", "records", "start"],
)
def test_what_cannot_be_written_is_one_line_and_the_same_command_goes_on(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], number: int, said: str
) -> None:
    full, replace = Full(*names, number=number), Path.replace

    def refusing(path: Path, target: Path) -> Path:
        # from the second checkpoint or row of metrics.csv on, or from the start
        if "config.yaml" in names or (
            Path(target).parent.name and Path(target).exists() and _is_begun(target)
        ):
            full.refuse(target)
        return replace(path, target)

    command = [*TINY, "trainer.max_epochs=3", "test_after_training=false"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refusing)
        outcome = cli(*command)
    assert outcome.status == 1 and "Traceback" not in outcome.err + outcome.out
    (line,) = [line for line in outcome.err.strip().splitlines() if line.startswith("error: ")]
    assert said in line and "the same command goes on" in line
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("claim"))
    assert cli(*command).status == 0
    (run,) = runs_in(tmp_path)
    assert summary_of(run)["status"] == "finished" and len(epochs_in(run)) == 3
    if "last.ckpt" in names:
        assert cli(*command, "exp_dir=again").status == 0
        assert equal(run, runs_in(tmp_path / "again")[0])


def _is_begun(target: Path) -> bool:
    run = RunDirectory(target.parent if target.parent.name != "checkpoints" else target.parent.parent)
    return (run.checkpoints / "last.ckpt").exists() and len(run.metrics()) > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of some 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", folder]).returncode:
        pytest.skip("a small file system needs root, to be mounted")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_room_is_made(shell, small_disk: Path) -> None:
    command = [*TINY, "trainer.max_epochs=3", "model.depth=8", "checkpoint.every_steps=1"]
    outcome = shell(*command, f"exp_dir={small_disk}")
    assert outcome.status == 1 and "Traceback" not in outcome.err + outcome.out
    (line,) = outcome.err.strip().splitlines()
    assert "no space left on the device" in line and str(small_disk) in line
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob("claim"))
    (run,) = runs_in(small_disk)
    assert summary_of(run)["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    outcome = shell(*command, f"exp_dir={small_disk}")
    assert outcome.status == 0, outcome.err
    assert len(epochs_in(run)) == 3


@pytest.mark.nightly
def test_two_processes_end_together_where_the_disk_is_full(shell, small_disk: Path) -> None:
    outcome = shell(*TINY, "trainer.devices=2", f"exp_dir={small_disk}", timeout=120)
    assert outcome.status == 1
    (line,) = outcome.err.strip().splitlines()
    assert "no space left on the device" in line
    assert summary_of(runs_in(small_disk)[0])["status"] == "failed"
