"""In-memory tables of a few rows with one column per role."""

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

TEXT, NUMBER = Value("string"), Value("float64")
ANSWERS = {"text": List(TEXT), "answer_start": List(Value("int64"))}
BOXED = {"bbox": [[1.0, 1.0, 5.0, 5.0]], "category": ["a"]}


def tiny_column(role, count):
    """Returns `count` values of a role and their type; labels have two classes."""
    pixels = np.random.default_rng(count).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    masks = np.arange(count * 64).reshape(count, 8, 8) % 2
    texts = [f"row {number} of {count}" for number in range(count)]
    answers = {"text": ["row"], "answer_start": [0]}
    return {
        "image": lambda: ([PILImage.fromarray(image) for image in pixels], Image()),
        "mask": lambda: ([PILImage.fromarray(mask.astype(np.uint8)) for mask in masks], Image()),
        "objects": lambda: ([BOXED] * count, {"bbox": List(List(NUMBER)), "category": List(TEXT)}),
        "label": lambda: ((["a", "b"] * count)[:count], TEXT),
        "words": lambda: ([text.split() for text in texts], List(TEXT)),
        "tags": lambda: ([["B-x", "O", "O", "O"]] * count, List(TEXT)),
        "answers": lambda: ([answers] * count, ANSWERS),
        "score": lambda: ((np.arange(count) / count).tolist(), NUMBER),
        "match": lambda: (([1, 1, 0, 1] * count)[:count], Value("int64")),
    }.get(role, lambda: (texts, TEXT))()


def tiny_rows(names):
    """Returns 8 training and 4 validation rows; `names` are the column names by role."""
    sets = {}
    for split, count in {"train": 8, "validation": 4}.items():
        columns = {name: tiny_column(role, count) for role, name in names.items()}
        features = Features({name: kind for name, (_, kind) in columns.items()})
        sets[split] = Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)
    return DatasetDict(sets)
