"""Small multimodal tables: an image, two texts, a number and a category per row."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
from conftest import WORDS
from PIL import Image

COLUMNS = ("picture", "title", "body", "price", "shop", "label")


def write_pairs(
    folder: Path, counts: dict[str, int], broken: dict[str, dict[int, dict[str, str]]] | None = None
) -> Path:
    """Writes one CSV per split and its images; `label` is whether image and texts have the same class.

    Args:
        folder: Target folder.
        counts: Number of rows per split.
        broken: Replacement cells by split and row.
    """
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    kinds = list(WORDS)
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            for row in range(count):
                image_class = rng.randrange(3)
                text_class = image_class if row % 2 else (image_class + rng.randint(1, 2)) % 3
                image = pixels.integers(0, 120, (24, 24, 3), dtype=np.uint8)
                image[..., image_class] += 120
                path = f"images/{split}{row:03d}.png"
                Image.fromarray(image).save(folder / path)
                words = rng.choices(WORDS[kinds[text_class]], k=4)
                cells = {
                    "picture": path,
                    "title": " ".join(words[:2]),
                    "body": " ".join(["the", *words[2:], str(row)]),
                    "price": f"{rng.random() * 10:.2f}",
                    "shop": rng.choice(["north", "south"]),
                    "label": "same" if row % 2 else "other",
                }
                table.writerow(cells | ((broken or {}).get(split, {}).get(row, {})))
    return folder
