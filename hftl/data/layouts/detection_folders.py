"""Folders of images with boxes in COCO's JSON or Pascal VOC's XML -> rows with the columns `image` and `objects`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.layouts.coco_files import coco_files, image_folders, read_coco
from hftl.data.layouts.mask_folders import folders_of_masks
from hftl.data.layouts.voc_files import read_voc, voc_files
from hftl.data.paths import with_images
from hftl.errors import DataError, shorten
from hftl.logging import log

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

_READERS = "hftl boxes 2"
"""Part of the key in the cache; to be changed when a reader understands a file otherwise."""


def open_detection_folders(path: Path, config: DataConfig) -> Mapping[str, Dataset] | None:
    """Returns the rows of a folder laid out as COCO or VOC by split, or None where it is neither.

    COCO: a JSON for each split (`train.coco.json`, `train/_annotations.coco.json`,
    `annotations/instances_train2017.json`) and images beside it, in `images/`, `images/train/` or `train/`. VOC: an XML
    for each image in a folder for each split, or in one folder with the lists of `ImageSets/Main`; images beside them,
    in `JPEGImages/` or as above.

    Raises:
        DataError: A file is damaged, or the images are nowhere.
    """
    by_coco = coco_files(path)
    by_voc = voc_files(path)
    if not by_coco and not by_voc:
        return None
    if by_coco and by_voc:
        log(f"data: boxes from {', '.join(file.name for file in by_coco.values())}; the XML files are not used")
    if by_coco:
        files: Mapping[str, Sequence[Path]] = {split: [file] for split, file in by_coco.items()}
    else:
        files = by_voc
    masks = [os.path.relpath(folder, path) for folder in folders_of_masks(path)]
    if masks:
        log(
            f"data: boxes are read, masks in {shorten(masks)} are not used; for masks give a folder that has "
            "nothing but the folders of images and of masks"
        )
    # images are found when files are read: a folder of them that has changed since asks for another reading
    read_from = {split: [*each, *image_folders(path, each[0].parent, split)] for split, each in files.items()}
    key = [_READERS, {split: [_identity(place) for place in places] for split, places in read_from.items()}]
    rows = _written(key, list(files), lambda: read_coco(path, by_coco) if by_coco else read_voc(path, by_voc))
    return with_images(rows, config, path)


def _written(key: Any, splits: Sequence[str], read: Any) -> dict[str, Dataset]:
    """Returns the rows under `key`, read and written to the cache of `datasets` where they are not there yet."""
    from datasets import DatasetInfo

    from hftl.data.arrow_cache import Written, is_written

    makers = {split: Written([*key, split], split) for split in splits}
    if not all(is_written(maker) for maker in makers.values()):
        features, rows = read()
        for split, maker in makers.items():
            maker.info = DatasetInfo(features=features)
            maker.batches = lambda split=split: [_table(rows[split], features)]
    out = {}
    for split, maker in makers.items():
        try:
            out[split] = maker.rows()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (DataError, OSError)):
                cause = cause.__cause__
            raise cause or error from error
    return out


def _table(rows: list[dict[str, Any]], features: Features) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns
