"""Label columns: multi-label cells, one column per label, and numeric targets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hftl.data.columns import INPUTS, arrow_column
from hftl.errors import DataError, nearest, shorten

if TYPE_CHECKING:
    from datasets import Dataset, Features

Form = Literal["list", "text", "flags"]
"""Encoding of multi-label targets. list: a list per cell. text: a string with a separator. flags: a 0/1 column per
label."""


@dataclass(frozen=True)
class LabelCells:
    """Columns and encoding of multi-label targets.

    Attributes:
        columns: One column, or with `flags` one column per label.
        form: Encoding of the labels.
        separator: Separator of the labels in a string.
    """

    columns: tuple[str, ...]
    form: Form
    separator: str | None = None

    def read(self, row: Mapping[str, Any]) -> list[Any]:
        """Returns the unique raw labels of a row, in order; [] for a row without labels.

        Raises:
            ValueError: A cell is neither 0 nor 1 (`flags`), or not a string (`text`).
        """
        if self.form == "flags":
            return [name for name in self.columns if _flag(row[name])]
        cell = row[self.columns[0]]
        if self.form == "text":
            if cell is not None and not isinstance(cell, str):
                raise ValueError(f"{cell!r} is not a string")
            cell = [label.strip() for label in (cell or "").split(self.separator)]
        return list(dict.fromkeys(label for label in cell or () if label not in (None, "", -1)))

    def rows(self, dataset: Dataset) -> Iterator[tuple[list[Any], str]]:
        """Yields (labels, problem) per row; the problem is empty for valid rows."""
        values = [arrow_column(dataset, name).to_pylist() for name in self.columns]
        for cells in zip(*values, strict=True):
            try:
                yield self.read(dict(zip(self.columns, cells, strict=True))), ""
            except ValueError as error:
                yield [], str(error)


def _flag(cell: Any) -> bool:
    if cell in (0, 1):  # includes True and 1.0
        return bool(cell)
    raise ValueError("no value" if cell is None or cell != cell else f"{cell!r} is neither 0 nor 1")


def named_columns(features: Features, names: Sequence[str]) -> None:
    """Validates the columns of `data.label_columns`.

    Raises:
        DataError: A column does not exist, is listed twice, or has a reserved name of model inputs.
    """
    problems = []
    for name in dict.fromkeys(names):
        if name in INPUTS:
            problems.append(f"data.label_columns: '{name}' is a reserved name of model inputs. Rename the column.")
        elif name not in features:
            problems.append(
                f"data.label_columns: there is no column '{name}'.{nearest(name, features)} "
                f"Columns: {', '.join(features)}."
            )
        elif list(names).count(name) > 1:
            problems.append(f"data.label_columns: '{name}' is listed more than once. Remove the duplicate.")
    if problems:
        raise DataError(*problems)


def read_numbers(dataset: Dataset, columns: Sequence[str]) -> Any:
    """Returns the values of K columns [N, K] float64; NaN for empty and non-numeric cells."""
    import numpy as np

    return np.array(
        [[parse_number(cell) for cell in arrow_column(dataset, name).to_pylist()] for name in columns], dtype=np.float64
    ).T.reshape(len(dataset), len(columns))


def parse_number(cell: Any) -> float:
    """Converts a cell to float; NaN for non-numeric cells."""
    return float(cell) if isinstance(cell, (int, float)) else math.nan


def unusable(rows: Sequence[tuple[int, str]]) -> str:
    """Formats (row number, value) pairs for an error message, at most five."""
    return shorten([f"row {row} ({why})" for row, why in rows], 5)
