"""Text decoding: yields the lines of UTF-8 files; detects other encodings and file formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hftl.errors import DataError

_OTHER_FORMATS = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip)"),
    (b"BZh", "compressed by bzip2", "unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it (unzstd)"),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"SQLite format 3", "an SQLite database", "write its table as CSV or Parquet"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run git lfs pull"),
    (b"<!doctype html", "a web page, perhaps a login page", "download the file again"),
    (b"<html", "a web page, perhaps a login page", "download the file again"),
)
"""Magic bytes, format, and advice."""
_BLOCK = 1 << 20


def check_magic_bytes(path: Path) -> None:
    """Raises DataError if the magic bytes contradict the extension. Archives are never unpacked."""
    with path.open("rb") as file:
        head = file.read(64)
    for magic, file_format, advice in _OTHER_FORMATS:
        is_expected = magic == b"PAR1" and path.suffix.lower() == ".parquet"
        if head.lower().startswith(magic.lower()) and not is_expected:
            raise DataError(f"data.source: '{path}' is {file_format}; {advice}.")


def text_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their endings (LF, CR LF or CR), without the byte order mark.

    Raises:
        DataError: The file has a byte that is not UTF-8, or a NUL; includes line and byte.
    """
    check_magic_bytes(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise DataError(
                        f"data.source: '{path}' line {number} has a NUL byte; the file is binary, damaged, or UTF-16. "
                        "Convert UTF-16: iconv -f UTF-16 -t UTF-8."
                    )
                yield line
        except UnicodeDecodeError as error:
            raise DataError(_encoding_problem(path)) from error


def _encoding_problem(path: Path) -> str:
    """Returns a message with the position of the first byte that is not UTF-8 (counted from 1)."""
    line, offset, invalid = 1, 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            data = invalid + block
            try:
                data.decode("utf-8")
                valid, invalid = data, b""
            except UnicodeDecodeError as error:
                valid, invalid = data[: error.start], data[error.start :]
                if error.end < len(data) or len(invalid) > 3:  # else a character that continues in the next block
                    line += valid.count(b"\n")
                    break
            line += valid.count(b"\n")
            offset += len(valid)
        else:
            valid = b""
    return (
        f"data.source: '{path}' is not UTF-8: byte 0x{invalid[:1].hex()} in line {line} (byte "
        f"{offset + len(valid) + 1} of the file). Convert Latin-1 or Windows text: iconv -f WINDOWS-1252 -t UTF-8."
    )
