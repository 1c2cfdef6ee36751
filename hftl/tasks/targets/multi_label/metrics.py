"""Any number of labels a row: average precision, and F1, precision and recall at a threshold for each label."""

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
"""What `MultiLabelMetrics` computes."""
_MOST_VALUES = 2_000_000
"""Probabilities of a split above which its average precision gets no interval: every draw would cost seconds."""
_BUDGET = 100_000_000
"""Sorted probabilities that are summed for the intervals of average precisions, over all draws."""


def probabilities(logits: Tensor) -> Any:
    """Returns the sigmoid of logits [B, K] in float64, where it is below 1 up to a logit of 36: fewer ties."""
    return logits.detach().float().cpu().double().sigmoid().numpy()


class MultiLabelMetrics:
    """`SCORES` as scikit-learn computes them from indicator matrices, with `zero_division=0`.

    `map` is the macro average of the average precision; a label without true rows counts 0 there, as in
    scikit-learn. Rows are kept: 9 bytes for each label of each.

    Args:
        thresholds: A row has a label where its probability is at least this, [K].
    """

    row_fractions = ("subset_accuracy",)

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = list(thresholds)
        self.rows: list[tuple[Any, Any]] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K] against labels [B, K] of zeros and ones."""
        self.rows.append((batch["labels"].cpu().numpy() > 0.5, probabilities(outputs["logits"])))

    def merge(self, other: MultiLabelMetrics) -> None:
        """Adds another process's rows."""
        self.rows += other.rows

    @property
    def labels(self) -> Any:
        """True labels of all rows so far, [N, K] bool."""
        return np.concatenate([np.zeros((0, len(self.thresholds)), bool), *(labels for labels, _ in self.rows)])

    @property
    def probabilities(self) -> Any:
        """[N, K] float64, in the order of `labels`."""
        return np.concatenate([np.zeros((0, len(self.thresholds))), *(found for _, found in self.rows)])

    def compute(self) -> dict[str, float]:
        """Returns `SCORES`, each in [0, 1]; NaN without rows, or with a logit that is NaN."""
        return multi_label_scores(self.labels, self.probabilities, self.thresholds)


def multi_label_scores(labels: Any, shares: Any, thresholds: Sequence[float]) -> dict[str, float]:
    """Returns `SCORES`.

    Args:
        labels: [N, K] bool.
        shares: Probabilities [N, K].
        thresholds: [K].
    """
    if not len(labels) or np.isnan(shares).any():
        return dict.fromkeys(SCORES, math.nan)
    said = shares >= np.asarray(thresholds)
    precisions = [average_precision(labels[:, k], shares[:, k]) for k in range(len(thresholds))]
    counts = ((labels & said).sum(0), labels.sum(0), said.sum(0))
    scores = {"map": math.fsum(precisions) / len(precisions)} | _of_counts(*counts)
    return scores | {"subset_accuracy": float((labels == said).all(1).mean())}


def label_scores(labels: Any, shares: Any, thresholds: Sequence[float]) -> dict[str, Any]:
    """Returns average precision, precision, recall and F1 of each label [K], and its true and predicted rows."""
    said = shares >= np.asarray(thresholds)
    right, true, predicted = (labels & said).sum(0), labels.sum(0), said.sum(0)
    return {
        "rows": true,
        "predicted": predicted,
        "average_precision": np.array([average_precision(labels[:, k], shares[:, k]) for k in range(len(thresholds))]),
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, true),
        "f1": _ratio(2 * right, true + predicted),
    }


def _of_counts(right: Any, true: Any, predicted: Any) -> dict[str, Any]:
    """Returns F1, precision and recall in three averages, from counts of each label in the last dimension."""
    parts = {"f1": (2 * right, true + predicted), "precision": (right, predicted), "recall": (right, true)}
    weights = _ratio(true, true.sum(-1, keepdims=True))
    out: dict[str, Any] = {}
    for name, (above, below) in parts.items():
        out[f"micro_{name}"] = _ratio(above.sum(-1), below.sum(-1))[()]
        score = _ratio(above, below)
        out[f"macro_{name}"] = score.mean(-1)
        out[f"weighted_{name}"] = (score * weights).sum(-1)
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in out.items()}


