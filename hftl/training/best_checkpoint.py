"""The best weights so far, as safetensors in the run folder."""

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
    """The best value of a metric so far, and whether a later one is worth its weights.

    Args:
        task: Says which values are better, and whether they are shares of rows.
        metric: Name of the metric.
        rows: Size of the split that it is measured on.
    """

    def __init__(self, task: Task, metric: str, rows: int) -> None:
        self.sign = 1 if larger_is_better(task, metric) else -1
        self.rows = rows if is_row_fraction(task, metric) else 0
        self.best: float | None = None
        self.since = 0
        """Values since the best one."""

    def offer(self, value: float) -> bool:
        """Returns whether to keep what has this value: unless it is worse than the best by more than a standard error.

        A validation split of 77 rows cannot tell 76 right answers from 75, and of weights that it cannot tell apart the
        later ones, trained longer at a falling rate, do better on new rows (the one-standard-error rule of Breiman et
        al. 1984, which takes the simplest of the models within one error; measured here: RESULTS.md). For metrics that
        are not shares of rows, such as the loss, the error is unknown and taken as 0.
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
        """Returns the standard error of the best value as a share of rows (Agresti and Coull 1998), else 0."""
        assert self.best is not None
        if not self.rows:
            return 0.0
        share = (self.best * self.rows + 2) / (self.rows + 4)
        return math.sqrt(share * (1 - share) / self.rows)


class BestCheckpoint(BestMetric):
    """Keeps the weights of the best evaluation on disk and puts them back at the end.

    Args:
        accelerator: Only its main process writes and reads; the others are sent the tensors.
        model: The model itself, not the one that Accelerate prepared.
        folder: The run folder.
        task: As for `BestMetric`.
        metric: Likewise.
        rows: Size of the validation split.
    """

    def __init__(
        self, accelerator: Accelerator, model: TaskModel, folder: Path, task: Task, metric: str, rows: int
    ) -> None:
        super().__init__(task, metric, rows)
        self.accelerator = accelerator
        self.model = model
        self.file = folder / "checkpoints" / "best" / "weights.safetensors"

    @property
    def kept(self) -> Path | None:
        """The file with the weights kept so far, on the main process."""
        return self.file if self.best is not None else None

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` needs, as JSON values."""
        return {"best": self.best, "since": self.since}

    def load_state(self, state: dict[str, Any], kept: Path | None) -> None:
        """Goes on from an earlier state, whose weights are in the file `kept` (needed on the main process alone)."""
        self.best, self.since = state["best"], state["since"]
        if self.best is not None:
            self._write(lambda aside: shutil.copyfile(str(kept), aside))

    def offer(self, value: float) -> bool:
        """Keeps the current weights where their value is worth it; returns whether they were kept.

        Raises:
            CheckpointError: They cannot be written; on all processes.
        """
        if not super().offer(value):
            return False

        def save(aside: Path) -> None:
            from safetensors.torch import save_file

            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable_state(self.model).items()}
            save_file(weights, aside)

        self._write(save)
        return True

    def _write(self, write: Callable[[Path], Any]) -> None:
        """Replaces the file, on the main process, by what `write` puts into another."""
        run_on_main(self.accelerator, lambda: self._replace(write))

    def _replace(self, write: Callable[[Path], Any]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file) as aside:
                write(aside)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint: the best weights cannot be written to '{self.file}': {first_line(error)}. Those "
                "before are intact. Mend the disk and run the same command with --resume auto."
            ) from error

    def share_buffers(self) -> None:
        """Gives all processes the running statistics of the main one, where they move: each has seen its own rows."""
        if self.accelerator.num_processes == 1 or self.model.frozen != "nothing":
            return
        from accelerate.utils import broadcast

        for buffer in self.model.buffers():
            buffer.copy_(cast(Tensor, broadcast(buffer.clone(), from_process=0)))

    def restore(self) -> None:
        """Puts the best weights back, on all processes."""
        if self.best is None:
            return
        from safetensors.torch import load_file

        saved = load_file(self.file) if self.accelerator.is_main_process else {}
        broadcast(self.accelerator, trainable_state(self.model), saved)
