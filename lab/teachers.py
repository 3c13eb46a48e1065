"""Trained networks that a run learns from: found by the option of `Distil` that names them, and loaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from crucible.configuration import Config
from crucible.keyed import keyed_rng
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.trust import judge
from lab.build import file_fingerprint, with_weights
from lab.recorded import completed
from lab.summary import check_input
from losses.distillation import Distil
from models.base_model import BaseModel
from models.weights import load_weights

OPTION = Distil.networks[0]


@dataclass(frozen=True)
class Teacher:
    """What `model.teacher` names.

    Args:
        file: of the weights; None: timm's own of this name.
        timm: the name of timm's network; empty: the file is a run's checkpoint, and its network the run's.
    """

    file: Path | None
    timm: str = ""

    def __str__(self) -> str:
        if not self.timm:
            return str(self.file)
        return f"timm:{self.timm}" + (f"@{self.file}" if self.file else "")

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"model.{OPTION}={self}: {text}", see="cli_configs/technique/distillation.yaml")


def find_teacher(text: str) -> Teacher:
    """The teacher that a value of `model.teacher` names, with the path of its weights made absolute.

    Of a run's folder it is `best.ckpt`, or `last.ckpt` where the run kept no best.

    Raises:
        ConfigError: where there is no such run, file or network.
    """
    if text.startswith("timm:"):
        import timm

        name, at, file = text.removeprefix("timm:").partition("@")
        teacher = Teacher(Path(file).expanduser().resolve() if at else None, name)
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
            raise teacher.error(f"timm has no such model; {hint}")
        if at and not teacher.file.is_file():  # type: ignore[union-attr]
            raise teacher.error("no such file")
        if not at and not timm.is_model_pretrained(name):
            raise teacher.error(f"timm has no weights for it; give a file of them: timm:{name}@FILE")
        return teacher
    path = Path(text).expanduser().resolve()
    if path.is_file():
        if not (path.parent.parent / "config.yaml").is_file():
            raise Teacher(path).error(
                "not in a run's folder, so that its network is unknown; timm:NAME@FILE says it"
            )
        return Teacher(path)
    run = RunDirectory(path)
    if (state := run.state()) in ("absent", "running"):
        reason = (
            "no run there" if state == "absent" else "this run is in progress; name one of its checkpoints"
        )
        raise Teacher(path).error(reason)
    try:
        return Teacher(run.pick_checkpoint(None))
    except ConfigError as error:
        raise Teacher(path).error("the run kept no checkpoint") from error


def load_teacher(teacher: Teacher, *, num_classes: int, input_channels: int, input_dim: int) -> nn.Module:
    """The teacher's network with its weights (the averaged ones, if any), on the CPU, in eval mode.

    Args:
        teacher: from `find_teacher`.
        num_classes: classes of the data.
        input_channels: channels of their input.
        input_dim: spatial dimensions of their input.

    Raises:
        ConfigError: where the teacher is for other data, or its weights cannot be read or do not fit.
    """
    here = {"classes": num_classes, "input channels": input_channels, "input dimensions": input_dim}
    if not teacher.timm:
        return _of_run(teacher, here)
    return _of_timm(teacher, here)


def hand_in_teacher(model: BaseModel, config: Config) -> None:
    """Give the model the trained network that its configuration lets it learn from, if any."""
    options = config["model"]
    if (text := options.get(OPTION)) is not None:
        fit = {name: options[name] for name in ("num_classes", "input_channels", "input_dim")}
        model.learn_from(load_teacher(find_teacher(text), **fit))


def _check_fit(teacher: Teacher, its: Mapping[str, int], here: Mapping[str, int]) -> None:
    for what, value in its.items():
        if value != here[what]:
            raise teacher.error(f"it has {value} {what}, the data have {here[what]}")


def _of_run(teacher: Teacher, here: Mapping[str, int]) -> nn.Module:
    assert teacher.file is not None
    config = _run_config(teacher)
    if config["data"]["task"] != "classification":
        raise teacher.error(f"that run's data.task is {config['data']['task']}")
    model = config["model"]
    its = {
        "classes": model["num_classes"],
        "input channels": model["input_channels"],
        "input dimensions": model["input_dim"],
    }
    _check_fit(teacher, its, here)
    try:
        return with_weights(config, teacher.file)
    except ConfigError as error:
        raise teacher.error(str(error).removeprefix(f"ckpt_path={teacher.file}: ")) from error


def _run_config(teacher: Teacher) -> dict[str, Any]:
    """What the teacher's run records; of it only the model is built."""
    assert teacher.file is not None
    config = RunDirectory(teacher.file.parent.parent).config()
    judge({n: config.get(n) for n in ("model", "user_dir")}, f"model.{OPTION}={teacher}: its run")
    return completed(config)


