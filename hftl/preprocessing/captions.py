"""Images with captions: one a row, or a list of them; and which rows say that the two belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.data.columns import Column, arrow_column
from hftl.data.image_decoding import Stored, quiet_pillow
from hftl.data.roles import ROLES, usual_column, usual_columns
from hftl.errors import DataError, nearest
from hftl.loading.loader import Example
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows, untouched_rng
from hftl.preprocessing.multimodal import VectorRows

if TYPE_CHECKING:
    from datasets import Dataset, Features


class CaptionedRows:
    """Rows with an image, with captions, or with both; images are decoded when fetched.

    Args:
        dataset: The rows.
        image: The image column; None where there is none.
        captions: The column of captions, texts or lists of texts; None where there is none.
        processor: The image encoder's expectations.
        seed: Of the augmentation and of the caption that is drawn from a list; None for evaluation, with all captions.
        max_pixels: Largest image that is decoded.
        split: Its name, for messages.
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
            assert processor is not None, "a model that reads images has their processor"
            self.images = ImageRows(dataset, image, processor, seed, max_pixels, split)

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> list[Any]:
        """Returns what the examples depend on."""
        return [self.dataset._fingerprint, self.seed, self.images.identity() if self.images else None]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `pixel_values` and what tells images apart, and with a list of captions.

        `image_key` is the image's file, or its bytes where it is in none. Training draws one of several captions, by
        (seed, epoch, row) alone; in evaluation `several` says that they are all there.
        """
        table = (self.images.dataset if self.images else self.dataset)[list(rows)]
        examples = []
        with untouched_rng(), quiet_pillow():
            for position, row in enumerate(rows):
                example = self._beside(table, position, row, epoch)
                if self.images is not None:
                    stored: Stored = table[self.images.column][position]
                    example["pixel_values"] = self.images.pixels(stored, row, epoch)
                examples.append(example)
        return examples

    def beside(self, rows: Sequence[int]) -> list[Example]:
        """Returns examples without pixels."""
        table = (self.images.dataset if self.images else self.dataset)[list(rows)]
        return [self._beside(table, position, row, 0) for position, row in enumerate(rows)]

    def _beside(self, table: Mapping[str, Any], position: int, row: int, epoch: int) -> Example:
        example: Example = {}
        if self.images is not None:
            stored: Stored = table[self.images.column][position]
            example["image_key"] = (stored or {}).get("bytes") or (stored or {}).get("path") or ""
        if self.captions is not None:
            example |= self._captions(table[self.captions][position], row, epoch)
        return example

    def _captions(self, found: str | list[str], row: int, epoch: int) -> Example:
        if isinstance(found, str):
            return {"captions": [found], "several": False}
        if self.seed is None:
            return {"captions": found, "several": True}
        drawn = np.random.default_rng([self.seed, epoch, row]).integers(len(found))
        return {"captions": [found[drawn]], "several": False}


class SingleCaptionRows(CaptionedRows):
    """Rows with one caption each: nothing but the augmentation of images is drawn, so vectors can stand for them."""

    def with_vectors(self, vectors: np.ndarray) -> VectorRows:
        """Returns the same rows with what the encoders made of them [N, D] in place of images and texts."""
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
    """Returns rows as `CaptionedRows`, of the kind that the column of captions makes possible."""
    one = captions is not None and ROLES["text"].accepts(dataset.features[captions])
    kind = SingleCaptionRows if one and image is not None else CaptionedRows
    return kind(dataset, image, captions, processor, seed, max_pixels, split)


def find_captions(features: Features, given: str | None) -> Column:
    """Returns the column of captions: texts, or lists of texts.

    Args:
        features: Names and types of the columns.
        given: `data.text_column`.

    Raises:
        DataError: There is none, or several could be it.
    """
    fitting = [name for name, kind in features.items() if ROLES["captions"].accepts(kind)]
    listing = ", ".join(features)
    if given is not None:
        if given in fitting:
            return Column(given, "named by data.text_column")
        what = "holds neither texts nor lists of texts" if given in features else "is not there"
        raise DataError(f"data.text_column: '{given}' {what}.{nearest(given, features)} Columns: {listing}.")
    named = usual_column("captions", features)
    if named is not None:
        return Column(named, "by its name")
    if len(fitting) == 1:
        return Column(fitting[0], "the only column that can hold texts")
    found = f"{' and '.join(fitting)} could each hold the captions" if fitting else "no column holds captions"
    raise DataError(f"data.text_column: {found}. Columns: {listing}. Say --data.text_column NAME.")


def find_match(rows: Dataset, given: str | None) -> str | None:
    """Returns the column of 0 and 1 that says which rows are pairs, or None: all are.

    Raises:
        DataError: `given` (`data.label_column`) is not such a column.
    """
    names = [given] if given is not None else usual_columns("match", rows.features)
    for name in names:
        if name not in rows.features:
            raise DataError(
                f"data.label_column: there is no column '{name}'.{nearest(name, rows.features)} "
                f"Columns: {', '.join(rows.features)}."
            )
        values = {value for value in arrow_column(rows, name).unique().to_pylist() if value is not None}
        if values and values <= {0, 1}:
            return name
    if given is not None:
        raise DataError(f"data.label_column: '{given}' must hold 1 (image and caption belong together) and 0 only.")
    return None


def matching(rows: Dataset, column: str | None) -> Dataset:
    """Returns the rows whose image and caption belong together; a row that does not say is not one."""
    if column is None or column not in rows.features:
        return rows
    values = arrow_column(rows, column).to_pylist()
    return rows.select([row for row, value in enumerate(values) if value])


def without_caption(rows: Dataset, column: str) -> list[int]:
    """Returns the numbers of the rows whose caption, or one of whose captions, is empty or missing, or has none."""
    bad = []
    for row, value in enumerate(arrow_column(rows, column).to_pylist()):
        texts = value if isinstance(value, list) else [value]
        if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
            bad.append(row)
    return bad
