"""Which column is what: detected from types and names, always said aloud, never guessed between equals."""

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
"""What models call their inputs; a label column of such a name would take the place of an input."""


@dataclass(frozen=True)
class Column:
    """A column and why it was chosen."""

    name: str
    why: str


def find_column(role: str, features: Features, given: str | None) -> Column:
    """Returns the column that plays `role`.

    Args:
        role: `image`, `text`, `label`; or what a task calls its texts and labels: `words`, `tags`, `question`,
            `context`, `answers`.
        features: Names and types of the columns.
        given: The column named in the configuration, if any.

    Raises:
        DataError: The named column does not exist; no column fits; or several fit equally well.
    """
    listing = ", ".join(f"{name} ({type_name(kind)})" for name, kind in features.items())
    flag = f"data.{ROLES[role].setting}"
    if given is not None:
        if ROLES[role].setting == "label_column" and given in INPUTS:
            raise DataError(f"{flag}: '{given}' is what models call an input; rename the column.")
        if given in features:
            return Column(given, f"named by {flag}")
        raise DataError(f"{flag}: there is no column '{given}'.{nearest(given, features)} Columns: {listing}.")
    fitting = [name for name, kind in features.items() if ROLES[role].accepts(kind)]
    if role == "text":  # a column of class names holds text too, but is spoken for
        fitting = [name for name in fitting if not is_usual_name("label", name)]
    typed = [name for name in fitting if type_name(features[name]) in ("Image", "ClassLabel")]
    by_name = usual_column(role, {name: features[name] for name in fitting})
    if role == "label" and by_name is None and not _has_images(features):  # there a score may describe an image
        by_name = usual_column("score", features)
    if len(typed) == 1:
        return Column(typed[0], f"the only {type_name(features[typed[0]])} column")
    if by_name is not None:
        return Column(by_name, "by its name")
    if len(fitting) == 1 and role != "label":
        held = {"image": "images", "words": "words", "tags": "tags", "answers": "answers"}.get(role, "text")
        return Column(fitting[0], f"the only column that can hold {held}")
    if not fitting or role == "label":
        paths = "string" in listing and role == "image"
        hint = (
            " Texts are paths of images where they end in .png, .jpg …, relative to the data's folder." if paths else ""
        )
        raise DataError(f"{flag}: no {role} column found. Columns: {listing}.{hint} Say --{flag} NAME.")
    raise DataError(f"{flag}: {' and '.join(fitting)} could each be the {role}. Columns: {listing}. Say --{flag} NAME.")


def find_text_columns(features: Features, text: str | None, pair: str | None) -> tuple[Column, Column | None]:
    """Returns the text column, and the second one where rows are pairs.

    Raises:
        DataError: As `find_column`.
    """
    if text is None and pair is None:
        names = usual_pair(features)
        if names is not None:
            first, second = names
            why = f"'{first}' and '{second}' name a pair"
            return Column(first, why), Column(second, why)
    column = find_column("text", features, text)
    if pair is None:
        return column, None
    if pair not in features:
        raise DataError(
            f"data.text_pair_column: there is no column '{pair}'.{nearest(pair, features)} "
            f"Columns: {', '.join(features)}."
        )
    return column, Column(pair, "named by data.text_pair_column")


def arrow_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """Returns the values of a column as Arrow holds them."""
    table = cast("pa.Table", rows.select_columns([column]).with_format("arrow")[:])
    return table.column(column)


def splits_without(splits: Mapping[str, Dataset], column: str) -> list[str]:
    """Returns a sentence on each split that training needs and that lacks the labels; of others, that is only said."""
    problems = []
    for split, rows in splits.items():
        if column in rows.features:
            continue
        if split == "test":
            log(f"data: test has no column '{column}'; its rows are predicted and not measured")
        else:
            problems.append(
                f"data.source: {split} has no column '{column}', which holds the labels of train. Columns: "
                f"{', '.join(rows.features)}. Add it, or give no {split} split: then one is cut from train."
            )
    return problems


def filled_columns(rows: Dataset, names: Iterable[str]) -> list[str]:
    """Returns the columns of `names` that are there and not empty from top to bottom.

    Raises:
        DataError: One has a value in some rows only.
    """
    found = []
    for name in names:
        missing = arrow_column(rows, name).null_count if name in rows.column_names else len(rows)
        if 0 < missing < len(rows):
            raise DataError(f"column '{name}' is empty in {missing} of {len(rows)} rows; give it for all or for none.")
        found += [name] if missing < len(rows) else []
    return found


def label_codes(rows: Dataset, column: str) -> Any:
    """Returns each row's label as an integer code [N] (numpy int64), or None where labels are real numbers.

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
