"""BaseModel: wires the rooms (network, mixing, criterion, optimizer, metrics) into one Lightning module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from augmentation.distortions import DistortionOptions, build_distortions
from augmentation.mixing import MixingOptions, build_mixing, check_mixing
from crucible.batch import Batch
from crucible.keyed import stream_key
from crucible.metrics import build_metrics, scalars
from crucible.options import ConfigError, option_names, read_options, suggest
from losses import LossOptions, build_criterion, evaluation_criterion
from losses.distillation import Distillation, DistillationOptions, check_distillation
from models.convert import ConversionOptions, convert_network
from norms import (
    NormOptions,
    average_running_statistics,
    check_norm,
    convert_norm,
    exclude_streams_from_broadcast,
    synchronise_streams,
)
from optimizers import OptimizerOptions, build_optimizer
from optimizers.averaging import AveragingOptions, WeightAverage, attach_average
from optimizers.centralization import centralise_gradients, centralised_weights
from optimizers.sam import SamOptions, check_sam, sam_closure
from optimizers.schedules import ScheduleOptions, build_scheduler

ROOMS = (
    NormOptions,
    ConversionOptions,
    LossOptions,
    DistillationOptions,
    DistortionOptions,
    MixingOptions,
    OptimizerOptions,
    ScheduleOptions,
    SamOptions,
    AveragingOptions,
)
Stage = Literal["train", "val", "val_raw", "test"]
NORM_BATCHES = 100  # that SWA's norm statistics come from


def check_options(options: Mapping[str, Any], task: str, accumulate_grad_batches: int = 1) -> None:
    """Refuse what the rooms refuse, and pairs of options without meaning; needs neither data nor network.

    Args:
        options: values of `model.*`; those of the network itself are not looked at.
        task: classification or regression.
        accumulate_grad_batches: the trainer's.

    Raises:
        ConfigError: naming the option.
    """
    build_criterion(read_options(LossOptions, options), task=task)  # type: ignore[arg-type]
    check_distillation(read_options(DistillationOptions, options), task)
    read_options(OptimizerOptions, options)
    read_options(ScheduleOptions, options)
    read_options(AveragingOptions, options)
    norm = read_options(NormOptions, options)
    check_norm(norm)
    if norm.norm == "none" and options.get("zero_init_residual"):
        raise ConfigError(
            "model.zero_init_residual=true needs norms to set to zero; model.norm=none removes them"
        )
    check_sam(read_options(SamOptions, options), accumulate_grad_batches)
    mixing = read_options(MixingOptions, options)
    check_mixing(mixing)
    if task == "regression" and (mixing.mixup or mixing.cutmix_alpha):
        name = "model.mixup" if mixing.mixup else "model.cutmix_alpha"
        raise ConfigError(f"{name} mixes class probabilities and has no meaning with data.task=regression")


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
        options: the options of the rooms (`ROOMS`).

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
        **options: Any,
    ) -> None:
        super().__init__()
        known = {name for room in ROOMS for name in option_names(room)}
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
        self.norm_options = read_options(NormOptions, options)
        self.conversion_options = read_options(ConversionOptions, options)
        self.schedule_options = read_options(ScheduleOptions, options)
        self.sam_options = read_options(SamOptions, options)
        self.averaging_options = read_options(AveragingOptions, options)
        self.distillation_options = read_options(DistillationOptions, options)
        check_options(options, task)
        loss_options = read_options(LossOptions, options)
        self.criterion = build_criterion(loss_options, task=task)
        self.evaluation_criterion = evaluation_criterion(task, loss_options.loss)
        self.distortions = build_distortions(
            read_options(DistortionOptions, options), input_dim, input_channels
        )
        self.mixing = build_mixing(read_options(MixingOptions, options), num_classes)
        names = metrics if metrics is not None else (["acc"] if task == "classification" else ["mse", "mae"])
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": build_metrics(names, task, num_classes) for stage in self._evaluated_stages}
        )
        self._teachers: list[nn.Module] = []  # a list: no part of the model
        self.distillation: Distillation | None = None  # while training with a teacher
        self.average: WeightAverage | None = None  # of the network's weights, where averaging is on
        self._resumed_average: tuple[dict[str, Tensor], int] | None = None
        self._converted = False
        self._centralised: list[nn.Parameter] = []  # the weights whose gradients are centralised
        self._sums: dict[str, Tensor] = {}
        self._resumed_sums: tuple[int, list[float]] | None = None
        self._step_key = 0
        self.sam_pass = 1

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
        """Exchange the network's norms and activations as the options ask; before weights are loaded, and once.

        Raises:
            ConfigError: where the network has nothing to exchange.
        """
        if self._converted:
            return
        self._converted = True
        if (norm := self.norm_options.norm) is not None:
            self.model = convert_norm(self.model, norm, **(self.norm_options.norm_kwargs or {}))
        self.model = convert_network(self.model, self.conversion_options, self.input_dim)

    # Data to the device: normalisation, device augmentation, mixing

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch part of the policy; in training distortions around it, then mixing."""
        trainer = self.trainer
        training = trainer.training
        distortions = self.distortions if training else None
        if distortions is not None:
            key = stream_key(self.seed, "distortions", self.current_epoch)
            batch = batch._replace(input=distortions.before(batch.input, batch.index, key))
        transform = getattr(getattr(trainer, "datamodule", None), "batch_transform", None)
        if transform is not None:
            batch = transform(batch, "train" if training else "eval", self.current_epoch)
        if distortions is not None:
            batch = batch._replace(input=distortions.after(batch.input, batch.index, key))
        if training and self.mixing is not None:
            key = stream_key(self.seed, "mixing", self.current_epoch, self._batch_number())
            batch = Batch(*self.mixing(batch.input, batch.target, key), batch.index)
        batch = self._as_the_weights(batch)
        if training and self.distillation is not None:
            with trainer.precision_plugin.forward_context():
                self.distillation.observe(batch.input)
        return batch

    def _as_the_weights(self, batch: Batch) -> Batch:
        """The batch in the memory format and, under 64-true and bf16-true, the precision of the weights."""
        if self._use_channels_last():
            batch = batch._replace(input=batch.input.contiguous(memory_format=torch.channels_last))
        return self.trainer.precision_plugin.convert_input(batch)

    def _batch_number(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _use_channels_last(self) -> bool:
        wanted = self.device.type == "cuda" if self.channels_last is None else self.channels_last
        return wanted and self.input_dim == 2

    # Training

    def setup(self, stage: str) -> None:
        self.convert()  # a model made in a notebook comes here unconverted
        exclude_streams_from_broadcast(self)  # each rank of DDP streams its own samples

    def on_fit_start(self) -> None:
        if self._use_channels_last():
            self.model.to(memory_format=torch.channels_last)
        for network in self._teachers:
            self._start_distillation(network)
        if self.distillation_options.teacher is not None and not self._teachers:
            raise ConfigError("model.teacher: its network was not handed in: model.learn_from(network)")

    def learn_from(self, network: nn.Module) -> None:
        """Take the teacher, a network of the same input and classes, for the training to come."""
        self._teachers = [network]

    def _start_distillation(self, network: nn.Module) -> None:
        network.to(self.device, self.dtype)  # type: ignore[arg-type]
        if self._use_channels_last():
            network.to(memory_format=torch.channels_last)
        if self.model._compiled_call_impl is not None:
            (network.model if isinstance(network, BaseModel) else network).compile()
        self.distillation = Distillation(network, self.distillation_options)

    def on_fit_end(self) -> None:
        self.distillation = None

    def on_train_start(self) -> None:
        # Lightning calls no on_train_epoch_start for an epoch that is resumed in its middle
        epoch, sums = self._resumed_sums or (-1, [])
        self._sums["train"] = self._zeros()
        if epoch == self.current_epoch:
            self._sums["train"] += self._sums["train"].new_tensor(sums)

    def on_train_epoch_start(self) -> None:
        self._sums["train"] = self._zeros()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._step_key = stream_key(self.seed, "network", self.current_epoch, batch_idx, self.global_rank)
        self._reseed()

    def _reseed(self) -> None:
        """Every step's dropout and drop paths are a function of (seed, epoch, batch, rank): nothing to save."""
        torch.default_generator.manual_seed(self._step_key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(self._step_key)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch. Accuracy under mixing is against the dominant label."""
        logits = self.outputs(batch.input)
        loss = self.criterion(logits, batch.target)
        if self.distillation is not None:
            loss = self.distillation.loss(logits, loss)
        if self.sam_pass == 1:
            self._accumulate("train", loss, logits, batch.target)
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.sam_options.sam:
            optimizer_closure = sam_closure(self, optimizer_closure, self.sam_options, self._reseed)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # unscaled, after the callbacks' statistics, before clipping; with SAM on the second gradient
        if self._centralised:
            centralise_gradients(self._centralised)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        trainer = self.trainer
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            # before validation and the callbacks' epoch end, so that both see this epoch's values
            values = self._means("train")
            self.log_dict({f"train/{k}": v for k, v in values.items()}, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        check_sam(self.sam_options, accumulate_grad_batches=trainer.accumulate_grad_batches)
        optimizer = build_optimizer(self, self._scaled_to_batch(self.optimizer_options))
        if (which := self.optimizer_options.gradient_centralization) is not None:
            self._centralised = centralised_weights(self, which)
        trainer.fit_loop.setup_data()  # so that the epoch's length is known
        steps_per_epoch = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        epochs = float(trainer.max_epochs or -1)
        if epochs < 1:  # the run is bounded by trainer.max_steps
            epochs = trainer.max_steps / steps_per_epoch
        if self.averaging_options.on:
            self._start_averaging(optimizer, epochs)
        scheduler = build_scheduler(
            optimizer,
            self.schedule_options,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            hold=self.averaging_options.hold(epochs),
        )
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _scaled_to_batch(self, options: OptimizerOptions) -> OptimizerOptions:
        """The options with the learning rate that `lr_scale_batch` gives for this run's global batch."""
        trainer: Any = self.trainer
        if self.schedule_options.lr_scale_batch is None:
            return options
        batch = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return replace(options, lr=options.lr * self.schedule_options.batch_factor(batch))

    def _start_averaging(self, optimizer: Any, epochs: float) -> None:
        options, trainer = self.averaging_options, self.trainer
        self.average = WeightAverage(self.model, options.ema_decay, options.ema_warmup)
        if self._resumed_average is not None:
            self.average.load_state_dict(*self._resumed_average)

        def at_the_end_of_a_late_epoch() -> bool:
            last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
            return last and self.current_epoch + 1 > options.swa_start * epochs  # type: ignore[operator]

        attach_average(
            optimizer, self.average, None if options.swa_start is None else at_the_end_of_a_late_epoch
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        synchronise_streams(self)  # in place: the state dict above shares the tensors
        if self.average is not None:
            with self._averaged():
                synchronise_streams(self)
            averaged = self.average.state_dict()
            checkpoint["averaged_state_dict"] = {f"model.{name}": t for name, t in averaged.items()}
            checkpoint["average_updates"] = self.average.updates if self.average.started else None
        # for a resume in the middle of an epoch; rank 0's sums then stand for every rank's
        checkpoint["train_sums"] = (self.current_epoch, self._sums.get("train", self._zeros()).tolist())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed_sums = checkpoint.get("train_sums")
        if (updates := checkpoint.get("average_updates")) is not None:
            state = {k.removeprefix("model."): v for k, v in checkpoint["averaged_state_dict"].items()}
            self._resumed_average = (state, updates)

    # Evaluation: plain loss, exact over ranks; of the averaged weights where there are some

    @property
    def _evaluated_stages(self) -> tuple[Stage, ...]:
        return ("val", "test", "val_raw") if self.averaging_options.on else ("val", "test")

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def on_validation_epoch_start(self) -> None:
        synchronise_streams(self)
        if self.average is not None:
            with self._averaged():
                synchronise_streams(self)
                if self.averaging_options.swa_start is not None and self.average.started:
                    self._refresh_norms()
        for stage in self._evaluated_stages:
            self._sums[stage] = self._zeros()

    def on_test_epoch_start(self) -> None:
        synchronise_streams(self)
        self._sums["test"] = self._zeros()

    def _refresh_norms(self) -> None:
        """Batch norms' statistics anew, as those of averaged weights are no average (arXiv 1803.05407, 3.2)."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        epoch = self.current_epoch
        self._step_key = stream_key(self.seed, "norm statistics", epoch, self.global_rank)
        self._reseed()

        def inputs() -> Iterator[Tensor]:
            for batch in data.training_batches(epoch, NORM_BATCHES):
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                yield self._as_the_weights(data.batch_transform(batch, "train", epoch)).input

        training = self.model.training
        with torch.inference_mode(False), self.trainer.precision_plugin.forward_context():
            update_bn(inputs(), self.model)
        self.model.train(training)
        average_running_statistics(self.model)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns `logits` (N, K) or (N,), `target` (N,) and `index` (N,), for the callbacks."""
        if self.average is not None:
            self._evaluate(batch, "val_raw")
        with self._averaged():
            return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        with self._averaged():
            return self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        logits = self.outputs(batch.input).float()
        self._accumulate(stage, self.evaluation_criterion(logits, batch.target), logits, batch.target)
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
        values = {"loss": self._means(stage)["loss"], **scalars(metrics.compute(), class_names)}  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """`scores` (N, K) probabilities or (N,) values, `target` and `index` of one batch, float32."""
        with self._averaged():
            logits = self.outputs(batch.input).float()
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        return {"scores": scores, "target": batch.target, "index": batch.index}

    # Sums on the device: loss and hits (or absolute error) per sample, read at the epoch's end

    def _zeros(self) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=self.device)

    @torch.no_grad()
    def _accumulate(self, stage: Stage, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        n = logits.shape[0]
        if self.task == "classification":
            label = target if target.ndim == 1 else target.argmax(dim=1)
            second = (logits.argmax(dim=1) == label).sum()
        else:
            second = (logits - target).abs().sum()
        sums = self._sums[stage]
        count = torch.full(
            (), n, dtype=sums.dtype, device=sums.device
        )  # filled there: nothing is copied or waited for
        sums += torch.stack((loss.detach().to(sums.dtype) * n, second.to(sums.dtype), count))

    def _means(self, stage: Stage) -> dict[str, Tensor]:
        """Exact means over all samples of all ranks (collective)."""
        sums = self._sums[stage]
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        return self._named(sums)

    def _named(self, sums: Tensor) -> dict[str, Tensor]:
        count = sums[2].clamp(min=1)
        return {"loss": sums[0] / count, "acc" if self.task == "classification" else "mae": sums[1] / count}

    def running_metrics(self) -> dict[str, float]:
        """This rank's means of the epoch so far. Waits for the device: call it rarely."""
        return {k: float(v) for k, v in self._named(self._sums["train"]).items()}
