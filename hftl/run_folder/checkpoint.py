"""Checkpoints on disk: folders of safetensors and JSON that are whole or absent, and known to be what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from hftl.atomic_files import PARTIAL, sync, write_text
from hftl.errors import CheckpointError, first_line, shorten
from hftl.logging import log

MANIFEST = "manifest.json"
"""Written last: size and SHA-256 of every other file. A folder without it is not a checkpoint."""
STATE = "state.json"
BEST = "best.safetensors"
_PREFIX = "step-"


class Checkpoints:
    """The states of one run, newest `keep` of them, written by one process in the background.

    A state is written aside, file by file, each flushed to the disk; then the manifest; then the folder takes its name.
    So what has the name is complete, whatever happened at whatever moment.

    Args:
        folder: `checkpoints/` in the run folder.
        keep: States that stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.latest: int | None = None
        """Step of the newest state that is on disk for sure."""
        self._good: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def newest(self) -> Path | None:
        """Returns the newest valid checkpoint, and says which newer ones are not valid and why.

        Raises:
            CheckpointError: None is valid, and of some nobody knows, as the disk does not let them be read.
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
                self.latest, self._good = int(path.name.removeprefix(_PREFIX)), [path.name]
                return path
            damaged += 1
            log(f"resume: {path} is passed over: {problem}")
        if unreadable:
            raise CheckpointError(
                f"resume: no state in '{self.folder}' can be read ({shorten(unreadable, 3)}). Mend the disk or the "
                "permissions and run the same command again, or delete the folder to start from the beginning."
            )
        if damaged:
            log(f"resume: WARNING: none of the {damaged} state(s) is whole; training starts FROM THE BEGINNING")
        return None

    def available_bytes(self) -> int:
        """Returns the bytes available for checkpoints: free space and the space of existing checkpoints."""
        used = sum(file.lstat().st_size for file in self.folder.rglob("*") if file.is_file())
        existing = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        return shutil.disk_usage(existing).free + used

    def save(
        self, step: int, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]], best: Path | None
    ) -> None:
        """Begins to write the state after `step`; returns when `tensors` may change again.

        Args:
            step: Names the folder.
            state: JSON values.
            tensors: By file name without ending; copied to the CPU before this returns.
            best: File with the weights kept so far, which travels along.

        Raises:
            CheckpointError: This state, or the one before it, cannot be written. The last good one is intact.
        """
        self.wait()
        if step == self.latest:
            return
        copies = {name: {key: _copy(value) for key, value in group.items()} for name, group in tensors.items()}
        aside = self.folder / f"{_PREFIX}{step:08d}{PARTIAL}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            sync(self.folder.parent)
            if best is not None:
                _link(best, aside / BEST)  # now: by the time the rest is written, there may be better ones
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = self._writer.submit(self._write, step, aside, state, copies)

    @property
    def failed(self) -> bool:
        """Whether what is being written in the background is known to have gone wrong; `wait` says how."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits for the state that is being written.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Ends the writing thread, when it is done with what it has."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, aside: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        target = self.folder / f"{_PREFIX}{step:08d}"
        try:
            for name, group in tensors.items():
                save_file(group, aside / f"{name}.safetensors")
            (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
            for file in sorted(aside.iterdir()):
                sync(file)
            write_text(aside / MANIFEST, json.dumps({"files": _describe(aside)}, indent=2))
            if target.exists():  # one that was passed over as damaged
                shutil.rmtree(target)
            os.rename(aside, target)
            sync(self.folder)
        except Exception as error:  # in a thread: whatever it is, all processes have to hear of it
            shutil.rmtree(aside, ignore_errors=True)
            raise self._failure(step, error) from error
        self.latest = step
        self._good = [*(name for name in self._good if name != target.name), target.name][-self.keep :]
        self._tidy()

    def _tidy(self) -> None:
        """Deletes every state but those that are known to be good."""
        for path in self.folder.glob(f"{_PREFIX}*"):
            if path.name not in self._good and path.name <= max(self._good):
                shutil.rmtree(path, ignore_errors=True)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        good = f"{_PREFIX}{self.latest:08d} is intact" if self.latest is not None else "there is no earlier one"
        return CheckpointError(
            f"checkpoint: the state after step {step} cannot be written to '{self.folder}': {_reason(error)}; {good}. "
            "Mend the disk and run the same command with --resume auto."
        )


def checkpoint_problem(folder: Path) -> str | None:
    """Returns why a folder is not a valid checkpoint, or None where it is one.

    Raises:
        OSError: The disk does not say.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, said in files.items():
            size = (folder / name).stat().st_size
            if size != said["size"]:
                return f"{name} has {size} bytes instead of {said['size']}"
            if _sha256(folder / name) != said["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
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


def clear_partial(folder: Path) -> None:
    """Removes what an interrupted process left half written in a run folder."""
    for path in sorted(folder.rglob(f"*{PARTIAL}")):
        log(f"resume: {path} was not finished when the run ended, and is removed")
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
    """Returns the tensor on the CPU, in memory of its own, laid out as safetensors stores it."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _link(file: Path, target: Path) -> None:
    """Gives a file that is replaced but never changed a second name; a copy where the disk has no such thing."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _reason(error: BaseException) -> str:
    return error.strerror or first_line(error) if isinstance(error, OSError) else first_line(error)
