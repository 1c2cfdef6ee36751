"""Long texts -> windows of tokens that overlap: tokenized once into a memory-mapped file, nothing cut off.

A row is one text in W windows. Each window has the special tokens (and, for pairs, the question) that a text of its own
would have, so the model sees nothing new. Windows of one row are of equal size, as far as its tokens go.
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
"""What a row holds of what models take, a list for each window."""
HOME, OFFSETS = "hftl_home", "hftl_offsets"
"""Columns with the place of each word, and with the characters of each token."""
_CUT = "hftl_cut"
Span = tuple[int, int]
"""First character, and the one after the last."""


def words_in(value: Any) -> tuple[str, list[Span]]:
    """Returns a text, and where its words stand in it.

    Args:
        value: A list of words, which are joined by blanks; or a text, whose words are what blanks part.
    """
    if isinstance(value, str):
        return value, [match.span() for match in re.finditer(r"\S+", value)]
    words, spans, end = [str(word) for word in value or ()], [], -1
    for word in words:
        spans.append((end + 1, end + 1 + len(word)))
        end += 1 + len(word)
    return " ".join(words), spans


def window_starts(length: int, room: int, overlap: int) -> list[int]:
    """Returns where windows of `room` tokens begin in a text of `length`, so that each token is in one at least.

    They are spread evenly, so that the last one has as much context as the others.

    Args:
        length: Tokens of the text.
        room: Tokens of a window, at least 1.
        overlap: Tokens that neighbours share, at least; less where the room does not allow it.
    """
    if length <= room:
        return [0]
    step = max(room - overlap, 1)
    gaps = -(-(length - room) // step)
    return [(length - room) * number // gaps for number in range(gaps + 1)]


def home_windows(first: np.ndarray, last: np.ndarray, starts: Sequence[int], room: int, length: int) -> np.ndarray:
    """Returns the one window that each word belongs to [N]: where the nearer end of the window is farthest away.

    Args:
        first: First token of each word in the text [N].
        last: Last token of each word [N].
        starts: From `window_starts`.
        room: Tokens of a window.
        length: Tokens of the text; where it begins or ends itself, a window ends nothing.
    """
    begin = np.asarray(starts)[:, None]
    left = np.where(begin == 0, length, first - begin)
    right = np.where(begin + room >= length, length, begin + room - 1 - last)
    inside = (begin <= first) & (first < begin + room)  # of a word longer than a window, the first token counts
    return np.where(inside, np.minimum(left, right), np.iinfo(np.int64).min).argmax(0)


def window_words(
    dataset: Dataset, tokenizer: Any, column: str, max_length: int, stride: int | None, keep: Iterable[str]
) -> TextRows:
    """Returns rows of words as windows, from the cache when this was done before.

    Rows get `input_ids` (and `token_type_ids`), a list for each window; and `HOME`, the window and the position of the
    first token of each word, in the one window where it counts; (-1, -1) where a tokenizer makes nothing of a word.

    Args:
        dataset: Rows with lists of words, or texts, in `column`, which stays.
        tokenizer: The checkpoint's own, a fast one.
        column: The words.
        max_length: Tokens of a window, special ones included.
        stride: Tokens that neighbouring windows share; a quarter of the window where None.
        keep: Further columns that stay.

    Raises:
        DataError: The tokenizer cannot say where tokens come from, or a window has no room.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = [words_in(value) for value in batch[column]]
        encoded = _encode(tokenizer, [text for text, _ in found])
        rows = [_Row(encoded, i, 0, max_length, stride) for i in range(len(found))]
        homes = [row.homes(spans, text) for row, (text, spans) in zip(rows, found, strict=True)]
        return _columns(rows) | {HOME: homes}

    return _map(dataset, tokenizer, encode, [column], max_length, stride, [column, *keep])


