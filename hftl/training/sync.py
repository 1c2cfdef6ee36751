"""Exchange of step results between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def all_reduce_sum(accelerator: Accelerator, loss: Tensor, *flags: bool) -> list[float]:
    """Returns the sums over all processes of a scalar loss and of flags, in one exchange."""
    if accelerator.num_processes == 1:
        return [float(loss), *map(float, flags)]
    numbers = torch.tensor(flags, dtype=torch.float32).to(loss.device, non_blocking=True)
    local = torch.cat([loss.float().reshape(1), numbers])
    return cast(Tensor, accelerator.reduce(local, "sum")).tolist()
