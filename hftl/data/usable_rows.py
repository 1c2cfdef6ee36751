"""Loading of the rows that a task can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftl.config.schema import DataConfig, PairLoss
from hftl.data.source import load_splits
from hftl.data.splits import Splits
from hftl.data.validation import InvalidRows, RowValidator, announce, check_skipped_fraction
from hftl.errors import ConfigError
from hftl.logging import suppress_logs


def load_usable_splits(
    config: DataConfig,
    make_task: Callable[[Splits], Any],
    rows: Any = None,
    folder: Path | None = None,
    pair_loss: PairLoss = "auto",
) -> tuple[Splits, InvalidRows]:
    """Returns the splits and, with `data.on_error skip`, the rows that were left out.

    Rows are validated as the source has them, and left out before anything is cut off. Every process validates for
    itself: there is no process group yet, and a cache could not know whether a file has changed meanwhile.

    Args:
        config: The data section of a run.
        make_task: Builds the task that validates the rows.
        rows: Rows from Python in place of `config.source`; see `load_splits`.
        pair_loss: As `train.pair_loss`, for tasks of pairs.
        folder: Run folder whose quarantine.jsonl will list the rows; None if no file will.

    Raises:
        ConfigError: The task cannot validate rows.
        DataError: The data cannot be opened, or more than `config.max_skipped_fraction` of a split is invalid.
    """
    if config.on_error != "skip":
        return replace(load_splits(config, rows=rows), pair_loss=pair_loss), {}
    with suppress_logs():  # logged once, on the rows that remain
        everything = load_splits(replace(config, validation_fraction=0.0, max_train_samples_per_class=None), rows=rows)
        judge = make_task(replace(everything, lenient=True, pair_loss=pair_loss))
    if not isinstance(judge, RowValidator):
        raise ConfigError("data.on_error: this task cannot say which rows are of no use (invalid_rows); say raise.")
    bad = judge.invalid_rows(everything)
    sizes = {split: len(rows) for split, rows in everything.items()}
    check_skipped_fraction(bad, sizes, config.max_skipped_fraction)
    announce(bad, sizes, folder)
    return replace(load_splits(config, rows=rows, leave_out=bad), pair_loss=pair_loss), bad
