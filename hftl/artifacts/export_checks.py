"""What an exported file computes, beside the trained model: logits, metrics of a whole split, latency."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import cycle
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hftl.artifacts.exporters import Compute
from hftl.config.schema import DataConfig, RunConfig, TrainConfig
from hftl.evaluation.evaluate import evaluate_rows
from hftl.launcher import build_accelerator
from hftl.loading.loader import Examples
from hftl.logging import suppress_logs
from hftl.models.oom_retry import MicroBatchLimit
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task

SIZES = (1, 7, 32)
"""Rows at a time in the comparison; graphs are traced with 2."""
_TIMED = (1, 32)
_ROUNDS, _SECONDS = 30, 10.0


class RealRows:
    """Encoded rows of a split, and an even sample of them.

    Args:
        task: Collates them.
        rows: From `task.encode`.
        count: Size of the sample, at most.
    """

    def __init__(self, task: Task, rows: Examples, count: int) -> None:
        self.task = task
        self.rows = rows
        self.sample: list[int] = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist()

    def inputs(self, rows: list[int], count: int) -> dict[str, Tensor]:
        """Returns the model's inputs for the first `count` of `rows`."""
        return self.task.collate(self.rows.fetch(rows[:count], 0))["inputs"]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yields the sample in batches of `SIZES`, by turns."""
        left, sizes = self.sample, cycle(SIZES)
        while left:
            size = next(sizes)
            yield self.inputs(left, size)
            left = left[size:]


def largest_differences(
    model: TaskModel, opened: Mapping[str, Compute], real: RealRows
) -> tuple[dict[str, float], float]:
    """Returns the largest logit difference of each file to `model`, and the largest logit, over the sample."""
    differences: dict[str, list[Tensor]] = {name: [] for name in opened}
    scales = []
    with torch.no_grad():
        for inputs in real.batches():
            expected = model(inputs)["logits"]
            scales.append(expected.abs().max())
            for name, compute in opened.items():
                found = compute(inputs)
                if found.shape != expected.shape:
                    raise ValueError(f"{name} returns {tuple(found.shape)} where {tuple(expected.shape)} is right")
                differences[name].append((found - expected).abs().max())
    # torch's maximum keeps NaN, Python's loses it
    return {name: float(torch.stack(each).max()) for name, each in differences.items()}, float(
        torch.stack(scales).max()
    )


def metrics_of(compute: Compute, model: TaskModel, real: RealRows, data: DataConfig) -> dict[str, float]:
    """Returns the metrics of all rows, by the same path as those of the trained model."""
    run = RunConfig(data=data, train=TrainConfig(batch_size_per_device=32))
    with suppress_logs():
        stand_in = cast(TaskModel, _Exported(compute, model.modality))
        return evaluate_rows(build_accelerator(), stand_in, real.task, real.rows, run)


def milliseconds(opened: Mapping[str, Compute], real: RealRows) -> dict[str, dict[str, float]]:
    """Returns the median latency of each file at 1 and 32 real rows; files take turns, so that noise meets all."""
    found: dict[str, dict[str, float]] = {name: {} for name in opened}
    lengths = real.rows.lengths
    order = real.sample if lengths is None else sorted(real.sample, key=lambda row: int(lengths[row]))
    middle = order[len(order) // 2 :]  # a text of median length, where there are lengths
    for size in _TIMED:
        inputs = real.inputs(middle if size == 1 else real.sample, size)
        rows = next(iter(inputs.values())).shape[0]
        taken: dict[str, list[float]] = {name: [] for name in opened}
        with torch.no_grad():
            for compute in opened.values():
                compute(inputs)  # the first call allocates
            until = time.perf_counter() + _SECONDS
            while len(taken[next(iter(opened))]) < _ROUNDS and time.perf_counter() < until:
                for name, compute in opened.items():
                    start = time.perf_counter()
                    compute(inputs)
                    taken[name].append(time.perf_counter() - start)
        for name, seconds in taken.items():
            found[name][f"milliseconds_at_{rows}"] = round(1000 * median(seconds), 3)
    return found


def format_table(report: Mapping[str, Any], metric: str) -> str:
    """Returns size, metric and latency of each file as a small table, each also relative to the first (fp32)."""
    files: dict[str, dict[str, Any]] = report["files"]
    (first, reference), *others = files.items()
    timed = [name for name in reference if name.startswith("milliseconds_at_")]
    titles = ["MB", metric, *(f"ms at {name.rpartition('_')[2]}" for name in timed)]
    lines = [f"{'file':<16}" + "".join(f"{title:>16}" for title in titles)]
    for name, figures in files.items():
        cells = [f"{figures['megabytes']:.2f}", f"{figures[metric]:.4f}", *(f"{figures[key]:.2f}" for key in timed)]
        lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    for name, figures in others:
        ratios = [
            f"{figures['megabytes'] / reference['megabytes']:.2f}x",
            f"{figures[metric] - reference[metric]:+.4f}",
        ]
        ratios += [f"{figures[key] / reference[key]:.2f}x" for key in timed]
        lines.append(f"{'  of ' + first:<16}" + "".join(f"{cell:>16}" for cell in ratios))
        if figures["milliseconds_at_1"] > reference["milliseconds_at_1"]:
            lines.append(f"{name} is slower than {first} here: use it for its size alone.")
    return "\n".join(lines)


class _Exported(nn.Module):
    """An exported file in the place of a `TaskModel`, so that it is evaluated as one."""

    def __init__(self, compute: Compute, modality: str) -> None:
        super().__init__()
        self.compute, self.modality = compute, modality
        self.evaluation_limit = MicroBatchLimit("evaluation")

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.compute(inputs)}
