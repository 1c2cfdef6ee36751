"""One image, in a file or in a table: judged by its header, then decoded to upright pixels of one mode.

Images come from anywhere, so nothing that Pillow makes of one leaves this module but pixels or a `DataError`.
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
"""Pillow's names of what is opened. Not everything it can: its EPS reader runs Ghostscript, and rare readers are those
that nobody has fuzzed."""
_KINDS = "JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, JPEG 2000 or AVIF"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
"""Pillow's names of pixels that have a known black and white, beside grey of up to 16 bits."""
MAX_ASPECT = 200
"""Longest side over shortest: resizing the shortest to what a model takes makes the longest as many times that."""
_SIDEWAYS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
_SIDEWAYS |= {7: "TRANSVERSE", 8: "ROTATE_90"}
_ORIENTATION, _BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 274, 258, 262, 322, 323
"""Numbers of EXIF and TIFF tags."""

Stored = Mapping[str, Any] | None
"""An image as `datasets.Image(decode=False)` gives it: `path` and `bytes`, one of which may be None."""


def decode_image(stored: Stored, mode: str, max_pixels: int) -> Image:
    """Returns the first picture in an image file, upright, in `mode`.

    Pixels are what `datasets`, torchvision and transformers' pipelines make of the same file: turned as EXIF says, the
    first frame or page, colours under transparency kept and the transparency dropped. Grey of 16 bits differs: it is
    scaled to 8 where Pillow would clip it to white. EXIF that cannot be read counts as none.

    Args:
        stored: Path or bytes.
        mode: `RGB` or `L`.
        max_pixels: Largest width x height; seen from the header, before memory is taken.

    Raises:
        DataError: A few words on the kind of damage, and after a colon the details. Nothing else is raised.
    """
    return decode_with_mode(stored, mode, max_pixels)[0]


def decode_with_mode(stored: Stored, mode: str, max_pixels: int) -> tuple[Image, str]:
    """Returns what `decode_image` does, and Pillow's name of the pixels as they are stored (`L`, `RGBA`, `P`, ...).

    Raises:
        DataError: As `decode_image`.
    """
    with _opened(stored, max_pixels) as image:
        stored_mode = image.mode
        image.load()
        pixels = _eight_bits(image) if _top(image) > 255 else _without_transparency(image)
        pixels = _upright(pixels, _orientation(image))
        return (pixels if pixels.mode == mode else pixels.convert(mode)), stored_mode


