"""Errors and correlations of numbers, from rows that are kept: equal for any batches, order and number of processes.

Every sum is correctly rounded (`math.fsum`), so it does not depend on the order in which rows came together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.statistics.bootstrap import draws

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = ("mae", "rmse", "r2", "pearson", "spearman")
"""What `RegressionMetrics` computes."""
ERRORS = ("mae", "rmse")
"""Those of them that are smaller for better models."""


class RegressionMetrics:
    """MAE, RMSE, R², Pearson and Spearman: means over the outputs, and of each output where there are several.

    As scikit-learn (`multioutput="uniform_average"`) and scipy have them. Correlations of numbers that are all equal
    are NaN.

    Args:
        names: Of the outputs, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.labels: list[Any] = []
        self.predictions: list[Any] = []
        several = names if len(names) > 1 else ()
        self.smaller_is_better = (*ERRORS, *(f"{error}_{name}" for error in ERRORS for name in several))

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds predictions [B, K] (`logits`, in the units of the labels) against labels [B, K]."""
        self.predictions.append(outputs["logits"].detach().float().cpu().numpy())
        self.labels.append(batch["labels"].cpu().numpy())

    def merge(self, other: RegressionMetrics) -> None:
        """Adds another process's rows."""
        self.labels += other.labels
        self.predictions += other.predictions

    def compute(self) -> dict[str, float]:
        """Returns `NUMBERS`, and with several outputs also `mae_NAME`, …; NaN without rows."""
        width = len(self.names)
        labels, predictions = (
            np.concatenate([np.zeros((0, width)), *parts]).astype(np.float64)
            for parts in (self.labels, self.predictions)
        )
        return regression_scores(labels, predictions, self.names)


def regression_scores(labels: Any, predictions: Any, names: Sequence[str]) -> dict[str, float]:
    """Returns what `RegressionMetrics` computes.

    Args:
        labels: True numbers [N, K].
        predictions: [N, K].
        names: Of the K outputs.
    """
    each = [_scores(labels[:, k], predictions[:, k]) for k in range(len(names))]
    found = {name: math.fsum(scores[name] for scores in each) / len(each) for name in NUMBERS}
    if len(names) > 1:
        found |= {f"{name}_{output}": each[k][name] for name in NUMBERS for k, output in enumerate(names)}
    return found


def _scores(labels: Any, predictions: Any) -> dict[str, float]:
    """Returns the numbers of one output, from [N] and [N]."""
    rows = len(labels)
    if not rows or not np.isfinite(predictions).all() or not np.isfinite(labels).all():
        return dict.fromkeys(NUMBERS, math.nan)
    errors = predictions - labels
    squares = math.fsum(errors**2)
    spread = math.fsum((labels - math.fsum(labels) / rows) ** 2)
    return {
        "mae": math.fsum(np.abs(errors)) / rows,
        "rmse": math.sqrt(squares / rows),
        "r2": _r2(squares, spread) if rows > 1 else math.nan,
        "pearson": _correlation(labels, predictions),
        "spearman": _correlation(_ranks(labels), _ranks(predictions)),
    }


def _r2(squares: float, spread: float) -> float:
    """Returns 1 - squares / spread; of labels that are all equal 1 or 0, as scikit-learn."""
    return 1 - squares / spread if spread else float(not squares)


def _correlation(one: Any, other: Any) -> float:
    one, other = one - math.fsum(one) / len(one), other - math.fsum(other) / len(other)
    scale = math.sqrt(math.fsum(one**2)) * math.sqrt(math.fsum(other**2))
    return math.fsum(one * other) / scale if scale else math.nan


def _ranks(values: Any) -> Any:
    from scipy.stats import rankdata

    return rankdata(values)


def regression_intervals(
    labels: Any,
    predictions: Any,
    names: Sequence[str],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Returns an interval for each metric of `RegressionMetrics`, by its name; {} without rows.

    Percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13): a draw is how often each row is taken, and
    every metric is a function of weighted sums.

    Args:
        labels: True numbers [N, K].
        predictions: [N, K].
        names: Of the K outputs.
        confidence: Coverage, in (0, 1).
        resamples: Draws of the bootstrap.
        seed: Of the draws; equal seeds give equal intervals.
    """
    rows = len(labels)
    if not rows or not np.isfinite(predictions).all():
        return {}
    drawn = [
        np.concatenate(parts, axis=1)
        for parts in zip(
            *(
                [_weighted_scores(labels[:, k], predictions[:, k], weights) for k in range(len(names))]
                for weights in draws(rows, resamples, seed)
            ),
            strict=True,
        )
    ]  # for each output [5, R]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    ends = {name: np.mean([part[n] for part in drawn], axis=0) for n, name in enumerate(NUMBERS)}
    if len(names) > 1:
        ends |= {f"{name}_{output}": drawn[k][n] for n, name in enumerate(NUMBERS) for k, output in enumerate(names)}
    found = {name: np.quantile(values, tails) for name, values in ends.items() if np.isfinite(values).all()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def _weighted_scores(labels: Any, predictions: Any, weights: Any) -> Any:
    """Returns `NUMBERS` [5, R] of one output for weights [R, N] whose rows sum to N."""
    rows = len(labels)
    errors = predictions - labels
    squares, spread = weights @ errors**2, _spread(labels, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack(
            [
                weights @ np.abs(errors) / rows,
                np.sqrt(squares / rows),
                1 - squares / spread,
                _weighted_correlation(labels - labels.mean(), predictions - predictions.mean(), weights),
                _weighted_correlation(_weighted_ranks(labels, weights), _weighted_ranks(predictions, weights), weights),
            ]
        )


def _spread(values: Any, weights: Any) -> Any:
    """Returns the weighted sum of squared distances from the weighted mean [R]; of values [N] or [R, N]."""
    centred = values - (weights * values).mean(-1, keepdims=True)
    return (weights * centred**2).sum(-1)


def _weighted_correlation(one: Any, other: Any, weights: Any) -> Any:
    one, other = (values - (weights * values).mean(-1, keepdims=True) for values in (one, other))
    scale = np.sqrt((weights * one**2).sum(-1) * (weights * other**2).sum(-1))
    return (weights * one * other).sum(-1) / scale


def _weighted_ranks(values: Any, weights: Any) -> Any:
    """Returns the mean rank of each row among the rows that were drawn, [R, N]."""
    different, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(different)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, place]
