"""Which columns of a mixed table hold images, texts, numbers and categories, and what train says of the last two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hftl.config.schema import DataConfig
from hftl.data.columns import arrow_column, find_column, find_text_columns
from hftl.data.roles import is_usual_name
from hftl.errors import DataError, nearest, shorten
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset, Features

_MOST_CATEGORIES = 100
_ROWS_PER_CATEGORY = 10
"""A column of strings is of categories where train has at most so many different ones, each so often on average."""


@dataclass
class MixedColumns:
    """Columns by what they hold, in reading order.

    Attributes:
        image: Column of images, if any.
        texts: Columns of texts, and `template`, which joins them.
        numbers: Columns of numbers.
        categories: Columns of categories.
        why: How each column was found, to be said.
    """

    image: str | None = None
    texts: list[str] = field(default_factory=list)
    template: str = ""
    numbers: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)


def find_mixed(train: Dataset, config: DataConfig, taken: Sequence[str]) -> MixedColumns:
    """Returns which column is what.

    Args:
        train: Rows whose types and values decide.
        config: Columns that are named there are believed.
        taken: Columns that are spoken for: labels.

    Raises:
        DataError: A named column does not exist, or several could be the image; every problem in one message.
    """
    ignored = set(config.ignore_columns)
    named = [*config.ignore_columns, *(config.numeric_columns or ()), *(config.categorical_columns or ())]
    problems = _unknown(named, train.features) + _shadowing(config)
    left = {name: kind for name, kind in train.features.items() if name not in {*taken, *ignored}}
    found = MixedColumns()
    try:
        _find_image(found, left, config, ignored)
        _find_texts(found, left, config, ignored, train)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(*problems)
    left = {name: kind for name, kind in left.items() if name not in {found.image, *found.texts}}
    found.numbers = _given_or(config.numeric_columns, (name for name, kind in left.items() if _is_number(kind)))
    if config.categorical_columns is not None:
        found.numbers = [name for name in found.numbers if name not in config.categorical_columns]
    strings = (name for name, kind in left.items() if type(kind).__name__ == "ClassLabel" or _is_string(kind))
    found.categories = _given_or(config.categorical_columns, strings)
    if not (found.image or found.texts):
        raise DataError(
            f"data.source: no image and no text column found. Columns: {', '.join(train.features)}. Say "
            "--data.image_column NAME or --data.text_column NAME."
        )
    _announce(found, train.features, taken)
    return found


def _find_image(found: MixedColumns, left: Any, config: DataConfig, ignored: set[str]) -> None:
    images = {name: kind for name, kind in left.items() if type(kind).__name__ == "Image"}
    if config.image_column in ignored or (config.image_column is None and not images):
        return
    column = find_column("image", cast("Features", left if config.image_column else images), config.image_column)
    found.image, found.why[column.name] = column.name, column.why


def _find_texts(found: MixedColumns, left: Any, config: DataConfig, ignored: set[str], train: Dataset) -> None:
    """Texts are what a template names, or the configuration; else strings of a usual name or with many values."""
    if config.text_template is not None:
        found.texts, found.template = template_columns(config.text_template), config.text_template
        unknown = _unknown(found.texts, left, "data.text_template")
        if unknown or not found.texts:
            raise DataError(*(unknown or ["data.text_template names no column: write one as {column}."]))
        found.why |= dict.fromkeys(found.texts, "in data.text_template")
        return
    if config.text_column is not None and config.text_column not in ignored:
        columns = [column for column in find_text_columns(left, config.text_column, config.text_pair_column) if column]
        found.texts, found.why = [each.name for each in columns], found.why | {each.name: each.why for each in columns}
    elif config.text_column is None:
        spoken = {*(config.categorical_columns or ()), *(config.numeric_columns or ())}
        strings = [name for name, kind in left.items() if _is_string(kind) and name not in spoken]
        for name in strings:
            if is_usual_name("text", name):
                found.why[name] = "by its name"
            elif not _few_values(train, name):
                found.why[name] = "strings with many different values"
        found.texts = [name for name in strings if name in found.why]
    single = len(found.texts) == 1
    found.template = " ".join(f"{{{name}}}" if single else f"{name}: {{{name}}}" for name in found.texts)


def _announce(found: MixedColumns, features: Features, taken: Sequence[str]) -> None:
    if found.image:
        log(f"data: images from column '{found.image}' ({found.why[found.image]})")
    for name in found.texts:
        log(f"data: texts from column '{name}' ({found.why[name]})")
    if len(found.texts) > 1:
        log(f"data: texts are joined as {found.template!r} (data.text_template)")
    for what, names in (("numbers", found.numbers), ("categories", found.categories)):
        if names:
            log(f"data: {what} from {', '.join(names)}")
    read = {found.image, *found.texts, *found.numbers, *found.categories, *taken}
    unread = [name for name in features if name not in read]
    if unread:
        log(f"data: not read: {shorten(unread)}")


def template_columns(template: str) -> list[str]:
    """Returns the columns that a template names, in order.

    Raises:
        DataError: It is not a template.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"data.text_template: {template!r}: {error}; write columns as {{column}}.") from error
    named = [name for _, name, spec, conversion in parsed if name is not None]
    if any(spec or conversion or not name for _, name, spec, conversion in parsed if name is not None):
        raise DataError(f"data.text_template: {template!r}: write columns as {{column}}, with nothing else in braces.")
    return list(dict.fromkeys(named))


