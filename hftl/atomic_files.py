"""Atomic file writes: write to a temporary file, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hftl.errors import ConfigError

PARTIAL = ".partial"
"""Suffix of temporary files, which are never read."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` if the block ends without an error.

    After a crash at any moment, `path` has either its old or its new content. (POSIX: `rename` is atomic within a
    file system; the file is fsynced before it and the folder after it.)

    Raises:
        OSError: The disk is full, read-only or missing. `path` is unchanged and the temporary file is removed.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def output_folder(folder: str | Path) -> Path:
    """Returns the folder of `--output`, created if it is missing.

    Raises:
        ConfigError: The folder cannot be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output: folder '{folder}' cannot be created: {error.strerror or error}. Pass another one."
        ) from error
    return Path(folder)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
