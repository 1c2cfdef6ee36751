"""Images that are good, odd and bad, made when asked for: kind -> file content and what is to become of it."""

import io
import struct
import zlib

import numpy as np
from PIL import Image as PILImage

LIMIT = 1_000_000
# a picture with no symmetry: corners red, green, blue and white on a slope of grey
PICTURE = np.linspace(20, 200, 40 * 48).reshape(40, 48, 1).repeat(3, axis=2).astype(np.uint8)
for place, colour in {(0, 0): (255, 0, 0), (0, -8): (0, 255, 0), (-8, 0): (0, 0, 255), (-8, -8): (255,) * 3}.items():
    PICTURE[place[0] : place[0] + 8 or None, place[1] : place[1] + 8 or None] = colour
GREY = np.linspace(0, 255, 40 * 48).reshape(40, 48).round().astype(np.uint8)
IMAGE = PILImage.fromarray(PICTURE)


def encoded(image, kind, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, body=b"", colour=2, zeros=0) -> bytes:
    """A PNG whose header says what we like, of `body` or of that many zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", packed_zeros(zeros) if zeros else zlib.compress(body)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data


def packed_zeros(count, at_once=32_001_000) -> bytes:
    """What zlib makes of so many zeros, quickly: one block over and over, and the checksum worked out."""
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(at_once)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    assert count % at_once == 0
    return first + again * (count // at_once - 1) + b"\x03\x00" + struct.pack(">I", count % 65521 << 16 | 1)


def webp_canvas(width, height) -> bytes:
    """A WebP whose extended header claims a canvas larger than the picture in it."""
    inner = encoded(IMAGE, "WEBP")[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_screen(width, height) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + palette(kind="GIF")[10:]


def turned(kind, orientation) -> bytes:
    """The picture as a camera stores it that was held so."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that EXIF's number takes back
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    best = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(IMAGE.transpose(PILImage.Transpose(undo[orientation])), kind, exif=exif, **best)


