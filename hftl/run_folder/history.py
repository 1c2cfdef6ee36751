"""What happened, as JSON lines on disk, to the trackers, and to the reader: a live bar or plain lines."""

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
    """The records of a run, in order; each has `step` and some of loss, lr and metrics by split."""

    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """step, metric and value of the weights that were kept."""
    steps: int = 0
    skipped: int = 0
    """Steps that left the weights as they were, because loss or gradient were not finite; those in which fp16 only
    looks for its loss scale do not count."""
    seconds: float = 0.0
    """Wall time of training, evaluations included."""
    selection: dict[str, Any] = field(default_factory=dict)
    """Where settings were chosen by cross-validation: all that were tried, their scores, and the chosen ones."""


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with None for numbers that JSON cannot hold (NaN, infinities)."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


class Recorder:
    """Writes a `History` while it grows. Only the main process writes; all keep the records.

    Args:
        accelerator: From `start`.
        run: Uses the trackers.
        folder: The run folder.
        total_steps: Steps of the whole training.
        earlier: What `state` returned when the training was stopped; history.jsonl is cut back to it.
    """

    def __init__(
        self, accelerator: Accelerator, run: RunConfig, folder: Path, total_steps: int, earlier: dict[str, Any] | None
    ) -> None:
        earlier = earlier or {"history": {}, "losses": [0.0, 0]}
        self.history = History(**earlier["history"])
        self._losses, self._count = earlier["losses"]
        self.accelerator = accelerator
        self.total = total_steps
        self.started = time.perf_counter() - self.history.seconds
        self.path = folder / "history.jsonl"
        self.file: TextIO | None = None
        self.failure: CheckpointError | None = None
        """Why a record is not on disk; the loop brings it before all processes."""
        run_on_main(accelerator, self._begin, folder)
        if run.train.trackers:
            values = leaves(run).items()
            config = {
                name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in values
            }
            named = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}
            options: dict[str, Any] = {
                tracker: {key: folder.name} for tracker, key in named.items() if tracker in run.train.trackers
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
        """Returns what another `Recorder` needs to go on, as JSON values."""
        seconds = time.perf_counter() - self.started
        history = {**vars(self.history), "records": [finite(record) for record in self.history.records]}
        return {"history": {**history, "seconds": seconds}, "losses": [self._losses, self._count]}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Ends the bar and the file. Trackers stay open for the metrics of `publish`, unless there will be none."""
        self.history.seconds = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.close()
        self._close_file()
        for tracker in self.accelerator.trackers if error else ():
            tracker.finish()

    def advance(self, loss: float | None) -> None:
        """Counts a step and its mean loss; None where weights stayed as they were."""
        self.history.steps += 1
        if loss is not None:
            self._losses += loss
            self._count += 1
        if self.bar is not None:
            self.bar.update()

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since this was asked last; NaN where there were none."""
        mean = self._losses / self._count if self._count else math.nan
        self._losses, self._count = 0.0, 0
        return mean

    def log_step(self, epoch: float, skipped_loss: float | None, grad_norm: float, rates: Mapping[str, float]) -> None:
        """Records the current step.

        Args:
            epoch: Epochs so far, with fraction.
            skipped_loss: Loss of a step that left the weights as they were; None logs `mean_loss`.
            grad_norm: Norm of the gradient before clipping.
            rates: Learning rate by parameter group.
        """
        loss = self.mean_loss() if skipped_loss is None else skipped_loss
        values = {"epoch": epoch, "train/loss": loss, "grad_norm": grad_norm}
        values |= {f"lr/{group}": rate for group, rate in rates.items()}
        self.log(values if skipped_loss is None else values | {"skipped_steps": self.history.skipped})

    def log(self, values: dict[str, float], unsaid: Collection[str] = ()) -> None:
        """Records values at the current step; those named in `unsaid` stand on file and in trackers alone."""
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
                f"{error.strerror or first_line(error)}. Saved states are intact. Mend the disk and run the same "
                "command with --resume auto."
            )
        line = " ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in unsaid)
        if self.bar is not None:
            self.bar.write(f"step {self.history.steps}/{self.total} {line}")
        else:
            log(f"step {self.history.steps}/{self.total} {line}")

    def flush(self) -> None:
        """Raises the `CheckpointError` of a record that is not on disk; to be called by the main process for all."""
        if self.failure:
            raise self.failure

    def _close_file(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what a failing disk did not take has been reported
                self.file.close()
            self.file = None
