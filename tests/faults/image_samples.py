"""Samples of valid and invalid image files: functions that return the file content and the expected result."""

import io
import struct
import zlib

import numpy as np
from PIL import Image as PILImage

LIMIT = 1_000_000
# asymmetric: corners red, green, blue and white on a gray gradient
PIXELS = np.linspace(20, 200, 40 * 48).reshape(40, 48, 1).repeat(3, axis=2).astype(np.uint8)
CORNERS = {(0, 0): (255, 0, 0), (0, -8): (0, 255, 0), (-8, 0): (0, 0, 255), (-8, -8): (255, 255, 255)}
for (top, left), color in CORNERS.items():
    PIXELS[top : top + 8 or None, left : left + 8 or None] = color
GRAY = np.linspace(0, 255, 40 * 48).reshape(40, 48).round().astype(np.uint8)
IMAGE = PILImage.fromarray(PIXELS)


def encoded(image, kind, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, body=b"", color_type=2, zeros=0) -> bytes:
    """Returns a PNG with any header size, with the data `body` or a number of zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    data = png_chunk(b"IDAT", compress_zeros(zeros) if zeros else zlib.compress(body)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data


def compress_zeros(count, block=32_001_000) -> bytes:
    """Returns the zlib stream of `count` zeros; repeats one compressed block and computes the checksum."""
    compressor = zlib.compressobj(9)
    first, repeated = (compressor.compress(bytes(block)) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    assert count % block == 0
    return first + repeated * (count // block - 1) + b"\x03\x00" + struct.pack(">I", count % 65521 << 16 | 1)


def webp_canvas(width, height) -> bytes:
    """Returns a WebP with an extended header whose canvas is larger than the image."""
    inner = encoded(IMAGE, "WEBP")[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_screen(width, height) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + palette(kind="GIF")[10:]


def rotated(kind, orientation) -> bytes:
    """Returns the image stored with an EXIF orientation."""
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose by EXIF orientation
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    quality = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(IMAGE.transpose(PILImage.Transpose(inverse[orientation])), kind, exif=exif, **quality)


def other_frames(count=3):
    return [PILImage.fromarray(255 - PIXELS // (n + 1)) for n in range(count)]


def with_alpha(mode="RGBA"):
    image = IMAGE.convert(mode)
    image.putalpha(PILImage.fromarray(255 - GRAY))
    return image


def palette(**options) -> bytes:
    return encoded(IMAGE.quantize(64), options.pop("kind", "PNG"), **options)


def palette_pixels():
    return np.asarray(IMAGE.quantize(64).convert("RGB"))


def rgb(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, axis=2)


def sixteen_bits():
    return GRAY.astype(np.uint16) * 257


def tiff_page(image, **options):
    return encoded(image, "TIFF", **options)


def twelve_bits() -> bytes:
    """Returns a TIFF with one row of 12-bit gray values: 0, 4095, 2048, 16."""
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10])
    return handmade_tiff(packed, width=4, bits=12)


def handmade_tiff(body, width, height=1, bits=16, photometric=1, tile=None) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1}
    tags |= {322: tile[0], 323: tile[1], 324: 8, 325: len(body)} if tile else {273: 8, 278: height, 279: len(body)}
    out = struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        out += struct.pack("<HHII", tag, 4, 1, value)
    return out + struct.pack("<I", 0)


def with_exif(directory: bytes) -> bytes:
    return encoded(IMAGE, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory)


def cmyk():
    return IMAGE.convert("CMYK")


VALID = {
    # file content, expected pixels, and tolerance of lossy compression
    "jpeg": lambda: (encoded(IMAGE, "JPEG", quality=100, subsampling=0), PIXELS, 6),
    "progressive jpeg": lambda: (encoded(IMAGE, "JPEG", quality=100, subsampling=0, progressive=True), PIXELS, 6),
    "png": lambda: (encoded(IMAGE, "PNG"), PIXELS, 0),
    "bmp": lambda: (encoded(IMAGE, "BMP"), PIXELS, 0),
    "ppm": lambda: (encoded(IMAGE, "PPM"), PIXELS, 0),
    "webp": lambda: (encoded(IMAGE, "WEBP", lossless=True), PIXELS, 0),
    "jpeg 2000": lambda: (encoded(IMAGE, "JPEG2000"), PIXELS, 0),
    "tiff, lzw": lambda: (tiff_page(IMAGE, compression="tiff_lzw"), PIXELS, 0),
    "cmyk jpeg": lambda: (encoded(cmyk(), "JPEG", quality=100, subsampling=0), np.asarray(cmyk().convert("RGB")), 8),
    "cmyk tiff": lambda: (tiff_page(cmyk()), np.asarray(cmyk().convert("RGB")), 0),
    "palette png": lambda: (palette(), palette_pixels(), 0),
    "palette png, transparent color": lambda: (palette(transparency=0), palette_pixels(), 0),
    "palette png, alpha per entry": lambda: (palette(transparency=bytes(range(64))), palette_pixels(), 0),
    "palette gif, transparent color": lambda: (palette(kind="GIF", transparency=3), palette_pixels(), 0),
    "rgb png, transparent color": lambda: (encoded(IMAGE, "PNG", transparency=(255, 0, 0)), PIXELS, 0),
    "gray png": lambda: (encoded(PILImage.fromarray(GRAY), "PNG"), rgb(GRAY), 0),
    "gray png, alpha": lambda: (encoded(with_alpha("L"), "PNG"), rgb(IMAGE.convert("L")), 0),
    "rgba png, colors under alpha": lambda: (encoded(with_alpha(), "PNG"), PIXELS, 0),
    "rgba tiff": lambda: (tiff_page(with_alpha()), PIXELS, 0),
    "one bit png": lambda: (
        encoded(PILImage.fromarray(GRAY > 127), "PNG"), rgb(np.where(GRAY > 127, 255, 0)), 0
    ),
    "one bit tiff": lambda: (
        tiff_page(PILImage.fromarray(GRAY > 127), compression="group4"), rgb(np.where(GRAY > 127, 255, 0)), 0
    ),
    "16-bit png": lambda: (encoded(PILImage.fromarray(sixteen_bits()), "PNG"), rgb(GRAY), 0),
    "16-bit tiff": lambda: (tiff_page(PILImage.fromarray(sixteen_bits())), rgb(GRAY), 0),
    "16-bit tiff, big endian": lambda: (
        tiff_page(PILImage.frombytes("I;16B", (48, 40), sixteen_bits().astype(">u2").tobytes())), rgb(GRAY), 0
    ),
    "16-bit tiff, white is zero": lambda: (
        handmade_tiff((65535 - sixteen_bits()).astype("<u2").tobytes(), 48, 40, photometric=0), rgb(GRAY), 0
    ),
    "16-bit pgm": lambda: (b"P5 48 40 65535 " + sixteen_bits().astype(">u2").tobytes(), rgb(GRAY), 0),
    "12-bit tiff": lambda: (twelve_bits(), rgb([[0, 255, 128, 1]]), 0),
    "16-bit png, rounding": lambda: (
        encoded(PILImage.fromarray(np.array([[0, 128, 129, 32767, 65407, 65535]], np.uint16)), "PNG"),
        rgb([[0, 0, 1, 127, 255, 255]]),
        0,
    ),
    **{f"exif {n}, jpeg": lambda n=n: (rotated("JPEG", n), PIXELS, 6) for n in range(2, 9)},
    "exif 6, png": lambda: (rotated("PNG", 6), PIXELS, 0),
    "exif 8, webp": lambda: (rotated("WEBP", 8), PIXELS, 0),
    "exif 6, tiff": lambda: (rotated("TIFF", 6), PIXELS, 0),
    "exif out of range": lambda: (with_exif(b"\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"), PIXELS, 0),
    "exif, invalid": lambda: (encoded(IMAGE, "PNG", exif=b"Exif\0\0" + bytes(range(256))), PIXELS, 0),
    "exif, truncated": lambda: (with_exif(b"\xff\xff\x12\x01"), PIXELS, 0),
    "animated gif": lambda: (
        encoded(IMAGE.quantize(64), "GIF", save_all=True, append_images=other_frames()), palette_pixels(), 0
    ),
    "animated png": lambda: (encoded(IMAGE, "PNG", save_all=True, append_images=other_frames()), PIXELS, 0),
    "animated webp": lambda: (
        encoded(IMAGE, "WEBP", lossless=True, save_all=True, append_images=other_frames()), PIXELS, 0
    ),
    "tiff of several pages": lambda: (tiff_page(IMAGE, save_all=True, append_images=other_frames()), PIXELS, 0),
    "1 x 1": lambda: (encoded(IMAGE.crop((0, 0, 1, 1)), "PNG"), PIXELS[:1, :1], 0),
    "20 to 1": lambda: (encoded(IMAGE.resize((800, 40), 0), "PNG"), np.asarray(IMAGE.resize((800, 40), 0)), 0),
    "1 to 20": lambda: (encoded(IMAGE.resize((40, 800), 0), "PNG"), np.asarray(IMAGE.resize((40, 800), 0)), 0),
    "trailing bytes": lambda: (encoded(IMAGE, "PNG") + b"\0" * 1000 + b"<script>", PIXELS, 0),
    "pixel limit": lambda: (encoded(PILImage.new("RGB", (1000, 1000)), "PNG"), np.zeros((1000, 1000, 3)), 0),
}  # fmt: skip

NO_WHITE = "undefined white point"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
INVALID = {
    "zero bytes": lambda: (b"", "empty file"),
    "text": lambda: (b"plain text\n" * 9, "not an image: no header of JPEG, PNG"),
    "html": lambda: (b"<!DOCTYPE html><title>404</title>", "not an image"),
    "svg": lambda: (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "postscript": lambda: (POSTSCRIPT, "not an image"),
    "one byte": lambda: (b"P", "not an image"),
    "jpeg without a body": lambda: (encoded(IMAGE, "JPEG")[:20], "damaged image"),
    "truncated jpeg": lambda: (encoded(IMAGE, "JPEG", quality=95)[:900], "truncated image"),
    "truncated png": lambda: (encoded(IMAGE, "PNG")[:120], "truncated image"),
    "truncated gif": lambda: (palette(kind="GIF")[:800], "truncated image"),
    "truncated bmp": lambda: (encoded(IMAGE, "BMP")[:3000], "truncated image"),
    "truncated webp": lambda: (encoded(IMAGE, "WEBP")[:70], "damaged image"),
    "png, wrong checksum": lambda: (encoded(IMAGE, "PNG").replace(b"IDAT", b"IDAU"), "damaged image"),
    "header bomb": lambda: (png(60_000, 60_000), "too large: 60000 x 60000 pixels, the limit is 1,000,000"),
    "above pixel limit": lambda: (png(1001, 1000), "too large: 1001 x 1000"),
    "between Pillow's limits": lambda: (png(10_000, 10_000), "too large: 10000 x 10000"),
    "gif bomb": lambda: (gif_screen(60_000, 60_000), "too large: 60000 x 60000"),
    "bmp bomb": lambda: (
        encoded(IMAGE, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(IMAGE, "BMP")[26:], "too large"
    ),
    "ppm bomb": lambda: (b"P6 60000 60000 255 abc", "too large"),
    "webp bomb": lambda: (webp_canvas(60_000, 60_000), "too large: 60000 x 60000"),
    "tiff bomb": lambda: (handmade_tiff(b"\0\0", 60_000, 60_000), "too large"),
    "tiff, gigapixel tiles": lambda: (
        handmade_tiff(b"\0" * 8, 2, 2, bits=8, tile=(32_000, 32_000)), "too large: tiles of 32000 x 32000"
    ),
    "jpeg bomb": lambda: (jpeg_of_size(60_000, 60_000), "too large"),
    "header without width": lambda: (png(0, 10), "damaged image"),
    "header with more rows": lambda: (png(48, 400, b"\0" * 3000), "truncated image"),
    "extreme aspect ratio": lambda: (png(200_000, 1, b"\0" * 600_001), "too narrow: 200000 x 1"),
    "float tiff": lambda: (tiff_page(PILImage.fromarray(GRAY.astype(np.float32))), f"{NO_WHITE}: TIFF of mode F"),
    "32-bit tiff": lambda: (tiff_page(PILImage.fromarray(GRAY.astype(np.int32))), f"{NO_WHITE}: TIFF of mode I"),
    "lab tiff": lambda: (tiff_page(PILImage.new("LAB", (9, 9))), NO_WHITE),
}  # fmt: skip


def jpeg_of_size(width, height) -> bytes:
    content = bytearray(encoded(IMAGE, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)
