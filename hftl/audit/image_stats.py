"""One pass over the images of a split: each is decoded once, and what is kept of it fits in 60 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.audit.finding import Entry, Finding
from hftl.audit.near_duplicate_images import perceptual_hash
from hftl.audit.text_normalization import key_of
from hftl.data.image_decoding import Stored, decode_image, decode_with_mode, place, quiet_pillow
from hftl.errors import DataError
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    "colour": ("RGB", "RGBX", "YCbCr", "P"),
    "grey": ("L", "1", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"),
    "transparent": ("RGBA", "RGBa", "PA"),
    "CMYK": ("CMYK",),
}
"""Pillow's modes by what a person calls them."""
FLAT = 2.0
"""Standard deviation of grey values, of 255, under which a picture counts as of one colour."""
_RARE = 0.1
"""Largest share of images of another kind that are called odd; above it, the data are simply mixed."""
_LONG = 3.0
"""How much longer in proportion than the median image an odd one is."""
_SCALE = 16.0
"""How many times larger or smaller in area than the median image an odd one is."""
_AT_ONCE = 64
_SAY_EVERY = 10.0


@dataclass
class ImageStats:
    """What is kept of N images; rows that cannot be read have zeros."""

    pixels: Any
    """Keys of the decoded pixels, [N] uint64."""
    files: Any
    """Keys of the files as they are, [N] uint64."""
    hashes: Any
    """Perceptual hashes, [N, 16] uint8."""
    sizes: Any
    """Width and height upright, in pixels, [N, 2] int32."""
    kinds: Any
    """Position in `KINDS`, [N] int8; -1 for none."""
    spread: Any
    """Standard deviation of grey values, [N] float32."""
    unreadable: dict[int, str]
    """Reasons by row number."""


def inspect(rows: Dataset, column: str, split: str, max_pixels: int) -> ImageStats:
    """Returns what is kept of every image of a split.

    Args:
        rows: Rows of the split.
        column: The image column.
        split: Its name, for the lines that say how far this is.
        max_pixels: Larger images are unreadable.
    """
    count = len(rows)
    seen = ImageStats(
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint64),
        np.zeros((count, 16), np.uint8),
        np.zeros((count, 2), np.int32),
        np.full(count, -1, np.int8),
        np.zeros(count, np.float32),
        {},
    )
    said = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start, images in _batches(rows, column):
            if monotonic() - said > _SAY_EVERY:
                log(f"check: {split}: looked at {start:,} of {count:,} images")
                said = monotonic()
            for row, found in enumerate(pool.map(lambda stored: _look(stored, max_pixels), images), start):
                if isinstance(found, str):
                    seen.unreadable[row] = found
                    continue
                seen.pixels[row], seen.files[row], seen.hashes[row], seen.sizes[row] = found[:4]
                seen.kinds[row], seen.spread[row] = found[4:]
    return seen


def pictures_at(rows: Dataset, column: str, numbers: Sequence[int]) -> list[Stored]:
    """Returns the stored images of some rows, not decoded."""
    from datasets import Image

    return rows.select_columns([column]).cast_column(column, Image(decode=False))[list(numbers)][column]


def outlier_images(pictures: dict[str, ImageStats]) -> Finding:
    """Returns the images that differ in channels, shape or size from the median over all splits."""
    sizes = np.concatenate([seen.sizes for seen in pictures.values()]).astype(np.float64)
    kinds = np.concatenate([seen.kinds for seen in pictures.values()])
    spread = np.concatenate([seen.spread for seen in pictures.values()])
    read = kinds >= 0
    sentence = (
        f"Read from the files. Odd is: other channels than most, where at most {_RARE:.0%} of the images have them; "
        f"{_LONG:g} times longer in proportion, or {_SCALE:g} times larger or smaller in area, than the median image; "
        f"of one colour (grey values spread by less than {FLAT:g} of 255)."
    )
    if not read.any():
        return Finding("outlier_images", "No image could be read.", looked=False)
    counts = np.bincount(kinds[read], minlength=len(KINDS))
    usual = int(counts.argmax())
    area = sizes.prod(1)
    longer = np.divide(sizes.max(1), sizes.min(1), out=np.ones(len(sizes)), where=read)
    middle_area, middle_longer = np.median(area[read]), np.median(longer[read])
    width, height = np.median(sizes[read], axis=0)
    about = ", ".join(f"{count:,} {kind}" for kind, count in zip(KINDS, counts, strict=True) if count)
    sentence = f"Channels: {about}; median size {width:g} x {height:g} pixels. {sentence}"
    entries = []
    starts = np.cumsum([0, *(len(seen.kinds) for seen in pictures.values())])
    for split, start, end in zip(pictures, starts[:-1], starts[1:], strict=True):
        for row in np.flatnonzero(read[start:end]).tolist():
            number = start + row
            why = []
            if kinds[number] != usual and counts[kinds[number]] <= _RARE * read.sum():
                why.append(f"{list(KINDS)[kinds[number]]} where most are {list(KINDS)[usual]}")
            if longer[number] > _LONG * middle_longer:
                why.append("long and narrow")
            if not middle_area / _SCALE <= area[number] <= middle_area * _SCALE:
                why.append("large" if area[number] > middle_area else "small")
            if spread[number] < FLAT:
                why.append("of one colour")
            if why:
                shape = f"{int(sizes[number, 0])} x {int(sizes[number, 1])} pixels"
                entries.append(Entry(split, row, f"{', '.join(why)} ({shape})"))
    return Finding("outlier_images", sentence, tuple(entries))


def _batches(rows: Dataset, column: str) -> Iterator[tuple[int, list[Stored]]]:
    from datasets import Image

    images = rows.select_columns([column]).cast_column(column, Image(decode=False))
    for start in range(0, len(rows), _AT_ONCE):
        yield start, images[start : start + _AT_ONCE][column]


def _look(stored: Stored, max_pixels: int) -> tuple[Any, ...] | str:
    """Returns the fields of `ImageStats` for one image, or why it cannot be read."""
    try:
        picture, mode = decode_with_mode(stored, "RGB", max_pixels)
    except DataError as error:
        return f"{error} ({place(stored)})"
    content = (stored or {}).get("bytes")
    content = Path((stored or {})["path"]).read_bytes() if content is None else content
    grey = np.asarray(picture.convert("L").reduce(max(1, min(picture.size) // 64)))
    kind = next((number for number, modes in enumerate(KINDS.values()) if mode in modes), 0)
    size = f"{picture.width} {picture.height} ".encode()
    key = key_of(size + picture.tobytes())
    return key, key_of(content), perceptual_hash(picture), picture.size, kind, float(grey.std())


def drawn(stored: Stored, max_pixels: int) -> Any:
    """Returns the picture of an image that was read before, upright and in colour."""
    return decode_image(stored, "RGB", max_pixels)
