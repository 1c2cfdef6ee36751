"""The data check: time and memory at N and 10 N rows, and how much of what was planted it finds.

`python -m benchmarks check speed [--rows 10000] [--modality text|image]` prints seconds and peak resident memory.
`python -m benchmarks check copies --data FOLDER` plants changed copies of training images in test.
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
"""Share of training rows whose label is changed."""
_JOB = """
import json, resource, sys, time
import datasets, PIL.Image, scipy.stats, sklearn.linear_model
import hftl
from hftl.logging import muted
check = hftl.check
began, busy = time.perf_counter(), time.process_time()
with muted():
    check(sys.argv[1], output=sys.argv[2])
seconds = time.perf_counter() - began, time.process_time() - busy
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main(argv: list[str]) -> None:
    """Runs one of the three."""
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
    """Prints seconds and peak memory of a check of `rows` and of ten times as many, each in a process of its own."""
    measured = {}
    with tempfile.TemporaryDirectory() as name:
        for count in (rows, 10 * rows):
            source = Path(name, str(count))
            (_texts if modality == "text" else _images)(source, count)
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", _JOB, str(source), f"{name}/out"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            measured[count] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(source)
    print(f"\n{modality:<8} {'seconds':>9} {'CPU s':>9} {'peak MiB':>9}")
    for count, (seconds, busy, peak) in measured.items():
        print(f"{count:<8} {seconds:>9.1f} {busy:>9.1f} {peak:>9.0f}")
    ratio = measured[10 * rows][2] / measured[rows][2]
    print(
        json.dumps(
            {"benchmark": "check", "part": "speed", "modality": modality, "measured": measured, "memory_ratio": ratio}
        )
    )


