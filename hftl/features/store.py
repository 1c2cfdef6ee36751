"""Features on disk: arrays that grow row by row, that a stop leaves usable, and that take their name when whole."""

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
"""Of the files below; raised when their meaning changes. Folders of another one are not read, and made anew."""
META, VALUES, LABELS, DONE = "meta.json", "features.npy", "labels.npy", "done.npy"
ASIDE = ".growing"


def cache_folder() -> Path:
    """Returns where features are kept: `$HFTL_CACHE/features`, by default ~/.cache/hftl/features."""
    return Path(os.environ.get("HFTL_CACHE") or Path.home() / ".cache" / "hftl").expanduser() / "features"


def read_whole(folder: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]] | None:
    """Returns values, labels and description of a finished folder; None where it is absent, damaged or foreign."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return None
        if any((folder / name).stat().st_size != size for name, size in meta["bytes"].items()):
            return None
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / LABELS, mmap_mode="r", allow_pickle=False) if LABELS in meta["bytes"] else None
        os.utime(folder / META)  # when it was used last, for whoever clears the folder
        return values, labels, meta
    return None


class PartialFeatures:
    """The arrays of one folder while rows are added, in any order.

    What is there is found again after a stop at any moment: a row is marked as done after it was written. Only one
    process may have it open; `hftl.features.cache` holds a lock.

    Args:
        folder: Its name when it is whole.
        rows: Their number N.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.aside = folder.with_name(folder.name + ASIDE)
        self.rows = rows
        self.seconds = 0.0
        self.linear = True
        """Whether all batches so far were linear in the head; see `FeatureExtractor.linear`."""
        self._arrays: dict[str, np.memmap] = {}
        self._new: list[np.ndarray] = []
        if not self._reopen():
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)

    def _reopen(self) -> bool:
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((self.aside / META).read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                return False
            for name in state["arrays"]:
                self._arrays[name] = np.lib.format.open_memmap(self.aside / name, mode="r+")
            self.seconds, self.linear = state["seconds"], state["linear"]
            if all(len(array) == self.rows for array in self._arrays.values()) and DONE in self._arrays:
                return True
        self._arrays = {}
        return False

    @property
    def done(self) -> np.ndarray:
        """Which rows are there, [N] bool."""
        return np.asarray(self._arrays[DONE], dtype=bool) if DONE in self._arrays else np.zeros(self.rows, dtype=bool)

    def add(self, index: np.ndarray, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Writes the rows `index` [B]."""
        if not self._arrays:
            self._make(values, labels)
        self._arrays[VALUES][index] = values
        if LABELS in self._arrays and labels is not None:
            self._arrays[LABELS][index] = labels
        self._new.append(index)

    def _make(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        found = {VALUES: values} | ({} if labels is None else {LABELS: labels}) | {DONE: np.zeros(0, dtype=np.uint8)}
        try:
            for name, like in found.items():
                shape, file = (self.rows, *like.shape[1:]), self.aside / name
                self._arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=like.dtype, shape=shape)
                _reserve(file)
        except OSError:
            self._arrays = {}
            shutil.rmtree(self.aside, ignore_errors=True)
            raise
        self.keep(0.0, True)

    def keep(self, seconds: float, linear: bool) -> None:
        """Brings what is there to the disk, with how long it took, and marks the rows as done after that."""
        for name in self._arrays:
            self._arrays[name].flush()
        if self._new:
            self._arrays[DONE][np.concatenate(self._new)] = 1
            self._arrays[DONE].flush()
            self._new = []
        self.seconds += seconds
        self.linear &= linear
        state = {"format": FORMAT, "arrays": list(self._arrays), "seconds": self.seconds, "linear": self.linear}
        write_text(self.aside / META, json.dumps(state))

    def finish(self, described: Mapping[str, Any], linear: bool) -> None:
        """Gives the folder its name, all rows being there."""
        self.keep(0.0, linear)
        assert self.done.all()
        names = [name for name in self._arrays if name != DONE]
        self._arrays = {}  # before the folder moves: some systems keep open files where they are
        for name in names:
            sync(self.aside / name)
        (self.aside / DONE).unlink()
        sizes = {name: (self.aside / name).stat().st_size for name in names}
        meta = {"format": FORMAT, "bytes": sizes, "seconds": self.seconds, "linear": self.linear, **described}
        write_text(self.aside / META, json.dumps(meta, indent=2, ensure_ascii=False))
        if self.folder.exists():  # damaged, or of another format: nothing that is whole is ever made anew
            shutil.rmtree(self.folder)
        self.aside.rename(self.folder)
        sync(self.folder.parent)


def _reserve(file: Path) -> None:
    """Takes the room that a mapped file will need: a disk that is full later would end the process by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