def _ratio(above: Any, below: Any) -> Any:
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


def average_precision(labels: Any, scores: Any, weights: Any = None) -> Any:
    """Returns the sum over thresholds of precision times gain in recall, as scikit-learn's `average_precision_score`.

    Args:
        labels: [N] bool.
        scores: [N], larger for likelier.
        weights: [R, N]; how often each row counts, for R values at once. Once each, and one value, where None.
    """
    order, ends = _cuts(scores)
    weights = np.ones(len(labels)) if weights is None else weights[:, order]
    right = np.cumsum(weights * labels[order], axis=-1)[..., ends]
    said = np.cumsum(weights, axis=-1)[..., ends]
    recall = _ratio(right, right[..., -1:])
    found = (np.diff(recall, prepend=0.0, axis=-1) * _ratio(right, said)).sum(-1)
    return float(found) if np.ndim(found) == 0 else found


def _cuts(scores: Any) -> tuple[Any, Any]:
    """Returns the order of falling scores [N], and the last place of each different score in it."""
    order = np.argsort(-scores, kind="stable")
    return order, np.flatnonzero(np.diff(scores[order], append=-np.inf))


def best_thresholds(labels: Any, shares: Any, default: float = 0.5) -> list[float]:
    """Returns for each label the threshold with the largest F1 on these rows.

    A threshold lies half way between the two different probabilities that it separates. Of equally good ones the
    nearest to `default` is taken, and `default` itself for a label that no row has.

    Args:
        labels: [N, K] bool, of rows that did not train the model and will not measure it.
        shares: Probabilities [N, K].
        default: Where nothing says better.
    """
    return [_best_threshold(labels[:, k], shares[:, k], default) for k in range(labels.shape[1])]


def _best_threshold(labels: Any, shares: Any, default: float) -> float:
    if not labels.any() or np.isnan(shares).any():
        return default
    order, ends = _cuts(shares)
    f1 = 2 * np.cumsum(labels[order])[ends] / (ends + 1 + labels.sum())
    upper = shares[order][ends]
    middle = (upper + np.append(upper[1:], 0.0)) / 2
    best = np.flatnonzero(f1 == f1.max())
    return float(middle[best[np.argmin(np.abs(middle[best] - default))]])


def multi_label_intervals(
    labels: Any,
    shares: Any,
    thresholds: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Returns an interval for each of `SCORES`, by the percentile bootstrap over rows; {} without rows.

    Draws of average precisions are fewer for large splits, 100 at least, and none above two million probabilities.

    Args:
        labels: [N, K] bool.
        shares: Probabilities [N, K].
        thresholds: [K].
        confidence: Coverage, in (0, 1).
        resamples: Draws of the bootstrap.
        seed: Of the draws; equal seeds give equal intervals.
    """
    if not len(labels) or np.isnan(shares).any():
        return {}
    said = shares >= np.asarray(thresholds)
    parts = [np.asarray(part, np.float64) for part in (labels & said, labels, said)]
    whole = (labels == said).all(1).astype(np.float64)
    few = min(max(_BUDGET // shares.size, 100), resamples) if shares.size <= _MOST_VALUES else 0
    drawn: dict[str, list[Any]] = {}
    done = 0
    for weights in draws(len(labels), resamples, seed):
        found = _of_counts(*(weights @ part for part in parts)) | {"subset_accuracy": weights @ whole / len(labels)}
        if done < few:
            some = weights[: few - done]
            found["map"] = np.mean(
                [average_precision(labels[:, k], shares[:, k], some) for k in range(labels.shape[1])], axis=0
            )
        done += len(weights)
        for name, values in found.items():
            drawn.setdefault(name, []).append(np.atleast_1d(values))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    ends = {name: np.quantile(np.concatenate(values), tails) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}
