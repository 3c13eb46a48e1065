"""What a technique did to a trained network, measured by one code for all arms: logits, gradients, sharpness.

All of it is of the weights that ship, in evaluation mode (norms use their streamed statistics, nothing is dropped), in
float32 whatever the training's precision, by the plain loss, whatever the technique minimised: cross-entropy, or the
squared error of regression. The samples are fixed subsets of the training and of the validation split, chosen by a key,
read as an evaluation reads them: the same for every run of the same data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from crucible.configuration import Config, flatten
from crucible.console import say
from crucible.files import why_not_writable, write_atomically
from crucible.keyed import keyed_uniform, stream_key
from crucible.machine import device_kind
from crucible.options import ConfigError
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from lab.build import file_fingerprint, with_weights
from lab.recorded import EVALUATION_OPTIONS, completed
from lab.robustness import asks_for_corruptions
from lab.scoring import data_to_score, of_a_test
from models.base_model import BaseModel

SEE = "docs/report.md"
VERSION = 1  # of what is measured: records of different ones are not compared
SAMPLES = 512  # of each subset
TOLERANCE = 1e-3  # relative change of the eigenvalue at which the iteration ends
FEWEST, MOST = 5, 100  # iterations

Part = tuple[Tensor, Tensor]  # input and target of some samples, on the device


def record_of(checkpoint: Path) -> str:
    """The name of the file in the run's folder: `mechanism.json` for the last weights, as `test_correct.npz`."""
    return "mechanism.json" if checkpoint.stem == "last" else f"mechanism_{checkpoint.stem}.json"


def measure_run(run: RunDirectory, config: Config, checkpoint: Path, out: Path | None) -> int:
    """`task=mechanism` of one run: measure, record, say. What is recorded of these weights is not computed again.

    Args:
        run: the recorded run; one that has not finished is passed over.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        out: the file to write to; None: `record_of` in the run's folder.

    Returns:
        the exit status.

    Raises:
        ConfigError: for other data than the run's own, and a record that cannot be written.
    """
    summary = run.summary()
    if summary.get("status") != "finished":
        say(f"{run.path}: is {summary.get('status', 'not begun')}, not finished; passed over")
        return 0
    for name in EVALUATION_OPTIONS:
        if config.get(name):
            raise ConfigError(f"{name}={config[name]}: is for task=test and task=predict", see=SEE)
    if asks_for_corruptions(config):
        raise ConfigError("data.module.corruption: only task=test takes it", see="docs/data.md")
    path = out or run.path / record_of(checkpoint)
    if reason := why_not_writable(path.parent.absolute()):
        raise ConfigError(f"out={path}: cannot be written ({reason}); out=FILE writes elsewhere", see=SEE)
    facts = {
        "schema": 1, "version": VERSION, "checkpoint": checkpoint.name,
        "weights": file_fingerprint("ckpt_path", str(checkpoint)), "data": summary.get("data_fingerprint"),
        "wanted": SAMPLES, "tolerance": TOLERANCE, "most_iterations": MOST,
    }  # fmt: skip
    before, now = (flatten(c["data"]["module"]) for c in (completed(run.config()), config))
    otherwise = any(before.get(n) != now.get(n) and of_a_test(n) for n in before.keys() | now.keys())
    record, known = None if otherwise else _earlier(path, facts), True
    if record is None:
        record, known = _measured(run, config, checkpoint, facts), False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=2) + "\n")
    say(f"mechanism of {run.path.name}/{checkpoint.name}{' (recorded)' if known else ''}")
    for name, value in record["values"].items():
        say(f"  {name:<24} {value:.6g}")
    for remark in record["remarks"]:
        say(f"  {remark}")
    say(f"  ->  {path}")
    return 0


