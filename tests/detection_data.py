"""Small images of colored squares with boxes, in COCO and VOC format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SIZE = [64, 64]
COLORS = {"blue": (20, 20, 230), "red": (230, 20, 20)}
COUNTS = {"train": 6, "val": 3, "test": 3}


def make_scenes(split: str):
    """Yields name, pixels [48, 64, 3] and objects (class, x, y, width, height) per image; the second has no objects."""
    rng = np.random.default_rng(list(COUNTS).index(split))
    for number in range(COUNTS[split]):
        pixels = rng.integers(100, 140, (48, 64, 3), dtype=np.uint8)
        objects = []
        for name, color in COLORS.items() if number != 1 else ():
            x, y = (int(value) for value in rng.integers(0, 28, 2))
            width, height = (int(value) for value in rng.integers(10, 20, 2))
            pixels[y : y + height, x : x + width] = color
            objects.append((name, x, y, width, height))
        yield f"{split}{number}.png", pixels, objects


def save_images(folder: Path, split: str) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels, _ in make_scenes(split):
        Image.fromarray(pixels).save(folder / name)


def coco(split: str) -> dict:
    """Returns a COCO file with arbitrary first ids and a category without boxes, as Roboflow writes it."""
    ids = {"squares": 0, "red": 7, "blue": 3}
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for name, i in ids.items()]}
    for number, (name, pixels, objects) in enumerate(make_scenes(split)):
        height, width = pixels.shape[:2]
        content["images"].append({"id": 40 + number, "file_name": name, "width": width, "height": height})
        for category, *box in objects:
            annotation = {"id": len(content["annotations"]), "image_id": 40 + number, "category_id": ids[category]}
            content["annotations"].append(annotation | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return content


def make_coco(folder: Path, json_name: str = "{split}.coco.json", image_folder: str = "images/{split}") -> Path:
    """Writes all splits in COCO format and returns the folder."""
    for split in COUNTS:
        save_images(folder / image_folder.format(split=split), split)
        file = folder / json_name.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(coco(split)))
    return folder


def voc(name: str, objects) -> str:
    items = "".join(
        f"<object><name>{category}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
        for category, x, y, width, height in objects
    )
    return (
        f"<annotation><filename>{name}</filename><size><width>64</width><height>48</height></size>{items}</annotation>"
    )


def make_voc(folder: Path, xml_folder: str = "{split}", image_folder: str = "{split}", lists: bool = False) -> Path:
    """Writes all splits in VOC format, optionally with lists in ImageSets/Main, and returns the folder."""
    for split in COUNTS:
        save_images(folder / image_folder.format(split=split), split)
        target = folder / xml_folder.format(split=split)
        target.mkdir(parents=True, exist_ok=True)
        for name, _, objects in make_scenes(split):
            (target / name).with_suffix(".xml").write_text(voc(name, objects))
        if lists:
            names = folder / "ImageSets/Main"
            names.mkdir(parents=True, exist_ok=True)
            stems = [Path(name).stem for name, _, _ in make_scenes(split)]
            (names / f"{split}.txt").write_text("\n".join(stems))
    return folder
