"""Image decoding: validates the header of a file or table cell, then decodes it to upright pixels of one mode.

Images are untrusted input: every Pillow error becomes a `DataError`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hftl.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow names of the allowed formats. Others are excluded: the EPS reader runs Ghostscript, rare readers lack
fuzzing."""
_FORMAT_LIST = "JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, JPEG 2000 or AVIF"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
"""Pillow modes with a defined black and white point, in addition to grayscale of up to 16 bits."""
MAX_ASPECT = 200
"""Largest aspect ratio (longest / shortest side); resizing the shortest side scales the longest by this factor."""
_TRANSPOSES = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
_TRANSPOSES |= {7: "TRANSVERSE", 8: "ROTATE_90"}
_ORIENTATION, _BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 274, 258, 262, 322, 323
"""EXIF and TIFF tag numbers."""

Stored = Mapping[str, Any] | None
"""Undecoded image of `datasets.Image(decode=False)`: `path` and `bytes`, one of which may be None."""


def decode_image(stored: Stored, mode: str, max_pixels: int) -> Image:
    """Returns the first image of a file, upright, in `mode`.

    Pixels match those of `datasets`, torchvision and transformers pipelines: EXIF orientation is applied, the first
    frame or page is used, and transparency is dropped without changing the colors. Exception: 16-bit grayscale is
    scaled to 8 bits, where Pillow would clip it to white. Unreadable EXIF data are ignored.

    Args:
        stored: Path or bytes.
        mode: `RGB` or `L`.
        max_pixels: Largest width x height, checked in the header before memory is allocated.

    Raises:
        DataError: The image is missing, invalid or damaged; format `kind: details`. No other exception is raised.
    """
    return decode_with_mode(stored, mode, max_pixels)[0]


def decode_with_mode(stored: Stored, mode: str, max_pixels: int) -> tuple[Image, str]:
    """Returns the image of `decode_image`, and the Pillow mode of the file (`L`, `RGBA`, `P`, ...).

    Raises:
        DataError: The image is missing, invalid or damaged.
    """
    with _open_image(stored, max_pixels) as image:
        stored_mode = image.mode
        image.load()
        pixels = _to_8_bits(image) if _white_value(image) > 255 else _drop_transparency(image)
        pixels = _apply_orientation(pixels, _orientation(image))
        return (pixels if pixels.mode == mode else pixels.convert(mode)), stored_mode


