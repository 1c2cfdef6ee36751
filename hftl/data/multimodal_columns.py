"""Column detection of multimodal tables (image, text, numeric, categorical) and training statistics of the latter."""

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

_MAX_CATEGORIES = 100
_ROWS_PER_CATEGORY = 10
"""A string column is categorical if train has at most `_MAX_CATEGORIES` unique values, each in
`_ROWS_PER_CATEGORY` rows on average."""


@dataclass
class MixedColumns:
    """Columns by modality, in table order.

    Attributes:
        image: Image column, if any.
        texts: Text columns.
        template: Format string that joins the texts, with `{column}` fields.
        numbers: Numeric columns.
        categories: Categorical columns.
        why: Reason of each choice, for the log.
    """

    image: str | None = None
    texts: list[str] = field(default_factory=list)
    template: str = ""
    numbers: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)


def find_mixed(train: Dataset, config: DataConfig, assigned: Sequence[str]) -> MixedColumns:
    """Returns the columns by modality and logs each choice.

    Args:
        train: Training rows; types and values decide.
        config: Columns set here are used as given.
        assigned: Columns that are already assigned: labels.

    Raises:
        DataError: A configured column does not exist, the image column is ambiguous, or there is neither an image nor
            a text column. Collects all problems.
    """
    ignored = set(config.ignore_columns)
    configured = [*config.ignore_columns, *(config.numeric_columns or ()), *(config.categorical_columns or ())]
    problems = _missing_columns(configured, train.features) + _conflicting_columns(config)
    features = {name: kind for name, kind in train.features.items() if name not in {*assigned, *ignored}}
    columns = MixedColumns()
    try:
        _find_image(columns, features, config, ignored)
        _find_texts(columns, features, config, ignored, train)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(*problems)
    features = {name: kind for name, kind in features.items() if name not in {columns.image, *columns.texts}}
    numbers = (name for name, kind in features.items() if _is_number(kind))
    columns.numbers = list(numbers if config.numeric_columns is None else config.numeric_columns)
    if config.categorical_columns is not None:
        columns.numbers = [name for name in columns.numbers if name not in config.categorical_columns]
    strings = (name for name, kind in features.items() if type(kind).__name__ == "ClassLabel" or _is_string(kind))
    columns.categories = list(strings if config.categorical_columns is None else config.categorical_columns)
    if not (columns.image or columns.texts):
        raise DataError(
            f"data.source: no image and no text column found. Columns: {', '.join(train.features)}. Set "
            "--data.image_column NAME or --data.text_column NAME."
        )
    _log_columns(columns, train.features, assigned)
    return columns


def _find_image(columns: MixedColumns, features: Any, config: DataConfig, ignored: set[str]) -> None:
    images = {name: kind for name, kind in features.items() if type(kind).__name__ == "Image"}
    if config.image_column in ignored or (config.image_column is None and not images):
        return
    column = find_column("image", cast("Features", features if config.image_column else images), config.image_column)
    columns.image, columns.why[column.name] = column.name, column.why


def _find_texts(columns: MixedColumns, features: Any, config: DataConfig, ignored: set[str], train: Dataset) -> None:
    """Finds text columns: from the template, from `data.text_column`, or strings by name or number of values."""
    if config.text_template is not None:
        columns.texts, columns.template = template_columns(config.text_template), config.text_template
        problems = _missing_columns(columns.texts, features, "data.text_template")
        if problems or not columns.texts:
            raise DataError(
                *(problems or [f"data.text_template: '{config.text_template}' has no column. Add one as {{column}}."])
            )
        columns.why |= dict.fromkeys(columns.texts, "in data.text_template")
        return
    if config.text_column is not None and config.text_column not in ignored:
        pair = [column for column in find_text_columns(features, config.text_column, config.text_pair_column) if column]
        columns.texts, columns.why = [col.name for col in pair], columns.why | {col.name: col.why for col in pair}
    elif config.text_column is None:
        assigned = {*(config.categorical_columns or ()), *(config.numeric_columns or ())}
        strings = [name for name, kind in features.items() if _is_string(kind) and name not in assigned]
        for name in strings:
            if is_usual_name("text", name):
                columns.why[name] = "by name"
            elif not _has_few_values(train, name):
                columns.why[name] = "strings with many unique values"
        columns.texts = [name for name in strings if name in columns.why]
    single = len(columns.texts) == 1
    columns.template = " ".join(f"{{{name}}}" if single else f"{name}: {{{name}}}" for name in columns.texts)


def _log_columns(columns: MixedColumns, features: Features, assigned: Sequence[str]) -> None:
    if columns.image:
        log(f"data: images from column '{columns.image}' ({columns.why[columns.image]})")
    for name in columns.texts:
        log(f"data: texts from column '{name}' ({columns.why[name]})")
    if len(columns.texts) > 1:
        log(f"data: texts are joined as {columns.template!r} (data.text_template)")
    for label, names in (("numbers", columns.numbers), ("categories", columns.categories)):
        if names:
            log(f"data: {label} from {', '.join(names)}")
    used = {columns.image, *columns.texts, *columns.numbers, *columns.categories, *assigned}
    unused = [name for name in features if name not in used]
    if unused:
        log(f"data: unused columns: {shorten(unused)}")


