"""One look at every row of all splits: what cannot be used, what is compared, and what is almost the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hftl.audit import near_duplicate_images as near_images
from hftl.audit import near_duplicate_texts as near_texts
from hftl.audit.finding import Entry, Finding, Numbering
from hftl.audit.image_stats import FLAT, drawn, inspect, outlier_images, pictures_at
from hftl.audit.text_normalization import BATCH, key_of, normalised_pair, text_rows, verbatim_pair
from hftl.data.columns import find_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow
from hftl.errors import DataError
from hftl.logging import log, suppress_logs
from hftl.preprocessing.sliding_windows import words_in
from hftl.tasks.targets.segmentation.masks import find_image_and_mask, survey_masks

Pairs = list[tuple[int, int, float]]


@dataclass
class Survey:
    """What one pass over the rows keeps of them."""

    keys: Any
    """Of what is compared, [N] uint64."""
    verbatim: Any
    """Of the rows as they stand, [N] uint64."""
    unusable: dict[int, str]
    """Rows that cannot be inputs, with the reason."""
    findings: list[Finding]
    """About single rows: unreadable, empty, odd."""

    @property
    def usable(self) -> Any:
        """Which rows can be inputs, [N] bool."""
        usable = np.ones(len(self.keys), bool)
        usable[list(self.unusable)] = False
        return usable


def words_as_texts(splits: Splits) -> Splits:
    """Returns rows whose lists of words are texts, joined by blanks, where they have neither images nor texts."""
    from datasets import Value

    column = _words_column(splits)
    if column is None:
        return splits

    def joined(row: dict[str, Any]) -> dict[str, str]:
        return {column: words_in(row[column])[0]}

    sets = {}
    for split, rows in splits.items():
        kinds = rows.features.copy()
        kinds[column] = Value("string")
        sets[split] = rows.map(joined, features=kinds)
    return replace(splits, sets=sets)


def _words_column(splits: Splits) -> str | None:
    features, config = splits["train"].features, splits.config
    with suppress_logs():
        for role, given in (("image", config.image_column), ("text", config.text_column)):
            with suppress(DataError):
                if not hasattr(features[find_column(role, features, given).name], "feature"):
                    return None
        with suppress(DataError):
            return find_column("words", features, config.text_column).name
    return None


class TextSurvey(Survey):
    """Of texts, or pairs of texts.

    Args:
        splits: All rows.
        numbering: Of their rows.
        columns: One text column, or two for pairs.
    """

    images = False
    verbatim_is = "letter by letter"

    def __init__(self, splits: Splits, numbering: Numbering, columns: Sequence[str]) -> None:
        self.splits, self.numbering, self.columns = splits, numbering, list(columns)
        keys, letters = np.zeros(len(numbering), np.uint64), np.zeros(len(numbering), np.uint64)
        unusable: dict[int, str] = {}
        for split, rows in splits.items():
            number = numbering.of_split(split).start
            for batch in text_rows(rows, columns):
                for texts in batch:
                    keys[number], letters[number] = key_of(normalised_pair(texts)), key_of(verbatim_pair(texts))
                    empty = [name for name, text in zip(columns, texts, strict=True) if not text.strip()]
                    if empty:
                        unusable[number] = f"no text in column '{empty[0]}'"
                    number += 1
        entries = tuple(Entry(*numbering.address(number), why) for number, why in unusable.items())
        empty = Finding("empty", "A text that is missing, empty or blank.", entries)
        unreadable = Finding("unreadable", "Rows are read when the data are opened; all were.")
        super().__init__(keys, letters, unusable, [unreadable, empty])

    def near(self, numbers: Any) -> tuple[Pairs, str]:
        """Returns the pairs among some rows that are almost the same, and how that was found out."""
        bands = np.concatenate([near_texts.band_hashes(batch) for batch in self._normalised(numbers)] or [[]])
        pairs, cut = near_texts.candidates(bands) if len(bands) > 1 else (np.empty((0, 2), np.int64), False)
        log(f"check: comparing {len(pairs):,} pairs of texts")

        def texts_of(positions: Any) -> list[str]:
            return [text for batch in self._normalised(numbers[positions]) for text in batch]

        found = near_texts.similar_pairs(pairs, texts_of)
        how = (
            f"Jaccard similarity of the normalised texts' pieces of {near_texts.SHINGLE} characters, at least "
            f"{near_texts.SIMILAR:g}; candidates by MinHash.{_cut(cut, near_texts.MOST)}"
        )
        return [(int(numbers[a]), int(numbers[b]), similarity) for a, b, similarity in found], how

    def _normalised(self, numbers: Any) -> Any:
        """Yields the normalised texts of some rows, in ascending order of their numbers, by batches."""
        for split, chosen in self.numbering.rows(numbers).items():
            for start in range(0, len(chosen), BATCH):
                for batch in text_rows(self.splits[split], self.columns, chosen[start : start + BATCH]):
                    yield [normalised_pair(texts) for texts in batch]


class ImageSurvey(Survey):
    """Of images.

    Args:
        splits: All rows.
        numbering: Of their rows.
        column: The image column.
    """

    images = True
    verbatim_is = "byte by byte"

    def __init__(self, splits: Splits, numbering: Numbering, column: str) -> None:
        self.splits, self.numbering, self.columns = splits, numbering, [column]
        self.max_pixels = splits.config.max_pixels
        seen = {split: inspect(rows, column, split, self.max_pixels) for split, rows in splits.items()}
        unusable = {
            numbering.of_split(split).start + row: reason
            for split, pictures in seen.items()
            for row, reason in sorted(pictures.unreadable.items())
        }
        masks = _invalid_masks(splits, numbering, column)
        unusable = dict(sorted({**masks, **unusable}.items()))
        entries = tuple(Entry(*numbering.address(number), why) for number, why in unusable.items())
        sentence = "Every image, and every mask if there are masks, was decoded; these could not be used."
        unreadable = Finding("unreadable", sentence, entries)
        self.hashes = np.concatenate([pictures.hashes for pictures in seen.values()])
        sizes = np.concatenate([pictures.sizes for pictures in seen.values()])
        spread = np.concatenate([pictures.spread for pictures in seen.values()])
        self.comparable = (sizes.min(1) >= near_images.SMALLEST) & (spread >= FLAT)
        super().__init__(
            np.concatenate([pictures.pixels for pictures in seen.values()]),
            np.concatenate([pictures.files for pictures in seen.values()]),
            unusable,
            [unreadable, outlier_images(seen)],
        )

    def near(self, numbers: Any) -> tuple[Pairs, str]:
        """Returns the pairs among some rows that show almost the same, and how that was found out."""
        chosen = numbers[self.comparable[numbers]]
        pairs, cut = near_images.close_hashes(self.hashes[chosen])
        log(f"check: comparing {len(pairs):,} pairs of images")
        found = near_images.same_pictures(pairs, lambda position: self._picture(int(chosen[position])))
        how = (
            f"Correlation of grey pixels at the best of {near_images.WINDOWS} overlaps, at least "
            f"{near_images.CORRELATED:g}; candidates by dHash of {near_images.BITS} bits that differ in at most "
            f"{near_images.DIFFERENT}. It finds copies that were resized, recompressed or cropped by a twentieth; "
            f"pictures under {near_images.SMALLEST} pixels or of one colour are not compared."
            f"{_cut(cut, near_images.MOST)}"
        )
        return [(int(chosen[a]), int(chosen[b]), similarity) for a, b, similarity in found], how

    def _picture(self, number: int) -> Any:
        split, row = self.numbering.address(number)
        return drawn(pictures_at(self.splits[split], self.columns[0], [row])[0], self.max_pixels)


def _invalid_masks(splits: Splits, numbering: Numbering, image: str) -> dict[int, str]:
    """Returns the rows whose masks cannot be decoded or do not fit the image, with the reason; {} without masks."""
    with suppress_logs(), suppress(DataError):
        found, mask = find_image_and_mask(splits["train"].features, splits.config)
        if found.name == image:
            return {
                numbering.of_split(split).start + row: f"{look.reason} (mask {look.path or look.value})"
                for split, rows in splits.items()
                if mask.name in rows.features
                for row, look in enumerate(survey_masks(rows, image, mask.name, split, splits.config.max_pixels))
                if isinstance(look, BadRow)
            }
    return {}


def _cut(cut: bool, most: int) -> str:
    return f" There were more candidates than {most:,}; only the closest were compared." if cut else ""
