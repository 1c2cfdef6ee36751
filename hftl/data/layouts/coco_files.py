"""COCO detection JSON (https://cocodataset.org/#format-data), as written by COCO, Roboflow and annotation tools."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.splits import parse_split_name, split_folders
from hftl.errors import DataError, first_line, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Features

_HEAD = re.compile(r'^\s*\{\s*"(info|licenses|images|annotations|categories|type)"\s*:')
"""Start of a COCO file: an object with a COCO key. JSON tables start with a list or a row."""
_KEYS = (re.compile(r'"images"\s*:'), re.compile(r'"annotations"\s*:'), re.compile(r'"(bbox|categories)"\s*:'))
"""Keys of a detection file; COCO caption files lack the last."""
_FOLDERS = ("annotations", "Annotations")
DRAWN_ON = "drawn_on"
"""Objects field with width and height of the annotated image; empty if not declared."""


def coco_files(path: Path) -> dict[str, Path]:
    """Returns the COCO file of each split in a folder; {} without COCO files.

    Raises:
        DataError: Several files match one split.
    """
    folders = [path, *(path / name for name in _FOLDERS if (path / name).is_dir()), *split_folders(path).values()]
    files = [file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("*.json")) if _is_coco(file)]
    instances = [file for file in files if file.name.startswith("instances")]
    if instances:  # caption and keypoint files list the same images
        files = instances
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z0-9]+", file.stem)
        in_split_folder = file.parent not in (path, *(path / name for name in _FOLDERS))
        names = [file.parent.name, *words] if in_split_folder else words
        split = next((split for name in names if (split := parse_split_name(name))), None)
        by_split.setdefault(split or "train", []).append(file)
    for split, matches in by_split.items():
        if len(matches) > 1:
            raise DataError(
                f"data.source: {shorten([str(file.relative_to(path)) for file in matches])} in '{path}' could each be "
                f"{split}. Keep one, and rename the others after their splits (train, val, test)."
            )
    return {split: matches[0] for split, matches in by_split.items()}


def read_coco(path: Path, files: Mapping[str, Path]) -> tuple[Features, dict[str, list[dict[str, Any]]]]:
    """Returns column types, and rows by split with `image` (path relative to `path`) and `objects`.

    Categories without boxes are dropped; the order is that of the training file. The category of a box is None if its
    id is not listed in the file.

    Raises:
        DataError: A file is not valid COCO, or its images are missing.
    """
    from datasets import ClassLabel, Features, List, Value

    contents = {split: _load(file) for split, file in files.items()}
    names = {split: _names(content, files[split]) for split, content in contents.items()}
    used = {
        names[split].get(_category_id(box.get("category_id")))
        for split, content in contents.items()
        for box in content.get("annotations", [])
    }
    order = sorted(files, key=lambda split: split != "train")
    listed = list(dict.fromkeys(name for split in order for name in names[split].values()))
    categories = [name for name in listed if name in used]
    if len(categories) < len(listed):
        log(f"data: dropped categories without boxes: {shorten([name for name in listed if name not in used])}")
    indices = {name: index for index, name in enumerate(categories)}
    rows = {split: list(_rows(path, files[split], split, contents[split], names[split], indices)) for split in files}
    objects = {"bbox": List(List(Value("float64"))), "category": List(ClassLabel(names=categories))}
    objects |= {"iscrowd": List(Value("bool")), DRAWN_ON: List(Value("int64"))}
    return Features({"image": Value("string"), "objects": objects}), rows


def _is_coco(file: Path) -> bool:
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        head = opened.read(400)
        if not _HEAD.match(head):
            return False
        text = head + opened.read()
    return all(key.search(text) for key in _KEYS)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source: '{file}' is not valid JSON: {first_line(error)}.") from error
    invalid = [name for name in ("images", "annotations", "categories") if not _is_list_of_objects(content.get(name))]
    if invalid:
        raise DataError(
            f"data.source: '{file}' is not a COCO detection file: {', '.join(invalid)} must be a list of objects."
        )
    return content


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _names(content: dict[str, Any], file: Path) -> dict[int | None, str]:
    """Returns category names by id, sorted by id."""
    listed = [(_category_id(item.get("id")), item.get("name")) for item in content["categories"]]
    pairs = sorted((number, str(name)) for number, name in listed if number is not None and name is not None)
    if len(pairs) < len(listed):
        raise DataError(f"data.source: '{file}': a category has no integer `id` or no `name`.")
    names = [name for _, name in pairs]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates or len(dict(pairs)) < len(pairs):
        duplicate = f"the name {shorten(duplicates)}" if duplicates else "an id"
        raise DataError(f"data.source: '{file}' has {duplicate} for more than one category.")
    return dict(pairs)


def _category_id(value: Any) -> int | None:
    """Returns an integer category id, also from a string, as some tools write; None if invalid."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def declared_size(width: Any, height: Any) -> list[int]:
    """Returns the declared [width, height] of an image; [] if missing, invalid or 0, as some tools write."""
    try:
        size = [round(float(value)) for value in (width, height)]
    except (TypeError, ValueError, OverflowError):
        return []
    return size if all(0 < value < 2**31 for value in size) else []


