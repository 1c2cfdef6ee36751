"""Frozen features, computed once: memory-mapped, under a key of everything that determines them."""

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
from hftl.features.cache_key import backbone_identity, code_identity, hashed
from hftl.features.extractor import FeatureExtractor, Layers
from hftl.features.store import PartialFeatures, cache_folder, read_whole
from hftl.loading.loader import Examples, Key, default_workers, make_loader
from hftl.logging import log
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Batch, Outputs, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

KEEP_S = 10.0
"""Seconds between two moments at which the rows so far are brought to the disk."""


@dataclass(frozen=True)
class Features:
    """What the head of a model sees, for every row of a split."""

    values: np.ndarray
    """[N, D] float32, memory-mapped, read-only, in the order of the rows; [N, L, D] for all layers."""
    labels: np.ndarray | None
    """As the task's `collate` gives them ([N] int64 for classes); None where the rows have none."""
    seconds: float
    """That computing them took, when that was done."""
    from_cache: bool
    linear: bool
    """Whether the logits are one linear layer of these features."""


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
    """Returns the features of a split, from the cache where they are there, else from one pass in eval mode.

    The key holds the backbone's weights and architecture, the preprocessing, the rows, the task with its labels, and
    the precision; any change of these is another key. A pass that was stopped goes on where it was. Under a launcher
    the pass is shared out, and each machine keeps the whole.

    Args:
        accelerator: From `start`, or a new one.
        model: From `build_model`; its head does not matter.
        task: Says how rows become inputs and labels.
        dataset: Rows of one split.
        run: Uses the data section, batch size, workers, and the seed of views.
        split: Its name, for messages.
        layers: Which features.
        view: Number of an augmented view, as epoch `view` of training draws it; None: the rows as they are.

    Raises:
        FeatureError: A feature is NaN or infinite; the head takes no vector; the cache cannot be written.
        RowError: A row cannot be read; the same error on all processes.
    """
    reader = FeatureExtractor(model, layers)
    seed = None if view is None else run.train.seed
    rows = task.encode(dataset, model.processor, seed, run.data.max_length)
    # as hftl.distributed counts: Accelerate numbers processes of a machine only where it was told to use them
    keeps = accelerator.num_processes == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    with ExitStack() as stack:
        with heartbeat_barrier("find features"):
            described, place = _place(accelerator, model, task, rows, layers, view)
            if keeps:
                stack.enter_context(_alone(place, split))
        found = read_whole(place)
        if not _all(accelerator, found is not None):
            growing = PartialFeatures(place, len(rows)) if keeps else None
            _fill(accelerator, reader, task, rows, run, split, view or 0, growing)
            with heartbeat_barrier("keep features"):
                if growing is not None:
                    growing.finish({"key": described, "rows": len(rows)}, reader.linear)
            found, from_cache = read_whole(place), False
        else:
            from_cache = True
    if found is None:
        raise FeatureError(f"features: '{place}' cannot be read back; give another folder by HFTL_CACHE.")
    values, labels, meta = found
    if from_cache:
        log(f"features: {split}: {len(values):,} rows x {values.shape[-1]} from the cache")
    return Features(values, labels, meta["seconds"], from_cache, meta["linear"])


def _fill(
    accelerator: Accelerator,
    reader: FeatureExtractor,
    task: Task,
    rows: Examples,
    run: RunConfig,
    split: str,
    epoch: int,
    growing: PartialFeatures | None,
) -> None:
    """Computes the rows that are missing, on all processes; those with `growing` keep them."""
    left = _missing(accelerator, growing, len(rows))
    if len(left) < len(rows):
        log(f"features: {split}: {len(rows) - len(left):,} of {len(rows):,} rows are there; going on")
    began = kept = time.perf_counter()
    try:
        for index, values, labels in _passes(accelerator, reader, task, rows, run, left, epoch):
            _refuse_nonfinite(index, values, split)
            if growing is None:
                continue
            growing.add(index, values, labels)
            now = time.perf_counter()
            if now - kept > KEEP_S:
                growing.keep(now - kept, reader.linear)
                kept = now
        if growing is not None:
            growing.keep(time.perf_counter() - kept, reader.linear)
    except OSError as error:
        said = disk_error(error, cache_folder())
        raise FeatureError(f"features: {said or error} (HFTL_CACHE names another folder.)") from error
    seconds = time.perf_counter() - began
    log(f"features: {split}: {len(left):,} rows in {seconds:.1f} s, kept in {cache_folder()}")


def _passes(
    accelerator: Accelerator,
    reader: FeatureExtractor,
    task: Task,
    rows: Examples,
    run: RunConfig,
    left: np.ndarray,
    epoch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields row numbers [B], features [B, D] and labels of all processes' batches, rows of like length together."""
    size = rows_at_once(run, accelerator.device.type)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = left if rows.lengths is None else left[np.argsort(-rows.lengths[left], kind="stable")]
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, world) if workers is None else workers

    def batches() -> Iterator[list[Key]]:
        for start in range(0, len(order), size * world):
            mine = order[start + rank * size : start + (rank + 1) * size]
            yield [(epoch, int(row), 1.0) for row in mine] or [(epoch, int(order[0]), 0.0)]

    timeout = run.data.worker_timeout
    loader = make_loader(rows, batches, task.collate, device=device, num_workers=workers, timeout=timeout)
    with loader as ready:
        for outputs, batch in _in_step(accelerator, predict(accelerator, cast(TaskModel, reader), ready)):
            parts = {"index": batch["index"], "values": outputs["features"].float()}
            parts |= {"labels": batch["labels"]} if "labels" in batch else {}
            parts = _gathered(accelerator, parts)
            found = {name: part.cpu().numpy() for name, part in parts.items()}
            yield found["index"], found["values"], found.get("labels")


