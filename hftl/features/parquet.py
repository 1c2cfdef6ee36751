"""`hftl features`: what the head of a model sees, row by row, as Parquet for other tools."""

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
"""Rows of one row group."""


def write_features(
    source: str | DataConfig,
    model: str,
    *,
    layers: Layers = "head",
    batch_size: int = 32,
    output: str | Path = "features",
    task: Callable[[Splits], Task] | None = None,
) -> dict[str, Path]:
    """Writes OUTPUT/SPLIT.parquet for every split of some data; works under a launcher too.

    Columns: `row`, `label` (the name of the class; whatever the task makes of it otherwise) where there is one, and
    `features`, a list of D float32 numbers; for all layers `layer_1`, `layer_2`, … instead.

    Args:
        source: As `data.source`, or a whole data section.
        model: As `model.name`.
        layers: head: the input of the head. mean: the mean of the pooled layers. all: each of them (texts).
        batch_size: Rows at a time.
        output: Folder.
        task: Makes the task; by default image or text classification, by the columns.

    Returns:
        The file of each split.

    Raises:
        ConfigError: `output` cannot be a folder.
        DataError: The data do not open, or do not fit the task.
        ModelError: The model does not.
        FeatureError: Features cannot be computed or kept.
    """
    data = source if isinstance(source, DataConfig) else DataConfig(source)
    run = RunConfig(data, ModelConfig(model), train=TrainConfig(batch_size_per_device=batch_size))
    folder = output_folder(output)
    accelerator = build_accelerator()
    make: Callable[[Splits], Task] = task or (lambda splits: infer_task(splits)(splits))
    splits, _ = load_usable_splits(run.data, make)
    made = make(splits)
    net = build_model(run, made.head)
    files = {}
    for split, rows in splits.items():
        found = compute_features(accelerator, net, made, rows, run, split=split, layers=layers)
        files[split] = folder / f"{split}.parquet"
        with heartbeat_barrier("write features"):
            if accelerator.is_main_process:
                _write(found, made, files[split])
        log(f"features: {files[split]}")
    return files


def _write(found: Features, task: Task, file: Path) -> None:
    from pyarrow.parquet import ParquetWriter

    with atomic_write(file) as aside:
        first = _table(found, task, 0)
        with ParquetWriter(aside, first.schema) as writer:
            writer.write_table(first)
            for start in range(_ROWS, len(found.values), _ROWS):
                writer.write_table(_table(found, task, start))


def _table(found: Features, task: Task, start: int) -> pa.Table:
    import pyarrow as pa

    values = np.array(found.values[start : start + _ROWS])
    columns: dict[str, Any] = {"row": pa.array(np.arange(start, start + len(values)))}
    if found.labels is not None:
        labels = np.array(found.labels[start : start + _ROWS])
        names = task.head.labels
        classes = names and labels.ndim == 1 and labels.dtype.kind == "i"
        columns["label"] = pa.array([names[label] for label in labels] if classes else labels.tolist())
    layers = (
        {"features": values} if values.ndim == 2 else {f"layer_{n + 1}": values[:, n] for n in range(len(values[0]))}
    )
    for name, layer in layers.items():
        flat = pa.array(np.ascontiguousarray(layer).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, layer.shape[1])
    return pa.table(columns)
