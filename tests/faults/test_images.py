"""Bad and odd images: each is the right pixels or a named refusal, at little cost; nothing else comes out of Pillow."""

import logging
import os
import random
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from pictures import BAD, GOOD, IMAGE, LIMIT, PICTURE, encoded, other_frames, png, webp_canvas
from PIL import Image as PILImage

from hftl.data.image_decoding import check_header, decode_image
from hftl.errors import DataError


def decoded(content: bytes, mode="RGB", limit=LIMIT) -> np.ndarray:
    image = decode_image({"bytes": content, "path": None}, mode, limit)
    assert image.mode == mode
    return np.asarray(image)


@pytest.fixture
def loud(caplog):
    """Every warning is an error, every line that Pillow logs is seen."""
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not [record for record in caplog.records if record.name.startswith("PIL")]


@pytest.mark.parametrize("kind", GOOD)
def test_an_odd_image_is_the_right_pixels(kind, loud):
    content, wanted, tolerance = GOOD[kind]()
    found = decoded(content)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= tolerance
    assert decoded(content, "L").shape == wanted.shape[:2]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_refused_in_a_sentence(kind, loud):
    content, wanted = BAD[kind]()
    with pytest.raises(DataError) as raised:
        decoded(content)
    assert str(raised.value).startswith(wanted) and "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_two_kinds_share_no_picture():
    """The tests above can fail: the picture is not its own mirror image, and frames differ."""
    assert all(not np.array_equal(PICTURE, np.asarray(frame)) for frame in other_frames())
    turns = [np.asarray(IMAGE.transpose(turn)) for turn in PILImage.Transpose]
    assert all(turn.shape != PICTURE.shape or np.abs(turn.astype(int) - PICTURE).max() > 60 for turn in turns)


@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "16-bit png", "palette gif, transparent colour", "animated gif", "webp"]
)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.unknown"])
def test_the_ending_of_a_file_says_nothing(kind, name, tmp_path):
    content, wanted, tolerance = GOOD[kind]()
    (tmp_path / name).write_bytes(content)
    found = np.asarray(decode_image({"bytes": None, "path": str(tmp_path / name)}, "RGB", LIMIT))
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= tolerance


FILES = (
    *("jpeg", "progressive jpeg", "cmyk jpeg", "png", "16-bit png", "animated png", "animated gif", "bmp", "webp"),
    *("animated webp", "tiff, lzw", "16-bit tiff", "tiff of several pages", "ppm", "jpeg 2000"),
)


@pytest.mark.parametrize("kind", FILES)
def test_an_image_cut_anywhere_is_refused_or_was_complete(kind):
    """Half an image is never taken for a whole one."""
    content = GOOD[kind]()[0]
    whole, refused = decoded(content), 0
    for end in range(0, len(content), max(1, len(content) // 60)):
        try:
            assert np.array_equal(decoded(content[:end]), whole), f"cut at byte {end} of {len(content)}"
        except DataError:
            refused += 1
    assert refused


def gone(folder):
    return folder / "gone.png", "no such file"


def a_folder(folder):
    (folder / "x.png").mkdir()
    return folder / "x.png", "not a file: a folder"


def below_a_file(folder):
    (folder / "x").write_text("")
    return folder / "x" / "y.png", "no such file"


def a_circle(folder):
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    return folder / "a.png", "no such file: symbolic links that lead in a circle"


def a_dangling_link(folder):
    (folder / "a.png").symlink_to(folder / "nowhere.png")
    return folder / "a.png", "no such file"


def a_pipe(folder):
    os.mkfifo(folder / "x.png")
    return folder / "x.png", "not a file: a pipe or a device"


def a_device(folder):
    return "/dev/zero", "not a file: a pipe or a device"


def a_nul(folder):
    return "x\0y.png", "no such file"


def a_long_name(folder):
    return folder / ("x" * 5000), "no such file"


def an_address(folder):
    return "https://example.com/cat.png", "no such file"


@pytest.mark.parametrize(
    "make", [gone, a_folder, below_a_file, a_circle, a_dangling_link, a_pipe, a_device, a_nul, a_long_name, an_address]
)
def test_a_path_that_leads_to_no_image_is_refused(make, tmp_path):
    path, wanted = make(tmp_path)
    for look in (lambda stored: decode_image(stored, "RGB", LIMIT), lambda stored: check_header(stored, LIMIT)):
        with pytest.raises(DataError) as raised:
            look({"bytes": None, "path": str(path)})
        assert str(raised.value).startswith(wanted)


def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(IMAGE, "PNG"))
    (tmp_path / "x.png").chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything: be nobody for the moment, in a folder that nobody may enter
        for parent in [tmp_path, *tmp_path.parents]:
            if parent.stat().st_uid == 0 and "pytest" in str(parent):
                parent.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="no permission to read the file"):
            decode_image({"bytes": None, "path": str(tmp_path / "x.png")}, "RGB", LIMIT)
    finally:
        if root:
            os.seteuid(0)


def test_what_the_header_refuses_is_refused_without_decoding(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in ("header bomb", "gif bomb", "bmp bomb", "ppm bomb", "webp bomb", "tiff bomb", "jpeg bomb"):
        with pytest.raises(DataError, match="too large"):
            check_header({"bytes": BAD[kind]()[0], "path": None}, LIMIT)
    for kind in ("float tiff", "lab tiff", "a thread of pixels", "zero bytes", "text"):
        with pytest.raises(DataError):
            check_header({"bytes": BAD[kind]()[0], "path": None}, LIMIT)
    assert check_header({"bytes": GOOD["jpeg"]()[0], "path": None}, LIMIT) == (48, 40)


BOMBS = """
import resource, sys
from hftl.data.image_decoding import decode_image
from hftl.errors import DataError
decode_image({"path": sys.argv[1], "bytes": None}, "RGB", 10_000)  # everything is imported from here on
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
def test_bombs_of_a_gigapixel_take_no_memory(tmp_path):
    """A gigapixel is 3 GB of RGB; 256 MB more than the interpreter holds are enough to refuse six of them."""
    real = png(32_000, 32_000, zeros=1_024_032_000, colour=0)
    assert len(real) < 2_000_000, "a whole image of 1,024,000,000 pixels in a small file"
    bombs = {"whole.png": real, "big.webp": webp_canvas(32_000, 32_000)}
    bombs |= {f"{kind}.bin": BAD[kind]()[0] for kind in ("gif bomb", "bmp bomb", "tiff bomb", "jpeg bomb")}
    for name, content in {"first.png": encoded(IMAGE, "PNG"), **bombs}.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in ("first.png", *bombs)]
    done = subprocess.run([sys.executable, "-c", BOMBS, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, f"{done.stdout} kB more were resident"


def test_an_image_above_pillows_own_limit_is_decoded_where_the_configuration_allows_it(monkeypatch, loud):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    assert np.array_equal(decoded(encoded(IMAGE, "PNG")), PICTURE)
    assert PILImage.MAX_IMAGE_PIXELS == 100


def test_pillow_is_left_as_it_was_whatever_threads_did():
    before = PILImage.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level
    contents = [GOOD["jpeg"]()[0], BAD["text"]()[0], GOOD["palette png, transparency in bytes"]()[0]] * 20

    def work(seed):
        for content in random.Random(seed).sample(contents, len(contents)):
            try:
                decoded(content)
            except DataError:
                pass

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == (PILImage.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level)
