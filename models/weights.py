"""Reading weights from files of ours, torchvision's and timm's, without ever running code from a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crucible import sealed
from crucible.options import ConfigError
from crucible.private import AnyConvolution

# what a training file calls its weights; the averaged ones are preferred where it holds both
CONTAINERS = ("averaged_state_dict", "state_dict_ema", "model_ema", "state_dict", "model")
# what wrappers put before a key: DDP and averaging `module.`, our LightningModule `model.`
PREFIXES = ("", "module.", "model.", "model.module.", "module.model.")
HEAD = re.compile(r"(fc|heads?|classifier|head_dist)\.")
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of timm's, beside config.json
NAMES_SHOWN = 4


def hub_folder(path: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The weights and the description in a folder as timm's `save_for_hf` writes it; None: it is none.

    Args:
        path: the folder, or its file of weights.

    Raises:
        ConfigError: for a folder without weights, and a description that cannot be read.
    """
    place = Path(path).expanduser()
    folder = place.parent if place.is_file() and place.name in HUB_WEIGHTS else place
    if not (folder / "config.json").is_file():
        return None
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = isinstance(described, dict) and isinstance(described["architecture"], str)
    except (OSError, ValueError, KeyError):
        known = False
    if not known:
        raise ConfigError(
            f"model.init_from={path}: its config.json does not say what network of timm's it is of"
        )
    files = [place] if place.is_file() else [folder / n for n in HUB_WEIGHTS if (folder / n).is_file()]
    if not files:
        raise ConfigError(
            f"model.init_from={path}: has no weights beside config.json ({', '.join(HUB_WEIGHTS)})"
        )
    return files[0], described


def named_classes(file: str | Path) -> list[str] | None:
    """The names of the classes that a checkpoint of ours has beside its weights, by output; None: none of its own."""
    with contextlib.suppress(Exception):  # what it is that cannot be read, loading the weights will say
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if (names := content.get("class_names")) and not content.get("classes_borrowed"):
            return [str(name) for name in names]
    return None


def load_weights(network: nn.Module, file: str | Path) -> str:
    """Copy the weights of a file into `network`, in place, and say what was done.

    Understood are Lightning checkpoints (ours, with `averaged_state_dict` where weights are averaged), bare state
    dicts (torchvision), training files with `state_dict` or `state_dict_ema` (timm) or `model` or `model_ema`
    (torchvision's references), `.safetensors`, and a folder as timm's `save_for_hf` writes it. Of two sets of weights
    the averaged one is taken. The prefixes of `torch.compile`, DDP and LightningModule are stripped.

    Args:
        network: the network, not its LightningModule.
        file: the path.

    Returns:
        A report of one to five lines: how many tensors were loaded, a first convolution adapted to other input
        channels (`adapted_stem`), a head of another size (which keeps its initial values), keys missing in the
        file, keys the network does not have.

    Raises:
        ConfigError: for a file that is missing, damaged, or holds other objects than weights; for a tensor
            other than the head's of another shape; where no key matches.
    """
    hub = hub_folder(file)
    path = hub[0] if hub else Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"model.init_from={file}: no such file")
    content = _read(path)
    container = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
    state = content if container is None else content[container]
    source = f"model.init_from={file}" + ("" if container is None else f" ({container})")
    return load_state(network, state, source)


def load_state(network: nn.Module, state: Mapping[str, Any], source: str) -> str:
    """As `load_weights`, from a state dict in memory; `source` begins the report and the errors."""
    own = network.state_dict()
    given = _strip_prefixes(state, own)
    matching = [name for name in own if name in given]
    stem = _stem(network)
    channels = 0
    if stem in matching and _only_inputs_differ(own[stem], given[stem]):
        channels = given[stem].shape[1]
        given = {**given, stem: adapted_stem(given[stem], own[stem].shape[1])}
    differing = [name for name in matching if own[name].shape != given[name].shape]
    heads = _heads(network)
    fresh_head = [name for name in differing if _only_outputs_differ(name, own[name], given[name], heads)]
    for name in differing:
        if name not in fresh_head:
            raise ConfigError(
                f"{source}: {name} is {_shape(given[name])} in the file, {_shape(own[name])} in the network"
            )
    loaded = [name for name in matching if name not in fresh_head]
    if not loaded:
        theirs = _names([str(name) for name in given or state])
        raise ConfigError(
            f"{source}: no weight matches the network; the file has {theirs}, the network {_names(list(own))}"
        )
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)

    # files of old torch versions lack the norms' counters, and nothing reads them
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    lines = [f"{source}: {len(loaded)} of {len(own)} tensors loaded"]
    if channels:
        lines.append(f"  {stem}: {stem_words(channels, own[stem].shape[1])}")
    if fresh_head:
        sizes = ", ".join(f"{n} {_shape(given[n])} in the file, {_shape(own[n])} here" for n in fresh_head)
        lines.append(f"  head of another size, left at its initial values: {sizes}")
    if missing:
        lines.append(f"  missing in the file, left at their initial values: {_names(missing)}")
    if unexpected:
        lines.append(f"  in the file only, not used: {_names(unexpected)}")
    return "\n".join(lines)


def adapted_stem(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weights for other input channels, as timm adapts them.

    Repeated along the input channels and scaled by old / new, so that an input that is alike in all channels gives the
    same; for one channel that is their sum.

    Args:
        weight: (out, in, *kernel).
        channels: of the new input.
    """
    before = weight.shape[1]
    repeated = torch.cat([weight.float()] * -(-channels // before), dim=1)[:, :channels]
    if channels == 1:
        repeated = weight.float().sum(dim=1, keepdim=True)
        return repeated.to(weight.dtype)
    return (repeated * (before / channels)).to(weight.dtype)


def stem_words(before: int, channels: int) -> str:
    """What `adapted_stem` did, for people."""
    if channels == 1:
        return f"the weights of {before} input channels are summed into 1"
    return f"the weights of {before} input channels are repeated for {channels}, times {before}/{channels}"


def _stem(network: nn.Module) -> str:
    """The name of the first convolution's weights; empty where there is none, or it has groups."""
    for name, module in network.named_modules():
        if isinstance(module, AnyConvolution):
            return f"{name}.weight" if module.groups == 1 else ""
    return ""


def _only_inputs_differ(own: Tensor, given: Tensor) -> bool:
    shapes = [(t.shape[0], *t.shape[2:]) for t in (own, given) if t.ndim > 2]
    return len(shapes) == 2 and shapes[0] == shapes[1] and own.shape[1] != given.shape[1]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if problem := sealed.damage(path):
            raise ConfigError(f"model.init_from={path}: it {problem}")
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training files hold one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model.init_from={path}: damaged, or holds objects other than weights, which are not loaded"
        ) from error
    except Exception as error:  # torch and safetensors raise about ten kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.init_from={path}: cannot be read ({reason})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"model.init_from={path}: holds a {type(content).__name__}, not a state dict")
    return content


def _strip_prefixes(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` under that prefix with which most keys are the network's."""
    tensors = {
        str(name).replace("_orig_mod.", ""): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    candidates = [
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in PREFIXES
    ]
    return max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))


def _heads(network: nn.Module) -> set[str]:
    """Names of the layers that may differ in their outputs: the last linear one, and what is named a head."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    named = [name for name, _ in network.named_modules() if HEAD.match(f"{name}.")]
    return {*linear[-1:], *named}


def _only_outputs_differ(name: str, own: Tensor, given: Tensor, heads: set[str]) -> bool:
    return name.rpartition(".")[0] in heads and own.ndim == given.ndim and own.shape[1:] == given.shape[1:]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
