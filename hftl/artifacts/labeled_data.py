"""Labeled rows for evaluating a saved model: its training data source, or another source with mapped labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.columns import arrow_column
from hftl.data.source import load_splits
from hftl.errors import DataError, shorten
from hftl.tasks.task import Task, input_column_types

if TYPE_CHECKING:
    from datasets import Dataset


def labeled_rows(
    task: Task,
    data: DataConfig,
    source: str | None,
    split: str,
    left_out: Mapping[str, Mapping[int, Any]] | None = None,
) -> Dataset:
    """Returns the rows of one split, with labels mapped to those of the model.

    Args:
        task: Task of the saved model.
        data: Data section of the training run.
        source: Data source, like `data.source`; None uses the training data of the run.
        split: `train`, `validation` or `test`.
        left_out: Rows quarantined by the training run, by split and row number. They are skipped in the training
            data; in another source every invalid row is an error.

    Raises:
        DataError: The data cannot be read, lack the split, or contain labels that are unknown to the model.
    """
    config = data
    if source is not None:
        column = next((name for name, kind in input_column_types(task).items() if kind == "image"), None)
        config = replace(
            config, source=source, max_train_samples_per_class=None, validation_fraction=0.0, image_column=column
        )
    splits = load_splits(config, training=False, leave_out=left_out if source is None else None)
    if split not in splits:
        raise DataError(f"--split: '{split}' is missing in '{config.source}'; allowed: {', '.join(splits)}.")
    rows = _map_labels(splits[split], task)
    _check_labels(rows, task)
    return rows


def _map_labels(rows: Dataset, task: Task) -> Dataset:
    """Returns rows whose labels have the type and values of the training data.

    Another source may order its classes differently, or contain class names instead of numbers.
    """
    from datasets import ClassLabel, Value

    target = task.state()["target"]
    column = target.get("column")
    feature = rows.features.get(column)
    model_labels = target.get("names")
    for name in target.get("columns") or []:
        element = getattr(rows.features.get(name), "feature", None)
        if model_labels and isinstance(element, ClassLabel) and list(element.names) != model_labels:
            raise DataError(
                f"--data: column '{name}' has the labels {shorten(element.names)}; the model has "
                f"{shorten(model_labels)}. Pass lists of label names, or the same ClassLabel names."
            )
    is_same_class_label = isinstance(feature, ClassLabel) and list(feature.names) == target["names"]
    if feature is None or "values" not in target or is_same_class_label:
        return rows
    value_of = dict(zip(target["names"], target["values"], strict=True))
    if not isinstance(feature, ClassLabel):
        is_numeric = all(isinstance(value, int) for value in target["values"])
        if not is_numeric or feature.dtype not in ("string", "large_string"):
            return rows
    unknown = sorted(_class_names(rows, column) - set(value_of))
    if unknown:
        raise DataError(f"--data: class(es) {shorten(unknown)} are unknown; allowed: {shorten(list(value_of))}.")
    features = rows.features.copy()
    features[column] = Value("int64")
    names = feature.names if isinstance(feature, ClassLabel) else None
    return rows.map(lambda row: {column: value_of[names[row[column]] if names else row[column]]}, features=features)


def _class_names(rows: Dataset, column: str) -> set[str]:
    """Returns the distinct class names of a string or `ClassLabel` column."""
    feature = rows.features[column]
    values = [value for value in arrow_column(rows, column).unique().to_pylist() if value is not None]
    return {feature.names[value] if hasattr(feature, "names") else value for value in values}


def _check_labels(rows: Dataset, task: Task) -> None:
    target = task.state()["target"]
    columns = target.get("columns") or [target.get("column")]
    missing = [str(name) for name in columns if name not in rows.features]
    if missing:
        raise DataError(
            f"--data: label column(s) '{', '.join(missing)}' are missing. Columns: {', '.join(rows.features)}."
        )
    find_invalid = getattr(getattr(task, "target", None), "unusable", None)
    invalid = find_invalid(rows) if find_invalid else {}
    if invalid:
        listed = [f"row {row}: {cause.reason} {cause.value}".rstrip() for row, cause in invalid.items()]
        raise DataError(f"--data: {len(invalid)} row(s) have invalid labels: {shorten(listed, 4)}.")
    if "column" not in target or "values" not in target:
        return
    column = target["column"]
    known, unknown = set(target["values"]), set()
    for start in range(0, len(rows), 10_000):
        unknown |= set(rows.select_columns([column])[start : start + 10_000][column]) - known
    if unknown:
        raise DataError(
            f"--data: column '{column}' contains labels unknown to the model: {sorted(map(str, unknown))[:8]}."
        )
