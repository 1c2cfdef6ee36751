"""Image-caption pairs: one caption or a list of captions per image, with optional match labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.data.columns import Column, arrow_column
from hftl.data.image_decoding import Stored, quiet_pillow
from hftl.data.roles import ROLES, usual_column, usual_columns
from hftl.errors import DataError, nearest
from hftl.loading.loader import Example
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows, preserve_rng_state
from hftl.preprocessing.multimodal import VectorRows

if TYPE_CHECKING:
    from datasets import Dataset, Features


class CaptionedRows:
    """Rows with images, captions, or both; images are decoded when fetched.

    Args:
        dataset: Rows of a split.
        image: Image column, if any.
        captions: Caption column (strings or lists of strings), if any.
        processor: Preprocessing of the image encoder.
        seed: Seed of augmentation and caption sampling; None for evaluation, which uses all captions.
        max_pixels: Largest width x height of an image.
        split: Split name, for messages.
    """

    lengths = None

    def __init__(
        self,
        dataset: Dataset,
        image: str | None,
        captions: str | None,
        processor: ImageProcessor | None,
        seed: int | None,
        max_pixels: int,
        split: str,
    ) -> None:
        self.dataset = dataset
        self.captions = captions
        self.seed = seed
        self.images = None
        if image is not None:
            assert processor is not None, "image models have an image processor"
            self.images = ImageRows(dataset, image, processor, seed, max_pixels, split)

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> list[Any]:
        """Returns the cache key of the examples, as JSON values."""
        return [self.dataset._fingerprint, self.seed, self.images.identity() if self.images else None]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `pixel_values`, `image_key`, `captions` and `several`.

        `image_key` identifies the image: its bytes if embedded, else its path. Training samples one caption of a list
        by (seed, epoch, row); in evaluation, `captions` has all captions and `several` is True for lists.
        """
        table = (self.images.dataset if self.images else self.dataset)[list(rows)]
        examples = []
        with preserve_rng_state(), quiet_pillow():
            for position, row in enumerate(rows):
                example = self._metadata(table, position, row, epoch)
                if self.images is not None:
                    stored: Stored = table[self.images.column][position]
                    example["pixel_values"] = self.images.pixels(stored, row, epoch)
                examples.append(example)
        return examples

    def fetch_metadata(self, rows: Sequence[int]) -> list[Example]:
        """Returns examples without `pixel_values`."""
        table = (self.images.dataset if self.images else self.dataset)[list(rows)]
        return [self._metadata(table, position, row, 0) for position, row in enumerate(rows)]

    def _metadata(self, table: Mapping[str, Any], position: int, row: int, epoch: int) -> Example:
        example: Example = {}
        if self.images is not None:
            stored: Stored = table[self.images.column][position]
            example["image_key"] = (stored or {}).get("bytes") or (stored or {}).get("path") or ""
        if self.captions is not None:
            example |= self._captions(table[self.captions][position], row, epoch)
        return example

    def _captions(self, captions: str | list[str], row: int, epoch: int) -> Example:
        if isinstance(captions, str):
            return {"captions": [captions], "several": False}
        if self.seed is None:
            return {"captions": captions, "several": True}
        index = np.random.default_rng([self.seed, epoch, row]).integers(len(captions))
        return {"captions": [captions[index]], "several": False}


class SingleCaptionRows(CaptionedRows):
    """Rows with one caption per image; without caption sampling, encoder embeddings can be cached."""

    def with_vectors(self, vectors: np.ndarray) -> VectorRows:
        """Returns the same rows with encoder embeddings [N, D] in place of images and captions."""
        return VectorRows(self, vectors)


def captioned_rows(
    dataset: Dataset,
    image: str | None,
    captions: str | None,
    processor: ImageProcessor | None,
    seed: int | None,
    max_pixels: int,
    split: str,
) -> CaptionedRows:
    """Returns `SingleCaptionRows` if every row has one image and one caption, else `CaptionedRows`."""
    is_single = captions is not None and ROLES["text"].accepts(dataset.features[captions])
    rows_class = SingleCaptionRows if is_single and image is not None else CaptionedRows
    return rows_class(dataset, image, captions, processor, seed, max_pixels, split)


def find_captions(features: Features, configured: str | None) -> Column:
    """Returns the caption column, of strings or lists of strings.

    Args:
        features: Names and types of the columns.
        configured: Value of `data.text_column`.

    Raises:
        DataError: The column is missing or ambiguous.
    """
    candidates = [name for name, kind in features.items() if ROLES["captions"].accepts(kind)]
    listing = ", ".join(features)
    if configured is not None:
        if configured in candidates:
            return Column(configured, "set by data.text_column")
        problem = "has neither strings nor lists of strings" if configured in features else "does not exist"
        raise DataError(
            f"data.text_column: '{configured}' {problem}.{nearest(configured, features)} Columns: {listing}."
        )
    by_name = usual_column("captions", features)
    if by_name is not None:
        return Column(by_name, "by name")
    if len(candidates) == 1:
        return Column(candidates[0], "only text column")
    problem = (
        f"{' and '.join(candidates)} could each be the caption column" if candidates else "no caption column found"
    )
    raise DataError(f"data.text_column: {problem}. Columns: {listing}. Set --data.text_column NAME.")


def find_match(rows: Dataset, configured: str | None) -> str | None:
    """Returns the match column (1: positive pair, 0: negative pair), or None if all rows are positive pairs.

    Args:
        rows: Training rows.
        configured: Value of `data.label_column`.

    Raises:
        DataError: The column `configured` does not exist or has other values than 0 and 1.
    """
    names = [configured] if configured is not None else usual_columns("match", rows.features)
    for name in names:
        if name not in rows.features:
            raise DataError(
                f"data.label_column: there is no column '{name}'.{nearest(name, rows.features)} "
                f"Columns: {', '.join(rows.features)}."
            )
        values = {value for value in arrow_column(rows, name).unique().to_pylist() if value is not None}
        if values and values <= {0, 1}:
            return name
    if configured is not None:
        raise DataError(
            f"data.label_column: '{configured}' has invalid values; allowed: 1 (positive pair) and 0 (negative pair)."
        )
    return None


def matching(rows: Dataset, column: str | None) -> Dataset:
    """Returns the positive pairs; rows without a match label are excluded, without a match column all are positive."""
    if column is None or column not in rows.features:
        return rows
    values = arrow_column(rows, column).to_pylist()
    return rows.select([row for row, value in enumerate(values) if value])


def without_caption(rows: Dataset, column: str) -> list[int]:
    """Returns the row numbers with an empty or missing caption, or an empty list of captions."""
    bad = []
    for row, value in enumerate(arrow_column(rows, column).to_pylist()):
        texts = value if isinstance(value, list) else [value]
        if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
            bad.append(row)
    return bad
