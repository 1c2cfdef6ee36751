"""Folders of images with folders of masks beside them -> rows with the columns `image` and `mask`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.console import say
from hftl.data.paths import IMAGES
from hftl.data.split_names import split_folders
from hftl.errors import DataError, shorten

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_MASKS = ("masks", "mask", "annotations", "annotation", "annot", "labels", "segmentation", "segmentationclass")
_ENDING = re.compile(r"[_-](masks?|seg|labels?|l|gt|annot)$", re.IGNORECASE)
"""What the name of a mask may have that the name of its image has not."""


def open_mask_folders(path: Path) -> Mapping[str, Dataset] | None:
    """Returns the images and masks of a folder by split, or None where it is laid out otherwise.

    Layouts: `SPLIT/` and `SPLITannot/` (or `SPLIT_masks/`, …); `images/` and `masks/` in each split's folder, or around
    the folders of the splits, or without splits. A mask has the name of its image, but for the ending.

    Raises:
        DataError: There are folders of both, and no mask is named as an image is.
    """
    found = {split: pair for split, pair in _pairs_of_folders(path).items() if pair and _has_images(pair[1])}
    return {split: _rows(*pair) for split, pair in found.items()} or None


def _pairs_of_folders(path: Path) -> dict[str, tuple[Path, Path] | None]:
    """Returns the folder of images and that of masks for each split."""
    inside = _pair(path)
    if inside:  # images/train and masks/train, or images and masks alone
        images, masks = (split_folders(folder) for folder in inside)
        common = [split for split in images if split in masks]
        return {split: (images[split], masks[split]) for split in common} or {"train": inside}
    folders = split_folders(path)
    within: dict[str, tuple[Path, Path] | None] = {split: _pair(folder) for split, folder in folders.items()}
    if any(within.values()):
        return within
    by_name = {sub.name.lower(): sub for sub in path.iterdir() if sub.is_dir()}
    out: dict[str, tuple[Path, Path] | None] = {}
    for split, folder in folders.items():
        names = [f"{folder.name.lower()}{between}{word}" for word in _MASKS for between in ("", "_", "-")]
        masks = next((by_name[name] for name in names if name in by_name), None)
        out[split] = (folder, masks) if masks else None
    return out


def _pair(folder: Path) -> tuple[Path, Path] | None:
    by_name = {sub.name.lower(): sub for sub in folder.iterdir() if sub.is_dir()}
    images = next((by_name[name] for name in _IMAGES if name in by_name), None)
    masks = next((by_name[name] for name in _MASKS if name in by_name), None)
    return (images, masks) if images and masks else None


def _files(folder: Path) -> dict[str, Path]:
    """Returns the images below a folder by their place in it, without the ending."""
    return {
        str(file.relative_to(folder).with_suffix("")): file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES and not file.name.startswith(".")
    }


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGES for file in folder.rglob("*"))


def _rows(images: Path, masks: Path) -> Dataset:
    from datasets import Dataset, Features, Image
    from datasets.fingerprint import Hasher

    of_images, of_masks = _files(images), _files(masks)
    named = {name if name in of_images else _ENDING.sub("", name): file for name, file in of_masks.items()}
    strays = [named[name].name for name in named if name not in of_images]
    if of_images and len(strays) == len(named):
        raise DataError(
            f"data.source: no mask in {masks} is named as an image in {images} (images: {shorten(list(of_images), 3)}; "
            f"masks: {shorten(list(of_masks), 3)}). Give both the same name, or a table with columns image and mask."
        )
    if strays:
        say(f"data: {len(strays)} mask(s) without an image in {masks} are not used: {shorten(strays, 3)}")
    table = {
        "image": [str(file.resolve()) for file in of_images.values()],
        "mask": [str(named[name].resolve()) if name in named else None for name in of_images],
    }
    rows = Dataset.from_dict(table, features=Features({"image": Image(), "mask": Image()}))
    rows._fingerprint = Hasher.hash(table)  # the same for the same files, in a resumed run too
    return rows
