"""Bootstrap resampling of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

_DRAWN_AT_A_TIME = 2_000_000
"""Weights of resampled rows held at once: 16 MB."""


def draws(rows: int, resamples: int, seed: int) -> Any:
    """Yields how often each row is taken in draws of as many rows with replacement, [some, N] float64 at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(_DRAWN_AT_A_TIME // rows, 1)
    for start in range(0, resamples, at_once):
        yield rng.multinomial(rows, np.full(rows, 1 / rows), min(at_once, resamples - start)).astype(np.float64)
