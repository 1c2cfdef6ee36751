"""Metrics of single-label classification and their confidence intervals."""

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

    As scikit-learn's `zero_division=0`: a class without true or predicted rows scores 0, and a class
    with neither is left out of macro averages.
    """

    row_fractions = BUILT_IN[:-1]  # a correlation is none
    """Numbers whose standard error is that of a share of the rows, exactly or nearly; see `BestMetric`."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K] against labels [B]."""
        predicted = outputs["logits"].argmax(-1).cpu().numpy()
        np.add.at(self.confusion, (batch["labels"].cpu().numpy(), predicted), 1)

    def merge(self, other: ClassificationMetrics) -> None:
        """Adds another process's counts."""
        self.confusion += other.confusion

    def compute(self) -> dict[str, float]:
        """Returns the metrics named in `BUILT_IN`, each in [0, 1]; `mcc` in [-1, 1]."""
        confusion = self.confusion
        return class_scores(confusion.diagonal(), confusion.sum(1), confusion.sum(0))


def class_scores(right: Any, true: Any, predicted: Any) -> dict[str, float]:
    """Returns the metrics named in `BUILT_IN` from the counts of each class.

    Args:
        right: Rows of the class that were predicted as such [K].
        true: Rows of the class [K].
        predicted: Rows predicted as the class [K].
    """
    seen = (true + predicted) > 0
    total = max(int(true.sum()), 1)
    accuracy = float(right.sum() / total)
    out = {"accuracy": accuracy}
    scores = {
        "f1": _ratio(2 * right, true + predicted),
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, true),
    }
    for name, score in scores.items():
        out[f"macro_{name}"] = float(score[seen].mean()) if seen.any() else 0.0
        # with one label a row, micro averages of all three are the accuracy
        out[f"micro_{name}"] = accuracy
        out[f"weighted_{name}"] = float((score * true).sum() / total)
    return out | {"mcc": _mcc(right, true, predicted)}


def _mcc(right: Any, true: Any, predicted: Any) -> float:
    """Returns Matthews' correlation of true and predicted classes; 0 where all rows are of one class on either side.

    For several classes: Gorodkin 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006.
    """
    total = float(true.sum())
    scale = (total**2 - float((true * true).sum())) * (total**2 - float((predicted * predicted).sum()))
    return float((right.sum() * total - (true * predicted).sum()) / scale**0.5) if scale > 0 else 0.0


def _ratio(above: Any, below: Any) -> Any:
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


PROPORTIONS = ("accuracy", "micro_f1", "micro_precision", "micro_recall", "weighted_recall")
"""Metrics that, with one label a row, are the share of rows that are right."""


def metric_intervals(
    labels: Any, predictions: Any, num_classes: int, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns an interval for each metric of `ClassificationMetrics`, by its name; {} without rows.

    Proportions get the Wilson interval, the others the percentile bootstrap over rows (Efron & Tibshirani 1993,
    chapter 13). Rows enter a metric through the confusion matrix alone, so drawing N rows with replacement is one
    multinomial draw over its cells, and the cost does not grow with N. Where every row is right all resamples are
    equal too, and a bootstrap interval is the point 1: it then says nothing about rows unseen.

    Args:
        labels: True classes [N], integers 0..num_classes-1.
        predictions: Predicted classes [N].
        num_classes: K.
        confidence: Coverage, in (0, 1).
        resamples: Draws of the bootstrap.
        seed: Of the draws; equal seeds give equal intervals.
    """
    confusion = confusion_matrix(labels, predictions, num_classes)
    return confusion_intervals(confusion, confidence, resamples, seed)


def confusion_matrix(labels: Any, predictions: Any, num_classes: int) -> Any:
    """Returns how many rows of each true class were predicted as each class [K, K] int64 (rows: true class)."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return confusion


def confusion_intervals(
    confusion: Any, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """As `metric_intervals`, from the confusion matrix [K, K] (rows: true class)."""
    confusion = np.asarray(confusion, dtype=np.int64)
    rows = int(confusion.sum())
    if not rows:
        return {}
    cells = np.nonzero(confusion)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):  # one at a time: many classes have many cells
        counts = rng.multinomial(rows, confusion[cells] / rows)
        on_diagonal = counts * (cells[0] == cells[1])
        sums = ((cells[0], on_diagonal), (cells[0], counts), (cells[1], counts))
        found.append(class_scores(*(np.bincount(of, weights, len(confusion)) for of, weights in sums)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    out = {}
    for name in found[0]:
        low, high = np.quantile([metrics[name] for metrics in found], tails)
        out[name] = (float(low), float(high))
    right = wilson(int(confusion.trace()), rows, confidence)
    return {name: right if name in PROPORTIONS else interval for name, interval in out.items()}
