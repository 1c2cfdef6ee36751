"""Objects in images: what a column of boxes and categories holds, and which of its rows cannot be used.

The column is what detection data sets on the hub have: `objects` with `bbox` (COCO's x, y, width, height in pixels from
the top left corner) and `category`, a list of each or a list of both; `iscrowd` beside them is understood, and so is
the size of the image that they were drawn on, which our readers of COCO and VOC add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.data.columns import Column
from hftl.data.image_decoding import Stored, place, quiet_pillow, upright_size
from hftl.data.layouts.coco_files import DRAWN_ON
from hftl.data.roles import OBJECT_FIELDS, item_type, usual_column
from hftl.data.validation import BadRow
from hftl.errors import DataError, nearest, shorten

if TYPE_CHECKING:
    from datasets import Dataset, Features

_AT_ONCE = 256
_SHARES = 1 + 1e-6
"""Right and bottom of boxes in shares of the image at most, with the rounding of float32."""
_SLACK = 2
"""Pixels by which a box may leave its image without being talked of: tools round, and count from 0 or from 1."""


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: Corners x0 y0 x1 y1 [N, 4] in pixels, float64, inside the image.
        classes: Class numbers [N], int64.
        crowd: Which boxes are groups that nobody has counted [N], bool: not trained on, and no detection there is
            called wrong.
        cut: How many boxes reached out of the image by more than `_SLACK` pixels.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    cut: int = 0


@dataclass(frozen=True)
class ObjectSurvey:
    """What was seen of the objects of a split.

    Attributes:
        bad: The rows that cannot be used, by number.
        boxes: How many boxes the other rows have.
        cut: How many of these are cut off, as `Objects.cut`.
    """

    bad: Mapping[int, BadRow]
    boxes: int
    cut: int


@dataclass(frozen=True)
class ObjectColumn:
    """How a column's values are read.

    Attributes:
        name: The column.
        box: Its field with boxes.
        category: Its field with categories.
        crowd: Its field that marks crowds, if it has one.
        listed: Whether an image's objects are a list of records, rather than a record of lists.
        names: Names of numbered categories, where the data have them.
        size: Its field with the width and height that boxes were drawn on, if it has one.
    """

    name: str
    box: str
    category: str
    crowd: str | None
    listed: bool
    names: tuple[str, ...] | None
    size: str | None = None

    def values(self, cell: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Returns boxes, categories (by name where they have one) and crowd marks of a cell, as they stand there."""
        if self.listed:
            cell = {field: [item[field] for item in cell] for field in (self.box, self.category, self.crowd) if field}
        boxes, categories = cell[self.box] or [], cell[self.category] or []
        crowd = (cell[self.crowd] if self.crowd else None) or [False] * len(boxes)
        if self.names is not None:
            known = range(len(self.names))
            categories = [self.names[code] if code in known else None for code in categories]
        return boxes, categories, crowd

    def read(self, cell: Any, classes: Mapping[Any, int], size: tuple[int, int]) -> Objects:
        """Returns the objects of an image; what of a box lies outside of it is cut off.

        Args:
            cell: The column's value.
            classes: Class number of each category.
            size: Height and width of the image in pixels.

        Raises:
            DataError: A kind of reason, and after a colon the details.
        """
        if cell is None:
            raise DataError("no objects: the value is missing; an image without objects has empty lists")
        boxes, categories, crowd = self.values(cell)
        if not len(boxes) == len(categories) == len(crowd):
            raise DataError(f"uneven lists: {len(boxes)} boxes, {len(categories)} categories")
        drawn_on = cell[self.size] if self.size else None
        if len(boxes) and drawn_on and tuple(drawn_on) != size[::-1]:
            raise DataError(_other_size(drawn_on, size))
        corners = np.zeros((len(boxes), 4))
        for number, (box, category) in enumerate(zip(boxes, categories, strict=True)):
            corners[number] = _corners(box, number, size)
            if category not in classes:
                said = "has none that the data list" if category is None else f"is {category!r}"
                raise DataError(f"unknown category: box {number} {said}.{nearest(str(category), map(str, classes))}")
        numbers = np.array([classes[category] for category in categories], dtype=np.int64)
        kept = corners.clip(0, [*size[::-1], *size[::-1]])
        cut = int((abs(corners - kept) > _SLACK).any(1).sum())
        return Objects(kept, numbers, np.array([bool(mark) for mark in crowd], dtype=bool), cut)


def _other_size(drawn_on: Sequence[int], size: tuple[int, int]) -> str:
    """Returns what is wrong with boxes of an image of width and height `drawn_on` that has height and width `size`."""
    turned = " (turned, as its EXIF may say)" if tuple(drawn_on) == size else ""
    return (
        f"boxes of another size: they were drawn on {drawn_on[0]} x {drawn_on[1]} pixels, the image has "
        f"{size[1]} x {size[0]}{turned}; write them for the image as it is, upright"
    )


