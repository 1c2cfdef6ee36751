"""What a look at data found: rows by split and number, each with the reason, under the name of a kind of finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FINDINGS: dict[str, str] = {
    "unreadable": "Rows that cannot be read",
    "empty": "Empty texts",
    "unlabelled": "Rows without a label, or of a class that train lacks",
    "leaks": "Held-out rows that stand in another split",
    "near_leaks": "Held-out rows that almost stand in another split",
    "conflicting_labels": "The same input with different labels",
    "duplicates": "Rows that stand twice in a split",
    "near_duplicates": "Rows that almost stand twice in a split",
    "class_imbalance": "Classes that are rare, missing, or shared out differently",
    "too_long": "Texts longer than the model reads",
    "outlier_images": "Images unlike the others in size, shape or channels",
    "label_errors": "Labels that are likely wrong",
    "outliers": "Rows far from all others",
}
"""Title of each kind of finding by its name, in the order of the page."""
Address = tuple[str, int]
"""Split, and number of a row in it as the source has it, from 0."""


@dataclass(frozen=True)
class Entry:
    """A row of a finding."""

    split: str
    row: int
    why: str
    other: Address | None = None
    """The row that it is like, or contradicts."""
    score: float | None = None
    """How much so; its meaning is in the sentence of the finding."""


@dataclass(frozen=True)
class Finding:
    """All that was found of one kind."""

    name: str
    """A key of `FINDINGS`."""
    sentence: str
    """What was found, how, and by which limits."""
    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()
    """What is true of a class or a split and not of single rows."""
    summary: str = ""
    """How many rows, where the number by split does not say enough."""
    looked: bool = True
    """False where it could not be looked for; the sentence says why."""

    @property
    def found(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.entries or self.problems)

    @property
    def counts(self) -> dict[str, int]:
        """Number of different rows by split."""
        return dict(Counter(split for split, _ in dict.fromkeys((each.split, each.row) for each in self.entries)))

    @property
    def said(self) -> str:
        """How much was found, in a few words."""
        if not self.looked:
            return "not looked for"
        parts = [self.summary or format_counts(self.counts)] if self.entries else []
        parts += [f"{len(self.problems)} of classes or splits"] if self.problems else []
        return ", ".join(parts) or "none"

    def state(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {
            "name": self.name,
            "looked": self.looked,
            "found": self.found,
            "said": self.said,
            "sentence": self.sentence,
            "counts": self.counts,
            "problems": list(self.problems),
            "rows": [asdict(entry) for entry in self.entries],
        }


class Numbering:
    """One number for each row of all splits: the splits one after the other.

    Args:
        sizes: Rows of each split, in order.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.splits = list(sizes)
        self.starts = np.concatenate([[0], np.cumsum(list(sizes.values()))]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of_split(self, split: str) -> slice:
        """Returns the numbers of a split."""
        place = self.splits.index(split)
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def split_of(self, numbers: Any) -> Any:
        """Returns the position of the split of each number [N]."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def address(self, number: int) -> Address:
        """Returns split and row of a number."""
        place = int(self.split_of(number))
        return self.splits[place], int(number - self.starts[place])

    def rows(self, numbers: Sequence[int] | Any) -> dict[str, list[int]]:
        """Returns the rows of each split among `numbers`."""
        out: dict[str, list[int]] = {split: [] for split in self.splits}
        for number in numbers:
            split, row = self.address(number)
            out[split].append(row)
        return out


def format_counts(counts: dict[str, int]) -> str:
    """Returns "3 rows of train, 1 row of test"."""
    return ", ".join(f"{n:,} row{'s' * (n != 1)} of {split}" for split, n in counts.items()) or "no rows"
