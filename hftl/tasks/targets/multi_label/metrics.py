"""Metrics of multi-label classification, with thresholds and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.statistics.bootstrap import draws

if TYPE_CHECKING:
    from torch import Tensor

SCORES = (
    "map",
    "micro_f1",
    "macro_f1",
    "weighted_f1",
    "micro_precision",
    "macro_precision",
    "weighted_precision",
    "micro_recall",
    "macro_recall",
    "weighted_recall",
    "subset_accuracy",
)
"""Names of the metrics of `MultiLabelMetrics`."""
_MAX_INTERVAL_VALUES = 2_000_000
"""Number of probabilities in a split above which `map` gets no interval: each resample would take seconds."""
_INTERVAL_BUDGET = 100_000_000
"""Number of sorted probabilities to sum for the interval of `map`, over all resamples."""


def probabilities(logits: Tensor) -> Any:
    """Returns the sigmoid of logits [B, K] in float64, which has fewer ties: it is below 1 up to a logit of 36."""
    return logits.detach().float().cpu().double().sigmoid().numpy()


class MultiLabelMetrics:
    """Average precision, and F1, precision and recall at a threshold per label, as scikit-learn computes them.

    Inputs are indicator matrices; `zero_division=0`. `map` is the macro average of the average precision, in which a
    label without true rows counts as 0, as in scikit-learn. Storage: 9 bytes per row and label.

    Args:
        thresholds: Smallest probability at which each label is predicted [K].
    """

    row_fractions = ("subset_accuracy",)

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = list(thresholds)
        self.rows: list[tuple[Any, Any]] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K] and labels [B, K] of zeros and ones."""
        self.rows.append((batch["labels"].cpu().numpy() > 0.5, probabilities(outputs["logits"])))

    def merge(self, other: MultiLabelMetrics) -> None:
        """Adds the rows of another process."""
        self.rows += other.rows

    @property
    def labels(self) -> Any:
        """True labels of all added rows [N, K] bool."""
        return np.concatenate([np.zeros((0, len(self.thresholds)), bool), *(labels for labels, _ in self.rows)])

    @property
    def probabilities(self) -> Any:
        """Predicted probabilities [N, K] float64, in the order of `labels`."""
        return np.concatenate([np.zeros((0, len(self.thresholds))), *(values for _, values in self.rows)])

    def compute(self) -> dict[str, float]:
        """Returns the metrics of `SCORES`, each in [0, 1]; NaN without rows, or if a logit is NaN."""
        return multi_label_scores(self.labels, self.probabilities, self.thresholds)


def multi_label_scores(labels: Any, probs: Any, thresholds: Sequence[float]) -> dict[str, float]:
    """Returns the metrics of `SCORES`.

    Args:
        labels: True labels [N, K] bool.
        probs: Predicted probabilities [N, K].
        thresholds: Smallest probability at which each label is predicted [K].
    """
    if not len(labels) or np.isnan(probs).any():
        return dict.fromkeys(SCORES, math.nan)
    predictions = probs >= np.asarray(thresholds)
    precisions = [average_precision(labels[:, k], probs[:, k]) for k in range(len(thresholds))]
    counts = ((labels & predictions).sum(0), labels.sum(0), predictions.sum(0))
    scores = {"map": math.fsum(precisions) / len(precisions)} | _averages(*counts)
    return scores | {"subset_accuracy": float((labels == predictions).all(1).mean())}


def label_scores(labels: Any, probs: Any, thresholds: Sequence[float]) -> dict[str, Any]:
    """Returns the metrics of each label [K] and its numbers of true and predicted rows.

    Args:
        labels: True labels [N, K] bool.
        probs: Predicted probabilities [N, K].
        thresholds: Smallest probability at which each label is predicted [K].

    Returns:
        `rows` (true), `predicted` (rows), `average_precision`, `precision`, `recall` and `f1`, each [K].
    """
    predictions = probs >= np.asarray(thresholds)
    correct, true, predicted = (labels & predictions).sum(0), labels.sum(0), predictions.sum(0)
    return {
        "rows": true,
        "predicted": predicted,
        "average_precision": np.array([average_precision(labels[:, k], probs[:, k]) for k in range(len(thresholds))]),
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, true),
        "f1": _ratio(2 * correct, true + predicted),
    }


