"""COCO's JSON of boxes (https://cocodataset.org/#format-data), as COCO, Roboflow and most annotation tools write it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.splits import split_folders, split_of
from hftl.errors import DataError, first_line, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Features

_HEAD = re.compile(r'^\s*\{\s*"(info|licenses|images|annotations|categories|type)"\s*:')
"""How the file begins: one object, with a key that COCO has. Tables begin with a list, or with a row."""
_KEYS = (re.compile(r'"images"\s*:'), re.compile(r'"annotations"\s*:'), re.compile(r'"(bbox|categories)"\s*:'))
"""What a file of boxes has somewhere; COCO's captions lack the last."""
_FOLDERS = ("annotations", "Annotations")
DRAWN_ON = "drawn_on"
"""Field of objects with width and height of the image that they were drawn on, empty where the file does not say."""


def coco_files(path: Path) -> dict[str, Path]:
    """Returns the COCO file of each split in a folder, none where it has none.

    Raises:
        DataError: Several files could be one split.
    """
    folders = [path, *(path / name for name in _FOLDERS if (path / name).is_dir()), *split_folders(path).values()]
    files = [file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("*.json")) if _is_coco(file)]
    instances = [file for file in files if file.name.startswith("instances")]
    if instances:  # beside COCO's captions and key points, which list the same images
        files = instances
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z0-9]+", file.stem)
        named = [split for word in words if (split := split_of(word))]
        within = [split_of(file.parent.name)] if file.parent not in (path, *(path / name for name in _FOLDERS)) else []
        split = next((split for split in [*within, *named] if split), None)
        found.setdefault(split or "train", []).append(file)
    for split, several in found.items():
        if len(several) > 1:
            raise DataError(
                f"data.source: {shorten([str(file.relative_to(path)) for file in several])} in '{path}' could each be "
                f"{split}; keep one, and name the others after their splits (train, val, test)."
            )
    return {split: several[0] for split, several in found.items()}


def read_coco(path: Path, files: Mapping[str, Path]) -> tuple[Features, dict[str, list[dict[str, Any]]]]:
    """Returns the types of columns, and the rows of each split: `image` (path from `path`) and `objects`.

    Categories are those that any box has, in the order of the training file; a box of one that its file does not list
    has none.

    Raises:
        DataError: A file is not what COCO says, or its images are nowhere.
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
    kept = [name for name in listed if name in used]
    if len(kept) < len(listed):
        log(f"data: categories without a box are left out: {shorten([name for name in listed if name not in used])}")
    numbers = {name: number for number, name in enumerate(kept)}
    rows = {split: list(_rows(path, files[split], split, contents[split], names[split], numbers)) for split in files}
    objects = {"bbox": List(List(Value("float64"))), "category": List(ClassLabel(names=kept))}
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
    lists = [name for name in ("images", "annotations", "categories") if not _is_records(content.get(name))]
    if lists:
        raise DataError(
            f"data.source: '{file}' is no COCO file of boxes: {', '.join(lists)} must be a list of objects."
        )
    return content


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _names(content: dict[str, Any], file: Path) -> dict[int | None, str]:
    """Returns the name of each category id, in the order of the ids."""
    found = [(_category_id(item.get("id")), item.get("name")) for item in content["categories"]]
    pairs = sorted((number, str(name)) for number, name in found if number is not None and name is not None)
    if len(pairs) < len(found):
        raise DataError(f"data.source: '{file}': a category has no number `id` or no `name`.")
    twice = sorted({name for _, name in pairs if [other for _, other in pairs].count(name) > 1})
    if twice or len(dict(pairs)) < len(pairs):
        what = f"the name {shorten(twice)}" if twice else "an id"
        raise DataError(f"data.source: '{file}' has {what} for more than one category.")
    return dict(pairs)


def _category_id(value: Any) -> int | None:
    """Returns a category's number, which some tools write as text."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def declared_size(width: Any, height: Any) -> list[int]:
    """Returns the width and height that a file gives an image; none where it gives none, or 0 as some tools do."""
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
    numbers: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    """Yields a row for each image, in the order of the file."""
    boxes: dict[Any, dict[str, list[Any]]] = {}
    for image in content["images"]:
        if not isinstance(image.get("file_name"), str) or not isinstance(image.get("id"), (int, str)):
            raise DataError(f"data.source: '{file}': an image has no `id` or no `file_name`: {str(image)[:120]}.")
        if image["id"] in boxes:
            raise DataError(f"data.source: '{file}' has the image id {image['id']} more than once.")
        size = declared_size(image.get("width"), image.get("height"))
        boxes[image["id"]] = {"bbox": [], "category": [], "iscrowd": [], DRAWN_ON: size}
    for box in content["annotations"]:
        if box.get("image_id") not in boxes:
            raise DataError(
                f"data.source: '{file}': annotation {box.get('id')} is of image {box.get('image_id')}, which the file "
                "does not list."
            )
        of_image = boxes[box["image_id"]]
        of_image["bbox"].append(_numbers(box.get("bbox")))
        of_image["category"].append(numbers.get(names.get(_category_id(box.get("category_id")), "")))
        of_image["iscrowd"].append(bool(box.get("iscrowd")))
    folder = folder_of_images(path, file.parent, split, [image["file_name"] for image in content["images"]])
    place = os.path.relpath(folder, path)
    for image in content["images"]:
        yield {"image": os.path.join(place, image["file_name"]), "objects": boxes[image["id"]]}


def _numbers(box: Any) -> list[float]:
    """Returns a box as it stands; what is no list of numbers is a box of none, which is judged with the others."""
    fine = isinstance(box, list) and all(isinstance(value, (int, float)) for value in box)
    return [float(value) for value in box] if fine else []


def image_folders(path: Path, beside: Path, split: str) -> list[Path]:
    """Returns the folders that may hold the images of a split, in the order in which they are looked into."""
    inside = [folder for name in ("images", "JPEGImages") if (folder := path / name).is_dir()]
    of_split = [folders[split] for folder in (*inside, path) if split in (folders := split_folders(folder))]
    of_split = [folder for each in of_split for folder in (each, each / "images") if folder.is_dir()]
    return list(dict.fromkeys([beside, *of_split, *inside, path]))


def folder_of_images(path: Path, beside: Path, split: str, names: list[str]) -> Path:
    """Returns the folder that the images of a split are named from.

    Args:
        path: Folder of the data.
        beside: Folder of the file that names them.
        split: The split.
        names: Its images. One of the first ones has to be there.

    Raises:
        DataError: None is in any of the usual folders.
    """
    looked = image_folders(path, beside, split)
    for folder in looked:
        if any((folder / name).is_file() for name in names[:20] if not os.path.isabs(name)):
            return folder
    if not names:
        return path
    places = shorten([os.path.relpath(folder, path) for folder in looked], 8)
    raise DataError(
        f"data.source: the images of {split} ({shorten(names, 2)}) are in none of the folders {places} of '{path}'."
    )
