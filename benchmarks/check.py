"""Benchmark of `hftl check`: time and memory for N and 10 N rows, recall of planted duplicates and label errors.

`python -m benchmarks check speed [--rows 10000] [--modality text|image]` prints seconds and peak resident memory.
`python -m benchmarks check copies --data FOLDER` adds transformed copies of training images to test.
`python -m benchmarks check labels --data SOURCE --model MODEL [--seeds 3] [--first_seed 0]` changes 5 % of labels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

NOISE = 0.05
"""Fraction of training rows with a changed label, in [0, 1]."""
_CHECK_CODE = """
import json, resource, sys, time
import datasets, PIL.Image, scipy.stats, sklearn.linear_model
import hftl
from hftl.logging import suppress_logs
check = hftl.check
started, cpu_started = time.perf_counter(), time.process_time()
with suppress_logs():
    check(sys.argv[1], output=sys.argv[2])
seconds = time.perf_counter() - started, time.process_time() - cpu_started
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main(argv: list[str]) -> None:
    """Runs one of the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "copies", "labels"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--modality", choices=("text", "image"), default="text")
    parser.add_argument("--data", help="source, for copies and labels")
    parser.add_argument("--model", help="for labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.part == "speed":
        _speed(args.rows, args.modality)
    elif args.part == "copies":
        _copies(Path(args.data))
    else:
        _labels(args.data, args.model, range(args.first_seed, args.first_seed + args.seeds))


def _speed(rows: int, modality: str) -> None:
    """Prints seconds and peak memory of a check of `rows` and 10 x `rows`, each in a separate process."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for count in (rows, 10 * rows):
            source = Path(name, str(count))
            (_texts if modality == "text" else _images)(source, count)
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", _CHECK_CODE, str(source), f"{name}/out"]
            process = subprocess.run(command, capture_output=True, text=True, env=environment)
            if process.returncode:
                raise SystemExit(process.stderr)
            results[count] = json.loads(process.stdout.splitlines()[-1])
            shutil.rmtree(source)
    print(f"\n{modality:<8} {'seconds':>9} {'CPU s':>9} {'peak MiB':>9}")
    for count, (seconds, cpu_seconds, peak) in results.items():
        print(f"{count:<8} {seconds:>9.1f} {cpu_seconds:>9.1f} {peak:>9.0f}")
    ratio = results[10 * rows][2] / results[rows][2]
    print(
        json.dumps(
            {"benchmark": "check", "part": "speed", "modality": modality, "results": results, "memory_ratio": ratio}
        )
    )


