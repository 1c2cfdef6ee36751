"""A mixed table of a few rows: an image, two texts, numbers and a category, any of which may be missing."""

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
    """Writes a CSV for each split, with images beside it; `label` says whether image and texts are of one kind.

    Args:
        folder: Where.
        counts: Rows of each split.
        broken: By split and row, cells that are written otherwise.
    """
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    kinds = list(WORDS)
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            for row in range(count):
                seen = rng.randrange(3)
                read = seen if row % 2 else (seen + rng.randint(1, 2)) % 3
                image = pixels.integers(0, 120, (24, 24, 3), dtype=np.uint8)
                image[..., seen] += 120
                place = f"images/{split}{row:03d}.png"
                Image.fromarray(image).save(folder / place)
                words = rng.choices(WORDS[kinds[read]], k=4)
                cells = {
                    "picture": place,
                    "title": " ".join(words[:2]),
                    "body": " ".join(["the", *words[2:], str(row)]),
                    "price": f"{rng.random() * 10:.2f}",
                    "shop": rng.choice(["north", "south"]),
                    "label": "same" if row % 2 else "other",
                }
                table.writerow(cells | ((broken or {}).get(split, {}).get(row, {})))
    return folder
