"""Table files as memory-mapped rows: each file is validated completely, then written once to the Arrow cache.

The same reader scans and reads a file, so both interpret it equally. Column types cover all files of all splits.
Archives are never unpacked, and no code in files is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.data.tables.csv_table import csv_type, read_csv, scan_csv
from hftl.data.tables.json_table import read_json_table, scan_json
from hftl.data.tables.text_decoding import check_magic_bytes
from hftl.errors import DataError, HftlError, first_line, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_READERS = "hftl tables 1"
"""Reader version in the cache key; change it when a reader returns different rows."""
_SHARD = re.compile(r"[-_.]?(?:part|shard)?[-_.]?([0-9]+)(?:[-_.]of[-_.]([0-9]+)(?:-[0-9a-f]{6,})?)?", re.IGNORECASE)


def select_split_files(folder: Path, split: str, files: Mapping[str, list[Path]]) -> list[Path]:
    """Returns the tables of a split: one file, or numbered shards.

    Args:
        folder: Folder of the files, for the message.
        split: Split name.
        files: All files by the first word of their name (`val`, `dev`), which names the split.

    Raises:
        DataError: The choice is ambiguous, or a numbered shard is missing. `train_old.csv` is never added to
            `train.csv`.
    """
    suffixes = [(path, path.stem[len(word) :]) for word, paths in files.items() for path in paths]
    exact = [path for path, suffix in suffixes if not suffix]
    shards = {path: match for path, suffix in suffixes if (match := _SHARD.fullmatch(suffix))}
    if len(files) > 1 or exact and shards or len(exact) > 1 or not exact and not shards and len(suffixes) > 1:
        raise DataError(
            f"data.source: {shorten([path.name for path, _ in suffixes])} in '{folder}' could each be {split}. Keep "
            "one, or number the shards (train-00000-of-00002)."
        )
    if not exact and not shards:
        return [path for path, _ in suffixes]
    counts = {int(match[2]) for match in shards.values() if match[2]}
    if counts and (len(counts) > 1 or len(shards) != counts.copy().pop()):
        raise DataError(
            f"data.source: {split} in '{folder}' has {len(shards)} shard(s) of "
            f"{' and '.join(map(str, sorted(counts)))}: {shorten([path.name for path in shards])}. Add the others."
        )
    return exact or sorted(shards, key=lambda path: (int(shards[path][1]), path.name))


def open_tables(files: Mapping[str, list[Path]]) -> dict[str, Dataset]:
    """Returns the rows of each split; unchanged files come from the cache.

    Args:
        files: Files by split; the files of a split have the same format and columns.

    Raises:
        DataError: A file does not match the format of its extension; includes the file, and line or column if known.
    """
    from datasets import DatasetInfo

    from hftl.data.arrow_cache import CachedRows, is_cached

    key = [_READERS, {split: [_file_identity(path) for path in paths] for split, paths in files.items()}]
    for split, paths in files.items():
        extensions = {path.suffix.lower() for path in paths}
        if len(extensions) > 1:
            raise DataError(
                f"data.source: split {split} mixes {', '.join(sorted(extensions))} files: "
                f"{shorten([path.name for path in paths])}. Keep one format."
            )
    builders = {split: CachedRows([*key, split], split) for split in files}
    if not all(is_cached(builder) for builder in builders.values()):
        for split, features in _features(files).items():
            builders[split].info = DatasetInfo(features=features)
            builders[split].batches = lambda split=split, features=features: _read(files[split], features)
    out = {}
    for split, builder in builders.items():
        try:
            out[split] = builder.rows()
        except Exception as error:
            raise _to_data_error(error, files[split]) from error
    return out


def _file_identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _features(files: Mapping[str, list[Path]]) -> dict[str, Features]:
    """Returns the column types of each split; a CSV column has one type in all splits."""
    import pyarrow as pa
    from datasets import Features

    scans_by_split = {split: [_scan(path) for path in paths] for split, paths in files.items()}
    csv_types: dict[str, set[str]] = {}
    for scans in scans_by_split.values():
        for scan in scans:
            for name, types in scan.items() if isinstance(scan, dict) else ():
                csv_types[name] = csv_types.get(name, set()) | types
    out = {}
    for split, scans in scans_by_split.items():
        _check_same_columns(files[split], [list(scan if isinstance(scan, dict) else scan.names) for scan in scans])
        try:
            if isinstance(scans[0], dict):
                schema = pa.schema([(name, csv_type(csv_types[name])) for name in scans[0]])
            elif len(scans) > 1:
                schema = pa.unify_schemas(scans, promote_options="permissive").with_metadata(scans[0].metadata)
            else:
                schema = scans[0]
            fields = [_to_supported_type(field) for field in schema]
            out[split] = Features.from_arrow_schema(pa.schema(fields, schema.metadata))
        except (pa.ArrowException, ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
            raise _to_data_error(error, files[split]) from error
    return out


def _check_same_columns(paths: list[Path], columns: list[list[str]]) -> None:
    for path, names in zip(paths, columns, strict=True):
        extra, missing = set(names) - set(columns[0]), set(columns[0]) - set(names)
        is_json = path.suffix.lower() in (".json", ".jsonl")  # missing JSON fields are null
        if (extra or missing) and not is_json:
            differences = [
                f"has the additional column(s) {shorten(sorted(extra))}" if extra else "",
                f"lacks the column(s) {shorten(sorted(missing))}" if missing else "",
            ]
            raise DataError(
                f"data.source: '{path}' {' and '.join(filter(None, differences))}, compared with '{paths[0]}'. Use the "
                "same columns in all files of a split."
            )


def _to_supported_type(field: pa.Field) -> pa.Field:
    """Returns the field with a type that `datasets` supports: dictionary -> value type, null -> string."""
    import pyarrow as pa

    if pa.types.is_dictionary(field.type):
        return field.with_type(field.type.value_type)
    return field.with_type(pa.string()) if pa.types.is_null(field.type) else field


def _scan(path: Path) -> dict[str, set[str]] | pa.Schema:
    table_format = TABLES[path.suffix.lower()]
    if table_format == "csv":
        return scan_csv(path)
    return scan_json(path) if table_format == "json" else _scan_parquet(path)


def _scan_parquet(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_magic_bytes(path)
    if not path.stat().st_size:
        raise DataError(f"data.source: '{path}' is empty.")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _ = schema.names  # raises for column names that are not UTF-8
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        if "encrypt" in str(error).lower():
            reason = "it is encrypted; write it without encryption"
        elif "magic bytes" in str(error) or "too small" in str(error) or "smaller than" in str(error):
            reason = "it is truncated or not a Parquet file (no magic bytes at its end); copy it again"
        raise DataError(f"data.source: cannot read the Parquet file '{path}': {reason}.") from error
    duplicates = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if duplicates:
        raise DataError(f"data.source: '{path}' has duplicate columns: {shorten(duplicates)}. Rename or remove them.")
    return schema


def _read(paths: list[Path], features: Features) -> Iterator[pa.Table]:
    for path in paths:
        table_format = TABLES[path.suffix.lower()]
        if table_format == "parquet":
            yield from _read_parquet(path, features)
        else:
            yield from (read_csv if table_format == "csv" else read_json_table)(path, features.arrow_schema)


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
            f"data.source: '{path}' is damaged after row {rows} ({first_line(error)}). Copy or write it again."
        ) from error


def _to_data_error(error: BaseException, paths: list[Path]) -> BaseException:
    """Converts a library error to a DataError; returns the cause itself if it is an OSError (disk) or HftlError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (HftlError, OSError)):
            return cause
        cause = cause.__cause__
    reason = first_line(error.__cause__ or error)
    reason = "it has no rows" if "corresponds to no data" in reason else reason
    return DataError(f"data.source: cannot read '{shorten([str(path) for path in paths])}': {reason}.")
