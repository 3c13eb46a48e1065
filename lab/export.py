"""A trained network becomes one file for other programs, checked at once by the file's own runtime.

python main.py run=RUN task=export format=onnx
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from augmentation.policies.base import ImagePolicy
from crucible.configuration import Config
from crucible.console import say
from crucible.files import replacing, why_not_writable, write_atomically
from crucible.options import ConfigError, read_options
from crucible.run import RunDirectory
from crucible.writing import Unwritable
from datasets.base_datamodule import BaseDataModule
from datasets.images import SampleError
from lab.build import alone, build_model, file_fingerprint, read_checkpoint, with_weights
from lab.calibration import check_reading, fitted_temperature
from lab.card import Shipped, card
from lab.recorded import completed
from lab.scoring import DataToScore, data_if_there, trained_classes
from lab.use import Transform, described_transform
from models.base_model import BaseModel
from models.exported import INPUT, Exported, ExportOptions, Format
from models.views import Views, views_asked

SCHEMA = 1
SEE = "docs/export.md"
MEMBER = "crucible.json"  # in the archives that torch writes
SAMPLES = 16
# of the largest output: ten times what 50 layers of float32, or float16, come to
NEAR, NEAR_HALF = 1e-4, 2e-2
_MOST_ONNX = 2**31 - 2**20  # bytes of a file of protobuf
_BATCH = "batch"
_OPSET = 20  # deformable convolutions are in it from 19 on

Run = Callable[[Tensor], Tensor]


class Opened(NamedTuple):
    """A file as its runtime has it: what it computes, and what it says of itself."""

    run: Run
    says: dict[str, Any]


class Kind(NamedTuple):
    """A format of files.

    Attributes:
        suffix: of its files.
        runtime: what opens them.
        needs: packages that are no dependency of ours.
        write: `(exported, example, says, file)`.
        open: `(file, fresh)`; `fresh()` is a network of the same kind without these weights.
    """

    suffix: str
    runtime: str
    needs: tuple[str, ...]
    write: Callable[[Exported, Tensor, Mapping[str, Any], Path], None]
    open: Callable[[Path, Callable[[], Exported]], Opened]


# each format, written and opened


def _program(exported: Exported, example: Tensor) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim(_BATCH)},)
    with torch.no_grad():
        return torch.export.export(exported, (example,), dynamic_shapes=dynamic, strict=False)


def _write_onnx(exported: Exported, example: Tensor, says: Mapping[str, Any], file: Path) -> None:
    made: Any = torch.onnx.export(
        _program(exported, example), dynamo=True, verbose=False, input_names=[INPUT], output_names=[exported.output],
        external_data=False, opset_version=_OPSET,
    )  # fmt: skip
    made.model.metadata_props.update({name: json.dumps(value) for name, value in says.items()})
    made.save(str(file), external_data=False)


def _open_onnx(file: Path, fresh: Callable[[], Exported]) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    says = session.get_modelmeta().custom_metadata_map

    def run(input: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: input.numpy()})[0])

    return Opened(run, {name: json.loads(value) for name, value in says.items()})


def _write_program(exported: Exported, example: Tensor, says: Mapping[str, Any], file: Path) -> None:
    with file.open("wb") as stream:
        torch.export.save(_program(exported, example), stream, extra_files={MEMBER: json.dumps(says)})


def _open_program(file: Path, fresh: Callable[[], Exported]) -> Opened:
    says: dict[str, Any] = {MEMBER: ""}
    with file.open("rb") as stream:
        program = torch.export.load(stream, extra_files=says)
    return Opened(program.module(), json.loads(says[MEMBER]))


def _write_torchscript(exported: Exported, example: Tensor, says: Mapping[str, Any], file: Path) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(exported, example, check_trace=False)
    with file.open("wb") as stream:
        torch.jit.save(traced, stream, _extra_files={MEMBER: json.dumps(says)})


def _open_torchscript(file: Path, fresh: Callable[[], Exported]) -> Opened:
    says: dict[str, Any] = {MEMBER: ""}
    with file.open("rb") as stream:
        script = torch.jit.load(stream, map_location="cpu", _extra_files=says)
    return Opened(script, json.loads(says[MEMBER]))


def _write_safetensors(exported: Exported, example: Tensor, says: Mapping[str, Any], file: Path) -> None:
    # copies: two names of one tensor are refused by the format
    state = {
        name: tensor.detach().clone().contiguous() for name, tensor in exported.network.state_dict().items()
    }
    texts = {name: json.dumps(value) for name, value in says.items()}
    content = as_safetensors(
        state, metadata={"format": "pt", **texts}
    )  # that they are torch's, as is the custom
    file.write_bytes(content)  # `save_file` would make it unreadable for others


def _open_safetensors(file: Path, fresh: Callable[[], Exported]) -> Opened:
    exported = fresh()
    exported.network.load_state_dict(load_file(file), strict=True)
    with safe_open(file, framework="pt") as opened:
        texts = opened.metadata()
    return Opened(exported, {name: json.loads(text) for name, text in texts.items() if name != "format"})


KINDS: dict[str, Kind] = {
    "onnx": Kind(".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "torch_export": Kind(".pt2", "torch.export.load", (), _write_program, _open_program),
    "torchscript": Kind(".ts", "torch.jit.load", (), _write_torchscript, _open_torchscript),
    "safetensors": Kind(
        ".safetensors", "a fresh network with these weights", (), _write_safetensors, _open_safetensors
    ),
}
assert tuple(KINDS) == get_args(Format)


# from a network to a file that gives the same


class Difference(NamedTuple):
    """Between what a file gives and what its network gives.

    Attributes:
        largest: of all outputs, in batches of all samples and of one.
        allowed: beyond which it is an error.
        scale: the largest output.
        agree: samples with the same label; all of a regression.
        samples: N.
    """

    largest: float
    allowed: float
    scale: float
    agree: int
    samples: int


class Made(NamedTuple):
    """A file that was written and checked: its bytes, how far it is from its network, and what it says of itself."""

    size: int
    difference: Difference
    says: dict[str, Any]


def export_model(
    kind: str,
    model: BaseModel,
    transform: Transform,
    stored: Tensor,
    file: Path,
    *,
    options: ExportOptions | None = None,
    views: Views | None = None,
    fresh: Callable[[], BaseModel] | None = None,
    says: Mapping[str, Any] | None = None,
) -> Made:
    """Write a model's network to a file, and compare what the file gives with what the model gives.

    Args:
        kind: of `KINDS`.
        model: on the CPU, in evaluation mode. With `options.half` its weights are in float16 afterwards.
        transform: what its input goes through.
        stored: (N, C, *spatial), two or more samples as the transform's first part leaves them, uint8 for pictures.
        file: where to; only a file that gives the same takes the place of one there.
        options: what becomes part of the graph.
        views: the temperature and the mirror image that become part of it.
        fresh: builds the model anew, whatever its weights; needed for safetensors alone.
        says: what the file is to say of itself, besides its input and output.

    Raises:
        ConfigError: where the network has something that the format lacks, or the file gives something else.
        Unwritable: where the file cannot be written.
    """
    options, views, makes = options or ExportOptions(), views or Views(), KINDS[kind]
    ready = transform.batch(stored)
    with torch.inference_mode():
        wanted = views.read(model.outputs, ready)
    exported = Exported(model, transform.policy, views, options)
    if exported.output == "probabilities":
        wanted = wanted.softmax(dim=1)
    given = stored if options.normalize else ready
    if options.layout == "NHWC":
        given = given.movedim(1, -1).contiguous()
    whole = {**(says or {}), **_ends(exported, given, wanted)}

    def another() -> Exported:
        assert fresh is not None
        return Exported(fresh(), transform.policy, views, options)

    with replacing(file, sync=True) as temporary:
        with _quiet(), _refusing(kind, exported.network):
            makes.write(exported, given[:2], whole, temporary)
            opened = makes.open(temporary, another)
        with _quiet(), torch.inference_mode(), _refusing(kind, exported.network, "run"):
            found = [opened.run(given), opened.run(given[:1])]
        difference = _difference(found, wanted, exported, NEAR_HALF if options.half else NEAR)
        if not difference.largest <= difference.allowed:
            raise ConfigError(
                f"format={kind}: the file gives other {exported.output} than the network: {difference.largest:.2g} "
                f"apart, where {difference.allowed:.2g} is allowed; it is not kept",
                SEE,
            )
        if opened.says != json.loads(json.dumps(whole)):
            raise ConfigError(f"format={kind}: the file does not hold what it was to say of itself", SEE)
        size = temporary.stat().st_size
    return Made(size, difference, opened.says)


def _ends(exported: Exported, given: Tensor, wanted: Tensor) -> dict[str, Any]:
    """What a file says of its input and output."""
    dtype = str(given.dtype).removeprefix("torch.")
    options = exported.options
    parts = {
        "normalize": options.normalize, "flip": "flip" in exported.views.asked,
        "temperature": exported.views.temperature != 1, "softmax": exported.output == "probabilities",
        "half": options.half,
    }  # fmt: skip
    return {
        "input": {"name": INPUT, "dtype": dtype, "layout": options.layout, "shape": [_BATCH, *given.shape[1:]]},
        "output": {"name": exported.output, "dtype": "float32", "shape": [_BATCH, *wanted.shape[1:]]},
        "included": [name for name, there in parts.items() if there],
    }  # fmt: skip


def _difference(found: Sequence[Tensor], wanted: Tensor, exported: Exported, near: float) -> Difference:
    whole, one = (part.float() for part in found)
    scale, samples = float(wanted.abs().max()), len(wanted)
    if (whole.shape, one.shape) != (wanted.shape, wanted[:1].shape):
        return Difference(math.inf, near * scale, scale, 0, samples)
    # NaN in either makes NaN, which is not allowed
    largest = max(float((whole - wanted).abs().max()), float((one - wanted[:1]).abs().max()))
    agree = int((whole.argmax(dim=1) == wanted.argmax(dim=1)).sum()) if exported.classifies else samples
    return Difference(largest, near * scale, scale, agree, samples)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: advice for who writes them, and that they are no longer developed."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _refusing(kind: str, network: nn.Module, what: str = "exported") -> Iterator[None]:
    """Whatever an exporter raises for a network as one line."""
    try:
        yield
    except (ConfigError, Unwritable, OSError):
        raise
    except Exception as error:  # exporters raise anything, and whole pages
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join((str(cause) or str(error)).split())[:200] or "no reason given"
        raise ConfigError(
            f"format={kind}: {type(network).__name__} cannot be {what} ({type(cause).__name__}: {text})", SEE
        ) from error


# of a recorded run


def export(run: RunDirectory, config: Config, checkpoint: Path, out: Path | None) -> int:
    """Write the weights of `checkpoint` as the file that is asked for, and its card beside it; say how they agree.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights; averaged ones where there are some.
        out: the file; None: `RUN/export/<checkpoint>.<suffix>`.

    Returns:
        the exit status.

    Raises:
        ConfigError: for what cannot be exported so, and a file that gives something else.
    """
    kind: str = config.get("format", "onnx")
    options = read_options(ExportOptions, config.get("export") or {}, "export")
    asked = views_asked(config.get("tta"))
    _check(kind, options, asked, config)
    file = out or run.path / "export" / _name(kind, options, asked, config, checkpoint)
    if file.is_dir():
        raise ConfigError(f"out={file}: is a folder; name the file", SEE)
    if reason := why_not_writable(file.parent.absolute()):
        raise ConfigError(f"out={file}: cannot be written ({reason}); out=FILE writes elsewhere", SEE)
    began = time.perf_counter()
    content = read_checkpoint(checkpoint)
    model = with_weights(config, checkpoint, content)
    _check_size(kind, model)
    found, why_not = data_if_there(run, config, checkpoint)
    temperature, how = 1.0, ""
    if config.get("calibrate"):
        temperature, how = _temperature(run, config, checkpoint, model, asked, found)
    size = config["data"]
    transform = Transform(
        described_transform(config), size["input_dim"], size["input_channels"], config["seed"]
    )
    stored, whence, why_random = _samples(
        None if found is None else found.data, why_not, transform, size["input_size"]
    )
    classes, _ = trained_classes(run, completed(run.config()), checkpoint)
    says = _says(run, config, checkpoint, content, classes, temperature)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = export_model(
        kind, model, transform, stored, file, options=options, views=Views(asked, temperature), says=says,
        fresh=lambda: build_model(config, load=False, compile=False).eval(),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    difference = made.difference
    labels = (
        f", labels agree on {difference.agree} of {difference.samples}" if model.task != "regression" else ""
    )
    checked = (
        f"by {KINDS[kind].runtime} on {difference.samples} {whence}, all at once and one alone: largest "
        f"difference {difference.largest:.2g} (allowed {difference.allowed:.2g}){labels}"
    )
    beside = file.with_name(f"{file.name}.md")
    shipped = Shipped(file.name, kind, made.size, made.says, checked)
    write_atomically(beside, card(run, config, checkpoint, found, shipped))
    for line in (
        f"export of {run.path.name}/{checkpoint.name}: {kind}, {made.size / 1e6:.2f} MB, {seconds:.1f} s",
        *([f"  temperature {temperature:.4f}, {how}"] if how else []),
        *([f"  random samples: {why_random}"] if why_random else []),
        f"  checked {checked}", f"  ->  {file}", f"  ->  {beside}",
    ):  # fmt: skip
        say(line)
    return 0


def _check(kind: str, options: ExportOptions, asked: Sequence[str], config: Config) -> None:
    lacking = [name for name in KINDS[kind].needs if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"format={kind}: needs the package{'s' * (len(lacking) > 1)} {', '.join(lacking)}, not installed here: "
            "pip install -e '.[export]'",
            SEE,
        )
    if "five_crops" in asked:
        raise ConfigError(
            "tta=five_crops: is not exported, its crops are made before the network; tta=flip is", SEE
        )
    pictures, classes = config["data"]["input_dim"] == 2, config["data"]["task"] == "classification"
    check_reading(config, asked)
    if options.layout == "NHWC" and not pictures:
        raise ConfigError("export.layout=NHWC: is for pictures, data.input_dim=2", SEE)
    if options.softmax and not classes:
        raise ConfigError("export.softmax=true: is for classification; a regression has values", SEE)
    if kind == "safetensors":
        default = ExportOptions()
        graph = [f"export.{f.name}" for f in fields(options) if f.name != "half"
                 and getattr(options, f.name) != getattr(default, f.name)]  # fmt: skip
        graph += [name for name, there in (("calibrate", config.get("calibrate")), ("tta", asked)) if there]
        if graph:
            raise ConfigError(
                f"{graph[0]}: format=safetensors holds weights, and no graph that it could be part of; another format",
                SEE,
            )
    if (module := config["data"]["module"]).get("corruption") is not None:
        raise ConfigError(
            f"data.module.corruption={module['corruption']}: only task=test takes it", "docs/data.md"
        )


def _name(kind: str, options: ExportOptions, asked: Sequence[str], config: Config, checkpoint: Path) -> str:
    """What becomes part of the graph shows in the name, so that one file does not take another's place."""
    parts = [checkpoint.stem, *(["normalize"] if options.normalize else []), *asked]
    parts += ["nhwc"] if options.layout == "NHWC" else []
    parts += [name for name, there in (
        ("calibrate", config.get("calibrate")), ("softmax", options.softmax), ("half", options.half),
    ) if there]  # fmt: skip
    return "-".join(parts) + KINDS[kind].suffix


