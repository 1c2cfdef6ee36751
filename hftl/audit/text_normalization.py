"""Texts as keys: two texts have the same key when a person would say that they are the same.

The key forgets how a text is encoded (Unicode NFKC), its case (`str.casefold`), blanks and punctuation (all of
Unicode's P categories); signs that carry meaning stay (`+ $ = <`, emoji). A text of nothing but punctuation keeps it.
Whether two rows are the same letter by letter is a second key, of the texts as they stand.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1_000
"""Rows in memory at a time."""
_BETWEEN = "\x1f"
"""Stands between the texts of a pair; ASCII's unit separator, which no text has."""


class _Blanked(dict[int, str]):
    """For `str.translate`: punctuation -> blank, each character looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character).startswith("P") else character
        return self[code]


_BLANKED = _Blanked()


def normalise(text: str) -> str:
    """Returns what is compared of a text: see above."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.translate(_BLANKED).split()) or " ".join(plain.split())


def key_of(text: str | bytes) -> int:
    """Returns 64 bits of BLAKE2b: two of a million different texts agree with a probability of 3e-8."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def text_rows(rows: Dataset, columns: Sequence[str], numbers: Sequence[int] | None = None) -> Iterator[list[list[str]]]:
    """Yields batches of rows as lists of their texts; what is no text is an empty one.

    Args:
        rows: Rows of a split.
        columns: One text column, or two for pairs.
        numbers: The rows to read, in this order; all of them without.
    """
    chosen = rows.select_columns(list(columns))
    for start in range(0, len(rows) if numbers is None else len(numbers), BATCH):
        table = chosen[start : start + BATCH] if numbers is None else chosen[list(numbers[start : start + BATCH])]
        values = zip(*(table[name] for name in columns), strict=True)
        yield [[value if isinstance(value, str) else "" for value in row] for row in values]


def normalised_pair(texts: Sequence[str]) -> str:
    """Returns the texts of a row as one normalised text; the order of a pair counts."""
    return _BETWEEN.join(normalise(text) for text in texts)


def verbatim_pair(texts: Sequence[str]) -> str:
    """Returns the texts of a row as one, as they stand."""
    return _BETWEEN.join(texts)
