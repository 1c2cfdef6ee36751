"""Small pair datasets: scored text pairs, positive text pairs, captioned images."""

import json
import random
from pathlib import Path

import numpy as np
from conftest import WORDS

COLORS = ("blue", "green", "red")


def write_lines(folder: Path, **splits) -> str:
    """Writes one JSON lines file per split and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def scored_pairs(rows: int, seed: int = 0) -> list[dict]:
    """Returns text pairs with the fraction of the three word classes that both have or both lack, scaled to 0..5."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(rows):
        kinds = [rng.sample(list(WORDS), rng.randint(1, 2)) for _ in range(2)]
        texts = [" ".join(rng.choice(WORDS[kind]) for kind in side for _ in range(rng.randint(1, 4))) for side in kinds]
        equal = sum((kind in kinds[0]) == (kind in kinds[1]) for kind in WORDS)
        pairs.append({"sentence1": texts[0], "sentence2": texts[1], "score": 5 * equal / 3})
    return pairs


def positive_pairs(rows: int, seed: int = 0) -> list[dict]:
    """Returns text pairs with the same words in different order."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(rows):
        words = [rng.choice(WORDS[kind]) for kind in WORDS for _ in range(rng.randint(1, 2))]
        pairs.append({"anchor": " ".join(words), "positive": " ".join(rng.sample(words, len(words)))})
    return pairs


def captioned(folder: Path, rows: int, lists: bool = False, label: bool = False, seed: int = 0) -> list[dict]:
    """Writes images of one color and returns rows with captions that name it.

    Args:
        folder: Folder of the images.
        rows: Number of images.
        lists: Whether a row has a list of captions rather than one caption.
        label: Whether each image gets a second row with a wrong caption; `label` is 1 for correct captions, else 0.
        seed: Seed of pixels and captions.
    """
    from PIL import Image

    rng, draw = np.random.default_rng(seed), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for number in range(rows):
        color = number % 3
        pixels = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
        pixels[..., 2 - color] += 100
        path = folder / f"{seed}-{number:02d}.png"
        Image.fromarray(pixels).save(path)
        texts = [f"{draw.choice(['a', 'the', 'my'])} {COLORS[color]} {draw.choice(WORDS['tool'])}" for _ in range(3)]
        texts = texts[: draw.randint(1, 3)] if lists else texts[:1]
        row = {"image": f"{folder.name}/{path.name}", "captions" if lists else "text": texts if lists else texts[0]}
        captions.append(row | ({"label": 1} if label else {}))
        if label:
            captions.append(row | {"text": f"a {COLORS[(color + 1) % 3]} rope", "label": 0})
    return captions
