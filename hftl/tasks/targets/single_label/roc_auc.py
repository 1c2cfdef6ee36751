"""How well scores put rows in order: the area under the ROC curve of two classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class RocAuc:
    """`roc_auc`: how often a row of the second class scores higher than one of the first; ties count one half.

    The score is the difference of the two logits, which orders rows as the probability does and does not round to 0 or
    1. Pairs are counted in integers, so neither batches nor processes matter.
    """

    def __init__(self) -> None:
        self.scores: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, 2] against labels [B]."""
        logits = outputs["logits"].detach().double().cpu().numpy()
        self.scores.append(logits[:, 1] - logits[:, 0])
        self.labels.append(batch["labels"].cpu().numpy().astype(bool))

    def merge(self, other: RocAuc) -> None:
        """Adds another process's rows."""
        self.scores += other.scores
        self.labels += other.labels

    def compute(self) -> dict[str, float]:
        """Returns `roc_auc` in [0, 1]; NaN where a class has no rows or a score is not a number."""
        scores, labels = np.concatenate([np.empty(0), *self.scores]), np.concatenate([np.empty(0, bool), *self.labels])
        positives = int(labels.sum())
        negatives = len(labels) - positives
        if not positives or not negatives or np.isnan(scores).any():
            return {"roc_auc": float("nan")}
        values = np.sort(scores[~labels])
        of_positives = scores[labels]
        below = int(np.searchsorted(values, of_positives, "left").sum())
        not_above = int(np.searchsorted(values, of_positives, "right").sum())
        return {"roc_auc": (below + not_above) / (2 * positives * negatives)}
