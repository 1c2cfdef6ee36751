"""What stands in label columns: several labels in a cell or over several columns, and numbers."""

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
"""How several labels are written. list: a list in each cell. text: a text with a separator. flags: a column of zeros
and ones for each label."""


@dataclass(frozen=True)
class LabelCells:
    """Where the labels of a row stand, and how they are written.

    Attributes:
        columns: One column, or with `flags` the column of each label.
        form: How they are written.
        separator: Between labels in a text.
    """

    columns: tuple[str, ...]
    form: Form
    separator: str | None = None

    def read(self, row: Mapping[str, Any]) -> list[Any]:
        """Returns the labels of a row as the columns write them, each once; [] for a row that has none.

        Raises:
            ValueError: What stands there is neither 0 nor 1 (`flags`), or no text.
        """
        if self.form == "flags":
            return [name for name in self.columns if _flag(row[name])]
        cell = row[self.columns[0]]
        if self.form == "text":
            if cell is not None and not isinstance(cell, str):
                raise ValueError(f"{cell!r} is no text")
            cell = [part.strip() for part in (cell or "").split(self.separator)]
        return list(dict.fromkeys(label for label in cell or () if label not in (None, "", -1)))

    def rows(self, dataset: Dataset) -> Iterator[tuple[list[Any], str]]:
        """Yields the labels of every row, and why they cannot be read; the reason is empty where they can."""
        values = [arrow_column(dataset, name).to_pylist() for name in self.columns]
        for cells in zip(*values, strict=True):
            try:
                yield self.read(dict(zip(self.columns, cells, strict=True))), ""
            except ValueError as error:
                yield [], str(error)


def _flag(cell: Any) -> bool:
    if cell in (0, 1):  # True and 1.0 too
        return bool(cell)
    raise ValueError("no value" if cell is None or cell != cell else f"{cell!r} is neither 0 nor 1")


def named_columns(features: Features, names: Sequence[str]) -> None:
    """Checks that the columns of `data.label_columns` are there.

    Raises:
        DataError: One is not, or stands there twice, or is called as an input of models is.
    """
    problems = []
    for name in dict.fromkeys(names):
        if name in INPUTS:
            problems.append(f"data.label_columns: '{name}' is what models call an input; rename the column.")
        elif name not in features:
            problems.append(
                f"data.label_columns: there is no column '{name}'.{nearest(name, features)} "
                f"Columns: {', '.join(features)}."
            )
        elif list(names).count(name) > 1:
            problems.append(f"data.label_columns: '{name}' stands there more than once.")
    if problems:
        raise DataError(*problems)


def read_numbers(dataset: Dataset, columns: Sequence[str]) -> Any:
    """Returns the numbers in some columns [N, K] float64; NaN where a cell is empty or holds no number."""
    import numpy as np

    return np.array(
        [[parse_number(cell) for cell in arrow_column(dataset, name).to_pylist()] for name in columns], dtype=np.float64
    ).T.reshape(len(dataset), len(columns))


def parse_number(cell: Any) -> float:
    """Returns a cell as a number; NaN where it is none."""
    return float(cell) if isinstance(cell, (int, float)) else math.nan


def unusable(rows: Sequence[tuple[int, str]]) -> str:
    """Returns numbers of rows, each with what stands there, as the end of a sentence."""
    return shorten([f"row {row} ({why})" for row, why in rows], 5)