def template_columns(template: str) -> list[str]:
    """Returns the unique column names of a template, in order.

    Raises:
        DataError: The template is not a valid format string of `{column}` fields.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"data.text_template: '{template}' is invalid: {error}. Write columns as {{column}}."
        ) from error
    fields = [(name, spec, conversion) for _, name, spec, conversion in parsed if name is not None]
    if any(spec or conversion or not name for name, spec, conversion in fields):
        raise DataError(
            f"data.text_template: '{template}' is invalid. Write columns as {{column}}, with nothing else in braces."
        )
    return list(dict.fromkeys(name for name, _, _ in fields))


def fill_template(template: str, row: dict[str, Any]) -> str:
    """Returns a template with the values of a row; missing values become empty strings."""
    pieces = []
    for literal, name, _, _ in Formatter().parse(template):
        value = row.get(name) if name is not None else None
        pieces += [literal, "" if value is None else str(value)]
    return "".join(pieces)


def train_numbers(train: Dataset, columns: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns statistics of numeric columns in train, and problems.

    Returns:
        A dictionary with `names`, and per column `mean` and `std` of the finite values (std 1 for constant columns)
        and whether values are `missing`; and one problem per invalid column.
    """
    means, deviations, missing, problems = [], [], [], []
    for name in columns:
        values = _float_values(train, name)
        if values is None:
            problems.append(f"data.numeric_columns: '{name}' is not numeric, but {train.features[name]}. Remove it.")
            continue
        infinite = np.flatnonzero(np.isinf(values)).tolist()
        finite = values[np.isfinite(values)]
        if infinite:
            problems.append(
                f"data.source: train column '{name}' has {len(infinite)} infinite number(s), at row "
                f"{shorten([str(row) for row in infinite])}. Leave missing values empty."
            )
        elif not len(finite):
            problems.append(f"data.source: train column '{name}' has no numbers. Add it to data.ignore_columns.")
        else:
            means.append(float(finite.mean()))
            deviations.append(float(finite.std()) if np.ptp(finite) else 1.0)  # rounding makes std of constants > 0
            missing.append(bool(np.isnan(values).any()))
    return {"names": list(columns), "mean": means, "std": deviations, "missing": missing}, problems


def train_categories(train: Dataset, columns: Sequence[str]) -> dict[str, list[str]]:
    """Returns the unique values of each categorical column in train as strings; keys and values are sorted."""
    categories = {}
    train = with_names(train, columns)
    for name in sorted(columns):
        values = arrow_column(train, name).unique().to_pylist()
        categories[name] = sorted({category_key(value) for value in values if value is not None and value != ""})
    return categories


def with_names(rows: Dataset, columns: Sequence[str]) -> Dataset:
    """Returns rows with the class names in place of the class indices of `ClassLabel` columns among `columns`."""
    for column in columns:
        names = getattr(rows.features.get(column), "names", None)
        if names:
            known = range(len(names))
            values = [names[code] if code in known else None for code in arrow_column(rows, column).to_pylist()]
            rows = rows.remove_columns(column).add_column(column, values)  # pyright: ignore[reportCallIssue]
    return rows


def category_key(value: Any) -> str:
    """Returns a category as a string; 1 and 1.0 give the same string."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _float_values(rows: Dataset, column: str) -> np.ndarray | None:
    """Returns a column [N] as float64 with NaN for missing values; None for non-numeric columns."""
    if not _is_number(rows.features[column]):
        return None
    values = arrow_column(rows, column).to_pylist()
    return np.array([np.nan if value is None else float(value) for value in values])


def _has_few_values(train: Dataset, column: str) -> bool:
    count = len(arrow_column(train, column).unique())
    return count <= min(_MAX_CATEGORIES, len(train) // _ROWS_PER_CATEGORY)


def _missing_columns(names: Iterable[str], features: Any, setting: str = "data") -> list[str]:
    return [
        f"{setting}: there is no column '{name}'.{nearest(name, features)} Columns: {', '.join(features)}."
        for name in dict.fromkeys(names)
        if name not in features
    ]


def _conflicting_columns(config: DataConfig) -> list[str]:
    both = set(config.numeric_columns or ()) & set(config.categorical_columns or ())
    return [
        f"data.numeric_columns: '{name}' is also in data.categorical_columns. Remove it from one of them."
        for name in sorted(both)
    ]


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string") and type(kind).__name__ == "Value"


def _is_number(kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    is_numeric = dtype == "bool" or dtype.startswith(("float", "int", "uint"))
    return type(kind).__name__ == "Value" and is_numeric
