"""Confidence intervals of proportions, for the sampling of evaluation rows."""

from __future__ import annotations


def wilson(successes: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion, within [0, 1].

    The normal approximation can leave [0, 1] and has zero width at 0 or `rows` successes; this interval does not.

    Args:
        successes: Number of correct rows, in [0, rows].
        rows: Number of rows; 0 returns (0, 1).
        confidence: Coverage, in (0, 1).

    Source: Wilson 1927, https://doi.org/10.2307/2276774
    """
    from scipy.stats import binomtest

    if rows == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(rows)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
