"""Rows of a split with their true label and what the model said, and what follows: metrics, intervals, row scores."""

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
    """Rows of one split whose truth is known, in the order of the split; all arrays begin with N."""

    rows: Any
    """Row numbers of the split [N]."""
    labels: Any
    """The truth, as the task gives it to its loss."""
    metric: ClassVar[str]
    """The metric that is the mean of `scores`."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for splits with equal labels in equal order."""
        return hashlib.sha256(np.ascontiguousarray(self.labels).tobytes()).hexdigest()

    @property
    @abstractmethod
    def scores(self) -> Any:
        """The score of each row [N] float64, larger is better."""

    @abstractmethod
    def computed(self) -> dict[str, float]:
        """Returns the metrics of these rows."""

    @abstractmethod
    def intervals(self) -> Intervals:
        """Returns 95 % intervals over rows, by metric."""

    @abstractmethod
    def words(self, place: int) -> tuple[str, str, float | None]:
        """Returns label and prediction of a row as a person reads them, and the confidence where there is one."""


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """One class a row. Classes are positions in `names`."""

    rows: Any
    labels: Any
    predictions: Any
    confidences: Any
    names: Sequence[str]
    metric: ClassVar[str] = "accuracy"

    @cached_property
    def confusion(self) -> Any:
        """How many rows of each true class were predicted as each class [K, K]."""
        return confusion_matrix(self.labels, self.predictions, len(self.names))

    @property
    def scores(self) -> Any:
        """1 where a row is right, else 0."""
        return (self.labels == self.predictions).astype(np.float64)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        counts = self.confusion
        return class_scores(counts.diagonal(), counts.sum(1), counts.sum(0))

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return confusion_intervals(self.confusion)

    def words(self, place: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        label, prediction = (self.names[int(found[place])] for found in (self.labels, self.predictions))
        return label, prediction, float(self.confidences[place])


@dataclass(frozen=True)
class MultiLabelPredictions(Predictions):
    """Any number of labels a row: labels [N, K] bool, probabilities [N, K]."""

    rows: Any
    labels: Any
    probabilities: Any
    thresholds: Sequence[float]
    names: Sequence[str]
    metric: ClassVar[str] = "subset_accuracy"

    @cached_property
    def predictions(self) -> Any:
        """Labels that reach their threshold, [N, K] bool."""
        return self.probabilities >= np.asarray(self.thresholds)

    @property
    def scores(self) -> Any:
        """1 where all labels of a row are right, else 0."""
        return (self.labels == self.predictions).all(1).astype(np.float64)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        return multi_label_scores(self.labels, self.probabilities, self.thresholds)

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return multi_label_intervals(self.labels, self.probabilities, self.thresholds)

    def words(self, place: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        true, said = (
            ", ".join(name for name, here in zip(self.names, part[place], strict=True) if here) or "none"
            for part in (self.labels, self.predictions)
        )
        return true, said, None


@dataclass(frozen=True)
class RegressionPredictions(Predictions):
    """Numbers: labels and predictions [N, K]."""

    rows: Any
    labels: Any
    predictions: Any
    names: Sequence[str]
    metric: ClassVar[str] = "r2"

    @property
    def errors(self) -> Any:
        """Distance of each row from the truth, in spreads of the labels here, root mean square over outputs [N]."""
        return np.sqrt(self._squares.mean(1))

    @property
    def scores(self) -> Any:
        """1 - squared error / variance of the labels here, mean over outputs: their mean over rows is R².

        Unlike an error it has no unit, and larger is better; the variance is that of these rows and no estimate.
        """
        return 1 - self._squares.mean(1)

    @property
    def _squares(self) -> Any:
        variance = self.labels.var(0)
        return (self.predictions - self.labels) ** 2 / np.where(variance > 0, variance, 1)

    def computed(self) -> dict[str, float]:
        """See `Predictions.computed`."""
        return regression_scores(self.labels, self.predictions, self.names)

    def intervals(self) -> Intervals:
        """See `Predictions.intervals`."""
        return regression_intervals(self.labels, self.predictions, self.names)

    def words(self, place: int) -> tuple[str, str, float | None]:
        """See `Predictions.words`."""
        true, said = (", ".join(f"{value:.4g}" for value in part[place]) for part in (self.labels, self.predictions))
        return true, said, None


def read_predictions(described: dict[str, Any], columns: Sequence[str], batches: Batches) -> Mapping[str, Predictions]:
    """Returns the answers by split; empty for tasks and predictions of other kinds.

    Args:
        described: What a saved model says of itself (hftl.json).
        columns: Of the predictions.
        batches: The predictions.
    """
    head = described.get("head", {})
    read = _READERS.get(head.get("problem_type"))
    if read is None or not head.get("labels") or not {"split", "row", *needed_columns(head)} <= set(columns):
        return {}
    thresholds = described.get("state", {}).get("target", {}).get("thresholds") or [0.5] * len(head["labels"])
    return read[1](list(head["labels"]), thresholds, batches)


def _classes(names: list[str], thresholds: Any, batches: Batches) -> Mapping[str, Predictions]:
    parts: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "prediction", "confidence")):
        found = [codes(batch.column(name), names) for name in ("label", "prediction")]
        numbers = [batch.column(name).to_numpy(zero_copy_only=False) for name in ("row", "confidence")]
        known = (found[0] >= 0) & (found[1] >= 0)
        for split, here in _by_split(batch, known):
            parts.setdefault(split, []).append((numbers[0][here], found[0][here], found[1][here], numbers[1][here]))
    return {split: ClassPredictions(*_joined(found), names=names) for split, found in parts.items()}


