"""Mutated images: pixels or a `DataError`, never anything else, in bounded time and memory.

Few are tried here by default; HFTL_FUZZ=6000 tries as many, and the slow test does.
"""

import os
import resource
import struct
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pictures import GOOD, IMAGE, encoded, other_frames

from hftl.data.image_decoding import decode_image
from hftl.errors import DataError

LIMIT = 300_000
"""Pixels: mutated headers may promise that many."""
SEEDS = {
    **{kind: GOOD[kind]()[0] for kind in ("cmyk jpeg", "16-bit png", "12-bit tiff")},
    "jpeg": encoded(IMAGE, "JPEG", quality=60),
    "progressive": encoded(IMAGE, "JPEG", progressive=True),
    "exif": GOOD["exif 6, jpeg"]()[0],
    "png": encoded(IMAGE, "PNG"),
    "palette": GOOD["palette png, transparency in bytes"]()[0],
    "apng": encoded(IMAGE, "PNG", save_all=True, append_images=other_frames(1)),
    "gif": encoded(IMAGE, "GIF", save_all=True, append_images=other_frames(1)),
    "bmp": encoded(IMAGE, "BMP"),
    "rle": encoded(IMAGE.quantize(8), "BMP"),
    "tiff": encoded(IMAGE, "TIFF"),
    "lzw": encoded(IMAGE, "TIFF", compression="tiff_lzw"),
    "deflate": encoded(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
    "webp": encoded(IMAGE, "WEBP"),
    "lossless": encoded(IMAGE, "WEBP", lossless=True),
    "animated": encoded(IMAGE, "WEBP", save_all=True, append_images=other_frames(1)),
    "ppm": encoded(IMAGE, "PPM"),
    "jp2": encoded(IMAGE, "JPEG2000"),
}  # fmt: skip
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 60_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def mutated(draw) -> bytes:
    """A valid image with bits flipped, numbers overwritten, pieces cut, doubled or taken from another image."""
    content = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        last = len(content) - 1
        # half of the places are in headers, after the signature: without it there is nothing to read
        place = draw(st.integers(0, last) | st.integers(min(8, last), min(64, last)))
        how = draw(st.sampled_from(["flip", "number", "cut", "drop", "double", "splice", "zero", "noise"]))
        size = draw(st.integers(1, 200))
        if how == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            form = draw(st.sampled_from(["<H", ">H", "<I", ">I"]))
            number = struct.pack(form, draw(st.sampled_from(NUMBERS)) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            content[place : place + len(number)] = number
        elif how == "cut":
            del content[place:]
        elif how == "drop":
            del content[place : place + size]
        elif how == "double":
            content[place:place] = content[place : place + size]
        elif how == "zero":
            content[place : place + size] = bytes(len(content[place : place + size]))
        elif how == "noise":
            content[place : place + 16] = draw(st.binary(min_size=1, max_size=16))
        else:
            other = SEEDS[draw(st.sampled_from(sorted(SEEDS)))]
            start = draw(st.integers(0, len(other) - 1))
            content[place : place + size] = other[start : start + size]
    return bytes(content)


def try_many(count: int, mode: str) -> dict[str, int]:
    """Decodes so many mutated images; returns how many of them became pixels, and how many were refused how."""
    found: dict[str, int] = {}

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(len(mode))  # others for RGB than for L
    @given(mutated())
    def try_one(content):
        began = time.monotonic()
        try:
            image = decode_image({"bytes": content, "path": None}, mode, LIMIT)
        except DataError as error:
            outcome = error.problems[0].partition(":")[0]
            assert len(str(error)) < 300 and str(error).isprintable()
        else:
            assert image.mode == mode and 0 < image.width * image.height <= LIMIT
            assert np.asarray(image).dtype == np.uint8
            outcome = "pixels"
        found[outcome] = found.get(outcome, 0) + 1
        assert time.monotonic() - began < 5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try_one()
    return found


def check(count: int, mode: str, capfd) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = try_many(count, mode)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    printed = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{sum(found.values())} mutated images ({mode}): {found}; {more} MiB more resident")
    assert sum(found.values()) >= count * 0.9 and found["pixels"] and len(found) >= 4
    assert more < 200
    assert "PIL" not in printed.err and "Warning" not in printed.err


def test_mutated_images_are_pixels_or_refused(capfd):
    check(int(os.environ.get("HFTL_FUZZ", "300")), "RGB", capfd)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_many_mutated_images_are_pixels_or_refused(mode, capfd):
    check(6000, mode, capfd)
