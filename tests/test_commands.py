"""Every command that the README and the pages show: understood as it stands, and run (in short) by the nightly form."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from conftest import ROOT, TINY, Outcome, runs_in, write_images
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from crucible import configuration
from crucible.command_line import with_plus
from lab.config import SWEEP_OPTIONS, check

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python (?:main|report)\.py[^`|\n]*")
GENERATED = (
    "techniques.md",
    "models.md",
    "reproducing.md",
    "index.md",
)  # of what other tests run: each choice of a group

# what needs more than a folder and a processor, and the test that runs it
ELSEWHERE = {
    r"user_dir=": "tests/test_extending.py executes that page",
    r"sweep=\[?(ablation,)?(submitit|ray)": "tests/test_slurm.py, tests/test_ray.py",
    r"https://": "tests/datasets/test_shards.py, with a server of its own",
    r"data=(webdataset|parquet)": "tests/datasets/test_shards.py, which makes such files",
    r"pretrained=true|init_from=HUB|type=\S+ model\.init_from=FILE": "tests/test_given_weights.py, which makes weights",
    r"trainer\.devices=[24]|NODE|RANK=": "tests/test_ddp.py, tests/test_processes.py",
    r" & sleep|echo '": "tests/test_interruption.py, tests/test_damaged_checkpoints.py",
    r" wandb=": "tests/reporting/test_report_wandb.py",
    r"pack\.verify": "tests/test_packing.py",
    r"\.\.\.|<tab>|technique=baseline,A|main\.py -m$|package\.Class": "a pattern of commands",
    r"watch=true": "tests/reporting/test_live.py",
    r"mlflow": "tests/test_loggers.py",
    r"runs=\[A/|runs=EXP_DIR": "tests/reporting/test_report_page.py",
    r"JOINT_RUN": "tests/test_stylized.py",
    r"SLURM_PROCID": "tests/test_slurm.py",
    r"--help|--cfg|--info|-sc ": "tests/test_main.py",
    r"1e30": "tests/test_interruption.py",
}  # fmt: skip


class Typed(NamedTuple):
    """A command of a page."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The script and its arguments."""
        return shlex.split(self.line, comments=True)[1:]

    @property
    def elsewhere(self) -> str | None:
        """Where else it is run."""
        return next((test for pattern, test in ELSEWHERE.items() if re.search(pattern, self.line)), None)


def commands() -> list[Typed]:
    """Those of indented lines, of tables and of sentences, each once."""
    found = {}
    for page in PAGES:
        if page.name in GENERATED:
            continue
        text = re.sub(r"(`python main\.py[^`\n]*)\n *", r"\1 ", page.read_text(encoding="utf-8"))
        for line in COMMAND.findall(text):
            line = line.split("  #")[0].split(" &")[0].strip()
            found.setdefault(line, Typed(page.name, line))
    return list(found.values())


ALL = commands()


def composed(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The configuration, and the overrides; an option that the files do not have is typed without its +."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
            return configuration.to_plain(compose("train", overrides)), overrides
    except Exception as error:
        if (more := with_plus(overrides, error)) is None:
            raise
        return composed(more)


def is_recorded(command: Typed) -> bool:
    """Whether it works on a run's record, or is none of an experiment's."""
    return bool(re.search(r"run=|--|-sc |SLURM|type=\[", command.line))


def is_pattern(command: Typed) -> bool:
    return command.elsewhere == "a pattern of commands"


def named(command: Typed) -> str:
    return command.line.removeprefix("python ")[:70]


def test_the_pages_show_commands_of_every_kind() -> None:
    assert len(ALL) > 60
    for part in (
        "-m ",
        "run=RUN task=test",
        "run=RUN task=predict",
        "task=pack",
        "report.py",
        "until=decided",
    ):
        assert any(part in command.line for command in ALL), part


@pytest.mark.parametrize(
    "command",
    [c for c in ALL if "report.py" not in c.line and not is_recorded(c) and not is_pattern(c)],
    ids=named,
)
def test_a_command_that_trains_is_understood_as_it_stands(
    command: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composed and checked, each job of a sweep's first values; nothing is read or written."""
    words = [word for word in command.words[1:] if word != "-m"]
    if any(word.startswith("user_dir=") for word in words):
        pytest.skip(str(command.elsewhere))
    overrides = []
    for override in OverridesParser.create().parse_overrides(words):
        name = override.get_key_element()
        if override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator())) if override.is_discrete_sweep() else "0.05"
            overrides.append(f"{name}={value}")
        else:
            overrides.append(override.input_line)
    for name in ("DATASET_LOCATION", "EXPERIMENT_LOCATION"):  # env=cluster asks for them
        monkeypatch.setenv(name, "data")
    config, overrides = composed(overrides)
    check(config, overrides)
    assert not set(SWEEP_OPTIONS) & {o.split("=")[0] for o in overrides} or "-m" in command.words


