"""What a technique is: its options, its rules, and what it does at which stage of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from crucible.batch import Batch
from crucible.corrections import Correction
from crucible.options import ConfigError, option_text, read_options

T = TypeVar("T", bound="Technique")
CompileMode = Literal[
    "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]  # torch.compile's
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that record and replay a step's kernels
Closure = Callable[[], Any]
Factor = Callable[[float], float]  # on the learning rate, as a function of progress in epochs


class BatchStage(NamedTuple):
    """A change of a training batch on its device.

    Attributes:
        stream: name of its stream of random numbers.
        change: `(batch, key) -> batch`; draws from `key` by `crucible.keyed`, and never waits for the device.
        per: what the key is one of: `batch`, or `sample`, where it is the epoch's and draws go by `batch.visit`.
    """

    stream: str
    change: Callable[[Batch, int], Batch]
    per: Literal["batch", "sample"] = "batch"


class Weights(Protocol):
    """Weights that are evaluated and shipped in place of the trained ones. `optimizers.averaging` has them."""

    @property
    def active(self) -> bool:
        """Whether there is a training for them to come from; before, the network's own stand for them."""

    @property
    def updates(self) -> int | None:
        """How often they have been updated; None before the first time."""

    def start(self, module: Any, optimizer: Optimizer) -> None:
        """Follow the steps of `optimizer`; called once, before the first."""

    def after_step(self, module: Any) -> None:
        """A step was done, or left out by a loss scaler."""

    def applied(self) -> AbstractContextManager[None]:
        """The network holds them inside, and its own again afterwards."""

    def refresh(self, module: Any) -> None:
        """Make them fit to be evaluated; called inside `applied`, before each evaluation and each checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        """As they are evaluated and shipped, under the network's keys."""

    def sums(self) -> dict[str, Tensor]:
        """What a training that goes on needs in a higher precision than they are shipped in; may be empty."""

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int, sums: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; called before `start`."""


class TrainedNetwork:
    """A network that a technique uses and does not train, such as a teacher. Whoever builds the model hands it in.

    It is no module: a model that holds it has none of its parameters, in no checkpoint, optimizer or gradient
    exchange; copies share it.
    """

    network: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedNetwork:
        other = copy.copy(self)
        memo[id(self)] = other
        return other


@dataclass(frozen=True)
class Setting:
    """What a technique may ask about the run that it is to be part of.

    Attributes:
        task: `classification` or `regression`.
        num_classes: classes of the data; 0 where they are not known yet.
        input_dim: spatial dimensions of the input.
        input_channels: its channels.
        accumulate_grad_batches: batches of a step.
        compile: whether the network is to be compiled, or in which mode; None: where it pays.
        precision: the trainer's; None where it is not known.
        data: the configuration's `data`, where there is one.
        techniques: all of them, by class.
    """

    task: str = "classification"
    num_classes: int = 0
    input_dim: int = 2
    input_channels: int = 3
    accumulate_grad_batches: int = 1
    compile: bool | CompileMode | None = None
    precision: str | int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    techniques: Mapping[type[Technique], Technique] = field(default_factory=dict)

    def of(self, kind: type[T]) -> T:
        """The options of another technique; its defaults where it is not known here."""
        found = self.techniques.get(kind)
        return found if isinstance(found, kind) else kind()


class InnerMixing(Protocol):
    """What mixes the samples of a training batch inside of the network, so that its input is not mixed."""

    def mix(self, values: Tensor) -> Tensor:
        """Values (N, ...) of the batch's samples, mixed as its targets were."""
        ...

    def rest(self) -> None:
        """Leave what the network is given as it is, until the next training batch."""
        ...


@dataclass
class Step:
    """The stages of a training step, in the order in which they act. What is off adds nothing to any of them.

    `module` is the `BaseModel`: its `model` is the network, its `epochs` the length of the training, and its
    `reseed()` sets all random generators to the key of the step.

    Attributes:
        setting: of the run.
        criterion: `(logits, target) -> scalar`, the loss that the terms below join.
        network: `network -> network`, before weights are drawn or loaded.
        raw: changes of the batch before the data's policy normalises it.
        batch: and after.
        inside: what of them mixes the samples inside of the network: of its input others know no mixed samples.
        ready: see the batch as the network will, in the trainer's precision; nothing comes back.
        input_gradient: the input requires a gradient, for a term of the loss that looks at it.
        loss: `(loss, logits, batch) -> loss`, plain tensor functions.
        closure: `(module, closure) -> closure` of forward and backward; may run it twice. `module.step_pass` counts.
        gradient: on unscaled gradients, before clipping.
        groups: `(module, groups) -> groups` of the optimizer's parameters.
        optimizer: `(module, optimizer)`, once: hooks around its steps.
        kept: the tensors that such a hook changes, besides the optimizer's state: a step that is left out leaves them.
        schedule: `(factor, epochs) -> factor`.
        weights: what is evaluated and shipped; at most one.
        networks: trained networks that are to be handed in, by the option that names them.
    """

    setting: Setting = field(default_factory=Setting)
    criterion: nn.Module = field(default_factory=nn.Identity)
    network: list[Callable[[nn.Module], nn.Module]] = field(default_factory=list)
    raw: list[BatchStage] = field(default_factory=list)
    batch: list[BatchStage] = field(default_factory=list)
    inside: list[InnerMixing] = field(default_factory=list)
    ready: list[Callable[[Batch], None]] = field(default_factory=list)
    input_gradient: bool = False
    loss: list[Callable[[Tensor, Tensor, Batch], Tensor]] = field(default_factory=list)
    closure: list[Callable[[Any, Closure], Closure]] = field(default_factory=list)
    gradient: list[Callable[[], None]] = field(default_factory=list)
    groups: list[Callable[[nn.Module, list[dict[str, Any]]], list[dict[str, Any]]]] = field(
        default_factory=list
    )
    optimizer: list[Callable[[Any, Optimizer], None]] = field(default_factory=list)
    kept: list[Callable[[], Sequence[Tensor]]] = field(default_factory=list)
    schedule: list[Callable[[Factor, float], Factor]] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    networks: dict[str, TrainedNetwork] = field(default_factory=dict)

    @property
    def passes(self) -> float:
        """Forward and backward passes of a step with its techniques, on average."""
        return 1 + sum(t.passes - 1 for t in self.setting.techniques.values() if t.on)


