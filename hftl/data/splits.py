"""Which split a file or folder is: train, validation and test under the names that people give them."""

from __future__ import annotations

import re
from pathlib import Path

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
