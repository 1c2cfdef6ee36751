"""In-memory datasets: rows from Python (datasets or iterables of mappings), written once to the Arrow cache.

A stream has no length and no order that processes could share. A file has both: counts, order and metrics are exact
with any number of processes, and runs can be resumed.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.errors import DataError, first_line, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

GIVEN = "python:"
"""Prefix of `data.source` for rows from Python; a name follows."""
_BATCH_SIZE = 1_000
_dataset_count = itertools.count()


def dataset_from_rows(rows: Any) -> dict[str, Dataset]:
    """Returns memory-mapped datasets by split name.

    Args:
        rows: A mapping (or `DatasetDict`) of split names to rows, or training rows only. Rows are a
            `datasets.Dataset`, used as given, or an `IterableDataset` or any iterable of mappings by column name,
            read once. Under a launcher, every process passes its own iterable; one process per machine reads it, the
            others map its file.

    Raises:
        DataError: A row is not a mapping, a column changes its type, or reading fails; includes the row number.
    """
    from datasets import Dataset

    by_split = rows if isinstance(rows, Mapping) else {"train": rows}
    out = {}
    for split, split_rows in by_split.items():
        if isinstance(split_rows, Dataset):
            out[str(split)] = split_rows
        elif isinstance(split_rows, Iterable) and not isinstance(split_rows, (str, bytes, Mapping)):
            dataset = _write_to_cache(split_rows, str(split))
            if dataset is not None:
                out[str(split)] = dataset
        else:
            raise DataError(
                f"rows: '{split}' is of type {type(split_rows).__name__}. Pass a datasets.Dataset or an iterable of "
                "mappings."
            )
    return out


def _write_to_cache(rows: Iterable[Any], split: str) -> Dataset | None:
    """Writes an iterable to the cache until the process ends; None without rows."""
    from hftl.data.arrow_cache import CachedRows

    builder = CachedRows([*_launch_id(), next(_dataset_count), split], "train")
    builder.batches = lambda: _batches(rows, split)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        atexit.register(shutil.rmtree, builder.cache_dir, ignore_errors=True)
    try:
        dataset = builder.rows()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (DataError, OSError)):
            cause = cause.__cause__
        if cause is None and ("corresponds to no data" in str(error) or "SchemaInference" in repr(error.__cause__)):
            return None
        raise cause or DataError(f"rows: cannot write '{split}': {first_line(error)}") from error
    # content hash: equal rows keep their fingerprint in resumed runs and on other machines
    dataset._fingerprint = _content_hash(Path(file["filename"]) for file in dataset.cache_files)
    return dataset


def _launch_id() -> tuple[Any, ...]:
    """Returns a key that the processes of one launch on this machine share, and that is unique to the launch."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return (uuid.uuid4().hex,)
    return os.getppid(), _start_time(os.getppid()), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _start_time(pid: int) -> str:
    """Returns the start time of a process; the pid alone is reused, in containers after every start."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since boot
    except OSError:
        import psutil  # a dependency of accelerate; not on Linux, where clock adjustments change its value

        return str(psutil.Process(pid).create_time())


def _content_hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _batches(rows: Iterable[Any], split: str) -> Iterator[pa.Table]:
    from datasets import Features, Image, IterableDataset, Value

    features: Features | None = None
    if isinstance(rows, IterableDataset) and rows.features is not None:
        features = rows.features
        for name, kind in features.items():
            if isinstance(kind, Image):  # copies the bytes without decoding and encoding
                rows = rows.cast_column(name, Image(decode=False))
    stream = _validated(rows, split)
    start = 0
    while batch := list(itertools.islice(stream, _BATCH_SIZE)):
        table, inferred = _table(batch, features, split, start)
        if features is None:
            empty = [name for name, kind in inferred.items() if isinstance(kind, Value) and kind.dtype == "null"]
            features = Features({**inferred, **{name: Value("string") for name in empty}})
            table = _table(batch, features, split, start)[0] if empty else table
        yield table
        start += len(batch)


def _table(batch: list[Any], features: Features | None, split: str, start: int) -> tuple[pa.Table, Features]:
    from datasets import Dataset

    names = list(features) if features is not None else list(dict.fromkeys(name for row in batch for name in row))
    for offset, row in enumerate(batch):
        unknown = [str(name) for name in row if name not in names]
        if unknown:
            raise DataError(
                f"rows: row {start + offset} of '{split}' has column(s) {shorten(unknown)}, missing in earlier rows. "
                "Pass the same columns in all rows."
            )
    try:
        dataset = Dataset.from_dict({name: [row.get(name) for row in batch] for name in names}, features=features)
    except Exception as error:
        numbers = f"rows {start} to {start + len(batch) - 1} of '{split}'"
        raise DataError(f"rows: {numbers} have a column of mixed types: {first_line(error)}") from error
    return dataset.data.table, dataset.features


def _validated(rows: Iterable[Any], split: str) -> Iterator[Mapping[str, Any]]:
    number = 0
    stream = iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"rows: '{split}' failed after {number} row(s): {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(
                f"rows: row {number} of '{split}' is of type {type(row).__name__}, not a mapping by column name."
            )
        yield row
        number += 1
