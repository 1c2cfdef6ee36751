"""Rows with an image, a text, numbers and categories, any of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hftl.data.columns import arrow_column
from hftl.data.image_decoding import Stored
from hftl.data.multimodal_columns import filled
from hftl.distributed import main_process_first
from hftl.loading.loader import Example
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows, is_absent
from hftl.preprocessing.tokenization import TextRows

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

TEXT = "hftl_text"
"""Column of the joined texts."""
PRESENT = ("image_present", "text_present")
VECTORS = "vectors"
"""Inputs of the model."""


class OptionalImageRows(ImageRows):
    """Images of which some may be missing: zeros stand for those."""

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        processor: ImageProcessor,
        training_seed: int | None,
        max_pixels: int,
        split: str,
    ) -> None:
        super().__init__(dataset, column, processor, training_seed, max_pixels, split)
        self.size = tuple(processor.data_config["input_size"])

    def _decode(self, stored: Stored, row: int) -> Any:
        return None if is_absent(stored) else super()._decode(stored, row)

    def example(self, image: Any, values: dict[str, Any]) -> Example:
        """Returns `pixel_values` [C, H, W] float32."""
        import torch

        return {"pixel_values": torch.zeros(self.size)} if image is None else super().example(image, values)


class ImageTextRows:
    """Rows whose parts come from several places; those that there are none of are None.

    Args:
        table: The columns that stay as they are (numbers, categories, labels).
        images: With the image of each row.
        texts: With the token ids of each row.
        present: Which rows have what, by the name of an input of the model, each [N].
    """

    def __init__(
        self,
        table: Dataset | None,
        images: OptionalImageRows | None,
        texts: TextRows | None,
        present: Mapping[str, Sequence[bool]],
    ) -> None:
        self.table, self.images, self.texts, self.present = table, images, texts, present
        self.lengths: np.ndarray | None = None if texts is None else texts.lengths

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def identity(self) -> Any:
        """Returns what the examples depend on, as JSON values."""
        parts = [part.identity() for part in (self.images, self.texts) if part is not None]
        return [self.table._fingerprint if self.table is not None else None, *parts]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with the entries of all parts."""
        examples = self.beside(rows)
        for part in (self.images, self.texts):
            if part is not None:
                for example, more in zip(examples, part.fetch(rows, epoch), strict=True):
                    example |= more
        return examples

    def beside(self, rows: Sequence[int]) -> list[Example]:
        """Returns what examples hold beside images and texts: the table's columns, and which inputs are there."""
        table: dict[str, list[Any]] = self.table[list(rows)] if self.table is not None else {}
        there = {name: [bool(of[row]) for row in rows] for name, of in self.present.items()}
        return [{name: values[i] for name, values in (table | there).items()} for i in range(len(rows))]

    def with_vectors(self, vectors: np.ndarray) -> VectorRows:
        """Returns the same rows with what the encoders made of them [N, D] in place of images and texts."""
        return VectorRows(self, vectors)


class RowsWithParts(Protocol):
    """Rows whose images and texts may be left out."""

    @property
    def lengths(self) -> np.ndarray | None:
        """As `Rows.lengths`."""
        ...

    def __len__(self) -> int: ...

    def beside(self, rows: Sequence[int]) -> list[Example]:
        """Returns examples without what encoders read."""
        ...


class VectorRows:
    """Rows with vectors in place of images and texts; see `ImageTextRows.with_vectors`."""

    def __init__(self, rows: RowsWithParts, vectors: np.ndarray) -> None:
        self.rows, self.vectors = rows, vectors
        self.lengths = rows.lengths  # so that steps hold the rows that they would hold without the cache

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `vectors` [D]."""
        return [
            example | {VECTORS: self.vectors[row]} for row, example in zip(rows, self.rows.beside(rows), strict=True)
        ]


def joined_texts(dataset: Dataset, columns: Sequence[str], template: str) -> Dataset:
    """Returns rows with the column `TEXT`, the texts of a template; empty where none of its columns is there."""
    from datasets.fingerprint import Hasher

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        cells = zip(*(batch[name] for name in columns), strict=True)
        rows = [dict(zip(columns, values, strict=True)) for values in cells]
        return {TEXT: [filled(template, row) if any(map(_is_text, row.values())) else "" for row in rows]}

    with main_process_first("join texts"):
        return dataset.select_columns(list(columns)).map(
            join,
            batched=True,
            remove_columns=list(columns),
            new_fingerprint=Hasher.hash([dataset._fingerprint, list(columns), template, "hftl 1"]),
            desc="join texts",
        )


def has_image(dataset: Dataset, column: str) -> list[bool]:
    """Returns which rows have an image; none is opened."""
    from datasets import Image

    if column not in dataset.column_names:
        return [False] * len(dataset)
    images = arrow_column(dataset.select_columns([column]).cast_column(column, Image(decode=False)), column)
    found: list[bool] = []
    for chunk in images.chunks:
        parts = [part.is_valid().to_pylist() for part in chunk.flatten()]  # bytes and path
        found += [any(part) for part in zip(*parts, strict=True)]
    return found


def has_text(dataset: Dataset, columns: Sequence[str]) -> list[bool]:
    """Returns which rows have a text in at least one of the columns."""
    values = [arrow_column(dataset, name).to_pylist() for name in columns if name in dataset.column_names]
    return [any(map(_is_text, row)) for row in zip(*values, strict=True)] if values else [False] * len(dataset)


def _is_text(value: Any) -> bool:
    return value is not None and bool(str(value).strip())
