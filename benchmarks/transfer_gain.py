"""Conclusions of `hftl compare` on a task with transfer gain and on a task without.

`python -m benchmarks transfer_gain` compares training from scratch with transfer learning on two tasks, with three
seeds each, and prints table, conclusion and seconds:

- photographs (hymenoptera, folder `HFTL_SHARED`), mobilenetv2_100 with ImageNet weights, pretrained on similar images;
- shuffled digits: handwritten digits of scikit-learn with the same random permutation of the 64 pixels in all images.
  Pixel values and class separability are unchanged, but the strokes that the embedded model was pretrained on are gone.

Learning rates are the defaults of the methods for photographs, and those of `hftl quickstart` (full) for digits.
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
    """Prints the comparison of each task, and its conclusion as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", help="folder of runs and reports; by default a temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        for task in args.tasks:
            print(f"\n{task}")
            started = time.perf_counter()
            compare = {"photographs": photographs, "shuffled_digits": shuffled_digits}[task]
            comparison = compare(folder / task, args.seeds)
            result: dict[str, object] = {"conclusion": comparison.conclusion, "message": comparison.sentence}
            result["seconds"] = round(time.perf_counter() - started)
            print(json.dumps({"benchmark": "transfer_gain", "task": task} | result))


def photographs(folder: Path, seeds: int) -> Comparison:
    """Compares methods on hymenoptera: ants or bees, 245 / 77 / 76 photographs of 128 x 128 pixels."""
    shared = Path(os.environ.get("HFTL_SHARED", "../shared")) / "data"
    run = hftl.RunConfig(
        hftl.DataConfig(source=str(shared / "image" / "hymenoptera")),
        hftl.ModelConfig(name=f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}", image_size=128),
        train=hftl.TrainConfig(num_epochs=3, trackers=[]),
    )
    return hftl.compare(methods=("scratch", "frozen"), num_seeds=seeds, run=run, output_dir=folder, overwrite=True)


def shuffled_digits(folder: Path, seeds: int) -> Comparison:
    """Compares methods on shuffled digits: ten classes, 300 / 200 / 600 images."""
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
    """Writes train, validation (200) and test (600) in class folders; all images have the same pixel permutation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order, rows = rng.permutation(64), rng.permutation(len(digits.images))
    ends = np.cumsum([train, 200, 600])
    for split, split_rows in zip(("train", "validation", "test"), np.split(rows, ends)[:3], strict=True):
        for row in split_rows:
            class_folder = folder / split / str(digits.target[row])
            class_folder.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.data[row][order].reshape(8, 8) * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(class_folder / f"{row:04d}.png")