def _texts(folder: Path, rows: int) -> None:
    """Writes texts of words with Zipf-distributed frequencies; 2 % are duplicates and 2 % are near-duplicates."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)])
    frequencies = 1 / np.arange(2, 20_002)
    lengths = rng.integers(5, 30, rows)
    sampled = rng.choice(words, lengths.sum(), p=frequencies / frequencies.sum())
    texts = np.split(sampled, np.cumsum(lengths)[:-1])
    folder.mkdir(parents=True)
    earlier: list[str] = []
    with (folder / "train.csv").open("w") as train, (folder / "test.csv").open("w") as test:
        for file in (train, test):
            file.write("text,label\n")
        for row in range(rows):
            text = " ".join(texts[row])
            if row % 50 == 1:
                text = earlier[int(rng.integers(len(earlier)))]
            elif row % 50 == 2:
                text = earlier[int(rng.integers(len(earlier)))] + " too"
            if row % 10 == 0 and len(earlier) < 5_000:
                earlier.append(text)
            (test if row % 10 == 9 else train).write(f"{text},{row % 4}\n")


def _images(folder: Path, rows: int) -> None:
    """Writes JPEG files of 256 x 192 pixels of smooth noise; 2 % are recompressed copies."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    previous = None
    for row in range(rows):
        class_folder = folder / ("test" if row % 10 == 9 else "train") / f"class_{row % 4}"
        class_folder.mkdir(parents=True, exist_ok=True)
        if row % 50 == 1 and previous is not None:
            previous.save(class_folder / f"{row}.jpg", quality=60)
            continue
        pixels = np.zeros((192, 256, 3))
        for scale in (4, 16, 64):
            coarse = Image.fromarray(rng.integers(0, 255, (scale, scale, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((256, 192)), float) / 3
        previous = Image.fromarray(pixels.astype(np.uint8))
        previous.save(class_folder / f"{row}.jpg", quality=90)


def _copies(data: Path) -> None:
    """Prints the recall of planted copies by transformation, and the number of other detected pairs."""
    import numpy as np
    from PIL import Image

    from hftl import check
    from hftl.logging import suppress_logs

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, suppress_logs():
        clean, planted = Path(name, "clean"), Path(name, "planted")
        shutil.copytree(data, clean)
        shutil.copytree(data, planted)
        files = sorted(file for file in (planted / "train").glob("*/*"))
        sources = [files[n] for n in np.sort(rng.choice(len(files), min(200, len(files)), replace=False))]
        for number, source in enumerate(sources):
            image = Image.open(source).convert("RGB")
            for kind, (copy, quality) in _transformed(image, rng).items():
                copy.save(planted / "test" / source.parent.name / f"copy-{kind}-{number:04}.jpg", quality=quality)
        before, after = (check(str(folder), output=Path(name, "out")) for folder in (clean, planted))
        files_of_rows = _image_files(planted)
    original_pairs = sum(len(before[finding].entries) for finding in ("near_leaks", "near_duplicates"))
    detected: dict[str, set[int]] = {}
    for entry in after["near_leaks"].entries:
        file = files_of_rows[entry.split][entry.row]
        match = files_of_rows[entry.other[0]][entry.other[1]] if entry.other else ""
        if file.name.startswith("copy-") and match == sources[int(file.stem.rpartition("-")[2])]:
            detected.setdefault(file.stem.split("-")[1], set()).add(int(file.stem.rpartition("-")[2]))
    different = 0
    for finding in ("near_leaks", "near_duplicates"):
        for entry in after[finding].entries:
            first, second = (entry.split, entry.row), entry.other or ("", 0)
            origins = [_origin(files_of_rows[split][row], sources) for split, row in (first, second)]
            different += origins[0] != origins[1]
    recall = {
        kind: round(len(detected.get(kind, ())) / len(sources), 4)
        for kind in _transformed(Image.new("RGB", (40, 40)), rng)
    }
    for kind, value in recall.items():
        print(f"{kind:<12} recall {value:.3f} of {len(sources)} copies")
    print(f"pairs of different origin: {different} ({original_pairs} pairs in the original data)")
    result = {"recall": recall, "original_pairs": original_pairs, "different": different}
    print(json.dumps({"benchmark": "check", "part": "copies"} | result))


def _transformed(image: Any, rng: Any) -> dict[str, tuple[Any, int]]:
    """Returns transformed copies of an image by kind, with the JPEG quality to save each with."""
    width, height = image.size
    w, h = round(width * 0.95), round(height * 0.95)
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    cropped = image.crop((x, y, x + w, y + h))
    return {
        "half": (image.resize((width // 2, height // 2), 3), 95),
        "larger": (image.resize((width * 3 // 2, height * 3 // 2), 3), 95),
        "quality90": (image, 90),
        "quality50": (image, 50),
        "cropped": (cropped, 95),
        "all": (cropped.resize((w * 3 // 4, h * 3 // 4), 3), 70),
    }


def _image_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the image file of each row by split."""
    from datasets import Image

    from hftl import DataConfig, load_splits

    splits = load_splits(DataConfig(source=str(folder), validation_fraction=0))
    return {
        split: [Path(image["path"]) for image in rows.cast_column("image", Image(decode=False))["image"]]
        for split, rows in splits.items()
    }


def _origin(file: Path, sources: list[Path]) -> Path:
    """Returns the original file of a planted copy; other files are their own origin."""
    return sources[int(file.stem.rpartition("-")[2])] if file.name.startswith("copy-") else file


def _labels(data: str, model: str, seeds: range) -> None:
    """Prints the precision at k of `label_errors` on train, with k the number of changed labels."""
    import numpy as np

    from hftl import DataConfig, load_splits
    from hftl.audit.check import survey
    from hftl.audit.class_balance import read_labels
    from hftl.audit.duplicates import Groups
    from hftl.audit.finding import Numbering
    from hftl.audit.model_checks import ModelChecks, label_errors

    splits = replace(load_splits(DataConfig(source=data, validation_fraction=0)), lenient=True)
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    scan = survey(splits, numbering)
    duplicate_groups = Groups(scan.keys, scan.verbatim, scan.usable, scan.verbatim_is).first
    labels = read_labels(splits, numbering)
    checks = ModelChecks(splits, model, scan.images, numbering.rows(sorted(scan.unusable)))
    features = checks.features()
    if isinstance(features, str):
        raise SystemExit(features)
    train, precisions, lengths = numbering.of_split("train"), [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = np.flatnonzero(labels.codes[train] >= 0)
        planted = rng.choice(rows, round(NOISE * len(rows)), replace=False) + train.start
        codes = labels.codes.copy()
        codes[planted] = (codes[planted] + rng.integers(1, len(labels.names), len(planted))) % len(labels.names)
        finding = label_errors(features, checks.usable, replace(labels, codes=codes), numbering, duplicate_groups)
        ranked = [entry.row + train.start for entry in finding.entries if entry.split == "train"]
        hits = np.isin(ranked[: len(planted)], planted).sum()
        precisions.append(float(hits / len(planted)))
        lengths.append(len(ranked))
        print(f"seed {seed}: {hits} of the top {len(planted)} rows have a changed label; {len(ranked)} rows listed")
    print(
        json.dumps(
            {
                "benchmark": "check",
                "part": "labels",
                "data": Path(data).name,
                "precision": precisions,
                "listed": lengths,
            }
        )
    )
