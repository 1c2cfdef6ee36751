"""Data and models of the reference cells: written from fixed seeds by numpy and PIL, without hftl."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

COLORS = ("blue", "green", "red")
WORDS = {
    "animal": ("cat", "dog", "horse", "cow", "sheep"),
    "food": ("bread", "rice", "soup", "cheese", "apple"),
    "tool": ("saw", "hammer", "drill", "nail", "rope"),
}
SIZES = {"train": 24, "validation": 7, "test": 8}
"""Rows per split of most tables."""


def write_material(folder: Path) -> None:
    """Writes all data and models below `folder`."""
    write_models(folder / "models")
    write_images(folder / "images")
    write_text_tables(folder)
    write_image_tables(folder)
    write_masks(folder / "masks")
    write_boxes(folder / "boxes")


def write_models(folder: Path) -> None:
    """Writes `resnet`, `plain_resnet`, `vit` (timm's local-dir layout) and `bert`, with weights drawn by numpy."""
    write_timm(folder / "plain_resnet", "test_resnet")
    write_timm(folder / "resnet", "test_resnet", layers=(1, 1, 1, 1), channels=(8, 8, 16, 24), stem_width=8)
    write_timm(folder / "vit", "test_vit", img_size=32, embed_dim=32, depth=2, num_heads=2)
    write_bert(folder / "bert")


def write_timm(folder: Path, name: str, **options: Any) -> None:
    """Writes a timm model with random weights and an input size of 32 x 32."""
    import timm
    from timm.models import save_for_hf

    net = timm.create_model(name, num_classes=5, **options)
    draw_weights(net)
    net.pretrained_cfg = {**dict(net.pretrained_cfg), "input_size": (3, 32, 32)}
    folder.mkdir(parents=True, exist_ok=True)
    save_for_hf(net, str(folder), model_args=options, safe_serialization=True)


def write_bert(folder: Path) -> None:
    """Writes a BERT of 2 layers and hidden size 32 with a vocabulary of words and letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "a",
        "my",
        *(w for kind in WORDS.values() for w in kind),
    ]
    vocabulary = dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    draw_weights(model)
    model.save_pretrained(folder)


def draw_weights(model: Any) -> None:
    """Fills matrices and filters from numpy's generator and biases with 0: torch's initialization would be random."""
    import torch

    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = parameter[0].numel() ** -0.5
            values = scale * rng.standard_normal(tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(values.astype(np.float32)))
        elif name.endswith("bias"):
            parameter.data.zero_()


def color_image(rng: np.random.Generator, channel: int, size: tuple[int, int] = (24, 24)) -> Any:
    """Returns a noisy image in which one of blue, green and red is strongest."""
    from PIL import Image

    pixels = rng.integers(0, 120, (*size, 3), dtype=np.uint8)
    pixels[..., 2 - channel] += 100
    return Image.fromarray(pixels)


def write_images(folder: Path) -> None:
    """Writes class folders: train 24, validation 6, test 8 images of 3 classes."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (8, 8, 8), "validation": (2, 2, 2), "test": (3, 3, 2)}.items():
        for channel, (name, count) in enumerate(zip(COLORS, counts, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                color_image(rng, channel).save(folder / split / name / f"{number:02d}.png")


def write_lines(folder: Path, name: str, rows: list[dict]) -> None:
    """Writes rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(rng: random.Random, *kinds: str) -> str:
    """Returns a text of 1 to 4 words of each kind."""
    words = ["the", *(rng.choice(WORDS[kind]) for kind in kinds for _ in range(rng.randint(1, 4)))]
    rng.shuffle(words)
    return " ".join(words)


def write_text_tables(folder: Path) -> None:
    """Writes a table for each kind of label of texts."""
    rows = {"texts": text_row, "tags": tagged_row, "questions": question_row, "scored_pairs": scored_pair}
    rows |= {"positive_pairs": positive_pair, "triplets": triplet}
    for name, make in rows.items():
        rng = random.Random(name)
        for split, count in SIZES.items():
            write_lines(folder / name, split, [make(rng, number) for number in range(count)])


def text_row(rng: random.Random, number: int) -> dict:
    """Returns a text with its class, kinds, one number, several numbers, and a second text."""
    kinds = [kind for bit, kind in enumerate(WORDS) if (number + 1) >> bit & 1]
    label = list(WORDS)[number % 3]
    text, listed = words_of(rng, label), words_of(rng, *kinds)
    numbers = {"length": len(listed.split()) + 0.25, "weight": 1000 * (5 + len(listed) / 8) + 0.5}
    return {"text": text, "label": label, "second": words_of(rng, "tool"), "listed": listed, "kinds": kinds} | numbers


def tagged_row(rng: random.Random, number: int) -> dict:
    """Returns words with BIO tags; row 2 is longer than a window."""
    kinds = {word: kind for kind in ("animal", "food") for word in WORDS[kind]}
    words = [rng.choice([*kinds, "the", "a", *WORDS["tool"]]) for _ in range(80 if number == 2 else 2 + number)]
    return {"tokens": words, "tags": [f"B-{kinds[word]}" if word in kinds else "O" for word in words]}


def question_row(rng: random.Random, number: int) -> dict:
    """Returns a context with one animal and its place; row 2 is longer than a window."""
    words = [rng.choice(["the", "a", *WORDS["tool"]]) for _ in range(90 if number == 2 else 3 + number)]
    place = rng.randrange(len(words))
    words[place] = rng.choice(WORDS["animal"])
    start = sum(len(word) + 1 for word in words[:place])
    answers = {"text": [words[place]], "answer_start": [start]}
    return {"question": "my a", "context": " ".join(words), "answers": answers}


def scored_pair(rng: random.Random, number: int) -> dict:
    """Returns two texts and a score from 0 to 5."""
    kinds = [rng.choice(list(WORDS)), rng.choice(list(WORDS))]
    score = 5.0 * (kinds[0] == kinds[1]) - 0.5 * (number % 3 if kinds[0] == kinds[1] else -(number % 3))
    return {"sentence1": words_of(rng, kinds[0]), "sentence2": words_of(rng, kinds[1]), "score": score}


def positive_pair(rng: random.Random, number: int) -> dict:
    """Returns two texts of the same words."""
    text = f"{words_of(rng, 'animal', 'food')} {WORDS['tool'][number % 5]}"
    return {"anchor": text, "positive": " ".join(rng.sample(text.split(), len(text.split())))}


def triplet(rng: random.Random, number: int) -> dict:
    """Returns a positive pair and a text of other words."""
    return positive_pair(rng, number) | {"negative": words_of(rng, "tool", "tool")}


def write_image_tables(folder: Path) -> None:
    """Writes tables of images: multi-label with numbers, with captions, with texts, numbers and categories."""
    pixels, rng = np.random.default_rng(1), random.Random(1)
    for name in ("image_labels", "captions", "mixed"):
        (folder / name / "files").mkdir(parents=True)
        for split, count in SIZES.items():
            rows = []
            for number in range(count):
                file = f"files/{split}{number:02d}.png"
                color_image(pixels, number % 3).save(folder / name / file)
                rows.append({"image": file} | _IMAGE_ROWS[name](rng, number))
            write_lines(folder / name, split, rows)


def _labels(rng: random.Random, number: int) -> dict:
    names = [COLORS[number % 3]] + (["even"] if number % 2 == 0 else [])
    return {"labels": "|".join(names), "count": number % 5 + 0.5, "total": 10.0 * (number % 3) + rng.random()}


def _captions(rng: random.Random, number: int) -> dict:
    texts = [f"{rng.choice(['a', 'the', 'my'])} {COLORS[number % 3]} {rng.choice(WORDS['tool'])}" for _ in range(2)]
    return {"captions": texts[: 1 + number % 2]}


def _mixed(rng: random.Random, number: int) -> dict:
    cells = {"title": words_of(rng, list(WORDS)[number % 3]), "price": round(10 * rng.random(), 2)}
    return cells | {"shop": rng.choice(["north", "south"]), "label": "same" if rng.random() < 0.5 else "other"}


_IMAGE_ROWS = {"image_labels": _labels, "captions": _captions, "mixed": _mixed}


def write_masks(folder: Path) -> None:
    """Writes SPLIT/images and SPLIT/masks: noisy 30 x 44 images with two boxes, and a void line."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "validation": 3, "test": 3}.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((30, 44), np.uint8)
            for box, value in enumerate((2, 3)):
                top, left = rng.integers(1, 12), rng.integers(0, 8) + 22 * box
                mask[top : top + 14, left : left + 12] = value
            mask[0] = 1
            pixels = rng.integers(0, 80, (30, 44, 3), dtype=np.uint8)
            for value, channel in ((0, 1), (2, 0), (3, 2)):
                pixels[mask == value, channel] += 160
            Image.fromarray(pixels).save(folder / split / "images" / f"{number:02d}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number:02d}.png")
    (folder / "classes.json").write_text(json.dumps(["ground", "void", "left", "right"]))


def write_boxes(folder: Path) -> None:
    """Writes COCO files SPLIT.coco.json with images/SPLIT: a red and a blue square on gray."""
    from PIL import Image

    for seed, (split, count) in enumerate({"train": 8, "val": 3, "test": 3}.items()):
        rng = np.random.default_rng(seed)
        content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "blue"}, {"id": 7, "name": "red"}]}
        (folder / "images" / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(100, 140, (48, 64, 3), dtype=np.uint8)
            name = f"{split}{number}.png"
            content["images"].append({"id": number, "file_name": name, "width": 64, "height": 48})
            for category, color in ((3, (20, 20, 230)), (7, (230, 20, 20))) if number != 1 else ():
                x, y = (int(value) for value in rng.integers(0, 28, 2))
                width, height = (int(value) for value in rng.integers(10, 20, 2))
                pixels[y : y + height, x : x + width] = color
                entry = {"id": len(content["annotations"]), "image_id": number, "category_id": category, "iscrowd": 0}
                content["annotations"].append(entry | {"bbox": [x, y, width, height], "area": width * height})
            Image.fromarray(pixels).save(folder / "images" / split / name)
        (folder / f"{split}.coco.json").write_text(json.dumps(content))
