"""Inputs of multimodal models: images, texts, numbers and categories of a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hftl.config.schema import DataConfig
from hftl.data.multimodal_columns import MixedColumns, find_mixed, train_categories, train_numbers, with_names
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.preprocessing.image_transforms import broken_images, unreadable_images
from hftl.preprocessing.multimodal import (
    PRESENT,
    TEXT,
    VECTORS,
    ImageTextRows,
    OptionalImageRows,
    has_image,
    has_text,
    joined_texts,
)
from hftl.preprocessing.tokenization import token_limit, tokenize
from hftl.tasks.task import check_splits

if TYPE_CHECKING:
    from datasets import Dataset


class ImageTextInputs:
    """Rows of a multimodal table -> `pixel_values`, token ids, `numbers`, `categories` and masks of present inputs.

    Args:
        image: Image column, if any.
        texts: Text columns.
        template: Format string that joins the text columns into one text.
        numbers: `names`, `mean` and `std` of the numeric columns, computed on train.
        categories: Values of each categorical column in train.
        max_pixels: Maximum width x height of decoded images.
    """

    modality = "image_text"

    def __init__(
        self,
        image: str | None = None,
        texts: Sequence[str] = (),
        template: str = "",
        numbers: dict[str, Any] | None = None,
        categories: dict[str, list[str]] | None = None,
        max_pixels: int = DataConfig.max_pixels,
    ) -> None:
        self.image, self.texts, self.template = image, list(texts), template
        self.numbers = numbers or {"names": [], "mean": [], "std": []}
        self.categories = categories or {}
        self.max_pixels = max_pixels
        self.problems: list[str] = []
        self.incomplete: dict[str, int] = {}
        self.split_of: dict[str, str] = {}
        self.collator: Any = None

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        image = {self.image: "image"} if self.image else {}
        columns = (("text", self.texts), ("number", self.numbers["names"]), ("category", self.categories))
        return image | {name: column_type for column_type, names in columns for name in names}

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that may be missing at inference: all, if the model was trained with missing inputs (`encode`)."""
        return tuple(self.column_types)

    @property
    def options(self) -> dict[str, Any]:
        """Architecture options that follow from the data, for `hftl.models.image_text_model.build`."""
        return {
            "image": self.image is not None,
            "text": bool(self.texts),
            "numbers": self.numbers,
            "categories": self.categories,
            "incomplete": self.incomplete,
        }

    @classmethod
    def find(cls, splits: Splits, label_columns: Sequence[str]) -> ImageTextInputs:
        """Detects the columns, counts missing images and texts, and collects errors in `problems`.

        Args:
            splits: Data to train on.
            label_columns: Columns of the target, which are not inputs.
        """
        config, train = splits.config, splits["train"]
        try:
            columns = find_mixed(train, config, label_columns)
            inputs = cls._from_columns(columns, train, config.max_pixels)
        except DataError as error:
            inputs = cls()
            inputs.problems = error.problems
            return inputs
        inputs.split_of = {rows._fingerprint: split for split, rows in splits.items()}
        if not splits.lenient and not inputs.problems:
            inputs.problems = check_splits(splits, inputs._row_problems)
            missing = Counter[str]()
            for rows in splits.values():
                missing += Counter(
                    {name.removesuffix("_present"): p.count(False) for name, p in inputs._present(rows).items()}
                )
            inputs.incomplete = dict(missing)
        return inputs

    @classmethod
    def _from_columns(cls, columns: MixedColumns, train: Dataset, max_pixels: int) -> ImageTextInputs:
        numbers, problems = train_numbers(train, columns.numbers)
        categories = train_categories(train, columns.categories)
        inputs = cls(columns.image, columns.texts, columns.template, numbers, categories, max_pixels)
        inputs.problems = problems
        return inputs

    def _present(self, rows: Dataset) -> dict[str, list[bool]]:
        """Returns masks of the rows with an image and of the rows with a text, for the encoders of the model."""
        present = {PRESENT[0]: has_image(rows, self.image)} if self.image else {}
        return present | ({PRESENT[1]: has_text(rows, self.texts)} if self.texts else {})

    def _row_problems(self, rows: Dataset, split: str) -> list[str]:
        problems = []
        if self.image:
            problems = unreadable_images(rows, self.image, split, self.max_pixels, optional=True)
        empty = self._empty(rows)
        if empty:
            problems.append(
                f"data.source: {split} has {len(empty)} row(s) with {self._no_inputs}, at row "
                f"{shorten([str(row) for row in empty], 8)}. Set data.on_error skip to exclude them."
            )
        return problems

    @property
    def _no_inputs(self) -> str:
        """Description of an empty row."""
        return "neither image nor text" if self.image and self.texts else "no " + ("image" if self.image else "text")

    def _empty(self, rows: Dataset) -> list[int]:
        """Returns the indices of rows with neither image nor text."""
        return [row for row, present in enumerate(zip(*self._present(rows).values(), strict=True)) if not any(present)]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with an unreadable image, and those with neither image nor text."""
        invalid: dict[str, dict[int, BadRow]] = {}
        column = self.image or (self.texts[0] if self.texts else "")
        for split, rows in splits.items():
            invalid[split] = {row: BadRow(self._no_inputs, column) for row in self._empty(rows)}
            if self.image:
                invalid[split] |= broken_images(rows, self.image, split, self.max_pixels, optional=True)
        return invalid

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> ImageTextRows:
        """Returns examples with tokenized texts and images that are decoded on access.

        Raises:
            DataError: A row is empty, or lacks an input and the model was trained without `model.modality_dropout`.
        """
        from transformers import DataCollatorWithPadding

        present = self._present(dataset)
        self._raise_if_missing(present, processor)
        other_columns = [*self.numbers["names"], *self.categories, *keep]
        other_columns = [name for name in dict.fromkeys(other_columns) if name in dataset.column_names]
        images = texts = None
        if self.image in dataset.column_names:
            split = self.split_of.get(dataset._fingerprint, "")
            image_column = dataset.select_columns([self.image])
            images = OptionalImageRows(image_column, self.image, processor.image, seed, self.max_pixels, split)
        text_columns = [name for name in self.texts if name in dataset.column_names]
        if text_columns:
            self.collator = DataCollatorWithPadding(processor.tokenizer)
            joined = joined_texts(dataset, text_columns, self.template)
            limit = token_limit(processor.tokenizer, max_length)
            texts = tokenize(joined, processor.tokenizer, [TEXT], limit, ())
        table = None
        if other_columns:
            table = with_names(dataset.select_columns(other_columns), list(self.categories))
        return ImageTextRows(table, images, texts, present)

    def _raise_if_missing(self, present: dict[str, list[bool]], processor: Any) -> None:
        missing = {
            name.removesuffix("_present"): [str(row) for row, is_present in enumerate(mask) if not is_present]
            for name, mask in present.items()
        }
        empty = sorted(set.intersection(*map(set, missing.values())), key=int)
        if empty:
            raise DataError(f"row {shorten(empty, 8)}: {self._no_inputs}. Remove the row.")
        facts = [f"no {name} in row {shorten(rows, 5)}" for name, rows in missing.items() if rows]
        if facts and not processor.optional:
            raise DataError(
                f"model.modality_dropout: {' and '.join(facts)}, but the model was trained without missing inputs. "
                "Train with --model.modality_dropout 0.2, or remove these rows."
            )

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images and pads texts to the longest of the batch; the model standardizes numbers."""
        from hftl.models.processing_image_text import category_ids

        inputs: dict[str, Tensor] = {
            name: torch.tensor([example[name] for example in examples]) for name in PRESENT if name in examples[0]
        }
        if VECTORS in examples[0]:
            inputs[VECTORS] = torch.stack([torch.from_numpy(np.array(example[VECTORS])) for example in examples])
        elif "pixel_values" in examples[0]:
            inputs["pixel_values"] = torch.stack([example["pixel_values"] for example in examples])
        if "input_ids" in examples[0]:
            names = ("input_ids", "token_type_ids")
            inputs |= self.collator(
                [{name: example[name] for name in names if name in example} for example in examples]
            )
        if self.numbers["names"]:
            values = [[_number(example.get(name), name) for name in self.numbers["names"]] for example in examples]
            inputs["numbers"] = torch.tensor(values, dtype=torch.float32)
        if self.categories:
            rows = [[example.get(name) for name in self.categories] for example in examples]
            inputs["categories"] = category_ids(rows, list(self.categories.values()))
        return inputs

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("image", "texts", "template", "numbers", "categories", "max_pixels")
        return {name: getattr(self, name) for name in names}


def _number(value: Any, column: str) -> float:
    """Returns a number; NaN for None.

    Raises:
        DataError: The value is not a number, or infinite.
    """
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise DataError(f"column '{column}': {value!r} is not a finite number. Leave unknown values empty.")
    return number
