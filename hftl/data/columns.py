"""Column detection by type and name. Each choice is logged; ambiguity is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hftl.data.roles import ROLES, is_usual_name, type_name, usual_column, usual_pair
from hftl.errors import DataError, nearest
from hftl.logging import log

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

INPUTS = ("input_ids", "token_type_ids", "attention_mask", "pixel_values")
"""Reserved names of model inputs; a label column of such a name would replace an input."""


@dataclass(frozen=True)
class Column:
    """Detected column with the reason of the choice (`why`), for the log."""

    name: str
    why: str


def find_column(role: str, features: Features, configured: str | None) -> Column:
    """Returns the column for `role`.

    Args:
        role: Key in `ROLES`: `image`, `text`, `label`, or a task-specific role: `words`, `tags`, `question`,
            `context`, `answers`.
        features: Names and types of the columns.
        configured: Column name from the configuration, if any.

    Raises:
        DataError: The configured column does not exist; no column matches; or several columns match equally well.
    """
    listing = ", ".join(f"{name} ({type_name(kind)})" for name, kind in features.items())
    flag = f"data.{ROLES[role].setting}"
    if configured is not None:
        if ROLES[role].setting == "label_column" and configured in INPUTS:
            raise DataError(f"{flag}: '{configured}' is a reserved name of model inputs. Rename the column.")
        if configured in features:
            return Column(configured, f"set by {flag}")
        raise DataError(
            f"{flag}: there is no column '{configured}'.{nearest(configured, features)} Columns: {listing}."
        )
    candidates = [name for name, kind in features.items() if ROLES[role].accepts(kind)]
    if role == "text":  # a column of class names holds text too, but is the label column
        candidates = [name for name in candidates if not is_usual_name("label", name)]
    typed = [name for name in candidates if type_name(features[name]) in ("Image", "ClassLabel")]
    by_name = usual_column(role, {name: features[name] for name in candidates})
    if role == "label" and by_name is None and not _has_images(features):  # a score next to images may be metadata
        by_name = usual_column("score", features)
    if len(typed) == 1:
        return Column(typed[0], f"only {type_name(features[typed[0]])} column")
    if by_name is not None:
        return Column(by_name, "by name")
    if len(candidates) == 1 and role != "label":
        content = {"image": "image", "words": "word list", "tags": "tag list", "answers": "answer"}.get(role, "text")
        return Column(candidates[0], f"only {content} column")
    if not candidates or role == "label":
        paths = "string" in listing and role == "image"
        hint = " String columns hold image paths if they end in .png, .jpg …, relative to the data folder."
        raise DataError(
            f"{flag}: no {role} column found. Columns: {listing}.{hint if paths else ''} Set --{flag} NAME."
        )
    raise DataError(
        f"{flag}: {' and '.join(candidates)} could each be the {role} column. Columns: {listing}. Set --{flag} NAME."
    )


def find_text_columns(features: Features, text: str | None, pair: str | None) -> tuple[Column, Column | None]:
    """Returns the text column, and the second text column of text pairs or None.

    Args:
        features: Names and types of the columns.
        text: Value of `data.text_column`.
        pair: Value of `data.text_pair_column`.

    Raises:
        DataError: A configured column does not exist, or the text column is missing or ambiguous.
    """
    if text is None and pair is None:
        names = usual_pair(features)
        if names is not None:
            first, second = names
            why = f"'{first}' and '{second}' are a text pair"
            return Column(first, why), Column(second, why)
    column = find_column("text", features, text)
    if pair is None:
        return column, None
    if pair not in features:
        raise DataError(
            f"data.text_pair_column: there is no column '{pair}'.{nearest(pair, features)} "
            f"Columns: {', '.join(features)}."
        )
    return column, Column(pair, "set by data.text_pair_column")


def arrow_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """Returns a column as an Arrow array, without decoding."""
    table = cast("pa.Table", rows.select_columns([column]).with_format("arrow")[:])
    return table.column(column)


def splits_without(splits: Mapping[str, Dataset], column: str) -> list[str]:
    """Returns one problem per training or validation split without the label column; logs a test split without it."""
    problems = []
    for split, rows in splits.items():
        if column in rows.features:
            continue
        if split == "test":
            log(f"data: test has no column '{column}'; its rows are predicted without metrics")
        else:
            problems.append(
                f"data.source: {split} has no column '{column}', the label column of train. Columns: "
                f"{', '.join(rows.features)}. Add it, or remove {split}; validation is then split off train."
            )
    return problems


def filled_columns(rows: Dataset, names: Iterable[str]) -> list[str]:
    """Returns the columns of `names` that have values in all rows; skips columns that are absent or empty.

    Raises:
        DataError: A column has values in some rows only.
    """
    filled = []
    for name in names:
        missing = arrow_column(rows, name).null_count if name in rows.column_names else len(rows)
        if 0 < missing < len(rows):
            raise DataError(f"column '{name}' is empty in {missing} of {len(rows)} rows. Fill all rows, or none.")
        filled += [name] if missing < len(rows) else []
    return filled


def label_codes(rows: Dataset, column: str) -> Any:
    """Returns integer label codes [N] (numpy int64), or None if the labels are floating-point numbers or lists.

    Rows without a label get the highest code plus one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    values = arrow_column(rows, column)
    if pa.types.is_floating(values.type) or pa.types.is_nested(values.type):
        return None
    encoded = values.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    return pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)


def _has_images(features: Features) -> bool:
    return any(ROLES["image"].accepts(kind) for kind in features.values())
