"""Metrics as accumulators: `update` with a batch, `merge` with another process's, `compute` once at the end.

Counts are integers and losses are added as fractions, so a result does not depend on batch sizes,
on their order or on the number of processes.
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
    """One accumulator; it may compute several named numbers."""

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds a batch. All its rows count: filler rows are gone already."""
        ...

    def merge(self, other: Any) -> None:
        """Adds what another accumulator of the same kind has seen."""
        ...

    def compute(self) -> dict[str, float]:
        """Returns the numbers by name, without split prefix."""
        ...


class MeanLoss:
    """Mean of per-example losses, correctly rounded: the sum is exact, so its order cannot matter."""

    def __init__(self) -> None:
        self.total = Fraction(0)
        self.count = 0
        self.nonfinite = 0

    def update_losses(self, losses: Tensor) -> None:
        """Adds losses [B]; ones that are not finite make the mean NaN."""
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
        """Returns `loss`; NaN where there were no rows or a loss was not finite."""
        if self.nonfinite or not self.count:
            return {"loss": float("nan")}
        return {"loss": float(self.total / self.count)}


def all_metrics(own: Sequence[Metric], named: Sequence[str]) -> list[Metric]:
    """Returns a task's own accumulators, and one of `evaluate` for each name that they do not compute themselves.

    Args:
        own: Fresh ones.
        named: As `train.metrics`.
    """
    computed = {name for metric in own for name in metric.compute()}
    return [*own, *(EvaluateMetric(name) for name in named if name not in computed)]


class EvaluateMetric:
    """Any metric of the `evaluate` library, by hub id or local script, on classes, or on the numbers of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.predictions: list[float] = []
        self.references: list[float] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the argmax of logits [B, K] and labels [B]; with labels [B, 1] of numbers the outputs [B, 1]."""
        labels, logits = batch["labels"], outputs["logits"]
        self.predictions += (logits.argmax(-1) if labels.ndim == 1 else logits.float().squeeze(1)).tolist()
        self.references += labels.reshape(len(labels)).tolist()

    def merge(self, other: EvaluateMetric) -> None:
        """Adds another process's predictions."""
        self.predictions += other.predictions
        self.references += other.references

    def compute(self) -> dict[str, float]:
        """Returns what the library computes, numbers only."""
        result = load_evaluate(self.name).compute(predictions=self.predictions, references=self.references) or {}
        return {key: float(result[key]) for key in result if np.isscalar(result[key])}


def load_evaluate(name: str) -> Any:
    """Returns the `evaluate` module `name`: one of the library's own, or a script on this machine.

    A module is a script that is run. Those without an owner are Hugging Face's; `user/name` is anybody's code, at a
    branch that its owner can change, so it is not fetched.

    Raises:
        ValueError: The name is a script of somebody on the hub.
        Exception: Whatever the library raises when the name is unknown or the hub cannot be reached.
    """
    import evaluate

    path = Path(name)
    if "/" in name and not path.is_file() and not (path / f"{path.name}.py").is_file():
        raise ValueError(f"'{name}' is code of somebody on the hub; download it, read it, and name the file here")
    return evaluate.load(name)


def metric_problems(names: Sequence[str], computed: Sequence[str] = BUILT_IN, why_not: str = "") -> list[str]:
    """Returns a sentence for each metric that neither the task nor `evaluate` has.

    Args:
        names: As `train.metrics`.
        computed: What the task computes itself.
        why_not: Why no metric of `evaluate` fits the task, as the end of a sentence; empty where they fit.
    """
    problems = []
    for name in names:
        if name in computed:
            continue
        if why_not:
            problems.append(f"train.metrics: '{name}' is not built in ({', '.join(computed)}), and {why_not}.")
            continue
        try:
            load_evaluate(name)
        except Exception as error:
            reason = first_line(error)
            problems.append(
                f"train.metrics: '{name}' is not built in ({', '.join(computed)}) and evaluate.load fails: {reason}"
            )
    return problems
