"""Table files -> memory-mapped rows: each file checked whole, then written once to the cache of `datasets`.

One reader scans and reads, so that nothing is understood in two ways; types are those of the whole column, over all
files of all splits. Nothing is unpacked or executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.data.tables.csv_table import csv_type, read_csv, scan_csv
from hftl.data.tables.json_table import read_json_table, scan_json
from hftl.data.tables.text_decoding import refuse_disguised
from hftl.errors import DataError, HftlError, first_line, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_READERS = "hftl tables 1"
"""Part of the key in the cache; to be changed when a reader understands a file otherwise."""
_SHARD = re.compile(r"[-_.]?(?:part|shard)?[-_.]?([0-9]+)(?:[-_.]of[-_.]([0-9]+)(?:-[0-9a-f]{6,})?)?", re.IGNORECASE)


def files_of_split(folder: Path, split: str, files: Mapping[str, list[Path]]) -> list[Path]:
    """Returns the tables that together are one split: one file, or numbered parts of one.

    Args:
        folder: Where they stand, for the message.
        split: The split.
        files: By the word that names the split (`val`, `dev`): all files whose names begin with it.

    Raises:
        DataError: It cannot be known which are meant, or a numbered part is missing. `train_old.csv` is never added to
            `train.csv`.
    """
    listed = [(path, path.stem[len(word) :]) for word, paths in files.items() for path in paths]
    exact = [path for path, rest in listed if not rest]
    parts = {path: found for path, rest in listed if (found := _SHARD.fullmatch(rest))}
    if len(files) > 1 or exact and parts or len(exact) > 1 or not exact and not parts and len(listed) > 1:
        raise DataError(
            f"data.source: {shorten([path.name for path, _ in listed])} in '{folder}' could each be {split}; keep one, "
            "or number its parts (train-00000-of-00002)."
        )
    if not exact and not parts:
        return [path for path, _ in listed]
    counts = {int(found[2]) for found in parts.values() if found[2]}
    if counts and (len(counts) > 1 or len(parts) != counts.copy().pop()):
        raise DataError(
            f"data.source: {split} in '{folder}' has {len(parts)} part(s), but their names say "
            f"{' and '.join(map(str, sorted(counts)))}: {shorten([path.name for path in parts])}."
        )
    return exact or sorted(parts, key=lambda path: (int(parts[path][1]), path.name))


def open_tables(files: Mapping[str, list[Path]]) -> dict[str, Dataset]:
    """Returns the rows of each split, from the cache where these very files were read before.

    Args:
        files: The files of each split; those of one split are of one format and have the same columns.

    Raises:
        DataError: A file cannot be read as what its name says; names the file, and line or column where there is one.
    """
    from datasets import DatasetInfo

    from hftl.data.arrow_cache import Written, is_written

    key = [_READERS, {split: [_identity(path) for path in paths] for split, paths in files.items()}]
    for split, paths in files.items():
        kinds = {path.suffix.lower() for path in paths}
        if len(kinds) > 1:
            raise DataError(
                f"data.source: split {split} mixes {', '.join(sorted(kinds))} files: "
                f"{shorten([path.name for path in paths])}."
            )
    makers = {split: Written([*key, split], split) for split in files}
    if not all(is_written(maker) for maker in makers.values()):
        for split, features in _features(files).items():
            makers[split].info = DatasetInfo(features=features)
            makers[split].batches = lambda split=split, features=features: _read(files[split], features)
    out = {}
    for split, maker in makers.items():
        try:
            out[split] = maker.rows()
        except Exception as error:
            raise _explained(error, files[split]) from error
    return out


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _features(files: Mapping[str, list[Path]]) -> dict[str, Features]:
    """Returns the columns and types of each split; a column of a CSV has one type in all splits."""
    import pyarrow as pa
    from datasets import Features

    found = {split: [_scan(path) for path in paths] for split, paths in files.items()}
    kinds: dict[str, set[str]] = {}
    for scans in found.values():
        for scan in scans:
            for name, seen in scan.items() if isinstance(scan, dict) else ():
                kinds[name] = kinds.get(name, set()) | seen
    out = {}
    for split, scans in found.items():
        _same_columns(files[split], [list(scan if isinstance(scan, dict) else scan.names) for scan in scans])
        try:
            if isinstance(scans[0], dict):
                schema = pa.schema([(name, csv_type(kinds[name])) for name in scans[0]])
            elif len(scans) > 1:
                schema = pa.unify_schemas(scans, promote_options="permissive").with_metadata(scans[0].metadata)
            else:
                schema = scans[0]
            out[split] = Features.from_arrow_schema(pa.schema([_storable(field) for field in schema], schema.metadata))
        except (pa.ArrowException, ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
            raise _explained(error, files[split]) from error
    return out


def _same_columns(paths: list[Path], columns: list[list[str]]) -> None:
    for path, names in zip(paths, columns, strict=True):
        more, less = set(names) - set(columns[0]), set(columns[0]) - set(names)
        json_fields = path.suffix.lower() in (".json", ".jsonl")  # where a field that is missing is null
        if (more or less) and not json_fields:
            lists = [
                f"has {shorten(sorted(more))} too" if more else "",
                f"lacks {shorten(sorted(less))}" if less else "",
            ]
            raise DataError(
                f"data.source: '{path}' {' and '.join(filter(None, lists))}, compared with '{paths[0]}'; files of one "
                "split have the same columns."
            )


def _storable(field: pa.Field) -> pa.Field:
    """Returns the field in a type that `datasets` has: categories as their values, a column of nothing as texts."""
    import pyarrow as pa

    if pa.types.is_dictionary(field.type):
        return field.with_type(field.type.value_type)
    return field.with_type(pa.string()) if pa.types.is_null(field.type) else field


def _scan(path: Path) -> dict[str, set[str]] | pa.Schema:
    kind = TABLES[path.suffix.lower()]
    if kind == "csv":
        return scan_csv(path)
    return scan_json(path) if kind == "json" else _scan_parquet(path)


def _scan_parquet(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    refuse_disguised(path)
    if not path.stat().st_size:
        raise DataError(f"data.source: '{path}' is empty.")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _ = schema.names  # decoded here, so that names that are no text fail here
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        if "encrypt" in str(error).lower():
            reason = "it is encrypted; write it without encryption"
        elif "magic bytes" in str(error) or "too small" in str(error) or "smaller than" in str(error):
            reason = "it is cut off or no Parquet file (no magic bytes at its end); copy it again"
        raise DataError(f"data.source: cannot read the Parquet file '{path}': {reason}.") from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"data.source: '{path}' has several columns named {shorten(twice)}; rename or remove them.")
    return schema


def _read(paths: list[Path], features: Features) -> Iterator[pa.Table]:
    for path in paths:
        kind = TABLES[path.suffix.lower()]
        if kind == "parquet":
            yield from _read_parquet(path, features)
        else:
            yield from (read_csv if kind == "csv" else read_json_table)(path, features.arrow_schema)


def _read_parquet(path: Path, features: Features) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import table_cast

    schema = features.arrow_schema
    rows = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1_000):
                table = pa.table(batch).select(schema.names)
                table.validate(full=True)
                yield table_cast(table, schema)
                rows += len(table)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"data.source: '{path}' is damaged after row {rows} ({first_line(error)}); copy or write it again."
        ) from error


def _explained(error: BaseException, paths: list[Path]) -> BaseException:
    """Returns the sentence behind an error of the libraries; a full disk and its kin stay what they are."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (HftlError, OSError)):
            return cause
        cause = cause.__cause__
    reason = first_line(error.__cause__ or error)
    reason = "it holds no rows" if "corresponds to no data" in reason else reason
    return DataError(f"data.source: cannot read {_names(paths)}: {reason}.")


def _names(paths: list[Path]) -> str:
    return shorten([str(path) for path in paths])