def _rows(
    path: Path,
    file: Path,
    split: str,
    content: dict[str, Any],
    names: Mapping[Any, str],
    indices: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    """Yields one row per image, in file order; `names` are categories by id, `indices` class indices by name."""
    objects: dict[Any, dict[str, list[Any]]] = {}
    for image in content["images"]:
        if not isinstance(image.get("file_name"), str) or not isinstance(image.get("id"), (int, str)):
            raise DataError(f"data.source: '{file}': an image has no `id` or no `file_name`: {str(image)[:120]}.")
        if image["id"] in objects:
            raise DataError(f"data.source: '{file}' has the image id {image['id']} more than once.")
        size = declared_size(image.get("width"), image.get("height"))
        objects[image["id"]] = {"bbox": [], "category": [], "iscrowd": [], DRAWN_ON: size}
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in objects:
            raise DataError(
                f"data.source: '{file}': annotation {annotation.get('id')} has image_id {annotation.get('image_id')}, "
                "which is not in the list of images."
            )
        fields = objects[annotation["image_id"]]
        fields["bbox"].append(_parse_box(annotation.get("bbox")))
        fields["category"].append(indices.get(names.get(_category_id(annotation.get("category_id")), "")))
        fields["iscrowd"].append(bool(annotation.get("iscrowd")))
    folder = find_image_folder(path, file.parent, split, [image["file_name"] for image in content["images"]])
    relative = os.path.relpath(folder, path)
    for image in content["images"]:
        yield {"image": os.path.join(relative, image["file_name"]), "objects": objects[image["id"]]}


def _parse_box(box: Any) -> list[float]:
    """Returns a box, or [] if it is not a list of numbers (reported later with other invalid boxes)."""
    is_valid = isinstance(box, list) and all(isinstance(value, (int, float)) for value in box)
    return [float(value) for value in box] if is_valid else []


def image_folders(path: Path, annotations: Path, split: str) -> list[Path]:
    """Returns existing folders that may contain the images of a split, in search order.

    Args:
        path: Data folder.
        annotations: Folder of the annotation file.
        split: Split name.
    """
    roots = [folder for name in ("images", "JPEGImages") if (folder := path / name).is_dir()]
    by_split = [folders[split] for folder in (*roots, path) if split in (folders := split_folders(folder))]
    by_split = [folder for root in by_split for folder in (root, root / "images") if folder.is_dir()]
    return list(dict.fromkeys([annotations, *by_split, *roots, path]))


def find_image_folder(path: Path, annotations: Path, split: str, names: list[str]) -> Path:
    """Returns the folder that image names are relative to.

    Args:
        path: Data folder.
        annotations: Folder of the annotation file.
        split: Split name.
        names: Image names; the folder must contain one of the first 20.

    Raises:
        DataError: No usual folder contains the images.
    """
    folders = image_folders(path, annotations, split)
    for folder in folders:
        if any((folder / name).is_file() for name in names[:20] if not os.path.isabs(name)):
            return folder
    if not names:
        return path
    searched = shorten([os.path.relpath(folder, path) for folder in folders], 8)
    raise DataError(
        f"data.source: the images of {split} ({shorten(names, 2)}) are in none of the folders {searched} of '{path}'. "
        "Move them there."
    )
