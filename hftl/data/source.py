"""Hub id, folder or file -> a `Splits` of memory-mapped rows named train, validation and test."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.console import say
from hftl.data.columns import find_column, label_codes
from hftl.data.quarantine import without
from hftl.errors import DataError, first_line, nearest, shorten

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
EMBEDDED = ("digits",)


@dataclass(frozen=True)
class Splits(Mapping[str, "Dataset"]):
    """Rows by split name (`train`, `validation`, `test`; the last two may be absent), and how they were asked for."""

    sets: dict[str, Dataset]
    config: DataConfig
    class_names: list[str] | None = None
    """Names of integer labels where they stand beside the tables (labels.json), else None."""
    lenient: bool = False
    """Rows that cannot be used are no reason for a task to refuse these: they will be looked for and left out."""

    def __getitem__(self, split: str) -> Dataset:
        return self.sets[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)


def load_splits(
    config: DataConfig, *, training: bool = True, leave_out: Mapping[str, Mapping[int, Any]] | None = None
) -> Splits:
    """Returns the rows that `config` names, cut into splits; nothing is copied into memory.

    A missing validation split is cut from train: stratified by label where there is one, seeded by
    `config.seed`. Test is only ever what the source calls test.

    Args:
        config: The data section of a run.
        training: Whether training rows are needed; a model can be evaluated on a source that has none.
        leave_out: Numbers of rows that are not used, by split; they count the rows of the source's own splits.

    Raises:
        DataError: The source does not exist, holds nothing readable, or has no training rows.
    """
    _bars_on_terminals_only()
    try:
        sets = {name: rows for name, rows in _open(config).items() if len(rows)}
        sets = without(sets, leave_out or {})
    except OSError as error:
        raise DataError(f"data.source: '{config.source}' cannot be read: {error.strerror or error}.") from error
    if not sets or training and "train" not in sets:
        wanted, found = "training rows" if sets else "rows", shorten(list(sets)) or "none"
        raise DataError(f"data.source: '{config.source}' has no {wanted} (splits found: {found}).")
    splits = Splits(sets, config, _names_beside(config.source))
    if "train" in sets:
        sets = _cut_validation(splits)
        sets["train"] = _keep_few(sets["train"], config)
    order = [name for name in SPLIT_NAMES if name in sets]
    say("data: " + ", ".join(f"{name} {len(sets[name])}" for name in order) + f" rows from {config.source}")
    return Splits({name: sets[name] for name in order}, config, splits.class_names)


def _bars_on_terminals_only() -> None:
    """A bar in a log file is thousands of lines of noise."""
    import sys

    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _open(config: DataConfig) -> Mapping[str, Dataset]:
    source = config.source
    if source.startswith("embedded:"):
        return _embedded(source.removeprefix("embedded:"))
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise DataError(
                f"data.source: '{source}' is a {path.suffix or 'nameless'} file; allowed: {', '.join(TABLES)}."
            )
        return _tables({"train": [path]})
    if path.is_dir():
        return _folder(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.parent.is_dir() and "/" in source:
        parent = path.parent if path.parent.is_dir() else Path(".")
        guess = nearest(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
        raise DataError(f"data.source: '{source}' does not exist.{guess}")
    return _hub(config)


def _hub(config: DataConfig) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(config.source, config.subset, revision=config.revision)
    except Exception as error:  # every library below raises its own kinds; the reader needs one sentence
        here = [entry.name for entry in Path(".").iterdir()]
        raise DataError(
            f"data.source: '{config.source}' is not a local folder or file, and as a hub id it failed: "
            f"{type(error).__name__}: {first_line(error)}.{nearest(config.source, here)}"
        ) from error
    return _named(loaded)


def _named(loaded: DatasetDict) -> dict[str, Dataset]:
    """Renames splits to our three names; others (e.g. `unsupervised`) are left out, and that is said."""
    out: dict[str, Dataset] = {}
    for name, rows in loaded.items():
        ours = _split_of(str(name))
        if ours is None or ours in out:
            say(f"data: split '{name}' is not used")
        else:
            out[ours] = rows
    return out


def _split_of(name: str) -> str | None:
    """Returns the split a folder or file name stands for: `val` -> validation, `train-00000-of-00002` -> train."""
    first = re.split(r"[^a-z]+", name.lower())[0]
    return next((ours for ours, names in SPLIT_NAMES.items() if first in names), None)


def _folder(path: Path) -> Mapping[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(str(path))
        return _named(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    tables: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        beside = file.name in ("labels.json", "metadata.csv", "metadata.jsonl")
        if file.is_file() and file.suffix.lower() in TABLES and not beside:
            tables.setdefault(_split_of(file.stem) or file.stem, []).append(file)
    named = {name: files for name, files in tables.items() if name in SPLIT_NAMES}
    if named or tables and not _split_folders(path):
        if not named and len(tables) > 1:
            names = shorten([file.name for files in tables.values() for file in files])
            raise DataError(
                f"data.source: no table in '{path}' is named after a split ({names}); name one train, or give one file."
            )
        for file in (file for name, files in tables.items() if named and name not in named for file in files):
            say(f"data: '{file.name}' is not used")
        return _tables(named or {"train": next(iter(tables.values()))})
    return _images(path)


def _tables(files: Mapping[str, list[Path]]) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    out: dict[str, Dataset] = {}
    for split, paths in files.items():
        kinds = {path.suffix.lower() for path in paths}
        if len(kinds) > 1:
            raise DataError(
                f"data.source: split {split} mixes {', '.join(sorted(kinds))} files: "
                f"{shorten([path.name for path in paths])}."
            )
        kind = kinds.pop()
        # only an empty cell is missing: "None", "NA" and "null" are words and class names
        options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if TABLES[kind] == "csv" else {}
        options |= {"sep": "\t"} if kind == ".tsv" else {}
        try:
            names = [glob.escape(str(path)) for path in paths]
            out[split] = load_dataset(TABLES[kind], data_files={split: names}, split=split, **options)
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            reason = "it holds no rows" if "corresponds to no data" in reason else reason
            raise DataError(f"data.source: cannot read {shorten([str(p) for p in paths])}: {reason}") from error
    return out


def _images(path: Path) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    folders = _split_folders(path)
    for sub in sorted(path.iterdir()):
        if folders and sub.is_dir() and sub not in folders.values():
            say(f"data: folder '{sub.name}' is not used")
    folders = folders or {"train": path}
    for folder in folders.values():
        if not any(file.suffix.lower() in IMAGES for file in folder.rglob("*")):
            found = shorten(sorted({file.suffix or file.name for file in folder.rglob("*") if file.is_file()}))
            raise DataError(f"data.source: no images in {folder} (file types found: {found or 'none'}).")
    patterns = {split: f"{glob.escape(str(folder.resolve()))}/**" for split, folder in folders.items()}
    # the library leaves labels out of a split until it has seen two classes; folders of classes have them for sure
    class_folders = all(_has_class_folders(folder) for folder in folders.values())
    labels: dict[str, Any] = {"drop_labels": False} if class_folders else {}
    # one call, because classes are numbered over all the splits that are read together
    return load_dataset("imagefolder", data_files=patterns, **labels)


def _has_class_folders(folder: Path) -> bool:
    """Whether all files are exactly one folder down, and no metadata file says otherwise."""
    if any(entry.is_file() and not entry.name.startswith(".") for entry in os.scandir(folder)):
        return False
    inside = (entry for sub in os.scandir(folder) if sub.is_dir() for entry in os.scandir(sub))
    return not any(entry.is_dir() or entry.name.startswith("metadata.") for entry in inside)


def _split_folders(path: Path) -> dict[str, Path]:
    """Returns the folders named after splits; of `train` and `train_old` the first."""
    out: dict[str, Path] = {}
    for sub in sorted(path.iterdir()):
        split = _split_of(sub.name)
        if split and sub.is_dir():
            out.setdefault(split, sub)
    return out


def _embedded(name: str) -> Mapping[str, Dataset]:
    if name not in EMBEDDED:
        raise DataError(f"data.source: embedded data are {', '.join(EMBEDDED)}, not '{name}'.{nearest(name, EMBEDDED)}")
    from hftl.data.digits import load_digits

    return load_digits()


def _names_beside(source: str) -> list[str] | None:
    path = Path(source).expanduser()
    file = (path if path.is_dir() else path.parent) / "labels.json"
    if source.startswith("embedded:") or not path.exists() or not file.is_file():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"data.source: {file} is not valid JSON: {error}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"data.source: {file} must hold a list of class names, in the order of the label numbers.")
    return names


def _cut_validation(splits: Splits) -> dict[str, Dataset]:
    """Returns the splits with a validation part cut from train where it was missing."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    config, sets = splits.config, dict(splits.sets)
    if "validation" in sets or config.validation_fraction == 0:
        return sets
    rows = sets["train"]
    codes = _codes(rows, config)
    # a class with a single row cannot stand on both sides
    stratify = codes if codes is not None and np.unique(codes, return_counts=True)[1].min() > 1 else None
    size = max(round(len(rows) * config.validation_fraction), 1 if stratify is None else len(np.unique(stratify)))
    try:
        kept, cut = train_test_split(np.arange(len(rows)), test_size=size, random_state=config.seed, stratify=stratify)
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction: {len(rows)} training rows are too few to cut a validation split ({error}). "
            "Give a validation split, or --data.validation_fraction 0 to train without one."
        ) from error
    how = "stratified by label" if stratify is not None else "at random"
    say(f"data: no validation split; {size} of {len(rows)} training rows cut off {how} (data.seed {config.seed})")
    return {**sets, "train": rows.select(np.sort(kept)), "validation": rows.select(np.sort(cut))}


def _keep_few(rows: Dataset, config: DataConfig) -> Dataset:
    """Returns at most `config.train_per_class` rows of each class."""
    import numpy as np

    codes = _codes(rows, config)
    if config.train_per_class is None or codes is None:
        return rows
    order = np.random.default_rng(config.seed).permutation(len(rows))
    kept = [order[codes[order] == code][: config.train_per_class] for code in np.unique(codes)]
    return rows.select(np.sort(np.concatenate(kept)))


def _codes(rows: Dataset, config: DataConfig) -> Any:
    """Returns the label of each row as an integer [N], or None where the labels are not classes."""
    try:
        column = find_column("label", rows.features, config.label_column)
    except DataError:
        return None  # said later, by the task, with everything else
    return label_codes(rows, column.name)
