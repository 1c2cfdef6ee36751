"""Outlier detection by the distance to the k-th nearest training row, between L2-normalized features.

Source: Sun, Ming, Zhu and Li (2022), "Out-of-Distribution Detection with Deep Nearest Neighbors",
https://arxiv.org/abs/2204.06507.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NEIGHBOR = 10
"""k of the k-th nearest neighbor."""
REFERENCE = 10_000
"""Maximum training rows that rows are compared with."""
FENCE = 1.5
"""Tukey's fence: interquartile ranges above the third quartile."""
_BLOCK = 2_048


def distances(features: Any, reference: Any, own_positions: Any | None = None) -> Any:
    """Returns the distance of each row to its k-th nearest reference row, [N] float32, in [0, 2].

    Args:
        features: Features, [N, D]; may be memory-mapped.
        reference: Features of the reference rows, [R, D].
        own_positions: Position of each row itself in `reference`, [N]; -1 for rows that are not in it. A row is not
            its own neighbor.
    """
    normalized = _l2_normalize(np.asarray(reference))
    k = min(NEIGHBOR, len(normalized) - (own_positions is not None))
    kth_distances = np.empty(len(features), np.float32)
    for start in range(0, len(features), _BLOCK):
        cosines = _l2_normalize(np.asarray(features[start : start + _BLOCK])) @ normalized.T
        if own_positions is not None:
            positions = own_positions[start : start + _BLOCK]
            inside = np.flatnonzero(positions >= 0)
            cosines[inside, positions[inside]] = -2
        kth = np.partition(cosines, len(normalized) - k, axis=1)[:, len(normalized) - k]
        kth_distances[start : start + _BLOCK] = np.sqrt(np.maximum(2 - 2 * kth, 0))
    return kth_distances


def reference_rows(count: int, seed: int = 0) -> Any:
    """Returns the sorted positions of the reference rows: all, or a random sample of `REFERENCE`."""
    rows = np.arange(count)
    return rows if count <= REFERENCE else np.sort(np.random.default_rng(seed).permutation(rows)[:REFERENCE])


def distance_limit(train: Any) -> float:
    """Returns the distance above which a row is an outlier.

    Args:
        train: Distances of the training rows, [N].
    """
    low, high = np.percentile(train, [25, 75])
    return float(high + FENCE * (high - low))


def _l2_normalize(rows: Any) -> Any:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
