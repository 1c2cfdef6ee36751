"""Class names: the file labels.json next to the data, and checks of label values against it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.columns import arrow_column, find_column
from hftl.errors import DataError, first_line, nearest, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset

FILES = ("labels.json", "classes.json")
"""Names of the class name file, in order of precedence."""
FILE = FILES[0]


def read_class_names(folder: Path) -> list[str] | None:
    """Returns the class names of `folder/labels.json` (or classes.json), in order of the integer labels, or None.

    Raises:
        DataError: The file is not a JSON list of unique, non-empty strings.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(names, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source: '{file}' is not valid JSON: {first_line(error)}.") from error
    if file.name != FILE and not isinstance(names, list):
        log(f"data: {file.name} is ignored: not a list of class names")
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"data.source: '{file}' is invalid; allowed: a list of class names in order of the integer labels."
        )
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise DataError(f"data.source: '{file}' has duplicate class names: {shorten(duplicates)}. Rename them.")
    return names


def check_class_names(rows: Dataset, column: str | None, names: Sequence[str] | None) -> None:
    """Checks training labels against `names`; logs labels that differ by case or whitespace only.

    Args:
        rows: Training rows.
        column: Value of `data.label_column`.
        names: Class names from `read_class_names`.

    Raises:
        DataError: Some of the labels are in `names` and some are not.
    """
    try:
        name = find_column("label", rows.features, column).name
    except DataError:
        return  # the task reports it together with its other problems
    dtype = str(getattr(rows.features[name], "dtype", ""))
    is_text = dtype in ("string", "large_string")
    if type(rows.features[name]).__name__ == "ClassLabel" or not is_text and "int" not in dtype:
        return
    values = [value for value in arrow_column(rows, name).unique().to_pylist() if value is not None and value != ""]
    if is_text:
        _log_similar_labels(name, values)
    if names is None or not values:
        return
    known = set(names) if is_text else set(range(len(names)))
    unknown = sorted(value for value in values if value not in known)
    if len(unknown) == len(values):
        log(f"data: {FILE} is ignored: none of its names occurs in column '{name}'")
    elif unknown:
        hint = nearest(unknown[0], names) if is_text else f" (0 to {len(names) - 1})"
        raise DataError(
            f"data.source: {FILE} has {len(names)} classes{hint if not is_text else ''}, but column '{name}' has "
            f"{len(unknown)} other label(s): {shorten([repr(value) for value in unknown])}."
            f"{hint if is_text else ''} Add them to {FILE}, or correct the labels."
        )


def _log_similar_labels(column: str, values: Sequence[Any]) -> None:
    """Logs labels that differ by case or whitespace only; they remain separate classes."""
    by_normalized: dict[str, list[str]] = defaultdict(list)
    for value in values:
        by_normalized[" ".join(value.split()).casefold()].append(value)
    groups = [" and ".join(map(repr, sorted(group))) for group in by_normalized.values() if len(group) > 1]
    if groups:
        log(
            f"data: labels in column '{column}' differ only by case or whitespace and are separate classes: "
            f"{shorten(groups, 5)}"
        )
