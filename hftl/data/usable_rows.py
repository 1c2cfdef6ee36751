"""Loading of splits without the rows that the task rejects (`data.on_error skip`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftl.config.schema import DataConfig, PairLoss
from hftl.data.source import load_splits
from hftl.data.splits import Splits
from hftl.data.validation import InvalidRows, RowValidator, check_skipped_fraction, log_skipped_rows
from hftl.errors import ConfigError
from hftl.logging import suppress_logs


def load_usable_splits(
    config: DataConfig,
    make_task: Callable[[Splits], Any],
    rows: Any = None,
    folder: Path | None = None,
    pair_loss: PairLoss = "auto",
) -> tuple[Splits, InvalidRows]:
    """Returns the splits and, with `data.on_error skip`, the skipped rows.

    Rows are validated in the original splits of the source, before validation rows are split off. Every process
    validates all rows: there is no process group yet, and a cache would miss changed files.

    Args:
        config: Data section of the configuration.
        make_task: Builds the task that validates the rows.
        rows: Rows from Python in place of `config.source`; see `load_splits`.
        folder: Run folder whose quarantine.jsonl lists the rows, for the log; None without such a file.
        pair_loss: Value of `train.pair_loss`.

    Raises:
        ConfigError: The task lacks the method `invalid_rows()`.
        DataError: The data cannot be opened, or more than `config.max_skipped_fraction` of a split is invalid.
    """
    if config.on_error != "skip":
        return replace(load_splits(config, rows=rows), pair_loss=pair_loss), {}
    with suppress_logs():  # the second load logs the rows that remain
        all_splits = load_splits(replace(config, validation_fraction=0.0, max_train_samples_per_class=None), rows=rows)
        validator = make_task(replace(all_splits, lenient=True, pair_loss=pair_loss))
    if not isinstance(validator, RowValidator):
        raise ConfigError(
            f"data.on_error: 'skip' needs the method invalid_rows(), missing in {type(validator).__name__}. Set raise."
        )
    invalid = validator.invalid_rows(all_splits)
    sizes = {split: len(rows) for split, rows in all_splits.items()}
    check_skipped_fraction(invalid, sizes, config.max_skipped_fraction)
    log_skipped_rows(invalid, sizes, folder)
    return replace(load_splits(config, rows=rows, leave_out=invalid), pair_loss=pair_loss), invalid
