"""Columns of objects (boxes with categories): detection, reading and validation.

The format is that of detection datasets on the Hub: `objects` with `bbox` (COCO's x, y, width, height in pixels from
the top left corner) and `category`, as two lists or as a list of records. Optional fields are `iscrowd` and the size of
the annotated image, which the COCO and VOC layouts of hftl add.
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
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset, Features

_CHUNK_ROWS = 256
_MAX_NORMALIZED = 1 + 1e-6
"""Largest right and bottom edge of normalized boxes, with float32 rounding."""
_TOLERANCE = 2
"""Pixels by which a box may exceed its image without a log line: tools round, and count from 0 or from 1."""


@dataclass(frozen=True)
class Objects:
    """Objects of one image.

    Attributes:
        boxes: Corners x0 y0 x1 y1 [N, 4] in pixels, float64, inside the image.
        classes: Class indices [N], int64.
        crowd: Whether each box is a crowd, a group of uncounted objects [N], bool. Crowds are not trained on, and
            detections inside them do not count as false positives.
        num_clipped: Number of boxes that exceeded the image by more than `_TOLERANCE` pixels.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    num_clipped: int = 0


@dataclass(frozen=True)
class ObjectScan:
    """Result of reading all objects of a split.

    Attributes:
        invalid: Invalid rows by row number.
        num_boxes: Number of boxes in valid rows.
        num_clipped: Number of these boxes that exceeded their image, as `Objects.num_clipped`.
    """

    invalid: Mapping[int, BadRow]
    num_boxes: int
    num_clipped: int


