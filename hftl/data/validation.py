"""Rows that cannot be used: found before training, left out, and written down with the reason (`data.on_error skip`).

Nothing takes the place of a row that is left out. The rest is what the source would be without it: the validation cut,
few-label choices, order of training, counts and metrics are functions of the rows that remain.
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
"""Name in the run folder. Row numbers there are those of the source's own splits, from 0, before any cut; in
predictions.parquet and in messages they count the rows that remain."""
_SHOWN = 80
"""Characters of a value that are written down."""


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used."""

    reason: str
    """The kind of reason, and after a colon the details."""
    column: str
    """Where it was seen."""
    value: str = ""
    """What stands there."""
    path: str | None = None
    """File that the row is read from, if it has one of its own."""

    @property
    def kind(self) -> str:
        """The reason without its details: rows are counted by it."""
        return self.reason.partition(":")[0]


InvalidRows = Mapping[str, Mapping[int, BadRow]]
"""By split and row number."""


@runtime_checkable
class RowValidator(Protocol):
    """Inputs, targets and tasks that can tell which rows are of no use; one that cannot does not have this method."""

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows that cannot be used; numbers count the rows of `splits`."""
        ...


def validate_rows(splits: Splits, judges: Sequence[Any]) -> dict[str, dict[int, BadRow]]:
    """Returns what the judges find; each sees only the rows that those before it let pass.

    So a class whose training images are all broken is one that train lacks.

    Args:
        splits: All rows.
        judges: Those of them that are no `RowValidator` find nothing.
    """
    import numpy as np

    found: dict[str, dict[int, BadRow]] = {split: {} for split in splits}
    for judge in judges:
        if not isinstance(judge, RowValidator):
            continue
        rest = replace(splits, sets=without(splits, found))
        for split, bad in judge.invalid_rows(rest).items():
            numbers = np.delete(np.arange(len(splits[split])), list(found[split]))
            found[split] |= {int(numbers[row]): why for row, why in bad.items()}
    return found


def without(sets: Mapping[str, Dataset], rows: Mapping[str, Mapping[int, Any]]) -> dict[str, Dataset]:
    """Returns the splits without the rows of the given numbers, in their order.

    Raises:
        DataError: A split has no row of such a number: the data are not those that were judged.
    """
    import numpy as np

    for split, held in sets.items():
        beyond = [row for row in rows.get(split, ()) if not 0 <= row < len(held)]
        if beyond:
            raise DataError(
                f"data.source: {split} has {len(held)} rows now, but row {beyond[0]} was left out in training; the "
                "data are others than then."
            )

    return {
        split: held.select(np.delete(np.arange(len(held)), list(rows[split]))) if rows.get(split) else held
        for split, held in sets.items()
    }


def check_skipped_fraction(bad: InvalidRows, sizes: Mapping[str, int], most: float) -> None:
    """Checks that few enough rows are left out.

    Args:
        bad: The rows by split.
        sizes: Rows of each split.
        most: Largest share of a split that may be left out, in [0, 1].

    Raises:
        DataError: More are, or a whole split is.
    """
    problems = []
    for split, rows in bad.items():
        if not rows or len(rows) <= most * sizes[split] and len(rows) < sizes[split]:
            continue
        first = [f"row {row} ({why.path or why.column}): {why.reason}" for row, why in sorted(rows.items())[:5]]
        more = f" Data with more than {most:g} of such rows (data.max_skipped_fraction) are refused."
        problems.append(
            f"data.source: {len(rows)} of {sizes[split]} rows of {split} cannot be used ({_counted(rows)}). First: "
            f"{shorten(first, 5)}.{more if len(rows) < sizes[split] else ''} Repair the data."
        )
    if problems:
        raise DataError(*problems)


def records(bad: InvalidRows) -> tuple[dict[str, Any], ...]:
    """Returns a JSON object for each row: split, row, path, column, value and reason."""
    return tuple(
        {"split": split, "row": row, **asdict(replace(why, value=why.value[:_SHOWN]))}
        for split, rows in bad.items()
        for row, why in sorted(rows.items())
    )


def announce(bad: InvalidRows, sizes: Mapping[str, int], folder: Path | None) -> None:
    """Says how many rows of each split are left out, and why."""
    for split, rows in bad.items():
        if rows:
            listed = f", listed in {folder / FILE}" if folder else ""
            log(f"data: {split}: {len(rows)} of {sizes[split]} rows left out ({_counted(rows)}){listed}")


def write_quarantine(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `records` into a run folder, whole or not at all; without rows the file of an earlier run goes."""
    if rows:
        write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        (folder / FILE).unlink(missing_ok=True)


def read_quarantine(folder: Path) -> dict[str, dict[int, Any]]:
    """Returns what a run left out, by split and row number; nothing where it left out nothing.

    Raises:
        DataError: The file is damaged.
    """
    found: dict[str, dict[int, Any]] = {}
    path = folder / FILE
    if not path.is_file():
        return found
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["split"], {})[int(row["row"])] = row
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the list of rows that hftl wrote ({type(error).__name__}).") from error
    return found


def left_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns how many rows of each split are in `records`."""
    return dict(Counter(row["split"] for row in rows))


def _counted(rows: Mapping[int, BadRow]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in Counter(why.kind for why in rows.values()).most_common())