def decode_indices(stored: Stored, max_pixels: int) -> np.ndarray:
    """Returns the values of a single-channel image [H, W], upright: gray values or palette indices, int32.

    Raises:
        DataError: The image is missing, invalid or damaged; it has several channels; or it is a JPEG, whose lossy
            compression changes class indices.
    """
    with _open_image(stored, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError("not a mask: JPEG changes class indices, above all at class borders; save it as PNG")
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise DataError(
                f"not a mask: its mode is {image.mode}, and colors do not define class indices; save it with one "
                "channel (grayscale or palette) of class indices"
            )
        image.load()
        return np.asarray(_apply_orientation(image, _orientation(image))).astype(np.int32)


def check_header(stored: Stored, max_pixels: int) -> tuple[int, int]:
    """Returns width and height of the stored image (before EXIF rotation); reads the header only.

    Raises:
        DataError: The header is missing, invalid or above the limits.
    """
    with _open_image(stored, max_pixels) as image:
        return image.size


def upright_size(stored: Stored, max_pixels: int) -> tuple[int, int]:
    """Returns height and width of the image after EXIF rotation; reads the header only.

    Raises:
        DataError: The header is missing, invalid or above the limits.
    """
    with _open_image(stored, max_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def place(stored: Stored) -> str:
    """Returns the path of an image, or 'in the table' if the image is embedded."""
    return str((stored or {}).get("path") or "in the table")


@contextmanager
def _open_image(stored: Stored, max_pixels: int) -> Iterator[Image]:
    from PIL import Image as PILImage

    head = b""
    try:
        with quiet_pillow(), _open_stream(stored) as stream:
            head = stream.read(30)
            _check_size(_webp_size(head), max_pixels)
            stream.seek(0)
            with PILImage.open(stream, formats=_formats()) as image:
                _check_size(image.size, max_pixels)
                _check_tile(image, max_pixels)
                _check_mode(image)
                yield image
    except DataError:
        raise
    except Exception as error:  # damaged files make Pillow's readers raise exceptions of any type
        raise DataError(_decode_problem(error, head)) from error


def _open_stream(stored: Stored) -> BinaryIO:
    content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if content is None and path is None:
        raise DataError("no image")
    if content is None:
        try:
            info = os.stat(path or "")  # before open(), which blocks on a pipe without a writer
            if not stat.S_ISREG(info.st_mode):
                raise DataError(f"not a file: {'a folder' if stat.S_ISDIR(info.st_mode) else 'a pipe or a device'}")
            is_empty, stream = info.st_size == 0, open(path or "", "rb")  # noqa: SIM115  closed by `_open_image`
        except (OSError, ValueError) as error:
            raise DataError(_open_problem(error)) from error
    else:
        is_empty, stream = not content, BytesIO(content)
    if is_empty:
        stream.close()
        raise DataError("empty file")
    return stream


def _open_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "no such file: circular symbolic links"
    return f"no such file: {first_line(error)}"


def _decode_problem(error: Exception, head: bytes) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        has_signature = any(_matches_signature(name, head) for name in _formats())
        return "damaged image: invalid header" if has_signature else f"not an image: no header of {_FORMAT_LIST}"
    # the message may quote bytes of the file: keep one printable line
    message = "".join(c if c.isprintable() else "?" for c in first_line(error))[:120]
    is_truncated = isinstance(error, OSError) and "truncated" in str(error)
    return f"{'truncated' if is_truncated else 'damaged'} image: {message}"


def _matches_signature(name: str, head: bytes) -> bool:
    from PIL import Image as PILImage

    accept = PILImage.OPEN[name][1]
    return accept is not None and accept(head.ljust(30, b"\0")) is True


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"too large: {width} x {height} pixels, the limit is {max_pixels:,} (data.max_pixels)")
    if width < 1 or height < 1:
        raise DataError(f"damaged image: header with {width} x {height} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"too narrow: {width} x {height} pixels, the aspect ratio limit is {MAX_ASPECT}")


def _check_mode(image: Image) -> None:
    if image.mode not in MODES and _white_value(image) <= 255:
        raise DataError(
            f"undefined white point: {image.format} of mode {image.mode}; save it with 8 or 16 bits per channel"
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Returns the canvas size of a WebP file, (1, 1) for other formats. Pillow allocates the canvas on open.

    Source: RFC 9649, sections 2.5 (VP8), 2.6 (VP8L) and 2.7 (VP8X).
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 1, 1
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_tile(image: Image, max_pixels: int) -> None:
    """Raises DataError if the tiles of a TIFF exceed the pixel limit."""
    tags = getattr(image, "tag_v2", {})
    width, length = int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1))
    if width * length > max(max_pixels, 512 * 512):
        raise DataError(f"too large: tiles of {width} x {length} pixels, the limit is {max_pixels:,} (data.max_pixels)")


def _white_value(image: Image) -> int:
    """Returns the value of white: 4095 or 65535 in grayscale of more than 8 bits, else 255."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS, 16)
        return 4095 if (bits[0] if isinstance(bits, tuple) else bits) == 12 else 65535
    # Pillow scales PGM (and, in older versions, PNG) to 16 bits; the range of 32-bit TIFF is undefined
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else 255


def _to_8_bits(image: Image) -> Image:
    """Converts grayscale of more than 8 bits to mode L, rounded."""
    from PIL import Image as PILImage

    white = _white_value(image)
    values = np.asarray(image).clip(0, white).astype(np.uint32)
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        values = white - values  # WhiteIsZero; Pillow inverts 8-bit images only
    return PILImage.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _drop_transparency(image: Image) -> Image:
    image.info.pop("transparency", None)  # the color key of transparent pixels
    return image.convert("RGBA") if image.mode in ("RGBa", "PA") else image


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _apply_orientation(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    return image.transpose(Transpose[_TRANSPOSES[orientation]]) if orientation in _TRANSPOSES else image


@cache
def _formats() -> list[str]:
    from PIL import Image as PILImage

    PILImage.init()
    return [name for name in FORMATS if name in PILImage.OPEN]


_pillow_lock = threading.Lock()
_active_count = 0
_saved_state: Any = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Disables Pillow's pixel limit, warnings and log lines; reentrant and thread-safe.

    All three are process-wide: the first thread that enters changes them, the last that leaves restores them.
    The decoding functions enter it themselves; entering it once around many images saves 0.1 ms per image.
    """
    global _active_count, _saved_state
    from PIL import Image as PILImage

    logger = logging.getLogger("PIL")
    with _pillow_lock:
        _active_count += 1
        if _active_count == 1:
            filters = warnings.catch_warnings()
            filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _saved_state = filters, PILImage.MAX_IMAGE_PIXELS, logger.level
            PILImage.MAX_IMAGE_PIXELS = None
            logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _pillow_lock:
            _active_count -= 1
            if _active_count == 0:
                filters, PILImage.MAX_IMAGE_PIXELS, level = _saved_state
                logger.setLevel(level)
                filters.__exit__(None, None, None)
