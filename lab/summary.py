"""What a network is made of and what a step of it costs: counted on the meta device, without data or memory.

`python main.py task=summary model=...` prints it; docs/models.md is made from it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchvision.ops  # noqa: F401  registers the operators that are counted
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from crucible import private
from crucible.batch import Batch
from crucible.configuration import Config
from crucible.console import print_table, say
from crucible.keyed import stream_key
from crucible.machine import device_kind, world_size
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from lab.config import resolve_network, smallest_batch
from models.base_model import BaseModel
from norms import Norm

UNKNOWN_CLASSES = 1000  # where the number of classes would come from the data


@dataclass
class Layer:
    """What a module and those within it cost; `saved_bytes` for the whole batch, `multiply_adds` likewise."""

    name: str
    type_name: str
    output: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0
    saved_bytes: int = 0

    @property
    def depth(self) -> int:
        """1 for the children of the network."""
        return self.name.count(".") + 1


@dataclass
class NetworkCosts:
    """A network's costs for one batch.

    Attributes:
        input: shape of the batch.
        layers: the modules that ran, in the order of their registration.
        parameters: scalars that are learned.
        multiply_adds: of a forward pass; convolutions and matrix products, as torch's flop counter counts.
        saved_bytes: of the tensors kept for the backward pass, in the network's dtype, parameters left out.
        step_flops: of a forward and a backward pass; a multiply-add is two.
    """

    input: tuple[int, ...]
    layers: list[Layer]
    parameters: int
    multiply_adds: int
    saved_bytes: int
    step_flops: int


def build_on_meta(config: Config) -> BaseModel:
    """The model of a plain, checked configuration without its weights' memory."""
    options = {k: v for k, v in config["model"].items() if k != "init_from"}
    if options.get("pretrained"):
        options["pretrained"] = False
    with torch.device("meta"):
        model: BaseModel = instantiate(options, _convert_="all")
        model.convert()
    return model


def input_shape(config: Config, batch: int) -> tuple[int, ...]:
    """`(batch, channels, *spatial)` of what the configuration's data give the network."""
    data = config["data"]
    return (batch, data["input_channels"], *[data["input_size"]] * data["input_dim"])


def check_input(model: BaseModel, config: Config) -> None:
    """Refuse data that the network cannot take, such as images smaller than its strides need.

    Args:
        model: moved to the meta device by this.
        config: plain and checked.

    Raises:
        ConfigError: naming the size.
    """
    shape = input_shape(config, batch=2)
    if (error := _refusal(model, shape)) is not None:
        size, reason = "x".join(map(str, shape[1:])), _first_line(error)
        raise ConfigError(
            f"data.input_size={config['data']['input_size']}: {_named(model)} cannot take input of {size} ({reason})"
        ) from error


def _refusal(model: BaseModel, shape: tuple[int, ...]) -> Exception | None:
    """What the model raises, on the meta device, for training input of a shape; None also where that tells nothing."""
    try:
        with torch.no_grad():
            model.to("meta").train()(torch.empty(shape, device="meta"))
    except NotImplementedError:
        return None  # an operation that nothing can be known about without data
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return None if "meta tensor" in _first_line(error) else error
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _named(model: BaseModel) -> str:
    norm = model.step.setting.of(Norm).norm
    return type(model).__name__ + (f" with model.norm={norm}" if norm is not None else "")


# operators whose backward pass is not deterministic on CUDA, and torch's name for them where its documentation of
# `use_deterministic_algorithms` says so: another version may have mended some. Those without one raise nonetheless.
_NONDETERMINISTIC: dict[str, str | None] = {
    "max_pool3d_with_indices": "MaxPool3d",
    "avg_pool3d": "AvgPool3d",
    "_adaptive_avg_pool2d": "AdaptiveAvgPool2d",
    "_adaptive_avg_pool3d": "AdaptiveAvgPool3d",
    "adaptive_max_pool2d": "AdaptiveMaxPool2d",
    "adaptive_max_pool3d": None,
    "fractional_max_pool2d": "FractionalMaxPool2d",
    "fractional_max_pool3d": "FractionalMaxPool3d",
    "max_unpool2d": "MaxUnpool2d",
    "max_unpool3d": "MaxUnpool3d",
    "reflection_pad1d": "ReflectionPad1d",
    "reflection_pad2d": "ReflectionPad2d",
    "reflection_pad3d": "ReflectionPad3d",
    "upsample_linear1d": "interpolate",
    "upsample_bilinear2d": "interpolate",
    "_upsample_bilinear2d_aa": None,
    "upsample_bicubic2d": "interpolate",
    "_upsample_bicubic2d_aa": None,
    "upsample_trilinear3d": "interpolate",
    "grid_sampler_2d": "grid_sample",
    "grid_sampler_3d": "grid_sample",
    "deform_conv2d": None,
}