@dataclass(frozen=True)
class Technique:
    """Options of `model.*`, off by default; a subclass says what they mean.

    Attributes:
        needs: options that mean something only beside another one, and which: `{"sam_rho": ("sam",)}`. Those that
            stand here do not turn the technique on, all others do.
        networks: options that name trained networks; whoever builds the model finds them and hands them in.
        compiles: whether the network can be compiled with it. Else `model.compile=null` settles to off.
        corrections: of its numbers, so far.
    """

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    networks: ClassVar[tuple[str, ...]] = ()
    compiles: ClassVar[bool] = True
    corrections: ClassVar[tuple[Correction, ...]] = ()

    @property
    def on(self) -> bool:
        """Whether an option that turns it on differs from its default."""
        return any(self._is_set(f.name) for f in fields(self) if f.name not in self.needs)

    @property
    def passes(self) -> float:
        """Forward and backward passes of a step with it, on average; 1 for most."""
        return 1.0

    @property
    def turns(self) -> Mapping[str, float]:
        """`{option: epochs}`: after so many of them what a step does is another thing; empty for most."""
        return {}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    def check(self, setting: Setting) -> None:
        """Refuse, in one line that names the option, what this run cannot honour.

        Raises:
            ConfigError: for that.
        """

    def attach(self, step: Step) -> None:
        """Add what it does to the stages of the step; called where it is on."""


def is_on(kind: type[Technique]) -> Callable[[Mapping[str, Any]], bool]:
    """Concerns the plain configurations in which a technique is on."""
    own = {f.name: f.default for f in fields(kind) if f.name not in kind.needs}
    return lambda config: any(config["model"].get(name, default) != default for name, default in own.items())


def _as_typed(name: str, value: Any) -> str:
    """An option and its value as on a command line; of a mapping the first entry."""
    if isinstance(value, Mapping):
        key, value = next(iter(value.items()))
        return f"model.{name}.{key}={value!r}"
    return f"model.{name}={str(value).lower() if isinstance(value, bool) else value}"


def _needed(kind: type[Technique], name: str) -> str:
    if kind.__dataclass_fields__[name].default is False:
        return f"model.{name}=true"
    text = option_text(kind, name)
    return f"model.{name}" + (f": {text}" if text else "")


def read_techniques(
    kinds: Iterable[type[Technique]], values: Mapping[str, Any]
) -> dict[type[Technique], Technique]:
    """Each technique with those of `values` that are its options.

    Raises:
        ConfigError: for a value of the wrong type or range.
    """
    return {kind: read_options(kind, values) for kind in kinds}


def check_techniques(techniques: Mapping[type[Technique], Technique], setting: Setting) -> None:
    """Let every technique refuse what this run cannot honour.

    Raises:
        ConfigError: also for an option without the one that it needs, or a technique that cannot be compiled
            where that is asked for.
    """
    setting = replace(setting, techniques=techniques)
    for technique in techniques.values():
        for name, others in technique.needs.items():
            if technique._is_set(name) and not any(technique._is_set(other) for other in others):
                needed = " or ".join(_needed(type(technique), other) for other in others)
                raise ConfigError(f"{_as_typed(name, getattr(technique, name))} needs {needed}")
        if technique.on:
            technique.check(setting)
            if setting.compile and not technique.compiles:
                raise ConfigError(
                    f"model.compile={str(setting.compile).lower()}: {type(technique).__name__} cannot be compiled; "
                    "use null or false"
                )


def assemble(techniques: Mapping[type[Technique], Technique], setting: Setting, criterion: nn.Module) -> Step:
    """The step of a run: the techniques that are on attach themselves, in their order.

    Raises:
        ConfigError: as `check_techniques`, and for two averages of the weights.
    """
    check_techniques(techniques, setting)
    step = Step(replace(setting, techniques=techniques), criterion)
    for technique in techniques.values():
        if technique.on:
            technique.attach(step)
    if len(step.weights) > 1:
        raise ConfigError(
            "model: the weights that are evaluated are one average; switch on one technique of them"
        )
    return step