def _texts(folder: Path, rows: int) -> None:
    """Writes sentences of words whose frequencies fall as in language; one in fifty is a copy, one in fifty almost."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)])
    shares = 1 / np.arange(2, 20_002)
    lengths = rng.integers(5, 30, rows)
    drawn = np.split(rng.choice(words, lengths.sum(), p=shares / shares.sum()), np.cumsum(lengths)[:-1])
    folder.mkdir(parents=True)
    earlier: list[str] = []
    with (folder / "train.csv").open("w") as train, (folder / "test.csv").open("w") as test:
        for file in (train, test):
            file.write("text,label\n")
        for row in range(rows):
            text = " ".join(drawn[row])
            if row % 50 == 1:
                text = earlier[int(rng.integers(len(earlier)))]
            elif row % 50 == 2:
                text = earlier[int(rng.integers(len(earlier)))] + " too"
            if row % 10 == 0 and len(earlier) < 5_000:
                earlier.append(text)
            (test if row % 10 == 9 else train).write(f"{text},{row % 4}\n")


def _images(folder: Path, rows: int) -> None:
    """Writes JPEG files of 256 x 192 pixels of smooth noise; one in fifty is a recompressed copy."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    kept = None
    for row in range(rows):
        place = folder / ("test" if row % 10 == 9 else "train") / f"class_{row % 4}"
        place.mkdir(parents=True, exist_ok=True)
        if row % 50 == 1 and kept is not None:
            kept.save(place / f"{row}.jpg", quality=60)
            continue
        pixels = np.zeros((192, 256, 3))
        for scale in (4, 16, 64):
            coarse = Image.fromarray(rng.integers(0, 255, (scale, scale, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((256, 192)), float) / 3
        kept = Image.fromarray(pixels.astype(np.uint8))
        kept.save(place / f"{row}.jpg", quality=90)


def _copies(data: Path) -> None:
    """Prints the share of the planted copies that are found, and the pairs that are found beside them."""
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
            picture = Image.open(source).convert("RGB")
            for kind, (image, quality) in _changed(picture, rng).items():
                image.save(planted / "test" / source.parent.name / f"copy-{kind}-{number:04}.jpg", quality=quality)
        before, after = (check(str(folder), output=Path(name, "out")) for folder in (clean, planted))
        names = _file_names(planted)
    own = sum(len(before[kind].entries) for kind in ("near_leaks", "near_duplicates"))
    found: dict[str, set[int]] = {}
    for entry in after["near_leaks"].entries:
        file, other = names[entry.split][entry.row], names[entry.other[0]][entry.other[1]] if entry.other else ""
        if file.name.startswith("copy-") and other == sources[int(file.stem.rpartition("-")[2])]:
            found.setdefault(file.stem.split("-")[1], set()).add(int(file.stem.rpartition("-")[2]))
    false = 0
    for kind in ("near_leaks", "near_duplicates"):
        for entry in after[kind].entries:
            pair = [
                _origin(names[split][row], sources) for split, row in ((entry.split, entry.row), entry.other or ("", 0))
            ]
            false += pair[0] != pair[1]
    recall = {
        kind: round(len(found.get(kind, ())) / len(sources), 4) for kind in _changed(Image.new("RGB", (40, 40)), rng)
    }
    for kind, share in recall.items():
        print(f"{kind:<12} {share:.3f} of {len(sources)} copies found")
    print(f"pairs of different origin: {false} ({own} pairs in the data as they are)")
    print(json.dumps({"benchmark": "check", "part": "copies", "recall": recall, "own": own, "different": false}))


def _changed(picture: Any, rng: Any) -> dict[str, tuple[Any, int]]:
    """Returns copies of a picture by kind, with the JPEG quality to save each at."""
    width, height = picture.size
    w, h = round(width * 0.95), round(height * 0.95)
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    cropped = picture.crop((x, y, x + w, y + h))
    return {
        "half": (picture.resize((width // 2, height // 2), 3), 95),
        "larger": (picture.resize((width * 3 // 2, height * 3 // 2), 3), 95),
        "quality90": (picture, 90),
        "quality50": (picture, 50),
        "cropped": (cropped, 95),
        "all": (cropped.resize((w * 3 // 4, h * 3 // 4), 3), 70),
    }


def _file_names(folder: Path) -> dict[str, list[Path]]:
    from datasets import Image

    from hftl import DataConfig, load_splits

    splits = load_splits(DataConfig(source=str(folder), validation_fraction=0))
    return {
        split: [Path(image["path"]) for image in rows.cast_column("image", Image(decode=False))["image"]]
        for split, rows in splits.items()
    }


def _origin(file: Path, sources: list[Path]) -> Path:
    return sources[int(file.stem.rpartition("-")[2])] if file.name.startswith("copy-") else file


def _labels(data: str, model: str, seeds: range) -> None:
    """Prints the share of changed labels among the first rows of train, as many as were changed."""
    import numpy as np

    from hftl import DataConfig, load_splits
    from hftl.audit.check import survey
    from hftl.audit.class_balance import read_labels
    from hftl.audit.duplicates import Groups
    from hftl.audit.finding import Numbering
    from hftl.audit.model_checks import ModelChecks, label_errors

    splits = replace(load_splits(DataConfig(source=data, validation_fraction=0)), lenient=True)
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    seen = survey(splits, numbering)
    twins = Groups(seen.keys, seen.verbatim, seen.usable, seen.verbatim_is).first
    labels = read_labels(splits, numbering)
    look = ModelChecks(splits, model, seen.images, numbering.rows(sorted(seen.unusable)))
    features = look.features()
    if isinstance(features, str):
        raise SystemExit(features)
    train, precisions, lengths = numbering.of_split("train"), [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = np.flatnonzero(labels.codes[train] >= 0)
        planted = rng.choice(rows, round(NOISE * len(rows)), replace=False) + train.start
        codes = labels.codes.copy()
        codes[planted] = (codes[planted] + rng.integers(1, len(labels.names), len(planted))) % len(labels.names)
        finding = label_errors(features, look.usable, replace(labels, codes=codes), numbering, twins)
        ranked = [entry.row + train.start for entry in finding.entries if entry.split == "train"]
        hits = np.isin(ranked[: len(planted)], planted).sum()
        precisions.append(float(hits / len(planted)))
        lengths.append(len(ranked))
        print(f"seed {seed}: {hits} of the first {len(planted)} rows were changed; {len(ranked)} rows of train listed")
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