def filled(template: str, row: dict[str, Any]) -> str:
    """Returns a template with the values of a row; what a row does not have is left empty."""
    pieces = []
    for literal, name, _, _ in Formatter().parse(template):
        value = row.get(name) if name is not None else None
        pieces += [literal, "" if value is None else str(value)]
    return "".join(pieces)


def train_numbers(train: Dataset, columns: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns `names`, `mean` and `std` of the numbers of train that are there, and what is wrong with them.

    A column that does not vary has the deviation 1.
    """
    means, deviations, missing, problems = [], [], [], []
    for name in columns:
        values = _floats(train, name)
        if values is None:
            problems.append(f"data.numeric_columns: '{name}' does not hold numbers but {train.features[name]}.")
            continue
        infinite = np.flatnonzero(np.isinf(values)).tolist()
        known = values[np.isfinite(values)]
        if infinite:
            problems.append(
                f"data.source: train column '{name}' has {len(infinite)} infinite number(s), at row "
                f"{shorten([str(row) for row in infinite])}. Leave them empty where they are not known."
            )
        elif not len(known):
            problems.append(f"data.source: train column '{name}' has no number at all; name it in data.ignore_columns.")
        else:
            means.append(float(known.mean()))
            deviations.append(float(known.std()) if np.ptp(known) else 1.0)  # rounding gives equal numbers a deviation
            missing.append(bool(np.isnan(values).any()))
    return {"names": list(columns), "mean": means, "std": deviations, "missing": missing}, problems


def train_categories(train: Dataset, columns: Sequence[str]) -> dict[str, list[str]]:
    """Returns the values of each categorical column in train as text; both sorted, as JSON keeps them."""
    found = {}
    train = with_names(train, columns)
    for name in sorted(columns):
        values = arrow_column(train, name).unique().to_pylist()
        found[name] = sorted({category_key(value) for value in values if value is not None and value != ""})
    return found


def with_names(rows: Dataset, columns: Sequence[str]) -> Dataset:
    """Returns rows in which class numbers (`ClassLabel`) of categorical columns are the names that tables have."""
    for column in columns:
        names = getattr(rows.features.get(column), "names", None)
        if names:
            known = range(len(names))
            values = [names[code] if code in known else None for code in arrow_column(rows, column).to_pylist()]
            rows = rows.remove_columns(column).add_column(column, values)  # pyright: ignore[reportCallIssue]
    return rows


def category_key(value: Any) -> str:
    """Returns a category as text; whole numbers alike whether a table holds them as integers or not."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _floats(rows: Dataset, column: str) -> np.ndarray | None:
    """Returns a column [N] as float64 with NaN for what is missing; None where it does not hold numbers."""
    if not _is_number(rows.features[column]):
        return None
    values = arrow_column(rows, column).to_pylist()
    return np.array([np.nan if value is None else float(value) for value in values])


def _few_values(train: Dataset, column: str) -> bool:
    different = len(arrow_column(train, column).unique())
    return different <= min(_MOST_CATEGORIES, len(train) // _ROWS_PER_CATEGORY)


def _given_or(given: list[str] | None, found: Iterable[str]) -> list[str]:
    return list(found) if given is None else list(given)


def _unknown(names: Iterable[str], features: Any, where: str = "data") -> list[str]:
    return [
        f"{where}: there is no column '{name}'.{nearest(name, features)} Columns: {', '.join(features)}."
        for name in dict.fromkeys(names)
        if name not in features
    ]


def _shadowing(config: DataConfig) -> list[str]:
    both = set(config.numeric_columns or ()) & set(config.categorical_columns or ())
    return [f"data.numeric_columns: '{name}' is in data.categorical_columns too." for name in sorted(both)]


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string") and type(kind).__name__ == "Value"


def _is_number(kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    plain = dtype == "bool" or dtype.startswith(("float", "int", "uint"))
    return type(kind).__name__ == "Value" and plain
