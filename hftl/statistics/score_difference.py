"""Score differences between training methods on the same rows, with confidence intervals over rows and seeds.

A measured difference varies with the sampling of the test rows and with the seeds of the runs. The intervals include
both.

Source: Bouthillier et al. 2021, https://arxiv.org/abs/2103.03098
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Conclusion = Literal["better", "worse", "not distinguishable"]
_MAX_COUNTS = 2_000_000
"""Row counts in memory while resampling: 16 MB."""
_MAX_SEEDS = 50
"""Maximum number of seeds in a recommendation."""


@dataclass(frozen=True)
class Difference:
    """Mean score of a training method minus that of a baseline."""

    value: float
    low: float
    """Lower end of the confidence interval."""
    high: float
    """Upper end of the confidence interval."""
    seeds: int
    """Runs per method; of the method with fewer runs if they differ."""
    rows: int
    """Number of evaluated rows, N."""
    rows_error: float
    """Standard error over rows."""
    seeds_error: float
    """Standard error over seeds; NaN with one seed, whose interval covers the rows only."""
    freedom: float
    """Degrees of freedom of `seeds_error` (Welch-Satterthwaite); NaN with one seed."""
    confidence: float = 0.95
    """Coverage of the interval, in (0, 1)."""

    @property
    def conclusion(self) -> Conclusion:
        """Sign of the difference if the interval excludes zero, else "not distinguishable"."""
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
    """Returns mean `scores` minus mean `baseline`, with a confidence interval over rows and seeds.

    Rows: paired bootstrap (Efron & Tibshirani 1993, chapter 8). Each resample uses the same rows for both methods and
    all seeds. Two pseudo-rows with the largest possible difference, one of each sign, are added to the rows. Without
    them, a few rows that all favor one method look certain, because no resample contradicts them. (The same correction
    gives Wald intervals of paired proportions their coverage: Bonett & Price 2012, Journal of Educational and
    Behavioral Statistics 37, 479-488.)

    Seeds: sampled in every resample from Student's t distribution, not from the observed values. Three seeds sampled
    with replacement underestimate the variation by a third, and their mean never leaves the observed range (Hesterberg
    2015, https://doi.org/10.1080/00031305.2015.1089789, section 4). Seeds of the two methods are not paired: equal
    seeds start unrelated runs. Where equal seeds sample equal training rows, the shared variation makes the interval
    too wide, not too narrow. The degrees of freedom are therefore Welch's (1947).

    The interaction of rows and seeds is included in both errors, which widens the interval slightly, as in every
    bootstrap of crossed factors (Owen 2007, https://doi.org/10.1214/07-AOAS122).

    Args:
        scores: Score of each row in each run, [S, N]; larger is better; 1 and 0 for correct and wrong.
        baseline: Scores of the baseline on the same rows in the same order, [S', N].
        largest: Maximum possible difference between two scores of a row; None without a bound uses the maximum of the
            observed differences.
        confidence: Coverage, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap; equal seeds return equal intervals.

    Raises:
        ValueError: The arrays are not [S, N] and [S', N] with at least one seed and one row, or are not finite.
    """
    from scipy.stats import t as student

    ours, theirs = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or not ours.size or not theirs.size:
        raise ValueError(f"scores {ours.shape} and baseline {theirs.shape} must be [seeds, rows] with the same rows")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("scores contain NaN or infinite values")
    seeds, rows = min(len(ours), len(theirs)), ours.shape[1]
    row_differences = ours.mean(0) - theirs.mean(0)
    value = float(row_differences.mean())
    bound = float(np.abs(row_differences).max()) if largest is None else largest
    rng = np.random.default_rng(seed)
    means = _resampled_means(np.append(row_differences, [bound, -bound]), resamples, rng)
    rows_error = float(means.std())
    seeds_error, freedom = _welch_error(ours.mean(1), theirs.mean(1))
    if seeds_error > 0:
        means = means + seeds_error * student.rvs(freedom, size=resamples, random_state=rng)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    if largest is not None:
        low, high = max(float(low), -largest), min(float(high), largest)
    # the pseudo-rows shrink towards zero: with very few rows the interval could exclude the measured value
    low, high = min(float(low), value), max(float(high), value)
    return Difference(value, low, high, seeds, rows, rows_error, seeds_error, freedom, confidence)


def _welch_error(first: Any, second: Any) -> tuple[float, float]:
    """Returns standard error and degrees of freedom of the difference of the means of [S] and [S'] (Welch 1947)."""
    if min(len(first), len(second)) < 2:
        return math.nan, math.nan
    variances = [float(sample.var(ddof=1)) / len(sample) for sample in (first, second)]
    if not sum(variances):
        return 0.0, float(len(first) + len(second) - 2)
    squares = sum(variance**2 / (len(sample) - 1) for variance, sample in zip(variances, (first, second), strict=True))
    return math.sqrt(sum(variances)), sum(variances) ** 2 / squares


def _resampled_means(values: Any, resamples: int, rng: np.random.Generator) -> Any:
    """Returns the means of bootstrap resamples of `values` [N], as [resamples].

    Equal values form one cell of a multinomial sample, so that binary scores cost the same for any N.
    """
    cells, counts = np.unique(values, return_counts=True)
    size, fractions = len(values), counts / len(values)
    block = max(_MAX_COUNTS // len(cells), 1)
    sums = [
        rng.multinomial(size, fractions, min(block, resamples - start)) @ cells for start in range(0, resamples, block)
    ]
    return np.concatenate(sums) / size


@dataclass(frozen=True)
class RequiredSamples:
    """Number of rows or seeds that would distinguish a difference of the measured size from zero."""

    rows: int | None
    """Rows with the same number of seeds; None if no number of rows is enough."""
    seeds: int | None
    """Seeds on the same rows; None if no number up to 50 is enough."""


def required_samples(measured: Difference) -> RequiredSamples:
    """Returns the number of rows, or of seeds, at which the interval of a difference of this size excludes zero.

    Errors shrink with the square root of the number of rows or seeds. The estimate is as uncertain as the difference.
    """
    from scipy.stats import norm
    from scipy.stats import t as student

    tail = (1 + measured.confidence) / 2
    squared_value, rows_width = measured.value**2, (norm.ppf(tail) * measured.rows_error) ** 2

    def seeds_width(count: int) -> float:
        if not measured.seeds_error > 0:
            return 0.0
        freedom = measured.freedom * (count - 1) / (measured.seeds - 1)
        return float(student.ppf(tail, freedom) * measured.seeds_error) ** 2 * measured.seeds / count

    remaining = squared_value - seeds_width(measured.seeds)
    rows = None
    if squared_value and remaining > 0:
        rows = max(math.ceil(measured.rows * rows_width / remaining), measured.rows)
    seeds = None
    if squared_value and measured.seeds > 1:
        counts = range(measured.seeds, _MAX_SEEDS + 1)
        seeds = next((count for count in counts if rows_width + seeds_width(count) < squared_value), None)
    return RequiredSamples(rows, seeds)


def round_up(count: int) -> int:
    """Rounds a count up to two significant digits."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit
