"""Area under the ROC curve of binary classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class RocAuc:
    """`roc_auc`: fraction of (positive, negative) pairs in which the positive scores higher; ties count one half.

    The second class is positive. The score is the difference of the two logits: it orders rows as the probability does,
    but does not round to 0 or 1. Pairs are counted in integers, so batches and processes do not change the result.
    """

    def __init__(self) -> None:
        self.scores: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, 2] and labels [B]."""
        logits = outputs["logits"].detach().double().cpu().numpy()
        self.scores.append(logits[:, 1] - logits[:, 0])
        self.labels.append(batch["labels"].cpu().numpy().astype(bool))

    def merge(self, other: RocAuc) -> None:
        """Adds the rows of another process."""
        self.scores += other.scores
        self.labels += other.labels

    def compute(self) -> dict[str, float]:
        """Returns `roc_auc` in [0, 1]; NaN if a class has no rows or a score is NaN."""
        scores, labels = np.concatenate([np.empty(0), *self.scores]), np.concatenate([np.empty(0, bool), *self.labels])
        num_positives = int(labels.sum())
        num_negatives = len(labels) - num_positives
        if not num_positives or not num_negatives or np.isnan(scores).any():
            return {"roc_auc": float("nan")}
        negatives = np.sort(scores[~labels])
        positives = scores[labels]
        below = int(np.searchsorted(negatives, positives, "left").sum())
        not_above = int(np.searchsorted(negatives, positives, "right").sum())
        return {"roc_auc": (below + not_above) / (2 * num_positives * num_negatives)}
