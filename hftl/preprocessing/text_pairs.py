"""Pairs of texts that are looked at one by one: token ids of both, apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hftl.loading.loader import Example
from hftl.preprocessing.tokenization import TextRows

PAIR = "pair_"
"""What the names of second texts' inputs begin with."""


class TextPairRows:
    """Rows with the token ids of one text or two.

    Args:
        first: Rows of the first texts, with whatever else stays in an example.
        second: Rows of the second ones, in the same order; None where there are none.
    """

    def __init__(self, first: TextRows, second: TextRows | None) -> None:
        self.first = first
        self.second = second
        self.lengths = first.lengths if second is None else np.maximum(first.lengths, second.lengths)

    def __len__(self) -> int:
        return len(self.first)

    def identity(self) -> list[str]:
        """Returns what the examples depend on."""
        return [rows.identity() for rows in (self.first, self.second) if rows is not None]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `input_ids` and, where there are second texts, `pair_input_ids`."""
        examples = self.first.fetch(rows, epoch)
        if self.second is not None:
            for example, other in zip(examples, self.second.fetch(rows, epoch), strict=True):
                example[PAIR + "input_ids"] = other["input_ids"]
        return examples
