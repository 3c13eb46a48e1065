"""What of a trained model goes into one file: its network, with what was asked for before and behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from augmentation.policies.base import Policy
from crucible.machine import widened
from models.base_model import BaseModel
from models.views import Views

Format = Literal["onnx", "torch_export", "torchscript", "safetensors"]
INPUT = "input"


@dataclass(frozen=True)
class ExportOptions:
    """What becomes part of the graph: `export.*` of the command line."""

    normalize: Annotated[bool, "take uint8 pixels at the network's size, and normalise them"] = False
    layout: Annotated[Literal["NCHW", "NHWC"], "where the input has its channels"] = "NCHW"
    softmax: Annotated[bool, "give probabilities instead of logits"] = False
    half: Annotated[bool, "weights and arithmetic in float16; input and output stay what they are"] = False


class Exported(nn.Module):
    """The graph of a file: `(N, C, *spatial)` to logits or probabilities `(N, K)`, or values `(N,)` of a regression.

    Args:
        model: trained, in evaluation mode; its network becomes a part of this one, in float16 where that is asked for.
        policy: the evaluation policy, whose batch part becomes a part of the graph with `options.normalize`.
        views: the temperature, and the mirror image, that outputs are read by.
        options: what is asked for.
    """

    def __init__(self, model: BaseModel, policy: Policy, views: Views, options: ExportOptions) -> None:
        super().__init__()
        own_forward = type(model).forward is not BaseModel.forward
        self.network: nn.Module = model if own_forward else model.model
        self.policy = policy if options.normalize else None
        self.views = views
        self.options = options
        self.classifies = model.task == "classification"
        if options.half:
            self.network.half()
        self.eval().requires_grad_(False)

    @property
    def output(self) -> str:
        """What the output is, and is called in the file: logits, probabilities or values."""
        if not self.classifies:
            return "values"
        return "probabilities" if self.options.softmax else "logits"

    def forward(self, input: Tensor) -> Tensor:
        if self.options.layout == "NHWC":
            input = input.movedim(-1, 1)
        if self.policy is not None:
            number = torch.zeros(input.shape[0], dtype=torch.int64, device=input.device)
            input = self.policy.batch(input, number, 0)
        found = self.views.read(self._outputs, input)
        return found.softmax(dim=1) if self.output == "probabilities" else found

    def _outputs(self, input: Tensor) -> Tensor:
        found = widened(self.network(input.half() if self.options.half else input))
        return found if self.classifies else found.flatten()
