"""Detection folders: images with COCO JSON or Pascal VOC XML as rows with the columns `image` and `objects`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.layouts.coco_files import coco_files, image_folders, read_coco
from hftl.data.layouts.mask_folders import find_mask_folders
from hftl.data.layouts.voc_files import read_voc, voc_files
from hftl.data.paths import cast_path_columns
from hftl.errors import DataError, shorten
from hftl.logging import log

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

_READERS = "hftl boxes 2"
"""Reader version in the cache key; change it when a reader returns different rows."""


def open_detection_folders(path: Path, config: DataConfig) -> Mapping[str, Dataset] | None:
    """Returns the rows of a COCO or VOC folder by split, or None for other layouts.

    COCO: one JSON per split (`train.coco.json`, `train/_annotations.coco.json`,
    `annotations/instances_train2017.json`), with images in the same folder, `images/`, `images/train/` or `train/`.
    VOC: one XML per image, in one folder per split or in one folder with the lists of `ImageSets/Main`; images in the
    same folder, `JPEGImages/` or as above.

    Raises:
        DataError: A file is damaged, or the images are missing.
    """
    by_coco = coco_files(path)
    by_voc = voc_files(path)
    if not by_coco and not by_voc:
        return None
    if by_coco and by_voc:
        log(f"data: boxes from {', '.join(file.name for file in by_coco.values())}; XML files are ignored")
    if by_coco:
        files: Mapping[str, Sequence[Path]] = {split: [file] for split, file in by_coco.items()}
    else:
        files = by_voc
    masks = [os.path.relpath(folder, path) for folder in find_mask_folders(path)]
    if masks:
        log(
            f"data: boxes are used, masks in {shorten(masks)} are ignored; for segmentation, pass a folder with "
            "image and mask folders only"
        )
    # readers search for the images: changed image folders need another read
    sources = {split: [*paths, *image_folders(path, paths[0].parent, split)] for split, paths in files.items()}
    key = [_READERS, {split: [_file_identity(file) for file in paths] for split, paths in sources.items()}]
    rows = _read_cached(key, list(files), lambda: read_coco(path, by_coco) if by_coco else read_voc(path, by_voc))
    return cast_path_columns(rows, config, path)


def _read_cached(key: Any, splits: Sequence[str], read: Any) -> dict[str, Dataset]:
    """Returns the cached rows of `key`; calls `read` and writes the cache on a miss."""
    from datasets import DatasetInfo

    from hftl.data.arrow_cache import CachedRows, is_cached

    builders = {split: CachedRows([*key, split], split) for split in splits}
    if not all(is_cached(builder) for builder in builders.values()):
        features, rows = read()
        for split, builder in builders.items():
            builder.info = DatasetInfo(features=features)
            builder.batches = lambda split=split: [_table(rows[split], features)]
    out = {}
    for split, builder in builders.items():
        try:
            out[split] = builder.rows()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (DataError, OSError)):
                cause = cause.__cause__
            raise cause or error from error
    return out


def _table(rows: list[dict[str, Any]], features: Features) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def _file_identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns
