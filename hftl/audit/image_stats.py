"""Image statistics: one pass over the images of a split, 60 bytes per image."""

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
from hftl.data.image_decoding import Stored, decode_with_mode, place, quiet_pillow
from hftl.errors import DataError
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    "color": ("RGB", "RGBX", "YCbCr", "P"),
    "gray": ("L", "1", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"),
    "transparent": ("RGBA", "RGBa", "PA"),
    "CMYK": ("CMYK",),
}
"""Pillow modes by kind of channels."""
FLAT = 2.0
"""Standard deviation of gray values in [0, 255], below which an image counts as single-color."""
_RARE = 0.1
"""Maximum fraction of images with other channels that count as outliers; above it, the data are mixed."""
_LONG = 3.0
"""Minimum ratio of an outlier's aspect ratio to the median."""
_SCALE = 16.0
"""Minimum ratio of an outlier's area to the median, larger or smaller."""
_BATCH = 64
_LOG_SECONDS = 10.0


@dataclass
class ImageStats:
    """Statistics of N images; zeros for unreadable ones."""

    pixels: Any
    """Keys of the decoded pixels, [N] uint64."""
    files: Any
    """Keys of the file contents, [N] uint64."""
    hashes: Any
    """Perceptual hashes, [N, 16] uint8."""
    sizes: Any
    """Width and height in pixels after EXIF rotation, [N, 2] int32."""
    kinds: Any
    """Index in `KINDS`, [N] int8; -1 for unreadable images."""
    contrast: Any
    """Standard deviation of gray values, [N] float32."""
    unreadable: dict[int, str]
    """Reasons by row number."""


def inspect(rows: Dataset, column: str, split: str, max_pixels: int) -> ImageStats:
    """Decodes every image of a split once and returns its statistics.

    Args:
        rows: Rows of the split.
        column: Image column.
        split: Name of the split, for progress lines.
        max_pixels: Maximum pixels per image; larger images count as unreadable.
    """
    count = len(rows)
    stats = ImageStats(
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint64),
        np.zeros((count, 16), np.uint8),
        np.zeros((count, 2), np.int32),
        np.full(count, -1, np.int8),
        np.zeros(count, np.float32),
        {},
    )
    logged = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start, images in _batches(rows, column):
            if monotonic() - logged > _LOG_SECONDS:
                log(f"check: {split}: scanned {start:,} of {count:,} images")
                logged = monotonic()
            for row, values in enumerate(pool.map(lambda stored: _image_stats(stored, max_pixels), images), start):
                if isinstance(values, str):
                    stats.unreadable[row] = values
                    continue
                stats.pixels[row], stats.files[row], stats.hashes[row], stats.sizes[row] = values[:4]
                stats.kinds[row], stats.contrast[row] = values[4:]
    return stats


def stored_images(rows: Dataset, column: str, numbers: Sequence[int]) -> list[Stored]:
    """Returns the stored images of some rows, without decoding."""
    from datasets import Image

    return rows.select_columns([column]).cast_column(column, Image(decode=False))[list(numbers)][column]


def outlier_images(stats: dict[str, ImageStats]) -> Finding:
    """Returns the images whose channels, aspect ratio or size differ from the median over all splits.

    Args:
        stats: Image statistics by split.
    """
    sizes = np.concatenate([split_stats.sizes for split_stats in stats.values()]).astype(np.float64)
    kinds = np.concatenate([split_stats.kinds for split_stats in stats.values()])
    contrast = np.concatenate([split_stats.contrast for split_stats in stats.values()])
    readable = kinds >= 0
    if not readable.any():
        return Finding("outlier_images", "No image is readable.", checked=False)
    counts = np.bincount(kinds[readable], minlength=len(KINDS))
    common = int(counts.argmax())
    area = sizes.prod(1)
    aspect = np.divide(sizes.max(1), sizes.min(1), out=np.ones(len(sizes)), where=readable)
    median_area, median_aspect = np.median(area[readable]), np.median(aspect[readable])
    width, height = np.median(sizes[readable], axis=0)
    channels = ", ".join(f"{count:,} {kind}" for kind, count in zip(KINDS, counts, strict=True) if count)
    description = (
        f"Channels: {channels}; median size {width:g} x {height:g} pixels. Outliers: channels of up to {_RARE:.0%} of "
        f"the images; aspect ratio over {_LONG:g} times the median; area {_SCALE:g} times larger or smaller than the "
        f"median; single-color images (standard deviation of gray values under {FLAT:g} of 255)."
    )
    entries = []
    starts = np.cumsum([0, *(len(split_stats.kinds) for split_stats in stats.values())])
    for split, start, end in zip(stats, starts[:-1], starts[1:], strict=True):
        for row in np.flatnonzero(readable[start:end]).tolist():
            number = start + row
            why = []
            if kinds[number] != common and counts[kinds[number]] <= _RARE * readable.sum():
                why.append(f"{list(KINDS)[kinds[number]]}, most are {list(KINDS)[common]}")
            if aspect[number] > _LONG * median_aspect:
                why.append("aspect ratio")
            if not median_area / _SCALE <= area[number] <= median_area * _SCALE:
                why.append("large" if area[number] > median_area else "small")
            if contrast[number] < FLAT:
                why.append("single color")
            if why:
                size = f"{int(sizes[number, 0])} x {int(sizes[number, 1])} pixels"
                entries.append(Entry(split, row, f"{', '.join(why)} ({size})"))
    return Finding("outlier_images", description, tuple(entries))


def _batches(rows: Dataset, column: str) -> Iterator[tuple[int, list[Stored]]]:
    from datasets import Image

    images = rows.select_columns([column]).cast_column(column, Image(decode=False))
    for start in range(0, len(rows), _BATCH):
        yield start, images[start : start + _BATCH][column]


def _image_stats(stored: Stored, max_pixels: int) -> tuple[Any, ...] | str:
    """Returns the fields of `ImageStats` of one image, or the reason why it is unreadable."""
    try:
        image, mode = decode_with_mode(stored, "RGB", max_pixels)
    except DataError as error:
        return f"{error} ({place(stored)})"
    content = (stored or {}).get("bytes")
    content = Path((stored or {})["path"]).read_bytes() if content is None else content
    gray = np.asarray(image.convert("L").reduce(max(1, min(image.size) // 64)))
    kind = next((index for index, modes in enumerate(KINDS.values()) if mode in modes), 0)
    size = f"{image.width} {image.height} ".encode()
    key = key_of(size + image.tobytes())
    return key, key_of(content), perceptual_hash(image), image.size, kind, float(gray.std())