def _has_no_deterministic_backward(operator: str) -> bool:
    if operator not in _NONDETERMINISTIC:
        return False
    name, words = _NONDETERMINISTIC[operator], torch.use_deterministic_algorithms.__doc__
    # Python was started with -OO where there are none
    return name is None or words is None or name in words.partition("will throw")[2]


class _NoteOperators(TorchDispatchMode):
    """Which module calls an operator without a deterministic backward pass first: `(module, operator)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: tuple[str, str] | None = None
        self._inside: list[str] = []
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name))
            module.register_forward_hook(lambda *_: self._inside.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func._schema.name.partition("::")[2]
        if self.found is None and _has_no_deterministic_backward(operator):
            self.found = next((name for name in reversed(self._inside) if name), ""), operator
        return func(*args, **(kwargs or {}))


def check_reproducible(model: BaseModel, config: Config) -> None:
    """Refuse `reproducible=true` on CUDA for a network whose gradient torch cannot compute deterministically there.

    Torch would say so in the first backward pass. On a CPU all are deterministic.

    Args:
        model: on the meta device, as `check_input` leaves it; its modules get hooks.
        config: plain and resolved.

    Raises:
        ConfigError: naming the layer.
    """
    if not config["reproducible"] or device_kind(config["trainer"]["accelerator"]) != "cuda":
        return
    with (
        torch.no_grad(),
        contextlib.suppress(NotImplementedError, RuntimeError),
        _NoteOperators(model.model) as noted,
    ):
        model.train()(torch.empty(input_shape(config, batch=2), device="meta"))
    if noted.found is not None:
        module, operator = noted.found
        kind = type(model.model.get_submodule(module)).__name__
        raise ConfigError(
            f"reproducible=true: {module or 'the network'} ({kind}) calls {operator}, which has no deterministic "
            "backward pass on CUDA; trainer.accelerator=cpu has one, reproducible=false goes without"
        )


def check_samples(model: BaseModel, config: Config, data: BaseDataModule) -> None:
    """Two samples of a split go as far as the network: what cannot be read or prepared is said before there is a run.

    Raises:
        ConfigError: naming the policy, the sample or the technique.
    """
    parts: tuple[tuple[Literal["train", "val"], str, Literal["train", "eval"]], ...] = (
        ("train", "train_transforms", "train"),
        ("val", "test_transforms", "eval"),
    )
    for split, role, stage in parts:
        samples = data.samples(split)
        if not len(samples):
            continue
        batch = samples[0, list(range(min(2, len(samples))))]
        policy = type(getattr(data, role)).__name__
        try:
            shape = tuple(_prepared(model, data, batch, stage).shape[1:])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"data.module.{role}: {policy} cannot take the {split} samples ({reason})"
            ) from error
        wanted = input_shape(config, 1)[1:]
        if len(shape) != len(wanted) or shape[0] != wanted[0]:
            raise ConfigError(
                f"data.module.{role}: {policy} makes {'x'.join(map(str, shape))} of the {split} samples; "
                f"data.input_channels={wanted[0]} and data.input_dim={len(wanted) - 1} say otherwise"
            )


def _prepared(
    model: BaseModel, data: BaseDataModule, batch: Batch, stage: Literal["train", "eval"]
) -> Tensor:
    """Samples of a split as the network gets them."""
    for change in model.step.raw if stage == "train" else []:
        batch = change.change(batch, stream_key(model.seed, change.stream, 0))
    return data.batch_transform(batch, stage, 0).input


def check_smallest_batch(model: BaseModel, config: Config, data: BaseDataModule) -> None:
    """Refuse a batch of one sample that the norms in training cannot take, be it the last of a long epoch.

    Args:
        model: moved to the meta device by this; it takes larger batches.
        config: plain and checked.
        data: of the run.

    Raises:
        ConfigError: naming the size of the batches.
    """
    trainer, size = config["trainer"], data.batch_size
    together = trainer.get("sync_batchnorm") or model.step.setting.of(Norm).norm == "sync"
    if smallest_batch(config, data) > 1 or (together and world_size(trainer) > 1):
        return
    shape = _prepared(model, data, data.samples("train")[0, [0]], "train").shape
    if (error := _refusal(model, tuple(shape))) is not None:
        options = f"data.module.batch_size={size}"
        if size > 1:
            options = f"data.module.drop_last=false with {options} leaves a last batch of one sample a device"
        raise ConfigError(
            f"{options}: {_named(model)} cannot train on that ({_first_line(error)})"
        ) from error


def _counter() -> FlopCounterMode:
    """torch's counter, with what it lacks: it takes the backward pass of a grouped convolution for a full one
    (torch 2.15), and knows no deformable convolution."""

    def deformable(input: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    def deformable_backward(grad: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * 2 * math.prod(grad) * math.prod(weight[1:])

    def convolution_backward(grad: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        # arguments after the weight: bias, stride, padding, dilation, transposed, output padding, groups, mask
        transposed, (for_input, for_weight, _) = args[4], args[7]
        forward = 2 * math.prod(input if transposed else grad) * math.prod(weight[1:])
        return forward * (bool(for_input) + bool(for_weight))

    ours = torch.ops.torchvision
    mapping = {
        torch.ops.aten.convolution_backward: convolution_backward,
        ours.deform_conv2d: deformable,
        ours._deform_conv2d_backward: deformable_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def network_costs(network: nn.Module, shape: tuple[int, ...]) -> NetworkCosts:
    """Count a training step of `network`, which is on the meta device, on a batch of `shape`."""
    layers = {
        module: Layer(name, type(module).__name__, parameters=_size(module))
        for name, module in network.named_modules(remove_duplicate=True)
        if name
    }
    held = {private.storage_identity(t) for t in (*network.parameters(), *network.buffers())}
    running: list[tuple[Layer, int]] = []
    saved: dict[int, Tensor] = {}  # alive, so that no address comes twice
    counter = _counter()

    def enter(module: nn.Module, args: Any) -> None:
        if module in layers:
            running.append((layers[module], counter.get_total_flops()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in layers:
            layer, before = running.pop()
            layer.multiply_adds += (counter.get_total_flops() - before) // 2
            layer.output = tuple(output.shape) if isinstance(output, Tensor) else layer.output

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        identity = private.storage_identity(tensor)
        if identity not in held and identity not in saved:
            saved[identity] = tensor
            for layer, _ in running:
                layer.saved_bytes += storage.nbytes()
        return tensor

    hooks = [m.register_forward_pre_hook(enter) for m in layers]
    hooks += [m.register_forward_hook(leave) for m in layers]
    network.train()
    try:
        with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(torch.empty(shape, device="meta"))
            multiply_adds = counter.get_total_flops() // 2
            output.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return NetworkCosts(
        input=shape,
        layers=[layer for layer in layers.values() if layer.output],
        parameters=_size(network),
        multiply_adds=multiply_adds,
        saved_bytes=sum(tensor.untyped_storage().nbytes() for tensor in saved.values()),
        step_flops=counter.get_total_flops(),
    )


def count_multiply_adds(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of a forward pass of `network`, which is on the meta device, in evaluation, on a batch of `shape`."""
    counter = _counter()
    with counter, torch.no_grad():
        network.eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def print_summary(config: Config) -> None:
    """Print the summary of a plain, checked configuration."""
    data, model = config["data"], config["model"]
    if data["num_classes"] is None:
        data["num_classes"] = model["num_classes"] = (
            UNKNOWN_CLASSES if data["task"] == "classification" else 1
        )
    resolve_network(config)
    built = build_on_meta(config)
    check_input(built, config)
    batch = data["module"]["batch_size"]
    costs = network_costs(built.model, input_shape(config, batch))
    _print_table(costs, config["summary_depth"])
    passes = built.step.passes
    kept = costs.saved_bytes
    lines = {
        "network": f"{model['_target_']}, input {_shape(costs.input[1:])} ({data['module']['name']})",
        "parameters": f"{costs.parameters:,}, {_bytes(4 * costs.parameters)} in float32",
        "multiply-adds": f"{_count(costs.multiply_adds / batch)} a sample, forward",
        "activations": f"{_bytes(kept / batch)} a sample, {_bytes(kept)} a batch of {batch}: kept for the backward "
        "pass, float32 (about half in bf16)",
        "step": f"{_count(passes * costs.step_flops)}FLOPs a batch, forward and backward"
        + (f", {passes:.3g} passes" if passes != 1 else ""),
    }
    for name, text in lines.items():
        say(f"{name:<14} {text}")


def _print_table(costs: NetworkCosts, depth: int) -> None:
    batch = costs.input[0]
    rows = [
        [
            "  " * (layer.depth - 1) + layer.name.rpartition(".")[2],
            layer.type_name,
            _shape(layer.output[1:]),
            f"{layer.parameters:,}" if layer.parameters else "-",
            _count(layer.multiply_adds / batch) if layer.multiply_adds else "-",
            _bytes(layer.saved_bytes / batch) if layer.saved_bytes else "-",
        ]
        for layer in costs.layers
        if layer.depth <= depth and layer.type_name != "Identity"
    ]
    head = ["layer", "type", "output", "parameters", "multiply-adds", "activations"]
    print_table(head, rows, words=("layer", "type"))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    return f"{_count(number)}B" if number >= 1e3 else f"{number:.0f} B"
