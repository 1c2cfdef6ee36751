"""Texts that are almost the same: MinHash finds candidates, the Jaccard similarity of their shingles decides.

Broder (1997), "On the resemblance and containment of documents": two sets have the same smallest hash with a
probability that is their Jaccard similarity. 96 such hashes in 16 bands of 6 make candidates of 99 % of the pairs with
similarity 0.8, of 36 % at 0.55, and of 1 % at 0.3. These few lines of numpy take a whole batch of texts at once; a
library's sketch object takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SHINGLE = 5
"""Characters of a shingle."""
SIMILAR = 0.8
"""Smallest Jaccard similarity of two texts that are called near duplicates."""
MOST = 200_000
"""Pairs whose similarity is computed at most, those that share most bands first."""
_BANDS, _ROWS = 16, 6
_BUCKET = 12
"""In a bucket of more texts than this, each is compared with its neighbours and the first, not with all."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_random = np.random.default_rng(20_030_829)
_FACTORS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)


def band_hashes(texts: Sequence[str]) -> Any:
    """Returns a hash for each band of each normalised text [N, 16] uint32; near duplicates share some of them."""
    padded = [text.ljust(SHINGLE) for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths)
    windows = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(SHINGLE):
            windows = (windows + codes[place : place + len(windows)]) * _MULTIPLIER
            windows ^= windows >> np.uint64(29)
        inside = np.ones(len(windows), bool)
        for place in range(1, SHINGLE):  # windows that reach into the next text
            inside[ends[:-1] - place] = False
        windows = windows[inside]
        starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)[:-1]])
        bands = np.zeros((len(texts), _BANDS), np.uint64)
        for number, (factor, term) in enumerate(zip(_FACTORS, _TERMS, strict=True)):
            smallest = np.minimum.reduceat((windows * factor + term) >> np.uint64(32), starts)
            band = number // _ROWS
            bands[:, band] = (bands[:, band] ^ smallest) * _MULTIPLIER
    return (bands >> np.uint64(32)).astype(np.uint32)


def candidates(bands: Any) -> tuple[Any, bool]:
    """Returns pairs of positions that share a band [M, 2], the smaller first, and whether some were left out.

    Args:
        bands: From `band_hashes`, [N, 16].
    """
    size = len(bands)
    found = []
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        hashes = bands[order, band]
        for step in range(1, _BUCKET):  # neighbours in the sorted order share a bucket while their hashes are equal
            same = np.flatnonzero(hashes[step:] == hashes[:-step])
            if not len(same):
                break
            found.append(_coded(order[same], order[same + step], size))
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
        first = order[np.repeat(starts, np.diff(np.append(starts, size)))]
        distant = np.flatnonzero(np.arange(size) - np.repeat(starts, np.diff(np.append(starts, size))) >= _BUCKET)
        found.append(_coded(first[distant], order[distant], size))
    pairs, shared = np.unique(np.concatenate(found), return_counts=True)
    if len(pairs) > MOST:
        pairs = np.sort(pairs[np.argsort(-shared, kind="stable")[:MOST]])
        return np.stack(np.divmod(pairs, size), 1), True
    return np.stack(np.divmod(pairs, size), 1), False


def similar_pairs(pairs: Any, texts_of: Callable[[Any], Sequence[str]]) -> list[tuple[int, int, float]]:
    """Returns those of the pairs that are near duplicates, with their similarity.

    Args:
        pairs: From `candidates`, [M, 2].
        texts_of: Returns the normalised texts at some positions.
    """
    found = []
    for start in range(0, len(pairs), 1_000):
        block = pairs[start : start + 1_000]
        positions = np.unique(block)
        shingles = dict(zip(positions.tolist(), map(shingles_of, texts_of(positions)), strict=True))
        for first, second in block.tolist():
            similarity = jaccard(shingles[first], shingles[second])
            if similarity >= SIMILAR:
                found.append((first, second, similarity))
    return found


def shingles_of(text: str) -> set[str]:
    """Returns all pieces of five characters of a text."""
    padded = text.ljust(SHINGLE)
    return {padded[place : place + SHINGLE] for place in range(len(padded) - SHINGLE + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    """Returns the size of the intersection over that of the union."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _coded(first: Any, second: Any, size: int) -> Any:
    return np.minimum(first, second) * size + np.maximum(first, second)
