"""evaluate(): each row counted once, on any number of processes, in bounded memory; predictions in the rows' order."""

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
"""Batches between two gathers of predictions to the main process, and between two looks for an interruption."""


class Interrupted(Exception):
    """An evaluation was broken off because somebody asked for it."""


@row_advice(ROW_ADVICE, RESUME_ADVICE)
def evaluate(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Returns the metrics of every held-out split, as `validation/accuracy` or `test/loss`.

    Args:
        accelerator: From `start`.
        model: In eval mode for the duration, put back after.
        task: Says loss, metrics and how outputs read.
        splits: `validation` and `test` are used, as far as they exist.
        run: Uses batch size, workers, text length and extra metrics.
        predictions: Parquet file to write, one row for each evaluated row, in order.

    Raises:
        RowError: A row cannot be read.
    """
    metrics: dict[str, float] = {}
    with TableWriter(predictions) if predictions and accelerator.is_main_process else nullcontext() as writer:
        for split in ("validation", "test"):
            if split not in splits:
                continue
            rows = task.encode(splits[split], model.processor, None, run.data.max_length)
            labelled = _Labelled(writer, split) if writer else None
            tune_thresholds = split == "validation" and isinstance(task, ThresholdTuning)
            found = evaluate_rows(
                accelerator, model, task, rows, run, labelled, bool(predictions), tune_thresholds=tune_thresholds
            )
            metrics |= {f"{split}/{name}": value for name, value in found.items()}
            shown = " ".join(f"{name} {value:.4f}" for name, value in found.items() if is_logged(name, task))
            log(f"{split}: {shown or 'no labels, so predictions only'}")
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
    """Returns the metrics of one encoded split, the same on all processes; none where no row has labels.

    Args:
        accelerator: From `start`.
        model: In eval mode for the duration, put back after.
        task: Says loss, metrics and how outputs read.
        rows: From `task.encode`, without anything random.
        run: Uses batch size, workers and extra metrics.
        writer: Takes predictions on the main process: `write(list of rows)`.
        collect: Whether predictions are gathered at all (the same on all processes).
        interrupted: Asked after every few batches, by all processes together: whether to break off.
        tune_thresholds: Whether these rows select the task's thresholds (`ThresholdTuning`) before its metrics are
            computed.

    Raises:
        Interrupted: `interrupted` said so.
        RowError: A row cannot be read; the same error on all processes.
    """
    loss = MeanLoss()
    metrics = all_metrics(task.metrics(), run.train.metrics)
    in_order = _InOrder(writer)
    pending: list[tuple[int, dict[str, Any]]] = []
    problems: list[RowError] = []
    count = -(-len(rows) // (run.train.batch_size_per_device * accelerator.num_processes))
    with evaluation_batches(accelerator, task, rows, run) as batches:
        predicted = _up_to_problem(predict(accelerator, model, batches), count, problems)
        for number, (outputs, batch) in enumerate(predicted, start=1):
            if "labels" in batch and len(batch["index"]):
                loss.update_losses(task.loss(outputs, batch))
                for metric in metrics:
                    metric.update(outputs, batch)
            if collect:
                decoded = labeled_rows(task, outputs, batch) if len(batch["index"]) else []
                pending += zip(batch["index"].tolist(), decoded, strict=True)
                if number % _GATHER_EVERY == 0:
                    in_order.add(_gather(accelerator, pending))
                    pending = []
            if number % _GATHER_EVERY == 0 and interrupted():
                raise Interrupted
    if collect:
        in_order.add(_gather(accelerator, pending))
    problem = shared_row_error(problems)
    if problem:
        raise problem
    wholes = [_merged(_gather(accelerator, [mine])) for mine in [loss, *metrics]]
    if not wholes[0].count:
        return {}
    if tune_thresholds:
        cast(ThresholdTuning, task).tune_thresholds(wholes[1:])
    return {name: value for whole in wholes for name, value in whole.compute().items()}


def _up_to_problem(
    pairs: Iterator[tuple[Outputs, Batch]], count: int, problems: list[RowError]
) -> Iterator[tuple[Outputs, Batch]]:
    """Yields `count` pairs; after a row that cannot be used, which goes into `problems`, empty ones.

    So this process still joins what all processes exchange after every few batches.
    """
    number = 0
    try:
        for pair in pairs:
            number += 1
            yield pair
    except RowError as error:
        problems.append(error)
        for _ in range(number, count):
            yield {}, {"index": torch.empty(0, dtype=torch.long)}


def _merged(parts: list[Any]) -> Any:
    whole, *others = parts
    for other in others:
        whole.merge(other)
    return whole


def evaluation_batches(accelerator: Accelerator, task: Task, rows: Examples, run: RunConfig) -> Batches:
    """Returns this process's share of one pass over `rows`; every process has as many batches."""
    share = Share(accelerator.process_index, accelerator.num_processes, run.train.batch_size_per_device)
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, accelerator.num_processes) if workers is None else workers

    def batches() -> Iterator[list[Key]]:
        return eval_batches(len(rows), rows.lengths, share)

    timeout = run.data.worker_timeout
    return make_loader(rows, batches, task.collate, device=device, num_workers=workers, timeout=timeout)


