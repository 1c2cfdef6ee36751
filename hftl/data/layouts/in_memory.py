"""Rows given from Python: data sets, or anything that yields mappings, written once so that they can be counted.

A stream has no length and no order that several processes could share. As a file it has both, so counts, order and
metrics are exact on any number of processes, and a run can be stopped and resumed.
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
"""Beginning of `data.source` for rows that were given from Python; what follows is their name."""
_ROWS_AT_A_TIME = 1_000
_opened = itertools.count()


def dataset_from_rows(rows: Any) -> dict[str, Dataset]:
    """Returns rows by the names of their splits, as data sets on disk.

    Args:
        rows: A mapping (or `DatasetDict`) of split names to rows; rows alone are training rows. Rows are a
            `datasets.Dataset`, taken as it is, or an `IterableDataset` or any iterable of mappings by column,
            read once. Under a launcher each process makes its own; one of each machine reads, the others take its file.

    Raises:
        DataError: There are no rows, a row is no mapping, a column changes its type, or reading fails; names the row.
    """
    from datasets import Dataset

    by_split = rows if isinstance(rows, Mapping) else {"train": rows}
    out = {}
    for split, part in by_split.items():
        if isinstance(part, Dataset):
            out[str(split)] = part
        elif isinstance(part, Iterable) and not isinstance(part, (str, bytes, Mapping)):
            found = _written(part, str(split))
            if found is not None:
                out[str(split)] = found
        else:
            raise DataError(
                f"rows: '{split}' is a {type(part).__name__}; give a datasets.Dataset or an iterable of mappings."
            )
    return out


def _written(rows: Iterable[Any], split: str) -> Dataset | None:
    """Returns the rows of an iterable as a file in the cache, which goes when the process ends; None without rows."""
    from hftl.data.arrow_cache import Written

    maker = Written([*_launch(), next(_opened), split], "train")
    maker.batches = lambda: _batches(rows, split)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        atexit.register(shutil.rmtree, maker.cache_dir, ignore_errors=True)
    try:
        found = maker.rows()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (DataError, OSError)):
            cause = cause.__cause__
        if cause is None and ("corresponds to no data" in str(error) or "SchemaInference" in repr(error.__cause__)):
            return None
        raise cause or DataError(f"rows: '{split}' cannot be written: {first_line(error)}") from error
    # by content, so that equal rows are known as equal in a resumed run and on another machine
    found._fingerprint = _digest(Path(file["filename"]) for file in found.cache_files)
    return found


def _launch() -> tuple[Any, ...]:
    """Returns what the processes of one launch on this machine have in common, and no other launch has."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return (uuid.uuid4().hex,)
    return os.getppid(), _started(os.getppid()), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _started(pid: int) -> str:
    """Returns when a process began: its number alone comes again, in a container with every start."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since boot
    except OSError:
        import psutil  # comes with accelerate; on Linux its clock is corrected between two processes' questions

        return str(psutil.Process(pid).create_time())


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:32]


def _batches(rows: Iterable[Any], split: str) -> Iterator[pa.Table]:
    from datasets import Features, Image, IterableDataset, Value

    features: Features | None = None
    if isinstance(rows, IterableDataset) and rows.features is not None:
        features = rows.features
        for name, kind in features.items():
            if isinstance(kind, Image):  # bytes as they are, not decoded and written anew
                rows = rows.cast_column(name, Image(decode=False))
    stream = _checked(rows, split)
    start = 0
    while batch := list(itertools.islice(stream, _ROWS_AT_A_TIME)):
        table, found = _table(batch, features, split, start)
        if features is None:
            empty = [name for name, kind in found.items() if isinstance(kind, Value) and kind.dtype == "null"]
            features = Features({**found, **{name: Value("string") for name in empty}})
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
                f"rows: row {start + offset} of '{split}' has column(s) {shorten(unknown)} that earlier rows lack."
            )
    try:
        made = Dataset.from_dict({name: [row.get(name) for row in batch] for name in names}, features=features)
    except Exception as error:
        where = f"rows {start} to {start + len(batch) - 1} of '{split}'"
        raise DataError(f"rows: {where} do not fit one type for each column: {first_line(error)}") from error
    return made.data.table, made.features


def _checked(rows: Iterable[Any], split: str) -> Iterator[Mapping[str, Any]]:
    number = 0
    stream = iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"rows: '{split}' fails after {number} row(s): {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(f"rows: row {number} of '{split}' is a {type(row).__name__}, not a mapping by column name.")
        yield row
        number += 1
