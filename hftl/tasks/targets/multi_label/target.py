"""Any number of labels a row: a sigmoid for each, and thresholds that validation chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
class _Seen:
    """What the label cells of a split hold."""

    counts: Counter[Any] = field(default_factory=Counter)
    without: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


class MultiLabelTarget:
    """Zeros and ones for K labels.

    Args:
        columns: The label column, or the column of each label.
        form: How they are written: see `LabelCells`.
        separator: Between labels in a text.
        names: Of the labels, in the order of the outputs.
        values: What the columns hold for each label, in the same order.
        thresholds: A row is said to have a label where its probability is at least this; 0.5 until `tune_thresholds`.
        problem_type: Always `PROBLEM`: what tells the state of this target from that of others.
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
        """Detects the labels; what is wrong goes into `problems`. Rows without any label are counted and said."""
        try:
            cells, why = _cells(splits)
        except DataError as error:
            found = cls(["label"], "list", None, [], [])
            found.problems = error.problems
            return found
        seen = {split: _look(cells, rows) for split, rows in splits.items()}
        if cells.form == "flags":
            values, names, origin = list(cells.columns), list(cells.columns), "with a column each"
        else:
            feature = splits["train"].features[cells.columns[0]]
            present = sorted(_present(splits, seen), key=_sortable)
            values, names, origin = named_classes(getattr(feature, "feature", feature), splits.class_names, present)
        found = cls(cells.columns, cells.form, cells.separator, names, values)
        found.problems = _problems(splits, seen, found)
        where = f"{len(cells.columns)} columns" if cells.form == "flags" else f"column '{cells.columns[0]}'"
        mean = seen["train"].counts.total() / max(len(splits["train"]), 1)
        log(f"data: any number of labels a row from {where} ({why}); {len(names)} labels {origin}: {shorten(names)}")
        none = ", ".join(f"{split} {each.without}" for split, each in seen.items() if each.without)
        log(f"data: {mean:.2f} labels a training row; rows without any label: {none or 'none'}")
        return found

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per label."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), PROBLEM)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns zeros and ones [B, K] float32, or None where rows lack the label columns."""
        if any(column not in example for example in examples for column in self.columns):
            return None
        found = torch.zeros(len(examples), len(self.names))
        for row, example in enumerate(examples):
            found[row, [self.ids[value] for value in self.cells.read(example)]] = 1.0
        return found

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the binary cross entropy of each example [B], mean over labels, in float32."""
        logits = outputs["logits"].float()
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    def metrics(self) -> list[Metric]:
        """Returns average precision, and F1, precision and recall at the thresholds."""
        return [MultiLabelMetrics(self.thresholds)]

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Sets the thresholds that have the largest F1 of each label on the rows that `metrics` has seen.

        See `best_thresholds` for the choice between equals. On the rows that chose them F1 flatters.
        """
        for metric in metrics:
            if isinstance(metric, MultiLabelMetrics):
                self.thresholds = best_thresholds(metric.labels, metric.probabilities)
                metric.thresholds = self.thresholds
                chosen = [f"{name} {at:.2f}" for name, at in zip(self.names, self.thresholds, strict=True)]
                log(f"validation: thresholds by F1 of each label: {shorten(chosen)}")

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the labels that reach their thresholds, and all probabilities in the order of the labels."""
        shares = probabilities(outputs["logits"])
        said = shares >= torch.tensor(self.thresholds, dtype=torch.float64).numpy()
        rows = [
            {"prediction": self._named(chosen), "probabilities": row.tolist()}
            for chosen, row in zip(said, shares, strict=True)
        ]
        if "labels" not in batch:
            return rows
        true = batch["labels"].cpu().numpy() > 0.5
        return [{"label": self._named(chosen)} | row for chosen, row in zip(true, rows, strict=True)]

    def _named(self, chosen: Any) -> list[str]:
        return [name for name, here in zip(self.names, chosen.tolist(), strict=True) if here]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose cells cannot be read, and the held-out rows with a label that train lacks."""
        parts = [splits[split] for split in splits.labelled_by_source]
        known = {value for rows in parts for labels, _ in self.cells.rows(rows) for value in labels}
        return {split: self._unusable(rows, known) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows whose labels cannot be read, or are not of this target."""
        return self._unusable(rows, set(self.values))

    def _unusable(self, rows: Dataset, known: set[Any]) -> dict[int, BadRow]:
        found, where = {}, ", ".join(self.columns)
        for number, (labels, why) in enumerate(self.cells.rows(rows)):
            strange = [value for value in labels if value not in known]
            if why:
                found[number] = BadRow(f"label that cannot be read: {why}", where)
            elif strange and self.cells.form != "flags":
                found[number] = BadRow("label that train lacks", where, self._name(strange[0]))
        return found

    def counts(self, rows: Dataset) -> dict[str, int]:
        """Returns the number of rows that have each label."""
        found = Counter(value for labels, _ in self.cells.rows(rows) for value in labels)
        return {name: found.get(value, 0) for name, value in zip(self.names, self.values, strict=True)}

    def _name(self, value: Any) -> str:
        return self.names[self.ids[value]] if value in self.ids else str(value)

    def state(self) -> dict[str, Any]:
        """Returns where labels stand, what they are called, and the thresholds."""
        return {
            "problem_type": PROBLEM,
            "columns": self.columns,
            "form": self.cells.form,
            "separator": self.cells.separator,
            "names": self.names,
            "values": self.values,
            "thresholds": self.thresholds,
        }


def _cells(splits: Splits) -> tuple[LabelCells, str]:
    """Returns where labels stand and why they are taken from there.

    Raises:
        DataError: There is no such column, or it cannot hold several labels.
    """
    features, config = splits["train"].features, splits.config
    if config.label_columns:
        named_columns(features, config.label_columns)
        return LabelCells(tuple(config.label_columns), "flags"), "named by data.label_columns"
    column = find_column("label", features, config.label_column)
    kind = features[column.name]
    if config.label_separator:
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise DataError(
                f"data.label_separator: column '{column.name}' holds no texts that '{config.label_separator}' could "
                "separate; leave data.label_separator out for lists, or name another data.label_column."
            )
        return LabelCells((column.name,), "text", config.label_separator), column.why
    inner = getattr(kind, "feature", None)
    known = type(inner).__name__ == "ClassLabel" or str(getattr(inner, "dtype", "")).startswith(
        ("string", "int", "null")
    )
    if inner is None or not known:
        raise DataError(
            f"data.label_column: column '{column.name}' ({kind}) does not hold several labels a row. Give lists "
            "of names or of class numbers, texts with a data.label_separator, or a column of zeros and ones for each "
            "label (data.label_columns)."
        )
    return LabelCells((column.name,), "list"), column.why


def _look(cells: LabelCells, rows: Any) -> _Seen:
    seen = _Seen()
    if any(name not in rows.features for name in cells.columns):
        seen.bad = [(row, "no value") for row in range(len(rows))]
        return seen
    for row, (labels, why) in enumerate(cells.rows(rows)):
        if why:
            seen.bad.append((row, why))
        seen.counts.update(labels)
        seen.without += not labels and not why
    return seen


def _present(splits: Splits, seen: dict[str, _Seen]) -> set[Any]:
    return {value for split in splits.labelled_by_source for value in seen[split].counts}


def _problems(splits: Splits, seen: dict[str, _Seen], target: MultiLabelTarget) -> list[str]:
    out, train, present = [], seen["train"], _present(splits, seen)
    where = ", ".join(f"'{name}'" for name in target.columns)
    for split, found in seen.items() if not splits.lenient else ():
        if found.bad:
            out.append(
                f"data.source: {split} has {len(found.bad)} row(s) whose labels in column(s) {where} cannot be read: "
                f"{unusable(found.bad)}. Correct them, or leave them out with --data.on_error skip."
            )
        unseen = [value for value in found.counts if value not in present]
        if split != "train" and unseen and target.cells.form != "flags":
            names = sorted(target._name(value) for value in unseen)
            rows = sum(found.counts[value] for value in unseen)
            out.append(
                f"data.source: {split} has the label(s) {shorten(names)} in {rows} row(s), which train lacks: no model "
                "can learn them. Move rows into train, drop the label, or leave the rows out with "
                "--data.on_error skip."
            )
    if not train.counts and not train.bad:
        out.append(f"data.label_column: no training row has any label in column(s) {where}; there is nothing to learn.")
    everywhere = [target._name(value) for value, count in train.counts.items() if count == len(splits["train"])]
    if everywhere and len(everywhere) == len(target.names):
        out.append(
            f"data.label_column: every training row has the label(s) {shorten(everywhere)}; nothing tells rows apart."
        )
    return out


def _sortable(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value
