"""Sliding windows over long texts: tokenized once into a memory-mapped file, without truncation.

A row is one text in W overlapping windows. Each window has the special tokens (and, for pairs, the question) of a
separate text, as in pretraining. The windows of a row have equal size, except in rows shorter than one window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.distributed import main_process_first
from hftl.errors import DataError
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.preprocessing.tokenization import LENGTH, TextRows, tokenizer_identity

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

NAMES = ("input_ids", "token_type_ids")
"""Model inputs in the rows, a list per window."""
HOME, OFFSETS = "hftl_home", "hftl_offsets"
"""Columns with the (window, position) of each word, and with the character offsets of each token."""
_CUT = "hftl_cut"
"""Column with whether the question was truncated."""
Span = tuple[int, int]
"""Start and end character (exclusive)."""


def words_in(value: Any) -> tuple[str, list[Span]]:
    """Returns a text and the character spans of its words.

    Args:
        value: A list of words, which are joined by spaces; or a string, which is split at whitespace.
    """
    if isinstance(value, str):
        return value, [match.span() for match in re.finditer(r"\S+", value)]
    words, spans, end = [str(word) for word in value or ()], [], -1
    for word in words:
        spans.append((end + 1, end + 1 + len(word)))
        end += 1 + len(word)
    return " ".join(words), spans


def window_starts(length: int, capacity: int, overlap: int) -> list[int]:
    """Returns the start positions of windows that cover all tokens.

    Windows are evenly spaced, so that the last one has as much context as the others.

    Args:
        length: Number of tokens of the text.
        capacity: Number of text tokens per window, at least 1.
        overlap: Minimum number of tokens shared by adjacent windows; limited to `capacity - 1`.
    """
    if length <= capacity:
        return [0]
    step = max(capacity - overlap, 1)
    gaps = -(-(length - capacity) // step)
    return [(length - capacity) * number // gaps for number in range(gaps + 1)]


def assign_windows(
    first: np.ndarray, last: np.ndarray, starts: Sequence[int], capacity: int, length: int
) -> np.ndarray:
    """Returns the window index of each word [N]: the window with the most context on the word's shorter side.

    Args:
        first: Index of the first token of each word [N].
        last: Index of the last token of each word [N].
        starts: Window starts from `window_starts`.
        capacity: Number of text tokens per window.
        length: Number of tokens of the text; its own start and end do not limit the context.
    """
    start = np.asarray(starts)[:, None]
    left = np.where(start == 0, length, first - start)
    right = np.where(start + capacity >= length, length, start + capacity - 1 - last)
    contains = (start <= first) & (first < start + capacity)  # words longer than a window: by their first token
    return np.where(contains, np.minimum(left, right), np.iinfo(np.int64).min).argmax(0)


def window_words(
    dataset: Dataset, tokenizer: Any, column: str, max_length: int, stride: int | None, keep: Iterable[str]
) -> TextRows:
    """Tokenizes rows of words into windows; cached.

    Adds `input_ids` (and `token_type_ids`), a list per window, and `HOME`: (window, position) of the first token of
    each word, in the window that the word is assigned to; (-1, -1) for words without tokens.

    Args:
        dataset: Rows with lists of words, or strings, in `column`, which is kept.
        tokenizer: Fast tokenizer of the checkpoint.
        column: Column of words.
        max_length: Tokens per window, including special tokens.
        stride: Tokens shared by adjacent windows; default: a quarter of the window.
        keep: Further columns to keep.

    Raises:
        DataError: The tokenizer is not a fast one, or `max_length` leaves no space for text tokens.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts_and_spans = [words_in(value) for value in batch[column]]
        encoded = _encode(tokenizer, [text for text, _ in texts_and_spans])
        rows = [_WindowedText(encoded, i, 0, max_length, stride) for i in range(len(texts_and_spans))]
        positions = [row.word_positions(spans, text) for row, (text, spans) in zip(rows, texts_and_spans, strict=True)]
        return _columns(rows) | {HOME: positions}

    return _map(dataset, tokenizer, encode, [column], max_length, stride, [column, *keep])


