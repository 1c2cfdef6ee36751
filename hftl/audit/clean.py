"""A cleaned copy of data: which rows are left out, and how the rest is written so that hftl opens it again.

Test rows are never left out, and validation rows only where nothing can be measured on them or test has them too:
figures on another test set are other figures.
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
    "train: rows that cannot be read, are empty or have no label; rows that validation or test has too; all rows that "
    "contradict each other's labels; of rows that are the same, all but the first. validation: rows that cannot be "
    "read, are empty or have no label; rows that test has too. test: none. Near duplicates and likely wrong labels "
    "stay: they are for a person to judge."
)
"""The rules, as they are printed."""
_BATCH = 256


def folder_problem(folder: str, source: str) -> str | None:
    """Returns why a cleaned copy of `source` cannot be written to `folder`; None if it can."""
    place, origin = Path(folder).expanduser().resolve(), Path(source).expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        return f"--fix: '{folder}' exists and is not an empty folder; name a new one."
    origin = origin if origin.is_dir() else origin.parent
    if Path(source).expanduser().exists() and (place == origin or Path(source).is_dir() and origin in place.parents):
        return f"--fix: '{folder}' is inside the data, which are never changed; name a folder elsewhere."
    return None


def rows_to_leave_out(
    unusable: Mapping[int, str], groups: Groups, labels: Labels, numbering: Numbering
) -> dict[str, dict[int, str]]:
    """Returns the rows that a cleaned copy lacks, with the reason, by split.

    Args:
        unusable: Reasons by number, of rows that cannot be read, are empty or have no label.
        groups: Rows that are the same.
        labels: Of all rows.
        numbering: Of all rows.
    """
    reasons: dict[int, str] = dict(unusable)
    for group in groups.groups:
        places = numbering.split_of(group)
        for number, place in zip(group.tolist(), places.tolist(), strict=True):
            later = [numbering.splits[each] for each in np.unique(places[places > place])]
            if later:
                reasons.setdefault(number, f"stands in {' and '.join(later)} too")
    train = numbering.of_split("train")
    for group in conflicting(groups, labels):
        inside = group[(group >= train.start) & (group < train.stop)]
        if len(np.unique(labels.codes[inside])) > 1:
            for number in inside.tolist():
                reasons.setdefault(number, "the same input has another label too")
    for group in groups.groups:
        inside = [n for n in group.tolist() if train.start <= n < train.stop and n not in reasons]
        for number in inside[1:]:
            reasons[number] = f"the same as row {numbering.address(inside[0])[1]}"
    out: dict[str, dict[int, str]] = {split: {} for split in numbering.splits}
    for number, reason in sorted(reasons.items()):
        split, row = numbering.address(number)
        if split != "test":
            out[split][row] = reason
    return out


def write_cleaned(splits: Splits, left_out: Mapping[str, Mapping[int, str]], folder: str) -> str:
    """Writes the rows that remain into a new folder, whole or not at all, and returns how: as images or as tables.

    Images in class folders are copied, file by file, into class folders again; everything else becomes a Parquet file
    for each split, images inside.

    Args:
        splits: All rows.
        left_out: From `rows_to_leave_out`.
        folder: Where to; see `folder_problem`.

    Raises:
        ConfigError: The folder cannot be written.
        DataError: A file of the data is gone; train or validation would have no rows left.
    """
    target = Path(folder).expanduser()
    aside = target.with_name(target.name + PARTIAL)
    kept = {split: np.delete(np.arange(len(rows)), list(left_out.get(split, {}))) for split, rows in splits.items()}
    if not len(kept["train"]):
        raise DataError("--fix: no training row would be left; the data need a person, not a filter.")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--fix: '{aside}' cannot be made: {error.strerror or error}.") from error
    try:
        by_class = {split: class_files(rows) for split, rows in splits.items()}
        for split, rows in splits.items():
            files = by_class[split]
            if all(by_class.values()) and files:
                _copy_files(files, kept[split], aside / split)
            elif len(kept[split]):
                _write_table(rows, kept[split], aside / f"{split}.parquet")
        if splits.class_names and not all(by_class.values()):
            (aside / LABELS).write_text(json.dumps(splits.class_names, ensure_ascii=False), encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        raise disk_error(error, aside) or DataError(f"--fix: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return "class folders of images" if all(by_class.values()) else "Parquet files"


def class_files(rows: Dataset) -> list[tuple[str, str]] | None:
    """Returns class and path of each row where the rows are the files of class folders, else None."""
    from datasets import Image

    if set(rows.features) != {"image", "label"} or type(rows.features["image"]).__name__ != "Image":
        return None
    names = getattr(find_column("label", rows.features, "label") and rows.features["label"], "names", None)
    stored = rows.cast_column("image", Image(decode=False))
    found = []
    for start in range(0, len(rows), 1_000):
        table: Any = stored[start : start + 1_000]
        for image, code in zip(table["image"], table["label"], strict=True):
            path = Path((image or {}).get("path") or "")
            if names is None or code is None or image.get("bytes") is not None or path.parent.name != names[code]:
                return None
            found.append((names[code], str(path)))
    return found


def _copy_files(files: list[tuple[str, str]], kept: Any, folder: Path) -> None:
    for row in kept.tolist():
        name, path = files[row]
        place = folder / name / Path(path).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place if not place.exists() else place.with_name(f"{row}-{place.name}"))


def _write_table(rows: Dataset, kept: Any, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, rows.features.arrow_schema) as writer:
        for start in range(0, len(kept), _BATCH):
            chosen = rows.select(kept[start : start + _BATCH]).with_format("arrow")[:]
            table = _with_bytes(pa.table(chosen), rows)  # pyright: ignore[reportArgumentType]
            writer.write_table(table.cast(rows.features.arrow_schema))


def _with_bytes(table: pa.Table, rows: Dataset) -> pa.Table:
    """Returns the rows with the bytes of images that were paths; a file that is gone stays a path."""
    import pyarrow as pa

    for name, kind in rows.features.items():
        if type(kind).__name__ != "Image":
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
