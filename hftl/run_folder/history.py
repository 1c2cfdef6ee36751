"""Training history: JSON lines on disk, trackers, and a progress bar or log lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hftl.atomic_files import write_text
from hftl.config.schema import RunConfig, leaves
from hftl.distributed import run_on_main
from hftl.errors import CheckpointError, first_line
from hftl.logging import log

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class History:
    """Records of a run in order; each has `step` and some of loss, learning rates and metrics."""

    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """`step`, `metric` and `value` of the best checkpoint."""
    steps: int = 0
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient, without those in which fp16 lowers its loss scale."""
    seconds: float = 0.0
    """Wall-clock time of training in seconds, including evaluations."""
    selection: dict[str, Any] = field(default_factory=dict)
    """Cross-validation results of a probe: scores of all settings, and the selected ones."""


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with None for NaN and infinities, which JSON does not support."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


class Recorder:
    """Recorder of a `History`. All processes keep the records; the main process writes them.

    Args:
        accelerator: From `create_accelerator`.
        run: Uses `train.trackers`.
        folder: The run folder.
        total_steps: Steps of the training.
        saved: Result of `state` in the checkpoint to resume from; history.jsonl is truncated to it.
    """

    def __init__(
        self, accelerator: Accelerator, run: RunConfig, folder: Path, total_steps: int, saved: dict[str, Any] | None
    ) -> None:
        saved = saved or {"history": {}, "losses": [0.0, 0]}
        self.history = History(**saved["history"])
        self._losses, self._count = saved["losses"]
        self.accelerator = accelerator
        self.total = total_steps
        self.started = time.perf_counter() - self.history.seconds
        self.path = folder / "history.jsonl"
        self.file: TextIO | None = None
        self.failure: CheckpointError | None = None
        """Error of a failed write, which the training loop raises on all processes."""
        run_on_main(accelerator, self._begin, folder)
        if run.train.trackers:
            values = leaves(run).items()
            config = {
                name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in values
            }
            name_keys = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}
            options: dict[str, Any] = {
                tracker: {key: folder.name} for tracker, key in name_keys.items() if tracker in run.train.trackers
            }
            options["tensorboard"] = {"purge_step": self.history.steps + 1} if self.history.steps else {}
            accelerator.init_trackers("hftl", config=config, init_kwargs=options)
        self.bar: Any = None
        if accelerator.is_main_process and total_steps and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=self.history.steps, unit="step", dynamic_ncols=True)

    def _begin(self) -> None:
        lines = [json.dumps(finite(record)) + "\n" for record in self.history.records]
        write_text(self.path, "".join(lines))
        self.file = self.path.open("a", encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Returns the state for a resumed `Recorder`, as JSON values."""
        seconds = time.perf_counter() - self.started
        history = {**vars(self.history), "records": [finite(record) for record in self.history.records]}
        return {"history": {**history, "seconds": seconds}, "losses": [self._losses, self._count]}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes bar and file. Trackers stay open for the metrics of `save_run`, except after an error."""
        self.history.seconds = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.close()
        self._close_file()
        for tracker in self.accelerator.trackers if error else ():
            tracker.finish()

    def advance(self, loss: float | None) -> None:
        """Counts a step and its mean loss; None for a step that left the weights unchanged."""
        self.history.steps += 1
        if loss is not None:
            self._losses += loss
            self._count += 1
        if self.bar is not None:
            self.bar.update()

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since the last call; NaN without steps."""
        mean = self._losses / self._count if self._count else math.nan
        self._losses, self._count = 0.0, 0
        return mean

    def log_step(self, epoch: float, skipped_loss: float | None, grad_norm: float, rates: Mapping[str, float]) -> None:
        """Records the current step.

        Args:
            epoch: Epochs so far, with fraction.
            skipped_loss: Loss of a step that left the weights unchanged; None records `mean_loss`.
            grad_norm: Norm of the gradient before clipping.
            rates: Learning rate by parameter group.
        """
        loss = self.mean_loss() if skipped_loss is None else skipped_loss
        values = {"epoch": epoch, "train/loss": loss, "grad_norm": grad_norm}
        values |= {f"lr/{group}": rate for group, rate in rates.items()}
        self.log(values if skipped_loss is None else values | {"skipped_steps": self.history.skipped})

    def log(self, values: dict[str, float], unlogged: Collection[str] = ()) -> None:
        """Records values of the current step; names in `unlogged` go to file and trackers only."""
        record = {"step": self.history.steps, **values}
        self.history.records.append(record)
        try:
            if self.file is not None:
                self.file.write(json.dumps(finite(record)) + "\n")
                self.file.flush()
            if self.accelerator.trackers:
                self.accelerator.log(values, step=self.history.steps)
        except OSError as error:
            self._close_file()
            self.failure = CheckpointError(
                f"history: the record of step {self.history.steps} cannot be written to '{self.path}': "
                f"{error.strerror or first_line(error)}. Saved checkpoints are intact. Fix the disk and run the same "
                "command with --resume auto."
            )
        numbers = (f"{name} {value:.4g}" for name, value in values.items() if name not in unlogged)
        line = ", ".join([f"train: step {self.history.steps}/{self.total}", *numbers])
        if self.bar is not None:
            self.bar.write(line)
        else:
            log(line)

    def flush(self) -> None:
        """Raises the `CheckpointError` of a failed write; call it through `run_on_main`."""
        if self.failure:
            raise self.failure

    def _close_file(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # `failure` has the error of the write
                self.file.close()
            self.file = None
