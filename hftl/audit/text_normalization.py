"""Normalization and hashing of texts, for duplicate detection.

Normalization removes differences of Unicode form (NFKC), case (`str.casefold`), whitespace and punctuation (Unicode
categories P). Symbols stay (`+ $ = <`, emoji), and punctuation stays in texts without other characters. A second key
of the texts without normalization detects exact copies.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1_000
"""Rows per batch."""
_SEPARATOR = "\x1f"
"""Separator of the texts of a pair: the ASCII unit separator, absent from natural text."""


class _PunctuationTable(dict[int, str]):
    """Table for `str.translate` that maps punctuation to spaces; caches each character."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character).startswith("P") else character
        return self[code]


_PUNCTUATION = _PunctuationTable()


def normalize(text: str) -> str:
    """Returns the normalized text (see the module docstring)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_PUNCTUATION).split()) or " ".join(folded.split())


def key_of(text: str | bytes) -> int:
    """Returns a 64-bit BLAKE2b hash; the collision probability among a million texts is 3e-8."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def text_rows(rows: Dataset, columns: Sequence[str], numbers: Sequence[int] | None = None) -> Iterator[list[list[str]]]:
    """Yields batches of rows as lists of texts; values that are not strings become empty texts.

    Args:
        rows: Rows of a split.
        columns: One text column, or two for pairs.
        numbers: Row numbers to read, in this order; None reads all rows.
    """
    texts = rows.select_columns(list(columns))
    for start in range(0, len(rows) if numbers is None else len(numbers), BATCH):
        batch = texts[start : start + BATCH] if numbers is None else texts[list(numbers[start : start + BATCH])]
        values = zip(*(batch[name] for name in columns), strict=True)
        yield [[value if isinstance(value, str) else "" for value in row] for row in values]


def normalized_pair(texts: Sequence[str]) -> str:
    """Joins the normalized texts of a row; the order of a pair is significant."""
    return _SEPARATOR.join(normalize(text) for text in texts)


def verbatim_pair(texts: Sequence[str]) -> str:
    """Joins the texts of a row without normalization."""
    return _SEPARATOR.join(texts)
