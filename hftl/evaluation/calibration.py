"""Whether confidences mean what they say: reliability, expected calibration error, temperature scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Probabilities come from float32 and may have underflowed to 0; the log needs something above."""
_TEMPERATURES = (0.05, 20.0)


class Calibration:
    """Reliability bins, NLL and Brier score as sums: `update` with rows, `compute` once at the end.

    Args:
        temperature: Logits are divided by it (Guo et al. 2017, section 4.2); 1 leaves probabilities alone.
        bins: Number of equally wide bins of confidence; 15 as in Guo et al.
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
        shares = soften(probabilities, self.temperature)
        each, labels = np.arange(len(shares)), np.asarray(labels, dtype=np.int64)
        predicted = shares.argmax(1)
        confidence = shares[each, predicted]
        bins = len(self.counts)
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bin m is ((m-1)/M, m/M]
        self.counts += np.bincount(place, minlength=bins)
        self.right += np.bincount(place[predicted == labels], minlength=bins)
        self.confidence += np.bincount(place, confidence, minlength=bins)
        self.nll -= float(np.log(np.maximum(shares[each, labels], _SMALLEST)).sum())
        self.brier += float((shares**2).sum() + (1 - 2 * shares[each, labels]).sum())

    @property
    def rows(self) -> int:
        """Rows seen so far."""
        return int(self.counts.sum())

    def compute(self) -> dict[str, float]:
        """Returns `ece`, `nll` and `brier`; NaN without rows.

        `ece` is the mean distance of accuracy and confidence over bins, weighted by rows (Guo et al. 2017, equation 3,
        https://arxiv.org/abs/1706.04599); `brier` the squared distance of the probabilities from the true class,
        summed over classes (Brier 1950), 0..2.
        """
        if not self.rows:
            return dict.fromkeys(("ece", "nll", "brier"), float("nan"))
        distance = float(np.abs(self.right - self.confidence).sum())
        return {"ece": distance / self.rows, "nll": self.nll / self.rows, "brier": self.brier / self.rows}


def soften(probabilities: Any, temperature: float) -> Any:
    """Returns softmax(logits / temperature) [N, K] of the logits that gave `probabilities`.

    Logits are known from log-probabilities up to a constant a row, which softmax does not see.
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    if temperature == 1.0:
        return shares
    return _softmax(np.log(np.maximum(shares, _SMALLEST)) / temperature)


def fit_temperature(probabilities: Any, labels: Any) -> float | None:
    """Returns the temperature with the least NLL on these rows, within [0.05, 20]; None where there is no best one.

    NLL is convex in 1/temperature, so the minimum is the only one. Where every row is right it falls without end as
    the temperature goes to 0.

    Args:
        probabilities: [N, K] of rows that did not train the model, and that will not measure it.
        labels: True classes [N].
    """
    from scipy.optimize import minimize_scalar

    shares, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if not len(shares) or (shares.argmax(1) == labels).all():
        return None
    logits, each = np.log(np.maximum(shares, _SMALLEST)), np.arange(len(shares))

    def nll(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled -= scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - scaled[each, labels]).mean())

    low, high = np.log(_TEMPERATURES)
    best = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(best.x))  # pyright: ignore[reportAttributeAccessIssue]


def _softmax(logits: Any) -> Any:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
