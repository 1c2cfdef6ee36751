"""Scan of all rows: invalid inputs, keys for duplicates, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hftl.audit import near_duplicate_images as near_images
from hftl.audit import near_duplicate_texts as near_texts
from hftl.audit.finding import Entry, Finding, Numbering
from hftl.audit.image_stats import FLAT, inspect, outlier_images, stored_images
from hftl.audit.text_normalization import BATCH, key_of, normalized_pair, text_rows, verbatim_pair
from hftl.data.columns import find_column
from hftl.data.image_decoding import decode_image
from hftl.data.splits import Splits
from hftl.data.validation import BadRow
from hftl.errors import DataError
from hftl.logging import log, suppress_logs
from hftl.preprocessing.sliding_windows import words_in
from hftl.tasks.targets.segmentation.masks import find_image_and_mask, survey_masks

Pairs = list[tuple[int, int, float]]


@dataclass
class Scan:
    """Results of one pass over all rows."""

    keys: Any
    """Keys of the normalized inputs, [N] uint64."""
    verbatim: Any
    """Keys of the inputs without normalization, [N] uint64."""
    unusable: dict[int, str]
    """Reasons of invalid inputs by row number."""
    findings: list[Finding]
    """Findings about single rows: unreadable, empty, outlier images."""

    @property
    def usable(self) -> Any:
        """Whether each row is a valid input, [N] bool."""
        usable = np.ones(len(self.keys), bool)
        usable[list(self.unusable)] = False
        return usable


def words_as_texts(splits: Splits) -> Splits:
    """Joins lists of words to texts with spaces, if the data have neither images nor texts."""
    from datasets import Value

    column = _words_column(splits)
    if column is None:
        return splits

    def joined(row: dict[str, Any]) -> dict[str, str]:
        return {column: words_in(row[column])[0]}

    sets = {}
    for split, rows in splits.items():
        features = rows.features.copy()
        features[column] = Value("string")
        sets[split] = rows.map(joined, features=features)
    return replace(splits, sets=sets)


def _words_column(splits: Splits) -> str | None:
    features, config = splits["train"].features, splits.config
    with suppress_logs():
        for role, setting in (("image", config.image_column), ("text", config.text_column)):
            with suppress(DataError):
                if not hasattr(features[find_column(role, features, setting).name], "feature"):
                    return None
        with suppress(DataError):
            return find_column("words", features, config.text_column).name
    return None


class TextScan(Scan):
    """Scan of texts or pairs of texts.

    Args:
        splits: All rows.
        numbering: Row numbers over all splits.
        columns: One text column, or two for pairs.
    """

    images = False
    verbatim_is = "exact copy"

    def __init__(self, splits: Splits, numbering: Numbering, columns: Sequence[str]) -> None:
        self.splits, self.numbering, self.columns = splits, numbering, list(columns)
        keys, verbatim = np.zeros(len(numbering), np.uint64), np.zeros(len(numbering), np.uint64)
        unusable: dict[int, str] = {}
        for split, rows in splits.items():
            number = numbering.of_split(split).start
            for batch in text_rows(rows, columns):
                for texts in batch:
                    keys[number], verbatim[number] = key_of(normalized_pair(texts)), key_of(verbatim_pair(texts))
                    empty = [name for name, text in zip(columns, texts, strict=True) if not text.strip()]
                    if empty:
                        unusable[number] = f"empty text in column '{empty[0]}'"
                    number += 1
        entries = tuple(Entry(*numbering.address(number), why) for number, why in unusable.items())
        empty = Finding("empty", "Missing texts, and texts without characters other than whitespace.", entries)
        unreadable = Finding("unreadable", "All rows were read when the data were opened.")
        super().__init__(keys, verbatim, unusable, [unreadable, empty])

    def near_duplicates(self, numbers: Any) -> tuple[Pairs, str]:
        """Returns near-duplicate pairs among the rows at `numbers`, and the definition of their similarity."""
        bands = np.concatenate([near_texts.band_hashes(batch) for batch in self._normalized(numbers)] or [[]])
        pairs, truncated = near_texts.candidates(bands) if len(bands) > 1 else (np.empty((0, 2), np.int64), False)
        log(f"check: comparing {len(pairs):,} pairs of texts")

        def texts_of(positions: Any) -> list[str]:
            return [text for batch in self._normalized(numbers[positions]) for text in batch]

        similar = near_texts.similar_pairs(pairs, texts_of)
        method = (
            f"Jaccard similarity of {near_texts.SHINGLE}-character shingles of normalized texts, at least "
            f"{near_texts.SIMILAR:g}; candidates by MinHash.{_truncation(truncated, near_texts.MOST)}"
        )
        return [(int(numbers[a]), int(numbers[b]), similarity) for a, b, similarity in similar], method

    def _normalized(self, numbers: Any) -> Any:
        """Yields batches of normalized texts of the rows at `numbers`, in ascending order."""
        for split, rows in self.numbering.rows(numbers).items():
            for start in range(0, len(rows), BATCH):
                for batch in text_rows(self.splits[split], self.columns, rows[start : start + BATCH]):
                    yield [normalized_pair(texts) for texts in batch]


class ImageScan(Scan):
    """Scan of images.

    Args:
        splits: All rows.
        numbering: Row numbers over all splits.
        column: Image column.
    """

    images = True
    verbatim_is = "identical file"

    def __init__(self, splits: Splits, numbering: Numbering, column: str) -> None:
        self.splits, self.numbering, self.columns = splits, numbering, [column]
        self.max_pixels = splits.config.max_pixels
        stats = {split: inspect(rows, column, split, self.max_pixels) for split, rows in splits.items()}
        unusable = {
            numbering.of_split(split).start + row: reason
            for split, split_stats in stats.items()
            for row, reason in sorted(split_stats.unreadable.items())
        }
        masks = _invalid_masks(splits, numbering, column)
        unusable = dict(sorted({**masks, **unusable}.items()))
        entries = tuple(Entry(*numbering.address(number), why) for number, why in unusable.items())
        description = "All images and masks were decoded; these are unreadable or invalid."
        unreadable = Finding("unreadable", description, entries)
        self.hashes = np.concatenate([split_stats.hashes for split_stats in stats.values()])
        sizes = np.concatenate([split_stats.sizes for split_stats in stats.values()])
        contrast = np.concatenate([split_stats.contrast for split_stats in stats.values()])
        self.comparable = (sizes.min(1) >= near_images.SMALLEST) & (contrast >= FLAT)
        super().__init__(
            np.concatenate([split_stats.pixels for split_stats in stats.values()]),
            np.concatenate([split_stats.files for split_stats in stats.values()]),
            unusable,
            [unreadable, outlier_images(stats)],
        )

    def near_duplicates(self, numbers: Any) -> tuple[Pairs, str]:
        """Returns near-duplicate pairs among the rows at `numbers`, and the definition of their similarity."""
        comparable = numbers[self.comparable[numbers]]
        pairs, truncated = near_images.close_hashes(self.hashes[comparable])
        log(f"check: comparing {len(pairs):,} pairs of images")
        similar = near_images.correlated_images(pairs, lambda position: self._image(int(comparable[position])))
        method = (
            f"Correlation of gray pixels at the best of {near_images.WINDOWS} crop windows, at least "
            f"{near_images.CORRELATED:g}; candidates: {near_images.BITS}-bit dHash with up to "
            f"{near_images.DIFFERENT} different bits. Detects resized, recompressed and 5 % cropped copies. "
            f"Skips images under {near_images.SMALLEST} pixels and single-color images."
            f"{_truncation(truncated, near_images.MOST)}"
        )
        return [(int(comparable[a]), int(comparable[b]), similarity) for a, b, similarity in similar], method

    def _image(self, number: int) -> Any:
        split, row = self.numbering.address(number)
        stored = stored_images(self.splits[split], self.columns[0], [row])[0]
        return decode_image(stored, "RGB", self.max_pixels)


def _invalid_masks(splits: Splits, numbering: Numbering, image: str) -> dict[int, str]:
    """Returns reasons of masks that cannot be decoded or do not fit the image, by row number; {} without masks."""
    with suppress_logs(), suppress(DataError):
        image_column, mask = find_image_and_mask(splits["train"].features, splits.config)
        if image_column.name == image:
            return {
                numbering.of_split(split).start + row: f"{result.reason} (mask {result.path or result.value})"
                for split, rows in splits.items()
                if mask.name in rows.features
                for row, result in enumerate(survey_masks(rows, image, mask.name, split, splits.config.max_pixels))
                if isinstance(result, BadRow)
            }
    return {}


def _truncation(is_truncated: bool, limit: int) -> str:
    return f" Compared only the closest {limit:,} candidates." if is_truncated else ""
