"""What happens when in a training, known before its first step."""

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
    """What happens when; everything is counted in steps."""

    share: Share
    epoch_steps: int
    total: int
    eval_steps: int


def make_step_plan(accelerator: Accelerator, run: RunConfig, rows: int, earlier: dict[str, Any] | None) -> StepPlan:
    """Returns the plan of a training, and says it.

    A training that goes on keeps the rows of each step. On fewer processes they make more micro-batches.
    """
    config, world = run.train, accelerator.num_processes
    batch, accumulation = config.batch_size_per_device, config.gradient_accumulation_steps
    step_rows = earlier["effective_batch"] if earlier else batch * accumulation * world
    share = Share(accelerator.process_index, world, batch, -(-step_rows // (batch * world)), step_rows)
    epoch_steps = steps_per_epoch(rows, share)
    total = config.max_steps or math.ceil(epoch_steps * (config.num_epochs or 1))
    eval_steps = config.eval_steps or epoch_steps
    log(
        f"fit: {total} steps of {step_rows} rows at most ({batch} x {world} process(es) x {share.accumulation}), "
        f"{epoch_steps} an epoch; evaluation every {eval_steps}"
    )
    return StepPlan(share, epoch_steps, total, eval_steps)
