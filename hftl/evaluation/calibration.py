"""Calibration of predicted probabilities: reliability, expected calibration error, temperature scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Lower bound of probabilities in logarithms, since float32 probabilities may underflow to 0."""
_TEMPERATURES = (0.05, 20.0)


class Calibration:
    """Reliability bins, NLL and Brier score, accumulated as sums by `update`.

    Args:
        temperature: Divisor of the logits (Guo et al. 2017, section 4.2); 1 keeps the probabilities.
        bins: Number of confidence bins of equal width; 15 as in Guo et al.

    Attributes:
        counts: Rows per bin.
        right: Correct predictions per bin.
        confidence: Sum of the confidences per bin.
    """

    def __init__(self, temperature: float = 1.0, bins: int = 15) -> None:
        self.temperature = temperature
        self.counts = np.zeros(bins, dtype=np.int64)
        self.right = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)
        self.nll = self.brier = 0.0

    def update(self, probabilities: Any, labels: Any) -> None:
        """Adds rows.

        Args:
            probabilities: [N, K], each row summing to 1.
            labels: True classes [N], integers 0..K-1.
        """
        probabilities = soften(probabilities, self.temperature)
        rows, labels = np.arange(len(probabilities)), np.asarray(labels, dtype=np.int64)
        predicted = probabilities.argmax(1)
        confidence = probabilities[rows, predicted]
        bins = len(self.counts)
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bin m is ((m-1)/M, m/M]
        self.counts += np.bincount(index, minlength=bins)
        self.right += np.bincount(index[predicted == labels], minlength=bins)
        self.confidence += np.bincount(index, confidence, minlength=bins)
        self.nll -= float(np.log(np.maximum(probabilities[rows, labels], _SMALLEST)).sum())
        self.brier += float((probabilities**2).sum() + (1 - 2 * probabilities[rows, labels]).sum())

    @property
    def rows(self) -> int:
        """Number of rows added so far."""
        return int(self.counts.sum())

    def compute(self) -> dict[str, float]:
        """Returns `ece`, `nll` and `brier`; NaN without rows.

        `ece` is the mean absolute difference of accuracy and confidence over bins, weighted by rows (Guo et al. 2017,
        equation 3, https://arxiv.org/abs/1706.04599). `brier` is the squared difference of the probabilities and the
        one-hot label, summed over classes (Brier 1950), in [0, 2].
        """
        if not self.rows:
            return dict.fromkeys(("ece", "nll", "brier"), float("nan"))
        distance = float(np.abs(self.right - self.confidence).sum())
        return {"ece": distance / self.rows, "nll": self.nll / self.rows, "brier": self.brier / self.rows}


def soften(probabilities: Any, temperature: float) -> Any:
    """Returns softmax(logits / temperature) [N, K] for the logits of `probabilities`.

    Log-probabilities equal the logits up to a constant per row, to which softmax is invariant.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if temperature == 1.0:
        return probabilities
    return _softmax(np.log(np.maximum(probabilities, _SMALLEST)) / temperature)


def fit_temperature(probabilities: Any, labels: Any) -> float | None:
    """Returns the temperature in [0.05, 20] with the lowest NLL, or None if there is no minimum.

    NLL is convex in 1/temperature, so the minimum is unique. If every prediction is correct, NLL decreases without
    bound as the temperature approaches 0.

    Args:
        probabilities: [N, K] of rows used neither for training nor for the reported metrics.
        labels: True classes [N].
    """
    from scipy.optimize import minimize_scalar

    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if not len(probabilities) or (probabilities.argmax(1) == labels).all():
        return None
    logits, rows = np.log(np.maximum(probabilities, _SMALLEST)), np.arange(len(probabilities))

    def nll(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled -= scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - scaled[rows, labels]).mean())

    low, high = np.log(_TEMPERATURES)
    best = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(best.x))  # pyright: ignore[reportAttributeAccessIssue]


def _softmax(logits: Any) -> Any:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