def _earlier(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the same weights and data, measured alike."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = all(record.get(name) == value for name, value in facts.items())
        return record if same and record["values"] and isinstance(record["remarks"], list) else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _measured(
    run: RunDirectory, config: Config, checkpoint: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    began = time.monotonic()
    found = data_to_score(run, config, checkpoint)
    if not found.own:
        raise ConfigError(
            f"run={run.path}: its mechanism is of its own data, read as it reads them itself", see=SEE
        )
    device = torch.device(device_kind(config["trainer"]["accelerator"]))
    model = with_weights(config, checkpoint).to(device)
    with _plainly():
        parts, digests = {}, {}
        for split in ("train", "val"):
            places, digests[split] = subset(found.data, split)
            parts[split] = list(read_parts(found.data, split, places, device))
        values, remarks = measure(model, parts["train"], parts["val"])
    counts = {split: sum(len(target) for _, target in of) for split, of in parts.items()}
    return {
        **facts, "data": found.fingerprint, "samples": counts, "subsets": digests, "task": model.task,
        "loss": "cross-entropy" if model.task == "classification" else "squared error", "values": values,
        "remarks": [*found.remarks, *remarks], "device": device.type, "time": time.time(),
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


@contextmanager
def _plainly() -> Iterator[None]:
    """Whole float32 products, and attention by operations that can be differentiated twice."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


# The samples


def subset(data: BaseDataModule, split: Any, count: int = SAMPLES) -> tuple[list[int], str]:
    """Places in a split of `count` samples (all, where there are fewer), chosen by a key and their numbers alone.

    Returns:
        the places, by number; and a digest of the numbers, the same wherever the samples are.
    """
    samples = data.evaluated(split)
    numbers = np.arange(len(samples)) if samples.indices is None else np.asarray(samples.indices)
    draws = keyed_uniform(stream_key("mechanism", split), torch.from_numpy(numbers.astype(np.int64)), 1)[:, 0]
    chosen = np.lexsort((numbers, draws.numpy()))[:count]
    chosen = chosen[np.argsort(numbers[chosen])]
    return chosen.tolist(), hashlib.sha256(numbers[chosen].astype(np.int64).tobytes()).hexdigest()[:16]


def read_parts(
    data: BaseDataModule, split: Any, places: Sequence[int], device: torch.device
) -> Iterator[Part]:
    """The samples at these places as the network sees them in an evaluation, a batch at a time."""
    samples = data.evaluated(split)
    for start in range(0, len(places), data.batch_size):
        batch = samples[0, list(places[start : start + data.batch_size])]
        moved = batch._replace(
            input=batch.input.to(device), target=batch.target.to(device), visit=batch.visit.to(device)
        )
        seen = data.batch_transform(moved, "eval", 0)
        yield seen.input.float(), seen.target


# What is measured


def measure(
    model: BaseModel, train: Sequence[Part], val: Sequence[Part]
) -> tuple[dict[str, float], list[str]]:
    """All values of a network in evaluation mode, and what could not be measured.

    Args:
        model: its weights stay as they are; the dtype of its parameters is that of the products, sums are float64.
        train: samples that it was trained on.
        val: samples that it was not trained on.

    Returns:
        `loss_train`, `loss_val`: mean plain losses. Of a classifier, over the validation samples, `logit_norm` and
        `max_probability` (means, with `_sd` over samples). `gradient_train`, `gradient_val`: norms of the gradient of
        those losses to all trained weights; `gradient_gap`: norm of their difference; `gradient_cosine`. `sharpness`:
        the largest eigenvalue of the Hessian of the training samples' loss, with `sharpness_residual`
        `|Hv - lambda v|`, within which of it an eigenvalue lies, and `sharpness_iterations`.
    """
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    values: dict[str, float] = {}
    remarks: list[str] = []
    gradients = {}
    for name, parts in (("train", train), ("val", val)):
        values[f"loss_{name}"], gradients[name] = mean_gradient(model, weights, parts)
    if model.task == "classification":
        values |= _of_logits(model, val)
    norms = {name: _norm(of) for name, of in gradients.items()}
    values |= {f"gradient_{name}": norm for name, norm in norms.items()}
    values["gradient_gap"] = _norm([a - b for a, b in zip(gradients["val"], gradients["train"], strict=True)])
    if norms["train"] * norms["val"] > 0:
        values["gradient_cosine"] = _dot(gradients["train"], gradients["val"]) / (
            norms["train"] * norms["val"]
        )
    try:
        top = sharpness(model, weights, train)
        values |= {
            "sharpness": top.value, "sharpness_residual": top.residual, "sharpness_iterations": top.iterations,
        }  # fmt: skip
        if not top.converged:
            remarks.append(
                f"the eigenvalue still moved by more than {TOLERANCE:g} of itself after {MOST} iterations"
            )
    except NoSecondDerivative as error:
        remarks.append(f"no sharpness: {error}")
    return {name: value for name, value in values.items() if math.isfinite(value)}, remarks


def _loss(model: BaseModel, part: Part) -> Tensor:
    """The plain loss, summed over the samples."""
    out, target = model.outputs(part[0].to(next(model.parameters()).dtype)), part[1]
    if model.task == "classification":
        return F.cross_entropy(out, target, reduction="sum")
    return (out - target.to(out.dtype)).square().sum()


def _count(parts: Sequence[Part]) -> int:
    return sum(len(target) for _, target in parts)


def _sums(weights: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for sums over parts, which then do not depend on how the samples were parted."""
    wide = torch.float32 if weights[0].device.type == "mps" else torch.float64
    return [torch.zeros_like(w, dtype=wide) for w in weights]


def mean_gradient(
    model: BaseModel, weights: Sequence[Tensor], parts: Sequence[Part]
) -> tuple[float, list[Tensor]]:
    """The mean loss over the samples, and its gradient, (*weight) each."""
    total, count, loss = _sums(weights), _count(parts), 0.0
    for part in parts:
        of_part = _loss(model, part)
        loss += float(of_part.detach().double())
        for sum_, gradient in zip(
            total, torch.autograd.grad(of_part, weights, materialize_grads=True), strict=True
        ):
            sum_ += gradient
    return loss / count, [sum_ / count for sum_ in total]


@torch.no_grad()
def _of_logits(model: BaseModel, parts: Sequence[Part]) -> dict[str, float]:
    logits = (
        torch.cat([model.outputs(input.to(next(model.parameters()).dtype)) for input, _ in parts])
        .double()
        .cpu()
    )
    values: dict[str, float] = {}
    for name, of in (
        ("logit_norm", logits.norm(dim=1)),
        ("max_probability", logits.softmax(dim=1).amax(dim=1)),
    ):
        values |= {name: float(of.mean()), f"{name}_sd": float(of.std(correction=0))}
    return values


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


def _norm(of: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(of, of))


# Sharpness


class NoSecondDerivative(Exception):
    """The network has an operation that can be differentiated once only; its name."""


class Eigenvalue(NamedTuple):
    """The largest eigenvalue, |Hv - value v| of its unit vector v, and how many products it took."""

    value: float
    residual: float
    iterations: int
    converged: bool


def sharpness(
    model: BaseModel,
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    tolerance: float = TOLERANCE,
    most: int = MOST,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the mean plain loss, by power iteration.

    Products of the Hessian and a vector are by differentiation twice, exact and without the matrix (arXiv 1802.08241,
    section 2; PyHessian, arXiv 1912.07145, section 3.1). The iteration finds the eigenvalue of the largest magnitude;
    where that is negative a second one, of the Hessian less that value, finds the largest.

    Args:
        model: in evaluation mode.
        weights: of the model.
        parts: the samples.
        tolerance: relative change of the eigenvalue at which it ends.
        most: products that an iteration takes at most.

    Raises:
        NoSecondDerivative: where an operation has none.
    """
    if once := _differentiable_once(_loss(model, parts[0])):
        raise NoSecondDerivative(f"{', '.join(once)} has no second derivative")
    found = _iterate(model, weights, parts, 0.0, tolerance, most)
    if found.value >= 0:
        return found
    above = _iterate(model, weights, parts, found.value, tolerance, most)
    return above._replace(value=above.value + found.value, iterations=above.iterations + found.iterations)


def _iterate(
    model: BaseModel,
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    shift: float,
    tolerance: float,
    most: int,
) -> Eigenvalue:
    vector = _start(weights)
    before, value, residual = math.inf, 0.0, math.inf
    for iteration in range(1, most + 1):
        product = hessian_product(model, weights, parts, vector)
        product = [p - shift * v for p, v in zip(product, vector, strict=True)]
        value, length = _dot(vector, product), _norm(product)
        residual = _norm([p - value * v for p, v in zip(product, vector, strict=True)])
        if length == 0 or (iteration >= FEWEST and abs(value - before) <= tolerance * abs(value + shift)):
            return Eigenvalue(value, residual, iteration, True)
        before, vector = value, [p / length for p in product]
    return Eigenvalue(value, residual, most, False)


def _start(weights: Sequence[Tensor]) -> list[Tensor]:
    """A unit vector, the same for networks of the same weights' shapes."""
    vector = []
    for number, sums in enumerate(_sums(weights)):
        generator = torch.Generator().manual_seed(stream_key("mechanism", "vector", number))
        vector.append(torch.randn(sums.shape, generator=generator).to(sums))
    length = _norm(vector)
    return [v / length for v in vector]


def hessian_product(
    model: BaseModel, weights: Sequence[Tensor], parts: Sequence[Part], vector: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian of the mean loss over the samples times a vector, (*weight) each.

    Raises:
        NoSecondDerivative: where an operation has none.
    """
    total, count = _sums(weights), _count(parts)
    for part in parts:
        loss = _loss(model, part)
        try:
            gradient = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            along = sum((g * v.to(g.dtype)).sum() for g, v in zip(gradient, vector, strict=True))
            # of a loss that is linear in the weights the gradient hangs on nothing
            products = torch.autograd.grad(along, weights, materialize_grads=True, allow_unused=True)  # type: ignore[arg-type]
        except (RuntimeError, NotImplementedError) as error:
            raise NoSecondDerivative(_lacking(str(error))) from error
        for sum_, product in zip(total, products, strict=True):
            sum_ += product
    return [sum_ / count for sum_ in total]


def _lacking(message: str) -> str:
    """Which operation has no second derivative, by what torch says."""
    if "out of memory" in message.lower():
        return f"{message.splitlines()[0]}; a smaller data.module.batch_size gives the same values"
    named = re.search(r"derivative for '?(?:aten::)?(\w+)'?|double backwards? on (\w+)", message)
    if named:
        return f"{(named[1] or named[2]).removesuffix('_backward')} has no second derivative"
    return " ".join(message.split())[:200]


def _differentiable_once(loss: Tensor) -> list[str]:
    """The functions written in Python behind a loss that say of themselves that they are.

    Differentiated twice they raise nothing where the way to the weights ends in them, and terms are lost.
    """
    found, seen, left = set[str](), set[Any](), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and hasattr(type(node)._forward_cls.backward, "__wrapped__"):
            found.add(type(node)._forward_cls.__name__)
        left += [following for following, _ in node.next_functions]
    return sorted(found)
