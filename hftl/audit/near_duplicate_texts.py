"""Near-duplicate texts: candidates by MinHash, confirmed by the Jaccard similarity of their shingles.

Two sets have the same minimum hash with a probability equal to their Jaccard similarity. 96 hashes in 16 bands of 6
return 99 % of the pairs with similarity 0.8 as candidates, 36 % at 0.55 and 1 % at 0.3. This numpy code processes a
batch of texts at once; sketch objects of libraries process one text at a time.

Source: Broder (1997), "On the resemblance and containment of documents".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SHINGLE = 5
"""Shingle length in characters."""
SIMILAR = 0.8
"""Minimum Jaccard similarity of near-duplicates."""
MOST = 200_000
"""Maximum pairs whose similarity is computed, those with the most shared bands first."""
_BANDS, _ROWS = 16, 6
_BUCKET = 12
"""In larger buckets, each text is compared with its neighbors and the first text only."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_random = np.random.default_rng(20_030_829)
_FACTORS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)


def band_hashes(texts: Sequence[str]) -> Any:
    """Returns a hash per band of each normalized text, [N, 16] uint32; near-duplicates share some hashes."""
    padded = [text.ljust(SHINGLE) for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths)
    windows = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(SHINGLE):
            windows = (windows + codes[offset : offset + len(windows)]) * _MULTIPLIER
            windows ^= windows >> np.uint64(29)
        inside = np.ones(len(windows), bool)
        for offset in range(1, SHINGLE):  # exclude windows that extend into the next text
            inside[ends[:-1] - offset] = False
        windows = windows[inside]
        starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)[:-1]])
        bands = np.zeros((len(texts), _BANDS), np.uint64)
        for index, (factor, term) in enumerate(zip(_FACTORS, _TERMS, strict=True)):
            minimum = np.minimum.reduceat((windows * factor + term) >> np.uint64(32), starts)
            band = index // _ROWS
            bands[:, band] = (bands[:, band] ^ minimum) * _MULTIPLIER
    return (bands >> np.uint64(32)).astype(np.uint32)


def candidates(bands: Any) -> tuple[Any, bool]:
    """Returns pairs of texts that share a band.

    Args:
        bands: Hashes from `band_hashes`, [N, 16] uint32.

    Returns:
        Pairs of positions [M, 2], the smaller first, and whether pairs over `MOST` were omitted.
    """
    size = len(bands)
    codes = []
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        hashes = bands[order, band]
        for step in range(1, _BUCKET):  # neighbors in sorted order share a bucket while their hashes are equal
            equal = np.flatnonzero(hashes[step:] == hashes[:-step])
            if not len(equal):
                break
            codes.append(_pair_codes(order[equal], order[equal + step], size))
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
        first = order[np.repeat(starts, np.diff(np.append(starts, size)))]
        distant = np.flatnonzero(np.arange(size) - np.repeat(starts, np.diff(np.append(starts, size))) >= _BUCKET)
        codes.append(_pair_codes(first[distant], order[distant], size))
    pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
    if len(pairs) > MOST:
        pairs = np.sort(pairs[np.argsort(-shared, kind="stable")[:MOST]])
        return np.stack(np.divmod(pairs, size), 1), True
    return np.stack(np.divmod(pairs, size), 1), False


def similar_pairs(pairs: Any, texts_of: Callable[[Any], Sequence[str]]) -> list[tuple[int, int, float]]:
    """Returns the pairs with a Jaccard similarity of at least `SIMILAR`, with the similarity.

    Args:
        pairs: Candidate pairs from `candidates`, [M, 2].
        texts_of: Returns the normalized texts at an array of positions.
    """
    near_duplicates = []
    for start in range(0, len(pairs), 1_000):
        block = pairs[start : start + 1_000]
        positions = np.unique(block)
        shingles = dict(zip(positions.tolist(), map(shingles_of, texts_of(positions)), strict=True))
        for first, second in block.tolist():
            similarity = jaccard(shingles[first], shingles[second])
            if similarity >= SIMILAR:
                near_duplicates.append((first, second, similarity))
    return near_duplicates


def shingles_of(text: str) -> set[str]:
    """Returns the shingles of a text: all substrings of `SHINGLE` characters."""
    padded = text.ljust(SHINGLE)
    return {padded[start : start + SHINGLE] for start in range(len(padded) - SHINGLE + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    """Returns the Jaccard similarity of two sets, in [0, 1]."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _pair_codes(first: Any, second: Any, size: int) -> Any:
    return np.minimum(first, second) * size + np.maximum(first, second)
