"""Image decoding of valid, invalid and hostile files; the reference is the sample's pixels or its error."""

import logging
import os
import random
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from image_samples import IMAGE, INVALID, LIMIT, PIXELS, VALID, encoded, other_frames, png, webp_canvas
from PIL import Image as PILImage

from hftl.data.image_decoding import check_header, decode_image
from hftl.errors import DataError


def decode(content: bytes, mode="RGB", limit=LIMIT) -> np.ndarray:
    image = decode_image({"bytes": content, "path": None}, mode, limit)
    assert image.mode == mode
    return np.asarray(image)


@pytest.fixture
def strict_warnings(caplog):
    """Turns warnings into errors and asserts that Pillow logs nothing."""
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not [record for record in caplog.records if record.name.startswith("PIL")]


@pytest.mark.parametrize("kind", VALID)
def test_decode_valid_image_returns_expected_pixels(kind, strict_warnings):
    content, expected, tolerance = VALID[kind]()
    pixels = decode(content)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance
    assert decode(content, "L").shape == expected.shape[:2]


@pytest.mark.parametrize("kind", INVALID)
def test_decode_invalid_image_raises_single_line(kind, strict_warnings):
    content, reason = INVALID[kind]()
    with pytest.raises(DataError) as raised:
        decode(content)
    assert str(raised.value).startswith(reason) and "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_samples_differ_from_frames_and_transposes():
    """The tests above detect a wrong orientation or frame."""
    assert all(not np.array_equal(PIXELS, np.asarray(frame)) for frame in other_frames())
    transposed = [np.asarray(IMAGE.transpose(method)) for method in PILImage.Transpose]
    assert all(other.shape != PIXELS.shape or np.abs(other.astype(int) - PIXELS).max() > 60 for other in transposed)


@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "16-bit png", "palette gif, transparent color", "animated gif", "webp"]
)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.unknown"])
def test_decode_ignores_file_extension(kind, name, tmp_path):
    content, expected, tolerance = VALID[kind]()
    (tmp_path / name).write_bytes(content)
    pixels = np.asarray(decode_image({"bytes": None, "path": str(tmp_path / name)}, "RGB", LIMIT))
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance


FILES = (
    *("jpeg", "progressive jpeg", "cmyk jpeg", "png", "16-bit png", "animated png", "animated gif", "bmp", "webp"),
    *("animated webp", "tiff, lzw", "16-bit tiff", "tiff of several pages", "ppm", "jpeg 2000"),
)


