"""Predictions with labels of a split, and their metrics, confidence intervals and per-row scores."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hftl.tasks.targets.multi_label.metrics import multi_label_intervals, multi_label_scores
from hftl.tasks.targets.regression.metrics import regression_intervals, regression_scores
from hftl.tasks.targets.single_label.metrics import class_scores, confusion_intervals, confusion_matrix

Intervals = dict[str, tuple[float, float]]
Batches = Callable[[tuple[str, ...]], Iterator[Any]]
"""Columns -> Arrow batches of predictions.parquet."""


class Predictions(ABC):
    """Labeled rows of one split in the order of the split; the first dimension of all arrays is N."""

    rows: Any
    """Row indices in the split [N]."""
    labels: Any
    """Labels in the format of the task's loss."""
    metric: ClassVar[str]
    """Metric that equals the mean of `scores`."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the labels; equal for splits with the same labels in the same order."""
        return hashlib.sha256(np.ascontiguousarray(self.labels).tobytes()).hexdigest()

    @property
    @abstractmethod
    def scores(self) -> Any:
        """Score per row [N] float64, larger is better."""

    @abstractmethod
    def computed(self) -> dict[str, float]:
        """Returns the metrics of these rows."""

    @abstractmethod
    def intervals(self) -> Intervals:
        """Returns 95 % confidence intervals over rows, by metric."""

    @abstractmethod
    def words(self, position: int) -> tuple[str, str, float | None]:
        """Returns label and prediction of a row as text, and its confidence, or None for tasks without confidence.

        Args:
            position: Position in `labels`, in [0, N).
        """


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """Single-label predictions; `labels` and `predictions` are class indices [N], positions in `names`."""

    rows: Any
    labels: Any
    predictions: Any
    confidences: Any
    names: Sequence[str]
    metric: ClassVar[str] = "accuracy"

    @cached_property
    def confusion(self) -> Any:
        """Confusion matrix [K, K] of row counts; rows are true classes, columns are predicted classes."""
        return confusion_matrix(self.labels, self.predictions, len(self.names))

    @property
    def scores(self) -> Any:
        """1 for correct rows, else 0."""
        return (self.labels == self.predictions).astype(np.float64)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        counts = self.confusion
        return class_scores(counts.diagonal(), counts.sum(1), counts.sum(0))

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return confusion_intervals(self.confusion)

    def words(self, position: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        label, prediction = (self.names[int(classes[position])] for classes in (self.labels, self.predictions))
        return label, prediction, float(self.confidences[position])


@dataclass(frozen=True)
class MultiLabelPredictions(Predictions):
    """Multi-label predictions: labels [N, K] bool, probabilities [N, K]."""

    rows: Any
    labels: Any
    probabilities: Any
    thresholds: Sequence[float]
    names: Sequence[str]
    metric: ClassVar[str] = "subset_accuracy"

    @cached_property
    def predictions(self) -> Any:
        """Labels whose probability reaches their threshold [N, K] bool."""
        return self.probabilities >= np.asarray(self.thresholds)

    @property
    def scores(self) -> Any:
        """1 for rows with all labels correct, else 0."""
        return (self.labels == self.predictions).all(1).astype(np.float64)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        return multi_label_scores(self.labels, self.probabilities, self.thresholds)

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return multi_label_intervals(self.labels, self.probabilities, self.thresholds)

    def words(self, position: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        labels, predictions = (
            ", ".join(name for name, is_set in zip(self.names, matrix[position], strict=True) if is_set) or "none"
            for matrix in (self.labels, self.predictions)
        )
        return labels, predictions, None


@dataclass(frozen=True)
class RegressionPredictions(Predictions):
    """Regression: labels and predictions [N, K] in target units."""

    rows: Any
    labels: Any
    predictions: Any
    names: Sequence[str]
    metric: ClassVar[str] = "r2"

    @property
    def errors(self) -> Any:
        """Root mean square over outputs of error / standard deviation of the labels of these rows [N]."""
        return np.sqrt(self._normalized_squared_errors.mean(1))

    @property
    def scores(self) -> Any:
        """1 - squared error / variance of the labels, mean over outputs [N]; the mean over rows is R².

        The score has no unit, and larger is better. The variance is the population variance of these rows.
        """
        return 1 - self._normalized_squared_errors.mean(1)

    @property
    def _normalized_squared_errors(self) -> Any:
        variance = self.labels.var(0)
        return (self.predictions - self.labels) ** 2 / np.where(variance > 0, variance, 1)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        return regression_scores(self.labels, self.predictions, self.names)

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return regression_intervals(self.labels, self.predictions, self.names)

    def words(self, position: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        labels, predictions = (
            ", ".join(f"{value:.4g}" for value in matrix[position]) for matrix in (self.labels, self.predictions)
        )
        return labels, predictions, None


def read_predictions(metadata: dict[str, Any], columns: Sequence[str], batches: Batches) -> Mapping[str, Predictions]:
    """Returns the labeled predictions by split; empty for tasks without per-row scores.

    Args:
        metadata: Contents of hftl.json of the saved model.
        columns: Columns of predictions.parquet.
        batches: Function that reads columns of predictions.parquet.
    """
    head = metadata.get("head", {})
    reader = _READERS.get(head.get("problem_type"))
    if reader is None or not head.get("labels") or not {"split", "row", *needed_columns(head)} <= set(columns):
        return {}
    thresholds = metadata.get("state", {}).get("target", {}).get("thresholds") or [0.5] * len(head["labels"])
    return reader[1](list(head["labels"]), thresholds, batches)


def _read_classes(names: list[str], thresholds: Any, batches: Batches) -> Mapping[str, Predictions]:
    chunks: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "prediction", "confidence")):
        labels, predictions = (codes(batch.column(name), names) for name in ("label", "prediction"))
        rows, confidences = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("row", "confidence"))
        for split, mask in _split_masks(batch, (labels >= 0) & (predictions >= 0)):
            chunks.setdefault(split, []).append((rows[mask], labels[mask], predictions[mask], confidences[mask]))
    return {split: ClassPredictions(*_concatenate(arrays), names=names) for split, arrays in chunks.items()}


