"""Pictures that are almost the same: a perceptual hash finds candidates, their pixels decide.

The hash is dHash (Krawetz 2013, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html) in
both directions, 128 bits. Copies that were resized or recompressed differ in few bits, copies that lost 5 % of their
sides in up to 36; so do some pairs of other pictures, which are told apart by laying each picture over the other's
windows: the correlation of grey pixels, 16 x 16, at the best window.

Hashes are compared with all others, in blocks by matrix products: no index misses a pair that differs in a quarter
of its bits, and 10,000 pictures take a second, where decoding them takes a minute.
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
"""Most bits in which the hashes of near duplicates differ."""
CORRELATED = 0.97
"""Smallest correlation of their pixels."""
WINDOWS = 26
"""Parts of a picture that are laid over another one: the whole, and 5 x 5 windows."""
SMALLEST = 16
"""Pictures with a side of fewer pixels are not compared: they have too little in them to differ."""
MOST = 50_000
"""Pairs whose pixels are compared at most, those of the most similar hashes first."""
_SIDE, _GRID = 8, 16
_DRAWN = 64
"""Pixels of the square that windows are cut from."""
_BLOCK = 2_048
_KEPT = 2_000
"""Pictures whose windows are in memory, 26 KiB each."""
_KEEPS = 0.95
"""Part of each side that a window keeps."""


def perceptual_hash(picture: Image) -> Any:
    """Returns 128 bits as [16] uint8: whether each of 8 x 8 places is darker than its neighbour on the right, below."""
    grey = picture.convert("L")
    wide = np.asarray(grey.resize((_SIDE + 1, _SIDE), _BOX), np.int16)
    tall = np.asarray(grey.resize((_SIDE, _SIDE + 1), _BOX), np.int16)
    return np.packbits(np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (tall[1:] > tall[:-1]).ravel()]))


def close_hashes(hashes: Any) -> tuple[Any, bool]:
    """Returns pairs whose hashes differ in at most 36 bits [M, 2], the smaller position first.

    Args:
        hashes: From `perceptual_hash`, [N, 16] uint8.

    Returns:
        The pairs, the most similar first, and whether some were left out.
    """
    found = np.empty((0, 3), np.int64)
    cut = False
    for start in range(0, len(hashes), _BLOCK):
        rows = _signs(hashes[start : start + _BLOCK])
        for other in range(start, len(hashes), _BLOCK):
            # of signs, the product is the number of equal bits less that of different ones
            different = (BITS - rows @ _signs(hashes[other : other + _BLOCK]).T) / 2
            first, second = np.nonzero(different <= DIFFERENT)
            new = np.stack([first + start, second + other, different[first, second].astype(np.int64)], 1)
            found = np.concatenate([found, new[new[:, 0] < new[:, 1]]])
            if len(found) > 4 * MOST:
                found, cut = _nearest(found), True
    return _nearest(found)[:, :2], cut or len(found) > MOST


def same_pictures(pairs: Any, picture: Callable[[int], Image]) -> list[tuple[int, int, float]]:
    """Returns those of the pairs that show the same, with the correlation of their pixels.

    Args:
        pairs: From `close_hashes`.
        picture: Returns the picture at a position.
    """
    kept: OrderedDict[int, Any] = OrderedDict()

    def windows(position: int) -> Any:
        if position not in kept:
            kept[position] = cut_windows(picture(position))
            if len(kept) > _KEPT:
                kept.popitem(last=False)
        kept.move_to_end(position)
        return kept[position]

    found = []
    for first, second in pairs[np.lexsort(pairs.T[::-1])].tolist():
        one, two = windows(first), windows(second)
        correlation = float(max((one @ two[0]).max(), (two @ one[0]).max()))
        if correlation >= CORRELATED:
            found.append((first, second, correlation))
    return found


def cut_windows(picture: Image) -> Any:
    """Returns the whole picture and 25 windows of 95 % of its sides as unit vectors [26, 256] of grey pixels."""
    drawn = picture.convert("L").resize((_DRAWN, _DRAWN), _BILINEAR)
    corners = np.linspace(0, (1 - _KEEPS) * _DRAWN, 5).tolist()
    size = _KEEPS * _DRAWN
    boxes = [(0.0, 0.0, _DRAWN, _DRAWN), *((x, y, x + size, y + size) for x, y in product(corners, corners))]
    pixels = np.stack([np.asarray(drawn.resize((_GRID, _GRID), _BILINEAR, box)) for box in boxes]).astype(np.float32)
    pixels = pixels.reshape(len(boxes), -1)
    pixels -= pixels.mean(1, keepdims=True)
    return pixels / np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)


_BOX, _BILINEAR = 4, 2
"""Pillow's numbers of its resampling filters; importing them would import Pillow."""


def _signs(hashes: Any) -> Any:
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1


def _nearest(found: Any) -> Any:
    return found[np.argsort(found[:, 2], kind="stable")[:MOST]]
