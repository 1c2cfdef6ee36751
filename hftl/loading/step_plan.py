"""Step plan: number of steps, rows per step and evaluation interval of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hftl.config.schema import RunConfig
from hftl.loading.loader import Share, steps_per_epoch
from hftl.logging import log

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepPlan:
    """Step plan of a run.

    Attributes:
        share: Distribution of the rows of a step.
        epoch_steps: Steps per epoch.
        total: Number of steps of the run.
        eval_steps: Steps between evaluations.
    """

    share: Share
    epoch_steps: int
    total: int
    eval_steps: int


def make_step_plan(accelerator: Accelerator, run: RunConfig, rows: int, earlier: dict[str, Any] | None) -> StepPlan:
    """Returns and logs the step plan.

    A resumed run keeps the rows of each step; on fewer processes, it uses more micro-batches.

    Args:
        accelerator: Accelerator of the run.
        run: Run configuration.
        rows: Number of training rows.
        earlier: Checkpoint metadata of a resumed run, else None.
    """
    config, world = run.train, accelerator.num_processes
    batch, accumulation = config.batch_size_per_device, config.gradient_accumulation_steps
    step_rows = earlier["effective_batch"] if earlier else batch * accumulation * world
    share = Share(accelerator.process_index, world, batch, -(-step_rows // (batch * world)), step_rows)
    epoch_steps = steps_per_epoch(rows, share)
    total = config.max_steps or math.ceil(epoch_steps * (config.num_epochs or 1))
    eval_steps = config.eval_steps or epoch_steps
    log(
        f"train: {total} steps, {epoch_steps} per epoch; batch {step_rows} ({batch} per device x {world} process(es) x "
        f"{share.accumulation} accumulation); evaluation every {eval_steps}"
    )
    return StepPlan(share, epoch_steps, total, eval_steps)
