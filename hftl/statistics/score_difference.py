"""Is one way of training better than another on the same rows? Differences with intervals, by what was measured.

Two things make a measured difference vary: which rows were drawn into the test split, and which seeds the trainings
were given (Bouthillier et al. 2021, https://arxiv.org/abs/2103.03098). Both are in the intervals here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Conclusion = Literal["better", "worse", "not distinguishable"]
_DRAWS_AT_A_TIME = 2_000_000
"""Counts of rows held at once while resampling: 16 MB."""
_MOST_SEEDS = 50
"""More trainings than this are not suggested to anybody."""


@dataclass(frozen=True)
class Difference:
    """Mean score of one way of training minus that of another."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    seeds: int
    """Trainings of each; of the one with fewer where they differ."""
    rows: int
    """Rows that all of them were measured on, N."""
    rows_error: float
    """Standard error that comes from the rows."""
    seeds_error: float
    """Standard error that comes from the seeds; NaN with one seed, whose interval covers the rows alone."""
    freedom: float
    """Degrees of freedom of `seeds_error` (Welch-Satterthwaite); NaN with one seed."""
    confidence: float = 0.95

    @property
    def conclusion(self) -> Conclusion:
        """Whether zero lies outside of the interval, and on which side the difference is then."""
        if self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if self.value > 0 else "worse"


def difference(
    scores: Any,
    baseline: Any,
    *,
    largest: float | None = 1.0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Returns how much better `scores` are than `baseline`, with an interval over rows and over seeds.

    Rows: paired bootstrap (Efron & Tibshirani 1993, chapter 8): the same rows are drawn with replacement for both ways
    of training and for all seeds. Two rows are added to those that are drawn from, one for each side with the largest
    difference that a row can have: without them a handful of rows that all speak for one side looks certain, since no
    resample contradicts it (the same correction makes the Wald interval of paired proportions hold, Bonett & Price
    2012, Journal of Educational and Behavioral Statistics 37, 479-488).

    Seeds: drawn anew in every resample as well, but from Student's t instead of from the few values that there are:
    three seeds drawn with replacement vary by a third too little, and their mean never leaves the range of the three
    (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789, section 4). Seeds of the two ways are not paired:
    equal numbers start unrelated trainings (where they draw equal training rows, what the two ways then have in common
    makes the interval too wide, not too narrow). So the degrees of freedom are Welch's (1947).

    What rows and seeds do together is in both parts, which widens the interval somewhat, as with every bootstrap of
    crossed factors (Owen 2007, https://doi.org/10.1214/07-AOAS122).

    Args:
        scores: [S, N] score of each row in each training, larger is better; 1 and 0 for right and wrong.
        baseline: [S', N] of the other way of training, same rows in the same order.
        largest: Largest difference that two scores of a row can have; None where there is no bound (the largest one
            seen is taken).
        confidence: Coverage, in (0, 1).
        resamples: Draws of the bootstrap.
        seed: Of the draws; equal seeds give equal intervals.

    Raises:
        ValueError: The arrays are not [S, N] and [S', N] with at least one seed and one row, or are not finite.
    """
    from scipy.stats import t as student

    one, other = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or not one.size or not other.size:
        raise ValueError(f"scores {one.shape} and baseline {other.shape} must be [seeds, rows] with the same rows")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("scores hold values that are not finite")
    seeds, rows = min(len(one), len(other)), one.shape[1]
    by_row = one.mean(0) - other.mean(0)
    value = float(by_row.mean())
    bound = float(np.abs(by_row).max()) if largest is None else largest
    rng = np.random.default_rng(seed)
    drawn = _resampled_means(np.append(by_row, [bound, -bound]), resamples, rng)
    rows_error = float(drawn.std())
    seeds_error, freedom = _over_seeds(one.mean(1), other.mean(1))
    if seeds_error > 0:
        drawn = drawn + seeds_error * student.rvs(freedom, size=resamples, random_state=rng)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    if largest is not None:
        low, high = max(float(low), -largest), min(float(high), largest)
    # the two added rows pull towards zero: of very few rows the ends could miss what was measured
    low, high = min(float(low), value), max(float(high), value)
    return Difference(value, low, high, seeds, rows, rows_error, seeds_error, freedom, confidence)


def _over_seeds(one: Any, other: Any) -> tuple[float, float]:
    """Returns standard error and degrees of freedom of the difference of two means [S] and [S'] (Welch 1947)."""
    if min(len(one), len(other)) < 2:
        return math.nan, math.nan
    parts = [float(means.var(ddof=1)) / len(means) for means in (one, other)]
    if not sum(parts):
        return 0.0, float(len(one) + len(other) - 2)
    squares = sum(part**2 / (len(means) - 1) for part, means in zip(parts, (one, other), strict=True))
    return math.sqrt(sum(parts)), sum(parts) ** 2 / squares


def _resampled_means(values: Any, resamples: int, rng: np.random.Generator) -> Any:
    """Returns the means [resamples] of as many draws with replacement from `values` [N].

    Equal values are one cell of a multinomial draw, so that right-or-wrong scores cost the same for any N.
    """
    cells, counts = np.unique(values, return_counts=True)
    size, shares = len(values), counts / len(values)
    at_once = max(_DRAWS_AT_A_TIME // len(cells), 1)
    pieces = [
        rng.multinomial(size, shares, min(at_once, resamples - start)) @ cells for start in range(0, resamples, at_once)
    ]
    return np.concatenate(pieces) / size


@dataclass(frozen=True)
class RequiredSamples:
    """What would tell a difference of the measured size from none; None where that alone would not."""

    rows: int | None
    """Rows of the same kind, with as many seeds."""
    seeds: int | None
    """Seeds, on the same rows."""


def required_samples(found: Difference) -> RequiredSamples:
    """Returns how many rows, or seeds, would make the interval of a difference of this size leave zero out.

    Errors shrink with the square root of what they come from; the estimate is as rough as the difference itself.
    """
    from scipy.stats import norm
    from scipy.stats import t as student

    tail = (1 + found.confidence) / 2
    wanted, by_rows = found.value**2, (norm.ppf(tail) * found.rows_error) ** 2

    def by_seeds(count: int) -> float:
        if not found.seeds_error > 0:
            return 0.0
        freedom = found.freedom * (count - 1) / (found.seeds - 1)
        return float(student.ppf(tail, freedom) * found.seeds_error) ** 2 * found.seeds / count

    left = wanted - by_seeds(found.seeds)
    rows = max(math.ceil(found.rows * by_rows / left), found.rows) if wanted and left > 0 else None
    seeds = None
    if wanted and found.seeds > 1:
        enough = (count for count in range(found.seeds, _MOST_SEEDS + 1) if by_rows + by_seeds(count) < wanted)
        seeds = next(enough, None)
    return RequiredSamples(rows, seeds)


def roughly(count: int) -> int:
    """Returns a count to two significant digits, rounded up."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit
