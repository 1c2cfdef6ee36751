"""What classes are called: the names beside a table, and names that only look different."""

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
"""Names of the file beside the data, the first that is there."""
FILE = FILES[0]


def read_class_names(folder: Path) -> list[str] | None:
    """Returns the class names in `folder/labels.json` (or classes.json), in the order of the label numbers, or None.

    Raises:
        DataError: The file is not a JSON list of different names.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(names, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source: {file} is not valid JSON: {first_line(error)}.") from error
    if file.name != FILE and not isinstance(names, list):
        log(f"data: {file.name} is not used: it is not a list of class names")
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"data.source: {file} must hold a list of class names, in the order of the label numbers.")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"data.source: {file} has the name(s) {shorten(twice)} more than once; each class has its own.")
    return names


def check_labels(rows: Dataset, column: str | None, names: Sequence[str] | None) -> None:
    """Looks at the labels of the training rows: says which names look alike.

    Args:
        rows: Training rows.
        column: `data.label_column`.
        names: From `read_class_names`.

    Raises:
        DataError: Some of the labels are in `names` and some are not.
    """
    try:
        name = find_column("label", rows.features, column).name
    except DataError:
        return  # said later, by the task, with everything else
    kind = str(getattr(rows.features[name], "dtype", ""))
    is_text = kind in ("string", "large_string")
    if type(rows.features[name]).__name__ == "ClassLabel" or not is_text and "int" not in kind:
        return
    values = [value for value in arrow_column(rows, name).unique().to_pylist() if value is not None and value != ""]
    if is_text:
        _say_alike(name, values)
    if names is None or not values:
        return
    fitting = set(names) if is_text else set(range(len(names)))
    strange = sorted(value for value in values if value not in fitting)
    if len(strange) == len(values):
        log(f"data: {FILE} is not used: it names none of the labels in column '{name}'")
    elif strange:
        hint = nearest(strange[0], names) if is_text else f" (0 to {len(names) - 1})"
        raise DataError(
            f"data.source: {FILE} names {len(names)} classes{hint if not is_text else ''}, but column '{name}' has "
            f"{len(strange)} other label(s): {shorten([repr(value) for value in strange])}."
            f"{hint if is_text else ''} Complete {FILE}, or correct the labels."
        )


def _say_alike(column: str, values: Sequence[Any]) -> None:
    """Names that differ by case or blanks alone are one class to a person and several to a model: said, not changed."""
    alike: dict[str, list[str]] = defaultdict(list)
    for value in values:
        alike[" ".join(value.split()).casefold()].append(value)
    groups = [" and ".join(repr(value) for value in sorted(group)) for group in alike.values() if len(group) > 1]
    if groups:
        log(
            f"data: labels in column '{column}' differ by case or blanks alone and count as different classes: "
            f"{shorten(groups, 5)}"
        )
