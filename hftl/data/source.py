"""Hub id, folder or file -> a `Splits` of memory-mapped rows named train, validation and test."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.class_names import FILES as LABELS
from hftl.data.class_names import check_labels, read_class_names
from hftl.data.layouts.detection_folders import open_detection_folders
from hftl.data.layouts.in_memory import GIVEN, dataset_from_rows
from hftl.data.layouts.mask_folders import open_mask_folders
from hftl.data.paths import IMAGES, check_stored, with_images
from hftl.data.splits import SPLIT_NAMES, Splits, cut_validation, first_word, keep_few, split_folders, split_of
from hftl.data.tables.table_files import TABLES, files_of_split, open_tables
from hftl.data.validation import without
from hftl.errors import DataError, first_line, nearest, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
EMBEDDED = ("digits",)


def load_splits(
    config: DataConfig,
    *,
    training: bool = True,
    rows: Any = None,
    leave_out: Mapping[str, Mapping[int, Any]] | None = None,
) -> Splits:
    """Returns the rows that `config` names, cut into splits; nothing is copied into memory.

    A missing validation split is cut from train: stratified by label where there is one, seeded by
    `config.seed`. Test is only ever what the source calls test.

    Args:
        config: The data section of a run.
        training: Whether training rows are needed; a model can be evaluated on a source that has none.
        rows: Rows from Python in place of `config.source`, as `dataset_from_rows` takes them; their image paths are
            the caller's own.
        leave_out: Numbers of rows that are not used, by split; they count the rows of the source's own splits.

    Raises:
        DataError: The source does not exist, holds nothing readable, names files outside of it, or has no training
            rows.
    """
    _bars_on_terminals_only()
    try:
        opened = _open(config) if rows is None else _given(rows, config)
        sets = without({name: part for name, part in opened.items() if len(part)}, leave_out or {})
    except OSError as error:
        raise DataError(f"data.source: '{config.source}' cannot be read: {error.strerror or error}.") from error
    if not sets or training and "train" not in sets:
        wanted, found = "training rows" if sets else "rows", shorten(list(sets)) or "none"
        raise DataError(f"data.source: '{config.source}' has no {wanted} (splits found: {found}).")
    folder = _folder_of(config.source)
    splits = Splits(sets, config, read_class_names(folder) if folder else None)
    given = set(sets)
    if "train" in sets:
        check_labels(sets["train"], config.label_column, splits.class_names)
    if "train" in sets:
        sets = cut_validation(splits)
        sets["train"] = keep_few(sets["train"], config)
    order = [name for name in SPLIT_NAMES if name in sets]
    log("data: " + ", ".join(f"{name} {len(sets[name])}" for name in order) + f" rows from {config.source}")
    cut = "validation" in {*sets} - given
    return Splits({name: sets[name] for name in order}, config, splits.class_names, cut)


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
    if source.startswith(GIVEN):
        raise DataError(
            f"data.source: '{source}' are rows that were given from Python; they cannot be opened again by name. "
            "Give other data by a file, folder or hub id."
        )
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise DataError(
                f"data.source: '{source}' is a {path.suffix or 'nameless'} file; allowed: {', '.join(TABLES)}."
            )
        return with_images(open_tables({"train": [path]}), config, path.parent)
    if path.is_dir():
        return _folder(path, config)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.parent.is_dir() and "/" in source:
        parent = path.parent if path.parent.is_dir() else Path(".")
        guess = nearest(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
        raise DataError(f"data.source: '{source}' does not exist.{guess}")
    return _hub(config)


def _given(rows: Any, config: DataConfig) -> Mapping[str, Dataset]:
    """Opens rows from Python, whose paths are those of the code that gives them: only addresses are refused."""
    opened = _named(dataset_from_rows(rows))
    return with_images(opened, config, Path.cwd(), within=Path("/")) if opened else {}


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
    return with_images(_named(loaded), config, None)


def _named(loaded: Mapping[Any, Dataset]) -> dict[str, Dataset]:
    """Renames splits to our three names; others (e.g. `unsupervised`) are left out, and that is said."""
    out: dict[str, Dataset] = {}
    for name, rows in loaded.items():
        ours = split_of(str(name))
        if ours is None or ours in out:
            log(f"data: split '{name}' is not used")
        else:
            out[ours] = rows
    return out


def _folder(path: Path, config: DataConfig) -> Mapping[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"data.source: cannot read the saved data set '{path}': {first_line(error)}") from error
        return with_images(_named(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}, config, path)
    with_boxes = open_detection_folders(path, config)
    if with_boxes:
        return with_boxes
    with_masks = open_mask_folders(path)
    if with_masks:
        return with_masks
    tables: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    for file in sorted(path.iterdir()):
        beside = file.name in (*LABELS, *METADATA)
        if file.is_file() and file.suffix.lower() in TABLES and not beside:
            split, word = split_of(file.stem), first_word(file.stem)
            if split:
                tables.setdefault(split, {}).setdefault(word, []).append(file)
            else:
                others.append(file)
    if tables or others and not split_folders(path):
        if not tables and len(others) > 1:
            names = shorten([file.name for file in others])
            raise DataError(
                f"data.source: no table in '{path}' is named after a split ({names}); name one train, or give one file."
            )
        found = {split: files_of_split(path, split, files) for split, files in tables.items()}
        left = {file for files in tables.values() for several in files.values() for file in several}
        for file in sorted({*others, *left} - {file for files in found.values() for file in files} if found else ()):
            log(f"data: '{file.name}' is not used")
        return with_images(open_tables(found or {"train": others}), config, path)
    return _images(path)


def _images(path: Path) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    folders = split_folders(path)
    for sub in sorted(path.iterdir()):
        if folders and sub.is_dir() and sub not in folders.values():
            log(f"data: folder '{sub.name}' is not used")
    folders = folders or {"train": path}
    for folder in folders.values():
        if not any(file.suffix.lower() in IMAGES for file in folder.rglob("*")):
            found = shorten(sorted({file.suffix or file.name for file in folder.rglob("*") if file.is_file()}))
            raise DataError(f"data.source: no images in {folder} (file types found: {found or 'none'}).")
    patterns = {split: _patterns(folder) for split, folder in folders.items()}
    # the library leaves labels out of a split until it has seen two classes; folders of classes have them for sure
    class_folders = all(_has_class_folders(folder) for folder in folders.values())
    labels: dict[str, Any] = {"drop_labels": False} if class_folders else {}
    try:
        # one call, because classes are numbered over all the splits that are read together
        loaded = load_dataset("imagefolder", data_files=patterns, **labels)
    except Exception as error:  # of metadata files, mostly
        raise DataError(f"data.source: cannot read '{path}': {first_line(error.__cause__ or error)}") from error
    named = any("metadata." in pattern for patterns_of in patterns.values() for pattern in patterns_of)
    for split, folder in folders.items():
        columns = [name for name, kind in loaded[split].features.items() if type(kind).__name__ == "Image"]
        for column in columns:
            problems = check_stored({split: loaded[split]}, column, folder, follow=not named)
            if problems:
                raise DataError(*problems)
    return loaded


def _patterns(folder: Path) -> list[str]:
    """Returns patterns for the images of a folder, and for the tables that describe them.

    The library would also unpack what zip files it finds.
    """
    root = glob.escape(str(folder.resolve()))
    seen = [file for file in folder.rglob("*") if not file.name.startswith(".")]
    endings = sorted({file.suffix for file in seen if file.suffix.lower() in IMAGES})
    beside = sorted({file.name for file in seen if file.name in METADATA})
    return [f"{root}/**/*{ending}" for ending in endings] + [f"{root}/**/{name}" for name in beside]


def _has_class_folders(folder: Path) -> bool:
    """Whether all files are exactly one folder down, and no metadata file says otherwise."""
    if any(entry.is_file() and not entry.name.startswith(".") for entry in os.scandir(folder)):
        return False
    inside = (entry for sub in os.scandir(folder) if sub.is_dir() for entry in os.scandir(sub))
    return not any(entry.is_dir() or entry.name.startswith("metadata.") for entry in inside)


def _embedded(name: str) -> Mapping[str, Dataset]:
    if name not in EMBEDDED:
        raise DataError(f"data.source: embedded data are {', '.join(EMBEDDED)}, not '{name}'.{nearest(name, EMBEDDED)}")
    from hftl.data.layouts.digits import load_digits

    return load_digits()


def _folder_of(source: str) -> Path | None:
    """Returns the folder of local data: where labels.json stands, and where images of tables lie."""
    path = Path(source).expanduser()
    if source.startswith("embedded:") or not path.exists():
        return None
    return path if path.is_dir() else path.parent
