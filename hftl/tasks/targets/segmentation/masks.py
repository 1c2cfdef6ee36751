"""Segmentation masks: column detection, classes and validation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from hftl.config.schema import DataConfig
from hftl.data.columns import Column
from hftl.data.image_decoding import Stored, decode_indices, place, quiet_pillow, upright_size
from hftl.data.roles import usual_column
from hftl.data.validation import BadRow
from hftl.errors import DataError, nearest, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset, Features

VOID = 255
"""Usual value of pixels without a class (PASCAL VOC, Cityscapes, ADE20k)."""
_VOID_NAME = re.compile(r"\b(void|ignored?|unlabell?ed)\b", re.IGNORECASE)
_UNKNOWN_VALUE = "mask value without a class"
_CHUNK_ROWS = 64
_LOG_SECONDS = 10.0
"""Seconds between two progress lines."""


def find_image_and_mask(features: Features, config: DataConfig) -> tuple[Column, Column]:
    """Returns the image column and the mask column.

    Raises:
        DataError: A named column does not exist, there are fewer than two image columns, or several fit equally well.
    """
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    listing = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    for setting, name in (("image_column", config.image_column), ("label_column", config.label_column)):
        if name is not None and name not in images:
            fact = "is not an image column" if name in features else "does not exist"
            raise DataError(f"data.{setting}: '{name}' {fact}.{nearest(name, images)} Columns: {listing}.")
    chosen = {"image": config.image_column, "mask": config.label_column}
    reasons = {"image": "named by data.image_column", "mask": "named by data.label_column"}
    open_roles = [role for role in ("mask", "image") if chosen[role] is None]
    for role in open_roles:
        candidates = [name for name in images if name not in chosen.values()]
        chosen[role] = usual_column(role, {name: features[name] for name in candidates})
        reasons[role] = "by its name"
    candidates = [name for name in images if name not in chosen.values()]
    missing = [role for role in open_roles if chosen[role] is None]
    if len(candidates) == len(missing) == 1:
        chosen[missing[0]], reasons[missing[0]] = candidates[0], "the only other image column"
    image, mask = chosen["image"], chosen["mask"]
    if image is None or mask is None or image == mask:
        raise DataError(
            f"data.label_column: image and mask column are ambiguous. Columns: {listing}. Set --data.image_column and "
            "--data.label_column, or use folders images/ and masks/."
        )
    return Column(image, reasons["image"]), Column(mask, reasons["mask"])


@dataclass(frozen=True)
class MaskClasses:
    """Classes of mask values.

    Attributes:
        names: Class names, in the order of the outputs.
        values: Mask value of each class, in the same order.
        void: Mask values without a class.
        origin: Origin of the names, for the log.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    void: tuple[int, ...]
    origin: str


def find_classes(present: Sequence[int], file_names: Sequence[str] | None, ignore: int | None) -> MaskClasses:
    """Returns the classes of masks.

    Args:
        present: Values in the training masks.
        file_names: Class names by mask value, from a file of the dataset, if there is one.
        ignore: Value of `data.ignore_index`.
    """
    names = dict(enumerate(file_names)) if file_names else {value: str(value) for value in present}
    if ignore is not None:
        void = {ignore} if ignore >= 0 else set()
    else:
        void = {value for value, name in names.items() if _VOID_NAME.search(name)}
        void |= {VOID} if file_names is None or VOID >= len(file_names) else set()
    classes = {value: name for value, name in names.items() if value not in void}
    origin = "named in a file of the dataset" if file_names else "from training masks"
    return MaskClasses(tuple(classes.values()), tuple(classes), tuple(sorted(void)), origin)


def survey_masks(rows: Dataset, image: str, mask: str, split: str, max_pixels: int) -> list[BadRow | tuple[int, ...]]:
    """Decodes all masks of a split.

    Args:
        rows: The split.
        image: The image column.
        mask: The mask column.
        split: Name of the split, for the log.
        max_pixels: Largest number of pixels of an image (`data.max_pixels`).

    Returns:
        The values in the mask of each row, or the reason why the mask is invalid.
    """
    from datasets import Image

    stored = rows.select_columns([image, mask])
    for column in (image, mask):
        stored = stored.cast_column(column, Image(decode=False))
    survey: list[BadRow | tuple[int, ...]] = []
    logged_at = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start in range(0, len(stored), _CHUNK_ROWS):
            if monotonic() - logged_at > _LOG_SECONDS:
                log(f"data: {split}: validated {start:,} of {len(stored):,} masks")
                logged_at = monotonic()
            chunk = stored[start : start + _CHUNK_ROWS]
            survey += pool.map(_mask_values, chunk[image], chunk[mask], repeat(mask), repeat(max_pixels))
    return survey


def _mask_values(image: Stored, mask: Stored, column: str, max_pixels: int) -> BadRow | tuple[int, ...]:
    path = (mask or {}).get("path")
    if mask is None:
        return BadRow("no mask", column, path=(image or {}).get("path"))
    try:
        values = decode_indices(mask, max_pixels)
    except DataError as error:
        return BadRow(str(error), column, place(mask), path)
    problem = _size_problem(values.shape, image, max_pixels)
    if problem:
        return BadRow(problem, column, place(mask), path)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        return BadRow(f"mask value outside 0..65535: {low if low < 0 else high}", column, place(mask), path)
    return tuple(np.bincount(values.ravel()).nonzero()[0].tolist())


def _size_problem(size: tuple[int, ...], image: Stored, max_pixels: int) -> str | None:
    """Returns the error if an image and its mask [H, W] differ in size; None for unreadable images."""
    try:
        height, width = upright_size(image, max_pixels)
    except DataError:
        return None  # the inputs report unreadable images
    if (height, width) == size:
        return None
    return f"mask size differs from image size: {size[1]} x {size[0]} and {width} x {height} pixels"


def invalid_masks(survey: Sequence[BadRow | tuple[int, ...]], classes: MaskClasses, column: str) -> dict[int, BadRow]:
    """Returns the invalid rows of a survey: invalid masks, and masks with values without a class."""
    known = {*classes.values, *classes.void}
    invalid: dict[int, BadRow] = {}
    for number, values in enumerate(survey):
        if isinstance(values, BadRow):
            invalid[number] = values
        elif not known.issuperset(values):
            unknown = [str(value) for value in values if value not in known]
            invalid[number] = BadRow(f"{_UNKNOWN_VALUE}: {shorten(unknown, 6)}", column, ", ".join(unknown))
    return invalid


def mask_problems(invalid: Mapping[int, BadRow], split: str, classes: MaskClasses) -> list[str]:
    """Returns one error message on the rows of a split with invalid masks, if there are any."""
    if not invalid:
        return []
    rows = [f"row {row}{f' ({bad.path})' if bad.path else ''}: {bad.reason}" for row, bad in sorted(invalid.items())]
    hint = ""
    if any(bad.kind == _UNKNOWN_VALUE for bad in invalid.values()):
        void = f" and {', '.join(map(str, classes.void))} (void)" if classes.void else ""
        hint = (
            f" Allowed values: {shorten([str(value) for value in classes.values], 12)}{void}. Set data.ignore_index "
            "for another void value, list all classes in labels.json, and store masks as PNG (JPEG changes values)."
        )
    return [
        f"data.source: {split} has {len(invalid)} invalid mask(s): {shorten(rows, 5)}.{hint} Correct them, or set "
        "--data.on_error skip."
    ]
