"""BaseModel: the network, the stages of a training step, and its evaluation, as one Lightning module."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from crucible.batch import Batch, convert_no_batches
from crucible.keyed import seed_generators, stream_key
from crucible.metrics import build_metrics
from crucible.options import ConfigError, option_names, read_options, suggest
from crucible.sums import Sums
from crucible.technique import (
    CUDA_GRAPHS,
    BatchStage,
    CompileMode,
    Setting,
    assemble,
    check_techniques,
    read_techniques,
)
from losses import LossOptions, evaluation_criterion
from models.evaluation import EvaluatedModel
from models.groups import GroupScores
from models.techniques import technique_kinds
from norms import exclude_streams_from_broadcast
from optimizers import OptimizerOptions, build_optimizer
from optimizers.accumulation import group_factor, restore_window, save_window
from optimizers.schedules import Plateau, ScheduleOptions, build_scheduler, resume_schedule, training_length

log = logging.getLogger("crucible")

BASICS = (LossOptions, OptimizerOptions, ScheduleOptions)  # options that no training is without


def _own_share(sums: list[float], trainer: Any) -> list[float]:
    """This rank's of the sums that all ranks saved; of another number of ranks, rank 0 goes on with them all."""
    each = [sums[at : at + 3] for at in range(0, len(sums), 3)]
    if len(each) == trainer.world_size:
        return each[trainer.global_rank]
    return [sum(part) for part in zip(*each, strict=True)] if trainer.is_global_zero else [0.0] * 3


