"""Findings of a data audit: rows by split and number, with reasons, grouped by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FINDINGS: dict[str, str] = {
    "unreadable": "Unreadable rows",
    "empty": "Empty texts",
    "unlabelled": "Rows without a label, or with a class missing from train",
    "leaks": "Leaks: duplicates across splits",
    "near_leaks": "Near-leaks: near-duplicates across splits",
    "conflicting_labels": "Conflicting labels of equal inputs",
    "duplicates": "Duplicates within a split",
    "near_duplicates": "Near-duplicates within a split",
    "class_imbalance": "Class imbalance",
    "too_long": "Texts over the token limit",
    "outlier_images": "Outlier images (size, aspect ratio, channels)",
    "label_errors": "Label errors",
    "outliers": "Outliers",
}
"""Titles by name of finding, in the order of the page."""
Address = tuple[str, int]
"""Split, and row number in the source split, from 0."""


@dataclass(frozen=True)
class Entry:
    """Row of a finding."""

    split: str
    row: int
    why: str
    other: Address | None = None
    """Similar or conflicting row."""
    score: float | None = None
    """Score of the row; the description of the finding defines it."""


@dataclass(frozen=True)
class Finding:
    """Rows and problems of one kind."""

    name: str
    """A key of `FINDINGS`."""
    description: str
    """Criterion, method and thresholds; the reason if the data were not checked."""
    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()
    """Problems of a class or a split, not of single rows."""
    summary: str = ""
    """Row counts in more detail than by split; empty for counts by split."""
    checked: bool = True
    """Whether the data were checked for it."""

    @property
    def found(self) -> bool:
        """Whether there are rows or problems."""
        return bool(self.entries or self.problems)

    @property
    def counts(self) -> dict[str, int]:
        """Number of distinct rows by split."""
        return dict(Counter(split for split, _ in dict.fromkeys((entry.split, entry.row) for entry in self.entries)))

    @property
    def count_text(self) -> str:
        """Counts of rows and problems, as text."""
        if not self.checked:
            return "not checked"
        counts = [self.summary or format_counts(self.counts)] if self.entries else []
        counts += [f"{len(self.problems)} of classes or splits"] if self.problems else []
        return ", ".join(counts) or "none"

    def state(self) -> dict[str, Any]:
        """Returns the finding as JSON values."""
        return {
            "name": self.name,
            "looked": self.checked,
            "found": self.found,
            "said": self.count_text,
            "sentence": self.description,
            "counts": self.counts,
            "problems": list(self.problems),
            "rows": [asdict(entry) for entry in self.entries],
        }


class Numbering:
    """Consecutive row numbers over all splits.

    Args:
        sizes: Number of rows by split, in order.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.splits = list(sizes)
        self.starts = np.concatenate([[0], np.cumsum(list(sizes.values()))]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of_split(self, split: str) -> slice:
        """Returns the row numbers of a split."""
        index = self.splits.index(split)
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def split_of(self, numbers: Any) -> Any:
        """Returns the index of the split of each row number, [N]."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def address(self, number: int) -> Address:
        """Returns split and row of a row number."""
        index = int(self.split_of(number))
        return self.splits[index], int(number - self.starts[index])

    def rows(self, numbers: Sequence[int] | Any) -> dict[str, list[int]]:
        """Returns the rows at `numbers`, by split."""
        rows: dict[str, list[int]] = {split: [] for split in self.splits}
        for number in numbers:
            split, row = self.address(number)
            rows[split].append(row)
        return rows


def unchecked_by_reason(findings: Sequence[Finding]) -> dict[tuple[str, ...], str]:
    """Returns the reasons why data were not checked, by the names of the findings that share them."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        if not finding.checked:
            names.setdefault(finding.description, []).append(finding.name)
    return {tuple(sharing): reason for reason, sharing in names.items()}


def format_counts(counts: dict[str, int]) -> str:
    """Returns "3 rows of train, 1 row of test"."""
    return ", ".join(f"{n:,} row{'s' * (n != 1)} of {split}" for split, n in counts.items()) or "no rows"
