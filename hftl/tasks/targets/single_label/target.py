"""One class a row: softmax and cross entropy."""

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
    """Labels as classes 0..K-1.

    Args:
        column: The label column.
        names: Class names, in the order of the outputs.
        values: What the column holds for each class, in the same order (equal to `names` for text labels).
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
        """Detects the label column and its classes; what is wrong goes into `problems`."""
        train = splits["train"]
        try:
            column = find_column("label", train.features, splits.config.label_column)
        except DataError as error:
            found = cls("label", [], [])
            found.problems = error.problems
            return found
        seen = {split: _counts(rows, column.name) for split, rows in splits.items()}
        present = sorted(_present(splits, seen))
        values, names, origin = named_classes(train.features[column.name], splits.class_names, present)
        found = cls(column.name, names, values)
        found.problems = _problems(splits, column.name, seen, found)
        log(f"data: labels from column '{column.name}' ({column.why}); {len(names)} classes {origin}: {shorten(names)}")
        return found

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per class."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), "single_label_classification")

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns class numbers [B] int64, or None where rows have no label."""
        if any(example.get(self.column) is None for example in examples):
            return None
        return torch.tensor([self.ids[example[self.column]] for example in examples])

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the cross entropy of each example [B], in float32."""
        return functional.cross_entropy(outputs["logits"].float(), labels, reduction="none")

    def metrics(self) -> list[Metric]:
        """Returns accuracy, F1, precision, recall and MCC; for two classes the area under the ROC curve too."""
        counted = ClassificationMetrics(len(self.names))
        return [counted, RocAuc()] if len(self.names) == 2 else [counted]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the class, its probability, and all probabilities in the order of the classes."""
        shares = outputs["logits"].float().softmax(-1).cpu()
        best = shares.argmax(-1).tolist()
        return [
            {"prediction": self.names[b], "confidence": row[b], "probabilities": row}
            for b, row in zip(best, shares.tolist(), strict=True)
        ]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a label, and the held-out rows of classes that train lacks."""
        values = {split: _label_values(rows, self.column) for split, rows in splits.items()}
        known = {value for split in splits.labelled_by_source for value in values[split] if value is not None}
        return {
            split: {row: self._bad(value) for row, value in enumerate(found) if value not in known}
            for split, found in values.items()
        }

    def counts(self, rows: Dataset) -> dict[str, int]:
        """Returns the number of rows of each class."""
        found = _counts(rows, self.column)
        return {name: found.get(value, 0) for name, value in zip(self.names, self.values, strict=True)}

    def _bad(self, value: Any) -> BadRow:
        if value is None:
            return BadRow("no label", self.column)
        name = str(self.names[self.ids[value]] if value in self.ids else value)
        return BadRow("label that train lacks", self.column, name)

    def state(self) -> dict[str, Any]:
        """Returns column, names and values."""
        return {"column": self.column, "names": self.names, "values": self.values}


def _counts(rows: Dataset, column: str) -> dict[Any, int]:
    """Returns how often each label occurs in a split; missing labels count under None."""
    if column not in rows.features:
        return {None: len(rows)}
    counted = arrow_column(rows, column).value_counts().to_pylist()
    counts: dict[Any, int] = {}
    for entry in counted:
        value = entry["values"]
        key = None if _is_missing(value, rows, column) else value
        counts[key] = counts.get(key, 0) + entry["counts"]
    return counts


def _is_missing(value: Any, rows: Dataset, column: str) -> bool:
    return value is None or value == "" or value != value or value == -1 and "ClassLabel" in str(rows.features[column])


def _label_values(rows: Dataset, column: str) -> list[Any]:
    """Returns the label of each row, None where it is missing."""
    if column not in rows.features:
        return [None] * len(rows)
    values = arrow_column(rows, column).to_pylist()
    return [None if _is_missing(value, rows, column) else value for value in values]


def named_classes(
    feature: Any, beside: Sequence[str] | None, present: Sequence[Any]
) -> tuple[list[Any], list[str], str]:
    """Returns the values of all classes, their names, and where the names come from.

    Args:
        feature: Type of a label.
        beside: From labels.json.
        present: The values in train, sorted.
    """
    if type(feature).__name__ == "ClassLabel":
        return list(range(len(feature.names))), list(feature.names), "named by the data set"
    if beside and all(isinstance(value, int) and 0 <= value < len(beside) for value in present):
        return list(range(len(beside))), list(beside), "named in labels.json"
    if beside and all(value in beside for value in present):
        return list(beside), list(beside), "in the order of labels.json"
    return list(present), [str(value) for value in present], "found in train"


def _present(splits: Splits, seen: dict[str, dict[Any, int]]) -> set[Any]:
    return {value for split in splits.labelled_by_source for value in seen[split] if value is not None}


def _problems(splits: Splits, column: str, seen: dict[str, dict[Any, int]], target: SingleLabelTarget) -> list[str]:
    out = []
    present = _present(splits, seen)
    real = any(isinstance(value, float) and not value.is_integer() for value in present)
    if real:
        out.append(
            f"data.label_column: '{column}' holds real numbers, not classes; say --data.problem_type regression."
        )
    for split, counts in seen.items() if not splits.lenient else ():
        if None in counts:
            out.append(f"data.source: {split} has {counts[None]} row(s) without a label in column '{column}'.")
        unseen = [value for value in counts if value is not None and value not in present]
        if split != "train" and unseen and not real:
            names = [target.names[target.ids[value]] if value in target.ids else str(value) for value in unseen]
            rows = sum(counts[value] for value in unseen)
            out.append(
                f"data.source: {split} has {rows} row(s) of class {shorten(sorted(names))}, which train lacks: "
                "no model can learn it. Move rows into train or drop the class."
            )
    if len(present) < 2:
        only = f" ('{target.names[target.ids[next(iter(present))]]}')" if present else ""
        out.append(f"data.label_column: train has only one class{only} in column '{column}'; two are needed.")
    return out