def _in_step(accelerator: Accelerator, pairs: Iterator[tuple[Outputs, Batch]]) -> Iterator[tuple[Outputs, Batch]]:
    """Yields as many pairs on every process; a row that one of them cannot use ends the pass on all."""
    while True:
        pair, problems = None, []
        try:
            pair = next(pairs, None)
        except RowError as error:
            problems.append(error)
        if not _all(accelerator, not problems):
            problem = shared_row_error(problems)
            assert problem is not None, "some process has met such a row"
            raise problem
        if pair is None:
            return
        yield pair


def rows_at_once(run: RunConfig, device: str) -> int:
    """Returns how many rows go through the model together.

    An accelerator has room for several batches of training where there are no gradients. A CPU is fastest where what a
    batch leaves between two layers stays in its caches (mobilenetv2: 16 images at a time take 0.6 of the time of 128).
    """
    batch = run.train.batch_size_per_device
    return min(batch, 16) if device == "cpu" else 4 * batch


def _gathered(accelerator: Accelerator, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the rows of all processes, in their order."""
    if accelerator.num_processes == 1:
        return parts
    sizes = accelerator.gather(torch.tensor([len(parts["index"])], device=accelerator.device))
    counts = cast(torch.Tensor, sizes).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(parts, dim=0))
    longest = max(counts)
    real = [process * longest + row for process, count in enumerate(counts) for row in range(count)]
    return {name: part[real] for name, part in cast("dict[str, torch.Tensor]", padded).items()}


def _refuse_nonfinite(index: np.ndarray, values: np.ndarray, split: str) -> None:
    bad = index[~np.isfinite(values).reshape(len(values), -1).all(1)]
    if len(bad):
        error = FeatureError(
            f"features: the model computes NaN or infinite values for {split} row(s) "
            f"{shorten([str(row) for row in sorted(bad)], 32)}. Look at these rows, or at the checkpoint's weights; in "
            "half precision try mixed_precision: no (accelerate_config.yaml)."
        )
        error.agreed = True
        raise error


def _missing(accelerator: Accelerator, growing: PartialFeatures | None, rows: int) -> np.ndarray:
    """Returns the rows that at least one machine lacks, [M]."""
    done = torch.ones(rows, dtype=torch.uint8) if growing is None else torch.from_numpy(growing.done.astype(np.uint8))
    if accelerator.num_processes > 1:
        every = cast(torch.Tensor, accelerator.gather(done.to(accelerator.device)[None]))
        done = every.min(0).values.cpu()
    return np.flatnonzero(done.numpy() == 0)


def _all(accelerator: Accelerator, fine: bool) -> bool:
    if accelerator.num_processes == 1:
        return fine
    return bool(cast(torch.Tensor, accelerator.gather(torch.tensor([fine], device=accelerator.device))).all())


@contextmanager
def _alone(place: Path, split: str) -> Iterator[None]:
    """Holds the lock of a folder: of two processes that want the same features one computes, the other waits."""
    from filelock import FileLock, Timeout

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(place) + ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"features: {split}: another process computes them; waiting")
            lock.acquire()
    except OSError as error:
        raise FeatureError(
            f"features: '{place.parent}' cannot be used as a cache ({error.strerror or error}); name another folder by "
            "HFTL_CACHE."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _place(
    accelerator: Accelerator, model: TaskModel, task: Task, rows: Examples, layers: Layers, view: int | None
) -> tuple[dict[str, Any], Path]:
    """Returns what determines the features, and their folder.

    Machines other than the first have folders of their own names: they may share a disk with it, on which the one that
    waits for a lock and the one that waits for its peers would wait for each other.
    """
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    machine = f".machine{rank - local}" if accelerator.num_processes > 1 and rank > local else ""
    identity, code = getattr(rows, "identity", None), code_identity(task)
    if identity is None or code is None:  # of somebody else's making: nobody knows what they depend on
        from accelerate.utils import broadcast_object_list

        names = [f"private-{uuid4().hex}"]
        name = broadcast_object_list(names)[0] if accelerator.num_processes > 1 else names[0]
        name += machine
        for left in (name, name + ".lock"):
            atexit.register(_remove, cache_folder() / left)
        return {"rows": "of unknown origin, for this process alone"}, cache_folder() / name
    described = {
        "backbone": backbone_identity(model),
        "rows": identity(),
        "task": [task.name, code, hashed(task.state())],
        "layers": layers,
        "view": view,
        "precision": [accelerator.mixed_precision, accelerator.device.type],
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "pillow")},
    }
    return described, cache_folder() / (hashed(described) + machine)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