class BaseModel(EvaluatedModel):
    """What every model shares; a family sets `self.model` and, where it needs more, defines `forward`.

        class MyNet(BaseModel):
            def __init__(self, width: int = 32, **kwargs):
                super().__init__(**kwargs)
                self.model = ...            # (N, C, *spatial) float -> (N, self.num_outputs)

    Args:
        num_classes: classes of the data; ignored for regression, where the network has one output.
        task: what the targets are.
        input_dim: spatial dimensions of the input.
        input_channels: channels of the input.
        metrics: names from `crucible.metrics`, for validation and test.
        channels_last: memory format of 2-D input and weights; null: on CUDA only.
        seed: key of all randomness in the step (dropout, drop paths, mixing).
        compile: `torch.compile` the network for training, or the mode to do it in; null: on the command line where it
            pays, else not.
        stages: techniques of one's own, `{name: module.Class}`.
        options: those of `BASICS` and of the techniques.

    Raises:
        ConfigError: for an option that nobody consumes, a bad value, or a pair without meaning.
    """

    short: ClassVar[
        Mapping[str, Any]
    ] = {}  # how this variant of its module's family is asked for: {"depth": 50}
    model: nn.Module
    weights_report: str = ""  # what `init_from` or pretrained weights filled, for the banner

    def __init__(
        self,
        *,
        num_classes: Annotated[int, "[1, inf)"] = 10,
        task: Literal["classification", "regression"] = "classification",
        input_dim: Literal[1, 2, 3] = 2,
        input_channels: Annotated[int, "[1, inf)"] = 3,
        metrics: list[str] | None = None,
        channels_last: bool | None = None,
        seed: Annotated[int, "[0, inf)"] = 0,
        compile: bool | CompileMode | None = None,
        stages: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kinds = technique_kinds(stages)
        known = {name for room in (*BASICS, *kinds) for name in option_names(room)}
        for name, value in options.items():
            if name not in known:
                raise ConfigError(
                    f"model.{name}={value!r}: {type(self).__name__} has no such option{suggest(name, known)}"
                )
        self.task: str = task
        self.num_classes = num_classes
        self.num_outputs = num_classes if task == "classification" else 1
        self.input_dim = input_dim
        self.input_channels = input_channels
        self.channels_last = channels_last
        self.seed = seed
        self.optimizer_options = read_options(OptimizerOptions, options)
        self.schedule_options = read_options(ScheduleOptions, options)
        self.plateau = (
            Plateau(self.schedule_options) if self.schedule_options.scheduler == "Plateau" else None
        )
        loss = read_options(LossOptions, options).loss
        setting = Setting(task, num_classes, input_dim, input_channels, compile=compile)
        self.step = assemble(read_techniques(kinds, options), setting, evaluation_criterion(task, loss))
        self.criterion = self.step.criterion
        self.evaluation_criterion = evaluation_criterion(task, loss)
        names = metrics if metrics is not None else (["acc"] if task == "classification" else ["mse", "mae"])
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": build_metrics(names, task, num_classes) for stage in self._evaluated_stages}
        )
        self.epochs = 0.0  # length of the training, of which the last may be a part
        # what callbacks have of a training epoch, asked for once, at its end
        self.epoch_values: list[Callable[[], Mapping[str, Tensor]]] = []
        self.steps_per_epoch = 0
        self.batch_samples = 0  # of the training batch under way, as it was read: views of one are one
        self.step_pass = 1  # forward passes of the step so far, with this one
        self.skips_nonfinite = (
            False  # whether steps that are not finite are left out, of the epoch's means too
        )
        self._converted = False
        self._sums: dict[str, Sums] = {}
        self._logged = False  # this epoch's values of training
        self._resumed: dict[str, Any] = {}  # of the training state that this one goes on from
        self._step_key = 0
        self._said: set[str] = set()  # remarks on metrics
        self._groups: dict[str, GroupScores] = {}  # of the stages that are evaluated

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning sets this text twice around every hook; nn.Module's checks would cost 0.1 ms a step
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`(N, C, *spatial)` float to `(N, num_outputs)`."""
        return self.model(input)

    def convert(self) -> None:
        """Let techniques change the network; before weights are drawn or loaded, and once.

        Raises:
            ConfigError: where the network has nothing for them to change.
        """
        if not self._converted:
            self._converted = True
            for change in self.step.network:
                self.model = change(self.model)

    def learn_from(self, network: nn.Module) -> None:
        """Hand in the trained network that a technique asks for (a teacher), for the training to come."""
        for wanted in self.step.networks.values():
            wanted.network = network

    # Data to the device

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch part of the policy, in training between the techniques' changes."""
        trainer, step = self.trainer, self.step
        training = trainer.training
        if training:
            self.batch_samples = len(batch.target)
            batch = self._changed(batch, step.raw)
        transform = getattr(getattr(trainer, "datamodule", None), "batch_transform", None)
        if transform is not None:
            batch = transform(batch, "train" if training else "eval", self.current_epoch)
        if training:
            batch = self._changed(batch, step.batch)
        batch = self.as_the_weights(batch)
        if training and step.ready:
            with trainer.precision_plugin.forward_context():
                for see in step.ready:
                    see(batch)
        return batch

    def _changed(self, batch: Batch, stages: Sequence[BatchStage]) -> Batch:
        for stage in stages:
            place = (self._batch_number(),) if stage.per == "batch" else ()
            batch = stage.change(batch, stream_key(self.seed, stage.stream, self.current_epoch, *place))
        return batch

    def _batch_number(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def as_the_weights(self, batch: Batch) -> Batch:
        """The batch in the memory format and, under 64-true and bf16-true, its input in the weights' precision.

        Targets are never rounded.
        """
        if self._use_channels_last() and batch.input.ndim == 4:  # several crops of each are apart still
            batch = batch._replace(input=batch.input.contiguous(memory_format=torch.channels_last))
        batch = batch._replace(input=self.trainer.precision_plugin.convert_input(batch.input))
        if batch.target.is_floating_point():
            wider = torch.promote_types(batch.target.dtype, batch.input.dtype)
            batch = batch._replace(target=batch.target.to(wider))
        return batch

    def _use_channels_last(self) -> bool:
        # the device that the weights will be on, where they are not there yet
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        return (on_cuda if self.channels_last is None else self.channels_last) and self.input_dim == 2

    # Training

    def setup(self, stage: str) -> None:
        self.convert()  # a model made in a notebook comes here unconverted, and not compiled
        convert_no_batches(self.trainer.precision_plugin)
        exclude_streams_from_broadcast(self)  # each rank of DDP streams its own samples
        if self._use_channels_last():
            # before DDP lays out its buckets, and whatever is a copy of the weights: averages, moments
            self.model.to(memory_format=torch.channels_last)
        if stage == "fit" and self.step.setting.compile and self.model._compiled_call_impl is None:
            self.compile_in_place(self.model)

    def compile_in_place(self, network: nn.Module) -> None:
        """Compile a network, in the mode that `model.compile` names where it names one."""
        mode = self.step.setting.compile
        network.compile(**({"mode": mode} if isinstance(mode, str) else {}))

    def outputs(self, input: Tensor) -> Tensor:
        out = super().outputs(input)
        # the next replay of a graph writes over what this one returned, which a callback may keep
        return out.clone() if self.step.setting.compile in CUDA_GRAPHS else out

    def on_fit_start(self) -> None:
        for option, wanted in self.step.networks.items():
            if wanted.network is None:
                raise ConfigError(
                    f"model.{option}: its network was not handed in; model.learn_from(network) does"
                )
            self._make_ready(wanted.network)

    def _make_ready(self, network: nn.Module) -> None:
        network.eval().requires_grad_(False).to(self.device, self.dtype)  # type: ignore[arg-type]
        if self._use_channels_last():
            network.to(memory_format=torch.channels_last)
        if self.model._compiled_call_impl is not None:
            self.compile_in_place(network.model if isinstance(network, BaseModel) else network)

    def on_fit_end(self) -> None:
        for wanted in self.step.networks.values():
            wanted.network = None  # its memory is free again

    def on_train_start(self) -> None:
        # Lightning calls no on_train_epoch_start for an epoch that is resumed in its middle
        state, self._resumed = self._resumed, {}
        epoch, sums = state.get("train_sums") or (-1, [])
        goes_on = _own_share(sums, self.trainer) if epoch == self.current_epoch else [0.0] * 3
        self._sums["train"] = Sums(self.task, self.device, goes_on, self.skips_nonfinite)
        self._logged = False
        if state:
            restore_window(self, state)
            if self.plateau is not None and "plateau" in state:
                self.plateau.load_state_dict(state["plateau"])
            resume_schedule(self.trainer, state, self.steps_per_epoch)

    def on_train_epoch_start(self) -> None:
        self._sums["train"] = Sums(self.task, self.device, leave_out=self.skips_nonfinite)
        self._logged = False

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.reseed("network", self.current_epoch, batch_idx)

    def reseed(self, *stream: int | str) -> None:
        """Set all random generators to the step's key, or begin one of the named stream.

        Every step's dropout and drop paths are a function of (seed, epoch, batch, rank): nothing to save.
        """
        if stream:
            self._step_key = stream_key(self.seed, *stream, self.global_rank)
        seed_generators(self._step_key, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch. Accuracy under mixing is against the dominant label."""
        if self.step.input_gradient:
            batch = batch._replace(input=batch.input.detach().requires_grad_())
        logits = self.outputs(batch.input)
        loss = self.criterion(logits, batch.target)
        for term in self.step.loss:
            loss = term(loss, logits, batch)
        if self.step_pass == 1:
            self._sums["train"].add(loss, logits, batch.target)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            loss = loss * group_factor(self.trainer, self._batch_number())
        super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        for wrap in self.step.closure:
            optimizer_closure = wrap(self, optimizer_closure)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for weights in self.step.weights:
            weights.after_step(self)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # unscaled, after the callbacks' statistics, before clipping; of the last pass
        for act in self.step.gradient:
            act()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        trainer = self.trainer
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            # before validation and the callbacks' epoch end, so that both see this epoch's values
            self.log_training()

    def on_validation_end(self) -> None:
        if self.plateau is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.plateau.observe(self.trainer)

    def on_train_epoch_end(self) -> None:
        self.log_training()

    def log_training(self) -> None:
        """Log the epoch's values of training, unless that is done; of an epoch that was cut, those of its part.

        A callback that reads them calls it at the epoch's end, as callbacks come before the model there.
        """
        if self._logged:
            return
        self._logged = True
        values: dict[str, Tensor] = {
            f"train/{k}": v for k, v in self._sums["train"].means(self.trainer).items()
        }
        for more in self.epoch_values:
            values.update(more())
        self.log_dict(values, on_step=False, on_epoch=True, logger=not self.hands_on_rows)

    def configure_optimizers(self) -> Any:
        trainer, step = self.trainer, self.step
        accumulated = trainer.accumulate_grad_batches
        check_techniques(step.setting.techniques, replace(step.setting, accumulate_grad_batches=accumulated))
        if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            self.schedule_options.check_changing_steps(trainer.max_steps)
        options = self.optimizer_options
        if self.schedule_options.lr_scale_batch is not None:
            batch = trainer.datamodule.batch_size * trainer.world_size * accumulated  # type: ignore[attr-defined]
            options = self.schedule_options.for_batch(options, batch)
        optimizer = build_optimizer(self, options, step.groups)
        trainer.fit_loop.setup_data()  # so that the epoch's length is known
        steps_per_epoch = self.steps_per_epoch = max(1, math.ceil(trainer.num_training_batches / accumulated))
        self.epochs = training_length(trainer.max_epochs, trainer.max_steps, steps_per_epoch)
        for attach in step.optimizer:
            attach(self, optimizer)
        for weights in step.weights:
            weights.start(self, optimizer)
        scheduler = build_scheduler(
            optimizer,
            self.schedule_options,
            epochs=self.epochs,
            steps_per_epoch=steps_per_epoch,
            changes=step.schedule,
            plateau=self.plateau,
        )
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._make_fit()  # in place: the state dict above shares the tensors
        if (weights := self._shipped) is not None:
            averaged = {f"model.{name}": tensor for name, tensor in weights.state_dict().items()}
            checkpoint["averaged_state_dict"], checkpoint["average_updates"] = averaged, weights.updates
            checkpoint["average_kind"] = getattr(weights, "kind", "")
            if wider := weights.sums():
                checkpoint["average_sums"] = wider
        # for a resume in the middle of an epoch: of all ranks, one after the other
        sums = self._sums.get("train") or Sums(self.task, self.device)
        totals = self.trainer.strategy.all_gather(sums.totals)
        checkpoint["train_sums"] = (self.current_epoch, totals.flatten().tolist())
        checkpoint["steps_per_epoch"] = self.steps_per_epoch
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state_dict()
        save_window(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = ("train_sums", "steps_per_epoch", "accumulation", "plateau")
        self._resumed = {name: checkpoint[name] for name in wanted if name in checkpoint}
        if (updates := checkpoint.get("average_updates")) is not None:
            state = {k.removeprefix("model."): v for k, v in checkpoint["averaged_state_dict"].items()}
            for weights in self.step.weights:
                weights.load_state_dict(state, updates, checkpoint.get("average_sums", {}))
