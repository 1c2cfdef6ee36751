"""Cleaned copies of data: rules of removal, and writing of the remaining rows for `data.source`.

Test rows are never removed, because results on another test set are not comparable. Validation rows are removed
only if they are invalid or occur in test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.atomic_files import PARTIAL
from hftl.audit.class_balance import Labels
from hftl.audit.duplicates import Groups, conflicting
from hftl.audit.finding import Numbering
from hftl.data.class_names import FILE as LABELS
from hftl.data.columns import find_column
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError, disk_error

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LEFT_OUT = (
    "train: unreadable, empty or unlabeled rows, rows that are also in validation or test, rows with conflicting "
    "labels, and all but the first of duplicates. validation: unreadable, empty or unlabeled rows, and rows that are "
    "also in test. test: none. Near-duplicates and label errors stay, for manual review."
)
"""Rules of removal, as logged."""
_BATCH = 256


def folder_problem(folder: str, source: str) -> str | None:
    """Returns the reason why a cleaned copy of `source` cannot be written to `folder`; None if it can."""
    target, data = Path(folder).expanduser().resolve(), Path(source).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return f"--fix: '{folder}' exists and is not an empty folder. Pass a new folder."
    data = data if data.is_dir() else data.parent
    if Path(source).expanduser().exists() and (target == data or Path(source).is_dir() and data in target.parents):
        return f"--fix: '{folder}' is inside the data folder. Pass a folder outside of it."
    return None


def rows_to_leave_out(
    unusable: Mapping[int, str], groups: Groups, labels: Labels, numbering: Numbering
) -> dict[str, dict[int, str]]:
    """Returns the rows that a cleaned copy omits, with the reason, by split.

    Args:
        unusable: Reasons of unreadable, empty or unlabeled rows, by row number.
        groups: Groups of duplicates.
        labels: Labels of all rows.
        numbering: Row numbers over all splits.
    """
    reasons: dict[int, str] = dict(unusable)
    for group in groups.groups:
        split_indices = numbering.split_of(group)
        for number, index in zip(group.tolist(), split_indices.tolist(), strict=True):
            later = [numbering.splits[each] for each in np.unique(split_indices[split_indices > index])]
            if later:
                reasons.setdefault(number, f"also in {' and '.join(later)}")
    train = numbering.of_split("train")
    for group in conflicting(groups, labels):
        in_train = group[(group >= train.start) & (group < train.stop)]
        if len(np.unique(labels.codes[in_train])) > 1:
            for number in in_train.tolist():
                reasons.setdefault(number, "conflicting labels")
    for group in groups.groups:
        in_train = [n for n in group.tolist() if train.start <= n < train.stop and n not in reasons]
        for number in in_train[1:]:
            reasons[number] = f"duplicate of row {numbering.address(in_train[0])[1]}"
    left_out: dict[str, dict[int, str]] = {split: {} for split in numbering.splits}
    for number, reason in sorted(reasons.items()):
        split, row = numbering.address(number)
        if split != "test":
            left_out[split][row] = reason
    return left_out


def write_cleaned(splits: Splits, left_out: Mapping[str, Mapping[int, str]], folder: str) -> str:
    """Writes the remaining rows atomically to a new folder and returns the layout, for logging.

    Images in class folders are copied file by file to class folders. All other data become one Parquet file per
    split, with embedded images.

    Args:
        splits: All rows.
        left_out: Rows to omit, from `rows_to_leave_out`.
        folder: New folder; see `folder_problem`.

    Raises:
        ConfigError: The folder cannot be written.
        DataError: A file of the data is missing, or no training row remains.
    """
    target = Path(folder).expanduser()
    partial = target.with_name(target.name + PARTIAL)
    remaining = {
        split: np.delete(np.arange(len(rows)), list(left_out.get(split, {}))) for split, rows in splits.items()
    }
    if not len(remaining["train"]):
        raise DataError("--fix: the rules of removal leave no training row. Fix the data manually.")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--fix: '{partial}' cannot be created: {error.strerror or error}.") from error
    try:
        files = {split: class_files(rows) for split, rows in splits.items()}
        for split, rows in splits.items():
            split_files = files[split]
            if all(files.values()) and split_files:
                _copy_files(split_files, remaining[split], partial / split)
            elif len(remaining[split]):
                _write_table(rows, remaining[split], partial / f"{split}.parquet")
        if splits.class_names and not all(files.values()):
            (partial / LABELS).write_text(json.dumps(splits.class_names, ensure_ascii=False), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise disk_error(error, partial) or DataError(f"--fix: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "class folders of images" if all(files.values()) else "Parquet files"


def class_files(rows: Dataset) -> list[tuple[str, str]] | None:
    """Returns class and path of each row if the rows are files in class folders, else None."""
    from datasets import Image

    if set(rows.features) != {"image", "label"} or type(rows.features["image"]).__name__ != "Image":
        return None
    names = getattr(find_column("label", rows.features, "label") and rows.features["label"], "names", None)
    stored = rows.cast_column("image", Image(decode=False))
    files = []
    for start in range(0, len(rows), 1_000):
        table: Any = stored[start : start + 1_000]
        for image, code in zip(table["image"], table["label"], strict=True):
            path = Path((image or {}).get("path") or "")
            if names is None or code is None or image.get("bytes") is not None or path.parent.name != names[code]:
                return None
            files.append((names[code], str(path)))
    return files


def _copy_files(files: list[tuple[str, str]], remaining: Any, folder: Path) -> None:
    for row in remaining.tolist():
        name, path = files[row]
        target = folder / name / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target if not target.exists() else target.with_name(f"{row}-{target.name}"))


def _write_table(rows: Dataset, remaining: Any, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, rows.features.arrow_schema) as writer:
        for start in range(0, len(remaining), _BATCH):
            batch = rows.select(remaining[start : start + _BATCH]).with_format("arrow")[:]
            table = _with_bytes(pa.table(batch), rows)  # pyright: ignore[reportArgumentType]
            writer.write_table(table.cast(rows.features.arrow_schema))


def _with_bytes(table: pa.Table, rows: Dataset) -> pa.Table:
    """Embeds the bytes of images stored as paths; a missing file stays a path."""
    import pyarrow as pa

    for name, feature in rows.features.items():
        if type(feature).__name__ != "Image":
            continue
        images = []
        for image in table.column(name).to_pylist():
            path = Path((image or {}).get("path") or "")
            if image and image["bytes"] is None and path.is_file():
                image = {"bytes": path.read_bytes(), "path": path.name}
            images.append(image)
        column = pa.array(images, table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table
