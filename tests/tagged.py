"""Small data for tasks whose texts are read in windows: words with tags, questions with answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

from conftest import WORDS

TAGS = {word: kind for kind, words in WORDS.items() if kind != "tool" for word in words}
SIZES = {"train": 24, "dev": 7, "test": 9}
FILLER = ["the", "a", "my", *WORDS["tool"]]


def tagged_row(rng: random.Random, length: int) -> dict[str, list[str]]:
    """Returns words; animals and foods are entities, and a second one of a kind in a row goes on with the first."""
    words = [rng.choice([*TAGS, *FILLER]) for _ in range(length)]
    kinds = [TAGS.get(word) for word in words]
    before = [None, *kinds]
    tags = ["O" if kind is None else f"{'I' if kind == last else 'B'}-{kind}" for kind, last in zip(kinds, before)]  # noqa: B905
    return {"tokens": words, "tags": tags}


def question_row(rng: random.Random, length: int, answerable: bool = True) -> dict:
    """Returns a context with one animal at most, and the question which it is; some end with a blank or a stop."""
    words = [rng.choice(FILLER) for _ in range(length)]
    place = rng.randrange(length)
    words[place] = rng.choice(WORDS["animal"]) if answerable else words[place]
    start = sum(len(word) + 1 for word in words[:place])
    answers = {"text": [words[place]], "answer_start": [start]} if answerable else {"text": [], "answer_start": []}
    return {"question": "my a", "context": " ".join(words), "answers": answers}


def write_splits(folder: Path, make, sizes: dict[str, int]) -> Path:
    """Writes a JSONL file of rows `make(rng, number)` for each split."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        rows = [make(rng, number) for number in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tagged(folder: Path) -> Path:
    """Writes train 24, validation 7, test 9 rows of 1 to 90 words (a window holds 62 of them)."""

    def make(rng: random.Random, number: int) -> dict:
        return tagged_row(rng, 90 if number == 2 else 1 + number)

    return write_splits(folder, make, SIZES)


def write_questions(folder: Path, answerable: float = 1.0) -> Path:
    """As `write_tagged`, with contexts of 3 to 100 words."""

    def make(rng: random.Random, number: int) -> dict:
        return question_row(rng, 100 if number == 2 else 3 + number, rng.random() < answerable)

    return write_splits(folder, make, SIZES)
