"""Data module, network and trainer from a plain, checked configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from callbacks.checkpoints import AtomicCheckpointIO
from crucible import rooms, sealed
from crucible.configuration import Config
from crucible.files import missing
from crucible.keyed import keyed_rng, stream_key
from crucible.launch import free_port, launch, meeting_point
from crucible.machine import world_size
from crucible.options import ConfigError
from models.base_model import BaseModel
from models.weights import load_weights
from norms import SynchronisedNorms

if TYPE_CHECKING:
    from datasets.base_datamodule import BaseDataModule

_RANDOM_FILLS = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_",
    "xavier_uniform_", "orthogonal_", "bernoulli_", "sparse_", "exponential_", "random_", "log_normal_",
}  # fmt: skip

_EXTRAS = ("albumentations",)  # packages that a configuration may name


class _RecordFills(TorchFunctionMode):
    """Notes the in-place operations that fill each tensor while a network is built."""

    def __init__(self) -> None:
        self.fills: dict[int, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}
        self._alive: list[Tensor] = []  # a freed tensor's address would come again, with its fills

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.endswith("__") and isinstance(target, Tensor) and target.numel():
            if args:
                args = args[1:]
            else:
                kwargs.pop("tensor")
            self.fills.setdefault(target.data_ptr(), []).append((func, tuple(args), kwargs))
            self._alive.append(target)
        return result


def keyed_initialization(network: nn.Module, record: _RecordFills, seed: int) -> None:
    """Draw each randomly filled parameter again from a stream of its own, keyed by its name and shape.

    The distribution is the constructor's. Networks of one seed then agree in every tensor of equal name and
    shape, whatever else they contain, so that the arms of a comparison start alike.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fills = record.fills.get(parameter.data_ptr(), [])
            if any(func.__name__ in _RANDOM_FILLS for func, _, _ in fills):
                with keyed_rng(stream_key(seed, "weights", name, str(tuple(parameter.shape)))):
                    for func, args, kwargs in fills:
                        func(parameter, *args, **kwargs)


def build_model(config: Config, *, load: bool = True, compile: bool = True) -> BaseModel:
    """The model of the configuration: built, initialised, `init_from` loaded, compiled in place.

    Args:
        config: plain and checked.
        load: whether to load `model.init_from` and pretrained weights; not needed where a checkpoint follows.
        compile: whether to honour `model.compile`.
    """
    options = dict(config["model"])
    init_from = options.pop("init_from", None)
    if not load and options.get("pretrained"):
        options["pretrained"] = False
    record = _RecordFills()
    with keyed_rng(stream_key(config["seed"], "construction")), record:
        model: BaseModel = made(options, f"model._target_={options['_target_']}")
    if not hasattr(model, "model"):
        raise ConfigError(
            f"model._target_={options['_target_']}: its __init__ must set self.model", "docs/extending.md"
        )
    model.convert()
    if not options.get("pretrained"):
        keyed_initialization(model, record, config["seed"])
    if init_from and load:
        model.weights_report = load_weights(model.model, init_from)
    if compile and model.step.setting.compile:
        model.compile_in_place(model.model)
    return model


def read_checkpoint(checkpoint: Path) -> Mapping[str, Any]:
    """The content of a whole checkpoint.

    Raises:
        ConfigError: where it cannot be read.
    """
    try:
        return sealed.read(checkpoint)
    except sealed.Damaged as error:
        others = whole_beside(checkpoint)
        raise ConfigError(
            f"ckpt_path={checkpoint}: it {error}" + (f"; {others}" if others else "")
        ) from error


def with_weights(config: Config, checkpoint: Path, content: Mapping[str, Any] | None = None) -> BaseModel:
    """The configuration's network with a checkpoint's weights (the averaged ones, if any), in eval mode.

    Args:
        config: `model` and `seed` are read.
        checkpoint: the file.
        content: of the file, where it has been read.

    Raises:
        ConfigError: where the file cannot be read or does not fit.
    """
    model = build_model(config, load=False, compile=False)
    content = read_checkpoint(checkpoint) if content is None else content
    try:
        model.load_state_dict(content["state_dict"])
        model.load_state_dict(content.get("averaged_state_dict", {}), strict=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"ckpt_path={checkpoint}: of another network, or no training state ({reason})"
        ) from error
    return model.eval()


def whole_beside(checkpoint: Path) -> str:
    """Which checkpoints in the folder of a damaged one are whole, as a part of a sentence; empty for none."""
    others = sorted(file for file in checkpoint.parent.glob("*.ckpt") if file.name != checkpoint.name)
    whole = [file.name for file in others if not sealed.damage(file)]
    return f"whole beside it: {', '.join(whole)}" if whole else ""


