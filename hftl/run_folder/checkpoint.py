"""Checkpoints on disk: folders of safetensors and JSON, written atomically and verified by SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from hftl.atomic_files import PARTIAL, sync, write_text
from hftl.errors import CheckpointError, first_line, shorten
from hftl.logging import log

MANIFEST = "manifest.json"
"""Size and SHA-256 of every other file, written last. A folder without it is not a checkpoint."""
STATE = "state.json"
VERSION = 2
"""Format of `STATE`; another one is rejected."""
BEST = "best.safetensors"
_PREFIX = "step-"


class Checkpoints:
    """Checkpoints of a run: writes them in the background and keeps the newest `total_limit`.

    Files are written to a temporary folder and fsynced, then the manifest, then the folder is renamed. A folder with
    its final name is therefore complete after a crash at any moment.

    Args:
        folder: `checkpoints/` in the run folder.
        total_limit: Number of checkpoints to keep.
    """

    def __init__(self, folder: Path, total_limit: int) -> None:
        self.folder = folder
        self.total_limit = total_limit
        self.latest: int | None = None
        """Step of the newest complete checkpoint."""
        self._valid: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def newest(self) -> Path | None:
        """Returns the newest valid checkpoint; logs newer ones that are damaged, with the reason.

        Raises:
            CheckpointError: No checkpoint is valid, and some cannot be read.
        """
        damaged, unreadable = 0, []
        for path in sorted(self.folder.glob(f"{_PREFIX}[0-9]*"), reverse=True):
            if path.name.endswith(PARTIAL):
                continue
            try:
                problem = checkpoint_problem(path)
            except OSError as error:
                problem = f"it cannot be read ({error.strerror})"
                unreadable.append(f"{path.name}: {error.strerror}")
            if problem is None:
                self.latest, self._valid = int(path.name.removeprefix(_PREFIX)), [path.name]
                return path
            damaged += 1
            log(f"resume: skipped damaged checkpoint {path}: {problem}")
        if unreadable:
            raise CheckpointError(
                f"resume: no checkpoint in '{self.folder}' can be read ({shorten(unreadable, 3)}). Fix the disk or the "
                "permissions and run the same command again, or delete the folder to restart from step 0."
            )
        if damaged:
            log(f"resume: WARNING: all {damaged} checkpoint(s) are damaged; training restarts from step 0")
        return None

    def room(self) -> int:
        """Returns the bytes available for checkpoints: free space and the space of existing checkpoints."""
        used = sum(file.lstat().st_size for file in self.folder.rglob("*") if file.is_file())
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free + used

    def save(
        self, step: int, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]], best: Path | None
    ) -> None:
        """Starts writing the checkpoint after `step`; returns when `tensors` may be changed.

        Args:
            step: Step in the name of the folder.
            state: JSON values.
            tensors: Tensors by file name without extension; copied to the CPU before this method returns.
            best: File with the best weights so far, which becomes part of the checkpoint.

        Raises:
            CheckpointError: This checkpoint or the previous one cannot be written. The last valid one is intact.
        """
        self.wait()
        if step == self.latest:
            return
        copies = {name: {key: _copy(value) for key, value in group.items()} for name, group in tensors.items()}
        temporary = self.folder / f"{_PREFIX}{step:08d}{PARTIAL}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            sync(self.folder.parent)
            if best is not None:
                _link(best, temporary / BEST)  # now, since later weights may replace it during the write
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = self._writer.submit(self._write, step, temporary, state, copies)

    @property
    def failed(self) -> bool:
        """Whether the background write has failed; `wait` raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits for the background write.

        Raises:
            CheckpointError: The checkpoint cannot be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the background write and ends its thread."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, temporary: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        target = self.folder / f"{_PREFIX}{step:08d}"
        try:
            for name, group in tensors.items():
                save_file(group, temporary / f"{name}.safetensors")
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
            for file in sorted(temporary.iterdir()):
                sync(file)
            write_text(temporary / MANIFEST, json.dumps({"files": _describe(temporary)}, indent=2))
            if target.exists():  # a damaged one
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync(self.folder)
        except Exception as error:  # the main thread raises it on all processes
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(step, error) from error
        self.latest = step
        self._valid = [*(name for name in self._valid if name != target.name), target.name][-self.total_limit :]
        self._tidy()

    def _tidy(self) -> None:
        """Deletes all checkpoints except the newest valid ones."""
        for path in self.folder.glob(f"{_PREFIX}*"):
            if path.name not in self._valid and path.name <= max(self._valid):
                shutil.rmtree(path, ignore_errors=True)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        previous = f"{_PREFIX}{self.latest:08d} is intact" if self.latest is not None else "there is no earlier one"
        return CheckpointError(
            f"checkpoint: step {step} cannot be written to '{self.folder}': {_reason(error)}; {previous}. "
            "Fix the disk and run the same command with --resume auto."
        )


def checkpoint_problem(folder: Path) -> str | None:
    """Returns why a folder is not a valid checkpoint, or None if it is valid.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} has another SHA-256 than in {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name} is damaged ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None if STATE in files else f"{STATE} is missing"


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the JSON part of a valid checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def newest_version(folder: Path) -> int | None:
    """Returns the format of the newest checkpoint, unverified; None if there is none that can be read."""
    for path in sorted(folder.glob(f"{_PREFIX}[0-9]*/{STATE}"), reverse=True):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8")).get("version")
    return None


def clear_partial(folder: Path) -> None:
    """Removes the temporary files of an interrupted process from a run folder."""
    for path in sorted(folder.rglob(f"*{PARTIAL}")):
        log(f"resume: removed incomplete {path}")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _copy(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy of the tensor on the CPU, as safetensors stores it."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _link(file: Path, target: Path) -> None:
    """Hard-links a file that is replaced but never modified; copies it if the disk has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _reason(error: BaseException) -> str:
    return error.strerror or first_line(error) if isinstance(error, OSError) else first_line(error)
