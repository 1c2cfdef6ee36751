"""Bootstrap resampling of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

_MAX_WEIGHTS = 2_000_000
"""Row weights in memory: 16 MB."""


def draws(rows: int, resamples: int, seed: int) -> Any:
    """Yields blocks of bootstrap weights [B, N] float64: the count of each row in N draws with replacement.

    Args:
        rows: Number of rows, N, at least 1.
        resamples: Number of bootstrap resamples, the sum of B over all blocks.
        seed: Seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    block = max(_MAX_WEIGHTS // rows, 1)
    for start in range(0, resamples, block):
        yield rng.multinomial(rows, np.full(rows, 1 / rows), min(block, resamples - start)).astype(np.float64)
