"""Checkpointing and resuming, on any number of processes."""

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
from hftl.run_folder.checkpoint import BEST, VERSION, Checkpoints, read_state
from hftl.run_folder.history import Recorder
from hftl.training.best_checkpoint import BestCheckpoint
from hftl.training.training_state import (
    OPTIMIZER,
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
    """Objects of a running training whose state is saved in checkpoints."""

    accelerator: Accelerator
    model: TaskModel
    optimizer: torch.optim.Optimizer
    best: BestCheckpoint
    recorder: Recorder
    limit: MicroBatchLimit
    run_identity: dict[str, Any]
    """Values that must match for a checkpoint to be usable; see `run_identity`."""


class Checkpointer:
    """Saves checkpoints and finds the one to resume from.

    Args:
        accelerator: From `create_accelerator`. Its main process reads and writes, so no shared disk is needed.
        run: Uses `run.checkpoint`.
        folder: The run folder.
    """

    def __init__(self, accelerator: Accelerator, run: RunConfig, folder: Path) -> None:
        self.accelerator = accelerator
        self.config = run.checkpoint
        self.store = Checkpoints(folder / "checkpoints", run.checkpoint.total_limit)
        self.saved_at = time.monotonic()
        self.failure: CheckpointError | None = None
        self._loaded_from: Path | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def find(self) -> dict[str, Any] | None:
        """Returns the JSON part of the newest valid checkpoint, the same on all processes; None if there is none.

        Raises:
            CheckpointError: Checkpoints exist but cannot be read, or were written by another version.
        """

        def read() -> dict[str, Any] | None:
            self._loaded_from = self.store.newest()
            state = read_state(self._loaded_from) if self._loaded_from else None
            if state and state.get("version") != VERSION:
                raise CheckpointError(
                    f"resume: checkpoint '{self._loaded_from}' has format {state.get('version')} of another version of "
                    f"hftl; allowed: {VERSION}. Install that version or set another output_dir."
                )
            return state

        return run_on_main(self.accelerator, read, self.store.folder)

    def check_disk_space(self, training: Training) -> None:
        """Checks that the disk has space for all checkpoints of the run, including one that is being written.

        Raises:
            CheckpointError: The disk has too little free space; on all processes.
        """

        def check() -> None:
            weights = sum(tensor.nbytes for tensor in trainable_state(training.model).values())
            trainable = sum(each.nbytes for each in training.model.parameters() if each.requires_grad)
            limit = self.config.total_limit
            checkpoint = 2 * weights + 2 * trainable  # with the best weights and the two moments of AdamW
            needed = (limit + 1) * checkpoint
            free = self.store.room()
            if free < needed:
                raise CheckpointError(
                    f"checkpoint: {limit} + 1 checkpoints of {format_bytes(checkpoint)} (weights, best weights, "
                    f"optimizer) need {format_bytes(needed)} in '{self.store.folder}'; {format_bytes(free)} are free. "
                    "Free disk space, lower checkpoint.total_limit, or set an output_dir on another disk."
                )

        run_on_main(self.accelerator, check)

    def load(self, training: Training, state: dict[str, Any]) -> tuple[bool, bool]:
        """Restores the checkpoint that `find` returned, except for the recorder.

        Returns:
            Whether the evaluation after the last step is pending, and whether training is finished.
        """
        from safetensors.torch import load_file

        accelerator, path = self.accelerator, self._loaded_from
        tensors = {name: load_file(path / f"{name}.safetensors") if path else {} for name in (WEIGHTS, OPTIMIZER)}
        broadcast(accelerator, trainable_state(training.model), tensors[WEIGHTS])
        load_optimizer_tensors(accelerator, training.model, training.optimizer, tensors[OPTIMIZER])
        training.best.load_state(state["best"], path / BEST if path else None)
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        world, saved_world = accelerator.num_processes, len(state["processes"])
        note = ""
        if world == saved_world:
            own = state["processes"][accelerator.process_index]
            load_random_state(accelerator.device, own["random"])
            training.limit.rows = own["rows_training"] if training.limit.enabled else None
            training.model.evaluation_limit.rows = own["rows_evaluation"]
        else:
            note = f" (saved with {saved_world} process(es); steps have the same rows, rounding differs)"
        log(f"resume: resumed after step {state['recorder']['history']['steps']} from {path}{note}")
        return state["eval_pending"], state["finished"]

    @property
    def due(self) -> bool:
        """Whether `checkpoint.save_minutes` have passed on this process since the last checkpoint."""
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def failed(self, training: Training) -> bool:
        """Whether a write of this process to the disk has failed."""
        return (self.failure or training.recorder.failure) is not None or self.store.failed

    def save(
        self, training: Training, *, eval_pending: bool = False, finished: bool = False, wait: bool = False
    ) -> None:
        """Saves a checkpoint; all processes must call it.

        Args:
            training: The training to save.
            eval_pending: Whether the evaluation after the last step is pending.
            finished: Whether no step is left.
            wait: Whether to return when the checkpoint is on disk, not already when its tensors are copied.

        Raises:
            CheckpointError: The checkpoint cannot be written. Without `wait`, `failed` is true and `flush` raises.
        """
        own = {
            "random": random_state(self.accelerator.device),
            "rows_training": training.limit.rows,
            "rows_evaluation": training.model.evaluation_limit.rows,
        }
        processes = _gather(self.accelerator, own)
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
                self.store.save(recorder["history"]["steps"], state, tensors, training.best.path)
            except CheckpointError as error:
                self.failure = error
        if wait:
            self.flush(training)

    def save_if_finite(self, training: Training) -> bool:
        """Saves a checkpoint if all weights are finite; returns whether they are."""
        finite = run_on_main(self.accelerator, lambda: is_finite(training.model))
        if finite:
            self.save(training, wait=True)
        return finite

    def flush(self, training: Training) -> None:
        """Waits until all writes are on disk.

        Raises:
            CheckpointError: A write failed; on all processes.
        """

        def check() -> None:
            self.store.wait()
            failure = self.failure or training.recorder.failure
            if failure:
                raise failure

        run_on_main(self.accelerator, check)


def run_identity(
    model: TaskModel, rows: Dataset, effective_batch: int, total: int, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the values that a checkpoint and the run that resumes from it must share, as JSON values.

    Args:
        model: The model before training.
        rows: The training rows.
        effective_batch: Rows per step.
        total: Steps of the run.
        saved: State of the checkpoint to resume from, if any.

    Raises:
        CheckpointError: `saved` has other values.
    """
    identity = {
        "version": VERSION,
        "data": data_fingerprint(rows),
        "backbone": frozen_fingerprint(model),
        "effective_batch": effective_batch,
        "total": total,
    }
    if saved:
        _check_identity(saved, identity)
    return identity


def data_fingerprint(rows: Dataset) -> str:
    """Returns the number of rows and a hash of 64 evenly spaced ones; images on disk are hashed by file name."""
    indices = np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int)
    table: Any = rows.select(indices).with_format("arrow")[:]
    digest = hashlib.sha256()
    for row in table.to_pylist():
        for name, value in row.items():
            if isinstance(value, dict) and "bytes" in value:
                value = hashlib.sha256(value["bytes"]).digest() if value["bytes"] else Path(value["path"] or "").name
            digest.update(f"{name}={value!r}\n".encode(errors="backslashreplace"))
    return f"{len(rows)} rows {digest.hexdigest()}"


def _check_identity(state: dict[str, Any], expected: dict[str, Any]) -> None:
    descriptions = {
        "data": "other training rows",
        "backbone": "other pretrained weights",
        "total": "another number of steps",
    }
    different = [descriptions[name] for name in descriptions if state.get(name) != expected[name]]
    if different:
        raise CheckpointError(
            f"resume: the newest checkpoint was saved with {' and '.join(different)}. Restore the original data and "
            "settings, or set another output_dir."
        )


def format_bytes(count: float) -> str:
    """Returns a number of bytes with its unit, such as "367 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _gather(accelerator: Accelerator, value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]
