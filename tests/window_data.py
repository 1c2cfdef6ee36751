"""Small datasets for tasks with sliding windows: tagged words, questions with answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

from conftest import WORDS

TAGS = {word: kind for kind, words in WORDS.items() if kind != "tool" for word in words}
SIZES = {"train": 24, "dev": 7, "test": 9}
FILLER = ["the", "a", "my", *WORDS["tool"]]


def tagged_row(rng: random.Random, length: int) -> dict[str, list[str]]:
    """Returns words with BIO tags; animals and foods are entities, and adjacent words of one class form one entity."""
    words = [rng.choice([*TAGS, *FILLER]) for _ in range(length)]
    kinds = [TAGS.get(word) for word in words]
    tags = [
        "O" if kind is None else f"{'I' if kind == previous else 'B'}-{kind}"
        for kind, previous in zip(kinds, [None, *kinds], strict=False)
    ]
    return {"tokens": words, "tags": tags}


def question_row(rng: random.Random, length: int, answerable: bool = True) -> dict:
    """Returns a question for the animal in a context; contexts without an animal are unanswerable."""
    words = [rng.choice(FILLER) for _ in range(length)]
    index = rng.randrange(length)
    words[index] = rng.choice(WORDS["animal"]) if answerable else words[index]
    start = sum(len(word) + 1 for word in words[:index])
    answers = {"text": [words[index]], "answer_start": [start]} if answerable else {"text": [], "answer_start": []}
    return {"question": "my a", "context": " ".join(words), "answers": answers}


def write_splits(folder: Path, make, sizes: dict[str, int]) -> Path:
    """Writes one JSON lines file per split with rows `make(rng, number)` and returns the folder."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        rows = [make(rng, number) for number in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tagged(folder: Path) -> Path:
    """Writes 24 train, 7 validation and 9 test rows of 1 to 90 words (a window holds 62 words)."""

    def make(rng: random.Random, number: int) -> dict:
        return tagged_row(rng, 90 if number == 2 else 1 + number)

    return write_splits(folder, make, SIZES)


def write_questions(folder: Path, answerable: float = 1.0) -> Path:
    """Writes 24 train, 7 validation and 9 test questions with contexts of 3 to 100 words."""

    def make(rng: random.Random, number: int) -> dict:
        return question_row(rng, 100 if number == 2 else 3 + number, rng.random() < answerable)

    return write_splits(folder, make, SIZES)
