"""Data loader and batch samplers; the order of training rows is a pure function of (seed, epoch)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from hftl.errors import HftlError
from hftl.loading.workers import Batches, start_worker

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.data import DataLoader

Example = dict[str, Any]
Key = tuple[int, int, float]
"""(epoch, row, weight): weight of the row in the loss of its batch; 0 for padding rows."""
_SORT_WINDOW = 50
"""Number of batches sorted together by length; a compromise between less padding and randomness."""


class Examples(Protocol):
    """Encoded rows of one split."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Sizes of the rows [N] for batching by length, or None."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns the examples of `rows`; random values in them depend only on (seed, epoch, row)."""
        ...


@dataclass(frozen=True)
class Share:
    """Distribution of the rows of a step over processes and micro-batches.

    Attributes:
        rank: Rank of this process.
        world: Number of processes.
        batch_size: Rows per micro-batch and process.
        accumulation: Micro-batches per step and process.
        step_rows: Rows per step, if fewer than batch_size x accumulation x world.
    """

    rank: int
    world: int
    batch_size: int
    accumulation: int = 1
    step_rows: int | None = None

    @property
    def effective_batch(self) -> int:
        """Maximum number of rows per step."""
        return self.step_rows or self.batch_size * self.accumulation * self.world


def steps_per_epoch(rows: int, share: Share) -> int:
    """Returns the number of steps per epoch (one pass over `rows` training rows)."""
    return -(-rows // share.effective_batch)


def train_batches(rows: int, lengths: np.ndarray | None, share: Share, seed: int, epoch: int) -> Iterator[list[Key]]:
    """Yields the micro-batches of this process in one epoch, `share.accumulation` per step.

    The rows of a step depend only on (seed, epoch, effective batch): all combinations with the same product
    batch size x accumulation x processes train on the same rows in the same steps. Steps of an epoch differ by one row
    at most; a small last batch would distort gradients and batch statistics. Each row has weight 1 / rows of its step,
    so summed losses are the mean over the step.
    """
    import numpy as np

    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(rows)
    steps = steps_per_epoch(rows, share)
    if lengths is not None:
        window = share.effective_batch * _SORT_WINDOW
        for start in range(0, rows, window):
            chunk = order[start : start + window]
            order[start : start + window] = chunk[np.argsort(lengths[chunk], kind="stable")]
    groups = np.array_split(order, steps)
    if lengths is not None:
        groups = [groups[i] for i in rng.permutation(steps)]
    for group in groups:
        weight = 1.0 / len(group)
        slots = np.array_split(group, share.accumulation * share.world)
        for slot in slots[share.rank :: share.world]:
            # all processes have the same number of micro-batches; empty ones get a padding row of weight 0
            yield [(epoch, int(row), weight) for row in slot] or [(epoch, int(group[0]), 0.0)]


def step_batches(rows: int, lengths: np.ndarray | None, share: Share, seed: int, steps: range) -> Iterator[list[Key]]:
    """Yields the micro-batches of this process in `steps`, counted from the start of training."""
    per_epoch = steps_per_epoch(rows, share)
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        first, last = (min(max(step - epoch * per_epoch, 0), per_epoch) for step in (steps.start, steps.stop))
        batches = train_batches(rows, lengths, share, seed, epoch)
        yield from islice(batches, first * share.accumulation, last * share.accumulation)


def eval_batches(rows: int, lengths: np.ndarray | None, share: Share) -> Iterator[list[Key]]:
    """Yields the batches of this process in one pass over all rows; the same number on all processes.

    The batches are identical for any number of processes, so outputs are bitwise identical as well. Rows are sorted by
    length only within windows, which bounds the memory for restoring the order of outputs.
    """
    import numpy as np

    window = share.batch_size * _SORT_WINDOW
    turn = 0
    for start in range(0, rows, window):
        order = np.arange(start, min(start + window, rows))
        if lengths is not None:
            order = order[np.argsort(lengths[order], kind="stable")]
        for first in range(0, len(order), share.batch_size):
            if turn % share.world == share.rank:
                yield [(0, int(row), 1.0) for row in order[first : first + share.batch_size]]
            turn += 1
    if rows and turn % share.world and share.rank >= turn % share.world:
        yield [(0, 0, 0.0)]  # collectives need equal counts on all processes: padding row of weight 0


def make_loader(
    rows: Examples,
    batches: Callable[[], Iterator[list[Key]]],
    collate: Callable[[list[Example]], dict[str, Any]],
    *,
    device: str,
    num_workers: int,
    timeout: float = 0.0,
) -> Batches:
    """Returns a loader of task batches with `index` [B] int64 and `weight` [B] float32 added; a context manager.

    Args:
        rows: Encoded rows of a split.
        batches: Returns the keys of all batches of one pass; may be called more often than there are passes.
        collate: Collate function of the task: examples -> batch of tensors.
        device: Device type of the batches (`cpu`, `cuda`, …).
        num_workers: Number of worker processes.
        timeout: Seconds without a batch after which a worker counts as hung; 0 disables it.

    Raises:
        HftlError: During iteration: a row is invalid. The error is the same for any number of workers.
    """
    import torch
    from torch.utils.data import DataLoader

    sampler = _BatchSampler(batches)

    def create_loader() -> DataLoader[dict[str, Any]]:
        return DataLoader(
            _BatchedDataset(rows),  # pyright: ignore[reportArgumentType]  torch needs no base class
            batch_sampler=sampler,
            collate_fn=_Collate(collate),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device == "cuda",
            timeout=timeout if num_workers else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),
        )

    return Batches(create_loader, sampler.in_flight, num_workers, timeout)


def default_workers(modality: str, device: str, processes: int) -> int:
    """Returns the default number of loader workers per process: 0 on a CPU, whose cores run the model."""
    if device == "cpu" or modality == "text":
        return 0
    return min(8, (os.cpu_count() or 1) // processes)


class _Collate:
    """Collate function of the task, with row numbers and weights added; a class, so that it can be pickled."""

    def __init__(self, collate: Callable[[list[Example]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, fetched: list[tuple[Key, Example]] | HftlError) -> dict[str, Any] | HftlError:
        import torch

        if isinstance(fetched, HftlError):
            return fetched
        batch = self.collate([example for _, example in fetched])
        batch["index"] = torch.tensor([row for (_, row, _), _ in fetched])
        batch["weight"] = torch.tensor([weight for (_, _, weight), _ in fetched], dtype=torch.float32)
        return batch


class _BatchSampler:
    """Batch sampler that requests new batches in every pass and records the rows of batches in flight."""

    def __init__(self, batches: Callable[[], Iterator[list[Key]]]) -> None:
        self.batches = batches
        self.in_flight: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[Key]]:
        for keys in self.batches():
            self.in_flight.append([row for _, row, _ in keys])
            yield keys


class _BatchedDataset:
    """Map-style dataset over `Examples` that fetches whole batches (torch calls `__getitems__`)."""

    def __init__(self, rows: Examples) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[Key]) -> list[tuple[Key, Example]] | HftlError:
        try:
            return list(zip(keys, self.rows.fetch([row for _, row, _ in keys], keys[0][0]), strict=True))
        except HftlError as error:
            return error  # returned as a batch and raised by `Batches`; torch would wrap it in a worker traceback
