"""JSON: one object a line, or a list of objects; each is a row, and a field has one type in all rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.tables.csv_table import CHARACTERS_AT_A_TIME, shorten_cell
from hftl.data.tables.text_decoding import text_lines
from hftl.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_A_TIME = 1_000
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def scan_json(path: Path) -> pa.Schema:
    """Returns the fields of all rows of the file with their Arrow types; fields that a row lacks are null in it.

    Raises:
        DataError: The file is not UTF-8 or not JSON, a row is not an object, or a field changes its type.
    """
    import pyarrow as pa

    first: dict[str, tuple[str, str]] = {}
    schema = pa.schema([])
    for places, rows in _batches(path):
        for place, row in zip(places, rows, strict=True):
            for name, value in row.items():
                if value is None:
                    continue
                kind = _KINDS[type(value)]
                before, where = first.setdefault(name, (kind, place))
                if before != kind:
                    raise DataError(
                        f"data.source: '{path}' {place}: '{name}' is {kind} ({shorten_cell(str(value))}), but {before} "
                        f"in {where}; write it one way in all rows."
                    )
        try:
            # field by field, since Arrow would take the fields of the first row alone
            names = list(dict.fromkeys(name for row in rows for name in row))
            found = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise DataError(
                f"data.source: '{path}', {places[0]} to {places[-1]}: {first_line(error)}. Lists must hold one type, "
                "and whole numbers fit 64 bits."
            ) from error
    if not schema.names:
        raise DataError(f"data.source: '{path}' is empty: it holds no rows.")
    return schema


def read_json_table(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the rows of a file in the types of `schema`."""
    import pyarrow as pa

    for places, rows in _batches(path):
        try:
            yield pa.Table.from_pylist(rows, schema)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"data.source: '{path}', {places[0]} to {places[-1]}: {first_line(error)}") from error


def _batches(path: Path) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yields the places ("line 3") and rows of a file, some at a time."""
    places: list[str] = []
    rows: list[dict[str, Any]] = []
    characters = 0
    for place, row, size in _rows(path):
        places.append(place)
        rows.append(row)
        characters += size
        if len(rows) == ROWS_AT_A_TIME or characters > CHARACTERS_AT_A_TIME:
            yield places, rows
            places, rows, characters = [], [], 0
    if rows:
        yield places, rows


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    begin = next((line.lstrip()[:1] for line in text_lines(path) if line.strip()), "")
    if begin == "[":
        whole = "".join(text_lines(path))
        listed = _parse(whole, path, None)
        if not isinstance(listed, list):  # pragma: no cover - "[" begins nothing else
            raise DataError(f"data.source: '{path}' is not a list of rows.")
        size = len(whole) // max(len(listed), 1)
        for number, row in enumerate(listed):
            yield (*_row(row, path, f"row {number}"), size)
        return
    lines = [line for line in _few(path, 2)]
    if begin == "{" and len(lines) > 1 and not _is_json(lines[0]):
        raise DataError(_whole_object(path))
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            place, row = _row(_parse(line, path, number), path, f"line {number}")
            if len(lines) == 1 and _is_columns(row):
                raise DataError(_columns(path))
            yield place, row, len(line)


def _few(path: Path, count: int) -> Iterator[str]:
    for line in text_lines(path):
        if line.strip():
            yield line
            count -= 1
        if not count:
            return


def _row(row: Any, path: Path, place: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise DataError(f"data.source: '{path}' {place} is not an object with fields: {shorten_cell(json.dumps(row))}.")
    return place, row


def _whole_object(path: Path) -> str:
    """Returns what is wrong with a file that is one object over several lines, or broken in its first line."""
    try:
        whole = _parse("".join(text_lines(path)), path, None)
    except DataError as error:
        return error.problems[0]
    if _is_columns(whole):
        return _columns(path)
    return f"data.source: '{path}' is one object, not rows; write a list of objects, or one object a line (.jsonl)."


def _is_columns(row: Any) -> bool:
    values = list(row.values())
    return bool(values) and all(isinstance(value, (list, dict)) for value in values)


def _columns(path: Path) -> str:
    return (
        f"data.source: '{path}' holds columns, not rows; write a list of objects, or one object a line "
        "(pandas: to_json(orient='records', lines=True))."
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, path: Path, line: int | None) -> Any:
    """Returns the value of a JSON text; `line` is where it stands, None where it is the whole file."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails where a character is half
        return value
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}"
        raise DataError(
            f"data.source: '{path}' {where} is not valid JSON: {error.msg} at character {error.colno}."
        ) from error
    except UnicodeEncodeError as error:
        where = f" line {line}" if line else ""
        raise DataError(
            f"data.source: '{path}'{where} holds half of a character (a lone \\ud800 to \\udfff)."
        ) from error
    except RecursionError as error:
        raise DataError(f"data.source: '{path}' is nested too deeply to be a table.") from error
    except ValueError as error:  # from the hooks below, and Python's limit of digits
        where = f" line {line}" if line else ""
        raise DataError(f"data.source: '{path}'{where}: {first_line(error)}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{twice}' stands twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null")
