"""Pascal VOC detection XML (http://host.robots.ox.ac.uk/pascal/VOC/), one file per image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hftl.data.layouts.coco_files import DRAWN_ON, declared_size, find_image_folder
from hftl.data.paths import IMAGES
from hftl.data.splits import SPLIT_NAMES, parse_split_name, split_folders
from hftl.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Features

_FOLDERS = ("Annotations", "annotations", "voc", "xml")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_files(path: Path) -> dict[str, list[Path]]:
    """Returns the XML files of each split in a folder; {} without XML files."""
    for root in (path, *(path / name for name in _FOLDERS)):
        if not root.is_dir():
            continue
        by_split = {split: sorted(folder.glob("*.xml")) for split, folder in split_folders(root).items()}
        by_split = {split: files for split, files in by_split.items() if files}
        if by_split:
            return by_split
        files = sorted(root.glob("*.xml"))
        if files:
            return _assign_splits(path, files)
    return {}


def _assign_splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Returns the files by the split lists in `ImageSets/Main`; all are training files without lists."""
    by_name = {file.stem: file for file in files}
    lists = path / "ImageSets" / "Main"
    out: dict[str, list[Path]] = {}
    for split_list in sorted(lists.glob("*.txt")) if lists.is_dir() else ():
        split = parse_split_name(split_list.stem)
        if split and split_list.stem in SPLIT_NAMES[split]:  # excludes trainval.txt and cat_train.txt
            names = split_list.read_text(encoding="utf-8").split()
            missing = [name for name in names if name not in by_name]
            if missing:
                raise DataError(
                    f"data.source: '{split_list}' lists {missing[0]}, but {missing[0]}.xml does not exist. Remove the "
                    "line, or add the file."
                )
            if names:
                out[split] = [by_name[name] for name in names]
    return out or {"train": list(files)}


def read_voc(path: Path, files: Mapping[str, Sequence[Path]]) -> tuple[Features, dict[str, list[dict[str, Any]]]]:
    """Returns column types, and rows by split with `image` (path relative to `path`) and `objects`.

    As in torchvision, corners are used without an offset: x and y are the upper left corner, width and height the
    differences of the corners. Objects marked `difficult` or `truncated` are used as well.

    Raises:
        DataError: A file is damaged or not VOC, or its image is missing.
    """
    from datasets import Features, List, Value

    objects = {
        "bbox": List(List(Value("float64"))),
        "category": List(Value("string")),
        DRAWN_ON: List(Value("int64")),
    }
    rows = {split: _rows(path, split, split_files) for split, split_files in files.items()}
    return Features({"image": Value("string"), "objects": objects}), rows


def _rows(path: Path, split: str, files: Sequence[Path]) -> list[dict[str, Any]]:
    parsed = [_parse(file) for file in files]
    names = [name for name, _ in parsed][:5] + [file.stem + extension for file in files[:1] for extension in IMAGES]
    folder = find_image_folder(path, files[0].parent, split, names)
    relative = os.path.relpath(folder, path)
    return [
        {"image": os.path.join(relative, _image_name(folder, name, file)), "objects": objects}
        for file, (name, objects) in zip(files, parsed, strict=True)
    ]


def _image_name(folder: Path, name: str, file: Path) -> str:
    """Returns `name` if the image exists, else the image with the name of the XML file (some tools rename images)."""
    if not (folder / name).is_file():
        candidates = (file.stem + extension for extension in IMAGES)
        return next((candidate for candidate in candidates if (folder / candidate).is_file()), name)
    return name


def _parse(file: Path) -> tuple[str, dict[str, list[Any]]]:
    """Returns image name and objects."""
    content = file.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise DataError(
            f"data.source: '{file}' declares a document type, which VOC files lack. Remove the declaration."
        )
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"data.source: '{file}' is not valid XML: {first_line(error)}.") from error
    boxes, categories = [], []
    for item in root.iter("object"):
        name, corners = item.findtext("name"), item.find("bndbox")
        if not name or corners is None:
            raise DataError(f"data.source: '{file}': an object has no name or no bndbox.")
        x0, y0, x1, y1 = (_coordinate(corners.findtext(corner)) for corner in _CORNERS)
        boxes.append([x0, y0, x1 - x0, y1 - y0])
        categories.append(name.strip())
    size = declared_size(root.findtext("size/width"), root.findtext("size/height"))
    objects = {"bbox": boxes, "category": categories, DRAWN_ON: size}
    return (root.findtext("filename") or file.stem).strip(), objects


def _coordinate(text: str | None) -> float:
    """Returns a coordinate, or NaN if it is not a number (reported later with other invalid boxes)."""
    try:
        return float(text or "")
    except ValueError:
        return float("nan")
