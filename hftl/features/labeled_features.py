"""Features and labels of the same rows, checked once, with the factorisations that several estimators share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from hftl.errors import DataError, FeatureError, shorten

LabelKind = Literal["classes", "labels", "values"]
"""What is learnt: one class a row, several yes/no labels a row, or numbers."""


@dataclass(frozen=True)
class Spectrum:
    """The features' Gram matrix in its own axes: F = Q V^T with V orthonormal and Q^T Q = diag(sigma).

    Attributes:
        sigma: Eigenvalues of F^T F that are not zero [R], R <= min(N, D).
        axes: Q [N, R], the rows along the eigenvectors.
        size: D, the eigenvalues that are zero included.
    """

    sigma: np.ndarray
    axes: np.ndarray
    size: int


class LabeledFeatures:
    """Rows to estimate from.

    Args:
        features: [N, D] floats.
        labels: [N] integers (classes), [N, K] of zeros and ones (labels), or [N] or [N, K] floats (values).
        kind: What the labels are; told from their type and shape by default.
        source: Probabilities of the classes that the checkpoint was trained on [N, Z], where it still has its head.
        k: Neighbours that `knn` asks.

    Raises:
        FeatureError: Features are not a matrix, not finite, or all rows are equal.
        DataError: Labels do not fit the rows, are not finite, or say the same of every row.
    """

    def __init__(
        self, features: Any, labels: Any, kind: LabelKind | None = None, source: Any = None, k: int = 5
    ) -> None:
        self.features = _checked_features(features)
        labels = np.asarray(labels)
        self.kind: LabelKind = kind or kind_of(labels)
        self.targets, self.classes = _checked_labels(labels, self.kind, len(self.features))
        self.source = None if source is None else _checked_source(source, len(self.features))
        self.k = min(k, len(self.features) - 1)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Returns the eigenvalues and axes of the features as they are, by the smaller of F^T F and F F^T."""
        from scipy.linalg import eigh

        rows, size = self.features.shape
        wide = rows < size
        gram = self.features @ self.features.T if wide else self.features.T @ self.features
        sigma, vectors = eigh(gram, overwrite_a=True, check_finite=False, driver="evd")
        seen = sigma > sigma[-1] * max(rows, size) * np.finfo(np.float64).eps
        sigma, vectors = sigma[seen], vectors[:, seen]
        return Spectrum(sigma, vectors * np.sqrt(sigma) if wide else self.features @ vectors, size)

    @cached_property
    def squares(self) -> np.ndarray:
        """Returns the axes squared [N, R]: leverages are weighted sums of these."""
        return self.spectrum.axes**2

    @cached_property
    def projections(self) -> np.ndarray:
        """Returns the targets along the axes, Q^T Y [R, K]."""
        return self.spectrum.axes.T @ self.targets

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k + 1 rows of largest cosine to each row, itself left out, and the cosines, best first."""
        count = min(self.k + 1, len(self) - 1)
        rows = self.features.astype(np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(length > 0, length, 1)
        found, cosines = np.empty((len(rows), count), np.int64), np.empty((len(rows), count), np.float32)
        for start in range(0, len(rows), 1024):  # so that [N, N] never exists
            near = rows[start : start + 1024] @ rows.T
            near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
            best = np.argpartition(near, -count, axis=1)[:, -count:]
            order = np.argsort(-np.take_along_axis(near, best, 1), axis=1, kind="stable")
            found[start : start + 1024] = best = np.take_along_axis(best, order, 1)
            cosines[start : start + 1024] = np.take_along_axis(near, best, 1)
        return found, cosines


def kind_of(labels: np.ndarray) -> LabelKind:
    """Returns what labels are by their type and shape: integers [N], zeros and ones [N, K], other numbers."""
    if labels.ndim == 1 and labels.dtype.kind in "iub":
        return "classes"
    return "labels" if labels.ndim == 2 and np.isin(labels, (0, 1)).all() else "values"


def _checked_features(features: Any) -> np.ndarray:
    """Returns features as float64 [N, D]."""
    found = np.asarray(features)
    if found.ndim != 2 or not found.size:
        raise FeatureError(f"features are of shape {list(found.shape)}; one row of numbers for each example is needed.")
    found = found.astype(np.float64)
    bad = np.nonzero(~np.isfinite(found).all(1))[0]
    if len(bad):
        raise FeatureError(f"features of {len(bad)} of {len(found)} rows are NaN or infinite: rows {_few(bad)}.")
    if len(found) < 2 or (found == found[0]).all():
        raise FeatureError(f"features are the same in all {len(found)} rows: the backbone sees no difference.")
    return found


def _checked_labels(labels: np.ndarray, kind: LabelKind, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns targets [N, K] float64 (one-hot for classes) and classes [N] as 0..K-1."""
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise DataError(f"labels are of shape {list(labels.shape)} for {rows} rows of features.")
    if kind == "classes":
        values, classes = np.unique(labels, return_inverse=True)
        if len(values) < 2:
            raise DataError(f"all {rows} rows have the class {values[0]}: nothing can be told apart.")
        if len(values) == rows:
            raise DataError(f"{rows} rows of {len(values)} classes: each class needs a second row to be recognised.")
        return np.eye(len(values))[classes], classes
    targets = labels.reshape(rows, -1).astype(np.float64)
    bad = np.nonzero(~np.isfinite(targets).all(1))[0]
    if len(bad):
        raise DataError(f"labels of {len(bad)} of {rows} rows are NaN or infinite: rows {_few(bad)}.")
    if kind == "labels" and not np.isin(targets, (0, 1)).all():
        raise DataError("labels of several yes/no questions must be 0 or 1.")
    same = (targets == targets[0]).all(0)
    if same.all():
        raise DataError(f"all {rows} rows have the same label: nothing can be told apart.")
    return targets[:, ~same], None


def _checked_source(source: Any, rows: int) -> np.ndarray:
    found = np.asarray(source, dtype=np.float64)
    if found.ndim != 2 or len(found) != rows or not np.isfinite(found).all() or (found < 0).any():
        raise FeatureError(f"source probabilities must be [{rows}, Z], finite and not negative; got {found.shape}.")
    return found


def _few(rows: np.ndarray) -> str:
    return shorten([str(row) for row in rows], 8)
