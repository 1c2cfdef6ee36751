"""Regression metrics with confidence intervals, independent of batches, row order and number of processes.

All rows are stored and every sum is correctly rounded (`math.fsum`), so its order does not matter.
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
"""Names of the metrics of `RegressionMetrics`."""
ERRORS = ("mae", "rmse")
"""Metrics that are lower for better models."""


class RegressionMetrics:
    """MAE, RMSE, R², Pearson and Spearman: means over the outputs, and per output if there are several.

    Definitions are those of scikit-learn (`multioutput="uniform_average"`) and scipy. Correlations of constant values
    are NaN.

    Args:
        names: Names of the outputs, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.labels: list[Any] = []
        self.predictions: list[Any] = []
        per_output = names if len(names) > 1 else ()
        self.smaller_is_better = (*ERRORS, *(f"{error}_{name}" for error in ERRORS for name in per_output))

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds predictions [B, K] (`logits`, in label units) and labels [B, K]."""
        self.predictions.append(outputs["logits"].detach().float().cpu().numpy())
        self.labels.append(batch["labels"].cpu().numpy())

    def merge(self, other: RegressionMetrics) -> None:
        """Adds the rows of another process."""
        self.labels += other.labels
        self.predictions += other.predictions

    def compute(self) -> dict[str, float]:
        """Returns the metrics of `NUMBERS`, with several outputs also `mae_NAME` and so on; NaN without rows."""
        labels, predictions = (
            np.concatenate([np.zeros((0, len(self.names))), *batches]).astype(np.float64)
            for batches in (self.labels, self.predictions)
        )
        return regression_scores(labels, predictions, self.names)


def regression_scores(labels: Any, predictions: Any, names: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of `RegressionMetrics`.

    Args:
        labels: True values [N, K].
        predictions: Predicted values [N, K].
        names: Names of the K outputs.
    """
    per_output = [_output_scores(labels[:, k], predictions[:, k]) for k in range(len(names))]
    scores = {name: math.fsum(output[name] for output in per_output) / len(per_output) for name in NUMBERS}
    if len(names) > 1:
        scores |= {f"{name}_{output}": per_output[k][name] for name in NUMBERS for k, output in enumerate(names)}
    return scores


def _output_scores(labels: Any, predictions: Any) -> dict[str, float]:
    """Returns the metrics of one output, from labels [N] and predictions [N]."""
    rows = len(labels)
    if not rows or not np.isfinite(predictions).all() or not np.isfinite(labels).all():
        return dict.fromkeys(NUMBERS, math.nan)
    errors = predictions - labels
    residual = math.fsum(errors**2)
    total = math.fsum((labels - math.fsum(labels) / rows) ** 2)
    return {
        "mae": math.fsum(np.abs(errors)) / rows,
        "rmse": math.sqrt(residual / rows),
        "r2": _r2(residual, total) if rows > 1 else math.nan,
        "pearson": _correlation(labels, predictions),
        "spearman": _correlation(_ranks(labels), _ranks(predictions)),
    }


def _r2(residual: float, total: float) -> float:
    """Returns R² from sums of squares; 1 (no error) or 0 for constant labels, as in scikit-learn."""
    return 1 - residual / total if total else float(not residual)


def _correlation(x: Any, y: Any) -> float:
    x, y = x - math.fsum(x) / len(x), y - math.fsum(y) / len(y)
    scale = math.sqrt(math.fsum(x**2)) * math.sqrt(math.fsum(y**2))
    return math.fsum(x * y) / scale if scale else math.nan


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
    """Returns the confidence interval of each metric of `RegressionMetrics`, by name; {} without rows.

    Percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13). A resample is a vector of row weights, and
    every metric is a function of weighted sums.

    Args:
        labels: True values [N, K].
        predictions: Predicted values [N, K].
        names: Names of the K outputs.
        confidence: Coverage, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """
    rows = len(labels)
    if not rows or not np.isfinite(predictions).all():
        return {}
    per_output = [
        np.concatenate(blocks, axis=1)
        for blocks in zip(
            *(
                [_weighted_scores(labels[:, k], predictions[:, k], weights) for k in range(len(names))]
                for weights in draws(rows, resamples, seed)
            ),
            strict=True,
        )
    ]  # K arrays [5, R]
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    resampled = {name: np.mean([scores[n] for scores in per_output], axis=0) for n, name in enumerate(NUMBERS)}
    if len(names) > 1:
        resampled |= {
            f"{name}_{output}": per_output[k][n] for n, name in enumerate(NUMBERS) for k, output in enumerate(names)
        }
    intervals = {
        name: np.quantile(values, quantiles) for name, values in resampled.items() if np.isfinite(values).all()
    }
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


def _weighted_scores(labels: Any, predictions: Any, weights: Any) -> Any:
    """Returns the metrics of `NUMBERS` [5, R] of one output for row weights [R, N]; each resample sums to N."""
    rows = len(labels)
    errors = predictions - labels
    residual, total = weights @ errors**2, _sum_of_squares(labels, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack(
            [
                weights @ np.abs(errors) / rows,
                np.sqrt(residual / rows),
                1 - residual / total,
                _weighted_correlation(labels - labels.mean(), predictions - predictions.mean(), weights),
                _weighted_correlation(_weighted_ranks(labels, weights), _weighted_ranks(predictions, weights), weights),
            ]
        )


def _sum_of_squares(values: Any, weights: Any) -> Any:
    """Returns the weighted sum of squared deviations from the weighted mean [R], for values [N] or [R, N]."""
    centered = values - (weights * values).mean(-1, keepdims=True)
    return (weights * centered**2).sum(-1)


def _weighted_correlation(x: Any, y: Any, weights: Any) -> Any:
    x, y = (values - (weights * values).mean(-1, keepdims=True) for values in (x, y))
    scale = np.sqrt((weights * x**2).sum(-1) * (weights * y**2).sum(-1))
    return (weights * x * y).sum(-1) / scale


def _weighted_ranks(values: Any, weights: Any) -> Any:
    """Returns the mean rank of each row among the resampled rows [R, N]."""
    distinct, index = np.unique(values, return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(distinct)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, index]
