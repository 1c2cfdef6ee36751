"""Texts -> token ids: tokenized once into a memory-mapped file, padded per batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.distributed import main_process_first
from hftl.errors import shorten
from hftl.loading.loader import Example
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

LENGTH = "hftl_length"
"""Column with the number of tokens; `length` may be the user's own, a label perhaps."""


class TextRows:
    """Rows with token ids; `lengths` [N] int32 counts tokens, so that like lengths share a batch."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset.remove_columns(LENGTH)
        self.lengths = np.asarray(dataset.with_format("numpy", columns=[LENGTH])[LENGTH][:], dtype=np.int32)
        self.columns = [name for name in self.dataset.column_names]

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> str:
        """Returns what the examples depend on: the key of the tokenized rows."""
        return self.dataset._fingerprint

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `input_ids` and, for pairs, `token_type_ids` as lists of unequal length."""
        table = self.dataset[list(rows)]
        return [{name: table[name][i] for name in self.columns} for i in range(len(rows))]


def tokenize(
    dataset: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int, keep: Iterable[str]
) -> TextRows:
    """Returns the rows of `dataset` as token ids, from the cache when this was done before.

    Args:
        dataset: Rows with the text columns.
        tokenizer: The checkpoint's own.
        columns: One text column, or two for pairs.
        max_length: Tokens beyond this are cut (the longer text of a pair first).
        keep: Columns that stay beside the token ids (labels).
    """
    from datasets.fingerprint import Hasher

    keep = [name for name in keep if name in dataset.column_names]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [[text if isinstance(text, str) else "" for text in batch[name]] for name in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        return dict(encoded) | {LENGTH: [len(ids) for ids in encoded["input_ids"]]}

    # the library would hash the tokenizer by pickling it, which changes once it has been used
    manner = [tokenizer.model_input_names, tokenizer.truncation_side, "hftl 2"]
    key = [dataset._fingerprint, tokenizer_identity(tokenizer), manner, list(columns), max_length, keep]
    with main_process_first("tokenize"):
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in keep],
            new_fingerprint=Hasher.hash(key),
            desc="tokenize",
        )
    rows = TextRows(encoded)
    cut = int((rows.lengths >= max_length).sum())
    if cut:
        log(f"data: {cut} of {len(rows)} texts reach the limit of {max_length} tokens (data.max_length) and may be cut")
    return rows


def token_limit(tokenizer: Any, max_length: int | None) -> int:
    """Returns how many tokens a text may have: `max_length`, within what the tokenizer says of its model."""
    limit = min(max_length or 10**9, tokenizer.model_max_length, 10**6)
    return limit if limit < 10**6 else 512


def tokenizer_identity(tokenizer: Any) -> str:
    """Returns what a tokenizer computes as text, whatever it was used for before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(sorted(tokenizer.get_vocab().items()))
    fresh = type(backend).from_str(backend.to_str())
    fresh.no_truncation()  # both are state of the last call, not of the vocabulary
    fresh.no_padding()
    return fresh.to_str()


def empty_rows(dataset: Dataset, column: str) -> list[int]:
    """Returns the numbers of the rows whose text is empty or missing."""
    empty: list[int] = []
    rows = dataset.select_columns([column])
    for start in range(0, len(rows), 10_000):
        values = rows[start : start + 10_000][column]
        empty += [start + i for i, text in enumerate(values) if not isinstance(text, str) or not text.strip()]
    return empty


def empty_texts(dataset: Dataset, columns: Sequence[str], split: str) -> list[str]:
    """Returns a sentence for each text column of a split that has empty or missing texts."""
    problems = []
    for column in columns:
        empty = empty_rows(dataset, column)
        if empty:
            where = shorten([str(row) for row in empty], 8)
            problems.append(f"data.source: {split} column '{column}' has {len(empty)} empty text(s), at row {where}.")
    return problems
