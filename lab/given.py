"""Weights from elsewhere become a folder that is used as a run's is: tested, predicted with, loaded; nothing trains.

python main.py task=test model=timm model.type=resnet50 model.pretrained=true data=imagenet
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crucible import sealed
from crucible.command_line import option
from crucible.configuration import Config, find_target
from crucible.files import absolute, replacing, why_not_writable
from crucible.masking import check_no_secret, masked
from crucible.options import ConfigError
from crucible.run import Held, RunDirectory
from crucible.trust import vouch
from datasets.classes import listed
from lab import config as checking
from lab.build import build_data, build_model
from lab.config import SWEEP_OPTIONS
from lab.experiment import arm_name, identity_hash, weights_of
from lab.recorded import EVALUATION_OPTIONS, TASK_OPTIONS
from lab.summary import check_input
from lab.use import described_transform, network_facts
from models.base_model import BaseModel
from models.weights import hub_folder, load_weights, named_classes

SEE = "docs/weights.md"
LISTED = ("model.type", "model.init_from")  # options that a test takes a list of, for a table
# of the data: what a test is asked for, and no fact of the weights
_ASKED = ("predict_dir", "class_map", "corruption", "severity", "real_labels")


@dataclass(frozen=True)
class Given:
    """Weights from elsewhere, recorded.

    Attributes:
        run: their folder.
        beside: what is to be typed beside `run=RUN` so that it is evaluated as asked.
        said: what they are, and what was settled.
        keep: whether the copy of the weights is to stay.
    """

    run: RunDirectory
    beside: list[str]
    said: list[str]
    keep: bool


def each_given(config: Config, overrides: Sequence[str]) -> dict[str, tuple[Config, list[str]]]:
    """The configurations that a list of names or files stands for, by name or file; of one without a list, itself.

    Raises:
        ConfigError: for lists of both, or an empty one.
    """
    lists = [name for name in LISTED if isinstance(config["model"].get(name.removeprefix("model.")), list)]
    if not lists:
        return {"": (config, list(overrides))}
    values = [str(value) for value in config["model"][lists[0].removeprefix("model.")]]
    if len(lists) > 1 or not values:
        raise ConfigError(f"{lists[0]}={values}: one list, of names or of files, makes a table", SEE)
    found = {}
    for value in dict.fromkeys(values):
        one = copy.deepcopy(config)
        one["model"][lists[0].removeprefix("model.")] = value
        others = [o for o in overrides if o.lstrip("+").split("=", 1)[0] != lists[0]]
        found[value] = one, [*others, option(lists[0], value)]
    return found


def record_given(config: Config, overrides: Sequence[str]) -> Given:
    """Check a configuration of weights from elsewhere, and record them; the same ones have the same folder.

    Args:
        config: plain, as composed.
        overrides: what was typed.

    Raises:
        ConfigError: where nothing names weights, they do not fill the network, or the data have other classes.
    """
    config = copy.deepcopy(config)
    for name in SWEEP_OPTIONS:
        config.pop(name)
    model, module = config["model"], config["data"]["module"]
    roots = module.get("data_root_dir")
    if isinstance(roots, list) and roots:
        module["data_root_dir"] = roots[0]
    checking.check(config, overrides)
    for name in TASK_OPTIONS:
        config.pop(name, None)
    vouch(config)
    check_no_secret(config)
    if not (model.get("init_from") or model.get("pretrained")):
        raise ConfigError(
            f"task={config['task']}: of which weights? run=RUN of a recorded run; model.init_from=FILE or "
            "model.pretrained=true of others",
            SEE,
        )
    if config["ckpt_path"] is not None:
        raise ConfigError(
            f"ckpt_path={config['ckpt_path']}: chooses among a run's: run=RUN task={config['task']}; "
            "model.init_from=FILE takes any file",
            SEE,
        )
    typed = {o.lstrip("+~").split("=", 1)[0] for o in overrides}
    if model.get("init_from"):
        model["init_from"] = str(Path(weights_of(str(model["init_from"]))).expanduser().absolute())
    said = checking.settle_weights_data(config, overrides)
    count, names = _classes_of(config)
    if count and "data.num_classes" not in typed:
        config["data"]["num_classes"] = module["num_classes"] = model["num_classes"] = count
    asked = {name: module.get(name) for name in _ASKED}
    found, fingerprint = _classes_of_data(config, asked, names)
    module.update({name: None for name in _ASKED if name in module})
    if config["data"]["num_classes"] is None and config["data"]["task"] == "classification":
        if not found:
            raise ConfigError("data.num_classes=null: the weights do not say how many; give it", SEE)
        config["data"]["num_classes"] = module["num_classes"] = model["num_classes"] = len(found)
    borrowed, names = names is None, _named(names, found, config)
    _settle_machine(config, said)
    network = _loaded(config, count)
    source = model["init_from"] or f"timm's weights of {model['type']}"
    content = _fingerprint(network.state_dict())
    full = identity_hash(config, {"given": content})
    folder = Path(config["exp_dir"]).expanduser().resolve() / module["name"]
    if reason := why_not_writable(folder):
        raise ConfigError(
            f"exp_dir={config['exp_dir']}: cannot be written ({reason}); exp_dir=PATH is elsewhere"
        )
    for key in ("data_root_dir", "stylized_root_dir"):
        if module.get(key) is not None:
            module[key] = absolute(module[key])
    run = RunDirectory(folder / f"{full[:8]}-s{config['seed']}")
    facts = {
        "run_id": run.path.name, "identity": full[:8], "identity_hash": full, "seed": config["seed"],
        "data": module["name"], "arm": arm_name(config, overrides), "techniques": sorted(config["techniques"] or {}),
        "given": source, "weights": content, "resolved": said, "transform": described_transform(config),
        **({"classes": names, "classes_borrowed": borrowed} if names else {}),
        **({"data_fingerprint": fingerprint} if fingerprint else {}),
    }  # fmt: skip
    _record(run, config, [masked(o) for o in overrides], facts, network)
    if network.weights_report:
        said = [*said, *network.weights_report.splitlines()]
    if names and run.known().get("classes_borrowed"):
        said = [
            *said,
            f"labels are taken by position, the weights name no classes: {listed(names)}, as in the data",
        ]
    return Given(run, _beside(config, overrides, roots, asked), said, config["checkpoint"]["keep"] != "none")


def _classes_of(config: Config) -> tuple[int, list[str] | None]:
    """How many classes the weights say that they have, 0 where nothing says it, and their names."""
    model = config["model"]
    target = find_target(model["_target_"], "model._target_")
    file = model.get("init_from")
    if not hasattr(target, "own_data") or not (model.get("pretrained") or hub_folder(file)):
        names = named_classes(file) if file else None
        return len(names or ()), names
    # what the data are prepared like is settled; that it is not asked for does not change whose weights they are
    own = target.own_data({**model, "data_config": None}, evaluates=True)
    return (0, None) if own is None else (own.num_classes, own.label_names)


def _classes_of_data(
    config: Config, asked: Mapping[str, Any], names: list[str] | None
) -> tuple[list[str], str]:
    """The names of the data's classes, and their fingerprint; empty for a prediction of a folder, and an export without
    data.

    Raises:
        ConfigError: for classes that are none of the weights' `names`.
    """
    if asked["predict_dir"] is not None:
        return [], ""
    module = {**config["data"]["module"], **dict.fromkeys(_ASKED)}
    try:
        data = build_data({**config, "data": {**config["data"], "module": module}})
        data.score_for(None, elsewhere=True)
        data.prepare_data()
        if names is not None and config["data"]["task"] == "classification":
            data.check_classes_known(names, asked["class_map"])
        return data.class_names, data.fingerprint()
    except ConfigError:
        if config["task"] not in ("export", "card"):  # which do without
            raise
        return [], ""


def _named(names: list[str] | None, found: list[str], config: Config) -> list[str]:
    """The names of the network's classes: those of the weights, where they name none those of as many in the data.

    Raises:
        ConfigError: for data of another number of classes.
    """
    if config["data"]["task"] != "classification":
        return []
    if names is not None:
        return names
    count = config["data"]["num_classes"]
    if not found or len(found) == count:
        return found
    raise ConfigError(
        f"data.module.data_root_dir: {config['data']['module']['data_root_dir']} has {len(found)} classes, the "
        f"weights {count}",
        SEE,
    )


def _settle_machine(config: Config, said: list[str]) -> None:
    if config["data"]["num_classes"] is None:
        config["data"]["num_classes"] = config["model"]["num_classes"] = 1
    checking.resolve_network(config)
    checking.resolve_monitor(config, ())
    checking.resolve_precision(config, said)
    config["model"]["compile"] = False
    config["logger"] = {}


def _loaded(config: Config, count: int) -> BaseModel:
    """The network, filled by the weights to the last tensor.

    Raises:
        ConfigError: for what is left as it was drawn.
    """
    model = config["model"]
    check_input(build_model(config, load=False, compile=False), config)  # it leaves the model without memory
    network = build_model(config, load=not model.get("init_from"), compile=False)
    if not model.get("init_from"):
        if count and count != network.num_outputs:
            raise ConfigError(
                f"data.num_classes={network.num_outputs}: the weights of {model['type']} have {count}; "
                "a new head has learnt nothing",
                SEE,
            )
        return network.eval()
    floating = [t for t in network.model.state_dict().values() if t.is_floating_point()]
    for tensor in floating:
        tensor.fill_(float("nan"))  # so that what the file leaves out shows
    network.weights_report = load_weights(network.model, model["init_from"])
    if any(bool(tensor.isnan().any()) for tensor in floating):
        reasons = "; ".join(line.strip() for line in network.weights_report.splitlines()[1:])
        raise ConfigError(
            f"model.init_from={model['init_from']}: does not fill the network, and what it leaves has learnt nothing "
            f"({reasons or 'it holds values that are not numbers'})",
            SEE,
        )
    return network.eval()


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _record(
    run: RunDirectory, config: Config, overrides: list[str], facts: dict[str, Any], model: BaseModel
) -> None:
    """Write the folder, unless it says all of this already.

    Names of classes that are the data's give way to those of other data, and to the weights' own.

    Raises:
        Held: where a live process holds it.
    """
    file = run.checkpoints / "best.ckpt"
    run.path.mkdir(parents=True, exist_ok=True)
    with run.locked():
        if run.state() == "running":
            raise Held(f"{run.path}: this run is in progress ({run.holder()})")
        known = run.known()
        if "classes" in known and not known.get("classes_borrowed") and facts.get("classes_borrowed"):
            facts = {**facts, "classes": known["classes"], "classes_borrowed": False}
        lacking = [name for name in ("classes", "data_fingerprint") if name in facts and name not in known]
        naming = {n: facts[n] for n in ("classes", "classes_borrowed") if n in facts}
        if lacking or not (run.path / "config.yaml").is_file():
            now = {"status": "tested", "reason": "weights from elsewhere: nothing was trained here"}
            times = {"final": {}, "best": {}, "started": time.time(), "ended": time.time()}
            run.record({**config, "fresh": False}, overrides, **now, **times, **facts)
            file.unlink(missing_ok=True)  # it is to have the names of the classes, too
        elif known.get("classes_borrowed") and any(known[n] != value for n, value in naming.items()):
            file.unlink(missing_ok=True)
            run.update_summary(**naming)
        if sealed.damage(file):
            content = {
                "state_dict": model.state_dict(), "network": network_facts(config), "run": facts["run_id"],
                "class_names": facts.get("classes", []), "classes_borrowed": facts.get("classes_borrowed", False),
                "validated": {}, "given": facts["given"],
            }  # fmt: skip
            with replacing(file, sync=True) as temporary:
                sealed.write(content, temporary)


def _beside(config: Config, overrides: Sequence[str], roots: Any, asked: Mapping[str, Any]) -> list[str]:
    """What `run=RUN` is to be told: what was typed of an evaluation, and where the data lie now."""
    own = ("task", "out", "format", *EVALUATION_OPTIONS)
    rooms = (
        "data.module.",
        "trainer.",
        "metrics",
        "callbacks.",
        "export.",
    )  # nothing of a test is logged elsewhere
    found = {}
    for override in overrides:
        name = override.lstrip("+").split("=", 1)[0]
        if name in own or name.startswith(rooms):
            found[name] = override.lstrip("+")
    found["task"] = option("task", config["task"])
    for name, value in asked.items():
        if value is not None:
            found.setdefault(f"data.module.{name}", option(f"data.module.{name}", value))
    if isinstance(roots, str):
        found["data.module.data_root_dir"] = option("data.module.data_root_dir", absolute(roots))
    return list(found.values())
