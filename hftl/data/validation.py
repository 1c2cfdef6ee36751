"""Row validation and quarantine: invalid rows are skipped before training, with a reason (`data.on_error skip`).

Skipped rows are not replaced. The validation split, few-shot subsets, training order, counts and metrics depend only
on the rows that remain, as if the source had no invalid rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hftl.atomic_files import write_text
from hftl.errors import DataError, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

    from hftl.data.splits import Splits

FILE = "quarantine.jsonl"
"""File name in the run folder. Its row numbers refer to the original splits of the source, from 0, before validation
rows are split off; those in predictions.parquet and in messages refer to the rows that remain."""
_MAX_VALUE_LENGTH = 80
"""Number of characters of a value in the file."""


@dataclass(frozen=True)
class BadRow:
    """Invalid row with the reason."""

    reason: str
    """Format: `kind: details`."""
    column: str
    """Column of the invalid value."""
    value: str = ""
    """The invalid value."""
    path: str | None = None
    """File of the row (an image, for example), if any."""

    @property
    def kind(self) -> str:
        """The reason without details; messages count rows by kind."""
        return self.reason.partition(":")[0]


InvalidRows = Mapping[str, Mapping[int, BadRow]]
"""By split and row number."""


@runtime_checkable
class RowValidator(Protocol):
    """Inputs, targets and tasks with row validation."""

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the invalid rows; row numbers refer to `splits`."""
        ...


def validate_rows(splits: Splits, validators: Sequence[Any]) -> dict[str, dict[int, BadRow]]:
    """Returns the invalid rows of all validators; each validates only the rows that the previous ones accept.

    So a class whose training images are all damaged is missing in train for the label validator.

    Args:
        splits: All rows.
        validators: Inputs and targets; those without `invalid_rows()` are skipped.
    """
    import numpy as np

    invalid: dict[str, dict[int, BadRow]] = {split: {} for split in splits}
    for validator in validators:
        if not isinstance(validator, RowValidator):
            continue
        remaining = replace(splits, sets=drop_rows(splits, invalid))
        for split, rows in validator.invalid_rows(remaining).items():
            numbers = np.delete(np.arange(len(splits[split])), list(invalid[split]))
            invalid[split] |= {int(numbers[row]): problem for row, problem in rows.items()}
    return invalid


def drop_rows(sets: Mapping[str, Dataset], numbers: Mapping[str, Mapping[int, Any]]) -> dict[str, Dataset]:
    """Returns the splits without the rows of `numbers`, in their original order.

    Args:
        sets: Rows by split.
        numbers: Row numbers to drop, by split.

    Raises:
        DataError: A row number is out of range: the data changed since the rows were validated.
    """
    import numpy as np

    for split, rows in sets.items():
        beyond = [row for row in numbers.get(split, ()) if not 0 <= row < len(rows)]
        if beyond:
            raise DataError(
                f"data.source: {split} has {len(rows)} rows, but training skipped row {beyond[0]}; the data changed. "
                "Restore the training data."
            )

    return {
        split: rows.select(np.delete(np.arange(len(rows)), list(numbers[split]))) if numbers.get(split) else rows
        for split, rows in sets.items()
    }


def check_skipped_fraction(invalid: InvalidRows, sizes: Mapping[str, int], max_fraction: float) -> None:
    """Checks the fraction of invalid rows per split.

    Args:
        invalid: Invalid rows by split.
        sizes: Number of rows by split.
        max_fraction: Largest fraction of a split that may be skipped, in [0, 1].

    Raises:
        DataError: A split exceeds the fraction, or has no valid rows.
    """
    problems = []
    for split, rows in invalid.items():
        if not rows or len(rows) <= max_fraction * sizes[split] and len(rows) < sizes[split]:
            continue
        first = [f"row {row} ({bad.path or bad.column}): {bad.reason}" for row, bad in sorted(rows.items())[:5]]
        limit = f"; allowed: a fraction of {max_fraction:g} (data.max_skipped_fraction)"
        problems.append(
            f"data.source: {len(rows)} of {sizes[split]} rows of {split} are invalid ({_count_kinds(rows)}). First: "
            f"{shorten(first, 5)}{limit if len(rows) < sizes[split] else ''}. Repair the data."
        )
    if problems:
        raise DataError(*problems)


def records(invalid: InvalidRows) -> tuple[dict[str, Any], ...]:
    """Returns one JSON object per row with split, row, path, column, value and reason."""
    return tuple(
        {"split": split, "row": row, **asdict(replace(bad, value=bad.value[:_MAX_VALUE_LENGTH]))}
        for split, rows in invalid.items()
        for row, bad in sorted(rows.items())
    )


def log_skipped_rows(invalid: InvalidRows, sizes: Mapping[str, int], folder: Path | None) -> None:
    """Logs the number of skipped rows per split and reason."""
    for split, rows in invalid.items():
        if rows:
            listed = f", listed in {folder / FILE}" if folder else ""
            log(f"data: {split}: skipped {len(rows)} of {sizes[split]} rows ({_count_kinds(rows)}){listed}")


def write_quarantine(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `records` atomically into a run folder; without rows, removes the file of an earlier run."""
    if rows:
        write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        (folder / FILE).unlink(missing_ok=True)


def read_quarantine(folder: Path) -> dict[str, dict[int, Any]]:
    """Returns the skipped rows of a run by split and row number; {} without quarantine.jsonl.

    Raises:
        DataError: The file is damaged.
    """
    skipped: dict[str, dict[int, Any]] = {}
    path = folder / FILE
    if not path.is_file():
        return skipped
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            skipped.setdefault(row["split"], {})[int(row["row"])] = row
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the file is damaged ({type(error).__name__}). Restore or remove it.") from error
    return skipped


def left_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the number of rows in `records` by split."""
    return dict(Counter(row["split"] for row in rows))


def _count_kinds(rows: Mapping[int, BadRow]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in Counter(bad.kind for bad in rows.values()).most_common())
