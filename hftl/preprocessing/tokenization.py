"""Tokenization: texts are tokenized once into a memory-mapped file and padded per batch."""

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
"""Column with the number of tokens; not `length`, which may be a column of the user."""


class TextRows:
    """Rows with token ids; `lengths` [N] int32 are numbers of tokens, for batching by length."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset.remove_columns(LENGTH)
        self.lengths = np.asarray(dataset.with_format("numpy", columns=[LENGTH])[LENGTH][:], dtype=np.int32)
        self.columns = [name for name in self.dataset.column_names]

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> str:
        """Returns the cache key of the examples: the fingerprint of the tokenized rows."""
        return self.dataset._fingerprint

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `input_ids` and, for pairs, `token_type_ids` as ragged lists."""
        table = self.dataset[list(rows)]
        return [{name: table[name][i] for name in self.columns} for i in range(len(rows))]


def tokenize(
    dataset: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int, keep: Iterable[str]
) -> TextRows:
    """Tokenizes the texts of `dataset`; cached.

    Args:
        dataset: Rows with the text columns.
        tokenizer: Tokenizer of the checkpoint.
        columns: One text column, or two for pairs.
        max_length: Largest number of tokens; longer texts are truncated (the longer text of a pair first).
        keep: Columns to keep (labels).
    """
    from datasets.fingerprint import Hasher

    keep = [name for name in keep if name in dataset.column_names]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [[text if isinstance(text, str) else "" for text in batch[name]] for name in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        return dict(encoded) | {LENGTH: [len(ids) for ids in encoded["input_ids"]]}

    # datasets hashes the pickled tokenizer, which changes when it is used
    version = [tokenizer.model_input_names, tokenizer.truncation_side, "hftl 2"]
    key = [dataset._fingerprint, tokenizer_identity(tokenizer), version, list(columns), max_length, keep]
    with main_process_first("tokenize"):
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in keep],
            new_fingerprint=Hasher.hash(key),
            desc="tokenize",
        )
    rows = TextRows(encoded)
    truncated = int((rows.lengths >= max_length).sum())
    if truncated:
        log(
            f"data: {truncated} of {len(rows)} texts reach the limit of {max_length} tokens (data.max_length) and may "
            "be truncated"
        )
    return rows


def token_limit(tokenizer: Any, max_length: int | None) -> int:
    """Returns the maximum number of tokens: `max_length`, at most the tokenizer's limit; default: 512."""
    limit = min(max_length or 10**9, tokenizer.model_max_length, 10**6)
    return limit if limit < 10**6 else 512


def tokenizer_identity(tokenizer: Any) -> str:
    """Returns the serialized tokenizer, independent of earlier calls."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(sorted(tokenizer.get_vocab().items()))
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()  # truncation and padding are state of the last call
    copy.no_padding()
    return copy.to_str()


def empty_rows(dataset: Dataset, column: str) -> list[int]:
    """Returns the row numbers with an empty or missing text."""
    empty: list[int] = []
    rows = dataset.select_columns([column])
    for start in range(0, len(rows), 10_000):
        values = rows[start : start + 10_000][column]
        empty += [start + i for i, text in enumerate(values) if not isinstance(text, str) or not text.strip()]
    return empty


def empty_texts(dataset: Dataset, columns: Sequence[str], split: str) -> list[str]:
    """Returns one problem per text column of a split with empty or missing texts."""
    problems = []
    for column in columns:
        empty = empty_rows(dataset, column)
        if empty:
            numbers = shorten([str(row) for row in empty], 8)
            problems.append(f"data.source: {split} column '{column}' has {len(empty)} empty text(s), at row {numbers}.")
    return problems
