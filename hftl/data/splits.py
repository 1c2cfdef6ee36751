"""Dataset splits: names of files and folders, the validation split, and few-shot subsets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig, PairLoss
from hftl.data.columns import find_column, label_codes
from hftl.errors import DataError
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset


SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def parse_split_name(name: str) -> str | None:
    """Returns the split of a file or folder name, or None: `val` -> validation, `train-00000-of-00002` -> train."""
    first = first_word(name)
    return next((split for split, names in SPLIT_NAMES.items() if first in names), None)


def first_word(name: str) -> str:
    """Returns the leading letters of a name, in lower case."""
    return re.split(r"[^a-z]+", name.lower())[0]


def split_folders(path: Path) -> dict[str, Path]:
    """Returns the folders with split names; the first in sorted order (`train` before `train_old`)."""
    out: dict[str, Path] = {}
    for sub in sorted(path.iterdir()):
        split = parse_split_name(sub.name)
        if split and sub.is_dir():
            out.setdefault(split, sub)
    return out


@dataclass(frozen=True)
class Splits(Mapping[str, "Dataset"]):
    """Rows by split name (`train`, optional `validation` and `test`), with the configuration they were loaded from."""

    sets: dict[str, Dataset]
    config: DataConfig
    class_names: list[str] | None = None
    """Names of integer labels from labels.json next to the data, else None."""
    cut: bool = False
    """Whether the validation split was split off train."""
    pair_loss: PairLoss = "auto"
    """Setting `train.pair_loss`, for targets of text pairs."""
    lenient: bool = False
    """Whether tasks accept invalid rows: with `data.on_error skip` they are detected and skipped later."""

    @property
    def labelled_by_source(self) -> tuple[str, ...]:
        """Splits that define the classes; includes a validation split that was split off train (rare classes)."""
        return ("train", "validation") if self.cut else ("train",)

    def __getitem__(self, split: str) -> Dataset:
        return self.sets[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)


def split_off_validation(splits: Splits) -> dict[str, Dataset]:
    """Returns the splits with a validation split; splits off `config.validation_fraction` of train if missing.

    Raises:
        DataError: Train has too few rows.
    """
    import numpy as np
    from sklearn.model_selection import train_test_split

    config, sets = splits.config, dict(splits.sets)
    if "validation" in sets or config.validation_fraction == 0:
        return sets
    rows = sets["train"]
    codes = _label_codes(rows, config)
    # scikit-learn cannot stratify a class with a single row
    stratify = codes if codes is not None and np.unique(codes, return_counts=True)[1].min() > 1 else None
    size = max(round(len(rows) * config.validation_fraction), 1 if stratify is None else len(np.unique(stratify)))
    try:
        train, validation = train_test_split(
            np.arange(len(rows)), test_size=size, random_state=config.seed, stratify=stratify
        )
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction: {len(rows)} training rows are too few for a validation split ({error}). "
            "Add a validation split, or set --data.validation_fraction 0 to train without one."
        ) from error
    how = "stratified by label" if stratify is not None else "at random"
    log(f"data: no validation split; split off {size} of {len(rows)} training rows {how} (data.seed {config.seed})")
    return {**sets, "train": rows.select(np.sort(train)), "validation": rows.select(np.sort(validation))}


def limit_samples_per_class(rows: Dataset, config: DataConfig) -> Dataset:
    """Returns at most `config.max_train_samples_per_class` rows per class, sampled with `config.seed`."""
    import numpy as np

    codes = _label_codes(rows, config)
    if config.max_train_samples_per_class is None or codes is None:
        return rows
    order = np.random.default_rng(config.seed).permutation(len(rows))
    sampled = [order[codes[order] == code][: config.max_train_samples_per_class] for code in np.unique(codes)]
    return rows.select(np.sort(np.concatenate(sampled)))


def _label_codes(rows: Dataset, config: DataConfig) -> Any:
    """Returns integer label codes [N], or None without class labels."""
    try:
        column = find_column("label", rows.features, config.label_column)
    except DataError:
        return None  # the task reports it together with its other problems
    return label_codes(rows, column.name)
