"""Validated features and labels of the same rows, with factorizations shared by transferability scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from hftl.errors import DataError, FeatureError, shorten

LabelKind = Literal["classes", "labels", "values"]
"""Type of labels. classes: single-label. labels: multi-label, zeros and ones. values: regression."""


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of the Gram matrix of the features: F = Q V^T with V orthonormal and Q^T Q = diag(sigma).

    Attributes:
        sigma: Nonzero eigenvalues of F^T F [R], R <= min(N, D).
        axes: Q [N, R], projections of the rows onto the eigenvectors.
        size: Feature size D, the number of eigenvalues including zeros.
    """

    sigma: np.ndarray
    axes: np.ndarray
    size: int


class LabeledFeatures:
    """Features and labels of N rows, the input of transferability scores.

    Args:
        features: [N, D] floats.
        labels: [N] integers (classes), [N, K] zeros and ones (labels), or [N] or [N, K] floats (values).
        kind: Type of labels; None: detected from dtype and shape.
        source: Probabilities [N, Z] of the pretraining classes, if the checkpoint has its pretrained head.
        k: Number of neighbors in `knn`.

    Raises:
        FeatureError: Features are not a matrix, not finite, or equal in all rows.
        DataError: Labels do not match the rows, are not finite, or are equal in all rows.
    """

    def __init__(
        self, features: Any, labels: Any, kind: LabelKind | None = None, source: Any = None, k: int = 5
    ) -> None:
        self.features = _validate_features(features)
        labels = np.asarray(labels)
        self.kind: LabelKind = kind or detect_kind(labels)
        self.targets, self.classes = _validate_labels(labels, self.kind, len(self.features))
        self.source = None if source is None else _validate_source(source, len(self.features))
        self.k = min(k, len(self.features) - 1)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigendecomposition of the uncentered features, computed from the smaller of F^T F and F F^T."""
        from scipy.linalg import eigh

        rows, size = self.features.shape
        is_wide = rows < size
        gram = self.features @ self.features.T if is_wide else self.features.T @ self.features
        sigma, vectors = eigh(gram, overwrite_a=True, check_finite=False, driver="evd")
        nonzero = sigma > sigma[-1] * max(rows, size) * np.finfo(np.float64).eps
        sigma, vectors = sigma[nonzero], vectors[:, nonzero]
        return Spectrum(sigma, vectors * np.sqrt(sigma) if is_wide else self.features @ vectors, size)

    @cached_property
    def squares(self) -> np.ndarray:
        """Squared axes [N, R]; leverages are weighted sums of these."""
        return self.spectrum.axes**2

    @cached_property
    def projections(self) -> np.ndarray:
        """Projections of the targets onto the axes, Q^T Y [R, K]."""
        return self.spectrum.axes.T @ self.targets

    @cached_property
    def neighbors(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the k + 1 nearest other rows by cosine similarity, and the similarities, descending."""
        count = min(self.k + 1, len(self) - 1)
        rows = self.features.astype(np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(length > 0, length, 1)
        nearest, cosines = np.empty((len(rows), count), np.int64), np.empty((len(rows), count), np.float32)
        for start in range(0, len(rows), 1024):  # avoids a matrix [N, N]
            similarities = rows[start : start + 1024] @ rows.T
            similarities[np.arange(len(similarities)), start + np.arange(len(similarities))] = -np.inf
            best = np.argpartition(similarities, -count, axis=1)[:, -count:]
            order = np.argsort(-np.take_along_axis(similarities, best, 1), axis=1, kind="stable")
            nearest[start : start + 1024] = best = np.take_along_axis(best, order, 1)
            cosines[start : start + 1024] = np.take_along_axis(similarities, best, 1)
        return nearest, cosines


def detect_kind(labels: np.ndarray) -> LabelKind:
    """Returns the type of labels: integers [N] are classes, zeros and ones [N, K] labels, other numbers values."""
    if labels.ndim == 1 and labels.dtype.kind in "iub":
        return "classes"
    return "labels" if labels.ndim == 2 and np.isin(labels, (0, 1)).all() else "values"


def _validate_features(features: Any) -> np.ndarray:
    """Returns features as float64 [N, D]."""
    values = np.asarray(features)
    if values.ndim != 2 or not values.size:
        raise FeatureError(f"features: shape {list(values.shape)} is invalid; allowed: [N, D], one vector per row.")
    values = values.astype(np.float64)
    nonfinite = np.nonzero(~np.isfinite(values).all(1))[0]
    if len(nonfinite):
        rows = _format_rows(nonfinite)
        raise FeatureError(f"features: {len(nonfinite)} of {len(values)} rows are NaN or infinite: rows {rows}.")
    if len(values) < 2 or (values == values[0]).all():
        raise FeatureError(f"features: values are equal in all {len(values)} rows. Choose another backbone.")
    return values


def _validate_labels(labels: np.ndarray, kind: LabelKind, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns targets [N, K] float64 (one-hot for classes), and for classes their indices [N] in 0..K-1, else None."""
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise DataError(f"labels: shape {list(labels.shape)} does not match {rows} rows of features.")
    if kind == "classes":
        values, classes = np.unique(labels, return_inverse=True)
        if len(values) < 2:
            raise DataError(f"labels: all {rows} rows have the class {values[0]}; two classes are required.")
        if len(values) == rows:
            raise DataError(f"labels: {rows} rows have {len(values)} classes; two rows of one class are required.")
        return np.eye(len(values))[classes], classes
    targets = labels.reshape(rows, -1).astype(np.float64)
    nonfinite = np.nonzero(~np.isfinite(targets).all(1))[0]
    if len(nonfinite):
        raise DataError(f"labels: {len(nonfinite)} of {rows} rows are NaN or infinite: rows {_format_rows(nonfinite)}.")
    if kind == "labels" and not np.isin(targets, (0, 1)).all():
        raise DataError("labels: multi-label values are invalid; allowed: 0 or 1.")
    is_constant = (targets == targets[0]).all(0)
    if is_constant.all():
        raise DataError(f"labels: all {rows} rows have the same label; different labels are required.")
    return targets[:, ~is_constant], None


def _validate_source(source: Any, rows: int) -> np.ndarray:
    probabilities = np.asarray(source, dtype=np.float64)
    is_valid = probabilities.ndim == 2 and len(probabilities) == rows
    if not is_valid or not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise FeatureError(
            f"source probabilities: shape {list(probabilities.shape)} or values are invalid; allowed: [{rows}, Z], "
            "finite, at least 0."
        )
    return probabilities


def _format_rows(rows: np.ndarray) -> str:
    return shorten([str(row) for row in rows], 8)
