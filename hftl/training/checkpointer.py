"""Saving the state of a training and going on from it, on any number of processes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hftl.config.schema import RunConfig
from hftl.distributed import run_on_main
from hftl.errors import CheckpointError
from hftl.logging import log
from hftl.models.oom_retry import MicroBatchLimit
from hftl.models.task_model import TaskModel
from hftl.run_folder.checkpoint import BEST, Checkpoints, read_state
from hftl.run_folder.history import Recorder
from hftl.training.best_checkpoint import BestCheckpoint
from hftl.training.training_state import (
    OPTIMIZER,
    VERSION,
    WEIGHTS,
    broadcast,
    frozen_fingerprint,
    is_finite,
    load_optimizer_tensors,
    load_random_state,
    optimizer_tensors,
    random_state,
    trainable_state,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset


@dataclass
class Training:
    """The parts of a running training whose state is saved."""

    accelerator: Accelerator
    model: TaskModel
    optimizer: torch.optim.Optimizer
    best: BestCheckpoint
    recorder: Recorder
    limit: MicroBatchLimit
    run_identity: dict[str, Any]
    """What must be the same for a state to be usable: see `run_identity`."""


class Checkpointer:
    """Saves the state of a training when it is due, and finds the one to go on from.

    Args:
        accelerator: From `start`. Its main process reads and writes, so that no disk need be shared.
        run: Uses `run.checkpoint`.
        folder: The run folder.
    """

    def __init__(self, accelerator: Accelerator, run: RunConfig, folder: Path) -> None:
        self.accelerator = accelerator
        self.config = run.checkpoint
        self.store = Checkpoints(folder / "checkpoints", run.checkpoint.total_limit)
        self.saved_at = time.monotonic()
        self.failure: CheckpointError | None = None
        self._found: Path | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def find(self) -> dict[str, Any] | None:
        """Returns the JSON part of the newest valid state, the same on all processes; None where there is none.

        Raises:
            CheckpointError: There are some, and the disk does not let them be read, or another version wrote them.
        """

        def read() -> dict[str, Any] | None:
            self._found = self.store.newest()
            state = read_state(self._found) if self._found else None
            if state and state.get("version") != VERSION:
                raise CheckpointError(
                    f"resume: {self._found} was written by another version of hftl (format {state.get('version')}, "
                    f"here {VERSION}). Go on with that version, or choose another output_dir."
                )
            return state

        return run_on_main(self.accelerator, read, self.store.folder)

    def check_disk_space(self, training: Training) -> None:
        """Refuses to begin where the disk has no room for the states to come, the one being written included.

        Raises:
            CheckpointError: Says what is needed and what is free; on all processes.
        """

        def check() -> None:
            weights = sum(tensor.nbytes for tensor in trainable_state(training.model).values())
            learning = sum(each.nbytes for each in training.model.parameters() if each.requires_grad)
            state, keep = 2 * weights + 2 * learning, self.config.total_limit  # the best weights, AdamW's two moments
            needed = (keep + 1) * state
            free = self.store.room()
            if free < needed:
                raise CheckpointError(
                    f"checkpoint: {keep} + 1 states of {size(state)} (weights, best weights, optimizer) need "
                    f"{size(needed)} in '{self.store.folder}', where {size(free)} are free. Make room, lower "
                    "checkpoint.total_limit, or choose an output_dir on another disk."
                )

        run_on_main(self.accelerator, check)

    def load(self, training: Training, state: dict[str, Any]) -> tuple[bool, bool]:
        """Restores the checkpoint that `find` returned, except for the recorder.

        Returns:
            Whether the evaluation after the last step is pending, and whether training is finished.
        """
        from safetensors.torch import load_file

        accelerator, found = self.accelerator, self._found
        read = {name: load_file(found / f"{name}.safetensors") if found else {} for name in (WEIGHTS, OPTIMIZER)}
        broadcast(accelerator, trainable_state(training.model), read[WEIGHTS])
        load_optimizer_tensors(accelerator, training.model, training.optimizer, read[OPTIMIZER])
        training.best.load_state(state["best"], found / BEST if found else None)
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        world, before = accelerator.num_processes, len(state["processes"])
        if world == before:
            mine = state["processes"][accelerator.process_index]
            load_random_state(accelerator.device, mine["random"])
            training.limit.rows = mine["rows_training"] if training.limit.enabled else None
            training.model.evaluation_limit.rows = mine["rows_evaluation"]
        other = "" if world == before else f" (of {before} process(es): same rows in the same steps, other rounding)"
        log(f"resume: going on after step {state['recorder']['history']['steps']} from {found}{other}")
        return state["eval_pending"], state["finished"]

    @property
    def due(self) -> bool:
        """Whether the clock of this process asks for a save."""
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def failed(self, training: Training) -> bool:
        """Whether something that this process wrote is known not to have reached the disk."""
        return (self.failure or training.recorder.failure) is not None or self.store.failed

    def save(
        self, training: Training, *, eval_pending: bool = False, finished: bool = False, wait: bool = False
    ) -> None:
        """Saves the state; all processes call it together.

        Args:
            training: What is saved.
            eval_pending: The evaluation after the last step has not been made.
            finished: No step is left.
            wait: Return when it is on the disk, rather than when it has been copied.

        Raises:
            CheckpointError: It cannot be written (with `wait`; else `failed` tells, and `flush` raises).
        """
        mine = {
            "random": random_state(self.accelerator.device),
            "rows_training": training.limit.rows,
            "rows_evaluation": training.model.evaluation_limit.rows,
        }
        processes = _gather(self.accelerator, mine)
        self.saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            recorder = training.recorder.state()
            state = {
                **training.run_identity,
                "eval_pending": eval_pending,
                "finished": finished,
                "recorder": recorder,
                "best": training.best.state(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "processes": processes,
            }
            tensors = {WEIGHTS: trainable_state(training.model)}
            tensors[OPTIMIZER] = optimizer_tensors(training.model, training.optimizer)
            try:
                self.store.save(recorder["history"]["steps"], state, tensors, training.best.kept)
            except CheckpointError as error:
                self.failure = error
        if wait:
            self.flush(training)

    def save_if_finite(self, training: Training) -> bool:
        """Saves the state, unless its weights are not all numbers; returns whether it did."""
        good = run_on_main(self.accelerator, lambda: is_finite(training.model))
        if good:
            self.save(training, wait=True)
        return good

    def flush(self, training: Training) -> None:
        """Waits until everything is on the disk.

        Raises:
            CheckpointError: It cannot be written; on all processes.
        """

        def check() -> None:
            self.store.wait()
            failure = self.failure or training.recorder.failure
            if failure:
                raise failure

        run_on_main(self.accelerator, check)


def run_identity(
    model: TaskModel, rows: Dataset, effective_batch: int, total: int, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what a state must have in common with a run that goes on from it, as JSON values.

    Raises:
        CheckpointError: The `earlier` state has not.
    """
    mine = {
        "version": VERSION,
        "data": data_fingerprint(rows),
        "backbone": frozen_fingerprint(model),
        "effective_batch": effective_batch,
        "total": total,
    }
    if earlier:
        _refuse_other(earlier, mine)
    return mine


def data_fingerprint(rows: Dataset) -> str:
    """Returns the number of rows and a hash of 64 of them, evenly spaced; of images on disk the name alone counts."""
    picked = np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int)
    table: Any = rows.select(picked).with_format("arrow")[:]
    digest = hashlib.sha256()
    for row in table.to_pylist():
        for name, value in row.items():
            if isinstance(value, dict) and "bytes" in value:
                value = hashlib.sha256(value["bytes"]).digest() if value["bytes"] else Path(value["path"] or "").name
            digest.update(f"{name}={value!r}\n".encode(errors="backslashreplace"))
    return f"{len(rows)} rows {digest.hexdigest()}"


def _refuse_other(state: dict[str, Any], expected: dict[str, Any]) -> None:
    words = {
        "data": "was made with other training rows",
        "backbone": "was made with other pretrained weights",
        "total": "belongs to a training of another length",
    }
    wrong = [words[name] for name in words if state.get(name) != expected[name]]
    if wrong:
        raise CheckpointError(
            f"resume: the newest checkpoint {' and '.join(wrong)}. Give the run what it was started with, or choose "
            "another output_dir."
        )


def size(count: float) -> str:
    """Returns a number of bytes as people say it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _gather(accelerator: Accelerator, value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]
