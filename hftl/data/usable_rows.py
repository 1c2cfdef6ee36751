"""Loading of the rows that a task can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftl.config.schema import DataConfig
from hftl.data.source import load_splits
from hftl.data.splits import Splits
from hftl.data.validation import BadRows, Judge, announce, refuse_many
from hftl.errors import ConfigError
from hftl.logging import muted


def load_usable_splits(
    config: DataConfig, make_task: Callable[[Splits], Any], rows: Any = None, folder: Path | None = None
) -> tuple[Splits, BadRows]:
    """Returns the splits and, with `data.on_error skip`, the rows that were left out.

    Rows are validated as the source has them, and left out before anything is cut off. Every process validates for
    itself: there is no process group yet, and a cache could not know whether a file has changed meanwhile.

    Args:
        config: The data section of a run.
        make_task: Builds the task that validates the rows.
        rows: Rows from Python in place of `config.source`; see `load_splits`.
        folder: Run folder whose quarantine.jsonl will list the rows; None if no file will.

    Raises:
        ConfigError: The task cannot validate rows.
        DataError: The data cannot be opened, or more than `config.max_skipped` of a split is invalid.
    """
    if config.on_error != "skip":
        return load_splits(config, rows=rows), {}
    with muted():  # logged once, on the rows that remain
        everything = load_splits(replace(config, validation_fraction=0.0, train_per_class=None), rows=rows)
        judge = make_task(replace(everything, lenient=True))
    if not isinstance(judge, Judge):
        raise ConfigError("data.on_error: this task cannot say which rows are of no use (bad_rows); say raise.")
    bad = judge.bad_rows(everything)
    sizes = {split: len(rows) for split, rows in everything.items()}
    refuse_many(bad, sizes, config.max_skipped)
    announce(bad, sizes, folder)
    return load_splits(config, rows=rows, leave_out=bad), bad