def predict(accelerator: Accelerator, model: TaskModel, batches: Batches) -> Iterator[tuple[Outputs, Batch]]:
    """Yields float32 outputs and batch for each of `batches`, filler rows removed."""
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
                outputs, batch = _without_filler(outputs, batch)
            yield outputs, batch
    finally:
        model.train(was_training)


def _without_filler(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    # filler comes alone, in a batch of its own (`eval_batches`): nothing of that batch counts
    none, count = slice(0, 0), len(batch["weight"])
    return rows_of(dict(outputs), none, count), rows_of(batch, none, count)


def labeled_rows(task: Task, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
    """Adds the true label, in the words of the task, to each decoded row."""
    decoded = task.decode(outputs, batch)
    names = task.head.labels
    labels = batch.get("labels")
    if task.head.problem_type != "single_label_classification" or labels is None or not names:
        return decoded
    return [{"label": names[label]} | row for label, row in zip(labels.tolist(), decoded, strict=True)]


def _gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object(items) if accelerator.num_processes > 1 else items


class _InOrder:
    """Passes rows on in the order of their index, holding back only what came too early."""

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


class _Labelled:
    """Adds the name of the split to each row."""

    def __init__(self, writer: TableWriter, split: str) -> None:
        self.writer, self.split = writer, split

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.writer.write([{"split": self.split} | row for row in rows])


def _typed(schema: Any) -> Any:
    """Returns a schema in which lists of nothing are lists of texts."""
    import pyarrow as pa

    return pa.schema([pa.field(f.name, pa.list_(pa.string())) if f.type == pa.list_(pa.null()) else f for f in schema])


class TableWriter:
    """Writes rows to Parquet, CSV or JSON lines (by the ending of the file) as they come.

    The file is whole or absent: it takes its name in `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(path.name + PARTIAL)
        self.writer: Any = None
        self.schema: Any = None
        self.held: list[Any] = []
        """Tables of the first rows, as long as a list that was empty in all of them has no type."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows with the same keys as the first ones."""
        if self.path.suffix != ".parquet":
            return self._write_text(rows)
        import pyarrow as pa

        self.held.append(pa.Table.from_pylist(rows, schema=self.schema if self.writer else None))
        if self.writer is None:
            schemas = [self.schema or self.held[0].schema, self.held[-1].schema]
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        if _typed(self.schema) == self.schema:
            self._write_held()

    def _write_held(self) -> None:
        from pyarrow.parquet import ParquetWriter

        self.schema = _typed(self.schema)
        self.writer = self.writer or ParquetWriter(self.aside, self.schema)
        for table in self.held:
            self.writer.write_table(table.cast(self.schema))
        self.held = []

    def _write_text(self, rows: list[dict[str, Any]]) -> None:
        import csv
        import json

        first = self.writer is None
        if first:
            self.writer = self.aside.open("w", newline="", encoding="utf-8")
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
        """Finishes the file, or removes what there is of it after an error."""
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk may fail in closing too
                if self.writer is not None:
                    self.writer.close()
            self.aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Finishes the file, once."""
        if self.held:
            self._write_held()
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
            sync(self.aside)
            self.aside.replace(self.path)
            sync(self.path.parent)
