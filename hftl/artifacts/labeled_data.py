"""Labelled rows for a saved model: its own data again, or other data with its labels written as in training."""

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


def labelled_rows(
    task: Task,
    trained: DataConfig,
    source: str | None,
    split: str,
    left_out: Mapping[str, Mapping[int, Any]] | None = None,
) -> Dataset:
    """Returns the rows of one split with labels that the model knows.

    Args:
        task: The saved model's.
        trained: The data section that it was trained with.
        source: As `data.source`; the data that it was trained on where None.
        split: `train`, `validation` or `test`.
        left_out: The rows that training left out, by split and number; they are left out of its own data again. In
            other data every row counts, and one that cannot be used is an error that names it.

    Raises:
        DataError: The data cannot be read, lack the split, or have labels that the model does not know.
    """
    config = trained
    if source is not None:
        column = next((name for name, kind in input_column_types(task).items() if kind == "image"), None)
        config = replace(
            config, source=source, max_train_samples_per_class=None, validation_fraction=0.0, image_column=column
        )
    splits = load_splits(config, training=False, leave_out=left_out if source is None else None)
    if split not in splits:
        raise DataError(f"--split: '{config.source}' has no {split} rows; say --split {' or --split '.join(splits)}.")
    rows = _like_training(splits[split], task)
    _check_labels(rows, task)
    return rows


def _like_training(rows: Dataset, task: Task) -> Dataset:
    """Returns rows whose labels are written as in training.

    Another source may number its classes otherwise, or name them where training had numbers.
    """
    from datasets import ClassLabel, Value

    target = task.state()["target"]
    column = target.get("column")
    kind = rows.features.get(column)
    known = target.get("names")
    for name in target.get("columns") or []:
        inner = getattr(rows.features.get(name), "feature", None)
        if known and isinstance(inner, ClassLabel) and list(inner.names) != known:
            raise DataError(
                f"--data: column '{name}' numbers the labels {shorten(inner.names)}; the model {shorten(known)}. "
                "Give lists of names where training had names, or the same classes."
            )
    if kind is None or "values" not in target or isinstance(kind, ClassLabel) and list(kind.names) == target["names"]:
        return rows
    by_name = dict(zip(target["names"], target["values"], strict=True))
    if not isinstance(kind, ClassLabel):
        numbered = all(isinstance(value, int) for value in target["values"])
        if not numbered or kind.dtype not in ("string", "large_string"):
            return rows
    unknown = sorted(_written(rows, column) - set(by_name))
    if unknown:
        raise DataError(
            f"--data: the model does not know the class(es) {shorten(unknown)}; it knows {shorten(list(by_name))}."
        )
    features = rows.features.copy()
    features[column] = Value("int64")
    names = kind.names if isinstance(kind, ClassLabel) else None
    return rows.map(lambda row: {column: by_name[names[row[column]] if names else row[column]]}, features=features)


def _written(rows: Dataset, column: str) -> set[str]:
    """Returns the class names that occur in a column of names or of a `ClassLabel`."""
    kind = rows.features[column]
    values = [value for value in arrow_column(rows, column).unique().to_pylist() if value is not None]
    return {kind.names[value] if hasattr(kind, "names") else value for value in values}


def _check_labels(rows: Dataset, task: Task) -> None:
    target = task.state()["target"]
    columns = target.get("columns") or [target.get("column")]
    missing = [str(name) for name in columns if name not in rows.features]
    if missing:
        raise DataError(
            f"--data: there is no label column '{', '.join(missing)}'. Columns: {', '.join(rows.features)}."
        )
    look = getattr(getattr(task, "target", None), "unusable", None)
    bad = look(rows) if look else {}
    if bad:
        said = [f"row {row}: {why.reason} {why.value}".rstrip() for row, why in bad.items()]
        raise DataError(f"--data: {len(bad)} row(s) have labels that cannot be used: {shorten(said, 4)}.")
    if "column" not in target or "values" not in target:
        return
    column = target["column"]
    known, unknown = set(target["values"]), set()
    for start in range(0, len(rows), 10_000):
        unknown |= set(rows.select_columns([column])[start : start + 10_000][column]) - known
    if unknown:
        raise DataError(
            f"--data: column '{column}' holds labels the model does not know: {sorted(map(str, unknown))[:8]}."
        )
