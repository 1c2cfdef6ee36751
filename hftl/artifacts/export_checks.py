"""Checks of exported files: logit differences to the trained model, metrics on a split, latency."""

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

BATCH_SIZES = (1, 7, 32)
"""Batch sizes of the comparison; graphs are traced with 2."""
_TIMED_BATCH_SIZES = (1, 32)
_MAX_REPEATS, _MAX_SECONDS = 30, 10.0


class SampledRows:
    """Encoded rows of a split, and an evenly spaced sample of them.

    Args:
        task: Task with the collate function.
        rows: Encoded rows, from `task.encode`.
        count: Maximum size of the sample.
    """

    def __init__(self, task: Task, rows: Examples, count: int) -> None:
        self.task = task
        self.rows = rows
        self.sample: list[int] = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist()

    def inputs(self, rows: list[int], count: int) -> dict[str, Tensor]:
        """Returns the model inputs of the first `count` entries of `rows`."""
        return self.task.collate(self.rows.fetch(rows[:count], 0))["inputs"]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yields the sample in batches whose sizes cycle through `BATCH_SIZES`."""
        remaining, sizes = self.sample, cycle(BATCH_SIZES)
        while remaining:
            size = next(sizes)
            yield self.inputs(remaining, size)
            remaining = remaining[size:]


def max_logit_differences(
    model: TaskModel, exports: Mapping[str, Compute], sampled: SampledRows
) -> tuple[dict[str, float], float]:
    """Returns per file the largest absolute logit difference to `model`, and the largest absolute logit of `model`.

    Raises:
        ValueError: The logits of a file have another shape than those of `model`.
    """
    differences: dict[str, list[Tensor]] = {name: [] for name in exports}
    scales = []
    with torch.no_grad():
        for inputs in sampled.batches():
            expected = model(inputs)["logits"]
            scales.append(expected.abs().max())
            for name, compute in exports.items():
                logits = compute(inputs)
                if logits.shape != expected.shape:
                    raise ValueError(
                        f"{name} returns logits of shape {tuple(logits.shape)}; expected {tuple(expected.shape)}"
                    )
                differences[name].append((logits - expected).abs().max())
    # torch's max propagates NaN, Python's max does not
    maxima = {name: float(torch.stack(values).max()) for name, values in differences.items()}
    return maxima, float(torch.stack(scales).max())


def evaluate_exported(compute: Compute, model: TaskModel, sampled: SampledRows, data: DataConfig) -> dict[str, float]:
    """Returns the metrics of an exported file on all rows, computed like those of the trained model."""
    run = RunConfig(data=data, train=TrainConfig(batch_size_per_device=32))
    with suppress_logs():
        exported = cast(TaskModel, _ExportedModel(compute, model.modality))
        return evaluate_rows(build_accelerator(), exported, sampled.task, sampled.rows, run)


def measure_latency(exports: Mapping[str, Compute], sampled: SampledRows) -> dict[str, dict[str, float]]:
    """Returns the median latency of each file in ms, for batches of 1 and 32 rows.

    Calls alternate between the files, so that background load affects all of them.
    """
    latencies: dict[str, dict[str, float]] = {name: {} for name in exports}
    lengths = sampled.rows.lengths
    order = sampled.sample if lengths is None else sorted(sampled.sample, key=lambda row: int(lengths[row]))
    upper_half = order[len(order) // 2 :]  # starts with the text of median length
    for size in _TIMED_BATCH_SIZES:
        inputs = sampled.inputs(upper_half if size == 1 else sampled.sample, size)
        batch_size = next(iter(inputs.values())).shape[0]
        timings: dict[str, list[float]] = {name: [] for name in exports}
        with torch.no_grad():
            for compute in exports.values():
                compute(inputs)  # warm-up: the first call allocates memory
            deadline = time.perf_counter() + _MAX_SECONDS
            while len(timings[next(iter(exports))]) < _MAX_REPEATS and time.perf_counter() < deadline:
                for name, compute in exports.items():
                    start = time.perf_counter()
                    compute(inputs)
                    timings[name].append(time.perf_counter() - start)
        for name, seconds in timings.items():
            latencies[name][f"milliseconds_at_{batch_size}"] = round(1000 * median(seconds), 3)
    return latencies


def format_table(report: Mapping[str, Any], metric: str) -> str:
    """Returns a text table with size, metric and latency of each file, also relative to the first file (fp32).

    Args:
        report: Content of `export.json`.
        metric: Name of the metric column, such as `test/accuracy`.
    """
    files: dict[str, dict[str, Any]] = report["files"]
    (first, reference), *quantized = files.items()
    latencies = [name for name in reference if name.startswith("milliseconds_at_")]
    titles = ["MB", metric, *(f"ms at {name.rpartition('_')[2]}" for name in latencies)]
    lines = [f"{'file':<16}" + "".join(f"{title:>16}" for title in titles)]
    for name, values in files.items():
        cells = [f"{values['megabytes']:.2f}", f"{values[metric]:.4f}", *(f"{values[key]:.2f}" for key in latencies)]
        lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    for name, values in quantized:
        ratios = [
            f"{values['megabytes'] / reference['megabytes']:.2f}x",
            f"{values[metric] - reference[metric]:+.4f}",
        ]
        ratios += [f"{values[key] / reference[key]:.2f}x" for key in latencies]
        lines.append(f"{'vs ' + first:<16}" + "".join(f"{cell:>16}" for cell in ratios))
        if values["milliseconds_at_1"] > reference["milliseconds_at_1"]:
            lines.append(f"{name} is slower than {first} on this machine; its only benefit is size.")
    return "\n".join(lines)


class _ExportedModel(nn.Module):
    """Adapter that evaluates an exported file like a `TaskModel`."""

    def __init__(self, compute: Compute, modality: str) -> None:
        super().__init__()
        self.compute, self.modality = compute, modality
        self.evaluation_limit = MicroBatchLimit("evaluation")

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.compute(inputs)}
