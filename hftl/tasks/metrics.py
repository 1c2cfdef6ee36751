"""Metric accumulators: `update` per batch, `merge` across processes, `compute` once at the end.

Counts are integers and sums of losses are exact fractions, so results are independent of batch sizes, batch order and
number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hftl.errors import first_line
from hftl.tasks.targets.single_label.metrics import BUILT_IN

if TYPE_CHECKING:
    from torch import Tensor


class Metric(Protocol):
    """Accumulator of one or more named metrics."""

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds a batch without padding rows."""
        ...

    def merge(self, other: Any) -> None:
        """Adds the accumulator of another process, of the same class."""
        ...

    def compute(self) -> dict[str, float]:
        """Returns the metrics by name, without split prefix."""
        ...


class MeanLoss:
    """Mean of per-example losses, correctly rounded: the sum is exact and therefore independent of order."""

    def __init__(self) -> None:
        self.total = Fraction(0)
        self.count = 0
        self.nonfinite = 0

    def update_losses(self, losses: Tensor) -> None:
        """Adds losses [B]; non-finite losses make the mean NaN."""
        for value in losses.detach().float().cpu().tolist():
            if value - value == 0:  # neither NaN nor infinite
                self.total += Fraction(value)
            else:
                self.nonfinite += 1
            self.count += 1

    def merge(self, other: MeanLoss) -> None:
        """Adds another process's losses."""
        self.total += other.total
        self.count += other.count
        self.nonfinite += other.nonfinite

    def compute(self) -> dict[str, float]:
        """Returns `loss`; NaN without rows or with non-finite losses."""
        if self.nonfinite or not self.count:
            return {"loss": float("nan")}
        return {"loss": float(self.total / self.count)}


def all_metrics(task_metrics: Sequence[Metric], names: Sequence[str]) -> list[Metric]:
    """Returns the accumulators of a task, and one of the `evaluate` library for each name that they do not compute.

    Args:
        task_metrics: New accumulators, without data.
        names: Metrics of setting `train.metrics`.
    """
    computed = {name for metric in task_metrics for name in metric.compute()}
    return [*task_metrics, *(EvaluateMetric(name) for name in names if name not in computed)]


class EvaluateMetric:
    """Metric of the `evaluate` library, for classes or for regression with one output.

    Args:
        name: Name of a metric of the library, or path of a local script.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.predictions: list[float] = []
        self.references: list[float] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds predicted classes of logits [B, K] with labels [B], or predictions [B, 1] with labels [B, 1]."""
        labels, logits = batch["labels"], outputs["logits"]
        self.predictions += (logits.argmax(-1) if labels.ndim == 1 else logits.float().squeeze(1)).tolist()
        self.references += labels.reshape(len(labels)).tolist()

    def merge(self, other: EvaluateMetric) -> None:
        """Adds another process's predictions."""
        self.predictions += other.predictions
        self.references += other.references

    def compute(self) -> dict[str, float]:
        """Returns the numeric results of the library."""
        result = load_evaluate(self.name).compute(predictions=self.predictions, references=self.references) or {}
        return {key: float(result[key]) for key in result if np.isscalar(result[key])}


def load_evaluate(name: str) -> Any:
    """Returns the `evaluate` module `name`: one of Hugging Face or a local script.

    `evaluate` executes the script of a module. Modules without a user name are maintained by Hugging Face; `user/name`
    is third-party code on a branch that can change at any time, so it is not downloaded.

    Raises:
        ValueError: The name is a module of a user on the Hub.
        Exception: The name is unknown or the Hub cannot be reached (exceptions of the library).
    """
    import evaluate

    path = Path(name)
    if "/" in name and not path.is_file() and not (path / f"{path.name}.py").is_file():
        raise ValueError(
            f"'{name}' is third-party code on the Hub. Download and review it, and set the path of the file"
        )
    return evaluate.load(name)


def metric_problems(names: Sequence[str], computed: Sequence[str] = BUILT_IN, why_not: str = "") -> list[str]:
    """Returns one error message for each metric that neither the task nor the `evaluate` library has.

    Args:
        names: Metrics of setting `train.metrics`.
        computed: Metrics that the task computes.
        why_not: Reason, as the end of a message, why the task supports no metric of `evaluate`; empty if it does.
    """
    problems = []
    for name in names:
        if name in computed:
            continue
        fact = f"train.metrics: '{name}' is not a metric of the task ({', '.join(computed)})"
        if why_not:
            problems.append(f"{fact}, and {why_not}.")
            continue
        try:
            load_evaluate(name)
        except Exception as error:
            problems.append(f"{fact}, and evaluate.load failed: {first_line(error)}")
    return problems
