"""Regression: squared error of standardized outputs, predictions in target units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hftl.data.columns import find_column
from hftl.data.label_columns import named_columns, read_numbers, unusable
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.tasks.capabilities import Capability, TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.regression.metrics import RegressionMetrics
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset

PROBLEM = "regression"
_MIN_RELATIVE_STD = 1e-5
"""Smallest standard deviation of a target, as a fraction of its mean: float32 outputs carry seven digits."""


class RegressionTarget:
    """One or several numbers per row.

    The model predicts in target units (`HeadSpec.scale`), so its outputs need no inverse transform.

    The best metric of one output is RMSE: the loss minimizes it, and it has the unit of the target. Correlations do not
    change if predictions are shifted or scaled. Several outputs may differ in their units, so their mean RMSE is
    meaningless. Their best metric is R², which has no unit and ranks models of one output as RMSE does.

    Args:
        columns: One numeric column per output.
        mean: Mean of the training rows, per output.
        std: Standard deviation of the training rows, per output.
        problem_type: Always `PROBLEM`; identifies this target in `state()`.
    """

    info = TargetInfo("numbers", frozenset({Capability.COMPARE, Capability.INTERVALS, Capability.EXPORT}))

    def __init__(
        self, columns: Sequence[str], mean: Sequence[float], std: Sequence[float], problem_type: str = PROBLEM
    ) -> None:
        self.columns = list(columns)
        self.mean, self.std = tuple(mean), tuple(std)
        self.best_metric = "rmse" if len(self.columns) == 1 else "r2"
        self.primary_metrics = ("rmse", "mae", "r2", "pearson", "spearman")
        self.info = replace(self.info, label_kind="one number" if len(self.columns) == 1 else "several numbers")
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits) -> RegressionTarget:
        """Detects the numeric columns, computes mean and standard deviation, and collects errors in `problems`."""
        train, config = splits["train"], splits.config
        try:
            if config.label_columns:
                named_columns(train.features, config.label_columns)
                columns, reason = list(config.label_columns), "named by data.label_columns"
            else:
                column = find_column("label", train.features, config.label_column)
                columns, reason = [column.name], column.why
            _check_types(train.features, columns)
        except DataError as error:
            target = cls(["label"], [0.0], [1.0])
            target.problems = error.problems
            return target
        values = read_numbers(train, columns)
        values = values[np.isfinite(values).all(1)]
        mean, std = (values.mean(0), values.std(0)) if len(values) else (np.zeros(len(columns)), np.zeros(len(columns)))
        target = cls(columns, mean.tolist(), std.tolist())
        target.problems = _problems(splits, columns, values, mean, std)
        ranges = [f"{name} {m:.4g} ± {s:.4g}" for name, m, s in zip(columns, mean, std, strict=True)]
        log(f"data: labels from column(s) {shorten(columns)} ({reason}); mean ± std in train: {shorten(ranges)}")
        return target

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per column, in target units."""
        return HeadSpec(model_class, len(self.columns), tuple(self.columns), PROBLEM, scale=(self.mean, self.std))

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the values [B, K] float32, or None if a row lacks one."""
        if any(example.get(column) is None for example in examples for column in self.columns):
            return None
        return torch.tensor([[float(example[column]) for column in self.columns] for example in examples])

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the squared error of each example [B], in standard deviations of train, mean over outputs."""
        errors = (outputs["logits"].float() - labels) / torch.tensor(self.std, device=labels.device)
        return errors.square().mean(-1)

    def metrics(self) -> list[Metric]:
        """Returns MAE, RMSE, R², Pearson and Spearman."""
        return [RegressionMetrics(self.columns)]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the predicted number, or the list of numbers in column order; with labels also those."""
        rows = [{"prediction": self._cell(row)} for row in outputs["logits"].float().cpu().tolist()]
        if "labels" not in batch:
            return rows
        return [
            {"label": self._cell(true)} | row for true, row in zip(batch["labels"].cpu().tolist(), rows, strict=True)
        ]

    def _cell(self, values: list[float]) -> Any:
        return values[0] if len(self.columns) == 1 else values

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with a missing or non-finite number."""
        return {split: self.unusable(rows) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows of one split with a missing or non-finite number."""
        values = read_numbers(rows, self.columns)
        return {
            row: BadRow("no number", self.columns[column], str(values[row, column]))
            for row, column in reversed(np.argwhere(~np.isfinite(values)).tolist())
        }

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "problem_type": PROBLEM,
            "columns": self.columns,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _check_types(features: Any, columns: Sequence[str]) -> None:
    invalid = [name for name in columns if not _is_numeric(features[name])]
    if invalid:
        listed = ", ".join(f"'{name}' ({features[name]})" for name in invalid)
        raise DataError(
            f"data.label_column: regression needs numbers, but column(s) {listed} hold other types. Convert them, or "
            "set --data.problem_type single_label_classification."
        )


def _is_numeric(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ == "Value" and ("int" in dtype or "float" in dtype or dtype == "bool")


def _problems(splits: Splits, columns: Sequence[str], values: Any, mean: Any, std: Any) -> list[str]:
    problems = []
    for split, rows in splits.items() if not splits.lenient else ():
        missing = [name for name in columns if name not in rows.features]
        if missing:
            problems.append(f"data.source: {split} lacks the column(s) {shorten(missing)}. Add them.")
            continue
        cells = read_numbers(rows, columns)
        invalid = np.flatnonzero(~np.isfinite(cells).all(1)).tolist()
        if invalid:
            listed = [
                (row, ", ".join(f"{name} {value:g}" for name, value in zip(columns, cells[row], strict=True)))
                for row in invalid
            ]
            problems.append(
                f"data.source: {split} has {len(invalid)} row(s) without a finite number in column(s) "
                f"{shorten(columns)}: {unusable(listed)}. Correct them, or set --data.on_error skip."
            )
    for name, center, scale in zip(columns, mean, std, strict=True):
        if not len(values):
            problems.append(
                f"data.label_column: no training row has a finite number in column '{name}'. Set another column."
            )
        elif scale <= 0:
            problems.append(
                f"data.label_column: column '{name}' has the same number ({center:g}) in all {len(values)} training "
                "rows and cannot be learned. Set another column."
            )
        elif scale < _MIN_RELATIVE_STD * abs(center):
            problems.append(
                f"data.label_column: values in column '{name}' ({center:.6g} ± {scale:.2g}) differ by less than "
                "float32 resolves. Subtract a constant."
            )
    return problems
