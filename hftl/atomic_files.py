"""Files that are whole or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hftl.errors import ConfigError

PARTIAL = ".partial"
"""Ending of what is being written; nothing that ends so is ever read."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    After a crash at any moment `path` is what it was before or what it was to become. (POSIX: `rename` is atomic
    within a file system; the file is fsynced before it and the folder after it.)

    Raises:
        OSError: The disk is full, read-only or gone. `path` is as before and nothing is left beside it.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def output_folder(folder: str | Path) -> Path:
    """Returns the folder that `--output` names, made where it is missing.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: '{folder}' cannot be a folder: {error.strerror or error}.") from error
    return Path(folder)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as a whole file."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
