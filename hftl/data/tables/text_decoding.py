"""Bytes of a table as lines of text; what is no text is named for what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hftl.errors import DataError

_DISGUISES = (
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
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "run git lfs pull"),
    (b"<!doctype html", "a web page; did its download need a login?", "download it again"),
    (b"<html", "a web page; did its download need a login?", "download it again"),
)
_BLOCK = 1 << 20


def refuse_disguised(path: Path) -> None:
    """Raises DataError where the first bytes say that a file is not what its name says. Nothing is ever unpacked."""
    with path.open("rb") as file:
        head = file.read(64)
    for magic, what, todo in _DISGUISES:
        named_so = magic == b"PAR1" and path.suffix.lower() == ".parquet"
        if head.lower().startswith(magic.lower()) and not named_so:
            raise DataError(f"data.source: '{path}' is {what}; {todo}.")


def text_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their endings (LF, CR LF or CR), without its byte order mark.

    Raises:
        DataError: There is a byte that is not UTF-8, or a NUL; names line and byte.
    """
    refuse_disguised(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise DataError(
                        f"data.source: '{path}' line {number} holds a NUL byte, which no text has; is it binary, "
                        "damaged, or UTF-16 (iconv -f UTF-16 -t UTF-8)?"
                    )
                yield line
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(path)) from error


def _not_utf8(path: Path) -> str:
    """Returns a sentence with the place of the first byte that is not UTF-8 (counted from 1)."""
    line, at, rest = 1, 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            data = rest + block
            try:
                data.decode("utf-8")
                good, rest = data, b""
            except UnicodeDecodeError as error:
                good, rest = data[: error.start], data[error.start :]
                if error.end < len(data) or len(rest) > 3:  # else a character that the block cuts
                    line += good.count(b"\n")
                    break
            line += good.count(b"\n")
            at += len(good)
        else:
            good = b""
    return (
        f"data.source: '{path}' is not UTF-8: byte 0x{rest[:1].hex()} in line {line} (byte {at + len(good) + 1} of the "
        "file). If it is Latin-1 or Windows text, convert it: iconv -f WINDOWS-1252 -t UTF-8."
    )
