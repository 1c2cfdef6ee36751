"""Rows far from all others, by the features of a model.

Sun, Ming, Zhu and Li (2022), "Out-of-Distribution Detection with Deep Nearest Neighbors", https://arxiv.org/abs/2204.06507:
the distance to the k-th nearest of the reference rows, between features of unit length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NEIGHBOUR = 10
"""Which nearest neighbour's distance is taken: k."""
REFERENCE = 10_000
"""Training rows that rows are compared with at most."""
FENCE = 1.5
"""Interquartile ranges above the third quartile: Tukey's fence."""
_BLOCK = 2_048


def distances(features: Any, reference: Any, own: Any | None = None) -> Any:
    """Returns the distance of each row to its k-th nearest reference row, [N] float32, in [0, 2].

    Args:
        features: [N, D], may be memory-mapped.
        reference: [R, D].
        own: Position in `reference` that is the row itself, [N], -1 where it is not in there; a row is no neighbour of
            its own.
    """
    near = _unit(np.asarray(reference))
    k = min(NEIGHBOUR, len(near) - (own is not None))
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), _BLOCK):
        cosines = _unit(np.asarray(features[start : start + _BLOCK])) @ near.T
        if own is not None:
            places = own[start : start + _BLOCK]
            inside = np.flatnonzero(places >= 0)
            cosines[inside, places[inside]] = -2
        kth = np.partition(cosines, len(near) - k, axis=1)[:, len(near) - k]
        found[start : start + _BLOCK] = np.sqrt(np.maximum(2 - 2 * kth, 0))
    return found


def reference_rows(count: int, seed: int = 0) -> Any:
    """Returns the training rows that others are compared with: all, or `REFERENCE` drawn at random."""
    rows = np.arange(count)
    return rows if count <= REFERENCE else np.sort(np.random.default_rng(seed).permutation(rows)[:REFERENCE])


def far_limit(train: Any) -> float:
    """Returns the distance beyond which a row is an outlier, from those of the training rows."""
    low, high = np.percentile(train, [25, 75])
    return float(high + FENCE * (high - low))


def _unit(rows: Any) -> Any:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
