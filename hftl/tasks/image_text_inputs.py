"""Images and texts, numbers and categories of the same row -> the inputs of a model that takes them together."""

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
    """Rows of a mixed table -> `pixel_values`, token ids, `numbers` and `categories`, and which inputs are there.

    Args:
        image: The image column, if any.
        texts: The text columns.
        template: How they become one text.
        numbers: `names`, `mean` and `std` of the numeric columns, from train.
        categories: Values of each categorical column in train.
        max_pixels: Largest image that is decoded, width x height.
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
        """Image, texts, numbers, categories."""
        named = {self.image: "image"} if self.image else {}
        kinds = (("text", self.texts), ("number", self.numbers["names"]), ("category", self.categories))
        return named | {name: kind for kind, names in kinds for name in names}

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that a row may lack: all of them, as far as the model has learnt to do without (see `encode`)."""
        return tuple(self.column_types)

    @property
    def options(self) -> dict[str, Any]:
        """What the data say about the architecture: see `hftl.models.image_text_model.build`."""
        return {
            "image": self.image is not None,
            "text": bool(self.texts),
            "numbers": self.numbers,
            "categories": self.categories,
            "incomplete": self.incomplete,
        }

    @classmethod
    def find(cls, splits: Splits, taken: Sequence[str]) -> ImageTextInputs:
        """Detects the columns, and looks at every row for what is missing; what is wrong goes into `problems`.

        Args:
            splits: Data to train on.
            taken: Columns that are spoken for: labels.
        """
        config, train = splits.config, splits["train"]
        try:
            columns = find_mixed(train, config, taken)
            found = cls._from(columns, train, config.max_pixels)
        except DataError as error:
            found = cls()
            found.problems = error.problems
            return found
        found.split_of = {rows._fingerprint: split for split, rows in splits.items()}
        if not splits.lenient and not found.problems:
            found.problems = check_splits(splits, found._row_problems)
            lacking = Counter[str]()
            for rows in splits.values():
                lacking += Counter(
                    {name.removesuffix("_present"): p.count(False) for name, p in found._present(rows).items()}
                )
            found.incomplete = dict(lacking)
        return found

    @classmethod
    def _from(cls, columns: MixedColumns, train: Dataset, max_pixels: int) -> ImageTextInputs:
        numbers, problems = train_numbers(train, columns.numbers)
        categories = train_categories(train, columns.categories)
        found = cls(columns.image, columns.texts, columns.template, numbers, categories, max_pixels)
        found.problems = problems
        return found

    def _present(self, rows: Dataset) -> dict[str, list[bool]]:
        """Returns which rows have an image, and which a text, as far as the model takes them."""
        found = {PRESENT[0]: has_image(rows, self.image)} if self.image else {}
        return found | ({PRESENT[1]: has_text(rows, self.texts)} if self.texts else {})

    def _row_problems(self, rows: Dataset, split: str) -> list[str]:
        problems = []
        if self.image:
            problems = unreadable_images(rows, self.image, split, self.max_pixels, optional=True)
        empty = self._empty(rows)
        if empty:
            problems.append(
                f"data.source: {split} has {len(empty)} row(s) with {self._nothing}, at row "
                f"{shorten([str(row) for row in empty], 8)}; leave them out with --data.on_error skip."
            )
        return problems

    @property
    def _nothing(self) -> str:
        return "neither image nor text" if self.image and self.texts else "no " + ("image" if self.image else "text")

    def _empty(self, rows: Dataset) -> list[int]:
        """Returns the rows that have no image and no text."""
        return [row for row, parts in enumerate(zip(*self._present(rows).values(), strict=True)) if not any(parts)]

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose image is broken, and those that have neither image nor text."""
        found: dict[str, dict[int, BadRow]] = {}
        where = self.image or (self.texts[0] if self.texts else "")
        for split, rows in splits.items():
            found[split] = {row: BadRow(self._nothing, where) for row in self._empty(rows)}
            if self.image:
                found[split] |= broken_images(rows, self.image, split, self.max_pixels, optional=True)
        return found

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> ImageTextRows:
        """Returns rows whose texts are tokenized, and whose images are decoded when fetched.

        Raises:
            DataError: An image or text is missing, and the model was trained without `model.modality_dropout`.
        """
        from transformers import DataCollatorWithPadding

        present = self._present(dataset)
        self._refuse_missing(present, processor)
        stay = [*self.numbers["names"], *self.categories, *keep]
        stay = [name for name in dict.fromkeys(stay) if name in dataset.column_names]
        images = texts = None
        if self.image in dataset.column_names:
            split = self.split_of.get(dataset._fingerprint, "")
            of_image = dataset.select_columns([self.image])
            images = OptionalImageRows(of_image, self.image, processor.image, seed, self.max_pixels, split)
        there = [name for name in self.texts if name in dataset.column_names]
        if there:
            self.collator = DataCollatorWithPadding(processor.tokenizer)
            joined = joined_texts(dataset, there, self.template)
            limit = token_limit(processor.tokenizer, max_length)
            texts = tokenize(joined, processor.tokenizer, [TEXT], limit, ())
        table = with_names(dataset.select_columns(stay), list(self.categories)) if stay else None
        return ImageTextRows(table, images, texts, present)

    def _refuse_missing(self, present: dict[str, list[bool]], processor: Any) -> None:
        missing = {
            name.removesuffix("_present"): [str(row) for row, there in enumerate(of) if not there]
            for name, of in present.items()
        }
        none = sorted(set.intersection(*map(set, missing.values())), key=int)
        if none:
            raise DataError(f"row {shorten(none, 8)} has {self._nothing}; there is nothing to see.")
        listed = [f"no {name} in row {shorten(rows, 5)}" for name, rows in missing.items() if rows]
        if listed and not processor.optional:
            raise DataError(
                f"there is {' and '.join(listed)}, and this model was trained without model.modality_dropout: it has "
                "not learnt to do without. Train with --model.modality_dropout 0.2, or leave these rows out."
            )

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images, pads texts to the longest of the batch, standardises nothing: the model does."""
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
    """Returns a number, NaN where it is missing.

    Raises:
        DataError: It is no number, or infinite.
    """
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise DataError(f"column '{column}': {value!r} is not a number; leave it empty where it is not known.")
    return number
