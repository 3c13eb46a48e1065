"""What training does to the logits, the gradient and the weights: one value an epoch of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from crucible.options import ConfigError
from crucible.training import watched

NAMES = ("norm", "mean", "max", "var")
PREFIXES = {"train": "logits", "val": "val/logits", "test": "test/logits"}


def logit_statistics(logits: Tensor) -> dict[str, Tensor]:
    """How large and how spread out logits are: a statistic of each row, averaged over the rows.

    The statistics of a row z are `norm` |z|_2, `mean` |mean of z|, `max` |largest of z| and `var`, the
    unbiased variance over the classes.

    Args:
        logits: (N, K) of any float dtype, N >= 1, K >= 2 (the variance of one class is NaN).

    Returns:
        Four tensors of no dimension on the logits' device, float32 or wider whatever the autocast.
    """
    return dict(zip(NAMES, _statistics(logits), strict=True))


def _statistics(logits: Tensor) -> Tensor:
    """(4,) in the order of NAMES."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    var, mean = torch.var_mean(z, dim=1)
    return torch.stack((torch.linalg.vector_norm(z, dim=1), mean, z.amax(dim=1), var)).abs().mean(dim=1)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all tensors together, float32 or wider; 0 of none."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype)))


class _LogitMeans:
    """Means over samples of `logit_statistics`, summed on the device and at the end over the ranks."""

    def __init__(self, device: torch.device, sums: Iterable[float] = (0.0,) * 4, samples: int = 0) -> None:
        self.sums = torch.tensor(list(sums), dtype=_wide(device), device=device)
        self.samples = samples

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        self.sums.add_(_statistics(logits), alpha=logits.shape[0])
        self.samples += logits.shape[0]

    def means(self, trainer: Trainer, prefix: str) -> dict[str, Tensor]:
        """Collective."""
        total = torch.cat((self.sums, self.sums.new_tensor([self.samples])))
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        return {f"{prefix}/{name}": value for name, value in zip(NAMES, total[:4] / total[4], strict=True)}


class _GradientNorms:
    """Mean and maximum of the gradient's norm over the steps in which it is finite, on the device."""

    def __init__(
        self, device: torch.device, sums: Iterable[float] = (0.0,) * 2, largest: float = 0.0
    ) -> None:
        self.sums = torch.tensor(list(sums), dtype=_wide(device), device=device)  # of norms, of steps
        self.largest = torch.tensor(largest, dtype=_wide(device), device=device)

    @torch.no_grad()
    def add(self, gradients: list[Tensor]) -> None:
        norm = total_norm(gradients).to(self.sums)
        finite = norm.isfinite().to(norm.dtype)
        norm = norm.nan_to_num(nan=0.0, posinf=0.0)
        self.sums += torch.stack((norm, finite))
        torch.maximum(self.largest, norm, out=self.largest)

    def values(self) -> dict[str, Tensor]:
        """NaN where no step had a finite gradient."""
        mean = self.sums[0] / self.sums[1]
        return {"train/grad_norm": mean, "train/grad_norm_max": self.largest.where(self.sums[1] > 0, mean)}


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class LogitStats(Callback):
    """Logs `logit_statistics` of every split and the norms of gradient and weights, once an epoch.

    `logits/norm|mean|max|var` are of training: the logits that the loss saw (mixed inputs, dropout, weights
    that move), each sample once, under SAM those of the first pass. `val/logits/*` and `test/logits/*` are
    of evaluation. All are means over the samples of all ranks.

    `train/grad_norm` and `train/grad_norm_max` are the mean and the largest over an epoch's steps of the L2
    norm of the whole gradient that the optimizer is given: over all ranks and accumulated batches, under
    SAM the second pass's, unscaled, before clipping. Steps whose gradient is not finite, which a loss scaler
    skips, are left out. A callback further up in the configuration that changes gradients acts before.
    `train/weight_norm` is the L2 norm of all parameters at the epoch's end.

    Training logits are what the model returns from `self(input)`, caught by a forward hook on the model: the
    network inside it, which may be compiled, does not know of it.

    Args:
        norms: whether to log the norms of gradient and weights too.

    Raises:
        ConfigError: for regression, or where a model's `training_step` does not call the model.
    """

    _train: _LogitMeans
    _gradients: _GradientNorms
    _evaluation: _LogitMeans
    _no_values: Callable[[], None]

    def __init__(self, norms: Annotated[bool, "log the norms of gradient and weights too"] = True) -> None:
        self.norms = norms
        self._hook: RemovableHandle | None = None
        self._seen = False  # this step's logits are counted
        self._epoch = -1
        self._resumed: dict[str, Any] = {}

    # A checkpoint within an epoch keeps the sums so far; rank 0's then stand for every rank's

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch in progress. Waits for the device."""
        if self._epoch < 0:
            return {}
        return {
            "epoch": self._epoch,
            "logits": (self._train.sums.tolist(), self._train.samples),
            "gradients": (self._gradients.sums.tolist(), float(self._gradients.largest)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on summing."""
        self._resumed = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if pl_module.task == "regression":
            raise ConfigError(
                "technique=logit_stats watches logits, which data.task=regression has none of:"
                " it needs data.task=classification"
            )

    # Training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hook = pl_module.register_forward_hook(self._after_forward)
        wanted = watched(pl_module).epoch_values
        values = partial(self._epoch_values, trainer, pl_module)
        wanted.append(values)
        self._no_values = partial(wanted.remove, values)

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # The first of a step: SAM's second pass follows, and DDP sends training_step through forward as well
        if module.training and not self._seen and isinstance(output, Tensor) and output.ndim == 2:
            self._train.add(output)
            self._seen = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls no on_train_epoch_start for an epoch that is resumed in its middle
        resumed, self._resumed = self._resumed, {}
        self._begin(trainer, pl_module, resumed if resumed.get("epoch") == trainer.current_epoch else {})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module, {})

    def _begin(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        self._epoch = trainer.current_epoch
        self._seen = False
        self._train = _LogitMeans(pl_module.device, *state.get("logits", ()))
        self._gradients = _GradientNorms(pl_module.device, *state.get("gradients", ()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.norms:  # Lightning has unscaled the gradients already, and clips them after this
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self._gradients.add([g for g in gradients if g is not None])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._seen:
            raise ConfigError(
                f"technique=logit_stats sees no training logits: {type(pl_module).__name__}.training_step"
                " does not get them, (N, K), from self(input)"
            )
        self._seen = False

    def _epoch_values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        values = self._train.means(trainer, PREFIXES["train"])
        if self.norms:
            values |= self._gradients.values()
            values["train/weight_norm"] = total_norm(p.detach() for p in pl_module.parameters())
        return values

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._no_values()
            self._hook = None

    # Evaluation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = _LogitMeans(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluation.add(outputs["logits"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = self._evaluation.means(trainer, PREFIXES["val"])
        pl_module.log_dict(means, logger=not watched(pl_module).hands_on_rows)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = self._evaluation.means(trainer, PREFIXES["test"])
        pl_module.log_dict(means, logger=not watched(pl_module).hands_on_rows)
