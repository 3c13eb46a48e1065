"""Every pair of techniques, as a user would ask for it: it trains, or it is refused with one clear line."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nightly
from technique_runs import QUICK, TECHNIQUES, composed, refused_on_the_page, train

from crucible.command_line import describe
from crucible.options import ConfigError

REFUSED = refused_on_the_page()
CASES = [(t,) for t in TECHNIQUES] + [p for p in combinations(TECHNIQUES, 2) if p not in REFUSED]
# Learns in the few steps with whatever slows it down: a network without norms, zero-initialised branches, ...
FAST = ("model.optimizer=AdamW", "model.lr=0.002")
PRECISIONS = ("32-true", "bf16-mixed")
# a second pass; then a second network, norms of our own
COSTLIEST = nightly("sam", "distillation", "online_norm", "switchable_norm", "ghost_norm")
# what acts outside of the network, so that the compiler is given the plain one; weights that start otherwise
OUTSIDE = {
    "augmix", "balanced_sampling", "binary_cross_entropy", "class_weights", "color_jitter", "cutmix", "cutout", "ema",
    "gradient_centralization", "gradient_clipping", "head_rate", "label_smoothing", "layer_decay", "logit_stats",
    "lookahead", "mixup_cutmix", "random_erasing", "random_rotation", "swa", "undecay_norm", "zero_init_residual",
}  # fmt: skip
# of whose kind another one is compiled in CI: group_norm, sam
LIKE_ANOTHER = {"adaptive_sam", "instance_norm", "layer_norm", "sam_every_5"}


def _together(size: int) -> list[tuple[str, ...]]:
    """Sets of at most `size` techniques, such that every pair that is not refused is in one of them."""
    allowed = set(combinations(TECHNIQUES, 2)) - set(REFUSED)
    left, sets = set(allowed), []

    def pair(a: str, b: str) -> tuple[str, str]:
        return (a, b) if TECHNIQUES.index(a) < TECHNIQUES.index(b) else (b, a)

    while left:
        chosen = list(min(left, key=lambda names: [TECHNIQUES.index(n) for n in names]))
        while len(chosen) < size:
            fits = [t for t in TECHNIQUES if all(pair(t, c) in allowed for c in chosen if c != t)]
            gain = {t: sum(pair(t, c) in left for c in chosen) for t in fits if t not in chosen}
            if not any(gain.values()):
                break
            chosen.append(max(gain, key=gain.__getitem__))
        chosen.sort(key=TECHNIQUES.index)
        left -= set(combinations(chosen, 2))
        sets.append(tuple(chosen))
    return sets


SETS = _together(4)


@pytest.mark.slow
@pytest.mark.parametrize("techniques", SETS, ids="+".join)
def test_techniques_compose_four_at_a_time(techniques: tuple[str, ...], tmp_path, teacher) -> None:
    """In these sets every pair meets that is not refused; the precision by turns."""
    options = (*QUICK, f"trainer.precision={PRECISIONS[SETS.index(techniques) % 2]}")
    if "class_weights" in techniques:
        # what it lowers first is the loss of the rare classes, not the plain one
        options += ("trainer.max_steps=24",)
    before, after = train(composed(*techniques, teacher=teacher, options=options), tmp_path)
    assert after < before  # nor NaN


@pytest.mark.nightly
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("first", TECHNIQUES)
def test_a_technique_composes_with_every_other(first: str, precision: str, tmp_path, teacher) -> None:
    """Alone and in each pair, for as many steps as a user would look at."""
    failed = []
    for techniques in CASES:
        if techniques[0] == first:
            options = (*FAST, f"trainer.precision={precision}")
            if "head_rate" in techniques:
                options += ("trainer.max_steps=100",)  # ten times the rate: up first
            elif "balanced_sampling" in techniques:
                options += ("trainer.max_steps=100",)  # it draws with replacement
            config = composed(*techniques, teacher=teacher, options=options)
            if "freeze" in techniques:
                config["model"]["freeze"] = (
                    1  # the features of a backbone that never learnt tell a head nothing
                )
            before, after = train(config, tmp_path)
            if not after < before:  # nor for NaN
                failed.append(f"{'+'.join(techniques)}: {before:.3f} -> {after:.3f}")
    assert not failed


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_a_pair_without_meaning_is_refused_in_one_line_that_says_why(pair: tuple[str, str]) -> None:
    with pytest.raises(Exception) as error:
        train(composed(*pair, teacher=Path("unread")), Path())
    line, _ = describe(error.value)
    assert line is not None and REFUSED[pair] in line and "\n" not in line
    assert "model." in line or "trainer." in line


def test_what_acts_outside_of_the_network_is_known() -> None:
    assert set(TECHNIQUES) >= OUTSIDE


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
@pytest.mark.parametrize(
    "technique", [nightly(t)[0] if t in OUTSIDE | LIKE_ANOTHER else t for t in TECHNIQUES]
)
def test_a_technique_trains_with_the_network_compiled_whole(
    technique: str, tmp_path, teacher, monkeypatch
) -> None:
    compiled = _compile_with(monkeypatch, "aot_eager")
    try:
        config = composed(technique, teacher=teacher, options=("model.compile=true", *QUICK))
    except ConfigError as refused:
        assert "cannot be compiled" in str(refused)
        return
    before, after = train(config, tmp_path)
    assert compiled and after < before


@pytest.mark.slow
@pytest.mark.parametrize("technique", COSTLIEST)
def test_the_costliest_techniques_train_with_inductor(technique: str, tmp_path, teacher, monkeypatch) -> None:
    compiled = _compile_with(monkeypatch, "inductor")
    before, after = train(
        composed(technique, teacher=teacher, options=("model.compile=true", *QUICK)), tmp_path
    )
    assert compiled and after < before
