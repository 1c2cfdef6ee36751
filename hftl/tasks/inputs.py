"""How rows become model inputs, one class per modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.console import say
from hftl.data.columns import find_column, find_text_columns
from hftl.data.image import ImageRows, unreadable_images
from hftl.data.loader import Example
from hftl.data.source import Splits
from hftl.data.text import TextRows, empty_texts, token_limit, tokenize
from hftl.errors import DataError
from hftl.tasks.task import check_splits

if TYPE_CHECKING:
    from datasets import Dataset


class ImageInputs:
    """One image a row -> `pixel_values` [B, C, H, W]."""

    modality = "image"

    def __init__(self, column: str) -> None:
        self.column = column
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits) -> ImageInputs:
        """Detects the image column and reads the header of every image; what is wrong goes into `problems`."""
        try:
            column = find_column("image", splits["train"].features, splits.config.image_column)
        except DataError as error:
            return _broken(cls("image"), error)
        say(f"data: images from column '{column.name}' ({column.why})")
        found = cls(column.name)
        found.problems = check_splits(splits, lambda rows, split: unreadable_images(rows, column.name, split))
        return found

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> ImageRows:
        """Returns rows whose images are decoded and transformed when fetched. `max_length` does not apply."""
        columns = [self.column, *(name for name in keep if name in dataset.column_names)]
        return ImageRows(dataset.select_columns(columns), self.column, processor, seed)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images of equal size."""
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    def state(self) -> dict[str, Any]:
        """Returns the column."""
        return {"column": self.column}


class TextInputs:
    """One text a row, or a pair -> `input_ids` and `attention_mask` [B, T], padded to the longest of the batch."""

    modality = "text"

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.problems: list[str] = []
        self.collator: Any = None

    @classmethod
    def find(cls, splits: Splits) -> TextInputs:
        """Detects the text column(s) and looks for empty texts; what is wrong goes into `problems`."""
        config = splits.config
        try:
            features = splits["train"].features
            text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError as error:
            return _broken(cls(["text"]), error)
        say(f"data: texts from column '{text.name}' ({text.why})")
        if pair:
            say(f"data: second text of each pair from column '{pair.name}' ({pair.why})")
        found = cls([text.name, *([pair.name] if pair else [])])
        found.problems = check_splits(splits, lambda rows, split: empty_texts(rows, found.columns, split))
        return found

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextRows:
        """Returns rows of token ids. Nothing is random here, so `seed` does not apply."""
        from transformers import DataCollatorWithPadding

        self.collator = DataCollatorWithPadding(processor)
        return tokenize(dataset, processor, self.columns, token_limit(processor, max_length), keep)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads to the longest text of the batch."""
        names = ("input_ids", "token_type_ids")
        padded = self.collator([{name: example[name] for name in names if name in example} for example in examples])
        return dict(padded)

    def state(self) -> dict[str, Any]:
        """Returns the columns."""
        return {"columns": self.columns}


def _broken(inputs: Any, error: DataError) -> Any:
    inputs.problems = error.problems
    return inputs
