"""What a shell is told when a line is to be completed: groups, their files in folders too, options, their choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome


@pytest.fixture
def completed(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """The words that `python main.py LINE<tab>` is answered by."""

    def ask(line: str) -> set[str]:
        whole = f"python main.py {line}"
        monkeypatch.setenv("COMP_LINE", whole)
        monkeypatch.setenv("COMP_POINT", str(len(whole)))
        outcome = cli("-sc", "query=bash")
        assert outcome.status == 0 and not outcome.err
        return set(outcome.out.split())

    return ask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data=ci", {"data=cifar10", "data=cifar100"}),
        (
            "recipe=bag_of_tricks/e",
            {"recipe=bag_of_tricks/efficient", "recipe=bag_of_tricks/efficient_jitter"},
        ),
        ("-m technique=powergrad,mix", {"technique=powergrad,mixup", "technique=powergrad,mixup_cutmix"}),
        ("technique=[powergrad,ghost", {"technique=[powergrad,ghost_norm"}),
        ("technique=mixup model.mixup", {"model.mixup=", "model.mixup_alpha="}),
        ("model.lr_interval=", {"model.lr_interval=epoch", "model.lr_interval=step"}),
        ("model.nest", {"model.nesterov="}),
        ("model.nesterov=t", {"model.nesterov=true"}),
        ("cluster.executor=", {"cluster.executor=local", "cluster.executor=slurm"}),
        ("model=nonsense trainer.max_", set()),
        ("technique=[powergrad, 'data=", set()),
    ],
)
def test_a_line_goes_on_with(completed: Callable[[str], set[str]], line: str, words: set[str]) -> None:
    assert completed(line) == words


def test_files_of_ones_own_are_among_the_choices(
    completed: Callable[[str], set[str]], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "cli_configs" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "cli_configs" / "model" / "my_network.yaml").touch()
    assert completed(f"user_dir={tmp_path / 'mine'} model=my") == {"model=my_network"}


@pytest.mark.parametrize(("shell", "asks"), [("bash", "-sc query=bash"), ("fish", "from main.py'")])
def test_a_shell_is_told_to_ask_the_script_that_was_typed(cli, shell: str, asks: str) -> None:
    outcome = cli("-sc", f"install={shell}")
    assert outcome.status == 0 and asks in outcome.out
