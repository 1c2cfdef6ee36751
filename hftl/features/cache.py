"""Feature cache: memory-mapped features of a frozen backbone, keyed by weights, preprocessing and data."""

from __future__ import annotations

import atexit
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import torch

from hftl.config.schema import RunConfig
from hftl.distributed import heartbeat_barrier, shared_row_error
from hftl.errors import ROW_ADVICE, FeatureError, RowError, disk_error, row_advice, shorten
from hftl.evaluation.evaluate import predict
from hftl.features.cache_key import hash_backbone, hash_json, hash_task_code
from hftl.features.extractor import FeatureExtractor, Layers
from hftl.features.store import PartialFeatures, cache_folder, read_features
from hftl.loading.loader import Examples, Key, default_workers, make_loader
from hftl.logging import log
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Batch, Outputs, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

FLUSH_INTERVAL_S = 10.0
"""Seconds between flushes of new rows to disk."""


@dataclass(frozen=True)
class Features:
    """Features of all rows of a split: the input of the head."""

    values: np.ndarray
    """[N, D] float32, memory-mapped, read-only, in row order; [N, L, D] for `layers` all."""
    labels: np.ndarray | None
    """Labels from the task's `collate` ([N] int64 for classes); None for rows without labels."""
    seconds: float
    """Seconds of the original computation."""
    from_cache: bool
    linear: bool
    """Whether the logits are the output of one linear layer on these features."""


@row_advice(ROW_ADVICE)
def compute_features(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    dataset: Dataset,
    run: RunConfig,
    *,
    split: str = "train",
    layers: Layers = "head",
    view: int | None = None,
) -> Features:
    """Returns the features of a split from the cache, or computes them in eval mode.

    The cache key covers weights and architecture of the backbone, preprocessing, rows, the task with its labels, and
    the precision. An interrupted computation is resumed. Under a launcher, processes share the rows, and each machine
    stores all features.

    Args:
        accelerator: From `create_accelerator`, or a new one.
        model: From `build_model`; its head is not used.
        task: Encodes rows as inputs and labels.
        dataset: Rows of one split.
        run: Uses the data section, batch size, workers, and the seed of views.
        split: Name of the split in messages.
        layers: Layers to extract features from.
        view: Number of an augmented view, with the augmentation of training epoch `view`; None: no augmentation.

    Raises:
        FeatureError: A feature is NaN or infinite, the input of the head is not a vector, or the cache is not writable.
        RowError: A row is unreadable; raised on all processes.
    """
    extractor = FeatureExtractor(model, layers)
    seed = None if view is None else run.train.seed
    rows = task.encode(dataset, model.processor, seed, run.data.max_length)
    # LOCAL_RANK as in hftl.distributed: Accelerate sets local_process_index only if configured for several processes
    is_writer = accelerator.num_processes == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    with ExitStack() as stack:
        with heartbeat_barrier("find features"):
            key, folder = _key_and_folder(accelerator, model, task, rows, layers, view)
            if is_writer:
                stack.enter_context(_lock(folder, split))
        stored = read_features(folder)
        from_cache = _all(accelerator, stored is not None)
        if not from_cache:
            partial = PartialFeatures(folder, len(rows)) if is_writer else None
            _compute_missing(accelerator, extractor, task, rows, run, split, view or 0, partial)
            with heartbeat_barrier("save features"):
                if partial is not None:
                    partial.finish({"key": key, "rows": len(rows)}, extractor.linear)
            stored = read_features(folder)
    if stored is None:
        raise FeatureError(f"features: '{folder}' cannot be read after writing. Set HFTL_CACHE to another folder.")
    values, labels, meta = stored
    if from_cache:
        log(f"features: {split}: loaded {len(values):,} x {values.shape[-1]} from cache")
    return Features(values, labels, meta["seconds"], from_cache, meta["linear"])


def _compute_missing(
    accelerator: Accelerator,
    extractor: FeatureExtractor,
    task: Task,
    rows: Examples,
    run: RunConfig,
    split: str,
    epoch: int,
    partial: PartialFeatures | None,
) -> None:
    """Computes missing rows on all processes; processes with `partial` store them."""
    missing = _missing_rows(accelerator, partial, len(rows))
    if len(missing) < len(rows):
        log(f"features: {split}: resuming with {len(rows) - len(missing):,} of {len(rows):,} rows computed")
    start = last_flush = time.perf_counter()
    try:
        for index, values, labels in _extract(accelerator, extractor, task, rows, run, missing, epoch):
            _raise_if_nonfinite(index, values, split)
            if partial is None:
                continue
            partial.add(index, values, labels)
            now = time.perf_counter()
            if now - last_flush > FLUSH_INTERVAL_S:
                partial.flush(now - last_flush, extractor.linear)
                last_flush = now
        if partial is not None:
            partial.flush(time.perf_counter() - last_flush, extractor.linear)
    except OSError as error:
        cause = disk_error(error, cache_folder()) or error
        raise FeatureError(f"features: {cause} (Set HFTL_CACHE to use another folder.)") from error
    seconds = time.perf_counter() - start
    log(f"features: {split}: computed {len(missing):,} rows in {seconds:.1f} s, cached in {cache_folder()}")


