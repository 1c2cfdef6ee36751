"""Near-duplicate images: candidates by perceptual hash, confirmed by pixel correlation.

The hash is dHash in both directions, 128 bits (Krawetz 2013,
https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html). Resized or recompressed copies differ
in few bits, copies cropped by 5 % of their sides in up to 36. Some pairs of different images are as close, so each
candidate pair is confirmed by the correlation of gray pixels, 16 x 16, at the best crop window.

All pairs of hashes are compared, in blocks by matrix products. An index would miss pairs that differ in a quarter of
their bits. 10,000 images take a second; decoding them takes a minute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BITS = 128
DIFFERENT = 36
"""Maximum Hamming distance between hashes of near-duplicates, in bits."""
CORRELATED = 0.97
"""Minimum pixel correlation of near-duplicates."""
WINDOWS = 26
"""Crop windows per image: the full image and 5 x 5 crops."""
SMALLEST = 16
"""Minimum side in pixels; smaller images are not compared, because they have too little detail to differ."""
MOST = 50_000
"""Maximum pairs whose pixels are compared, the most similar hashes first."""
_SIDE, _GRID = 8, 16
_CANVAS = 64
"""Side in pixels of the resized image that windows are cropped from."""
_BLOCK = 2_048
_CACHED = 2_000
"""Maximum images with windows in memory, 26 KiB each."""
_CROP = 0.95
"""Side of a crop window as a fraction of the side of the image."""


def perceptual_hash(image: Image) -> Any:
    """Returns 128 bits as [16] uint8: whether each of 8 x 8 cells is darker than its right and its lower neighbor."""
    gray = image.convert("L")
    wide = np.asarray(gray.resize((_SIDE + 1, _SIDE), _BOX), np.int16)
    tall = np.asarray(gray.resize((_SIDE, _SIDE + 1), _BOX), np.int16)
    return np.packbits(np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (tall[1:] > tall[:-1]).ravel()]))


def close_hashes(hashes: Any) -> tuple[Any, bool]:
    """Returns pairs whose hashes differ in at most `DIFFERENT` bits.

    Args:
        hashes: Hashes from `perceptual_hash`, [N, 16] uint8.

    Returns:
        Pairs of positions [M, 2], the smaller position first and the most similar pair first, and whether pairs over
        `MOST` were omitted.
    """
    pairs = np.empty((0, 3), np.int64)
    truncated = False
    for row_start in range(0, len(hashes), _BLOCK):
        rows = _signs(hashes[row_start : row_start + _BLOCK])
        for column_start in range(row_start, len(hashes), _BLOCK):
            # the product of signs is the number of equal bits minus that of different bits
            distance = (BITS - rows @ _signs(hashes[column_start : column_start + _BLOCK]).T) / 2
            row, column = np.nonzero(distance <= DIFFERENT)
            new = np.stack([row + row_start, column + column_start, distance[row, column].astype(np.int64)], 1)
            pairs = np.concatenate([pairs, new[new[:, 0] < new[:, 1]]])
            if len(pairs) > 4 * MOST:
                pairs, truncated = _nearest(pairs), True
    return _nearest(pairs)[:, :2], truncated or len(pairs) > MOST


def correlated_images(pairs: Any, image_at: Callable[[int], Image]) -> list[tuple[int, int, float]]:
    """Returns the pairs with a pixel correlation of at least `CORRELATED`, with the correlation.

    Args:
        pairs: Candidate pairs from `close_hashes`, [M, 2].
        image_at: Returns the image at a position.
    """
    cache: OrderedDict[int, Any] = OrderedDict()

    def windows(position: int) -> Any:
        if position not in cache:
            cache[position] = crop_windows(image_at(position))
            if len(cache) > _CACHED:
                cache.popitem(last=False)
        cache.move_to_end(position)
        return cache[position]

    near_duplicates = []
    for first, second in pairs[np.lexsort(pairs.T[::-1])].tolist():
        first_windows, second_windows = windows(first), windows(second)
        correlation = float(max((first_windows @ second_windows[0]).max(), (second_windows @ first_windows[0]).max()))
        if correlation >= CORRELATED:
            near_duplicates.append((first, second, correlation))
    return near_duplicates


def crop_windows(image: Image) -> Any:
    """Returns gray pixels of the image and 25 crops of 95 % of its sides as unit vectors, [26, 256] float32."""
    canvas = image.convert("L").resize((_CANVAS, _CANVAS), _BILINEAR)
    corners = np.linspace(0, (1 - _CROP) * _CANVAS, 5).tolist()
    size = _CROP * _CANVAS
    boxes = [(0.0, 0.0, _CANVAS, _CANVAS), *((x, y, x + size, y + size) for x, y in product(corners, corners))]
    pixels = np.stack([np.asarray(canvas.resize((_GRID, _GRID), _BILINEAR, box)) for box in boxes]).astype(np.float32)
    pixels = pixels.reshape(len(boxes), -1)
    pixels -= pixels.mean(1, keepdims=True)
    return pixels / np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)


_BOX, _BILINEAR = 4, 2
"""Values of Pillow's resampling filters; importing the names would import Pillow."""


def _signs(hashes: Any) -> Any:
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1


def _nearest(pairs: Any) -> Any:
    return pairs[np.argsort(pairs[:, 2], kind="stable")[:MOST]]
