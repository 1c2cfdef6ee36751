"""Validation of image paths in data: paths must stay inside the data folder; URLs are rejected.

`datasets` opens any path in a cell: `/etc/passwd`, `../../key.png`, `http://169.254.169.254/…`, `zip://a::b`. Cells are
untrusted input, so they are validated before any file is opened. Symbolic links inside an image folder are followed,
because the folder's owner created them and links into a common store are usual. Links in cells are not followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.columns import find_text_columns
from hftl.data.roles import ROLES, is_usual_name
from hftl.errors import DataError, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SAMPLE_SIZE = 100
"""Number of cells whose extensions decide whether a string column holds image paths."""


def path_problem(value: str, root: str, start: str | None = None, follow: bool = False) -> str | None:
    """Returns the reason to reject a path, or None if the path stays inside `root`.

    Args:
        value: Path in the data, relative or absolute.
        root: Data folder with links resolved (`os.path.realpath`).
        start: Base of relative paths; default: `root`.
        follow: Whether links inside `root` may point outside of it.
    """
    if "\0" in value:
        return "contains a NUL character"
    if "://" in value or "::" in value or re.match("[A-Za-z][A-Za-z0-9+.-]+:", value):
        return "is a URL, not a file of the data"
    if value.startswith("~"):
        return "starts with ~"
    joined = os.path.join(start or root, value)
    full = os.path.normpath(joined) if follow else _real_path(joined)
    is_inside = full == root or full.startswith(root.rstrip(os.sep) + os.sep)
    return None if is_inside else "is outside the data folder"


def cast_path_columns(
    sets: Mapping[str, Dataset], config: DataConfig, root: Path | None, within: Path | None = None
) -> dict[str, Dataset]:
    """Converts columns of image paths to image columns with absolute paths.

    A string column holds image paths if it is `data.image_column`, or if its cells have image file extensions.
    Paths in image columns without embedded bytes are validated too.

    Args:
        sets: Rows by split.
        config: Data section of the configuration.
        root: Base folder of relative paths; None for Hub datasets.
        within: Folder that contains all allowed paths; default: `root`.

    Raises:
        DataError: A path is outside of `within`; lists the rows. If the table has text columns, the image path column
            is left unchanged instead.
    """
    within = within or root
    out = dict(sets)
    for column in dict.fromkeys(name for rows in sets.values() for name in rows.features):
        with_column = [rows for rows in sets.values() if column in rows.features]
        first = next((rows for rows in with_column if not _is_empty(rows, column)), with_column[0])
        kind = first.features[column]
        is_configured = column == config.image_column
        problems: list[str] = []
        if type(kind).__name__ == "Image":
            problems = stored_path_problems(out, column, within, follow=False)
        elif getattr(kind, "dtype", "") in ("string", "large_string") and (
            is_configured or _holds_paths(first, column)
        ):
            problems = _column_problems(out, column, root, within)
            if problems and not is_configured and _has_texts(first, config, column):
                log(f"data: column '{column}' is ignored: {problems[0].partition(': ')[2]}")
                continue
            if not problems:
                out = {split: _cast_to_image(rows, column, str(root)) for split, rows in out.items()}
        if problems:
            raise DataError(*problems)
    return out


def stored_path_problems(sets: Mapping[str, Dataset], column: str, root: Path | None, follow: bool) -> list[str]:
    """Returns one problem per split whose image column has paths (without embedded bytes) outside of `root`.

    Args:
        sets: Rows by split.
        column: The image column.
        root: Folder that contains all allowed paths; None allows the caches of `datasets` and huggingface_hub.
        follow: Whether links inside `root` may point outside of it.
    """
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # its functions are created at run time
    roots = [os.path.realpath(root)] if root else _hub_caches()
    problems = []
    for split, rows in sets.items():
        if column not in rows.features:
            continue
        bad, start = [], 0
        for table in rows.select_columns([column]).with_format("arrow").iter(1000):
            images: Any = pa.table(table).column(0).combine_chunks()  # pyright: ignore[reportArgumentType]
            images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
            embedded = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
            paths = pc.struct_field(images, "path").to_pylist()
            for offset, (path, has_bytes) in enumerate(zip(paths, embedded, strict=True)):
                if path and not has_bytes:
                    reasons = [path_problem(path, allowed, follow=follow) for allowed in roots]
                    bad += [f"row {start + offset} ({path!r}) {reasons[0]}"] if all(reasons) else []
            start += len(images)
        problems += _format_problem(split, column, bad, root)
    return problems


def _column_problems(sets: Mapping[str, Dataset], column: str, root: Path | None, within: Path | None) -> list[str]:
    if root is None or within is None:
        return [
            f"data.source: column '{column}' has image paths, but Hub datasets have no base folder. "
            "Use a dataset with embedded images (an Image feature)."
        ]
    base, allowed = os.path.realpath(root), os.path.realpath(within)
    problems = []
    for split, rows in sets.items():
        bad, start = [], 0
        for batch in rows.select_columns([column]).iter(10_000) if column in rows.features else ():
            for offset, value in enumerate(batch[column]):  # pyright: ignore[reportArgumentType, reportCallIssue]
                reason = path_problem(value, allowed, base) if value else None
                bad += [f"row {start + offset} ({value[:200]!r}) {reason}"] if reason else []
            start += len(batch[column])  # pyright: ignore[reportArgumentType, reportCallIssue]
        problems += _format_problem(split, column, bad, root)
    return problems


def _format_problem(split: str, column: str, bad: Sequence[str], root: Path | None) -> list[str]:
    if not bad:
        return []
    folder = f"'{root}'" if root else "the Hub cache"
    return [
        f"data.source: {split} column '{column}' has {len(bad)} invalid path(s): {shorten(bad, 5)}; allowed: paths "
        f"relative to the data folder ({folder}). Move the images there."
    ]


def _is_empty(rows: Dataset, column: str) -> bool:
    """Whether the first cells of a string column are empty, as in a test table without labels."""
    is_text = getattr(rows.features[column], "dtype", "") in ("string", "large_string")
    return is_text and not any(rows.select_columns([column])[:_SAMPLE_SIZE][column])


def _holds_paths(rows: Dataset, column: str) -> bool:
    """Whether all of the first cells of a column (any cell, if its name is usual) have image file extensions."""
    cells = [value for value in rows.select_columns([column])[:_SAMPLE_SIZE][column] if value]
    is_path = [value.partition("?")[0].lower().endswith(IMAGES) and len(value) < 1024 for value in cells]
    return bool(cells) and (all(is_path) or is_usual_name("image", column) and any(is_path))


def _has_texts(rows: Dataset, config: DataConfig, column: str) -> bool:
    """Whether other columns hold texts: the table may be a text dataset."""
    labels = {config.label_column, *ROLES["label"].usual_names}
    features = {name: kind for name, kind in rows.features.items() if name != column and name.lower() not in labels}
    try:
        find_text_columns(features, config.text_column, config.text_pair_column)  # pyright: ignore[reportArgumentType]
    except DataError:
        return False
    return True


def _cast_to_image(rows: Dataset, column: str, root: str) -> Dataset:
    from datasets import Features, Image
    from datasets.fingerprint import Hasher

    if column not in rows.features:
        return rows
    folder = os.path.realpath(root)

    def make_absolute(cells: list[str | None]) -> dict[str, list[Any]]:
        return {column: [{"path": os.path.join(folder, cell), "bytes": None} if cell else None for cell in cells]}

    return rows.map(
        make_absolute,
        batched=True,
        input_columns=column,
        features=Features({**rows.features, column: Image()}),
        new_fingerprint=Hasher.hash([rows._fingerprint, column, folder, "hftl paths 1"]),
        desc="paths",
    )


def _hub_caches() -> list[str]:
    """Returns the cache folders of `datasets` and huggingface_hub."""
    from datasets import config
    from huggingface_hub import constants

    return [os.path.realpath(path) for path in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _real_path(path: str) -> str:
    """Resolves links as `os.path.realpath`; caches the folder, shared by many files."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(folder), name)