@dataclass(frozen=True)
class ObjectColumn:
    """Format of a column of objects.

    Attributes:
        name: The column.
        box: Field with boxes.
        category: Field with categories.
        crowd: Field with crowd flags, if there is one.
        is_list: Whether a cell is a list of records rather than a record of lists.
        names: Names of numbered categories, if the dataset has them.
        size: Field with width and height of the annotated image, if there is one.
    """

    name: str
    box: str
    category: str
    crowd: str | None
    is_list: bool
    names: tuple[str, ...] | None
    size: str | None = None

    def values(self, cell: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Returns boxes, categories (by name if they have one) and crowd flags of a cell, without validation."""
        if self.is_list:
            cell = {field: [item[field] for item in cell] for field in (self.box, self.category, self.crowd) if field}
        boxes, categories = cell[self.box] or [], cell[self.category] or []
        crowd = (cell[self.crowd] if self.crowd else None) or [False] * len(boxes)
        if self.names is not None:
            known = range(len(self.names))
            categories = [self.names[code] if code in known else None for code in categories]
        return boxes, categories, crowd

    def read(self, cell: Any, classes: Mapping[Any, int], size: tuple[int, int]) -> Objects:
        """Returns the objects of an image, with boxes clipped to the image.

        Args:
            cell: Value of the column.
            classes: Class index of each category.
            size: Height and width of the image in pixels.

        Raises:
            DataError: The objects are invalid. The message is a kind of error, a colon and the details.
        """
        if cell is None:
            raise DataError("no objects: the value is missing; images without objects need empty lists")
        boxes, categories, crowd = self.values(cell)
        if not len(boxes) == len(categories) == len(crowd):
            raise DataError(f"unequal list lengths: {len(boxes)} boxes, {len(categories)} categories")
        annotated = cell[self.size] if self.size else None
        if len(boxes) and annotated and tuple(annotated) != size[::-1]:
            raise DataError(_size_mismatch(annotated, size))
        corners = np.zeros((len(boxes), 4))
        for number, (box, category) in enumerate(zip(boxes, categories, strict=True)):
            corners[number] = _corners(box, number, size)
            if category not in classes:
                fact = "has a category without a name" if category is None else f"is {category!r}"
                raise DataError(f"unknown category: box {number} {fact}.{nearest(str(category), map(str, classes))}")
        indices = np.array([classes[category] for category in categories], dtype=np.int64)
        clipped = corners.clip(0, [*size[::-1], *size[::-1]])
        num_clipped = int((abs(corners - clipped) > _TOLERANCE).any(1).sum())
        return Objects(clipped, indices, np.array([bool(flag) for flag in crowd], dtype=bool), num_clipped)


def _size_mismatch(annotated: Sequence[int], size: tuple[int, int]) -> str:
    """Returns the error for boxes of an image of width and height `annotated` in one of height and width `size`."""
    rotated = " (possibly rotated by EXIF orientation)" if tuple(annotated) == size else ""
    return (
        f"image size mismatch: boxes are for {annotated[0]} x {annotated[1]} pixels, the image has "
        f"{size[1]} x {size[0]}{rotated}; annotate the upright image at its size"
    )


def _corners(box: Any, number: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Returns the corners of a box that overlaps the image of height and width `size`."""
    name = f"box {number} ({box})"
    if box is None or len(box) != 4 or any(value is None for value in box):
        raise DataError(f"invalid box: {name} is not four numbers x, y, width, height")
    x, y, width, height = (float(value) for value in box)
    if not np.isfinite([x, y, width, height]).all():
        raise DataError(f"invalid box: {name} has a non-finite number")
    if width < 0 or height < 0:
        raise DataError(f"negative box size: {name} has a negative width or height")
    if width == 0 or height == 0:
        raise DataError(f"empty box: {name} has zero width or height")
    right, bottom = x + width, y + height
    if min(right, size[1]) <= max(x, 0) or min(bottom, size[0]) <= max(y, 0):
        raise DataError(f"box outside image: {name} does not overlap the image of {size[1]} x {size[0]} pixels")
    if max(right, bottom) <= _MAX_NORMALIZED:
        raise DataError(
            f"normalized box: {name} ends within one pixel of the corner; boxes are x, y, width, height in pixels, "
            "not fractions of the image"
        )
    return x, y, right, bottom


def find_objects(features: Features, label_column: str | None) -> tuple[Column, ObjectColumn]:
    """Returns the column of objects and its format.

    Args:
        features: Names and types of the columns.
        label_column: Value of `data.label_column`.

    Raises:
        DataError: No column fits, or several fit equally well.
    """
    fitting = {name: column for name, kind in features.items() if (column := _object_column(name, kind))}
    listing = shorten([f"{name} ({type(kind).__name__})" for name, kind in features.items()], 8)
    expected = "a record of lists (or a list of records) with bbox and category"
    if label_column is not None:
        if label_column not in features:
            raise DataError(
                f"data.label_column: there is no column '{label_column}'.{nearest(label_column, features)} "
                f"Columns: {listing}."
            )
        if label_column not in fitting:
            raise DataError(f"data.label_column: '{label_column}' does not hold objects; allowed: {expected}.")
        return Column(label_column, "named by data.label_column"), fitting[label_column]
    usual = usual_column("objects", {name: features[name] for name in fitting})
    if usual is not None:
        return Column(usual, "by its name"), fitting[usual]
    if len(fitting) == 1:
        (name,) = fitting
        return Column(name, "the only column with boxes and categories"), fitting[name]
    if fitting:
        raise DataError(f"data.label_column: {' and '.join(fitting)} all hold objects. Set --data.label_column NAME.")
    raise DataError(f"data.label_column: no column of objects found ({expected}). Columns: {listing}.")


def _object_column(name: str, kind: Any) -> ObjectColumn | None:
    """Returns the format of a column of this type, or None if it does not hold objects."""
    is_list = not isinstance(kind, Mapping)
    fields = item_type(kind) if is_list else kind
    if not isinstance(fields, Mapping):
        return None
    box, category, crowd = (
        next((field for field in OBJECT_FIELDS[role] if field in fields), None) for role in ("box", "category", "crowd")
    )
    if box is None or category is None:
        return None
    names = getattr(fields[category] if is_list else item_type(fields[category]), "names", None)
    size = DRAWN_ON if not is_list and DRAWN_ON in fields else None
    return ObjectColumn(name, box, category, crowd, is_list, tuple(names) if names else None, size)


def count_categories(rows: Dataset, column: ObjectColumn) -> dict[Any, int]:
    """Returns the number of objects of each category; skips missing cells, which `scan_objects` reports."""
    counts: dict[Any, int] = {}
    for cells in _cells(rows, [column.name]):
        for cell in cells[column.name]:
            for category in column.values(cell)[1] if cell is not None else ():
                if category is not None:
                    counts[category] = counts.get(category, 0) + 1
    return counts


def scan_objects(
    rows: Dataset, column: ObjectColumn, image: str, classes: Mapping[Any, int], max_pixels: int
) -> ObjectScan:
    """Reads all objects and image headers of a split.

    Args:
        rows: A split.
        column: The column of objects.
        image: The image column. Rows with an unreadable image are skipped; the inputs report them.
        classes: Class index of each category.
        max_pixels: Largest number of pixels of an image (`data.max_pixels`).
    """
    from datasets import Image

    invalid: dict[int, BadRow] = {}
    num_boxes = num_clipped = 0

    def read(stored: Stored, cell: Any) -> str | Objects | None:
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
            results = list(pool.map(read, cells[image], cells[column.name]))
            for offset, result in enumerate(results):
                if isinstance(result, Objects):
                    num_boxes, num_clipped = num_boxes + len(result.boxes), num_clipped + result.num_clipped
                elif result:
                    stored = cells[image][offset]
                    path = (stored or {}).get("path")
                    invalid[start + offset] = BadRow(result, column.name, place(stored), path)
            start += len(results)
    return ObjectScan(invalid, num_boxes, num_clipped)


def object_problems(invalid: Mapping[int, BadRow], split: str) -> list[str]:
    """Returns one error message on the rows of a split with invalid objects, if there are any."""
    if not invalid:
        return []
    first = shorten([f"row {row} ({bad.value}): {bad.reason}" for row, bad in sorted(invalid.items())], 5)
    return [
        f"data.source: {split} has {len(invalid)} row(s) with invalid objects: {first}. Correct them, or set "
        "--data.on_error skip."
    ]


def log_clipped(scan: ObjectScan, split: str) -> None:
    """Logs the number of boxes of a split that exceed their images, if there are any."""
    if scan.num_clipped:
        log(
            f"data: {split}: clipped {scan.num_clipped:,} of {scan.num_boxes:,} boxes that exceed their images by more "
            f"than {_TOLERANCE} pixels; boxes are read as x, y, width, height (not x0, y0, x1, y1)"
        )


def _cells(rows: Dataset, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    selected = rows.select_columns(list(columns))
    for start in range(0, len(selected), _CHUNK_ROWS):
        yield selected[start : start + _CHUNK_ROWS]
