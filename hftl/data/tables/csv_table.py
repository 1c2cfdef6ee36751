"""Strict CSV and TSV reader (RFC 4180): malformed lines are errors with a line number, never repaired or dropped."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.data.tables.text_decoding import text_lines
from hftl.errors import DataError, shorten

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CELL_LENGTH = 64 << 20
"""Characters per cell; otherwise an unclosed quote would load the rest of the file into memory."""
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 16 << 20
_INT = re.compile(r"0|-?[1-9][0-9]*")
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SPECIAL = ("nan", "inf", "-inf", "infinity", "-infinity")


def scan_csv(path: Path) -> dict[str, set[str]]:
    """Returns the cell types of each column over the whole file: `int`, `float`, `special`, `bool`, `text`.

    Empty cells are missing values without a type.

    Raises:
        DataError: The file is not UTF-8, not CSV, or a row does not match the header; includes the line number.
    """
    rows = _rows(path)
    names = next(rows)[1]
    types: dict[str, set[str]] = {name: set() for name in names}
    undecided = list(enumerate(types.values()))
    for _, cells in rows:
        for position, column_types in undecided:
            if cells[position]:
                column_types.add(_cell_type(cells[position]))
        if any("text" in column_types for _, column_types in undecided):  # skip text columns, the longest ones
            undecided = [(position, column) for position, column in undecided if "text" not in column]
    return types


def csv_type(types: set[str]) -> pa.DataType:
    """Returns the Arrow type of a column from all its cell types; a mix of numbers and text is text."""
    import pyarrow as pa

    if types == {"bool"}:
        return pa.bool_()
    if types == {"int"}:
        return pa.int64()
    if types & {"int", "float"} and types <= {"int", "float", "special"}:
        return pa.float64()
    return pa.string()


def read_csv(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields batches of rows with the types of `schema`; empty cells are null."""
    rows = _rows(path)
    names = next(rows)[1]
    batch: list[list[str]] = []
    characters = 0
    for _, cells in rows:
        batch.append(cells)
        characters += sum(map(len, cells))
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield _table(batch, names, schema)
            batch, characters = [], 0
    if batch:
        yield _table(batch, names, schema)


def _table(rows: list[list[str]], names: Sequence[str], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    converters: dict[Any, Any] = {pa.int64(): int, pa.float64(): float, pa.bool_(): lambda cell: cell.lower() == "true"}
    columns = []
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        kind = schema.field(name).type
        convert = converters.get(kind, str)
        columns.append(pa.array([convert(cell) if cell else None for cell in cells], kind))
    return pa.table(dict(zip(names, columns, strict=True))).select(schema.names)


def _cell_type(cell: str) -> str:
    # text: codes with leading zeros (0123) and integers beyond 64 bits
    if _INT.fullmatch(cell):
        return "int" if len(cell) <= 20 and -(2**63) <= int(cell) < 2**63 else "text"
    lowered = cell.lower()
    if lowered in ("true", "false"):
        return "bool"
    if lowered in _SPECIAL:
        return "special"
    return "float" if len(cell) < 64 and _FLOAT.fullmatch(cell) and not re.match("-?0[0-9]", cell) else "text"


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells): the header first, then rows with as many cells. Skips blank lines."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # a header "a, b, c": spaces after separators are not part of the cells
    skip_spaces = re.search(rf"{separator} +[^{separator} ]", next(text_lines(path), "")) is not None
    with _raised_cell_limit():
        reader = csv.reader(text_lines(path), delimiter=separator, strict=True, skipinitialspace=skip_spaces)
        names: list[str] | None = None
        start = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(_syntax_problem(path, start, reader.line_num, error)) from error
            if not cells or len(cells) == 1 and not cells[0].strip() and (names is None or len(names) > 1):
                start = reader.line_num + 1
                continue
            if names is None:
                names = _parse_header(path, cells, separator)
                yield start, names
            elif len(cells) != len(names):
                raise DataError(_cell_count_problem(path, start, cells, names, separator))
            else:
                yield start, cells
            start = reader.line_num + 1
    if names is None:
        raise DataError(f"data.source: '{path}' is empty: no header. Add one with the column names.")


def _parse_header(path: Path, cells: list[str], separator: str) -> list[str]:
    names = [cell.strip() or f"Unnamed: {position}" for position, cell in enumerate(cells)]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise DataError(f"data.source: '{path}' has duplicate columns: {shorten(duplicates)}. Rename or remove them.")
    separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
    likely = [name for character, name in separators.items() if character != separator and character in names[0]]
    if len(names) == 1 and likely:
        raise DataError(
            f"data.source: '{path}' appears to be separated by {likely[0]} (first line: {preview(names[0])}); allowed: "
            "commas, or tabs with the extension .tsv. Convert the file."
        )
    return names


def _cell_count_problem(path: Path, line: int, cells: list[str], names: list[str], separator: str) -> str:
    character = "a tab" if separator == "\t" else "a comma"
    advice = (
        f"Enclose cells that contain {character} in double quotes."
        if len(cells) > len(names)
        else "Add the missing cell, or fix the quotes of an earlier one."
    )
    return (
        f"data.source: '{path}' line {line} has {len(cells)} cell(s), but the header has {len(names)} "
        f"({shorten(names, 6)}). {advice}"
    )


def _syntax_problem(path: Path, start: int, line: int, error: csv.Error) -> str:
    prefix = f"data.source: '{path}' line {start}"
    if "unexpected end" in str(error):
        return f"{prefix}: a double quote at the start of a cell is not closed (EOF inside string). Close it."
    if "field limit" in str(error):
        return f"{prefix}: a cell is longer than {MAX_CELL_LENGTH >> 20} MB. Check for an unclosed double quote."
    return (
        f"{prefix}: text follows the closing double quote of a cell, in line {line}. Double the quotes inside the cell "
        '("") and enclose the cell in double quotes.'
    )


def preview(text: str) -> str:
    """Returns a cell for messages: quoted, on one line, at most 60 characters."""
    return repr(text[:60]) + ("…" if len(text) > 60 else "")


@contextmanager
def _raised_cell_limit() -> Iterator[None]:
    """Raises the cell limit of the csv module, 128 kB and process-wide, to `MAX_CELL_LENGTH`."""
    before = csv.field_size_limit(MAX_CELL_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(before)
