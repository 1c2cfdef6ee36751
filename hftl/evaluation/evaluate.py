"""Evaluation: counts each row once on any number of processes, in bounded memory; predictions in row order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from hftl.atomic_files import PARTIAL, sync
from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.distributed import shared_row_error
from hftl.errors import RESUME_ADVICE, ROW_ADVICE, RowError, row_advice
from hftl.loading.loader import Examples, Key, Share, default_workers, eval_batches, make_loader
from hftl.loading.workers import Batches
from hftl.logging import log
from hftl.models.oom_retry import joined, rows_of
from hftl.models.task_model import TaskModel
from hftl.tasks.metrics import MeanLoss, all_metrics
from hftl.tasks.task import Batch, Outputs, Task, ThresholdTuning, is_logged

if TYPE_CHECKING:
    from accelerate import Accelerator

_GATHER_EVERY = 16
"""Batches between gathers of predictions to the main process, and between checks for interruption."""


class Interrupted(Exception):
    """Evaluation interrupted by a stop signal."""


@row_advice(ROW_ADVICE, RESUME_ADVICE)
def evaluate(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Returns the metrics of every held-out split, with keys such as `validation/accuracy` and `test/loss`.

    Args:
        accelerator: From `create_accelerator`.
        model: Set to eval mode; its previous mode is restored.
        task: Computes loss and metrics and decodes outputs.
        splits: `validation` and `test` are evaluated if they exist.
        run: Uses batch size, workers, text length and additional metrics.
        predictions: Parquet file to write, one row per evaluated row, in order.

    Raises:
        RowError: A row cannot be read.
    """
    metrics: dict[str, float] = {}
    with TableWriter(predictions) if predictions and accelerator.is_main_process else nullcontext() as writer:
        for split in ("validation", "test"):
            if split not in splits:
                continue
            rows = task.encode(splits[split], model.processor, None, run.data.max_length)
            split_writer = _SplitWriter(writer, split) if writer else None
            tune_thresholds = split == "validation" and isinstance(task, ThresholdTuning)
            values = evaluate_rows(
                accelerator, model, task, rows, run, split_writer, bool(predictions), tune_thresholds=tune_thresholds
            )
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
            logged = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if is_logged(name, task))
            log(f"evaluate: {split}: {logged or 'predictions only, since there are no labels'}")
    accelerator.wait_for_everyone()
    return metrics


def evaluate_rows(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    rows: Examples,
    run: RunConfig,
    writer: Any = None,
    collect: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    tune_thresholds: bool = False,
) -> dict[str, float]:
    """Returns the metrics of one encoded split, the same on all processes; empty without labels.

    Args:
        accelerator: From `create_accelerator`.
        model: Set to eval mode; its previous mode is restored.
        task: Computes loss and metrics and decodes outputs.
        rows: From `task.encode`, without augmentation.
        run: Uses batch size, workers and additional metrics.
        writer: Receives predictions on the main process by `write(list of rows)`.
        collect: Whether predictions are gathered (the same on all processes).
        interrupted: Called every few batches by all processes; returns whether to interrupt the evaluation.
        tune_thresholds: Whether the thresholds of the task (`ThresholdTuning`) are tuned on these rows before metrics
            are computed.

    Raises:
        Interrupted: `interrupted` returned true.
        RowError: A row cannot be read; the same error on all processes.
    """
    loss = MeanLoss()
    metrics = all_metrics(task.metrics(), run.train.metrics)
    ordered = _OrderedWriter(writer)
    pending: list[tuple[int, dict[str, Any]]] = []
    row_errors: list[RowError] = []
    count = -(-len(rows) // (run.train.batch_size_per_device * accelerator.num_processes))
    with evaluation_batches(accelerator, task, rows, run) as batches:
        predicted = _until_row_error(predict(accelerator, model, batches), count, row_errors)
        for number, (outputs, batch) in enumerate(predicted, start=1):
            if "labels" in batch and len(batch["index"]):
                loss.update_losses(task.loss(outputs, batch))
                for metric in metrics:
                    metric.update(outputs, batch)
            if collect:
                decoded = labeled_rows(task, outputs, batch) if len(batch["index"]) else []
                pending += zip(batch["index"].tolist(), decoded, strict=True)
                if number % _GATHER_EVERY == 0:
                    ordered.add(_gather(accelerator, pending))
                    pending = []
            if number % _GATHER_EVERY == 0 and interrupted():
                raise Interrupted
    if collect:
        ordered.add(_gather(accelerator, pending))
    row_error = shared_row_error(row_errors)
    if row_error:
        raise row_error
    merged = [_merged(_gather(accelerator, [metric])) for metric in [loss, *metrics]]
    if not merged[0].count:
        return {}
    if tune_thresholds:
        cast(ThresholdTuning, task).tune_thresholds(merged[1:])
    return {name: value for metric in merged for name, value in metric.compute().items()}


def _until_row_error(
    pairs: Iterator[tuple[Outputs, Batch]], count: int, errors: list[RowError]
) -> Iterator[tuple[Outputs, Batch]]:
    """Yields `count` pairs; after a `RowError`, which is appended to `errors`, the remaining ones are empty.

    The process thus still takes part in the collectives that all processes run every few batches.
    """
    number = 0
    try:
        for pair in pairs:
            number += 1
            yield pair
    except RowError as error:
        errors.append(error)
        for _ in range(number, count):
            yield {}, {"index": torch.empty(0, dtype=torch.long)}


def _merged(metrics: list[Any]) -> Any:
    first, *rest = metrics
    for metric in rest:
        first.merge(metric)
    return first


def evaluation_batches(accelerator: Accelerator, task: Task, rows: Examples, run: RunConfig) -> Batches:
    """Returns the batches of this process for one pass over `rows`; all processes have the same number."""
    share = Share(accelerator.process_index, accelerator.num_processes, run.train.batch_size_per_device)
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, accelerator.num_processes) if workers is None else workers

    def batches() -> Iterator[list[Key]]:
        return eval_batches(len(rows), rows.lengths, share)

    timeout = run.data.worker_timeout
    return make_loader(rows, batches, task.collate, device=device, num_workers=workers, timeout=timeout)


