"""Export of backbone features to Parquet (`hftl features`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.atomic_files import atomic_write, output_folder
from hftl.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.data.splits import Splits
from hftl.data.usable_rows import load_usable_splits
from hftl.distributed import heartbeat_barrier
from hftl.features.cache import Features, compute_features
from hftl.features.extractor import Layers
from hftl.launcher import build_accelerator
from hftl.logging import log
from hftl.models.build import build_model
from hftl.tasks.auto_task import infer_task
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

_ROWS = 10_000
"""Rows per row group."""


def write_features(
    source: str | DataConfig,
    model: str,
    *,
    layers: Layers = "head",
    batch_size: int = 32,
    output: str | Path = "features",
    task: Callable[[Splits], Task] | None = None,
) -> dict[str, Path]:
    """Extracts features of all splits to OUTPUT/SPLIT.parquet; also runs under a launcher.

    Columns: `row`; `label` if rows are labeled (class name, or the encoded label of other tasks); and `features`, a
    list of D float32 values, or `layer_1`, `layer_2`, … for `layers` all.

    Args:
        source: `data.source`, or a complete data section.
        model: `model.name`.
        layers: head: input of the head. mean: mean over the pooled layers (text). all: all pooled layers (text).
        batch_size: Batch size per device.
        output: Output folder.
        task: Builds the task from the splits; None: image or text classification, detected from the columns.

    Returns:
        The file of each split by name.

    Raises:
        ConfigError: `output` cannot be created as a folder.
        DataError: The data cannot be loaded, or do not fit the task.
        ModelError: The model cannot be built for the task.
        FeatureError: Features cannot be computed or cached.
    """
    data = source if isinstance(source, DataConfig) else DataConfig(source)
    run = RunConfig(data, ModelConfig(model), train=TrainConfig(batch_size_per_device=batch_size))
    folder = output_folder(output)
    accelerator = build_accelerator()
    build_task: Callable[[Splits], Task] = task or (lambda splits: infer_task(splits)(splits))
    splits, _ = load_usable_splits(run.data, build_task)
    built_task = build_task(splits)
    net = build_model(run, built_task.head)
    files = {}
    for split, rows in splits.items():
        features = compute_features(accelerator, net, built_task, rows, run, split=split, layers=layers)
        files[split] = folder / f"{split}.parquet"
        with heartbeat_barrier("write features"):
            if accelerator.is_main_process:
                _write(features, built_task, files[split])
        log(f"features: wrote {files[split]}")
    return files


def _write(features: Features, task: Task, file: Path) -> None:
    from pyarrow.parquet import ParquetWriter

    with atomic_write(file) as temporary:
        first = _row_group(features, task, 0)
        with ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for start in range(_ROWS, len(features.values), _ROWS):
                writer.write_table(_row_group(features, task, start))


def _row_group(features: Features, task: Task, start: int) -> pa.Table:
    import pyarrow as pa

    values = np.array(features.values[start : start + _ROWS])
    columns: dict[str, Any] = {"row": pa.array(np.arange(start, start + len(values)))}
    if features.labels is not None:
        labels = np.array(features.labels[start : start + _ROWS])
        names = task.head.labels
        are_classes = names and labels.ndim == 1 and labels.dtype.kind == "i"
        columns["label"] = pa.array([names[label] for label in labels] if are_classes else labels.tolist())
    layers = (
        {"features": values} if values.ndim == 2 else {f"layer_{n + 1}": values[:, n] for n in range(len(values[0]))}
    )
    for name, layer in layers.items():
        flat = pa.array(np.ascontiguousarray(layer).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, layer.shape[1])
    return pa.table(columns)
