"""Multi-label and regression datasets, generated from single-label datasets.

Usage: python -m benchmarks label_sets OUT [--shared ../shared/data]
Each split is generated from rows of the same split; each source row is used at most once (digits: with replacement).

OUT/two_questions/{train,validation,test}.jsonl  Two TREC-6 questions as one text; `labels` lists their classes.
    Class DESC (a fifth of the questions) is excluded from the labels, so that some rows have no label.
OUT/tiles/{train,validation,test}/  2 x 2 tiles of CIFAR-10 images, each empty with probability 1/3; `labels` in
    metadata.jsonl lists the classes of the tiles.
OUT/digit_sums/{train,validation,test}/  3 x 3 tiles of embedded digits, each empty with probability 1/2; metadata.jsonl
    has `count`, the number of digits, and `total`, their sum.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hftl.config.schema import DataConfig
from hftl.data.layouts.digits import load_digits
from hftl.data.source import load_splits

EXCLUDED = "DESC"
DIGIT_ROWS = {"train": 1500, "validation": 300, "test": 600}


def two_questions(source: Path, out: Path, rng: np.random.Generator) -> None:
    """Writes pairs of questions as one text, with the labels of both."""
    splits = load_splits(DataConfig(source=str(source)))
    names = splits.class_names or []
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        texts, labels, order = rows["text"][:], rows["label"][:], rng.permutation(len(rows))
        lines = []
        for first, second in zip(order[0::2], order[1::2], strict=False):
            classes = sorted({names[labels[first]], names[labels[second]]} - {EXCLUDED})
            lines.append(json.dumps({"text": f"{texts[first]} {texts[second]}", "labels": classes}))
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{out.name} {split}: {len(lines)} rows")


def tiles(source: Path, out: Path, rng: np.random.Generator) -> None:
    """Writes images of up to four tiles, with the classes of all tiles."""
    splits = load_splits(DataConfig(source=str(source)))
    names = splits["train"].features["label"].names
    for split, rows in splits.items():
        order = iter(rng.permutation(len(rows)).tolist())
        examples = list(_tiled_images(order, rng, rows, 32))
        labels = [{"labels": sorted({names[rows[row]["label"]] for row in sources})} for _, sources in examples]
        _write(out / split, [image for image, _ in examples], labels)


def _tiled_images(
    order: Iterator[int], rng: np.random.Generator, rows: Any, side: int
) -> Iterator[tuple[Image.Image, list[int]]]:
    """Yields images of 2 x 2 tiles with their source rows."""
    while True:
        canvas, sources = Image.new("RGB", (2 * side, 2 * side)), []
        for tile in range(4):
            if rng.random() < 1 / 3:
                continue
            row = next(order, None)
            if row is None:
                return
            canvas.paste(rows[row]["image"].convert("RGB"), (tile % 2 * side, tile // 2 * side))
            sources.append(row)
        yield canvas, sources


def digit_sums(out: Path, rng: np.random.Generator) -> None:
    """Writes images of up to nine digits, with their number and sum."""
    for split, rows in load_digits().items():
        digits, labels = [image.convert("L") for image in rows["image"][:]], rows["label"][:]
        images, targets = [], []
        for _ in range(DIGIT_ROWS[split]):
            canvas, sources = Image.new("L", (24, 24)), []
            for tile in np.flatnonzero(rng.random(9) < 0.5):
                sources.append(int(rng.integers(len(digits))))
                canvas.paste(digits[sources[-1]], (tile % 3 * 8, tile // 3 * 8))
            images.append(canvas)
            targets.append({"count": len(sources), "total": sum(labels[row] for row in sources)})
        _write(out / split, images, targets)


def _write(folder: Path, images: Sequence[Image.Image], rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, row) in enumerate(zip(images, rows, strict=True)):
        image.save(folder / f"{number:05d}.png")
        lines.append(json.dumps({"file_name": f"{number:05d}.png"} | row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{folder.parent.name} {folder.name}: {len(lines)} rows")


def main(arguments: Sequence[str]) -> None:
    """Writes all three datasets."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks label_sets", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    options = parser.parse_args(arguments)
    two_questions(options.shared / "text/trec6", options.out / "two_questions", np.random.default_rng(0))
    tiles(options.shared / "image/cifar10_slice", options.out / "tiles", np.random.default_rng(0))
    digit_sums(options.out / "digit_sums", np.random.default_rng(0))
