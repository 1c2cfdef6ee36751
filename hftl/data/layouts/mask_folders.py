"""Folders of images with folders of masks beside them -> rows with the columns `image` and `mask`."""

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
_ENDING = re.compile(r"[_-](masks?|seg|labels?|l|gt|annot)$", re.IGNORECASE)
"""What the name of a mask may have that the name of its image has not."""


def open_mask_folders(path: Path) -> Mapping[str, Dataset] | None:
    """Returns the images and masks of a folder by split, or None where it is laid out otherwise.

    Layouts: `SPLIT/` and `SPLITannot/` (or `SPLIT_masks/`, …); `images/` and `masks/` in each split's folder, or around
    the folders of the splits, or without splits. A mask has the name of its image, but for the ending.

    Raises:
        DataError: There are folders of both, and no mask is named as an image is, or several files are one image or
            the mask of one.
    """
    pairs = _pairs_of_folders(path)
    found = {split: (pair.images, pair.masks) for split, pair in pairs.items() if pair.images and pair.masks}
    for split, pair in pairs.items():
        if found and split not in found:
            log(f"data: split '{pair.name}' has no {'masks' if pair.images else 'images'} and is not used")
    return {split: _rows(*pair) for split, pair in found.items()} or None


def folders_of_masks(path: Path) -> list[Path]:
    """Returns the folders whose masks `open_mask_folders` would use."""
    return [pair.masks for pair in _pairs_of_folders(path).values() if pair.images and pair.masks]


class _Pair(NamedTuple):
    """What a folder calls a split, and its folders of images and of masks; neither is empty."""

    name: str
    images: Path | None
    masks: Path | None


def _pairs_of_folders(path: Path) -> dict[str, _Pair]:
    whole = _pair(path)
    if whole.images and whole.masks:  # images/train and masks/train, or images and masks alone
        images = split_folders(whole.images)
        masks = {split: folder for split, folder in split_folders(whole.masks).items() if _has_images(folder)}
        if images.keys() & masks.keys():
            names = {split: folder.name for split, folder in (masks | images).items()}
            return {split: _Pair(name, images.get(split), masks.get(split)) for split, name in names.items()}
        return {"train": whole}
    folders = split_folders(path)
    within = {split: _pair(folder) for split, folder in folders.items()}
    if any(pair.images and pair.masks for pair in within.values()):
        return within
    out: dict[str, _Pair] = {}
    for split, folder in folders.items():
        names = [f"{folder.name.lower()}{between}{word}" for word in _MASKS for between in ("", "_", "-")]
        out[split] = _Pair(folder.name, folder, _first_with_images(path, names))
    return out


def _pair(folder: Path) -> _Pair:
    return _Pair(folder.name, _first_with_images(folder, _IMAGES), _first_with_images(folder, _MASKS))


def _first_with_images(folder: Path, names: Sequence[str]) -> Path | None:
    """Returns the first folder of these names that holds images: `annotations` may be of XML."""
    by_name = {entry.name.lower(): folder / entry.name for entry in os.scandir(folder) if entry.is_dir()}
    return next((by_name[name] for name in names if name in by_name and _has_images(by_name[name])), None)


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, folder.rglob("*")))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES and not file.name.startswith(".")


def _files(folder: Path) -> dict[str, Path]:
    """Returns the images below a folder by their place in it, without the ending."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if _is_image(file):
            found.setdefault(str(file.relative_to(folder).with_suffix("")), []).append(file)
    return _the_only(found, folder)


def _the_only(files: Mapping[str, list[Path]], folder: Path) -> dict[str, Path]:
    """Returns the file of each name, which has to be one."""
    several = [" and ".join(str(file.relative_to(folder)) for file in each) for each in files.values() if len(each) > 1]
    if several:
        raise DataError(
            f"data.source: in {folder} several files stand for one picture: {shorten(several, 3)}. Images and masks "
            "meet by their names without the ending: keep one file of each name."
        )
    return {name: file for name, (file,) in files.items()}


def _rows(images: Path, masks: Path) -> Dataset:
    from datasets import Dataset, Features, Image
    from datasets.fingerprint import Hasher

    of_images, of_masks = _files(images), _files(masks)
    named: dict[str, list[Path]] = {}
    for name, file in of_masks.items():
        named.setdefault(name if name in of_images else _ENDING.sub("", name), []).append(file)
    strays = [file.name for name, files in named.items() if name not in of_images for file in files]
    if of_images and len(strays) == len(of_masks):
        raise DataError(
            f"data.source: no mask in {masks} is named as an image in {images} (images: {shorten(list(of_images), 3)}; "
            f"masks: {shorten(list(of_masks), 3)}). Give both the same name, or a table with columns image and mask."
        )
    if strays:
        log(f"data: {len(strays)} mask(s) without an image in {masks} are not used: {shorten(strays, 3)}")
    paired = _the_only({name: files for name, files in named.items() if name in of_images}, masks)
    table = {
        "image": [str(file.resolve()) for file in of_images.values()],
        "mask": [str(paired[name].resolve()) if name in paired else None for name in of_images],
    }
    rows = Dataset.from_dict(table, features=Features({"image": Image(), "mask": Image()}))
    rows._fingerprint = Hasher.hash(table)  # the same for the same files, in a resumed run too
    return rows