def other_frames(count=3):
    return [PILImage.fromarray(255 - PICTURE // (n + 1)) for n in range(count)]


def with_alpha(mode="RGBA"):
    image = IMAGE.convert(mode)
    image.putalpha(PILImage.fromarray(255 - GREY))
    return image


def palette(**options) -> bytes:
    return encoded(IMAGE.quantize(64), options.pop("kind", "PNG"), **options)


def palette_pixels():
    return np.asarray(IMAGE.quantize(64).convert("RGB"))


def rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def sixteen_bits():
    return GREY.astype(np.uint16) * 257


def tiff_page(image, **options):
    return encoded(image, "TIFF", **options)


def twelve_bits() -> bytes:
    """A TIFF of one row of 12-bit grey: 0, 4095, 2048, 16."""
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


GOOD = {
    # kind: content of the file, its pixels, and by how much compression may change them
    "jpeg": lambda: (encoded(IMAGE, "JPEG", quality=100, subsampling=0), PICTURE, 6),
    "progressive jpeg": lambda: (encoded(IMAGE, "JPEG", quality=100, subsampling=0, progressive=True), PICTURE, 6),
    "png": lambda: (encoded(IMAGE, "PNG"), PICTURE, 0),
    "bmp": lambda: (encoded(IMAGE, "BMP"), PICTURE, 0),
    "ppm": lambda: (encoded(IMAGE, "PPM"), PICTURE, 0),
    "webp": lambda: (encoded(IMAGE, "WEBP", lossless=True), PICTURE, 0),
    "jpeg 2000": lambda: (encoded(IMAGE, "JPEG2000"), PICTURE, 0),
    "tiff, lzw": lambda: (tiff_page(IMAGE, compression="tiff_lzw"), PICTURE, 0),
    "cmyk jpeg": lambda: (encoded(cmyk(), "JPEG", quality=100, subsampling=0), np.asarray(cmyk().convert("RGB")), 8),
    "cmyk tiff": lambda: (tiff_page(cmyk()), np.asarray(cmyk().convert("RGB")), 0),
    "palette png": lambda: (palette(), palette_pixels(), 0),
    "palette png, one transparent colour": lambda: (palette(transparency=0), palette_pixels(), 0),
    "palette png, transparency in bytes": lambda: (palette(transparency=bytes(range(64))), palette_pixels(), 0),
    "palette gif, transparent colour": lambda: (palette(kind="GIF", transparency=3), palette_pixels(), 0),
    "rgb png, one transparent colour": lambda: (encoded(IMAGE, "PNG", transparency=(255, 0, 0)), PICTURE, 0),
    "grey png": lambda: (encoded(PILImage.fromarray(GREY), "PNG"), rgb(GREY), 0),
    "grey png, alpha": lambda: (encoded(with_alpha("L"), "PNG"), rgb(IMAGE.convert("L")), 0),
    "rgba png keeps the colours under its alpha": lambda: (encoded(with_alpha(), "PNG"), PICTURE, 0),
    "rgba tiff": lambda: (tiff_page(with_alpha()), PICTURE, 0),
    "one bit png": lambda: (
        encoded(PILImage.fromarray(GREY > 127), "PNG"), rgb(np.where(GREY > 127, 255, 0)), 0
    ),
    "one bit tiff": lambda: (
        tiff_page(PILImage.fromarray(GREY > 127), compression="group4"), rgb(np.where(GREY > 127, 255, 0)), 0
    ),
    "16-bit png": lambda: (encoded(PILImage.fromarray(sixteen_bits()), "PNG"), rgb(GREY), 0),
    "16-bit tiff": lambda: (tiff_page(PILImage.fromarray(sixteen_bits())), rgb(GREY), 0),
    "16-bit tiff, big endian": lambda: (
        tiff_page(PILImage.frombytes("I;16B", (48, 40), sixteen_bits().astype(">u2").tobytes())), rgb(GREY), 0
    ),
    "16-bit tiff, white is zero": lambda: (
        handmade_tiff((65535 - sixteen_bits()).astype("<u2").tobytes(), 48, 40, photometric=0), rgb(GREY), 0
    ),
    "16-bit pgm": lambda: (b"P5 48 40 65535 " + sixteen_bits().astype(">u2").tobytes(), rgb(GREY), 0),
    "12-bit tiff": lambda: (twelve_bits(), rgb([[0, 255, 128, 1]]), 0),
    "16-bit is rounded, not cut": lambda: (
        encoded(PILImage.fromarray(np.array([[0, 128, 129, 32767, 65407, 65535]], np.uint16)), "PNG"),
        rgb([[0, 0, 1, 127, 255, 255]]),
        0,
    ),
    **{f"exif {n}, jpeg": lambda n=n: (turned("JPEG", n), PICTURE, 6) for n in range(2, 9)},
    "exif 6, png": lambda: (turned("PNG", 6), PICTURE, 0),
    "exif 8, webp": lambda: (turned("WEBP", 8), PICTURE, 0),
    "exif 6, tiff": lambda: (turned("TIFF", 6), PICTURE, 0),
    "exif out of range": lambda: (with_exif(b"\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"), PICTURE, 0),
    "exif that is garbage": lambda: (encoded(IMAGE, "PNG", exif=b"Exif\0\0" + bytes(range(256))), PICTURE, 0),
    "exif that is cut short": lambda: (with_exif(b"\xff\xff\x12\x01"), PICTURE, 0),
    "animated gif": lambda: (
        encoded(IMAGE.quantize(64), "GIF", save_all=True, append_images=other_frames()), palette_pixels(), 0
    ),
    "animated png": lambda: (encoded(IMAGE, "PNG", save_all=True, append_images=other_frames()), PICTURE, 0),
    "animated webp": lambda: (
        encoded(IMAGE, "WEBP", lossless=True, save_all=True, append_images=other_frames()), PICTURE, 0
    ),
    "tiff of several pages": lambda: (tiff_page(IMAGE, save_all=True, append_images=other_frames()), PICTURE, 0),
    "1 x 1": lambda: (encoded(IMAGE.crop((0, 0, 1, 1)), "PNG"), PICTURE[:1, :1], 0),
    "20 to 1": lambda: (encoded(IMAGE.resize((800, 40), 0), "PNG"), np.asarray(IMAGE.resize((800, 40), 0)), 0),
    "1 to 20": lambda: (encoded(IMAGE.resize((40, 800), 0), "PNG"), np.asarray(IMAGE.resize((40, 800), 0)), 0),
    "bytes after its end": lambda: (encoded(IMAGE, "PNG") + b"\0" * 1000 + b"<script>", PICTURE, 0),
    "exactly the limit": lambda: (encoded(PILImage.new("RGB", (1000, 1000)), "PNG"), np.zeros((1000, 1000, 3)), 0),
}  # fmt: skip

NO_WHITE = "pixels without a known white"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD = {
    "zero bytes": lambda: (b"", "empty file"),
    "text": lambda: (b"this is no image\n" * 9, "not an image: no header of JPEG, PNG"),
    "html": lambda: (b"<!DOCTYPE html><title>404</title>", "not an image"),
    "svg": lambda: (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "postscript is not run": lambda: (POSTSCRIPT, "not an image"),
    "one byte": lambda: (b"P", "not an image"),
    "jpeg without a body": lambda: (encoded(IMAGE, "JPEG")[:20], "damaged image"),
    "half a jpeg": lambda: (encoded(IMAGE, "JPEG", quality=95)[:900], "truncated image"),
    "half a png": lambda: (encoded(IMAGE, "PNG")[:120], "truncated image"),
    "half a gif": lambda: (palette(kind="GIF")[:800], "truncated image"),
    "half a bmp": lambda: (encoded(IMAGE, "BMP")[:3000], "truncated image"),
    "half a webp": lambda: (encoded(IMAGE, "WEBP")[:70], "damaged image"),
    "png with a wrong checksum": lambda: (encoded(IMAGE, "PNG").replace(b"IDAT", b"IDAU"), "damaged image"),
    "header bomb": lambda: (png(60_000, 60_000), "too large: 60000 x 60000 pixels, the limit is 1,000,000"),
    "one pixel over the limit": lambda: (png(1001, 1000), "too large: 1001 x 1000"),
    "between Pillow's two limits": lambda: (png(10_000, 10_000), "too large: 10000 x 10000"),
    "gif bomb": lambda: (gif_screen(60_000, 60_000), "too large: 60000 x 60000"),
    "bmp bomb": lambda: (
        encoded(IMAGE, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(IMAGE, "BMP")[26:], "too large"
    ),
    "ppm bomb": lambda: (b"P6 60000 60000 255 abc", "too large"),
    "webp bomb": lambda: (webp_canvas(60_000, 60_000), "too large: 60000 x 60000"),
    "tiff bomb": lambda: (handmade_tiff(b"\0\0", 60_000, 60_000), "too large"),
    "tiff with tiles of a gigapixel": lambda: (
        handmade_tiff(b"\0" * 8, 2, 2, bits=8, tile=(32_000, 32_000)), "too large: tiles of 32000 x 32000"
    ),
    "jpeg bomb": lambda: (jpeg_of_size(60_000, 60_000), "too large"),
    "a header of no width": lambda: (png(0, 10), "damaged image"),
    "a header that promises more rows": lambda: (png(48, 400, b"\0" * 3000), "truncated image"),
    "a thread of pixels": lambda: (png(200_000, 1, b"\0" * 600_001), "too narrow: 200000 x 1"),
    "float tiff": lambda: (tiff_page(PILImage.fromarray(GREY.astype(np.float32))), f"{NO_WHITE}: TIFF of mode F"),
    "32-bit tiff": lambda: (tiff_page(PILImage.fromarray(GREY.astype(np.int32))), f"{NO_WHITE}: TIFF of mode I"),
    "lab tiff": lambda: (tiff_page(PILImage.new("LAB", (9, 9))), "pixels without a known white"),
}  # fmt: skip


def jpeg_of_size(width, height) -> bytes:
    content = bytearray(encoded(IMAGE, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)
