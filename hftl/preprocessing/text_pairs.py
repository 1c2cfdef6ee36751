"""Text pairs for bi-encoders: separate token ids of both texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hftl.loading.loader import Example
from hftl.preprocessing.tokenization import TextRows

PAIR = "pair_"
"""Prefix of the inputs of second texts."""


class TextPairRows:
    """Rows with the token ids of one or two texts.

    Args:
        first: Rows of the first texts, with all other columns.
        second: Rows of the second texts, in the same order, or None.
    """

    def __init__(self, first: TextRows, second: TextRows | None) -> None:
        self.first = first
        self.second = second
        self.lengths = first.lengths if second is None else np.maximum(first.lengths, second.lengths)

    def __len__(self) -> int:
        return len(self.first)

    def identity(self) -> list[str]:
        """Returns the cache key of the examples."""
        return [rows.identity() for rows in (self.first, self.second) if rows is not None]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `input_ids` and, for pairs, `pair_input_ids`."""
        examples = self.first.fetch(rows, epoch)
        if self.second is not None:
            for example, second in zip(examples, self.second.fetch(rows, epoch), strict=True):
                example[PAIR + "input_ids"] = second["input_ids"]
        return examples
