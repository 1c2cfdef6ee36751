"""Where images may lie: every path that comes from data stays in the folder of the data, and is never an address.

`datasets` opens whatever a cell names: `/etc/passwd`, `../../key.png`, `http://169.254.169.254/…`, `zip://a::b`. A cell
is written by whoever made the table, so here it is looked at first, before anything is opened. A link that stands in a
folder of images is another matter: the owner of the folder put it there, and folders of links into a common store are
usual, so these are followed; a link that a *cell* names is not.
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
_LOOKED_AT = 100
"""Cells whose endings decide whether a column of texts holds paths of images."""


def path_problem(value: str, root: str, start: str | None = None, follow: bool = False) -> str | None:
    """Returns why a path from data may not be opened; None where it stays under `root`.

    Args:
        value: As it stands in the data, relative or absolute.
        root: Folder of the data, without links in it (`os.path.realpath`).
        start: What relative paths are relative to; `root` by default.
        follow: Whether links under `root` may lead out of it.
    """
    if "\0" in value:
        return "has a NUL in it"
    if "://" in value or "::" in value or re.match("[A-Za-z][A-Za-z0-9+.-]+:", value):
        return "is an address, not a file of the data"
    if value.startswith("~"):
        return "begins with ~"
    joined = os.path.join(start or root, value)
    full = os.path.normpath(joined) if follow else _real(joined)
    inside = full == root or full.startswith(root.rstrip(os.sep) + os.sep)
    return None if inside else "leads out of the folder of the data"


def with_images(
    sets: Mapping[str, Dataset], config: DataConfig, root: Path | None, within: Path | None = None
) -> dict[str, Dataset]:
    """Returns the rows with columns of image paths as image columns, their paths absolute.

    A column of texts holds paths where `data.image_column` names it, or where its name or its place as the only text
    says so and its cells end like image files. Images that hold a path instead of their bytes are checked too.

    Args:
        sets: Rows by split.
        config: Names the image column, if anyone does.
        root: Folder that the paths are relative to and stay in; None where there is none, as on the hub.
        within: A larger folder to stay in.

    Raises:
        DataError: A path leaves `root`; names rows. In a table that is used for its texts, the column is left alone.
    """
    within = within or root
    out = dict(sets)
    for column in dict.fromkeys(name for rows in sets.values() for name in rows.features):
        having = [rows for rows in sets.values() if column in rows.features]
        first = next((rows for rows in having if not _is_empty(rows, column)), having[0])
        kind = first.features[column]
        given = column == config.image_column
        if type(kind).__name__ == "Image":
            _refuse(check_stored(out, column, within, follow=False))
        elif getattr(kind, "dtype", "") in ("string", "large_string") and (given or _holds_paths(first, column)):
            problems = _problems(out, column, root, within)
            if problems and not given and _has_texts(first, config, column):
                log(f"data: column '{column}' is not used: {problems[0].partition(': ')[2]}")
                continue
            _refuse(problems)
            out = {split: _cast(rows, column, str(root)) for split, rows in out.items()}
    return out


def check_stored(sets: Mapping[str, Dataset], column: str, root: Path | None, follow: bool) -> list[str]:
    """Returns a sentence for each split whose image column holds paths, in place of bytes, that leave `root`."""
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # whose functions are made at run time
    roots = [os.path.realpath(root)] if root else _caches()
    problems = []
    for split, rows in sets.items():
        if column not in rows.features:
            continue
        bad, start = [], 0
        for table in rows.select_columns([column]).with_format("arrow").iter(1000):
            images: Any = pa.table(table).column(0).combine_chunks()  # pyright: ignore[reportArgumentType]
            images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
            stored = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
            paths = pc.struct_field(images, "path").to_pylist()
            for offset, (path, has_bytes) in enumerate(zip(paths, stored, strict=True)):
                if path and not has_bytes:
                    found = [path_problem(path, each, follow=follow) for each in roots]
                    bad += [f"row {start + offset} ({path!r}) {found[0]}"] if all(found) else []
            start += len(images)
        problems += _sentence(split, column, bad, root)
    return problems


def _problems(sets: Mapping[str, Dataset], column: str, root: Path | None, within: Path | None) -> list[str]:
    if root is None or within is None:
        return [
            f"data.source: column '{column}' holds paths, and there is no folder that they could be relative to; "
            "use data with the images in them (an image feature)."
        ]
    start_at, stay_in = os.path.realpath(root), os.path.realpath(within)
    problems = []
    for split, rows in sets.items():
        bad, start = [], 0
        for batch in rows.select_columns([column]).iter(10_000) if column in rows.features else ():
            for offset, value in enumerate(batch[column]):  # pyright: ignore[reportArgumentType, reportCallIssue]
                why = path_problem(value, stay_in, start_at) if value else None
                bad += [f"row {start + offset} ({value[:200]!r}) {why}"] if why else []
            start += len(batch[column])  # pyright: ignore[reportArgumentType, reportCallIssue]
        problems += _sentence(split, column, bad, root)
    return problems


def _sentence(split: str, column: str, bad: Sequence[str], root: Path | None) -> list[str]:
    if not bad:
        return []
    where = f"'{root}'" if root else "the cache of the hub"
    return [
        f"data.source: {split} column '{column}' has {len(bad)} path(s) that may not be opened: {shorten(bad, 5)}. "
        f"Images of a table lie in its own folder ({where}), and cells name them relative to it."
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise DataError(*problems)


def _is_empty(rows: Dataset, column: str) -> bool:
    """Whether a column of texts has nothing in its first cells, as a test table may have no labels."""
    texts = getattr(rows.features[column], "dtype", "") in ("string", "large_string")
    return texts and not any(rows.select_columns([column])[:_LOOKED_AT][column])


def _holds_paths(rows: Dataset, column: str) -> bool:
    """Whether all of the first cells of a column end as image files do."""
    cells = [value for value in rows.select_columns([column])[:_LOOKED_AT][column] if value]
    endings = [value.partition("?")[0].lower().endswith(IMAGES) and len(value) < 1024 for value in cells]
    named = is_usual_name("image", column)
    return bool(cells) and (all(endings) or named and any(endings))


def _has_texts(rows: Dataset, config: DataConfig, column: str) -> bool:
    """Whether there are texts in other columns, so that the rows may be meant for these."""
    labels = {config.label_column, *ROLES["label"].usual_names}
    features = {name: kind for name, kind in rows.features.items() if name != column and name.lower() not in labels}
    try:
        find_text_columns(features, config.text_column, config.text_pair_column)  # pyright: ignore[reportArgumentType]
    except DataError:
        return False
    return True


def _cast(rows: Dataset, column: str, root: str) -> Dataset:
    from datasets import Features, Image
    from datasets.fingerprint import Hasher

    if column not in rows.features:
        return rows
    folder = os.path.realpath(root)

    def absolute(cells: list[str | None]) -> dict[str, list[Any]]:
        return {column: [{"path": os.path.join(folder, cell), "bytes": None} if cell else None for cell in cells]}

    return rows.map(
        absolute,
        batched=True,
        input_columns=column,
        features=Features({**rows.features, column: Image()}),
        new_fingerprint=Hasher.hash([rows._fingerprint, column, folder, "hftl paths 1"]),
        desc="paths",
    )


def _caches() -> list[str]:
    """Returns the folders where the hub's libraries keep what they have fetched."""
    from datasets import config
    from huggingface_hub import constants

    return [os.path.realpath(path) for path in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _real(path: str) -> str:
    """As `os.path.realpath`, with the folder looked up once for all of its files."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(folder), name)
