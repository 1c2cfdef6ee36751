"""Small data of pairs: texts with scores, texts that belong together, images with captions."""

import json
import random
from pathlib import Path

import numpy as np
from conftest import WORDS

COLOURS = ("blue", "green", "red")


def write_lines(folder: Path, **splits) -> str:
    """Writes rows as JSON lines, a file each split, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def scored_pairs(rows: int, seed: int = 0) -> list[dict]:
    """Pairs of texts; the score counts the kinds of words (of three) that both have or both lack, 0 to 5."""
    rng = random.Random(seed)
    out = []
    for _ in range(rows):
        kinds = [rng.sample(list(WORDS), rng.randint(1, 2)) for _ in range(2)]
        texts = [" ".join(rng.choice(WORDS[kind]) for kind in side for _ in range(rng.randint(1, 4))) for side in kinds]
        alike = sum((kind in kinds[0]) == (kind in kinds[1]) for kind in WORDS)
        out.append({"sentence1": texts[0], "sentence2": texts[1], "score": 5 * alike / 3})
    return out


def positive_pairs(rows: int, seed: int = 0) -> list[dict]:
    """Pairs of texts that share their words, in another order."""
    rng = random.Random(seed)
    out = []
    for _ in range(rows):
        words = [rng.choice(WORDS[kind]) for kind in WORDS for _ in range(rng.randint(1, 2))]
        out.append({"anchor": " ".join(words), "positive": " ".join(rng.sample(words, len(words)))})
    return out


def captioned(folder: Path, rows: int, lists: bool = False, label: bool = False, seed: int = 0) -> list[dict]:
    """Images of one colour with captions that name it: one a row, a list a row, or true and false ones with a label."""
    from PIL import Image

    rng, draw = np.random.default_rng(seed), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for number in range(rows):
        colour = number % 3
        pixels = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
        pixels[..., 2 - colour] += 100
        path = folder / f"{seed}-{number:02d}.png"
        Image.fromarray(pixels).save(path)
        texts = [f"{draw.choice(['a', 'the', 'my'])} {COLOURS[colour]} {draw.choice(WORDS['tool'])}" for _ in range(3)]
        texts = texts[: draw.randint(1, 3)] if lists else texts[:1]
        row = {"image": f"{folder.name}/{path.name}", "captions" if lists else "text": texts if lists else texts[0]}
        out.append(row | ({"label": 1} if label else {}))
        if label:
            out.append(row | {"text": f"a {COLOURS[(colour + 1) % 3]} rope", "label": 0})
    return out
