"""Metrics of single-label classification, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.statistics.confidence_intervals import wilson

if TYPE_CHECKING:
    from torch import Tensor


BUILT_IN = (
    "accuracy",
    "macro_f1",
    "micro_f1",
    "weighted_f1",
    "macro_precision",
    "micro_precision",
    "weighted_precision",
    "macro_recall",
    "micro_recall",
    "weighted_recall",
    "mcc",
)


class ClassificationMetrics:
    """Accuracy, F1, precision, recall and MCC from one confusion matrix [K, K] of integers (rows: true class).

    Ratios follow scikit-learn's `zero_division=0`: a class without true or without predicted rows scores 0. Macro
    averages skip a class that has neither.
    """

    row_fractions = BUILT_IN[:-1]  # MCC is a correlation
    """Metrics with the standard error of a fraction of rows, at least approximately; see `BestMetric`."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K] and labels [B]."""
        predictions = outputs["logits"].argmax(-1).cpu().numpy()
        np.add.at(self.confusion, (batch["labels"].cpu().numpy(), predictions), 1)

    def merge(self, other: ClassificationMetrics) -> None:
        """Adds the counts of another process."""
        self.confusion += other.confusion

    def compute(self) -> dict[str, float]:
        """Returns the metrics of `BUILT_IN`, in [0, 1]; `mcc` in [-1, 1]."""
        confusion = self.confusion
        return class_scores(confusion.diagonal(), confusion.sum(1), confusion.sum(0))


def class_scores(correct: Any, true: Any, predicted: Any) -> dict[str, float]:
    """Returns the metrics of `BUILT_IN` from the counts of each class.

    Args:
        correct: Rows of the class that are predicted as the class [K].
        true: Rows of the class [K].
        predicted: Rows predicted as the class [K].
    """
    occurs = (true + predicted) > 0
    total = max(int(true.sum()), 1)
    accuracy = float(correct.sum() / total)
    scores = {"accuracy": accuracy}
    per_class = {
        "f1": _ratio(2 * correct, true + predicted),
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, true),
    }
    for name, values in per_class.items():
        scores[f"macro_{name}"] = float(values[occurs].mean()) if occurs.any() else 0.0
        # micro-averaged F1, precision and recall of single-label rows equal the accuracy
        scores[f"micro_{name}"] = accuracy
        scores[f"weighted_{name}"] = float((values * true).sum() / total)
    return scores | {"mcc": _mcc(correct, true, predicted)}


def _mcc(correct: Any, true: Any, predicted: Any) -> float:
    """Returns the Matthews correlation coefficient; 0 if all true or all predicted classes are equal.

    Source: Gorodkin 2004 (several classes), https://doi.org/10.1016/j.compbiolchem.2004.09.006.
    """
    total = float(true.sum())
    scale = (total**2 - float((true * true).sum())) * (total**2 - float((predicted * predicted).sum()))
    return float((correct.sum() * total - (true * predicted).sum()) / scale**0.5) if scale > 0 else 0.0


def _ratio(numerator: Any, denominator: Any) -> Any:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


PROPORTIONS = ("accuracy", "micro_f1", "micro_precision", "micro_recall", "weighted_recall")
"""Metrics that equal the fraction of correct rows in single-label classification."""


def metric_intervals(
    labels: Any, predictions: Any, num_classes: int, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns the confidence interval of each metric of `ClassificationMetrics`, by name; {} without rows.

    Proportions get the Wilson interval, the others the percentile bootstrap over rows (Efron & Tibshirani 1993,
    chapter 13). A metric depends on rows only through the confusion matrix. So one multinomial draw over its cells
    resamples N rows with replacement, and the cost does not grow with N. If every row is correct, all resamples are
    equal and a bootstrap interval is the point 1, which carries no information about further rows.

    Args:
        labels: True classes [N], integers 0..num_classes-1.
        predictions: Predicted classes [N].
        num_classes: K.
        confidence: Coverage, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """
    confusion = confusion_matrix(labels, predictions, num_classes)
    return confusion_intervals(confusion, confidence, resamples, seed)


def confusion_matrix(labels: Any, predictions: Any, num_classes: int) -> Any:
    """Returns the number of rows per true and predicted class [K, K] int64 (rows: true class)."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return confusion


def confusion_intervals(
    confusion: Any, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns the intervals of `metric_intervals` from a confusion matrix [K, K] (rows: true class)."""
    confusion = np.asarray(confusion, dtype=np.int64)
    rows = int(confusion.sum())
    if not rows:
        return {}
    cells = np.nonzero(confusion)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(resamples):  # one resample at a time limits memory: many classes have many cells
        counts = rng.multinomial(rows, confusion[cells] / rows)
        on_diagonal = counts * (cells[0] == cells[1])
        sums = ((cells[0], on_diagonal), (cells[0], counts), (cells[1], counts))
        resampled.append(class_scores(*(np.bincount(classes, weights, len(confusion)) for classes, weights in sums)))
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name in resampled[0]:
        low, high = np.quantile([scores[name] for scores in resampled], quantiles)
        intervals[name] = (float(low), float(high))
    of_accuracy = wilson(int(confusion.trace()), rows, confidence)
    return {name: of_accuracy if name in PROPORTIONS else interval for name, interval in intervals.items()}