def build_data(config: Config) -> BaseDataModule:
    """The data module of the configuration."""
    node = config["data"]["module"]
    return made(node, f"data.module._target_={node['_target_']}")


def build_callback(name: str, node: Mapping[str, Any]) -> Callback:
    """The callback of the configuration's `callbacks` group.

    Raises:
        ConfigError: where its class refuses its options.
    """
    return made(node, f"callbacks.{name}._target_={node['_target_']}")


def made(node: Mapping[str, Any], named: str) -> Any:
    """What a node names, made of its options.

    Raises:
        ConfigError: where its class refuses them.
    """
    try:
        return instantiate(rooms.with_private_targets(node), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error.__cause__ or error
        if isinstance(cause, ConfigError):
            raise cause from None
        reason = " ".join(str(cause).split())[:300]
        if extra := next((e for e in _EXTRAS if f"No module named '{e}'" in f"{reason} {error}"), None):
            raise ConfigError(
                f"{named} needs the package {extra}, which is not installed: pip install -e '.[{extra}]'"
            ) from error
        raise ConfigError(
            f"{named} refuses its options: {type(cause).__name__}: {reason}; change them"
        ) from error


def build_trainer(config: Config, folder: Path, callbacks: list[Callback], loggers: list[Any]) -> Trainer:
    """The trainer of the configuration; bad combinations come back as one line.

    Raises:
        ConfigError: where Lightning refuses the options.
    """
    options = {**config["trainer"]}
    options["num_sanity_val_steps"] = options.get("num_sanity_val_steps", 0)
    options["profiler"] = options.get("profiler") or _NoProfiler()
    # of the process, as Lightning's `deterministic` is: each run of it states its own
    torch.set_float32_matmul_precision(config.get("matmul_precision", "highest"))
    plugins: list[Any] = [AtomicCheckpointIO(), _Launched()]
    if options.pop("sync_batchnorm", None) and world_size(options) > 1:
        plugins.append(SynchronisedNorms())
    try:
        trainer = Trainer(
            **options,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=plugins,
            default_root_dir=str(folder),
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    _skip_empty_hooks(trainer.callbacks)  # type: ignore[attr-defined]
    return trainer


def alone(config: Config) -> Config:
    """The configuration for one process on one device: with several it would wait for ranks that nobody starts.

    Of devices that are named it is the first.
    """
    trainer = config["trainer"]
    devices = trainer["devices"]
    if isinstance(devices, str):
        devices = [int(number) for number in devices.split(",") if number.strip()] if "," in devices else []
    named = devices[:1] if isinstance(devices, list) else []
    return {**config, "trainer": {**trainer, "devices": named or 1, "num_nodes": 1, "strategy": "auto"}}


class _Launched(ClusterEnvironment):
    """The processes of a run as `crucible.launch` finds them. Lightning starts none, and reads no variable itself."""

    def __init__(self) -> None:
        self._launch = launch()
        self._world = self._launch.world
        self._meeting: tuple[str, int] | None = None

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._meet()[0]

    @property
    def main_port(self) -> int:
        return self._meet()[1]

    def _meet(self) -> tuple[str, int]:
        if self._meeting is None:  # a process alone is no other's to meet, whatever the environment says
            alone = self._launch.world == 1
            self._meeting = ("127.0.0.1", free_port()) if alone else meeting_point()
        return self._meeting

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self._world

    def set_world_size(self, size: int) -> None:
        self._world = size

    def global_rank(self) -> int:
        return self._launch.rank

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        return self._launch.local_rank

    def node_rank(self) -> int:
        return self._launch.node_rank


class _NoProfiler(PassThroughProfiler):
    """Lightning enters a profiler's context about 30 times a step; this one is nothing but a constant."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing


_STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


def _skip_empty_hooks(callbacks: list[Callback]) -> None:
    """Lightning wraps each hook of each callback in a profiler's context, also those that do nothing.

    It passes over hooks that are not callable, which saves about 0.2 ms a step.
    """
    for callback in callbacks:
        for name in _STEP_HOOKS:
            if getattr(type(callback), name) is getattr(Callback, name):
                setattr(callback, name, None)


def file_fingerprint(option: str, path: str) -> str:
    """The content of a file that an option names, as 12 hex digits.

    Raises:
        ConfigError: where there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{option}={path}: {missing(file, 'file')}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