def _corners(box: Any, number: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Returns the corners of a box that lies in an image of height and width `size`, in part at least."""
    shown = f"box {number} ({box})"
    if box is None or len(box) != 4 or any(value is None for value in box):
        raise DataError(f"not a box: {shown} is not four numbers x, y, width, height")
    x, y, width, height = (float(value) for value in box)
    if not np.isfinite([x, y, width, height]).all():
        raise DataError(f"not a box: {shown} has a number that is not finite")
    if width < 0 or height < 0:
        raise DataError(f"reversed box: {shown} has a negative width or height")
    if width == 0 or height == 0:
        raise DataError(f"empty box: {shown} has no width or no height")
    right, bottom = x + width, y + height
    if min(right, size[1]) <= max(x, 0) or min(bottom, size[0]) <= max(y, 0):
        raise DataError(f"box outside: {shown} lies outside of the image of {size[1]} x {size[0]} pixels")
    if max(right, bottom) <= _SHARES:
        raise DataError(
            f"boxes in shares: {shown} ends within one pixel of the corner; boxes are x, y, width, height in pixels, "
            "not shares of the image"
        )
    return x, y, right, bottom


def find_objects(features: Features, given: str | None) -> tuple[Column, ObjectColumn]:
    """Returns the column with objects, and how it is read.

    Args:
        features: Names and types of the columns.
        given: `data.label_column`, if it is set.

    Raises:
        DataError: There is none, or several fit equally well.
    """
    fitting = {name: found for name, kind in features.items() if (found := _understood(name, kind))}
    listing = shorten([f"{name} ({type(kind).__name__})" for name, kind in features.items()], 8)
    wanted = "a record of lists (or a list of records) with bbox and category"
    if given is not None:
        if given not in features:
            raise DataError(f"data.label_column: there is no column '{given}'.{nearest(given, features)} {listing}.")
        if given not in fitting:
            raise DataError(f"data.label_column: '{given}' holds no objects: that is {wanted}.")
        return Column(given, "named by data.label_column"), fitting[given]
    named = usual_column("objects", {name: features[name] for name in fitting})
    if named is not None:
        return Column(named, "by its name"), fitting[named]
    if len(fitting) == 1:
        (name,) = fitting
        return Column(name, "the only column with boxes and categories"), fitting[name]
    if fitting:
        raise DataError(f"data.label_column: {' and '.join(fitting)} could each be the objects. Say which.")
    raise DataError(f"data.label_column: no column of objects found: {wanted}. Columns: {listing}.")


def _understood(name: str, kind: Any) -> ObjectColumn | None:
    """Returns how a column of this type is read, or None where it does not hold objects."""
    listed = not isinstance(kind, Mapping)
    fields = item_type(kind) if listed else kind
    if not isinstance(fields, Mapping):
        return None
    box, category, crowd = (
        next((field for field in OBJECT_FIELDS[role] if field in fields), None) for role in ("box", "category", "crowd")
    )
    if box is None or category is None:
        return None
    names = getattr(fields[category] if listed else item_type(fields[category]), "names", None)
    size = DRAWN_ON if not listed and DRAWN_ON in fields else None
    return ObjectColumn(name, box, category, crowd, listed, tuple(names) if names else None, size)


def categories_of(rows: Dataset, column: ObjectColumn) -> dict[Any, int]:
    """Returns how many objects of each category there are; rows that cannot be read are left for a survey."""
    counts: dict[Any, int] = {}
    for cells in _cells(rows, [column.name]):
        for cell in cells[column.name]:
            for category in column.values(cell)[1] if cell is not None else ():
                if category is not None:
                    counts[category] = counts.get(category, 0) + 1
    return counts


def survey_objects(
    rows: Dataset, column: ObjectColumn, image: str, classes: Mapping[Any, int], max_pixels: int
) -> ObjectSurvey:
    """Reads the objects of a split, and of its images the headers.

    Args:
        rows: A split.
        column: Where the objects are.
        image: The image column. Rows without a readable image are somebody else's to judge.
        classes: Class number of each category.
        max_pixels: As `data.max_pixels`.
    """
    from datasets import Image

    bad: dict[int, BadRow] = {}
    boxes = cut = 0

    def look(stored: Stored, cell: Any) -> str | Objects | None:
        try:
            size = upright_size(stored, max_pixels)
        except DataError:
            return None
        try:
            return column.read(cell, classes, size)
        except DataError as error:
            return str(error)

    start = 0
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for cells in _cells(rows.cast_column(image, Image(decode=False)), [image, column.name]):
            seen = list(pool.map(look, cells[image], cells[column.name]))
            for offset, found in enumerate(seen):
                if isinstance(found, Objects):
                    boxes, cut = boxes + len(found.boxes), cut + found.cut
                elif found:
                    stored = cells[image][offset]
                    path = (stored or {}).get("path")
                    bad[start + offset] = BadRow(found, column.name, place(stored), path)
            start += len(seen)
    return ObjectSurvey(bad, boxes, cut)


def objects_problems(bad: Mapping[int, BadRow], split: str) -> list[str]:
    """Returns a sentence on the rows of a split whose objects cannot be used, if there are any."""
    if not bad:
        return []
    first = shorten([f"row {row} ({why.value}): {why.reason}" for row, why in sorted(bad.items())], 5)
    return [
        f"data.source: {split} has {len(bad)} row(s) with objects that cannot be used: {first}. Repair them, or leave "
        "these rows out with --data.on_error skip."
    ]


def cut_sentences(seen: ObjectSurvey, split: str) -> list[str]:
    """Returns a sentence on the boxes of a split that reach out of their images, if there are any."""
    if not seen.cut:
        return []
    return [
        f"data: {split}: {seen.cut:,} of {seen.boxes:,} boxes reach out of their images by more than {_SLACK} pixels "
        "and are cut off there; their numbers are taken for x, y, width, height (not x0, y0, x1, y1)"
    ]


def _cells(rows: Dataset, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    part = rows.select_columns(list(columns))
    for start in range(0, len(part), _AT_ONCE):
        yield part[start : start + _AT_ONCE]
