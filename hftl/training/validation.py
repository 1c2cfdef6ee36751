"""Evaluations in the middle of training, and what they decide: which weights are kept, and whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hftl.config.schema import RunConfig
from hftl.evaluation.evaluate import evaluate_rows
from hftl.loading.loader import Examples
from hftl.logging import log
from hftl.models.task_model import TaskModel
from hftl.run_folder.history import Recorder
from hftl.tasks.task import Task, is_logged
from hftl.training.best_checkpoint import BestCheckpoint

if TYPE_CHECKING:
    from accelerate import Accelerator


class Validation:
    """Evaluates the validation split, records the metrics, and keeps the weights where they are the best so far.

    Args:
        accelerator: From `start`.
        model: The model itself, not the one that Accelerate prepared.
        task: Says loss and metrics.
        rows: The encoded validation split, or None where there is none: then nothing is ever due.
        run: Uses `train.metric_for_best_model`, `train.eval_steps` and `train.early_stopping_patience`.
        best: Keeps the weights.
        recorder: Takes the metrics.
        every: Steps between evaluations.
        total: Steps of the whole training; the last one is always followed by an evaluation.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: TaskModel,
        task: Task,
        rows: Examples | None,
        run: RunConfig,
        best: BestCheckpoint,
        recorder: Recorder,
        every: int,
        total: int,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.task = task
        self.rows = rows
        self.run = run
        self.best = best
        self.recorder = recorder
        self.every = every
        self.total = total

    @property
    def due(self) -> bool:
        """Whether the step that was done last is to be followed by an evaluation."""
        step = self.recorder.history.steps
        return self.rows is not None and (step % self.every == 0 or step == self.total)

    def __call__(self, interrupted: Callable[[], bool]) -> bool:
        """Evaluates once; returns whether training should end early.

        Args:
            interrupted: Asked now and then by all processes together: whether to break off.

        Raises:
            Interrupted: It said so; nothing has been recorded.
        """
        assert self.rows is not None
        history, patience = self.recorder.history, self.run.train.early_stopping_patience
        metric = self.run.train.metric_for_best_model or self.task.best_metric
        self.best.share_buffers()
        found = evaluate_rows(self.accelerator, self.model, self.task, self.rows, self.run, interrupted=interrupted)
        values = {f"validation/{name}": value for name, value in found.items()}
        self.recorder.log(values, unlogged_metrics(values, self.task, metric))
        # a model that computes NaN for some rows may be right about the others, and is not to be kept for that
        if self.best.offer(found[metric] if math.isfinite(found["loss"]) else math.nan):
            history.best = {"step": history.steps, "metric": f"validation/{metric}", "value": found[metric]}
        over = patience is not None and self.best.since >= patience
        if over:
            log(f"fit: stopped, no better {metric} in {self.best.since} evaluations")
        return over


def unlogged_metrics(values: Mapping[str, float], task: Task, metric: str) -> set[str]:
    """Returns the names of validation's metrics that no line says: neither `metric` nor one that the task shows."""
    named = {name: name.removeprefix("validation/") for name in values if name.startswith("validation/")}
    return {name for name, of in named.items() if of != metric and not is_logged(of, task)}
