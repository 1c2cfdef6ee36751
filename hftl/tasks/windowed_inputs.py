"""Inputs of long texts: each row is divided into W overlapping windows of T tokens, [B, W, T]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hftl.data.columns import arrow_column, find_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.preprocessing.sliding_windows import model_inputs, window_pairs, window_words, words_in
from hftl.preprocessing.tokenization import TextRows, empty_rows, empty_texts, token_limit
from hftl.tasks.task import check_splits

if TYPE_CHECKING:
    from datasets import Dataset


class WordInputs:
    """Words of a text -> `input_ids` and `attention_mask` [B, W, T].

    Args:
        column: Column of word lists, or of texts with whitespace-separated words.
        stride: Overlap of windows in tokens (setting `data.stride`); None for a quarter of the window.
    """

    modality = "text"

    def __init__(self, column: str, stride: int | None = None) -> None:
        self.column = column
        self.stride = stride
        self.problems: list[str] = []
        self.tokenizer: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        return {self.column: "words"}

    @classmethod
    def find(cls, splits: Splits) -> WordInputs:
        """Detects the column, checks for rows without words and collects errors in `problems`."""
        config = splits.config
        try:
            column = find_column("words", splits["train"].features, config.text_column)
        except DataError as error:
            inputs = cls("words")
            inputs.problems = error.problems
            return inputs
        log(f"data: words from column '{column.name}' ({column.why})")
        inputs = cls(column.name, config.stride)
        if not splits.lenient:
            inputs.problems = check_splits(splits, inputs._row_problems)
        return inputs

    def _row_problems(self, rows: Dataset, split: str) -> list[str]:
        empty = [str(row) for row in self._empty_rows(rows)]
        if not empty:
            return []
        return [
            f"data.source: {split} column '{self.column}' has {len(empty)} row(s) without words, at row "
            f"{shorten(empty, 8)}. Set data.on_error skip to exclude them."
        ]

    def _empty_rows(self, rows: Dataset) -> list[int]:
        """Returns the indices of rows without words or with missing words."""
        values = arrow_column(rows, self.column).to_pylist()
        is_empty = [not words_in(value)[1] or isinstance(value, list) and None in value for value in values]
        return [row for row, empty in enumerate(is_empty) if empty]

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextRows:
        """Returns tokenized windows; tokenization is deterministic, so `seed` is ignored."""
        self.tokenizer = processor
        return window_words(dataset, processor, self.column, token_limit(processor, max_length), self.stride, keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads to the largest number of windows and the longest window of the batch."""
        return model_inputs(examples, self.tokenizer)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without words."""
        return {
            split: {row: BadRow("no words", self.column) for row in self._empty_rows(rows)}
            for split, rows in splits.items()
        }

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "stride": self.stride}


class PairInputs:
    """A question and a context -> `input_ids` and `attention_mask` [B, W, T] with the question in each window.

    Args:
        columns: Question column and context column.
        stride: Overlap of windows in tokens (setting `data.stride`); None for a quarter of the window.
    """

    modality = "text"

    def __init__(self, columns: Sequence[str], stride: int | None = None) -> None:
        self.columns = list(columns)
        self.stride = stride
        self.problems: list[str] = []
        self.tokenizer: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        return dict.fromkeys(self.columns, "text")

    @classmethod
    def find(cls, splits: Splits) -> PairInputs:
        """Detects the columns, checks for empty texts and collects errors in `problems`."""
        config, features = splits.config, splits["train"].features
        names, problems = [], []
        for role, configured in (("question", config.text_column), ("context", config.text_pair_column)):
            try:
                column = find_column(role, features, configured)
                names.append(column.name)
                log(f"data: {role} from column '{column.name}' ({column.why})")
            except DataError as error:
                problems += error.problems
        inputs = cls(names, config.stride)
        if not problems and not splits.lenient:
            problems = check_splits(splits, lambda rows, split: empty_texts(rows, names, split))
        inputs.problems = problems
        return inputs

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextRows:
        """Returns tokenized windows; tokenization is deterministic, so `seed` is ignored."""
        self.tokenizer = processor
        return window_pairs(dataset, processor, self.columns, token_limit(processor, max_length), self.stride, keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads to the largest number of windows and the longest window of the batch."""
        return model_inputs(examples, self.tokenizer)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with an empty or missing question or context."""
        return {
            split: {
                row: BadRow("no text", column) for column in reversed(self.columns) for row in empty_rows(rows, column)
            }
            for split, rows in splits.items()
        }

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"columns": self.columns, "stride": self.stride}
