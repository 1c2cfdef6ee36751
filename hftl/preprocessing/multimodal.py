"""Multimodal examples of image, text, numeric and categorical columns, with missing values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hftl.data.columns import arrow_column
from hftl.data.image_decoding import Stored
from hftl.data.multimodal_columns import fill_template
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
"""Model inputs: presence masks of the modalities."""
VECTORS = "vectors"
"""Model input: cached encoder embeddings."""


class OptionalImageRows(ImageRows):
    """Rows with optional images; missing images become zeros."""

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
    """Rows that combine table columns, images and texts; absent modalities are None.

    Args:
        table: Numeric, categorical and label columns.
        images: Image of each row.
        texts: Token ids of each row.
        present: Presence mask [N] of each modality, by name of the model input.
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
        """Returns the cache key of the examples, as JSON values."""
        keys = [rows.identity() for rows in (self.images, self.texts) if rows is not None]
        return [self.table._fingerprint if self.table is not None else None, *keys]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with the inputs of all modalities."""
        examples = self.fetch_metadata(rows)
        for modality in (self.images, self.texts):
            if modality is not None:
                for example, inputs in zip(examples, modality.fetch(rows, epoch), strict=True):
                    example |= inputs
        return examples

    def fetch_metadata(self, rows: Sequence[int]) -> list[Example]:
        """Returns examples without images and texts: table columns and presence masks."""
        table: dict[str, list[Any]] = self.table[list(rows)] if self.table is not None else {}
        masks = {name: [bool(mask[row]) for row in rows] for name, mask in self.present.items()}
        return [{name: values[i] for name, values in (table | masks).items()} for i in range(len(rows))]

    def with_vectors(self, vectors: np.ndarray) -> VectorRows:
        """Returns the same rows with encoder embeddings [N, D] in place of images and texts."""
        return VectorRows(self, vectors)


class EncodableRows(Protocol):
    """Rows whose encoder inputs (images and texts) can be replaced by embeddings."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Sizes of the rows [N] for batching by length, or None; see `Examples.lengths`."""
        ...

    def __len__(self) -> int: ...

    def fetch_metadata(self, rows: Sequence[int]) -> list[Example]:
        """Returns examples without encoder inputs."""
        ...


class VectorRows:
    """Rows with encoder embeddings [N, D] in place of images and texts."""

    def __init__(self, rows: EncodableRows, vectors: np.ndarray) -> None:
        self.rows, self.vectors = rows, vectors
        self.lengths = rows.lengths  # the same steps as without cached embeddings

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `vectors` [D]."""
        return [
            example | {VECTORS: self.vectors[row]}
            for row, example in zip(rows, self.rows.fetch_metadata(rows), strict=True)
        ]


def joined_texts(dataset: Dataset, columns: Sequence[str], template: str) -> Dataset:
    """Returns rows with the filled template in the column `TEXT`; empty if all its columns are missing."""
    from datasets.fingerprint import Hasher

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        cells = zip(*(batch[name] for name in columns), strict=True)
        rows = [dict(zip(columns, values, strict=True)) for values in cells]
        return {TEXT: [fill_template(template, row) if any(map(_is_text, row.values())) else "" for row in rows]}

    with main_process_first("join texts"):
        return dataset.select_columns(list(columns)).map(
            join,
            batched=True,
            remove_columns=list(columns),
            new_fingerprint=Hasher.hash([dataset._fingerprint, list(columns), template, "hftl 1"]),
            desc="join texts",
        )


def has_image(dataset: Dataset, column: str) -> list[bool]:
    """Returns whether each row has an image, without opening any."""
    from datasets import Image

    if column not in dataset.column_names:
        return [False] * len(dataset)
    images = arrow_column(dataset.select_columns([column]).cast_column(column, Image(decode=False)), column)
    mask: list[bool] = []
    for chunk in images.chunks:
        fields = [field.is_valid().to_pylist() for field in chunk.flatten()]  # bytes and path
        mask += [any(values) for values in zip(*fields, strict=True)]
    return mask


def has_text(dataset: Dataset, columns: Sequence[str]) -> list[bool]:
    """Returns whether each row has a non-empty text in at least one of the columns."""
    values = [arrow_column(dataset, name).to_pylist() for name in columns if name in dataset.column_names]
    return [any(map(_is_text, row)) for row in zip(*values, strict=True)] if values else [False] * len(dataset)


def _is_text(value: Any) -> bool:
    return value is not None and bool(str(value).strip())