def _averages(correct: Any, true: Any, predicted: Any) -> dict[str, Any]:
    """Returns micro, macro and weighted F1, precision and recall from counts of each label in the last dimension."""
    ratios = {"f1": (2 * correct, true + predicted), "precision": (correct, predicted), "recall": (correct, true)}
    weights = _ratio(true, true.sum(-1, keepdims=True))
    averages: dict[str, Any] = {}
    for name, (numerator, denominator) in ratios.items():
        averages[f"micro_{name}"] = _ratio(numerator.sum(-1), denominator.sum(-1))[()]
        per_label = _ratio(numerator, denominator)
        averages[f"macro_{name}"] = per_label.mean(-1)
        averages[f"weighted_{name}"] = (per_label * weights).sum(-1)
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in averages.items()}


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Returns the ratio in float64; 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def average_precision(labels: Any, scores: Any, weights: Any = None) -> Any:
    """Returns the sum over thresholds of precision times gain in recall, as scikit-learn's `average_precision_score`.

    Args:
        labels: True labels [N] bool.
        scores: Scores [N], higher for positives.
        weights: Row weights of R resamples [R, N]; None weights each row with 1.

    Returns:
        A float, or [R] with `weights`.
    """
    order, ends = _descending(scores)
    weights = np.ones(len(labels)) if weights is None else weights[:, order]
    correct = np.cumsum(weights * labels[order], axis=-1)[..., ends]
    predicted = np.cumsum(weights, axis=-1)[..., ends]
    recall = _ratio(correct, correct[..., -1:])
    precision = (np.diff(recall, prepend=0.0, axis=-1) * _ratio(correct, predicted)).sum(-1)
    return float(precision) if np.ndim(precision) == 0 else precision


def _descending(scores: Any) -> tuple[Any, Any]:
    """Returns the descending order of scores [N], and the last position of each distinct score in that order."""
    order = np.argsort(-scores, kind="stable")
    return order, np.flatnonzero(np.diff(scores[order], append=-np.inf))


def best_thresholds(labels: Any, probs: Any, default: float = 0.5) -> list[float]:
    """Returns the threshold of each label with the highest F1 on these rows.

    A threshold is the midpoint of the two distinct probabilities that it separates. Ties go to the threshold nearest to
    `default`. A label without positive rows gets `default`.

    Args:
        labels: True labels [N, K] bool of rows used neither for training nor for the final evaluation.
        probs: Predicted probabilities [N, K].
        default: Threshold of labels that cannot be tuned.
    """
    return [_best_threshold(labels[:, k], probs[:, k], default) for k in range(labels.shape[1])]


def _best_threshold(labels: Any, probs: Any, default: float) -> float:
    if not labels.any() or np.isnan(probs).any():
        return default
    order, ends = _descending(probs)
    f1 = 2 * np.cumsum(labels[order])[ends] / (ends + 1 + labels.sum())
    upper = probs[order][ends]
    midpoints = (upper + np.append(upper[1:], 0.0)) / 2
    best = np.flatnonzero(f1 == f1.max())
    return float(midpoints[best[np.argmin(np.abs(midpoints[best] - default))]])


def multi_label_intervals(
    labels: Any,
    probs: Any,
    thresholds: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Returns the confidence interval of each metric of `SCORES` (percentile bootstrap over rows); {} without rows.

    For large splits, `map` gets fewer resamples (at least 100), and no interval above two million probabilities.

    Args:
        labels: True labels [N, K] bool.
        probs: Predicted probabilities [N, K].
        thresholds: Smallest probability at which each label is predicted [K].
        confidence: Coverage, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """
    if not len(labels) or np.isnan(probs).any():
        return {}
    predictions = probs >= np.asarray(thresholds)
    indicators = [np.asarray(rows, np.float64) for rows in (labels & predictions, labels, predictions)]
    exact = (labels == predictions).all(1).astype(np.float64)
    map_resamples = (
        min(max(_INTERVAL_BUDGET // probs.size, 100), resamples) if probs.size <= _MAX_INTERVAL_VALUES else 0
    )
    resampled: dict[str, list[Any]] = {}
    done = 0
    for weights in draws(len(labels), resamples, seed):
        scores = _averages(*(weights @ rows for rows in indicators))
        scores["subset_accuracy"] = weights @ exact / len(labels)
        if done < map_resamples:
            map_weights = weights[: map_resamples - done]
            scores["map"] = np.mean(
                [average_precision(labels[:, k], probs[:, k], map_weights) for k in range(labels.shape[1])], axis=0
            )
        done += len(weights)
        for name, values in scores.items():
            resampled.setdefault(name, []).append(np.atleast_1d(values))
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {name: np.quantile(np.concatenate(values), quantiles) for name, values in resampled.items()}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}
