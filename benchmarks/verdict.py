"""Does `hftl compare` tell where transfer helps from where it does not? One task of each kind, and the verdicts.

`python -m benchmarks verdict` compares training from scratch with ways of transfer on two tasks, three seeds each, and
prints table, sentence and seconds:

- photographs (hymenoptera, folder `HFTL_SHARED`), mobilenetv2_100 with ImageNet weights: features made for such images;
- shuffled digits: scikit-learn's handwritten digits, the 64 pixels of every image in one random order. Their values are
  those of digits and the classes are as separable as ever, but strokes are gone, which is all that the embedded model
  learnt from letters.

Rates are the methods' own for photographs, and those of quickstart's full runs for digits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import hftl
from hftl.selection.results import Comparison

TRAINING_DIGITS = 300
TASKS = ("photographs", "shuffled_digits")


def main(argv: list[str]) -> None:
    """Prints the comparison of each task, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", help="folder that keeps the runs and pages; a temporary one by default")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(args.output or aside)
        for task in args.tasks:
            print(f"\n{task}")
            started = time.perf_counter()
            found = {"photographs": photographs, "shuffled_digits": shuffled_digits}[task](folder / task, args.seeds)
            result = {"benchmark": "verdict", "task": task, "verdict": found.conclusion, "sentence": found.sentence}
            print(json.dumps(result | {"seconds": round(time.perf_counter() - started)}))


def photographs(folder: Path, seeds: int) -> Comparison:
    """Ants or bees, 245 / 77 / 76 photographs, at 128 x 128 pixels."""
    shared = Path(os.environ.get("HFTL_SHARED", "../shared")) / "data"
    run = hftl.RunConfig(
        hftl.DataConfig(source=str(shared / "image" / "hymenoptera")),
        hftl.ModelConfig(name=f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}", image_size=128),
        train=hftl.TrainConfig(num_epochs=3, trackers=[]),
    )
    return hftl.compare(methods=("scratch", "frozen"), num_seeds=seeds, run=run, output_dir=folder, overwrite=True)


def shuffled_digits(folder: Path, seeds: int) -> Comparison:
    """Ten classes, 300 / 200 / 600 images without strokes."""
    data = folder.with_name(f"{folder.name}-data")
    write_shuffled_digits(data)
    run = hftl.RunConfig(
        hftl.DataConfig(source=str(data), augment=hftl.AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)),
        hftl.ModelConfig(name="embedded:letters"),
        train=hftl.TrainConfig(num_epochs=8, lr=2e-3, head_lr=2e-3, trackers=[]),
    )
    methods = ("scratch", "frozen", "full")
    return hftl.compare(methods=methods, num_seeds=seeds, run=run, output_dir=folder, overwrite=True)


def write_shuffled_digits(folder: Path, train: int = TRAINING_DIGITS, seed: int = 0) -> None:
    """Writes train, validation (200) and test (600) as folders of class folders; one order of pixels for all images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order, rows = rng.permutation(64), rng.permutation(len(digits.images))
    ends = np.cumsum([train, 200, 600])
    for split, part in zip(("train", "validation", "test"), np.split(rows, ends)[:3], strict=True):
        for row in part:
            place = folder / split / str(digits.target[row])
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.data[row][order].reshape(8, 8) * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{row:04d}.png")