def window_pairs(
    dataset: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int, stride: int | None, keep: Iterable[str]
) -> TextRows:
    """Tokenizes rows of question and context into windows: the full question and a part of the context; cached.

    Adds `input_ids` (and `token_type_ids`), a list per window, and `OFFSETS`: per window, start and end character in
    the context of each token, as a flat list; (-1, -1) for tokens outside of the context. A question longer than half
    of a window is truncated; the number of such rows is logged.

    Args:
        dataset: Rows with two text columns; the second is kept.
        tokenizer: Fast tokenizer of the checkpoint.
        columns: Question and context column.
        max_length: Tokens per window, including special tokens and question.
        stride: Context tokens shared by adjacent windows; default: a quarter of the window.
        keep: Further columns to keep.

    Raises:
        DataError: The tokenizer is not a fast one, or `max_length` leaves no space for context tokens.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [[text if isinstance(text, str) else "" for text in batch[name]] for name in columns]
        encoded = _encode(tokenizer, *texts)
        rows = [_WindowedText(encoded, i, 1, max_length, stride) for i in range(len(texts[0]))]
        return _columns(rows) | {OFFSETS: [row.offsets(text) for row, text in zip(rows, texts[1], strict=True)]}

    return _map(dataset, tokenizer, encode, columns, max_length, stride, [columns[1], *keep])


def stack(examples: Sequence[Example], name: str, fill: int) -> Tensor:
    """Pads the ragged lists [W][T] of B examples with `fill` to a tensor [B, W, T] int64."""
    import torch

    rows = [example[name] for example in examples]
    windows, tokens = max(map(len, rows)), max(len(window) for row in rows for window in row)
    out = torch.full((len(rows), windows, tokens), fill)
    for b, row in enumerate(rows):
        for w, window in enumerate(row):
            out[b, w, : len(window)] = torch.as_tensor(window)
    return out


def model_inputs(examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
    """Collates model inputs (`input_ids`, `attention_mask`, …), each [B, W, T].

    Missing windows of rows with fewer windows are padding, with attention mask 0.
    """
    pads = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    inputs = {name: stack(examples, name, pads[name]) for name in NAMES if name in examples[0]}
    ones = [{"mask": [[1] * len(window) for window in example["input_ids"]]} for example in examples]
    return inputs | {"attention_mask": stack(ones, "mask", 0)}


def _encode(tokenizer: Any, *texts: list[str]) -> Any:
    return tokenizer(
        *texts,
        truncation=False,
        verbose=False,  # disables the warning about texts longer than the model
        return_attention_mask=False,
        return_offsets_mapping=True,
    )


class _WindowedText:
    """Encoded text (or pair), split into windows.

    Args:
        encoded: Tokenizer output of a batch.
        row: Index in the batch.
        sequence: Sequence that is split into windows: 0 for a single text, 1 for the context of a pair.
        max_length: Tokens per window.
        stride: Tokens shared by adjacent windows; None: a quarter of the window.
    """

    def __init__(self, encoded: Any, row: int, sequence: int, max_length: int, stride: int | None) -> None:
        sequence_ids = np.array([-1 if number is None else number for number in encoded.sequence_ids(row)])
        size = len(sequence_ids)
        body = np.flatnonzero(sequence_ids == sequence)
        self.first, self.end = (int(body[0]), int(body[-1]) + 1) if len(body) else (size - 1, size - 1)
        self.before = np.arange(self.first)
        question = np.flatnonzero(sequence_ids == 0) if sequence else body[:0]
        max_question = max((max_length - (size - len(body) - len(question))) // 2, 1)
        self.question_cut = len(question) > max_question
        if self.question_cut:
            self.before = np.setdiff1d(self.before, question[max_question:])
        after = np.arange(self.end, size)
        self.length = self.end - self.first
        self.capacity = max_length - len(self.before) - len(after)
        if self.capacity < 1:
            raise DataError(
                f"data.max_length: windows of {max_length} tokens have no space for text next to the special tokens. "
                "Set a larger value."
            )
        overlap = max_length // 4 if stride is None else stride
        self.starts = window_starts(self.length, self.capacity, min(overlap, self.capacity // 2))
        self.spans = np.array(encoded["offset_mapping"][row]).reshape(-1, 2)
        ends = [min(start + self.capacity, self.length) for start in self.starts]
        bodies = [np.arange(start, end) + self.first for start, end in zip(self.starts, ends, strict=True)]
        self.tokens = [np.concatenate([self.before, window, after]) for window in bodies]
        self.values = {name: np.array(encoded[name][row]) for name in NAMES if name in encoded}

    def windows(self, name: str) -> list[list[int]]:
        """Returns the values of an input [W][T] per window."""
        return [self.values[name][tokens].tolist() for tokens in self.tokens]

    def word_positions(self, spans: Sequence[Span], text: str) -> list[Span]:
        """Returns (window, position in the window) of the first token of each word; (-1, -1) without tokens."""
        token_starts = self._trim_spans(text)[self.first : self.end][:, 0]
        word_starts, word_ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        # tokens first to after - 1 start inside the word
        first, after = np.searchsorted(token_starts, word_starts), np.searchsorted(token_starts, word_ends)
        has_tokens = (after > first) & (word_ends > word_starts)
        window = assign_windows(first, np.maximum(after - 1, first), self.starts, self.capacity, self.length)
        position = first - np.asarray(self.starts)[window] + len(self.before)
        pairs = np.where(has_tokens[:, None], np.stack([window, position], 1), -1)
        return [(w, p) for w, p in pairs.tolist()]

    def offsets(self, text: str) -> list[list[int]]:
        """Returns start and end character of the tokens of each window, as flat lists; -1 outside of `text`."""
        spans = np.full((len(self.spans), 2), -1)
        spans[self.first : self.end] = self._trim_spans(text)[self.first : self.end]
        return [spans[tokens].flatten().tolist() for tokens in self.tokens]

    def _trim_spans(self, text: str) -> np.ndarray:
        """Returns token spans without the leading whitespace that some tokenizers include."""
        spans = self.spans.copy()
        has_space = [text[start : start + 1].isspace() for start in spans[:, 0].tolist()]
        for number in np.flatnonzero(has_space):
            start, end = spans[number]
            spans[number, 0] += len(text[start:end]) - len(text[start:end].lstrip())
        return spans


def _columns(rows: Sequence[_WindowedText]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [row.windows(name) for row in rows] for name in rows[0].values}
    columns[LENGTH] = [sum(map(len, row.tokens)) for row in rows]
    return columns | {_CUT: [row.question_cut for row in rows]}


def _map(
    dataset: Dataset,
    tokenizer: Any,
    encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    columns: Sequence[str],
    max_length: int,
    stride: int | None,
    keep: Iterable[str],
) -> TextRows:
    from datasets.fingerprint import Hasher

    if not tokenizer.is_fast:
        raise DataError(
            f"model.name: the tokenizer of '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) has no character "
            "offsets. Set a checkpoint with a fast tokenizer (tokenizer.json)."
        )
    keep = [name for name in dict.fromkeys(keep) if name in dataset.column_names]
    version = [tokenizer.model_input_names, "hftl windows 2"]
    key = [dataset._fingerprint, tokenizer_identity(tokenizer), version, list(columns), max_length, stride, keep]
    with main_process_first("tokenize"):
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in keep],
            new_fingerprint=Hasher.hash(key),
            desc="tokenize",
        )
    cut = sum(encoded[_CUT])
    if cut:
        log(f"data: truncated {cut} of {len(encoded)} questions to half of {max_length} tokens (data.max_length)")
    rows = TextRows(encoded.remove_columns(_CUT))
    long = int((rows.lengths > max_length).sum())
    if long:
        overlap = max_length // 4 if stride is None else stride
        log(
            f"data: {long} of {len(rows)} texts are longer than {max_length} tokens (data.max_length) and are split "
            f"into windows with {overlap} tokens of overlap (data.stride)"
        )
    return rows