def predict(accelerator: Accelerator, model: TaskModel, batches: Batches) -> Iterator[tuple[Outputs, Batch]]:
    """Yields float32 outputs and batch for each of `batches`, without padding rows."""
    from accelerate.utils import convert_to_fp32, send_to_device

    limit = model.evaluation_limit
    was_training = model.training
    model.to(accelerator.device).eval()
    try:
        for batch in batches:
            batch = cast(Batch, send_to_device(batch, accelerator.device))

            def forward(batch: Batch = batch) -> Outputs:
                with torch.no_grad(), accelerator.autocast():
                    return joined([convert_to_fp32(dict(model(piece["inputs"]))) for piece in limit.cut(batch)])

            outputs = limit.retrying(forward, lambda batch=batch: len(batch["index"]))
            if not bool(batch["weight"].all()):
                outputs, batch = _without_padding_rows(outputs, batch)
            yield outputs, batch
    finally:
        model.train(was_training)


def _without_padding_rows(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    # padding rows form a separate batch (`eval_batches`), so the whole batch is dropped
    empty, count = slice(0, 0), len(batch["weight"])
    return rows_of(dict(outputs), empty, count), rows_of(batch, empty, count)


def labeled_rows(task: Task, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
    """Returns the decoded rows with the name of the true class, for single-label classification."""
    decoded = task.decode(outputs, batch)
    names = task.head.labels
    labels = batch.get("labels")
    if task.head.problem_type != "single_label_classification" or labels is None or not names:
        return decoded
    return [{"label": names[label]} | row for label, row in zip(labels.tolist(), decoded, strict=True)]


def _gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object(items) if accelerator.num_processes > 1 else items


class _OrderedWriter:
    """Writes rows in the order of their index; buffers rows that arrive early."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.early: dict[int, dict[str, Any]] = {}
        self.next = 0

    def add(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        if self.writer is None:
            return
        self.early.update(rows)
        ready = []
        while self.next in self.early:
            ready.append({"row": self.next} | self.early.pop(self.next))
            self.next += 1
        if ready:
            self.writer.write(ready)


class _SplitWriter:
    """Writer that adds the name of the split to each row."""

    def __init__(self, writer: TableWriter, split: str) -> None:
        self.writer, self.split = writer, split

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.writer.write([{"split": self.split} | row for row in rows])


def _with_string_lists(schema: Any) -> Any:
    """Returns the schema with lists of null replaced by lists of strings."""
    import pyarrow as pa

    return pa.schema([pa.field(f.name, pa.list_(pa.string())) if f.type == pa.list_(pa.null()) else f for f in schema])


class TableWriter:
    """Streaming writer of rows to Parquet, CSV or JSON lines, by file extension.

    The file is written atomically: it is renamed to `path` in `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + PARTIAL)
        self.writer: Any = None
        self.schema: Any = None
        self.buffered: list[Any] = []
        """Tables of the first rows, until every list column has a type."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, all with the same keys."""
        if self.path.suffix != ".parquet":
            return self._write_text(rows)
        import pyarrow as pa

        self.buffered.append(pa.Table.from_pylist(rows, schema=self.schema if self.writer else None))
        if self.writer is None:
            schemas = [self.schema or self.buffered[0].schema, self.buffered[-1].schema]
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        if _with_string_lists(self.schema) == self.schema:
            self._write_buffered()

    def _write_buffered(self) -> None:
        from pyarrow.parquet import ParquetWriter

        self.schema = _with_string_lists(self.schema)
        self.writer = self.writer or ParquetWriter(self.temporary, self.schema)
        for table in self.buffered:
            self.writer.write_table(table.cast(self.schema))
        self.buffered = []

    def _write_text(self, rows: list[dict[str, Any]]) -> None:
        import csv
        import json

        first = self.writer is None
        if first:
            self.writer = self.temporary.open("w", newline="", encoding="utf-8")
        if self.path.suffix == ".csv":
            table = csv.DictWriter(self.writer, rows[0])
            if first:
                table.writeheader()
            table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        else:
            self.writer.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes the file, or removes it after an error."""
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # closing may fail too on a full disk
                if self.writer is not None:
                    self.writer.close()
            self.temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Writes buffered rows and renames the file to `path`; later calls do nothing."""
        if self.buffered:
            self._write_buffered()
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
            sync(self.temporary)
            self.temporary.replace(self.path)
            sync(self.path.parent)