@pytest.mark.parametrize("kind", FILES)
def test_decode_truncated_image_raises_or_matches(kind):
    """A truncated file never returns partial pixels."""
    content = VALID[kind]()[0]
    expected, errors = decode(content), 0
    for end in range(0, len(content), max(1, len(content) // 60)):
        try:
            assert np.array_equal(decode(content[:end]), expected), f"truncated at byte {end} of {len(content)}"
        except DataError:
            errors += 1
    assert errors


def missing_file(folder):
    return folder / "missing.png", "no such file"


def directory(folder):
    (folder / "x.png").mkdir()
    return folder / "x.png", "not a file: a folder"


def file_as_directory(folder):
    (folder / "x").write_text("")
    return folder / "x" / "y.png", "no such file"


def circular_link(folder):
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    return folder / "a.png", "no such file: circular symbolic links"


def dangling_link(folder):
    (folder / "a.png").symlink_to(folder / "nowhere.png")
    return folder / "a.png", "no such file"


def pipe(folder):
    os.mkfifo(folder / "x.png")
    return folder / "x.png", "not a file: a pipe or a device"


def device(folder):
    return "/dev/zero", "not a file: a pipe or a device"


def nul_character(folder):
    return "x\0y.png", "no such file"


def long_name(folder):
    return folder / ("x" * 5000), "no such file"


def url(folder):
    return "https://example.com/cat.png", "no such file"


LINKS = (circular_link, dangling_link)


@pytest.mark.parametrize(
    "make", [missing_file, directory, file_as_directory, *LINKS, pipe, device, nul_character, long_name, url]
)
def test_decode_invalid_path_raises(make, tmp_path):
    path, reason = make(tmp_path)
    for read in (lambda stored: decode_image(stored, "RGB", LIMIT), lambda stored: check_header(stored, LIMIT)):
        with pytest.raises(DataError) as raised:
            read({"bytes": None, "path": str(path)})
        assert str(raised.value).startswith(reason)


def test_decode_without_permission_raises(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(IMAGE, "PNG"))
    (tmp_path / "x.png").chmod(0)
    is_root = os.geteuid() == 0
    if is_root:  # root can read all files: switch to the user nobody, who needs access to the folder
        for parent in [tmp_path, *tmp_path.parents]:
            if parent.stat().st_uid == 0 and "pytest" in str(parent):
                parent.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="no permission to read the file"):
            decode_image({"bytes": None, "path": str(tmp_path / "x.png")}, "RGB", LIMIT)
    finally:
        if is_root:
            os.seteuid(0)


def test_check_header_raises_without_decoding(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in ("header bomb", "gif bomb", "bmp bomb", "ppm bomb", "webp bomb", "tiff bomb", "jpeg bomb"):
        with pytest.raises(DataError, match="too large"):
            check_header({"bytes": INVALID[kind]()[0], "path": None}, LIMIT)
    for kind in ("float tiff", "lab tiff", "extreme aspect ratio", "zero bytes", "text"):
        with pytest.raises(DataError):
            check_header({"bytes": INVALID[kind]()[0], "path": None}, LIMIT)
    assert check_header({"bytes": VALID["jpeg"]()[0], "path": None}, LIMIT) == (48, 40)


BOMBS = """
import resource, sys
from hftl.data.image_decoding import decode_image
from hftl.errors import DataError
decode_image({"path": sys.argv[1], "bytes": None}, "RGB", 10_000)  # imports all modules
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def size():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (size() * 1024 + 256 * 2**20,) * 2)
before = resident()
for path in sys.argv[2:]:
    try:
        decode_image({"path": path, "bytes": None}, "RGB", 64_000_000)
    except DataError as error:
        assert str(error).startswith("too large"), (path, error)
    else:
        raise AssertionError(path)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decode_gigapixel_bombs_allocate_no_memory(tmp_path):
    """A gigapixel is 3 GB of RGB; the process may allocate 256 MB."""
    complete = png(32_000, 32_000, zeros=1_024_032_000, color_type=0)
    assert len(complete) < 2_000_000, "1,024,000,000 pixels in a small file"
    bombs = {"complete.png": complete, "big.webp": webp_canvas(32_000, 32_000)}
    bombs |= {f"{kind}.bin": INVALID[kind]()[0] for kind in ("gif bomb", "bmp bomb", "tiff bomb", "jpeg bomb")}
    for name, content in {"first.png": encoded(IMAGE, "PNG"), **bombs}.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in ("first.png", *bombs)]
    completed = subprocess.run([sys.executable, "-c", BOMBS, *paths], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert int(completed.stdout) < 64 * 1024, f"resident memory grew by {completed.stdout} kB"


def test_decode_above_pillow_limit_returns_pixels(monkeypatch, strict_warnings):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    assert np.array_equal(decode(encoded(IMAGE, "PNG")), PIXELS)
    assert PILImage.MAX_IMAGE_PIXELS == 100


def test_decode_in_threads_preserves_pillow_state():
    before = PILImage.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level
    contents = [VALID["jpeg"]()[0], INVALID["text"]()[0], VALID["palette png, alpha per entry"]()[0]] * 20

    def decode_all(seed):
        for content in random.Random(seed).sample(contents, len(contents)):
            try:
                decode(content)
            except DataError:
                pass

    threads = [threading.Thread(target=decode_all, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == (PILImage.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level)
