"""What all processes must know together before the weights change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import Tensor

from hftl.errors import NonfiniteError, shorten
from hftl.training.gradient_accumulation import StepLoss

if TYPE_CHECKING:
    from accelerate import Accelerator


def all_reduce_sum(accelerator: Accelerator, loss: Tensor, *asked: bool) -> list[float]:
    """Returns the sums over all processes of a scalar loss and of yes/no questions, in one exchange."""
    if accelerator.num_processes == 1:
        return [float(loss), *map(float, asked)]
    flags = torch.tensor(asked, dtype=torch.float32).to(loss.device, non_blocking=True)
    mine = torch.cat([loss.float().reshape(1), flags])
    return cast(Tensor, accelerator.reduce(mine, "sum")).tolist()


def scaler_backs_off(accelerator: Accelerator, loss: float) -> bool:
    """Whether a gradient that is not finite is one that fp16 could not hold, which a smaller loss scale mends.

    A scale below 1 makes gradients smaller than they are: by then it is not the format that is to blame.
    """
    return accelerator.scaler is not None and math.isfinite(loss) and accelerator.scaler.get_scale() >= 1


def raise_if_nonfinite(
    accelerator: Accelerator, done: StepLoss, loss: float, norm: float, step: int, rates: dict[str, float], saved: bool
) -> NoReturn:
    """Raises NonfiniteError on all processes, with step, learning rates and the rows of the step.

    Rows whose own loss is not finite are named where there are any, else all of the step.
    """
    from accelerate.utils import gather_object

    pairs = [
        (row, value)
        for rows, losses in zip(done.rows, done.losses, strict=True)
        for row, value in zip(rows.tolist(), losses.tolist(), strict=True)
    ]
    pairs = gather_object(pairs) if accelerator.num_processes > 1 else pairs
    bad = sorted({row for row, value in pairs if value - value != 0})
    rows = bad or sorted({row for row, _ in pairs})
    of = "the loss of training row(s)" if bad else "every row's loss is finite, the gradient is not; training rows"
    lr = ", ".join(f"{part} {rate:.3g}" for part, rate in rates.items())
    kept = (
        "weights before this step are saved"
        if saved
        else "weights were damaged already; the last state is the good one"
    )
    raise NonfiniteError(
        f"step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g} (lr: {lr}); {of} "
        f"{shorten([str(row) for row in rows], 32)}. The {kept}. Look at these rows, start "
        "again with a lower train.lr, or go on with --resume auto --train.on_nonfinite skip."
    )
