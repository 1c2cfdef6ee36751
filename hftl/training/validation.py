"""Evaluation during training, selection of the best checkpoint, and early stopping."""

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
    """Evaluates the validation split, records the metrics and updates the best checkpoint.

    Args:
        accelerator: From `create_accelerator`.
        model: The model itself, not the one prepared by Accelerate.
        task: Computes loss and metrics.
        rows: The encoded validation split; None if it does not exist, which disables evaluation.
        run: Uses `train.metric_for_best_model` and `train.early_stopping_patience`.
        best: Best checkpoint.
        recorder: Records the metrics.
        every: Steps between evaluations.
        total: Steps of the training; an evaluation always follows the last one.
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
        """Whether an evaluation follows the last step."""
        step = self.recorder.history.steps
        return self.rows is not None and (step % self.every == 0 or step == self.total)

    def __call__(self, interrupted: Callable[[], bool]) -> bool:
        """Evaluates once; returns whether training should end early.

        Args:
            interrupted: Called every few batches by all processes; returns whether to interrupt the evaluation.

        Raises:
            Interrupted: `interrupted` returned true; no metric is recorded.
        """
        assert self.rows is not None
        history, patience = self.recorder.history, self.run.train.early_stopping_patience
        metric = self.run.train.metric_for_best_model or self.task.best_metric
        self.best.share_buffers()
        metrics = evaluate_rows(self.accelerator, self.model, self.task, self.rows, self.run, interrupted=interrupted)
        values = {f"validation/{name}": value for name, value in metrics.items()}
        self.recorder.log(values, unlogged_metrics(values, self.task, metric))
        # a model with NaN outputs for some rows must not be selected for its metric on the others
        if self.best.offer(metrics[metric] if math.isfinite(metrics["loss"]) else math.nan):
            history.best = {"step": history.steps, "metric": f"validation/{metric}", "value": metrics[metric]}
        end_early = patience is not None and self.best.since >= patience
        if end_early:
            log(f"train: stopped early; {metric} has not improved in {self.best.since} evaluations")
        return end_early


def unlogged_metrics(values: Mapping[str, float], task: Task, metric: str) -> set[str]:
    """Returns the names of validation metrics that are not logged: neither `metric` nor a metric logged by the task."""
    short_names = {name: name.removeprefix("validation/") for name in values if name.startswith("validation/")}
    return {name for name, short in short_names.items() if short != metric and not is_logged(short, task)}