def _extract(
    accelerator: Accelerator,
    extractor: FeatureExtractor,
    task: Task,
    rows: Examples,
    run: RunConfig,
    missing: np.ndarray,
    epoch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields row numbers [B], features [B, D] and labels of all processes, in batches of rows of similar length."""
    size = rows_at_once(run, accelerator.device.type)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = missing if rows.lengths is None else missing[np.argsort(-rows.lengths[missing], kind="stable")]
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, world) if workers is None else workers

    def batches() -> Iterator[list[Key]]:
        for start in range(0, len(order), size * world):
            own_rows = order[start + rank * size : start + (rank + 1) * size]
            yield [(epoch, int(row), 1.0) for row in own_rows] or [(epoch, int(order[0]), 0.0)]

    timeout = run.data.worker_timeout
    loader = make_loader(rows, batches, task.collate, device=device, num_workers=workers, timeout=timeout)
    with loader as loaded:
        for outputs, batch in _in_step(accelerator, predict(accelerator, cast(TaskModel, extractor), loaded)):
            tensors = {"index": batch["index"], "values": outputs["features"].float()}
            tensors |= {"labels": batch["labels"]} if "labels" in batch else {}
            arrays = {name: tensor.cpu().numpy() for name, tensor in _gather(accelerator, tensors).items()}
            yield arrays["index"], arrays["values"], arrays.get("labels")


def _in_step(accelerator: Accelerator, pairs: Iterator[tuple[Outputs, Batch]]) -> Iterator[tuple[Outputs, Batch]]:
    """Yields equally many pairs on all processes; a RowError on one process is raised on all."""
    while True:
        pair, problems = None, []
        try:
            pair = next(pairs, None)
        except RowError as error:
            problems.append(error)
        if not _all(accelerator, not problems):
            problem = shared_row_error(problems)
            assert problem is not None, "one of the processes has a RowError"
            raise problem
        if pair is None:
            return
        yield pair


def rows_at_once(run: RunConfig, device: str) -> int:
    """Returns the batch size per process for inference.

    Without gradients, the memory of an accelerator fits several training batches. A CPU is fastest if activations fit
    into its caches (mobilenetv2: batch size 16 takes 0.6 of the time of 128).
    """
    batch = run.train.batch_size_per_device
    return min(batch, 16) if device == "cpu" else 4 * batch


def _gather(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathers the rows of all processes, in rank order."""
    if accelerator.num_processes == 1:
        return tensors
    sizes = accelerator.gather(torch.tensor([len(tensors["index"])], device=accelerator.device))
    counts = cast(torch.Tensor, sizes).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(tensors, dim=0))
    longest = max(counts)
    unpadded = [rank * longest + row for rank, count in enumerate(counts) for row in range(count)]
    return {name: tensor[unpadded] for name, tensor in cast("dict[str, torch.Tensor]", padded).items()}


def _raise_if_nonfinite(index: np.ndarray, values: np.ndarray, split: str) -> None:
    nonfinite = index[~np.isfinite(values).reshape(len(values), -1).all(1)]
    if len(nonfinite):
        error = FeatureError(
            f"features: the model outputs NaN or infinite values for {split} row(s) "
            f"{shorten([str(row) for row in sorted(nonfinite)], 32)}. Check these rows and the weights of the "
            "checkpoint; in half precision, set mixed_precision: no (accelerate_config.yaml)."
        )
        error.agreed = True
        raise error


def _missing_rows(accelerator: Accelerator, partial: PartialFeatures | None, rows: int) -> np.ndarray:
    """Returns the row numbers that are missing on at least one machine, [M]."""
    done = torch.ones(rows, dtype=torch.uint8) if partial is None else torch.from_numpy(partial.done.astype(np.uint8))
    if accelerator.num_processes > 1:
        gathered = cast(torch.Tensor, accelerator.gather(done.to(accelerator.device)[None]))
        done = gathered.min(0).values.cpu()
    return np.flatnonzero(done.numpy() == 0)


def _all(accelerator: Accelerator, condition: bool) -> bool:
    """Whether a condition holds on all processes."""
    if accelerator.num_processes == 1:
        return condition
    return bool(cast(torch.Tensor, accelerator.gather(torch.tensor([condition], device=accelerator.device))).all())


@contextmanager
def _lock(folder: Path, split: str) -> Iterator[None]:
    """Locks a feature folder, so that one process computes its features while others wait."""
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder) + ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"features: {split}: waiting for another process that computes them")
            lock.acquire()
    except OSError as error:
        raise FeatureError(
            f"features: cache folder '{folder.parent}' is not usable ({error.strerror or error}). Set HFTL_CACHE to "
            "another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _key_and_folder(
    accelerator: Accelerator, model: TaskModel, task: Task, rows: Examples, layers: Layers, view: int | None
) -> tuple[dict[str, Any], Path]:
    """Returns the cache key and the folder of features.

    Machines other than the first use separate folder names. On a shared disk, a machine waiting for the lock and one
    waiting for its peers would otherwise deadlock.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    machine = f".machine{rank - local_rank}" if accelerator.num_processes > 1 and rank > local_rank else ""
    identity, code = getattr(rows, "identity", None), hash_task_code(task)
    if identity is None or code is None:  # custom examples or task without a known key: do not reuse features
        from accelerate.utils import broadcast_object_list

        names = [f"private-{uuid4().hex}"]
        name = broadcast_object_list(names)[0] if accelerator.num_processes > 1 else names[0]
        name += machine
        for entry in (name, name + ".lock"):
            atexit.register(_remove, cache_folder() / entry)
        return {"rows": "unknown origin; not reused"}, cache_folder() / name
    key = {
        "backbone": hash_backbone(model),
        "rows": identity(),
        "task": [task.name, code, hash_json(task.state())],
        "layers": layers,
        "view": view,
        "precision": [accelerator.mixed_precision, accelerator.device.type],
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "pillow")},
    }
    return key, cache_folder() / (hash_json(key) + machine)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
