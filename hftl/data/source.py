"""Data sources: opens a repo id, folder or file as memory-mapped train, validation and test splits."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.class_names import FILES as LABELS
from hftl.data.class_names import check_class_names, read_class_names
from hftl.data.layouts.detection_folders import open_detection_folders
from hftl.data.layouts.in_memory import GIVEN, dataset_from_rows
from hftl.data.layouts.mask_folders import open_mask_folders
from hftl.data.paths import IMAGES, cast_path_columns, stored_path_problems
from hftl.data.splits import (
    SPLIT_NAMES,
    Splits,
    first_word,
    limit_samples_per_class,
    parse_split_name,
    split_folders,
    split_off_validation,
)
from hftl.data.tables.table_files import TABLES, open_tables, select_split_files
from hftl.data.validation import drop_rows
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
    """Opens `config.source` as splits; rows are memory-mapped.

    If the source has no validation split, one is split off train, stratified by label where possible and seeded by
    `config.seed`. The test split is never created.

    Args:
        config: Data section of the configuration.
        training: Whether training rows are required; evaluation accepts sources without them.
        rows: Rows from Python in place of `config.source`; see `dataset_from_rows`. Their image paths may point
            anywhere on this machine.
        leave_out: Row numbers to skip, by split, counted in the original splits of the source.

    Raises:
        DataError: The source does not exist, has no readable files, has paths outside of its folder, or has no
            training rows.
    """
    _disable_bars_in_log_files()
    try:
        opened = _open(config) if rows is None else _from_python(rows, config)
        sets = drop_rows({name: dataset for name, dataset in opened.items() if len(dataset)}, leave_out or {})
    except OSError as error:
        raise DataError(f"data.source: cannot read '{config.source}': {error.strerror or error}.") from error
    if not sets or training and "train" not in sets:
        missing, names = "training rows" if sets else "rows", shorten(list(sets)) or "none"
        raise DataError(f"data.source: '{config.source}' has no {missing} (splits found: {names}).")
    folder = _local_folder(config.source)
    splits = Splits(sets, config, read_class_names(folder) if folder else None)
    original = set(sets)
    if "train" in sets:
        check_class_names(sets["train"], config.label_column, splits.class_names)
        sets = split_off_validation(splits)
        sets["train"] = limit_samples_per_class(sets["train"], config)
    order = [name for name in SPLIT_NAMES if name in sets]
    log("data: " + ", ".join(f"{name} {len(sets[name])}" for name in order) + f" rows from {config.source}")
    cut = "validation" in {*sets} - original
    return Splits({name: sets[name] for name in order}, config, splits.class_names, cut)


def _disable_bars_in_log_files() -> None:
    import sys

    from datasets import disable_progress_bars

    if not sys.stderr.isatty():  # a bar writes thousands of lines to a file
        disable_progress_bars()


def _open(config: DataConfig) -> Mapping[str, Dataset]:
    source = config.source
    if source.startswith("embedded:"):
        return _embedded(source.removeprefix("embedded:"))
    path = Path(source).expanduser()
    if source.startswith(GIVEN):
        raise DataError(
            f"data.source: '{source}' are rows passed from Python and cannot be reopened by name. "
            "Pass a file, folder or repo id."
        )
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            file_type = f"a {path.suffix} file" if path.suffix else "a file without extension"
            raise DataError(f"data.source: '{source}' is {file_type}; allowed: {', '.join(TABLES)}.")
        return cast_path_columns(open_tables({"train": [path]}), config, path.parent)
    if path.is_dir():
        return _open_folder(path, config)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.parent.is_dir() and "/" in source:
        parent = path.parent if path.parent.is_dir() else Path(".")
        guess = nearest(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
        raise DataError(f"data.source: '{source}' does not exist.{guess}")
    return _open_hub(config)


def _from_python(rows: Any, config: DataConfig) -> Mapping[str, Dataset]:
    """Opens rows from Python; the caller is trusted, so image paths are unrestricted, but URLs are rejected."""
    opened = _rename_splits(dataset_from_rows(rows))
    return cast_path_columns(opened, config, Path.cwd(), within=Path("/")) if opened else {}


def _open_hub(config: DataConfig) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(config.source, config.subset, revision=config.revision)
    except Exception as error:  # the libraries raise many types
        local = [entry.name for entry in Path(".").iterdir()]
        raise DataError(
            f"data.source: '{config.source}' is not a local folder or file, and loading it as a repo id failed: "
            f"{type(error).__name__}: {first_line(error)}.{nearest(config.source, local)}"
        ) from error
    return cast_path_columns(_rename_splits(loaded), config, None)


def _rename_splits(loaded: Mapping[Any, Dataset]) -> dict[str, Dataset]:
    """Renames splits to train, validation and test; logs and skips others (e.g. `unsupervised`)."""
    out: dict[str, Dataset] = {}
    for name, rows in loaded.items():
        split = parse_split_name(str(name))
        if split is None or split in out:
            log(f"data: split '{name}' is ignored")
        else:
            out[split] = rows
    return out


def _open_folder(path: Path, config: DataConfig) -> Mapping[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"data.source: cannot read the saved dataset '{path}': {first_line(error)}") from error
        sets = _rename_splits(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
        return cast_path_columns(sets, config, path)
    detection = open_detection_folders(path, config)
    if detection:
        return detection
    segmentation = open_mask_folders(path)
    if segmentation:
        return segmentation
    tables: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    for file in sorted(path.iterdir()):
        is_auxiliary = file.name in (*LABELS, *METADATA)
        if file.is_file() and file.suffix.lower() in TABLES and not is_auxiliary:
            split, word = parse_split_name(file.stem), first_word(file.stem)
            if split:
                tables.setdefault(split, {}).setdefault(word, []).append(file)
            else:
                others.append(file)
    if tables or others and not split_folders(path):
        if not tables and len(others) > 1:
            names = shorten([file.name for file in others])
            raise DataError(
                f"data.source: no table in '{path}' has the name of a split ({names}). Rename one to train, or pass a "
                "single file."
            )
        selected = {split: select_split_files(path, split, files) for split, files in tables.items()}
        candidates = {*others, *(file for words in tables.values() for files in words.values() for file in files)}
        for file in sorted(candidates - {file for files in selected.values() for file in files} if selected else ()):
            log(f"data: '{file.name}' is ignored")
        return cast_path_columns(open_tables(selected or {"train": others}), config, path)
    return _open_image_folder(path)


def _open_image_folder(path: Path) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    folders = split_folders(path)
    for sub in sorted(path.iterdir()):
        if folders and sub.is_dir() and sub not in folders.values():
            log(f"data: folder '{sub.name}' is ignored")
    folders = folders or {"train": path}
    for folder in folders.values():
        if not any(file.suffix.lower() in IMAGES for file in folder.rglob("*")):
            types = shorten(sorted({file.suffix or file.name for file in folder.rglob("*") if file.is_file()}))
            raise DataError(f"data.source: no images in '{folder}' (file types found: {types or 'none'}).")
    patterns = {split: _file_patterns(folder) for split, folder in folders.items()}
    # imagefolder drops the labels of a split with a single class folder
    has_labels = all(_has_class_folders(folder) for folder in folders.values())
    labels: dict[str, Any] = {"drop_labels": False} if has_labels else {}
    try:
        # one call for all splits: class indices are shared
        loaded = load_dataset("imagefolder", data_files=patterns, **labels)
    except Exception as error:  # mostly invalid metadata files
        raise DataError(f"data.source: cannot read '{path}': {first_line(error.__cause__ or error)}") from error
    has_metadata = any("metadata." in pattern for by_split in patterns.values() for pattern in by_split)
    for split, folder in folders.items():
        columns = [name for name, kind in loaded[split].features.items() if type(kind).__name__ == "Image"]
        for column in columns:
            problems = stored_path_problems({split: loaded[split]}, column, folder, follow=not has_metadata)
            if problems:
                raise DataError(*problems)
    return loaded


def _file_patterns(folder: Path) -> list[str]:
    """Returns glob patterns of the images and metadata tables of a folder.

    Without patterns, imagefolder would also unpack zip files.
    """
    root = glob.escape(str(folder.resolve()))
    files = [file for file in folder.rglob("*") if not file.name.startswith(".")]
    extensions = sorted({file.suffix for file in files if file.suffix.lower() in IMAGES})
    metadata = sorted({file.name for file in files if file.name in METADATA})
    return [f"{root}/**/*{extension}" for extension in extensions] + [f"{root}/**/{name}" for name in metadata]


def _has_class_folders(folder: Path) -> bool:
    """Whether all files are in direct subfolders, without metadata tables."""
    if any(entry.is_file() and not entry.name.startswith(".") for entry in os.scandir(folder)):
        return False
    entries = (entry for sub in os.scandir(folder) if sub.is_dir() for entry in os.scandir(sub))
    return not any(entry.is_dir() or entry.name.startswith("metadata.") for entry in entries)


def _embedded(name: str) -> Mapping[str, Dataset]:
    if name not in EMBEDDED:
        raise DataError(
            f"data.source: 'embedded:{name}' does not exist; allowed: "
            f"{', '.join(f'embedded:{known}' for known in EMBEDDED)}.{nearest(name, EMBEDDED)}"
        )
    from hftl.data.layouts.digits import load_digits

    return load_digits()


def _local_folder(source: str) -> Path | None:
    """Returns the folder of local data, which contains labels.json and table images; None for other sources."""
    path = Path(source).expanduser()
    if source.startswith("embedded:") or not path.exists():
        return None
    return path if path.is_dir() else path.parent