def _of_timm(teacher: Teacher, here: Mapping[str, int]) -> nn.Module:
    import timm

    _check_fit(teacher, {"input dimensions": 2}, here)
    arguments: dict[str, Any] = {"num_classes": here["classes"], "in_chans": here["input channels"]}
    if teacher.file is None:
        of_weights = _pretrained(teacher)
        its = {"classes": of_weights.num_classes, "input channels": of_weights.input_size[0]}
        _check_fit(teacher, its, here)
        arguments["pretrained"] = True
    try:
        with keyed_rng(0):  # its initial weights, which none of the training's draws may depend on
            network = timm.create_model(teacher.timm, **arguments)
    except Exception as error:  # whatever a network's constructor or a download raises
        raise teacher.error((str(error) or type(error).__name__).splitlines()[0]) from error
    if teacher.file is not None:
        state = [t for t in network.state_dict().values() if t.is_floating_point()]
        for tensor in state:
            tensor.fill_(float("nan"))  # so that what the file leaves out shows
        try:
            report = load_weights(network, teacher.file)
        except ConfigError as error:
            raise teacher.error(str(error).removeprefix(f"model.init_from={teacher.file}: ")) from error
        if any(tensor.isnan().any() for tensor in state):
            reasons = "; ".join(line.strip() for line in report.splitlines()[1:])
            raise teacher.error(f"its weights are not the network's for these data ({reasons})")
    return network.eval()


def _pretrained(teacher: Teacher) -> Any:
    """What timm knows of its weights of this name."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(teacher.timm)


def settle_teacher(config: Mapping[str, Any]) -> tuple[str, str]:
    """Check the teacher of a configuration whose data are known, before anything is written.

    Returns:
        what to record as `model.teacher`: with the path of the weights themselves, absolute; and a fingerprint
        of those weights.

    Raises:
        ConfigError: as `find_teacher` and `load_teacher`; for a teacher that saw its input normalised
            differently.
    """
    model = config["model"]
    teacher = find_teacher(model[OPTION])
    _check_normalisation(teacher, config["data"]["module"])
    network = load_teacher(
        teacher, **{name: model[name] for name in ("num_classes", "input_channels", "input_dim")}
    )
    try:
        check_input(network, config)  # type: ignore[arg-type]
    except ConfigError as error:
        raise teacher.error(str(error)) from error
    content = "" if teacher.file is None else file_fingerprint(f"model.{OPTION}", str(teacher.file))
    return str(teacher), f"{teacher.timm} {content}".strip()


def _check_normalisation(teacher: Teacher, data: Mapping[str, Any]) -> None:
    policy = data.get("train_transforms") or {}
    if not teacher.timm:
        theirs = _run_config(teacher)["data"]["module"].get("train_transforms") or {}
    elif teacher.file is None and policy.keys() & {"mean", "std"}:
        of_weights = _pretrained(teacher)
        theirs = {"mean": list(of_weights.mean), "std": list(of_weights.std)}
    else:
        return  # nobody knows what the file's weights were trained on
    for name in ("mean", "std"):
        if policy.get(name) != theirs.get(name):
            raise teacher.error(
                f"its input was normalised with {name} {theirs.get(name)}, here"
                f" data.module.train_transforms.{name} is {policy.get(name)}"
            )
