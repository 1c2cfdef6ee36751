"""Numbers: squared error in units of the training rows' standard deviation, answers in units of the target."""

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
_FINEST = 1e-5
"""Smallest spread of a target, as a share of its mean: float32 outputs carry seven digits."""


class RegressionTarget:
    """One number a row, or several.

    The network answers in the target's own units (`HeadSpec.scale`), so nothing has to be undone after it.

    Weights are kept by RMSE, which is what the loss lowers, in units that a reader knows; correlations do not see an
    answer that is shifted or stretched. Several outputs may have several units, of which a mean says nothing: there R²,
    which orders models of one output as RMSE does and has no unit.

    Args:
        columns: A column of numbers for each output.
        mean: Of the training rows, for each output.
        std: Their standard deviation, for each output.
        problem_type: Always `PROBLEM`: what tells the state of this target from that of others.
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
        """Detects the columns of numbers, and measures mean and spread; what is wrong goes into `problems`."""
        train, config = splits["train"], splits.config
        try:
            if config.label_columns:
                named_columns(train.features, config.label_columns)
                columns, why = list(config.label_columns), "named by data.label_columns"
            else:
                column = find_column("label", train.features, config.label_column)
                columns, why = [column.name], column.why
            _check_types(train.features, columns)
        except DataError as error:
            found = cls(["label"], [0.0], [1.0])
            found.problems = error.problems
            return found
        values = read_numbers(train, columns)
        values = values[np.isfinite(values).all(1)]
        mean, std = (values.mean(0), values.std(0)) if len(values) else (np.zeros(len(columns)), np.zeros(len(columns)))
        found = cls(columns, mean.tolist(), std.tolist())
        found.problems = _problems(splits, columns, values, mean, std)
        spread = [f"{name} {m:.4g} ± {s:.4g}" for name, m, s in zip(columns, mean, std, strict=True)]
        log(f"data: numbers from column(s) {shorten(columns)} ({why}); mean ± spread in train: {shorten(spread)}")
        return found

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per column, in the units of the column."""
        return HeadSpec(model_class, len(self.columns), tuple(self.columns), PROBLEM, scale=(self.mean, self.std))

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the numbers [B, K] float32, or None where rows have none."""
        if any(example.get(column) is None for example in examples for column in self.columns):
            return None
        return torch.tensor([[float(example[column]) for column in self.columns] for example in examples])

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the squared error of each example [B], in spreads of the training rows, mean over outputs."""
        errors = (outputs["logits"].float() - labels) / torch.tensor(self.std, device=labels.device)
        return errors.square().mean(-1)

    def metrics(self) -> list[Metric]:
        """Returns MAE, RMSE, R², Pearson and Spearman."""
        return [RegressionMetrics(self.columns)]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the number, or the list of numbers in the order of the columns."""
        rows = [{"prediction": self._read(row)} for row in outputs["logits"].float().cpu().tolist()]
        if "labels" not in batch:
            return rows
        return [
            {"label": self._read(true)} | row for true, row in zip(batch["labels"].cpu().tolist(), rows, strict=True)
        ]

    def _read(self, values: list[float]) -> Any:
        return values[0] if len(self.columns) == 1 else values

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows where a number is missing or not finite."""
        return {split: self.unusable(rows) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows where a number is missing or not finite."""
        values = read_numbers(rows, self.columns)
        return {
            row: BadRow("no number", self.columns[place], str(values[row, place]))
            for row, place in reversed(np.argwhere(~np.isfinite(values)).tolist())
        }

    def state(self) -> dict[str, Any]:
        """Returns columns, mean and spread."""
        return {
            "problem_type": PROBLEM,
            "columns": self.columns,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _check_types(features: Any, columns: Sequence[str]) -> None:
    strange = [name for name in columns if not _numeric(features[name])]
    if strange:
        kinds = ", ".join(f"'{name}' ({features[name]})" for name in strange)
        raise DataError(
            f"data.label_column: a regression needs numbers, which column(s) {kinds} do not hold. Write them as "
            "numbers, or say --data.problem_type single_label_classification."
        )


def _numeric(feature: Any) -> bool:
    kind = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ == "Value" and ("int" in kind or "float" in kind or kind == "bool")


def _problems(splits: Splits, columns: Sequence[str], values: Any, mean: Any, std: Any) -> list[str]:
    out = []
    for split, rows in splits.items() if not splits.lenient else ():
        missing = [name for name in columns if name not in rows.features]
        if missing:
            out.append(f"data.source: {split} lacks the column(s) {shorten(missing)}.")
            continue
        found = read_numbers(rows, columns)
        bad = np.flatnonzero(~np.isfinite(found).all(1)).tolist()
        if bad:
            shown = [
                (row, ", ".join(f"{name} {value:g}" for name, value in zip(columns, found[row], strict=True)))
                for row in bad
            ]
            out.append(
                f"data.source: {split} has {len(bad)} row(s) without a finite number in column(s) {shorten(columns)}: "
                f"{unusable(shown)}. Correct them, or leave them out with --data.on_error skip."
            )
    for name, centre, spread in zip(columns, mean, std, strict=True):
        if not len(values):
            out.append(f"data.label_column: no training row has a finite number in column '{name}'.")
        elif spread <= 0:
            out.append(
                f"data.label_column: all {len(values)} training rows have the same number in column '{name}' "
                f"({centre:g}); there is nothing to learn."
            )
        elif spread < _FINEST * abs(centre):
            out.append(
                f"data.label_column: the numbers in column '{name}' ({centre:.6g} ± {spread:.2g}) differ in digits "
                "that float32 does not carry; subtract a constant from them."
            )
    return out
