"""Conversion of rows to model inputs, one class per modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.config.schema import DataConfig
from hftl.data.columns import Column, find_column, find_text_columns
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError
from hftl.loading.loader import Example, Examples
from hftl.logging import log
from hftl.preprocessing.image_transforms import ImageRows, broken_images, unreadable_images
from hftl.preprocessing.tokenization import empty_rows, empty_texts, token_limit, tokenize
from hftl.tasks.capabilities import ALL_CAPABILITIES
from hftl.tasks.task import check_splits

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self


class ImageInputs:
    """One image per row -> `pixel_values` [B, C, H, W].

    Args:
        column: Image column.
        max_pixels: Maximum width x height of decoded images; saved with the model.
    """

    modality = "image"
    capabilities = ALL_CAPABILITIES

    def __init__(self, column: str, max_pixels: int = DataConfig.max_pixels) -> None:
        self.column = column
        self.max_pixels = max_pixels
        self.problems: list[str] = []
        self.split_of: dict[str, str] = {}

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        return {self.column: "image"}

    @classmethod
    def find(cls, splits: Splits, column: Column | None = None) -> ImageInputs:
        """Detects the image column, checks all image headers and collects errors in `problems`.

        Args:
            splits: Data to check.
            column: Image column that the task has already detected, if any.
        """
        try:
            column = column or find_column("image", splits["train"].features, splits.config.image_column)
        except DataError as error:
            return _with_problems(cls("image"), error)
        log(f"data: images from column '{column.name}' ({column.why})")
        max_pixels = splits.config.max_pixels
        inputs = cls(column.name, max_pixels)
        inputs.split_of = {rows._fingerprint: split for split, rows in splits.items()}
        if not splits.lenient:
            inputs.problems = check_splits(
                splits, lambda rows, split: unreadable_images(rows, column.name, split, max_pixels)
            )
        return inputs

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> ImageRows:
        """Returns examples whose images are decoded and transformed on access; `max_length` is ignored."""
        columns = [self.column, *(name for name in keep if name in dataset.column_names)]
        split = self.split_of.get(dataset._fingerprint, "")
        return ImageRows(dataset.select_columns(columns), self.column, processor, seed, self.max_pixels, split)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Decodes all images and returns the rows that fail."""
        return {split: broken_images(rows, self.column, split, self.max_pixels) for split, rows in splits.items()}

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images of the same size."""
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "max_pixels": self.max_pixels}


class TextInputs:
    """One text or text pair per row -> `input_ids`, `attention_mask` [B, T], padded to the longest text of the batch.

    Args:
        columns: Text column, or both columns of text pairs.
    """

    modality = "text"
    capabilities = ALL_CAPABILITIES

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.problems: list[str] = []
        self.collator: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        return dict.fromkeys(self.columns, "text")

    @classmethod
    def find(cls, splits: Splits) -> Self:
        """Detects the text columns, checks for empty texts and collects errors in `problems`."""
        config = splits.config
        try:
            features = splits["train"].features
            text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError as error:
            return _with_problems(cls(["text"]), error)
        log(f"data: texts from column '{text.name}' ({text.why})")
        if pair:
            log(f"data: second text of each pair from column '{pair.name}' ({pair.why})")
        inputs = cls([text.name, *([pair.name] if pair else [])])
        if not splits.lenient:
            inputs.problems = check_splits(splits, lambda rows, split: empty_texts(rows, inputs.columns, split))
        return inputs

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> Examples:
        """Returns tokenized rows; tokenization is deterministic, so `seed` is ignored."""
        from transformers import DataCollatorWithPadding

        self.collator = DataCollatorWithPadding(processor)
        return tokenize(dataset, processor, self.columns, token_limit(processor, max_length), keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads all texts to the longest of the batch."""
        names = ("input_ids", "token_type_ids")
        padded = self.collator([{name: example[name] for name in names if name in example} for example in examples])
        return dict(padded)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with an empty or missing text."""
        invalid: dict[str, dict[int, BadRow]] = {}
        for split, rows in splits.items():
            empty = {row: column for column in reversed(self.columns) for row in empty_rows(rows, column)}
            invalid[split] = {row: BadRow("no text", column) for row, column in empty.items()}
        return invalid

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"columns": self.columns}


def _with_problems(inputs: Any, error: DataError) -> Any:
    inputs.problems = error.problems
    return inputs