SHRUNK = (
    "debug=two_steps", "data.module.batch_size=4", "data.module.num_workers=0", "logger.wandb=null",
    "callbacks.plots=null", "trainer.enable_progress_bar=false",
)  # fmt: skip
FEW = ("data.num_classes=3", "metrics=[acc]")  # of the photographs here
OF_UNTIL = (
    "looks=[3,4]", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1", "model=cifar_resnet", "model.depth=8", *SHRUNK[2:],
)  # fmt: skip
RECORDED = (
    "trainer.enable_progress_bar=false",
)  # nothing of a recorded run can be made shorter but by its own record


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, warm_parent: Any) -> Path:
    """A folder in which the commands mean something: runs, pictures, and weights by the names that the pages use."""
    from conftest import Command

    root = tmp_path_factory.mktemp("world")
    classes = ["n01", "n02", "n03"]
    for folder in (
        "PATH",
        "IN",
        "SIN",
        "PHOTOS",
        "OTHER",
        "SECOND",
        "A",
        "B",
        "SIDE",
        "data/imagenet",
        "data/stylized",
    ):
        write_images(root / folder / "train", classes, 12)
        write_images(root / folder / "val", classes, 4)
    for split in ("train", "test"):
        write_images(root / "data/cifar10" / split, [f"class{n}" for n in range(10)], 8, (32, 32))
    write_images(root / "FOLDER", classes, 2)
    tiny = [option for option in TINY if "synthetic" not in option and "num_samples" not in option]
    for seed in (0, 1):
        options = ["data=digits", "trainer.limit_train_batches=2", f"seed={seed}", "exp_dir=experiments"]
        assert Command(root, *tiny, *options, warm=warm_parent).outcome().status == 0
    photographs = [
        "data=imagenet",
        "data.module.data_root_dir=IN",
        "exp_dir=mine",
        *FEW,
        "data.input_size=32",
    ]
    assert (
        Command(root, *tiny, *photographs, "data.module.batch_size=4", warm=warm_parent).outcome().status == 0
    )
    (run,) = runs_in(root / "mine")
    run.rename(root / "RUN")
    shutil.copytree(root / "RUN", root / "RUNS/one")
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), root / "FILE")
    (root / "experiments/cifar10").mkdir(parents=True)
    for digits in runs_in(
        root / "experiments/digits"
    ):  # two runs of one kind, by the names that the pages give
        shutil.copytree(digits, root / "experiments/cifar10" / f"1a2b3c4d-{digits.name.split('-')[-1]}")
    return root


@pytest.mark.nightly
@pytest.mark.parametrize("command", [c for c in ALL if not c.elsewhere], ids=named)
def test_a_command_runs_in_short(
    command: Typed, world: Path, shell: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    script, *arguments = command.words
    if script == "main.py":
        if "until=decided" in arguments:
            arguments += OF_UNTIL
        elif "task=tune" in arguments:
            arguments += ["tune.steps=10", *SHRUNK[1:]]
        elif any(a.startswith(("run=", "task=")) for a in arguments):
            arguments += RECORDED if any(a.startswith("run=") for a in arguments) else ()
        elif not any(a.startswith("debug=") for a in arguments):
            few = FEW if re.search("imagenet|image_folder", command.line) else ()
            typed = {a.split("=")[0] for a in arguments}
            arguments += [o for o in (*SHRUNK, *few) if o.split("=")[0] not in typed]
        arguments = [re.sub(r"(n_trials|n_jobs)=\d+", r"\1=2", a) for a in arguments]
    outcome = shell(*arguments, folder=folder, script=script, env={"DATASET_LOCATION": "data"}, timeout=400)
    assert outcome.status == 0, outcome.err + outcome.out
    assert "Traceback" not in outcome.err
    if "-m" in arguments and "dry_run=true" not in arguments:
        assert not re.search(r"[1-9]\d* failed", outcome.out)


def test_what_runs_elsewhere_names_tests_that_there_are() -> None:
    for test in ELSEWHERE.values():
        for file in re.findall(r"tests/\S+\.py", test):
            assert (ROOT / file).is_file(), file
