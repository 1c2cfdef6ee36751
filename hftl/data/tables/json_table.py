"""JSON reader: one object per line (JSON Lines) or a list of objects as rows; each field has one type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.tables.csv_table import BATCH_CHARACTERS, preview
from hftl.data.tables.text_decoding import text_lines
from hftl.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1_000
_TYPES = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def scan_json(path: Path) -> pa.Schema:
    """Returns the Arrow types of the fields of all rows; missing fields are null.

    Raises:
        DataError: The file is not UTF-8 or not JSON, a row is not an object, or a field changes its type.
    """
    import pyarrow as pa

    first: dict[str, tuple[str, str]] = {}
    schema = pa.schema([])
    for positions, rows in _batches(path):
        for position, row in zip(positions, rows, strict=True):
            for name, value in row.items():
                if value is None:
                    continue
                value_type = _TYPES[type(value)]
                first_type, first_position = first.setdefault(name, (value_type, position))
                if first_type != value_type:
                    raise DataError(
                        f"data.source: '{path}' {position}: '{name}' is {value_type} ({preview(str(value))}), but "
                        f"{first_type} in {first_position}. Use one type in all rows."
                    )
        try:
            # field by field: Arrow infers the fields from the first row only
            names = list(dict.fromkeys(name for row in rows for name in row))
            batch_schema = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
            schema = pa.unify_schemas([schema, batch_schema], promote_options="permissive")
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise DataError(
                f"data.source: '{path}', {positions[0]} to {positions[-1]}: {first_line(error)}; allowed: lists of one "
                "type, and 64-bit integers."
            ) from error
    if not schema.names:
        raise DataError(f"data.source: '{path}' is empty: it has no rows.")
    return schema


def read_json_table(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields batches of rows with the types of `schema`."""
    import pyarrow as pa

    for positions, rows in _batches(path):
        try:
            yield pa.Table.from_pylist(rows, schema)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"data.source: '{path}', {positions[0]} to {positions[-1]}: {first_line(error)}") from error


def _batches(path: Path) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yields batches of positions ("line 3") and rows."""
    positions: list[str] = []
    rows: list[dict[str, Any]] = []
    characters = 0
    for position, row, size in _rows(path):
        positions.append(position)
        rows.append(row)
        characters += size
        if len(rows) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield positions, rows
            positions, rows, characters = [], [], 0
    if rows:
        yield positions, rows


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yields position, row and number of characters of each row."""
    first_character = next((line.lstrip()[:1] for line in text_lines(path) if line.strip()), "")
    if first_character == "[":
        content = "".join(text_lines(path))
        rows = _parse(content, path, None)
        if not isinstance(rows, list):  # pragma: no cover - "[" starts a list only
            raise DataError(f"data.source: '{path}' is not a list of rows.")
        size = len(content) // max(len(rows), 1)
        for number, row in enumerate(rows):
            yield f"row {number}", _require_object(row, path, f"row {number}"), size
        return
    lines = list(islice((line for line in text_lines(path) if line.strip()), 2))
    if first_character == "{" and len(lines) > 1 and not _is_json(lines[0]):
        raise DataError(_multiline_problem(path))
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            row = _require_object(_parse(line, path, number), path, f"line {number}")
            if len(lines) == 1 and _is_columns(row):
                raise DataError(_columns_problem(path))
            yield f"line {number}", row, len(line)


def _require_object(row: Any, path: Path, position: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data.source: '{path}' {position} is not an object with fields: {preview(json.dumps(row))}.")
    return row


def _multiline_problem(path: Path) -> str:
    """Returns the problem of a file with one object over several lines, or with an invalid first line."""
    try:
        content = _parse("".join(text_lines(path)), path, None)
    except DataError as error:
        return error.problems[0]
    if _is_columns(content):
        return _columns_problem(path)
    return (
        f"data.source: '{path}' is one object, not rows; allowed: a list of objects, or one object per line (.jsonl)."
    )


def _is_columns(row: Any) -> bool:
    values = list(row.values())
    return bool(values) and all(isinstance(value, (list, dict)) for value in values)


def _columns_problem(path: Path) -> str:
    return (
        f"data.source: '{path}' has columns, not rows; allowed: a list of objects, or one object per line "
        "(pandas: to_json(orient='records', lines=True))."
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, path: Path, line: int | None) -> Any:
    """Returns the value of a JSON text; `line` is its line number, None for the whole file."""
    position = f" line {line}" if line else ""
    try:
        value = json.loads(text, object_pairs_hook=_unique_fields, parse_constant=_reject_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # raises for lone surrogates
        return value
    except json.JSONDecodeError as error:
        raise DataError(
            f"data.source: '{path}' line {line or error.lineno} is not valid JSON: {error.msg} at character "
            f"{error.colno}."
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(f"data.source: '{path}'{position} has a lone surrogate (\\ud800 to \\udfff).") from error
    except RecursionError as error:
        raise DataError(f"data.source: '{path}' is nested too deeply for a table.") from error
    except ValueError as error:  # from the hooks below, and from Python's limit of integer digits
        raise DataError(f"data.source: '{path}'{position}: {first_line(error)}.") from error


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate field '{duplicate}' in one object")
    return fields


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null")
