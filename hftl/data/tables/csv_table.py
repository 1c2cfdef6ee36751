"""CSV and TSV, read strictly (RFC 4180): what other readers guess at or drop is an error with its line."""

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

LARGEST_CELL = 64 << 20
"""Characters of one cell. A quote that is never closed would otherwise take the rest of the file into memory."""
ROWS_AT_A_TIME, CHARACTERS_AT_A_TIME = 10_000, 16 << 20
_INT = re.compile(r"0|-?[1-9][0-9]*")
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SPECIAL = ("nan", "inf", "-inf", "infinity", "-infinity")


def scan_csv(path: Path) -> dict[str, set[str]]:
    """Returns the kinds of cells in each column of the whole file: `int`, `float`, `special`, `bool`, `text`.

    Empty cells have no kind: they are missing.

    Raises:
        DataError: The file is not UTF-8, not CSV, or its rows do not fit its header; names the line.
    """
    rows = _rows(path)
    names = next(rows)[1]
    kinds: dict[str, set[str]] = {name: set() for name in names}
    numeric = list(enumerate(kinds.values()))
    for _, cells in rows:
        for position, found in numeric:
            if cells[position]:
                found.add(_kind(cells[position]))
        if any("text" in found for _, found in numeric):  # decided; texts are long, and most columns are texts
            numeric = [(position, found) for position, found in numeric if "text" not in found]
    return kinds


def csv_type(kinds: set[str]) -> pa.DataType:
    """Returns the Arrow type of a column from the kinds of all its cells: numbers beside words are words."""
    import pyarrow as pa

    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    if kinds & {"int", "float"} and kinds <= {"int", "float", "special"}:
        return pa.float64()
    return pa.string()


def read_csv(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the rows of a file, in the types of `schema`; empty cells are null."""
    rows = _rows(path)
    names = next(rows)[1]
    taken: list[list[str]] = []
    characters = 0
    for _, cells in rows:
        taken.append(cells)
        characters += sum(map(len, cells))
        if len(taken) == ROWS_AT_A_TIME or characters > CHARACTERS_AT_A_TIME:
            yield _table(taken, names, schema)
            taken, characters = [], 0
    if taken:
        yield _table(taken, names, schema)


def _table(rows: list[list[str]], names: Sequence[str], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    converters: dict[Any, Any] = {pa.int64(): int, pa.float64(): float, pa.bool_(): lambda cell: cell.lower() == "true"}
    columns = []
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        kind = schema.field(name).type
        convert = converters.get(kind, str)
        columns.append(pa.array([convert(cell) if cell else None for cell in cells], kind))
    return pa.table(dict(zip(names, columns, strict=True))).select(schema.names)


def _kind(cell: str) -> str:
    # 0123 is a code rather than a number, and a whole number beyond 64 bits cannot be one here
    if _INT.fullmatch(cell):
        return "int" if len(cell) <= 20 and -(2**63) <= int(cell) < 2**63 else "text"
    lowered = cell.lower()
    if lowered in ("true", "false"):
        return "bool"
    if lowered in _SPECIAL:
        return "special"
    return "float" if len(cell) < 64 and _FLOAT.fullmatch(cell) and not re.match("-?0[0-9]", cell) else "text"


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells): the header first, then rows of as many cells. Blank lines are no rows."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # "a, b, c" in the header: the blanks belong to the manner of writing
    blanks = re.search(rf"{separator} +[^{separator} ]", next(text_lines(path), "")) is not None
    with _large_cells():
        reader = csv.reader(text_lines(path), delimiter=separator, strict=True, skipinitialspace=blanks)
        names: list[str] | None = None
        begins = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(_syntax(path, begins, reader.line_num, error)) from error
            if not cells or len(cells) == 1 and not cells[0].strip() and (names is None or len(names) > 1):
                begins = reader.line_num + 1
                continue
            if names is None:
                names = _header(path, cells, separator)
                yield begins, names
            elif len(cells) != len(names):
                raise DataError(_ragged(path, begins, cells, names, separator))
            else:
                yield begins, cells
            begins = reader.line_num + 1
    if names is None:
        raise DataError(f"data.source: '{path}' is empty: there is no header with the names of the columns.")


def _header(path: Path, cells: list[str], separator: str) -> list[str]:
    names = [cell.strip() or f"Unnamed: {position}" for position, cell in enumerate(cells)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"data.source: '{path}' has several columns named {shorten(twice)}; rename or remove them.")
    others = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
    likely = [said for other, said in others.items() if other != separator and other in names[0]]
    if len(names) == 1 and likely:
        raise DataError(
            f"data.source: '{path}' seems to have {likely[0]} between its cells (its first line is "
            f"{shorten_cell(names[0])}); write it with commas, or with tabs and the ending .tsv."
        )
    return names


def _ragged(path: Path, line: int, cells: list[str], names: list[str], separator: str) -> str:
    manner = "a tab" if separator == "\t" else "a comma"
    why = (
        f"A cell that has {manner} in it must stand in double quotes."
        if len(cells) > len(names)
        else "A cell is missing, or the quotes of one before it are wrong."
    )
    return (
        f"data.source: '{path}' line {line} has {len(cells)} cell(s), but the header names {len(names)} "
        f"({shorten(names, 6)}). {why}"
    )


def _syntax(path: Path, begins: int, line: int, error: csv.Error) -> str:
    where = f"data.source: '{path}' line {begins}"
    if "unexpected end" in str(error):
        return f"{where}: a cell begins with a double quote that is never closed (EOF inside string)."
    if "field limit" in str(error):
        return f"{where}: a cell is longer than {LARGEST_CELL >> 20} MB; is a double quote not closed there?"
    return (
        f"{where}: a cell goes on after its closing double quote, in line {line}. Double quotes within a cell are "
        'written twice (""), and the cell stands in quotes.'
    )


def shorten_cell(text: str) -> str:
    """Returns a cell as a message shows it: quoted, on one line, cut."""
    return repr(text[:60]) + ("…" if len(text) > 60 else "")


@contextmanager
def _large_cells() -> Iterator[None]:
    """The module's own limit is 128 kB; it is one for the whole process."""
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
