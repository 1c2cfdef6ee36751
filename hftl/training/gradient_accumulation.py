"""The gradient of one step, from micro-batches on several processes, in as many pieces as memory demands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from hftl.errors import RowError
from hftl.models.oom_retry import MicroBatchLimit
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Batch, Task
from hftl.training.training_state import broadcast, trainable_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_BUCKET = 25 * 2**20
"""Gradient values that are exchanged at once: large enough for bandwidth, small enough beside the gradients."""


@dataclass
class StepLoss:
    """What the forward passes of a step gave on this process."""

    total: Tensor
    """This process's part of the step's mean loss, a scalar; all parts add up to the mean."""
    rows: list[Tensor] = field(default_factory=list)
    """Row numbers, [B] for each piece."""
    losses: list[Tensor] = field(default_factory=list)
    """Their losses, [B] for each piece."""
    problem: RowError | None = None
    """A row of this process that cannot be used; then the gradient of the step means nothing."""


class StepGradient:
    """Leaves the gradient of a step's mean loss in the parameters of a model, the same on all processes.

    DDP exchanges gradients during the last backward pass. A process that is out of memory there would leave the others
    waiting in a half-done exchange, so where steps can be tried again there is no DDP, and gradients are exchanged
    when all backward passes are through: exactly the same sums, without the overlap of computing and sending.

    Args:
        accelerator: From `start`.
        model: On its device; its weights become those of the main process.
        task: Says the loss of each row.
        limit: How many rows fit into memory; shared by all steps.

    Attributes:
        net: The model as Accelerate prepared it.
    """

    def __init__(self, accelerator: Accelerator, model: TaskModel, task: Task, limit: MicroBatchLimit) -> None:
        self.accelerator = accelerator
        self.model = model
        self.task = task
        self.limit = limit
        self.late = limit.enabled and accelerator.num_processes > 1
        self.net: nn.Module = accelerator.prepare_model(model, evaluation_mode=self.late)  # "evaluation": without DDP
        if self.late:
            broadcast(accelerator, trainable_state(model), trainable_state(model))
        self._before: tuple[list[Tensor], list[Tensor]] = [], []

    def __call__(self, micro_batches: Iterator[Batch], count: int) -> StepLoss:
        """Returns the losses of a step. Out of memory, it begins the step again in pieces of half the rows.

        A row that cannot be used becomes the `problem` of the step, so that all processes reach its end.

        Args:
            micro_batches: The next `count` ones are taken, on the host.
            count: Micro-batches of a step.

        Raises:
            HftlError: Not even one row fits.
            RowError: A row cannot be used, under DDP, whose exchange this process has to leave unfinished.
        """
        self._before = self._generators(), [buffer.clone() for buffer in self._statistics()]
        taken: list[Batch] = []

        def fresh() -> Iterator[Batch]:
            while len(taken) < count:
                taken.append(next(micro_batches))
                yield taken[-1]

        def attempt() -> StepLoss:
            return self._backward(chain(list(taken), fresh()), count)

        try:
            done = self.limit.retrying(attempt, lambda: max(len(batch["index"]) for batch in taken), self.undo)
        except RowError as error:
            if self.accelerator.num_processes > 1 and not self.late:
                raise
            done = StepLoss(torch.zeros((), device=self.accelerator.device), problem=error)
        if self.late:
            sum_over_processes(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        return done

    def undo(self) -> None:
        """Makes as if the step had not begun: no gradient, the random numbers and running statistics of before."""
        generators, statistics = self._before
        torch.set_rng_state(generators[0])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], self.accelerator.device)
        for buffer, before in zip(self._statistics(), statistics, strict=True):
            buffer.copy_(before)
        self.net.zero_grad(set_to_none=True)

    def _backward(self, micro_batches: Iterable[Batch], count: int) -> StepLoss:
        from accelerate.utils import send_to_device

        device = self.accelerator.device
        # DDP averages over processes where it exchanges gradients; row weights add up to 1 over all of them
        scale = 1 if self.late else self.accelerator.num_processes
        done = StepLoss(torch.zeros((), device=device))
        for number, micro_batch in enumerate(micro_batches, start=1):
            pieces = list(self.limit.cut(micro_batch))
            for piece in pieces:
                exchanges = number == count and piece is pieces[-1]
                with nullcontext() if exchanges else self.accelerator.no_sync(self.net):
                    batch = cast(Batch, send_to_device(piece, device, non_blocking=True))
                    losses = self.task.loss(self.net(batch["inputs"]), batch)
                    loss = (losses * batch["weight"]).sum()
                    self.accelerator.backward(loss * scale)
                done.total += loss.detach()
                done.rows.append(piece["index"])
                done.losses.append(losses.detach())
        return done

    def _generators(self) -> list[Tensor]:
        """Returns the states of the generators that dropout draws from."""
        device = self.accelerator.device
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    def _statistics(self) -> list[Tensor]:
        """Returns the running statistics that a forward pass changes (batch norms in training mode)."""
        counting = (module for module in self.model.modules() if getattr(module, "running_mean", None) is not None)
        return [buffer for module in counting if module.training for buffer in module.buffers(recurse=False)]


def sum_over_processes(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up gradients over all processes, in place; where a process has none it adds zeros."""
    for bucket in _buckets(parameters):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [cast(Tensor, parameter.grad) for parameter in bucket]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view(grad.shape))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields parameters of one dtype together, up to `_BUCKET` values."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > _BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
