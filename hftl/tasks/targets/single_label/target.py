"""Single-label classification: softmax and cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hftl.data.columns import arrow_column, find_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.tasks.capabilities import Capability, TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.single_label.metrics import ClassificationMetrics
from hftl.tasks.targets.single_label.roc_auc import RocAuc
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset


class SingleLabelTarget:
    """Classes 0..K-1, one per row.

    Args:
        column: The label column.
        names: Class names, in the order of the outputs.
        values: Cell value of each class, in the same order (equal to `names` for string labels).
    """

    best_metric = "accuracy"
    info = TargetInfo("one class", frozenset(Capability))

    def __init__(self, column: str, names: Sequence[str], values: Sequence[Any]) -> None:
        self.column = column
        self.columns = [column]
        self.names = list(names)
        self.values = list(values)
        self.ids = {value: position for position, value in enumerate(values)}
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits) -> SingleLabelTarget:
        """Detects the label column and its classes, and collects errors in `problems`."""
        train = splits["train"]
        try:
            column = find_column("label", train.features, splits.config.label_column)
        except DataError as error:
            target = cls("label", [], [])
            target.problems = error.problems
            return target
        counts = {split: _label_counts(rows, column.name) for split, rows in splits.items()}
        present = sorted(_train_values(splits, counts))
        values, names, origin = named_classes(train.features[column.name], splits.class_names, present)
        target = cls(column.name, names, values)
        target.problems = _problems(splits, column.name, counts, target)
        log(f"data: labels from column '{column.name}' ({column.why}); {len(names)} classes {origin}: {shorten(names)}")
        return target

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per class."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), "single_label_classification")

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns class indices [B] int64, or None if a row has no label."""
        if any(example.get(self.column) is None for example in examples):
            return None
        return torch.tensor([self.ids[example[self.column]] for example in examples])

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the cross entropy of each example [B], in float32."""
        return functional.cross_entropy(outputs["logits"].float(), labels, reduction="none")

    def metrics(self) -> list[Metric]:
        """Returns accuracy, F1, precision, recall and MCC; for two classes also the area under the ROC curve."""
        metrics = ClassificationMetrics(len(self.names))
        return [metrics, RocAuc()] if len(self.names) == 2 else [metrics]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the predicted class, its probability, and all probabilities in the order of the classes."""
        probabilities = outputs["logits"].float().softmax(-1).cpu()
        predictions = probabilities.argmax(-1).tolist()
        return [
            {"prediction": self.names[index], "confidence": row[index], "probabilities": row}
            for index, row in zip(predictions, probabilities.tolist(), strict=True)
        ]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a label, and the rows of classes missing from train."""
        values = {split: _label_values(rows, self.column) for split, rows in splits.items()}
        known = {value for split in splits.labelled_by_source for value in values[split] if value is not None}
        return {
            split: {row: self._bad_row(value) for row, value in enumerate(labels) if value not in known}
            for split, labels in values.items()
        }

    def counts(self, rows: Dataset) -> dict[str, int]:
        """Returns the number of rows of each class."""
        counts = _label_counts(rows, self.column)
        return {name: counts.get(value, 0) for name, value in zip(self.names, self.values, strict=True)}

    def _bad_row(self, value: Any) -> BadRow:
        if value is None:
            return BadRow("no label", self.column)
        name = str(self.names[self.ids[value]] if value in self.ids else value)
        return BadRow("label missing from train", self.column, name)

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "names": self.names, "values": self.values}


def _label_counts(rows: Dataset, column: str) -> dict[Any, int]:
    """Returns the number of rows of each label in a split; rows without a label count under None."""
    if column not in rows.features:
        return {None: len(rows)}
    counts: dict[Any, int] = {}
    for entry in arrow_column(rows, column).value_counts().to_pylist():
        value = entry["values"]
        key = None if _is_missing(value, rows, column) else value
        counts[key] = counts.get(key, 0) + entry["counts"]
    return counts


def _is_missing(value: Any, rows: Dataset, column: str) -> bool:
    return value is None or value == "" or value != value or value == -1 and "ClassLabel" in str(rows.features[column])


def _label_values(rows: Dataset, column: str) -> list[Any]:
    """Returns the label of each row, or None if it is missing."""
    if column not in rows.features:
        return [None] * len(rows)
    values = arrow_column(rows, column).to_pylist()
    return [None if _is_missing(value, rows, column) else value for value in values]


def named_classes(
    feature: Any, file_names: Sequence[str] | None, present: Sequence[Any]
) -> tuple[list[Any], list[str], str]:
    """Returns the cell values of all classes, their names, and the origin of the names.

    Args:
        feature: Type of a label.
        file_names: Class names in labels.json, if there is one.
        present: The values in train, sorted.
    """
    if type(feature).__name__ == "ClassLabel":
        return list(range(len(feature.names))), list(feature.names), "named by the dataset"
    if file_names and all(isinstance(value, int) and 0 <= value < len(file_names) for value in present):
        return list(range(len(file_names))), list(file_names), "named in labels.json"
    if file_names and all(value in file_names for value in present):
        return list(file_names), list(file_names), "in the order of labels.json"
    return list(present), [str(value) for value in present], "from train"


def _train_values(splits: Splits, counts: dict[str, dict[Any, int]]) -> set[Any]:
    """Returns the labels in train, and in the validation split if hftl split it off."""
    return {value for split in splits.labelled_by_source for value in counts[split] if value is not None}


def _problems(splits: Splits, column: str, counts: dict[str, dict[Any, int]], target: SingleLabelTarget) -> list[str]:
    problems = []
    present = _train_values(splits, counts)
    has_fractions = any(isinstance(value, float) and not value.is_integer() for value in present)
    if has_fractions:
        problems.append(
            f"data.label_column: '{column}' holds real numbers, not classes. Set --data.problem_type regression."
        )
    for split, of_split in counts.items() if not splits.lenient else ():
        if None in of_split:
            problems.append(
                f"data.source: {split} has {of_split[None]} row(s) without a label in column '{column}'. "
                "Add the labels, or set --data.on_error skip."
            )
        missing = [value for value in of_split if value is not None and value not in present]
        if split != "train" and missing and not has_fractions:
            names = sorted(target.names[target.ids[value]] if value in target.ids else str(value) for value in missing)
            quoted = shorten([f"'{name}'" for name in names])
            problems.append(
                f"data.source: {split} has {sum(of_split[value] for value in missing)} row(s) of class {quoted}, "
                "missing from train. Move rows into train or remove the class."
            )
    if len(present) < 2:
        only = f" ('{target.names[target.ids[next(iter(present))]]}')" if present else ""
        problems.append(f"data.label_column: train has only one class{only} in column '{column}'; two are needed.")
    return problems
