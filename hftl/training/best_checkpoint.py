"""Best checkpoint: weights selected on validation, as safetensors in the run folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from torch import Tensor

from hftl.atomic_files import atomic_write
from hftl.distributed import run_on_main
from hftl.errors import CheckpointError, first_line
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task, is_row_fraction, larger_is_better
from hftl.training.training_state import broadcast, trainable_state

if TYPE_CHECKING:
    from accelerate import Accelerator


class BestMetric:
    """Best value of a metric so far, with the one-standard-error rule for later values.

    Args:
        task: Defines the direction of the metric, and whether it is a fraction of rows.
        metric: Name of the metric.
        rows: Rows of the evaluated split.
    """

    def __init__(self, task: Task, metric: str, rows: int) -> None:
        self.sign = 1 if larger_is_better(task, metric) else -1
        self.rows = rows if is_row_fraction(task, metric) else 0
        self.best: float | None = None
        self.since = 0
        """Number of values since the best one."""

    def offer(self, value: float) -> bool:
        """Returns whether to select weights with this value: it is at most one standard error below the best one.

        With 77 validation rows, 76 and 75 correct predictions do not differ significantly. Among weights that do not
        differ, the later ones, trained longer at a decaying learning rate, generalize better (one-standard-error rule,
        Breiman et al. 1984, which selects the simplest model within one error; measured in RESULTS.md). For metrics
        that are not fractions of rows, such as the loss, the error is unknown and taken as 0. NaN is never selected.
        """
        if math.isnan(value):
            self.since += 1
            return False
        if self.best is None or self.sign * value > self.sign * self.best:
            self.best, self.since = value, 0
        else:
            self.since += 1
        return self.sign * value >= self.sign * self.best - self.error

    @property
    def error(self) -> float:
        """Standard error of the best value if it is a fraction of rows (Agresti and Coull 1998), else 0."""
        assert self.best is not None
        if not self.rows:
            return 0.0
        fraction = (self.best * self.rows + 2) / (self.rows + 4)
        return math.sqrt(fraction * (1 - fraction) / self.rows)


class BestCheckpoint(BestMetric):
    """Writes the weights of the best evaluation to disk and restores them after training.

    Args:
        accelerator: Its main process reads and writes; tensors are broadcast to the others.
        model: The model itself, not the one prepared by Accelerate.
        folder: The run folder.
        task: Defines the direction of the metric, and whether it is a fraction of rows.
        metric: Name of the metric.
        rows: Rows of the validation split.
    """

    def __init__(
        self, accelerator: Accelerator, model: TaskModel, folder: Path, task: Task, metric: str, rows: int
    ) -> None:
        super().__init__(task, metric, rows)
        self.accelerator = accelerator
        self.model = model
        self.file = folder / "checkpoints" / "best" / "weights.safetensors"

    @property
    def path(self) -> Path | None:
        """The file with the best weights, on the main process; None before the first evaluation."""
        return self.file if self.best is not None else None

    def state(self) -> dict[str, Any]:
        """Returns the state for `load_state`, as JSON values."""
        return {"best": self.best, "since": self.since}

    def load_state(self, state: dict[str, Any], weights: Path | None) -> None:
        """Restores the state of a checkpoint with its file of weights, which only the main process needs."""
        self.best, self.since = state["best"], state["since"]
        if self.best is not None:
            self._write(lambda path: shutil.copyfile(str(weights), path))

    def offer(self, value: float) -> bool:
        """Saves the current weights if `BestMetric.offer` selects this value; returns whether it does.

        Raises:
            CheckpointError: The weights cannot be written; on all processes.
        """
        if not super().offer(value):
            return False

        def save(path: Path) -> None:
            from safetensors.torch import save_file

            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable_state(self.model).items()}
            save_file(weights, path)

        self._write(save)
        return True

    def _write(self, write: Callable[[Path], Any]) -> None:
        """Replaces the file on the main process; `write` writes to a temporary path."""
        run_on_main(self.accelerator, lambda: self._replace(write))

    def _replace(self, write: Callable[[Path], Any]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file) as path:
                write(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint: best weights cannot be written to '{self.file}': {first_line(error)}. The "
                "previous ones are intact. Fix the disk and run the same command with --resume auto."
            ) from error

    def share_buffers(self) -> None:
        """Broadcasts running statistics from the main process if they are updated, since they differ by process."""
        if self.accelerator.num_processes == 1 or self.model.frozen != "nothing":
            return
        from accelerate.utils import broadcast

        for buffer in self.model.buffers():
            buffer.copy_(cast(Tensor, broadcast(buffer.clone(), from_process=0)))

    def restore(self) -> None:
        """Restores the best weights on all processes."""
        if self.best is None:
            return
        from safetensors.torch import load_file

        saved = load_file(self.file) if self.accelerator.is_main_process else {}
        broadcast(self.accelerator, trainable_state(self.model), saved)
