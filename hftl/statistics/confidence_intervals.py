"""How far a measured number may lie from the true one, by chance of which rows were drawn into the split."""

from __future__ import annotations


def wilson(successes: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the score interval of a proportion (Wilson 1927, https://doi.org/10.2307/2276774).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 or `rows` successes.

    Args:
        successes: Rows that are right, 0..rows.
        rows: All rows; 0 says nothing, so the interval is (0, 1).
        confidence: Coverage, in (0, 1).
    """
    from scipy.stats import binomtest

    if rows == 0:
        return 0.0, 1.0
    found = binomtest(int(successes), int(rows)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)