def decode_indices(stored: Stored, max_pixels: int) -> np.ndarray:
    """Returns the numbers in an image of one channel [H, W], upright: grey values or indices into its palette, int32.

    Raises:
        DataError: As `decode_image`; there are several channels, whose colours are not numbers of classes; or the
            image is a JPEG.
    """
    with _opened(stored, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError("not a mask: JPEG changes class numbers, above all where classes meet; save it as PNG")
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise DataError(
                f"not a mask: its pixels are {image.mode}, and which colour is which class cannot be known; save it "
                "with one channel (grey or palette) that holds class numbers"
            )
        image.load()
        return np.asarray(_upright(image, _orientation(image))).astype(np.int32)


def check_header(stored: Stored, max_pixels: int) -> tuple[int, int]:
    """Returns width and height as stored, from the header of an image and nothing more.

    Raises:
        DataError: As `decode_image`, as far as the header tells.
    """
    with _opened(stored, max_pixels) as image:
        return image.size


def upright_size(stored: Stored, max_pixels: int) -> tuple[int, int]:
    """Returns height and width of what `decode_image` returns, from the header alone.

    Raises:
        DataError: As `decode_image`, as far as the header tells.
    """
    with _opened(stored, max_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def place(stored: Stored) -> str:
    """Returns the path of an image, or says that it has none."""
    return str((stored or {}).get("path") or "in the table")


@contextmanager
def _opened(stored: Stored, max_pixels: int) -> Iterator[Image]:
    from PIL import Image as PILImage

    head = b""
    try:
        with quiet_pillow(), _stream(stored) as stream:
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
    except Exception as error:  # Pillow's readers raise whatever the damage made of their arithmetic
        raise DataError(_reason(error, head)) from error


def _stream(stored: Stored) -> BinaryIO:
    content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if content is None and path is None:
        raise DataError("no image")
    if content is None:
        try:
            info = os.stat(path or "")  # first: opening a pipe would wait for whoever writes to it
            if not stat.S_ISREG(info.st_mode):
                raise DataError(f"not a file: {'a folder' if stat.S_ISDIR(info.st_mode) else 'a pipe or a device'}")
            empty, stream = info.st_size == 0, open(path or "", "rb")  # noqa: SIM115  closed by `_opened`
        except (OSError, ValueError) as error:
            raise DataError(_unreachable(error)) from error
    else:
        empty, stream = not content, BytesIO(content)
    if empty:
        stream.close()
        raise DataError("empty file")
    return stream


def _unreachable(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "no such file: symbolic links that lead in a circle"
    return f"no such file: {first_line(error)}"


def _reason(error: Exception, head: bytes) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        begins_well = any(_accepts(name, head) for name in _formats())
        return "damaged image: its header is broken" if begins_well else f"not an image: no header of {_KINDS}"
    if isinstance(error, OSError) and "truncated" in str(error):
        return f"truncated image: {_shown(error)}"
    return f"damaged image: {_shown(error)}"


def _accepts(name: str, head: bytes) -> bool:
    from PIL import Image as PILImage

    accept = PILImage.OPEN[name][1]
    return accept is not None and accept(head.ljust(30, b"\0")) is True


def _shown(error: Exception) -> str:
    """Returns what an error says, on one line and printable: it may quote bytes of the file."""
    return "".join(c if c.isprintable() else "?" for c in first_line(error))[:120]


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"too large: {width} x {height} pixels, the limit is {max_pixels:,} (data.max_pixels)")
    if width < 1 or height < 1:
        raise DataError(f"damaged image: its header says {width} x {height} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"too narrow: {width} x {height} pixels, one side over {MAX_ASPECT} times the other")


def _check_mode(image: Image) -> None:
    if image.mode not in MODES and _top(image) <= 255:
        raise DataError(
            f"pixels without a known white: {image.format} of mode {image.mode}; save it with 8 or 16 bits a channel"
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Returns the canvas of a WebP file, (1, 1) for any other: Pillow's reader takes memory for it when it opens one.

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
    """Refuses a TIFF whose tiles are larger than the image and than the limit."""
    tags = getattr(image, "tag_v2", {})
    width, length = int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1))
    if width * length > max(max_pixels, 512 * 512):
        raise DataError(f"too large: tiles of {width} x {length} pixels, the limit is {max_pixels:,} (data.max_pixels)")


def _top(image: Image) -> int:
    """Returns the value of white in grey of more than 8 bits; 255 for everything else."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS, 16)
        return 4095 if (bits[0] if isinstance(bits, tuple) else bits) == 12 else 65535
    # Pillow scales PGM to 16 bits, and its older versions open PNG so; 32 bits in a TIFF mean anything
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else 255


def _eight_bits(image: Image) -> Image:
    """Returns grey of more than 8 bits as mode L, rounded."""
    from PIL import Image as PILImage

    top = _top(image)
    values = np.asarray(image).clip(0, top).astype(np.uint32)
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        values = top - values  # white is zero; Pillow turns only 8 bits
    return PILImage.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))


def _without_transparency(image: Image) -> Image:
    image.info.pop("transparency", None)  # one colour that stands for "nothing"
    return image.convert("RGBA") if image.mode in ("RGBa", "PA") else image


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    return image.transpose(Transpose[_SIDEWAYS[orientation]]) if orientation in _SIDEWAYS else image


@cache
def _formats() -> list[str]:
    from PIL import Image as PILImage

    PILImage.init()
    return [name for name in FORMATS if name in PILImage.OPEN]


_pillow = threading.Lock()
_inside = 0
_before: Any = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Switches off Pillow's own limit of pixels, its warnings and its log lines, in any number of threads at once.

    All three are state of the process: the first that enters changes it and the last that leaves puts it back. Reading
    an image does this by itself; around many images it saves a tenth of a millisecond for each.
    """
    global _inside, _before
    from PIL import Image as PILImage

    log = logging.getLogger("PIL")
    with _pillow:
        _inside += 1
        if _inside == 1:
            filters = warnings.catch_warnings()
            filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _before = filters, PILImage.MAX_IMAGE_PIXELS, log.level
            PILImage.MAX_IMAGE_PIXELS = None
            log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _pillow:
            _inside -= 1
            if _inside == 0:
                filters, PILImage.MAX_IMAGE_PIXELS, level = _before
                log.setLevel(level)
                filters.__exit__(None, None, None)