def _read_multi_label(names: list[str], thresholds: Sequence[float], batches: Batches) -> Mapping[str, Predictions]:
    chunks: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "probabilities")):
        labels = np.zeros((batch.num_rows, len(names)), bool)
        column = batch.column("label")
        counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        indices = codes(column.flatten(), names)
        labels[np.repeat(np.arange(len(counts)), counts)[indices >= 0], indices[indices >= 0]] = True
        probabilities = _matrix(batch.column("probabilities"), len(names))
        rows = batch.column("row").to_numpy(zero_copy_only=False)
        for split, mask in _split_masks(batch, column.is_valid().to_numpy(zero_copy_only=False)):
            chunks.setdefault(split, []).append((rows[mask], labels[mask], probabilities[mask]))
    return {
        split: MultiLabelPredictions(*_concatenate(arrays), thresholds=thresholds, names=names)
        for split, arrays in chunks.items()
    }


def _read_regression(names: list[str], thresholds: Any, batches: Batches) -> Mapping[str, Predictions]:
    chunks: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "prediction")):
        labels, predictions = (_matrix(batch.column(name), len(names)) for name in ("label", "prediction"))
        rows = batch.column("row").to_numpy(zero_copy_only=False)
        for split, mask in _split_masks(batch, np.isfinite(labels).all(1)):
            chunks.setdefault(split, []).append((rows[mask], labels[mask], predictions[mask]))
    return {split: RegressionPredictions(*_concatenate(arrays), names=names) for split, arrays in chunks.items()}


_READERS: dict[str | None, Any] = {
    "single_label_classification": (("prediction", "confidence"), _read_classes),
    "multi_label_classification": (("probabilities",), _read_multi_label),
    "regression": (("prediction",), _read_regression),
}
"""`problem_type` of transformers -> required columns in addition to `label`, and reader."""


def needed_columns(head: Mapping[str, Any]) -> frozenset[str]:
    """Returns the required columns of predictions.parquet for the head of a saved model; empty without a reader."""
    reader = _READERS.get(head.get("problem_type"))
    return frozenset({"label", *reader[0]}) if reader else frozenset()


def codes(names: Any, classes: Sequence[str]) -> Any:
    """Returns the class indices of `names` (Arrow strings) in `classes` [N] int64; -1 for unknown and missing names."""
    encoded = names.dictionary_encode()
    indices = {name: index for index, name in enumerate(classes)}
    by_code = np.array([indices.get(name, -1) for name in encoded.dictionary.to_pylist()] + [-1])
    return by_code[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _matrix(column: Any, width: int) -> Any:
    """Returns a column of numbers, or of lists of `width` numbers, as [N, K] float64."""
    flat = column.flatten() if hasattr(column, "flatten") and hasattr(column, "value_lengths") else column
    return flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)


def _split_masks(batch: Any, is_valid: Any) -> Iterator[tuple[str, Any]]:
    """Yields each split of a batch with the mask of its valid rows [n] bool."""
    splits = np.array(batch.column("split").to_pylist())
    for split in dict.fromkeys(splits[is_valid].tolist()):
        yield split, is_valid & (splits == split)


def _concatenate(chunks: Sequence[Any]) -> list[Any]:
    return [np.concatenate(arrays) for arrays in zip(*chunks, strict=True)]
