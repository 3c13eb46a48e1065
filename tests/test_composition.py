"""Every pair of techniques, as a user would ask for it: it trains, or it is refused with one clear line."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import TECHNIQUES, composed, make_teacher, train

from crucible.command_line import describe
from docs.generate import refused_pairs

REFUSED = refused_pairs()
# Learns in the few steps with whatever slows it down: a network without norms, zero-initialised branches, ...
FAST = ("model.optimizer=AdamW", "model.lr=0.002")
COSTLIEST = ("sam", "switchable_norm", "online_norm", "ghost_norm", "distillation")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("first", TECHNIQUES)
def test_a_technique_composes_with_every_other(first: str, precision: str, tmp_path, teacher) -> None:
    pairs = [p for p in combinations(TECHNIQUES, 2) if p[0] == first and p not in REFUSED]
    failed = []
    for techniques in [(first,), *pairs]:
        config = composed(*techniques, teacher=teacher, options=(*FAST, f"trainer.precision={precision}"))
        before, after = train(config, tmp_path)
        if not after < before:  # nor for NaN
            failed.append(f"{'+'.join(techniques)}: {before:.3f} -> {after:.3f}")
    assert not failed


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_a_pair_without_meaning_is_refused_in_one_line_that_says_why(pair: tuple[str, str]) -> None:
    with pytest.raises(Exception) as error:
        train(composed(*pair, teacher=Path("unread")), Path())
    line, _ = describe(error.value)
    assert line == REFUSED[pair] and "\n" not in line
    assert "model." in line or "trainer." in line


def test_few_pairs_are_refused() -> None:
    assert len(REFUSED) < len(list(combinations(TECHNIQUES, 2))) / 8


def _compile_with(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[bool]:
    compiled: list[bool] = []
    torch._dynamo.reset()  # the limit of compilations is one process's, not one test's

    def whole(network: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(True)
        network._compiled_call_impl = torch.compile(network._call_impl, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_trains_with_the_network_compiled_whole(
    technique: str, tmp_path, teacher, monkeypatch
) -> None:
    compiled = _compile_with(monkeypatch, "aot_eager")
    before, after = train(composed(technique, teacher=teacher, options=("model.compile=true",)), tmp_path)
    assert compiled and after < before


@pytest.mark.slow
@pytest.mark.parametrize("technique", COSTLIEST)
def test_the_costliest_techniques_train_with_inductor(technique: str, tmp_path, teacher, monkeypatch) -> None:
    compiled = _compile_with(monkeypatch, "inductor")
    before, after = train(composed(technique, teacher=teacher, options=("model.compile=true",)), tmp_path)
    assert compiled and after < before