def _labels(names: list[str], thresholds: Sequence[float], batches: Batches) -> Mapping[str, Predictions]:
    parts: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "probabilities")):
        true = np.zeros((batch.num_rows, len(names)), bool)
        column = batch.column("label")
        counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        found = codes(column.flatten(), names)
        true[np.repeat(np.arange(len(counts)), counts)[found >= 0], found[found >= 0]] = True
        shares = _table(batch.column("probabilities"), len(names))
        numbers = batch.column("row").to_numpy(zero_copy_only=False)
        for split, here in _by_split(batch, column.is_valid().to_numpy(zero_copy_only=False)):
            parts.setdefault(split, []).append((numbers[here], true[here], shares[here]))
    return {
        split: MultiLabelPredictions(*_joined(each), thresholds=thresholds, names=names)
        for split, each in parts.items()
    }


def _numbers(names: list[str], thresholds: Any, batches: Batches) -> Mapping[str, Predictions]:
    parts: dict[str, list[Any]] = {}
    for batch in batches(("split", "row", "label", "prediction")):
        true, said = (_table(batch.column(name), len(names)) for name in ("label", "prediction"))
        numbers = batch.column("row").to_numpy(zero_copy_only=False)
        for split, here in _by_split(batch, np.isfinite(true).all(1)):
            parts.setdefault(split, []).append((numbers[here], true[here], said[here]))
    return {split: RegressionPredictions(*_joined(found), names=names) for split, found in parts.items()}


_READERS: dict[str | None, Any] = {
    "single_label_classification": (("prediction", "confidence"), _classes),
    "multi_label_classification": (("probabilities",), _labels),
    "regression": (("prediction",), _numbers),
}
"""transformers' name of the problem -> columns that are needed, and who reads them."""


def needed_columns(head: Mapping[str, Any]) -> frozenset[str]:
    """Returns the columns that a reader needs, for a head as saved models describe it; empty without a reader."""
    read = _READERS.get(head.get("problem_type"))
    return frozenset({"label", *read[0]}) if read else frozenset()


def codes(names: Any, classes: Sequence[str]) -> Any:
    """Returns the positions of `names` (Arrow strings) in `classes` [N] int64; -1 where there is none."""
    encoded = names.dictionary_encode()
    position = {name: code for code, name in enumerate(classes)}
    found = np.array([position.get(name, -1) for name in encoded.dictionary.to_pylist()] + [-1])
    return found[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _table(column: Any, width: int) -> Any:
    """Returns a column of numbers, or of lists of as many, as [N, K] float64."""
    flat = column.flatten() if hasattr(column, "flatten") and hasattr(column, "value_lengths") else column
    return flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)


def _by_split(batch: Any, known: Any) -> Iterator[tuple[str, Any]]:
    """Yields each split of a batch, and which of its rows are of that split and known [n]."""
    of = np.array(batch.column("split").to_pylist())
    for split in dict.fromkeys(of[known].tolist()):
        yield split, known & (of == split)


def _joined(parts: Sequence[Any]) -> list[Any]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
