"""A step that is taken back on the device, where its gradient was not finite; nothing waits to find out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def largest_gradient(parameters: Iterable[Tensor]) -> Tensor | None:
    """The largest absolute value of all gradients, () float32 or wider; not finite where one of them is not.

    None where there is no gradient. Nothing waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    dtype = reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    norms = torch._foreach_norm(gradients, math.inf, dtype)
    return torch.linalg.vector_norm(torch.stack(norms), math.inf)


class Copies:
    """Tensors as they were, to be put back where a flag on the device says so. The memory is kept from time to time."""

    def __init__(self) -> None:
        self.taken: dict[Any, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[Any, Tensor]) -> None:
        """Copy them as they are now, in place of what was copied before."""
        before, self.taken = self.taken, {}
        for key, tensor in tensors.items():
            copy = before.get(key)
            fits = copy is not None and (copy.shape, copy.dtype, copy.device) == (
                tensor.shape, tensor.dtype, tensor.device,
            )  # fmt: skip
            self.taken[key] = copy if fits and copy is not None else torch.empty_like(tensor)
        for group in _by_kind((self.taken[key], tensor) for key, tensor in tensors.items()):
            torch._foreach_copy_([copy for copy, _ in group], [tensor for _, tensor in group])

    @torch.no_grad()
    def put_back(self, tensors: Mapping[Any, Tensor], finite: Tensor) -> None:
        """Give the tensors their copied bits where `finite` (bool, ()) is false; where it is true they stay.

        Tensors on another device than the flag stay too: to ask it from there is to wait.
        """
        pairs = [(tensors[key], copy) for key, copy in self.taken.items() if key in tensors]
        for group in _by_kind((new, old) for new, old in pairs if new.device == finite.device):
            # old + (new - old) * flag, of the bits as whole numbers: exact, and zero times NaN would be NaN
            bits = _BITS[group[0][0].element_size()]
            new = [tensor.view(bits) for tensor, _ in group]
            old = [copy.view(bits) for _, copy in group]
            torch._foreach_sub_(new, old)
            torch._foreach_mul_(new, finite.to(bits))
            torch._foreach_add_(new, old)


class UndoneSteps:
    """Takes an optimizer's steps back where their gradient was not finite: weights, moments, and what hangs on them.

    The memory of all that is needed twice. Counters of an optimizer that are Python numbers, or lie on another device,
    go on. Of a step that makes moments, the first one mostly, the host asks whether it stands.

    Args:
        optimizer: before its first step, and before anything else hangs on its steps.
        buffers: the network's, by name.
        others: further tensors that hang on the steps (averages, say), those that there are at the time, and
            always the same ones.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffers: Callable[[], Mapping[str, Tensor]],
        others: Callable[[], Sequence[Tensor]],
    ) -> None:
        self.optimizer = optimizer
        self.at_the_start = Copies()  # buffers, as they were before the first forward of the step
        self._buffers, self._others = buffers, others
        self._step, self._after = Copies(), Copies()
        self._known: list[
            Tensor
        ] = []  # the others that are copied, held so that no new one gets the number of an old
        self._finite: Tensor | None = None
        optimizer.register_step_post_hook(self._undo)

    def hang_last(self) -> None:
        """Take back too what those did that hang on the steps by now."""
        self.optimizer.register_step_post_hook(self._undo_others)

    def begin(self) -> None:
        """Before the first forward of a step."""
        self.at_the_start.take(self._buffers())

    def decide(self, finite: Tensor) -> None:
        """After the last backward, before the optimizer moves anything.

        Args:
            finite: bool, (); whether the step is to stand.
        """
        self._finite = finite
        self._step.take(self._moved())
        self._known = list(self._others())
        self._after.take({id(tensor): tensor for tensor in self._known})

    def end(self) -> None:
        """After the step, which a loss scaler may have left out: then no hook was called."""
        if self._finite is not None:
            self.at_the_start.put_back(self._buffers(), self._finite)
            self._finite = None

    def _moved(self) -> dict[Any, Tensor]:
        """Parameters and moments."""
        moved: dict[Any, Tensor] = {}
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            moved[id(parameter)] = parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    moved[id(parameter), name] = value
        return moved

    def _undo(self, *_: Any) -> None:
        if self._finite is None:
            return
        moved, known = self._moved(), self._step.taken
        if moved.keys() - known.keys() and not bool(self._finite):
            old = {key[0] for key in known if isinstance(key, tuple)}
            for parameter in [p for p in self.optimizer.state if id(p) not in old]:
                del self.optimizer.state[parameter]
        self._step.put_back(moved, self._finite)
        # before an average takes them
        self.at_the_start.put_back(self._buffers(), self._finite)

    def _undo_others(self, *_: Any) -> None:
        if self._finite is not None:
            # under a loss scaler some of them begin after the decision, of the weights as they were
            self._after.put_back({id(tensor): tensor for tensor in self._others()}, self._finite)


def _by_kind(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Pairs by dtype and device: what one kernel for many tensors takes."""
    groups: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair in pairs:
        groups[pair[0].dtype, pair[0].device].append(pair)
    return list(groups.values())
