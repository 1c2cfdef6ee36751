"""Optimizer step that skips or rejects non-finite losses and gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from hftl.config.schema import TrainConfig
from hftl.errors import NonfiniteError, shorten
from hftl.training.checkpointer import Checkpointer, Training
from hftl.training.gradient_accumulation import StepGradient, StepLoss

if TYPE_CHECKING:
    from accelerate import Accelerator


class OptimizerStep:
    """Updates the weights with a finite gradient; handles a non-finite one as `train.on_nonfinite` says.

    Args:
        accelerator: From `create_accelerator`.
        optimizer: Holds the trainable parameters.
        gradient: Undoes the forward passes of a skipped step.
        checkpointer: Saves the state before a step that ends the run.
        training: The state to save; its history counts skipped steps.
        config: Uses `on_nonfinite` and `max_nonfinite_steps`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Optimizer,
        gradient: StepGradient,
        checkpointer: Checkpointer,
        training: Training,
        config: TrainConfig,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.gradient = gradient
        self.checkpointer = checkpointer
        self.training = training
        self.config = config

    def __call__(self, local: StepLoss, loss: float, grad_norm: float, rates: dict[str, float]) -> bool:
        """Applies the gradient, or skips the step on all processes.

        Args:
            local: Losses of this process.
            loss: Mean loss of the step over all processes.
            grad_norm: Norm of the gradient before clipping.
            rates: Learning rate by parameter group.

        Returns:
            Whether loss and gradient norm are finite.

        Raises:
            NonfiniteError: They are not, and `train.on_nonfinite` is stop or `train.max_nonfinite_steps` is reached.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite or _scaler_backs_off(self.accelerator, loss):
            self.optimizer.step()  # with a non-finite gradient, the scaler only lowers the loss scale
            self.optimizer.zero_grad()
            return finite
        self.gradient.undo()
        history = self.training.recorder.history
        if self.config.on_nonfinite == "stop" or history.skipped >= self.config.max_nonfinite_steps:
            saved = self.checkpointer.save_if_finite(self.training)
            raise _nonfinite_error(self.accelerator, local, loss, grad_norm, history.steps + 1, rates, saved)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it has inspected this gradient and must be reset
        history.skipped += 1
        return False


def _scaler_backs_off(accelerator: Accelerator, loss: float) -> bool:
    """Whether a non-finite gradient may be an fp16 overflow, which a smaller loss scale avoids.

    A scale below 1 shrinks gradients, so they no longer overflow because of the scale.
    """
    return accelerator.scaler is not None and math.isfinite(loss) and accelerator.scaler.get_scale() >= 1


def _nonfinite_error(
    accelerator: Accelerator,
    local: StepLoss,
    loss: float,
    grad_norm: float,
    step: int,
    rates: dict[str, float],
    saved: bool,
) -> NonfiniteError:
    """Returns the error of a step, the same on all processes, with learning rates and row numbers.

    It names the rows whose own loss is not finite, or all rows of the step if every loss is finite.
    """
    from accelerate.utils import gather_object

    row_losses = [
        (row, value)
        for rows, losses in zip(local.rows, local.losses, strict=True)
        for row, value in zip(rows.tolist(), losses.tolist(), strict=True)
    ]
    row_losses = gather_object(row_losses) if accelerator.num_processes > 1 else row_losses
    nonfinite = sorted({row for row, value in row_losses if not math.isfinite(value)})
    rows = nonfinite or sorted({row for row, _ in row_losses})
    cause = "non-finite loss in" if nonfinite else "finite losses but non-finite gradient in"
    rates_text = ", ".join(f"{group} {rate:.3g}" for group, rate in rates.items())
    saved_text = (
        "The weights before this step are saved."
        if saved
        else "The weights were already non-finite; the last checkpoint is valid."
    )
    return NonfiniteError(
        f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g} (lr: {rates_text}); {cause} training row(s) "
        f"{shorten([str(row) for row in rows], 32)}. {saved_text} Check these rows, restart with a lower train.lr, or "
        "resume with --resume auto --train.on_nonfinite skip."
    )
