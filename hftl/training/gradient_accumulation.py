"""Gradient accumulation over micro-batches and processes, with smaller micro-batches after OOM."""

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

_BUCKET_SIZE = 25 * 2**20
"""Gradient values per all-reduce: large enough for bandwidth, with little additional memory."""


@dataclass
class StepLoss:
    """Losses of a step on this process."""

    total: Tensor
    """Contribution of this process to the mean loss of the step, a scalar; the sum over processes is the mean."""
    rows: list[Tensor] = field(default_factory=list)
    """Row numbers, [B] per micro-batch."""
    losses: list[Tensor] = field(default_factory=list)
    """Losses of the rows, [B] per micro-batch."""
    problem: RowError | None = None
    """Error of an invalid row of this process; the gradient of the step is then unusable."""


class StepGradient:
    """Computes the gradient of the mean loss of a step, the same on all processes, into the parameters' `grad`.

    DDP reduces gradients during the last backward pass. A process out of memory there would leave the others waiting
    in an incomplete all-reduce. If steps can be retried after OOM, the model is therefore not wrapped in DDP, and
    gradients are reduced after all backward passes: the same sums, without overlap of computation and communication.

    Args:
        accelerator: From `create_accelerator`.
        model: On its device; receives the weights of the main process.
        task: Computes the loss per row.
        limit: Rows per micro-batch that fit into memory; shared by all steps.

    Attributes:
        net: The model as prepared by Accelerate.
    """

    def __init__(self, accelerator: Accelerator, model: TaskModel, task: Task, limit: MicroBatchLimit) -> None:
        self.accelerator = accelerator
        self.model = model
        self.task = task
        self.limit = limit
        self.reduces_after_backward = limit.enabled and accelerator.num_processes > 1
        self.net: nn.Module = accelerator.prepare_model(
            model, evaluation_mode=self.reduces_after_backward
        )  # evaluation_mode: no DDP
        if self.reduces_after_backward:
            broadcast(accelerator, trainable_state(model), trainable_state(model))
        self._saved: tuple[list[Tensor], list[Tensor]] = [], []

    def __call__(self, micro_batches: Iterator[Batch], count: int) -> StepLoss:
        """Computes the gradient and returns the losses of a step; after OOM, it retries with half the rows.

        The error of an invalid row is returned as `StepLoss.problem`, so that all processes finish the step.

        Args:
            micro_batches: Micro-batches on the host; the next `count` ones are used.
            count: Micro-batches per step.

        Raises:
            HftlError: A single row does not fit into memory.
            RowError: A row is invalid and the model is wrapped in DDP, whose all-reduce cannot complete.
        """
        self._saved = self._generators(), [buffer.clone() for buffer in self._statistics()]
        fetched: list[Batch] = []

        def fetch() -> Iterator[Batch]:
            while len(fetched) < count:
                fetched.append(next(micro_batches))
                yield fetched[-1]

        def attempt() -> StepLoss:
            return self._backward(chain(list(fetched), fetch()), count)

        try:
            step_loss = self.limit.retrying(attempt, lambda: max(len(batch["index"]) for batch in fetched), self.undo)
        except RowError as error:
            if self.accelerator.num_processes > 1 and not self.reduces_after_backward:
                raise
            step_loss = StepLoss(torch.zeros((), device=self.accelerator.device), problem=error)
        if self.reduces_after_backward:
            all_reduce_gradients(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        return step_loss

    def undo(self) -> None:
        """Undoes the step: clears gradients, restores random states and running statistics."""
        generators, statistics = self._saved
        torch.set_rng_state(generators[0])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], self.accelerator.device)
        for buffer, saved in zip(self._statistics(), statistics, strict=True):
            buffer.copy_(saved)
        self.net.zero_grad(set_to_none=True)

    def _backward(self, micro_batches: Iterable[Batch], count: int) -> StepLoss:
        from accelerate.utils import send_to_device

        device = self.accelerator.device
        # DDP averages gradients over processes, but row weights already sum to 1 over all of them
        scale = 1 if self.reduces_after_backward else self.accelerator.num_processes
        step_loss = StepLoss(torch.zeros((), device=device))
        for number, micro_batch in enumerate(micro_batches, start=1):
            pieces = list(self.limit.cut(micro_batch))
            for piece in pieces:
                is_last = number == count and piece is pieces[-1]
                with nullcontext() if is_last else self.accelerator.no_sync(self.net):
                    batch = cast(Batch, send_to_device(piece, device, non_blocking=True))
                    losses = self.task.loss(self.net(batch["inputs"]), batch)
                    loss = (losses * batch["weight"]).sum()
                    self.accelerator.backward(loss * scale)
                step_loss.total += loss.detach()
                step_loss.rows.append(piece["index"])
                step_loss.losses.append(losses.detach())
        return step_loss

    def _generators(self) -> list[Tensor]:
        """Returns the states of the random generators used by dropout."""
        device = self.accelerator.device
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    def _statistics(self) -> list[Tensor]:
        """Returns the running statistics that a forward pass updates (batch norm layers in training mode)."""
        norms = (module for module in self.model.modules() if getattr(module, "running_mean", None) is not None)
        return [buffer for module in norms if module.training for buffer in module.buffers(recurse=False)]


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums gradients over all processes in place; missing gradients count as zero."""
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
    """Yields lists of parameters of one dtype with up to `_BUCKET_SIZE` values."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > _BUCKET_SIZE or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
