"""BaseModel: the network, the stages of a training step, and its evaluation, as one Lightning module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from crucible.batch import Batch
from crucible.keyed import stream_key
from crucible.metrics import build_metrics, scalars
from crucible.options import ConfigError, option_names, read_options, suggest
from crucible.sums import Sums
from crucible.technique import BatchStage, Setting, Weights, assemble, check_techniques, read_techniques
from losses import LossOptions, evaluation_criterion
from models.techniques import technique_kinds
from norms import exclude_streams_from_broadcast, share_buffers
from optimizers import OptimizerOptions, build_optimizer
from optimizers.schedules import ScheduleOptions, build_scheduler

BASICS = (LossOptions, OptimizerOptions, ScheduleOptions)  # options that no training is without
Stage = Literal["train", "val", "val_raw", "test"]


class BaseModel(LightningModule):
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
        compile: `torch.compile` the network for training; null: on the command line where it pays, else not.
        stages: techniques of one's own, `{name: module.Class}`.
        options: those of `BASICS` and of the techniques.

    Raises:
        ConfigError: for an option that nobody consumes, a bad value, or a pair without meaning.
    """

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
        seed: int = 0,
        compile: bool | None = None,
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
        loss = read_options(LossOptions, options).loss
        setting = Setting(task, num_classes, input_dim, input_channels, compile=compile)
        self.step = assemble(read_techniques(kinds, options), setting, evaluation_criterion(task, loss))
        self.criterion = self.step.criterion
        self.evaluation_criterion = evaluation_criterion(task, loss)
        names = metrics if metrics is not None else (["acc"] if task == "classification" else ["mse", "mae"])
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": build_metrics(names, task, num_classes) for stage in self._evaluated_stages}
        )
        self.epochs = 0.0  # length of the training
        self.step_pass = 1  # forward passes of the step so far, with this one
        self._converted = False
        self._sums: dict[str, Sums] = {}
        self._resumed_sums: tuple[int, list[float]] | None = None
        self._step_key = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning sets this text twice around every hook; nn.Module's checks would cost 0.1 ms a step
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`(N, C, *spatial)` float to `(N, num_outputs)`."""
        return self.model(input)

    def outputs(self, input: Tensor) -> Tensor:
        """Logits `(N, K)`, or predictions `(N,)` for regression."""
        out = self(input)
        return out if self.task == "classification" else out.flatten()

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
        """The batch in the memory format and, under 64-true and bf16-true, the precision of the weights."""
        if self._use_channels_last():
            batch = batch._replace(input=batch.input.contiguous(memory_format=torch.channels_last))
        return self.trainer.precision_plugin.convert_input(batch)

    def _use_channels_last(self) -> bool:
        wanted = self.device.type == "cuda" if self.channels_last is None else self.channels_last
        return wanted and self.input_dim == 2

    # Training

    def setup(self, stage: str) -> None:
        self.convert()  # a model made in a notebook comes here unconverted, and not compiled
        exclude_streams_from_broadcast(self)  # each rank of DDP streams its own samples
        if stage == "fit" and self.step.setting.compile and self.model._compiled_call_impl is None:
            self.model.compile()

    def on_fit_start(self) -> None:
        if self._use_channels_last():
            self.model.to(memory_format=torch.channels_last)
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
            (network.model if isinstance(network, BaseModel) else network).compile()

    def on_fit_end(self) -> None:
        for wanted in self.step.networks.values():
            wanted.network = None  # its memory is free again

    def on_train_start(self) -> None:
        # Lightning calls no on_train_epoch_start for an epoch that is resumed in its middle
        epoch, sums = self._resumed_sums or (-1, [])
        self._sums["train"] = Sums(self.task, self.device, *([sums] if epoch == self.current_epoch else []))

    def on_train_epoch_start(self) -> None:
        self._sums["train"] = Sums(self.task, self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.reseed("network", self.current_epoch, batch_idx)

    def reseed(self, *stream: int | str) -> None:
        """Set all random generators to the step's key, or begin one of the named stream.

        Every step's dropout and drop paths are a function of (seed, epoch, batch, rank): nothing to save.
        """
        if stream:
            self._step_key = stream_key(self.seed, *stream, self.global_rank)
        torch.default_generator.manual_seed(self._step_key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(self._step_key)

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

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        for wrap in self.step.closure:
            optimizer_closure = wrap(self, optimizer_closure)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # unscaled, after the callbacks' statistics, before clipping; of the last pass
        for act in self.step.gradient:
            act()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        trainer = self.trainer
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            # before validation and the callbacks' epoch end, so that both see this epoch's values
            values = self._sums["train"].means(trainer)
            self.log_dict({f"train/{k}": v for k, v in values.items()}, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        trainer, step = self.trainer, self.step
        accumulated = trainer.accumulate_grad_batches
        check_techniques(step.setting.techniques, replace(step.setting, accumulate_grad_batches=accumulated))
        options = self.optimizer_options
        if self.schedule_options.lr_scale_batch is not None:
            batch = trainer.datamodule.batch_size * trainer.world_size * accumulated  # type: ignore[attr-defined]
            options = replace(options, lr=options.lr * self.schedule_options.batch_factor(batch))
        optimizer = build_optimizer(self, options, step.groups)
        trainer.fit_loop.setup_data()  # so that the epoch's length is known
        steps_per_epoch = max(1, math.ceil(trainer.num_training_batches / accumulated))
        self.epochs = float(trainer.max_epochs or -1)
        if self.epochs < 1:  # the run is bounded by trainer.max_steps
            self.epochs = trainer.max_steps / steps_per_epoch
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
        )
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._make_fit()  # in place: the state dict above shares the tensors
        if (weights := self._shipped) is not None:
            averaged = {f"model.{name}": tensor for name, tensor in weights.state_dict().items()}
            checkpoint["averaged_state_dict"], checkpoint["average_updates"] = averaged, weights.updates
            if wider := weights.sums():
                checkpoint["average_sums"] = wider
        # for a resume in the middle of an epoch; rank 0's sums then stand for every rank's
        sums = self._sums.get("train") or Sums(self.task, self.device)
        checkpoint["train_sums"] = (self.current_epoch, sums.totals.tolist())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed_sums = checkpoint.get("train_sums")
        if (updates := checkpoint.get("average_updates")) is not None:
            state = {k.removeprefix("model."): v for k, v in checkpoint["averaged_state_dict"].items()}
            for weights in self.step.weights:
                weights.load_state_dict(state, updates, checkpoint.get("average_sums", {}))

    # Evaluation: plain loss, exact over ranks; of the weights that ship

    @property
    def _evaluated_stages(self) -> tuple[Stage, ...]:
        return ("val", "test", "val_raw") if self.step.weights else ("val", "test")

    @property
    def _shipped(self) -> Weights | None:
        return next((weights for weights in self.step.weights if weights.active), None)

    def _with_shipped(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shipped is None else self._shipped.applied()

    def _make_fit(self) -> None:
        """Before whatever evaluates or ships the weights: the same buffers in all processes, shipped ones fresh."""
        share_buffers(self.model)
        if (weights := self._shipped) is not None:
            with weights.applied():
                share_buffers(self.model)
                weights.refresh(self)

    def on_validation_epoch_start(self) -> None:
        self._make_fit()
        for stage in self._evaluated_stages:
            self._sums[stage] = Sums(self.task, self.device)

    def on_predict_epoch_start(self) -> None:
        self._make_fit()

    def on_test_epoch_start(self) -> None:
        self._make_fit()
        self._sums["test"] = Sums(self.task, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns `logits` (N, K) or (N,), `target` (N,) and `index` (N,), for the callbacks."""
        if self._shipped is not None:
            self._evaluate(batch, "val_raw")
        with self._with_shipped():
            return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        with self._with_shipped():
            return self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        logits = self.outputs(batch.input).float()
        self._sums[stage].add(self.evaluation_criterion(logits, batch.target), logits, batch.target)
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        self.metrics[f"{stage}_metrics"].update(scores, batch.target)  # type: ignore[operator]
        return {"logits": logits, "target": batch.target, "index": batch.index}

    def on_validation_epoch_end(self) -> None:
        for stage in self._evaluated_stages:
            if stage != "test":
                self._log_evaluation(stage)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Stage) -> None:
        metrics = self.metrics[f"{stage}_metrics"]
        class_names = getattr(getattr(self.trainer, "datamodule", None), "class_names", [])
        values = {"loss": self._sums[stage].means(self.trainer)["loss"]}
        values |= scalars(metrics.compute(), class_names)  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """`scores` (N, K) probabilities or (N,) values, `target` and `index` of one batch, float32."""
        with self._with_shipped():
            logits = self.outputs(batch.input).float()
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        return {"scores": scores, "target": batch.target, "index": batch.index}

    def running_metrics(self) -> dict[str, float]:
        """This rank's means of the epoch so far. Waits for the device: call it rarely."""
        return {k: float(v) for k, v in self._sums["train"].means().items()}
