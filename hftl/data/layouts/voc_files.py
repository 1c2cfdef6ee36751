"""Pascal VOC's XML of boxes (http://host.robots.ox.ac.uk/pascal/VOC/), one file for each image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hftl.data.layouts.coco_files import DRAWN_ON, declared_size, folder_of_images
from hftl.data.paths import IMAGES
from hftl.data.splits import SPLIT_NAMES, split_folders, split_of
from hftl.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Features

_FOLDERS = ("Annotations", "annotations", "voc", "xml")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_files(path: Path) -> dict[str, list[Path]]:
    """Returns the XML files of each split in a folder, none where it has none."""
    for root in (path, *(path / name for name in _FOLDERS)):
        if not root.is_dir():
            continue
        within = {split: sorted(folder.glob("*.xml")) for split, folder in split_folders(root).items()}
        within = {split: files for split, files in within.items() if files}
        if within:
            return within
        alone = sorted(root.glob("*.xml"))
        if alone:
            return _by_lists(path, alone)
    return {}


def _by_lists(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Returns the files by the lists of names in `ImageSets/Main`; all are for training where there are none."""
    by_name = {file.stem: file for file in files}
    lists = path / "ImageSets" / "Main"
    out: dict[str, list[Path]] = {}
    for listed in sorted(lists.glob("*.txt")) if lists.is_dir() else ():
        split = split_of(listed.stem)
        if split and listed.stem in SPLIT_NAMES[split]:  # not trainval.txt, nor cat_train.txt
            names = listed.read_text(encoding="utf-8").split()
            missing = [name for name in names if name not in by_name]
            if missing:
                raise DataError(f"data.source: '{listed}' names {missing[0]}, and there is no {missing[0]}.xml.")
            if names:
                out[split] = [by_name[name] for name in names]
    return out or {"train": list(files)}


def read_voc(path: Path, files: Mapping[str, Sequence[Path]]) -> tuple[Features, dict[str, list[dict[str, Any]]]]:
    """Returns the types of columns, and the rows of each split: `image` (path from `path`) and `objects`.

    Corners are taken as they stand, as torchvision and most tools do: x and y are the upper left one, width and height
    the differences. Objects marked `difficult` or `truncated` are objects like others.

    Raises:
        DataError: A file is damaged or no VOC, or its image is nowhere.
    """
    from datasets import Features, List, Value

    objects = {
        "bbox": List(List(Value("float64"))),
        "category": List(Value("string")),
        DRAWN_ON: List(Value("int64")),
    }
    rows = {split: _rows(path, split, of_split) for split, of_split in files.items()}
    return Features({"image": Value("string"), "objects": objects}), rows


def _rows(path: Path, split: str, files: Sequence[Path]) -> list[dict[str, Any]]:
    described = [_parse(file) for file in files]
    names = [name for name, _ in described][:5] + [file.stem + end for file in files[:1] for end in IMAGES]
    folder = folder_of_images(path, files[0].parent, split, names)
    place = os.path.relpath(folder, path)
    return [
        {"image": os.path.join(place, _existing(folder, name, file)), "objects": objects}
        for file, (name, objects) in zip(files, described, strict=True)
    ]


def _existing(folder: Path, name: str, file: Path) -> str:
    """Returns the image's name; where that is not there, as tools rename images, the one that is called as the XML."""
    if not (folder / name).is_file():
        return next((file.stem + end for end in IMAGES if (folder / (file.stem + end)).is_file()), name)
    return name


def _parse(file: Path) -> tuple[str, dict[str, list[Any]]]:
    """Returns the name of the image, and its objects."""
    content = file.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise DataError(f"data.source: '{file}' declares a document type, which VOC has not; it is not opened.")
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"data.source: '{file}' is not valid XML: {first_line(error)}.") from error
    boxes, categories = [], []
    for item in root.iter("object"):
        name, corners = item.findtext("name"), item.find("bndbox")
        if not name or corners is None:
            raise DataError(f"data.source: '{file}': an object has no name or no bndbox.")
        x0, y0, x1, y1 = (_number(corners.findtext(corner)) for corner in _CORNERS)
        boxes.append([x0, y0, x1 - x0, y1 - y0])
        categories.append(name.strip())
    size = declared_size(root.findtext("size/width"), root.findtext("size/height"))
    objects = {"bbox": boxes, "category": categories, DRAWN_ON: size}
    return (root.findtext("filename") or file.stem).strip(), objects


def _number(text: str | None) -> float:
    """Returns a coordinate; what is none is NaN, which is judged with the boxes."""
    try:
        return float(text or "")
    except ValueError:
        return float("nan")
