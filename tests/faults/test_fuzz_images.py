"""Fuzzing of image decoding: mutated files return pixels or raise `DataError`, in bounded time and memory.

The default is 300 examples; HFTL_FUZZ sets the number, and the slow tests use 6,000.
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
from image_samples import IMAGE, VALID, encoded, other_frames

from hftl.data.image_decoding import decode_image
from hftl.errors import DataError

LIMIT = 300_000
"""Largest number of pixels in mutated headers."""
SEEDS = {
    **{kind: VALID[kind]()[0] for kind in ("cmyk jpeg", "16-bit png", "12-bit tiff")},
    "jpeg": encoded(IMAGE, "JPEG", quality=60),
    "progressive": encoded(IMAGE, "JPEG", progressive=True),
    "exif": VALID["exif 6, jpeg"]()[0],
    "png": encoded(IMAGE, "PNG"),
    "palette": VALID["palette png, alpha per entry"]()[0],
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
    """Returns a valid image with flipped bits, overwritten numbers, and removed, repeated or foreign bytes."""
    content = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        last = len(content) - 1
        # half of the mutations are in headers, after the signature that readers require
        offset = draw(st.integers(0, last) | st.integers(min(8, last), min(64, last)))
        mutation = draw(st.sampled_from(["flip", "number", "truncate", "drop", "repeat", "splice", "zero", "noise"]))
        size = draw(st.integers(1, 200))
        if mutation == "flip":
            content[offset] ^= 1 << draw(st.integers(0, 7))
        elif mutation == "number":
            form = draw(st.sampled_from(["<H", ">H", "<I", ">I"]))
            number = struct.pack(form, draw(st.sampled_from(NUMBERS)) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            content[offset : offset + len(number)] = number
        elif mutation == "truncate":
            del content[offset:]
        elif mutation == "drop":
            del content[offset : offset + size]
        elif mutation == "repeat":
            content[offset:offset] = content[offset : offset + size]
        elif mutation == "zero":
            content[offset : offset + size] = bytes(len(content[offset : offset + size]))
        elif mutation == "noise":
            content[offset : offset + 16] = draw(st.binary(min_size=1, max_size=16))
        else:
            donor = SEEDS[draw(st.sampled_from(sorted(SEEDS)))]
            start = draw(st.integers(0, len(donor) - 1))
            content[offset : offset + size] = donor[start : start + size]
    return bytes(content)


def fuzz(count: int, mode: str) -> dict[str, int]:
    """Decodes `count` mutated images; returns the number of images by outcome."""
    outcomes: dict[str, int] = {}

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(len(mode))  # different examples for RGB and L
    @given(mutated())
    def decode_one(content):
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
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert time.monotonic() - began < 5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_one()
    return outcomes


def check(count: int, mode: str, capfd) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(count, mode)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    printed = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{sum(outcomes.values())} mutated images ({mode}): {outcomes}; resident memory +{growth} MiB")
    assert sum(outcomes.values()) >= count * 0.9 and outcomes["pixels"] and len(outcomes) >= 4
    assert growth < 200
    assert "PIL" not in printed.err and "Warning" not in printed.err


def test_mutated_images_decode_or_raise(capfd):
    check(int(os.environ.get("HFTL_FUZZ", "300")), "RGB", capfd)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_many_mutated_images_decode_or_raise(mode, capfd):
    check(6000, mode, capfd)
