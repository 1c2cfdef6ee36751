"""Which split a file or folder is: train, validation and test under the names that people give them."""

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


def split_of(name: str) -> str | None:
    """Returns the split a folder or file name stands for: `val` -> validation, `train-00000-of-00002` -> train."""
    first = first_word(name)
    return next((ours for ours, names in SPLIT_NAMES.items() if first in names), None)


def first_word(name: str) -> str:
    """Returns the letters that a name begins with, in lower case."""
    return re.split(r"[^a-z]+", name.lower())[0]


def split_folders(path: Path) -> dict[str, Path]:
    """Returns the folders named after splits; of `train` and `train_old` the first."""
    out: dict[str, Path] = {}
    for sub in sorted(path.iterdir()):
        split = split_of(sub.name)
        if split and sub.is_dir():
            out.setdefault(split, sub)
    return out


@dataclass(frozen=True)
class Splits(Mapping[str, "Dataset"]):
    """Rows by split name (`train`, `validation`, `test`; the last two may be absent), and how they were asked for."""

    sets: dict[str, Dataset]
    config: DataConfig
    class_names: list[str] | None = None
    """Names of integer labels where they stand beside the tables (labels.json), else None."""
    cut: bool = False
    """Whether the source has no validation split, so that it was cut from train."""
    pair_loss: PairLoss = "auto"
    """Setting `train.pair_loss`, for targets of pairs."""
    lenient: bool = False
    """Rows that cannot be used are no reason for a task to refuse these: they will be looked for and left out."""

    @property
    def labelled_by_source(self) -> tuple[str, ...]:
        """The splits whose labels are those to learn: a rare one may stand in the validation cut alone."""
        return ("train", "validation") if self.cut else ("train",)

    def __getitem__(self, split: str) -> Dataset:
        return self.sets[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)


def cut_validation(splits: Splits) -> dict[str, Dataset]:
    """Returns the splits with a validation part cut from train where it was missing."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    config, sets = splits.config, dict(splits.sets)
    if "validation" in sets or config.validation_fraction == 0:
        return sets
    rows = sets["train"]
    codes = _label_codes(rows, config)
    # a class with a single row cannot stand on both sides
    stratify = codes if codes is not None and np.unique(codes, return_counts=True)[1].min() > 1 else None
    size = max(round(len(rows) * config.validation_fraction), 1 if stratify is None else len(np.unique(stratify)))
    try:
        kept, cut = train_test_split(np.arange(len(rows)), test_size=size, random_state=config.seed, stratify=stratify)
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction: {len(rows)} training rows are too few to cut a validation split ({error}). "
            "Give a validation split, or --data.validation_fraction 0 to train without one."
        ) from error
    how = "stratified by label" if stratify is not None else "at random"
    log(f"data: no validation split; {size} of {len(rows)} training rows cut off {how} (data.seed {config.seed})")
    return {**sets, "train": rows.select(np.sort(kept)), "validation": rows.select(np.sort(cut))}


def keep_few(rows: Dataset, config: DataConfig) -> Dataset:
    """Returns at most `config.max_train_samples_per_class` rows of each class."""
    import numpy as np

    codes = _label_codes(rows, config)
    if config.max_train_samples_per_class is None or codes is None:
        return rows
    order = np.random.default_rng(config.seed).permutation(len(rows))
    kept = [order[codes[order] == code][: config.max_train_samples_per_class] for code in np.unique(codes)]
    return rows.select(np.sort(np.concatenate(kept)))


def _label_codes(rows: Dataset, config: DataConfig) -> Any:
    """Returns the label of each row as an integer [N], or None where the labels are not classes."""
    try:
        column = find_column("label", rows.features, config.label_column)
    except DataError:
        return None  # said later, by the task, with everything else
    return label_codes(rows, column.name)
