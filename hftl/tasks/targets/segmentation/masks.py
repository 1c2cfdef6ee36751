"""Masks: their column, their classes, and whether each fits its image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
"""What pixels of no class hold by custom (PASCAL VOC, Cityscapes, ADE20k)."""
_VOID_NAME = re.compile(r"\b(void|ignored?|unlabell?ed)\b", re.IGNORECASE)
_AT_ONCE = 64
_SAY_EVERY = 10.0
"""Seconds between two lines on how far the survey is."""


def find_image_and_mask(features: Features, config: DataConfig) -> tuple[Column, Column]:
    """Returns the column with images and the one with masks.

    Raises:
        DataError: A named column does not exist; there are no two columns of images; or several could be each.
    """
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    listing = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    for flag, name in (("image_column", config.image_column), ("label_column", config.label_column)):
        if name is not None and name not in images:
            why = "is not a column of images" if name in features else "does not exist"
            raise DataError(f"data.{flag}: '{name}' {why}.{nearest(name, images)} Columns: {listing}.")
    chosen = {"image": config.image_column, "mask": config.label_column}
    why = {"image": "named by data.image_column", "mask": "named by data.label_column"}
    open_roles = [role for role in ("mask", "image") if chosen[role] is None]
    for role in open_roles:
        left = [name for name in images if name not in chosen.values()]
        chosen[role] = usual_column(role, {name: features[name] for name in left})
        why[role] = "by its name"
    left = [name for name in images if name not in chosen.values()]
    missing = [role for role in open_roles if chosen[role] is None]
    if len(left) == len(missing) == 1:
        chosen[missing[0]], why[missing[0]] = left[0], "the only other column of images"
    image, mask = chosen["image"], chosen["mask"]
    if image is None or mask is None or image == mask:
        raise DataError(
            f"data.label_column: which column holds images and which masks is not clear. Columns: {listing}. Say "
            "--data.image_column and --data.label_column; or give folders images/ and masks/ side by side."
        )
    return Column(image, why["image"]), Column(mask, why["mask"])


@dataclass(frozen=True)
class MaskClasses:
    """What the numbers in masks mean.

    Attributes:
        names: Class names, in the order of the outputs.
        values: The number of each class in masks, in the same order.
        void: Numbers of no class.
        origin: Where the names come from, in words.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    void: tuple[int, ...]
    origin: str


def find_classes(present: Sequence[int], beside: Sequence[str] | None, ignore: int | None) -> MaskClasses:
    """Returns the classes of masks.

    Args:
        present: Numbers in the training masks.
        beside: Class names by number, where they stand beside the data.
        ignore: `data.ignore_index`.
    """
    names = dict(enumerate(beside)) if beside else {value: str(value) for value in present}
    if ignore is not None:
        void = {ignore} if ignore >= 0 else set()
    else:
        void = {number for number, name in names.items() if _VOID_NAME.search(name)}
        void |= {VOID} if beside is None or VOID >= len(beside) else set()
    kept = {number: name for number, name in names.items() if number not in void}
    origin = "named in a file beside the data" if beside else "as the training masks have them"
    return MaskClasses(tuple(kept.values()), tuple(kept), tuple(sorted(void)), origin)


def survey_masks(rows: Dataset, image: str, mask: str, split: str, max_pixels: int) -> list[BadRow | tuple[int, ...]]:
    """Returns for each row the numbers in its mask, or why it has none that fits its image. All masks are decoded."""
    from datasets import Image

    looked = rows.select_columns([image, mask])
    for column in (image, mask):
        looked = looked.cast_column(column, Image(decode=False))
    found: list[BadRow | tuple[int, ...]] = []
    said = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start in range(0, len(looked), _AT_ONCE):
            if monotonic() - said > _SAY_EVERY:
                log(f"data: {split}: looked at {start:,} of {len(looked):,} masks")
                said = monotonic()
            part = looked[start : start + _AT_ONCE]
            found += pool.map(_look, part[image], part[mask], repeat(mask), repeat(max_pixels))
    return found


def _look(image: Stored, mask: Stored, column: str, max_pixels: int) -> BadRow | tuple[int, ...]:
    path = (mask or {}).get("path")
    if mask is None:
        return BadRow("no mask", column, path=(image or {}).get("path"))
    try:
        values = decode_indices(mask, max_pixels)
    except DataError as error:
        return BadRow(str(error), column, place(mask), path)
    problem = size_problem(values.shape, image, max_pixels)
    if problem:
        return BadRow(problem, column, place(mask), path)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        return BadRow(f"mask value outside 0..65535: {low if low < 0 else high}", column, place(mask), path)
    return tuple(np.bincount(values.ravel()).nonzero()[0].tolist())


def size_problem(size: tuple[int, ...], image: Stored, max_pixels: int) -> str | None:
    """Returns what is wrong where an image is of another size than its mask [H, W]; None for one that is broken."""
    try:
        height, width = upright_size(image, max_pixels)
    except DataError:
        return None  # said of the image
    if (height, width) == size:
        return None
    return f"mask and image of different size: {size[1]} x {size[0]} and {width} x {height} pixels"


def outside(found: Sequence[BadRow | tuple[int, ...]], classes: MaskClasses, column: str) -> dict[int, BadRow]:
    """Returns the rows of a survey that cannot be used: those that are bad, and masks with numbers of no class."""
    known = {*classes.values, *classes.void}
    bad: dict[int, BadRow] = {}
    for number, values in enumerate(found):
        if isinstance(values, BadRow):
            bad[number] = values
        elif not known.issuperset(values):
            strange = [str(value) for value in values if value not in known]
            bad[number] = BadRow(f"mask value outside the classes: {shorten(strange, 6)}", column, ", ".join(strange))
    return bad


def bad_masks_sentence(bad: Mapping[int, BadRow], split: str, classes: MaskClasses) -> Iterator[str]:
    """Yields a sentence on the rows of a split whose masks cannot be used, if there are any."""
    if not bad:
        return
    rows = [f"row {row}{f' ({why.path})' if why.path else ''}: {why.reason}" for row, why in sorted(bad.items())]
    strange = any(why.kind == "mask value outside the classes" for why in bad.values())
    allowed = shorten([str(value) for value in classes.values], 12)
    hint = (
        f" Classes are {allowed}{', void ' + ', '.join(map(str, classes.void)) if classes.void else ''}; name another "
        "value of void pixels by data.ignore_index, name all classes in labels.json, and keep masks in PNG: JPEG "
        "changes their values."
        if strange
        else ""
    )
    yield (
        f"data.source: {split} has {len(bad)} mask(s) that cannot be used: {shorten(rows, 5)}.{hint} Repair them, or "
        "leave these rows out with --data.on_error skip."
    )