def window_pairs(
    dataset: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int, stride: int | None, keep: Iterable[str]
) -> TextRows:
    """Returns rows of a question and a context as windows: the whole question in each, and a part of the context.

    Rows get `input_ids` (and `token_type_ids`) as `window_words` makes them; and `OFFSETS`, for each token of each
    window first and last character in the context, one after the other: (-1, -1) for tokens that are not of it.
    A question longer than half of a window loses its end, which is said.

    Args:
        dataset: Rows with two text columns, the second of which stays.
        tokenizer: The checkpoint's own, a fast one.
        columns: Question and context.
        max_length: Tokens of a window, special ones and question included.
        stride: Tokens of the context that neighbouring windows share; a quarter of the window where None.
        keep: Further columns that stay.

    Raises:
        DataError: As `window_words`.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [[text if isinstance(text, str) else "" for text in batch[name]] for name in columns]
        encoded = _encode(tokenizer, *texts)
        rows = [_Row(encoded, i, 1, max_length, stride) for i in range(len(texts[0]))]
        return _columns(rows) | {OFFSETS: [row.offsets(text) for row, text in zip(rows, texts[1], strict=True)]}

    return _map(dataset, tokenizer, encode, columns, max_length, stride, [columns[1], *keep])


def stack(examples: Sequence[Example], name: str, fill: int) -> Tensor:
    """Returns the lists [W][T] of all rows, padded with `fill` to [B, W, T] int64."""
    import torch

    rows = [example[name] for example in examples]
    windows, tokens = max(map(len, rows)), max(len(window) for row in rows for window in row)
    out = torch.full((len(rows), windows, tokens), fill)
    for b, row in enumerate(rows):
        for w, window in enumerate(row):
            out[b, w, : len(window)] = torch.as_tensor(window)
    return out


def model_inputs(examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
    """Returns what a model takes of some rows: `input_ids`, `attention_mask` and the like, each [B, W, T].

    A window that a row does not have is all padding: its mask is 0.
    """
    pads = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    inputs = {name: stack(examples, name, pads[name]) for name in NAMES if name in examples[0]}
    ones = [{"mask": [[1] * len(window) for window in example["input_ids"]]} for example in examples]
    return inputs | {"attention_mask": stack(ones, "mask", 0)}


def _encode(tokenizer: Any, *texts: list[str]) -> Any:
    return tokenizer(
        *texts,
        truncation=False,
        verbose=False,  # transformers would warn of texts longer than the model
        return_attention_mask=False,
        return_offsets_mapping=True,
    )


class _Row:
    """One encoded text (or pair), cut into windows.

    Args:
        encoded: What the tokenizer returned for several rows.
        row: Which of them.
        body: The sequence that is cut: 0 of a single text, 1 of a pair.
        max_length: Tokens of a window.
        stride: As `window_words`.
    """

    def __init__(self, encoded: Any, row: int, body: int, max_length: int, stride: int | None) -> None:
        of = np.array([-1 if part is None else part for part in encoded.sequence_ids(row)])
        inside = np.flatnonzero(of == body)
        self.first, self.end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(of) - 1, len(of) - 1)
        self.before = np.arange(self.first)
        question = np.flatnonzero(of == 0) if body else inside[:0]
        most = max((max_length - (len(of) - len(inside) - len(question))) // 2, 1)
        self.question_cut = len(question) > most
        if self.question_cut:
            self.before = np.setdiff1d(self.before, question[most:])
        after = np.arange(self.end, len(of))
        self.length = self.end - self.first
        self.room = max_length - len(self.before) - len(after)
        if self.room < 1:
            raise DataError(f"data.max_length: windows of {max_length} tokens have no room beside the special tokens.")
        overlap = max_length // 4 if stride is None else stride
        self.starts = window_starts(self.length, self.room, min(overlap, self.room // 2))
        self.spans = np.array(encoded["offset_mapping"][row]).reshape(-1, 2)
        ends = [min(start + self.room, self.length) for start in self.starts]
        middles = [np.arange(a, b) + self.first for a, b in zip(self.starts, ends, strict=True)]
        self.tokens = [np.concatenate([self.before, middle, after]) for middle in middles]
        self.values = {name: np.array(encoded[name][row]) for name in NAMES if name in encoded}

    def windows(self, name: str) -> list[list[int]]:
        """Returns the values of the tokens of each window."""
        return [self.values[name][tokens].tolist() for tokens in self.tokens]

    def homes(self, spans: Sequence[Span], text: str) -> list[Span]:
        """Returns the window and the position in it of the first token of each word."""
        places = self._trimmed(text)[self.first : self.end]
        begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        # the first token that begins in the word, and the last one that does
        first, after = np.searchsorted(places[:, 0], begins), np.searchsorted(places[:, 0], ends)
        there = (after > first) & (ends > begins)
        window = home_windows(first, np.maximum(after - 1, first), self.starts, self.room, self.length)
        position = first - np.asarray(self.starts)[window] + len(self.before)
        pairs = np.where(there[:, None], np.stack([window, position], 1), -1)
        return [(w, p) for w, p in pairs.tolist()]

    def offsets(self, text: str) -> list[list[int]]:
        """Returns first character and end of each token of each window, one after the other; -1 outside of `text`."""
        spans = np.full((len(self.spans), 2), -1)
        spans[self.first : self.end] = self._trimmed(text)[self.first : self.end]
        return [spans[tokens].flatten().tolist() for tokens in self.tokens]

    def _trimmed(self, text: str) -> np.ndarray:
        """Returns where tokens stand without the blanks that some tokenizers count to the token after them."""
        spans = self.spans.copy()
        blank = [text[start : start + 1].isspace() for start in spans[:, 0].tolist()]
        for number in np.flatnonzero(blank):
            start, end = spans[number]
            spans[number, 0] += len(text[start:end]) - len(text[start:end].lstrip())
        return spans


def _columns(rows: Sequence[_Row]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [row.windows(name) for row in rows] for name in rows[0].values}
    found[LENGTH] = [sum(map(len, row.tokens)) for row in rows]
    return found | {_CUT: [row.question_cut for row in rows]}


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
            f"model.name: the tokenizer of '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) cannot say where in "
            "a text its tokens stand; a checkpoint with a fast tokenizer (tokenizer.json) can."
        )
    keep = [name for name in dict.fromkeys(keep) if name in dataset.column_names]
    manner = [tokenizer.model_input_names, "hftl windows 2"]
    key = [dataset._fingerprint, tokenizer_identity(tokenizer), manner, list(columns), max_length, stride, keep]
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
        log(f"data: {cut} of {len(encoded)} questions are longer than half of {max_length} tokens: their ends are cut")
    rows = TextRows(encoded.remove_columns(_CUT))
    long = int((rows.lengths > max_length).sum())
    if long:
        share = max_length // 4 if stride is None else stride
        log(
            f"data: {long} of {len(rows)} texts are longer than {max_length} tokens (data.max_length) and are read in "
            f"windows that share {share} tokens (data.stride); nothing is cut off"
        )
    return rows
