"""On-disk feature arrays: written row by row, resumable after an interruption, and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hftl.atomic_files import sync, write_text

FORMAT = 1
"""Version of the file format. Folders of another version are recomputed."""
META, VALUES, LABELS, DONE = "meta.json", "features.npy", "labels.npy", "done.npy"
PARTIAL_SUFFIX = ".growing"
"""Suffix of the folder name while features are incomplete."""


def cache_folder() -> Path:
    """Returns the cache folder of features: `$HFTL_CACHE/features`, by default ~/.cache/hftl/features."""
    return Path(os.environ.get("HFTL_CACHE") or Path.home() / ".cache" / "hftl").expanduser() / "features"


def read_features(folder: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]] | None:
    """Returns values, labels and metadata of complete features; None if they are missing, damaged or incompatible."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return None
        if any((folder / name).stat().st_size != size for name, size in meta["bytes"].items()):
            return None
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / LABELS, mmap_mode="r", allow_pickle=False) if LABELS in meta["bytes"] else None
        os.utime(folder / META)  # time of last use, for cleanup of the cache
        return values, labels, meta
    return None


class PartialFeatures:
    """Incomplete feature arrays, to which rows are added in any order.

    Flushed rows survive an interruption at any time, because a row is marked as done after it was written. Only one
    process may open it; `hftl.features.cache` holds a lock.

    Args:
        folder: Folder name of the complete features.
        rows: Number of rows N.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.partial_folder = folder.with_name(folder.name + PARTIAL_SUFFIX)
        self.rows = rows
        self.seconds = 0.0
        self.linear = True
        """Whether all batches so far were linear in the head; see `FeatureExtractor.linear`."""
        self._arrays: dict[str, np.memmap] = {}
        self._unflushed: list[np.ndarray] = []
        if not self._resume():
            shutil.rmtree(self.partial_folder, ignore_errors=True)
            self.partial_folder.mkdir(parents=True)

    def _resume(self) -> bool:
        """Opens the arrays of an interrupted run, and returns whether they are usable."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((self.partial_folder / META).read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                return False
            for name in state["arrays"]:
                self._arrays[name] = np.lib.format.open_memmap(self.partial_folder / name, mode="r+")
            self.seconds, self.linear = state["seconds"], state["linear"]
            if all(len(array) == self.rows for array in self._arrays.values()) and DONE in self._arrays:
                return True
        self._arrays = {}
        return False

    @property
    def done(self) -> np.ndarray:
        """Whether each row is written and flushed, [N] bool."""
        return np.asarray(self._arrays[DONE], dtype=bool) if DONE in self._arrays else np.zeros(self.rows, dtype=bool)

    def add(self, index: np.ndarray, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Writes features and labels of the rows `index` [B]; `flush` marks them as done."""
        if not self._arrays:
            self._create(values, labels)
        self._arrays[VALUES][index] = values
        if LABELS in self._arrays and labels is not None:
            self._arrays[LABELS][index] = labels
        self._unflushed.append(index)

    def _create(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Creates arrays for N rows with the dtypes and row shapes of the first batch."""
        batch = {VALUES: values} | ({} if labels is None else {LABELS: labels}) | {DONE: np.zeros(0, dtype=np.uint8)}
        try:
            for name, array in batch.items():
                shape, file = (self.rows, *array.shape[1:]), self.partial_folder / name
                self._arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=array.dtype, shape=shape)
                _allocate(file)
        except OSError:
            self._arrays = {}
            shutil.rmtree(self.partial_folder, ignore_errors=True)
            raise
        self.flush(0.0, True)

    def flush(self, seconds: float, linear: bool) -> None:
        """Flushes new rows to disk and then marks them as done.

        Args:
            seconds: Computation time since the last flush.
            linear: Whether all batches so far were linear in the head.
        """
        for name in self._arrays:
            self._arrays[name].flush()
        if self._unflushed:
            self._arrays[DONE][np.concatenate(self._unflushed)] = 1
            self._arrays[DONE].flush()
            self._unflushed = []
        self.seconds += seconds
        self.linear &= linear
        state = {"format": FORMAT, "arrays": list(self._arrays), "seconds": self.seconds, "linear": self.linear}
        write_text(self.partial_folder / META, json.dumps(state))

    def finish(self, metadata: Mapping[str, Any], linear: bool) -> None:
        """Writes the metadata and renames the folder; requires that all rows are written."""
        self.flush(0.0, linear)
        assert self.done.all()
        names = [name for name in self._arrays if name != DONE]
        self._arrays = {}  # closes the files: some systems cannot rename folders with open files
        for name in names:
            sync(self.partial_folder / name)
        (self.partial_folder / DONE).unlink()
        sizes = {name: (self.partial_folder / name).stat().st_size for name in names}
        meta = {"format": FORMAT, "bytes": sizes, "seconds": self.seconds, "linear": self.linear, **metadata}
        write_text(self.partial_folder / META, json.dumps(meta, indent=2, ensure_ascii=False))
        if self.folder.exists():  # damaged or of another format: valid features are never recomputed
            shutil.rmtree(self.folder)
        self.partial_folder.rename(self.folder)
        sync(self.folder.parent)


def _allocate(file: Path) -> None:
    """Allocates the disk blocks of a memory-mapped file, because writing to it on a full disk raises SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
