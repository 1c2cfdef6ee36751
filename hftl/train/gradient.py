"""The gradient of one step, from micro-batches on several processes, in as many pieces as memory demands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hftl.models.memory import RowLimit
from hftl.tasks.task import Batch, Task

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


class StepGradient:
    """Leaves the gradient of a step's mean loss in the parameters of `net`, the same on all processes.

    Args:
        accelerator: From `start`.
        net: The prepared model.
        task: Says the loss of each row.
        limit: How many rows fit into memory; shared by all steps.
    """

    def __init__(self, accelerator: Accelerator, net: nn.Module, task: Task, limit: RowLimit) -> None:
        from accelerate.utils import DistributedType

        self.accelerator = accelerator
        self.net = net
        self.task = task
        self.limit = limit
        # A process that tries again must not leave others waiting in a half-done exchange: gradients are exchanged when
        # all backward passes are through. Engines that shard parameters do it themselves, on the way.
        engine = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        alone = accelerator.num_processes == 1
        self.late = not alone and limit.enabled and accelerator.distributed_type not in engine
        limit.enabled = limit.enabled and (alone or self.late)
        self.before: list[Tensor] = []

    def __call__(self, micro_batches: list[Batch]) -> StepLoss:
        """Returns the losses of a step. Out of memory, it begins the step again in pieces of half the rows.

        Raises:
            HftlError: Not even one row fits.
        """
        self.before = _random_state(self.accelerator.device)

        def attempt() -> StepLoss:
            self.undo()
            pieces = [piece for batch in micro_batches for piece in self.limit.cut(batch)]
            return self._backward(pieces)

        done = self.limit.retrying(attempt, max(len(batch["index"]) for batch in micro_batches))
        if self.late:
            sum_over_processes(parameter for parameter in self.net.parameters() if parameter.requires_grad)
        return done

    def undo(self) -> None:
        """Drops the gradient, and lets the next random numbers be those of the step that began last."""
        _set_random_state(self.accelerator.device, self.before)
        self.net.zero_grad(set_to_none=True)

    def _backward(self, pieces: list[Batch]) -> StepLoss:
        from accelerate.utils import send_to_device

        device = self.accelerator.device
        # DDP averages over processes where it exchanges gradients; row weights add up to 1 over all of them
        scale = 1 if self.late else self.accelerator.num_processes
        done = StepLoss(torch.zeros((), device=device))
        for piece in pieces:
            exchanges = piece is pieces[-1] and not self.late
            with nullcontext() if exchanges else self.accelerator.no_sync(self.net):
                batch = cast(Batch, send_to_device(piece, device, non_blocking=True))
                losses = self.task.loss(self.net(batch["inputs"]), batch)
                loss = (losses * batch["weight"]).sum()
                self.accelerator.backward(loss * scale)
            done.total += loss.detach()
            done.rows.append(piece["index"])
            done.losses.append(losses.detach())
        return done


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


def _random_state(device: torch.device) -> list[Tensor]:
    """Returns the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
