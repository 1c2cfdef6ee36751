"""Multi-label classification: binary cross entropy per label, and thresholds tuned on validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hftl.data.columns import find_column
from hftl.data.label_columns import Form, LabelCells, named_columns, unusable
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.tasks.capabilities import Capability, TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.multi_label.metrics import MultiLabelMetrics, best_thresholds, probabilities
from hftl.tasks.targets.single_label.target import named_classes
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset

PROBLEM = "multi_label_classification"


@dataclass
class _SplitLabels:
    """Labels of one split.

    Attributes:
        counts: Number of rows of each label.
        empty: Number of rows without labels.
        invalid: Rows whose labels cannot be read: row number and reason.
    """

    counts: Counter[Any] = field(default_factory=Counter)
    empty: int = 0
    invalid: list[tuple[int, str]] = field(default_factory=list)


class MultiLabelTarget:
    """Indicators of K labels per row.

    Args:
        columns: The label column, or one column per label.
        form: Format of the cells; see `LabelCells`.
        separator: Separator of labels in a string.
        names: Label names, in the order of the outputs.
        values: Cell value of each label, in the same order.
        thresholds: Smallest probability at which each label is predicted; 0.5 before `tune_thresholds`.
        problem_type: Always `PROBLEM`; identifies this target in `state()`.
    """

    best_metric = "map"
    info = TargetInfo("several labels", frozenset({Capability.COMPARE, Capability.INTERVALS, Capability.EXPORT}))
    primary_metrics = ("map", "macro_f1", "micro_f1", "subset_accuracy")

    def __init__(
        self,
        columns: Sequence[str],
        form: Form,
        separator: str | None,
        names: Sequence[str],
        values: Sequence[Any],
        thresholds: Sequence[float] | None = None,
        problem_type: str = PROBLEM,
    ) -> None:
        self.cells = LabelCells(tuple(columns), form, separator)
        self.columns = list(columns)
        self.names = list(names)
        self.values = list(values)
        self.thresholds = list(thresholds) if thresholds else [0.5] * len(names)
        self.ids = {value: position for position, value in enumerate(values)}
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits) -> MultiLabelTarget:
        """Detects the label columns and the labels, logs their counts, and collects errors in `problems`."""
        try:
            cells, reason = _find_cells(splits)
        except DataError as error:
            target = cls(["label"], "list", None, [], [])
            target.problems = error.problems
            return target
        labels = {split: _read_labels(cells, rows) for split, rows in splits.items()}
        if cells.form == "flags":
            values, names, origin = list(cells.columns), list(cells.columns), "named by their columns"
        else:
            feature = splits["train"].features[cells.columns[0]]
            present = sorted(_train_values(splits, labels), key=lambda value: (type(value).__name__, value))
            values, names, origin = named_classes(getattr(feature, "feature", feature), splits.class_names, present)
        target = cls(cells.columns, cells.form, cells.separator, names, values)
        target.problems = _problems(splits, labels, target)
        where = f"{len(cells.columns)} columns" if cells.form == "flags" else f"column '{cells.columns[0]}'"
        mean = labels["train"].counts.total() / max(len(splits["train"]), 1)
        log(f"data: labels from {where} ({reason}); {len(names)} labels {origin}: {shorten(names)}")
        empty = ", ".join(f"{split} {of_split.empty}" for split, of_split in labels.items() if of_split.empty)
        log(f"data: {mean:.2f} labels per training row; rows without labels: {empty or 'none'}")
        return target

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per label."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), PROBLEM)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns zeros and ones [B, K] float32, or None if a row lacks a label column."""
        if any(column not in example for example in examples for column in self.columns):
            return None
        labels = torch.zeros(len(examples), len(self.names))
        for row, example in enumerate(examples):
            labels[row, [self.ids[value] for value in self.cells.read(example)]] = 1.0
        return labels

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the binary cross entropy of each example [B], mean over labels, in float32."""
        logits = outputs["logits"].float()
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    def metrics(self) -> list[Metric]:
        """Returns average precision, and F1, precision and recall at the thresholds."""
        return [MultiLabelMetrics(self.thresholds)]

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Sets the threshold of each label to the one with the highest F1 on the rows of `metrics`.

        `best_thresholds` resolves ties. F1 on the rows used for tuning is optimistic.
        """
        for metric in metrics:
            if isinstance(metric, MultiLabelMetrics):
                self.thresholds = best_thresholds(metric.labels, metric.probabilities)
                metric.thresholds = self.thresholds
                listed = [f"{name} {value:.2f}" for name, value in zip(self.names, self.thresholds, strict=True)]
                log(f"evaluate: thresholds with the highest F1 per label on validation: {shorten(listed)}")

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the predicted labels, and all probabilities in the order of the labels; with labels also those."""
        probs = probabilities(outputs["logits"])
        predictions = probs >= torch.tensor(self.thresholds, dtype=torch.float64).numpy()
        rows = [
            {"prediction": self._label_names(predicted), "probabilities": row.tolist()}
            for predicted, row in zip(predictions, probs, strict=True)
        ]
        if "labels" not in batch:
            return rows
        labels = batch["labels"].cpu().numpy() > 0.5
        return [{"label": self._label_names(true)} | row for true, row in zip(labels, rows, strict=True)]

    def _label_names(self, indicators: Any) -> list[str]:
        return [name for name, present in zip(self.names, indicators.tolist(), strict=True) if present]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose labels cannot be read, and the rows with labels missing from train."""
        labeled = [splits[split] for split in splits.labelled_by_source]
        known = {value for rows in labeled for labels, _ in self.cells.rows(rows) for value in labels}
        return {split: self._invalid_rows(rows, known) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows whose labels cannot be read or are unknown to the model."""
        return self._invalid_rows(rows, set(self.values))

    def _invalid_rows(self, rows: Dataset, known: set[Any]) -> dict[int, BadRow]:
        invalid, where = {}, ", ".join(self.columns)
        for number, (labels, problem) in enumerate(self.cells.rows(rows)):
            unknown = [value for value in labels if value not in known]
            if problem:
                invalid[number] = BadRow(f"unreadable label: {problem}", where)
            elif unknown and self.cells.form != "flags":
                invalid[number] = BadRow("label missing from train", where, self._label_name(unknown[0]))
        return invalid

    def counts(self, rows: Dataset) -> dict[str, int]:
        """Returns the number of rows of each label."""
        counts = Counter(value for labels, _ in self.cells.rows(rows) for value in labels)
        return {name: counts.get(value, 0) for name, value in zip(self.names, self.values, strict=True)}

    def _label_name(self, value: Any) -> str:
        return self.names[self.ids[value]] if value in self.ids else str(value)

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "problem_type": PROBLEM,
            "columns": self.columns,
            "form": self.cells.form,
            "separator": self.cells.separator,
            "names": self.names,
            "values": self.values,
            "thresholds": self.thresholds,
        }


def _find_cells(splits: Splits) -> tuple[LabelCells, str]:
    """Returns the label cells and the reason for their choice.

    Raises:
        DataError: No label column fits, or its type is not multi-label.
    """
    features, config = splits["train"].features, splits.config
    if config.label_columns:
        named_columns(features, config.label_columns)
        return LabelCells(tuple(config.label_columns), "flags"), "named by data.label_columns"
    column = find_column("label", features, config.label_column)
    feature = features[column.name]
    if config.label_separator:
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise DataError(
                f"data.label_separator: '{config.label_separator}' does not apply to column '{column.name}' "
                f"({feature}), which does not hold strings. Remove it for lists, or set another data.label_column."
            )
        return LabelCells((column.name,), "text", config.label_separator), column.why
    inner = getattr(feature, "feature", None)
    is_label = type(inner).__name__ == "ClassLabel" or str(getattr(inner, "dtype", "")).startswith(
        ("string", "int", "null")
    )
    if inner is None or not is_label:
        raise DataError(
            f"data.label_column: column '{column.name}' ({feature}) is not multi-label; allowed: "
            "lists of names or class numbers, strings with data.label_separator, columns of zeros and ones. "
            "Set another data.label_column, data.label_separator or data.label_columns."
        )
    return LabelCells((column.name,), "list"), column.why


def _read_labels(cells: LabelCells, rows: Any) -> _SplitLabels:
    of_split = _SplitLabels()
    if any(name not in rows.features for name in cells.columns):
        of_split.invalid = [(row, "no value") for row in range(len(rows))]
        return of_split
    for row, (labels, problem) in enumerate(cells.rows(rows)):
        if problem:
            of_split.invalid.append((row, problem))
        of_split.counts.update(labels)
        of_split.empty += not labels and not problem
    return of_split


def _train_values(splits: Splits, labels: dict[str, _SplitLabels]) -> set[Any]:
    """Returns the labels in train, and in the validation split if hftl split it off."""
    return {value for split in splits.labelled_by_source for value in labels[split].counts}


def _problems(splits: Splits, labels: dict[str, _SplitLabels], target: MultiLabelTarget) -> list[str]:
    problems, train, known = [], labels["train"], _train_values(splits, labels)
    where = ", ".join(f"'{name}'" for name in target.columns)
    for split, of_split in labels.items() if not splits.lenient else ():
        if of_split.invalid:
            problems.append(
                f"data.source: {split} has {len(of_split.invalid)} row(s) with unreadable labels in column(s) {where}: "
                f"{unusable(of_split.invalid)}. Correct them, or set --data.on_error skip."
            )
        unknown = [value for value in of_split.counts if value not in known]
        if split != "train" and unknown and target.cells.form != "flags":
            quoted = shorten(_quoted(target._label_name(value) for value in unknown))
            problems.append(
                f"data.source: {split} has {sum(of_split.counts[value] for value in unknown)} row(s) with label(s) "
                f"{quoted}, missing from train. Move rows into train, remove the label, or set --data.on_error skip."
            )
    if not train.counts and not train.invalid:
        problems.append(f"data.label_column: no training row has a label in column(s) {where}. Add labeled rows.")
    everywhere = [target._label_name(value) for value, count in train.counts.items() if count == len(splits["train"])]
    if everywhere and len(everywhere) == len(target.names):
        problems.append(
            f"data.label_column: label(s) {shorten(_quoted(everywhere))} occur in every training row and cannot be "
            "learned. Add rows without them."
        )
    return problems


def _quoted(names: Iterable[str]) -> list[str]:
    return [f"'{name}'" for name in sorted(names)]
