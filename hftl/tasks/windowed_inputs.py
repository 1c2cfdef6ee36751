"""Texts of any length as model inputs: each row the windows of one text, [B, W, T]."""

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
        column: Lists of words, or texts whose words blanks part.
        stride: As `data.stride`.
    """

    modality = "text"

    def __init__(self, column: str, stride: int | None = None) -> None:
        self.column = column
        self.stride = stride
        self.problems: list[str] = []
        self.tokenizer: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """The column of words."""
        return {self.column: "words"}

    @classmethod
    def find(cls, splits: Splits) -> WordInputs:
        """Detects the column and looks for rows without words; what is wrong goes into `problems`."""
        config = splits.config
        try:
            column = find_column("words", splits["train"].features, config.text_column)
        except DataError as error:
            found = cls("words")
            found.problems = error.problems
            return found
        log(f"data: words from column '{column.name}' ({column.why})")
        found = cls(column.name, config.stride)
        if not splits.lenient:
            found.problems = check_splits(splits, found._wordless_rows)
        return found

    def _wordless_rows(self, rows: Dataset, split: str) -> list[str]:
        bad = self._wordless(rows)
        where = shorten([str(row) for row in bad], 8)
        said = f"data.source: {split} column '{self.column}' has {len(bad)} row(s) without words, at row {where}."
        return [said] if bad else []

    def _wordless(self, rows: Dataset) -> list[int]:
        values = arrow_column(rows, self.column).to_pylist()
        lacking = [not words_in(value)[1] or isinstance(value, list) and None in value for value in values]
        return [row for row, bad in enumerate(lacking) if bad]

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextRows:
        """Returns rows of windows. Nothing is random here, so `seed` does not apply."""
        self.tokenizer = processor
        return window_words(dataset, processor, self.column, token_limit(processor, max_length), self.stride, keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads to the most windows and the longest window of the batch."""
        return model_inputs(examples, self.tokenizer)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without words."""
        return {
            split: {row: BadRow("no words", self.column) for row in self._wordless(rows)}
            for split, rows in splits.items()
        }

    def state(self) -> dict[str, Any]:
        """Returns column and stride."""
        return {"column": self.column, "stride": self.stride}


class PairInputs:
    """A question and a context -> `input_ids` and `attention_mask` [B, W, T], the question in each window.

    Args:
        columns: Question and context.
        stride: As `data.stride`.
    """

    modality = "text"

    def __init__(self, columns: Sequence[str], stride: int | None = None) -> None:
        self.columns = list(columns)
        self.stride = stride
        self.problems: list[str] = []
        self.tokenizer: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """Question and context."""
        return dict.fromkeys(self.columns, "text")

    @classmethod
    def find(cls, splits: Splits) -> PairInputs:
        """Detects the columns and looks for empty texts; what is wrong goes into `problems`."""
        config, features = splits.config, splits["train"].features
        names, problems = [], []
        for role, given in (("question", config.text_column), ("context", config.text_pair_column)):
            try:
                column = find_column(role, features, given)
                names.append(column.name)
                log(f"data: {role} from column '{column.name}' ({column.why})")
            except DataError as error:
                problems += error.problems
        found = cls(names, config.stride)
        if not problems and not splits.lenient:
            problems = check_splits(splits, lambda rows, split: empty_texts(rows, names, split))
        found.problems = problems
        return found

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextRows:
        """Returns rows of windows. Nothing is random here, so `seed` does not apply."""
        self.tokenizer = processor
        return window_pairs(dataset, processor, self.columns, token_limit(processor, max_length), self.stride, keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads to the most windows and the longest window of the batch."""
        return model_inputs(examples, self.tokenizer)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows where question or context is empty or missing."""
        return {
            split: {
                row: BadRow("no text", column) for column in reversed(self.columns) for row in empty_rows(rows, column)
            }
            for split, rows in splits.items()
        }

    def state(self) -> dict[str, Any]:
        """Returns columns and stride."""
        return {"columns": self.columns, "stride": self.stride}