def _check_size(kind: str, model: BaseModel) -> None:
    size = sum(t.numel() * t.element_size() for t in model.model.state_dict().values())
    if kind == "onnx" and size > _MOST_ONNX:
        raise ConfigError(
            f"format=onnx: the weights are {size / 1e9:.1f} GB, one file of ONNX holds 2; format=torch_export or "
            "safetensors",
            SEE,
        )


def _temperature(
    run: RunDirectory, config: Config, checkpoint: Path, model: BaseModel, asked: Sequence[str],
    found: DataToScore | None,
) -> tuple[float, str]:  # fmt: skip
    """Of the record, or fitted now and recorded, as `task=test calibrate=true` does."""
    model.views = Views(tuple(asked))
    of_data = "" if found is None else found.fingerprint
    fit, how = fitted_temperature(run, alone(config), checkpoint, model, of_data)
    model.views = Views()
    model.to("cpu")  # it may have been fitted on a GPU
    return fit.temperature, how


def _samples(
    data: BaseDataModule | None, why_not: str, transform: Transform, size: int
) -> tuple[Tensor, str, str]:
    """Samples as the transform's first part leaves them, spread over the split, and what they are; random ones where
    there are none to be read, and why."""
    if data is not None:
        samples = data.samples("predict")
        samples.on_unreadable = "drop"
        places = np.unique(np.linspace(0, len(samples) - 1, min(SAMPLES, len(samples))).round().astype(int))
        try:
            stored = samples[0, places.tolist()].input.contiguous()
            folder = data.predict_dir
            whence = (
                f"images of {Path(folder).name}" if folder else f"samples of the test split of {data.name}"
            )
            return (stored if len(stored) > 1 else torch.cat([stored, stored])), whence, ""
        except (SampleError, ConfigError, OSError) as error:
            why_not = str(error)
    shape = (SAMPLES, transform.channels, *[size] * transform.dim)
    draws = torch.Generator().manual_seed(0)
    random = (
        torch.randint(256, shape, generator=draws, dtype=torch.uint8)
        if isinstance(transform.policy, ImagePolicy)
        else torch.randn(shape, generator=draws)
    )
    return random, "random samples", why_not


def _says(
    run: RunDirectory, config: Config, checkpoint: Path, content: Mapping[str, Any], classes: Sequence[str] | None,
    temperature: float,
) -> dict[str, Any]:  # fmt: skip
    """What a file says of its network; docs/use.md explains each name."""
    data, transform = config["data"], described_transform(config)
    validated = dict(content.get("validated") or {})
    return {
        "schema": SCHEMA, "run": str(run.known().get("run_id") or run.path.name), "checkpoint": checkpoint.name,
        "weights": file_fingerprint("ckpt_path", str(checkpoint)), "averaged": bool(content.get("averaged_state_dict")),
        "model": config["model"]["_target_"], "data": data["module"]["name"], "task": data["task"],
        "classes": list(classes or []), "input_size": data["input_size"], "mean": transform.get("mean"),
        "std": transform.get("std"), "interpolation": transform.get("interpolation"),
        "crop_pct": transform.get("crop_pct"), "crop_mode": transform.get("crop_mode"), "transform": transform,
        "temperature": temperature, "metrics": validated.get("metrics") or {}, "epoch": validated.get("epoch"),
        "versions": {"torch": metadata.version("torch")},
    }  # fmt: skip
