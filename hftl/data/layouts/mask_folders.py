"""Segmentation folders: image and mask folders as rows with the columns `image` and `mask`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hftl.data.paths import IMAGES
from hftl.data.splits import split_folders
from hftl.errors import DataError, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_MASKS = ("masks", "mask", "annotations", "annotation", "annot", "labels", "segmentation", "segmentationclass")
_SUFFIX = re.compile(r"[_-](masks?|seg|labels?|l|gt|annot)$", re.IGNORECASE)
"""Suffix of mask names that image names lack."""


def open_mask_folders(path: Path) -> Mapping[str, Dataset] | None:
    """Returns images and masks by split, or None for other layouts.

    Layouts: `SPLIT/` and `SPLITannot/` (or `SPLIT_masks/`, …); `images/` and `masks/` inside or around the split
    folders, or without splits. A mask has the name of its image, except for the extension and an optional suffix.

    Raises:
        DataError: No mask has the name of an image, or several files match one image or its mask.
    """
    pairs = _folder_pairs(path)
    complete = {split: (pair.images, pair.masks) for split, pair in pairs.items() if pair.images and pair.masks}
    for split, pair in pairs.items():
        if complete and split not in complete:
            log(f"data: split '{pair.name}' has no {'masks' if pair.images else 'images'} and is ignored")
    return {split: _rows(*folders) for split, folders in complete.items()} or None


def find_mask_folders(path: Path) -> list[Path]:
    """Returns the mask folders that `open_mask_folders` would use."""
    return [pair.masks for pair in _folder_pairs(path).values() if pair.images and pair.masks]


class _FolderPair(NamedTuple):
    """Image and mask folder of a split, both non-empty; `name` is the folder name of the split."""

    name: str
    images: Path | None
    masks: Path | None


def _folder_pairs(path: Path) -> dict[str, _FolderPair]:
    root = _find_pair(path)
    if root.images and root.masks:  # images/train and masks/train, or images and masks without splits
        images = split_folders(root.images)
        masks = {split: folder for split, folder in split_folders(root.masks).items() if _has_images(folder)}
        if images.keys() & masks.keys():
            names = {split: folder.name for split, folder in (masks | images).items()}
            return {split: _FolderPair(name, images.get(split), masks.get(split)) for split, name in names.items()}
        return {"train": root}
    folders = split_folders(path)
    pairs = {split: _find_pair(folder) for split, folder in folders.items()}
    if any(pair.images and pair.masks for pair in pairs.values()):
        return pairs
    out: dict[str, _FolderPair] = {}
    for split, folder in folders.items():
        names = [f"{folder.name.lower()}{separator}{word}" for word in _MASKS for separator in ("", "_", "-")]
        out[split] = _FolderPair(folder.name, folder, _first_with_images(path, names))
    return out


def _find_pair(folder: Path) -> _FolderPair:
    return _FolderPair(folder.name, _first_with_images(folder, _IMAGES), _first_with_images(folder, _MASKS))


def _first_with_images(folder: Path, names: Sequence[str]) -> Path | None:
    """Returns the first existing folder with images; `annotations` may contain XML only."""
    by_name = {entry.name.lower(): folder / entry.name for entry in os.scandir(folder) if entry.is_dir()}
    return next((by_name[name] for name in names if name in by_name and _has_images(by_name[name])), None)


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, folder.rglob("*")))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES and not file.name.startswith(".")


def _files(folder: Path) -> dict[str, Path]:
    """Returns the images in a folder tree by relative path without extension."""
    by_name: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if _is_image(file):
            by_name.setdefault(str(file.relative_to(folder).with_suffix("")), []).append(file)
    return _require_unique(by_name, folder)


def _require_unique(files: Mapping[str, list[Path]], folder: Path) -> dict[str, Path]:
    """Returns the single file of each name; raises DataError for several files."""
    duplicates = [
        " and ".join(str(file.relative_to(folder)) for file in matches)
        for matches in files.values()
        if len(matches) > 1
    ]
    if duplicates:
        raise DataError(
            f"data.source: '{folder}' has several files for one image: {shorten(duplicates, 3)}. Images and masks are "
            "matched by name without extension. Keep one file per name."
        )
    return {name: file for name, (file,) in files.items()}


def _rows(images: Path, masks: Path) -> Dataset:
    from datasets import Dataset, Features, Image
    from datasets.fingerprint import Hasher

    image_files, mask_files = _files(images), _files(masks)
    by_name: dict[str, list[Path]] = {}
    for name, file in mask_files.items():
        by_name.setdefault(name if name in image_files else _SUFFIX.sub("", name), []).append(file)
    unmatched = [file.name for name, files in by_name.items() if name not in image_files for file in files]
    if image_files and len(unmatched) == len(mask_files):
        raise DataError(
            f"data.source: no mask in '{masks}' has the name of an image in '{images}' (images: "
            f"{shorten(list(image_files), 3)}; masks: {shorten(list(mask_files), 3)}). Rename the masks, or pass a "
            "table with the columns image and mask."
        )
    if unmatched:
        log(f"data: {len(unmatched)} mask(s) without an image in {masks} are ignored: {shorten(unmatched, 3)}")
    matched = _require_unique({name: files for name, files in by_name.items() if name in image_files}, masks)
    table = {
        "image": [str(file.resolve()) for file in image_files.values()],
        "mask": [str(matched[name].resolve()) if name in matched else None for name in image_files],
    }
    rows = Dataset.from_dict(table, features=Features({"image": Image(), "mask": Image()}))
    rows._fingerprint = Hasher.hash(table)  # stable for the same files, also in resumed runs
    return rows
