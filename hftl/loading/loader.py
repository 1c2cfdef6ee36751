"""Which rows go into which batch, on which process. Order is a pure function of (seed, epoch); see `train_batches`."""

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
"""(epoch, row, weight): the weight is the row's share in its batch's loss; 0 marks a filler row."""
_SORT_WINDOW = 50
"""Batches whose rows are sorted together by length: large enough to save padding, small enough to stay random."""


class Examples(Protocol):
    """Rows of one split, ready to be turned into examples."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Size of each row [N] when rows of like size should share a batch, else None."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns the examples of `rows`; anything random in them depends on (seed, epoch, row) alone."""
        ...


@dataclass(frozen=True)
class Share:
    """How the rows of a step are divided: over `world` processes, of which this is `rank`."""

    rank: int
    world: int
    batch_size: int
    accumulation: int = 1
    step_rows: int | None = None
    """Rows of one step where they are fewer than batches x accumulation x processes hold."""

    @property
    def effective_batch(self) -> int:
        """Rows of one step, at most."""
        return self.step_rows or self.batch_size * self.accumulation * self.world


def steps_per_epoch(rows: int, share: Share) -> int:
    """Returns the number of steps in which every training row is seen once."""
    return -(-rows // share.effective_batch)


def train_batches(rows: int, lengths: np.ndarray | None, share: Share, seed: int, epoch: int) -> Iterator[list[Key]]:
    """Yields this process's micro-batches of one epoch, `share.accumulation` for every step.

    Which rows form a step depends on (seed, epoch, effective batch) alone: any split of an equal product
    batch x accumulation x processes trains on the same rows in the same steps. The steps of an epoch
    differ by one row at most, so there is no small last batch to upset gradients or batch statistics.
    Each row weighs 1 / rows in its step, so summed losses are the mean over the whole step.
    """
    import numpy as np

    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(rows)
    steps = steps_per_epoch(rows, share)
    if lengths is not None:
        window = share.effective_batch * _SORT_WINDOW
        for start in range(0, rows, window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    groups = np.array_split(order, steps)
    if lengths is not None:
        groups = [groups[i] for i in rng.permutation(steps)]
    for group in groups:
        weight = 1.0 / len(group)
        slots = np.array_split(group, share.accumulation * share.world)
        for slot in slots[share.rank :: share.world]:
            # every process takes as many micro-batches; an empty one holds a row that counts nothing
            yield [(epoch, int(row), weight) for row in slot] or [(epoch, int(group[0]), 0.0)]


def step_batches(rows: int, lengths: np.ndarray | None, share: Share, seed: int, steps: range) -> Iterator[list[Key]]:
    """Yields this process's micro-batches of some steps, counted from the beginning of training."""
    per_epoch = steps_per_epoch(rows, share)
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        first, last = (min(max(step - epoch * per_epoch, 0), per_epoch) for step in (steps.start, steps.stop))
        batches = train_batches(rows, lengths, share, seed, epoch)
        yield from islice(batches, first * share.accumulation, last * share.accumulation)


def eval_batches(rows: int, lengths: np.ndarray | None, share: Share) -> Iterator[list[Key]]:
    """Yields this process's batches of one pass over all rows, as many as every other process does.

    The batches are the same on any number of processes, only shared out differently, so that outputs are
    bitwise the same too. Rows of like length share a batch within windows, so memory stays bounded when
    outputs are put back in order.
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
        yield [(0, 0, 0.0)]  # collectives need equal counts on all processes: a row that counts nothing


def make_loader(
    rows: Examples,
    batches: Callable[[], Iterator[list[Key]]],
    collate: Callable[[list[Example]], dict[str, Any]],
    *,
    device: str,
    num_workers: int,
    timeout: float = 0.0,
) -> Batches:
    """Returns task batches with `index` [B] int64 and `weight` [B] float32 added; to be used in a `with` block.

    Args:
        rows: The split.
        batches: Returns the batches of a pass; may be called more often than passes are made.
        collate: Examples -> batch of tensors, from the task.
        device: Device type that batches go to (`cpu`, `cuda`, …).
        num_workers: Processes that prepare batches.
        timeout: Seconds without a batch after which such a process is taken for hung; 0 waits for ever.

    Raises:
        HftlError: While iterating: a row cannot be used. The same error with any number of workers.
    """
    import torch
    from torch.utils.data import DataLoader

    passes = _Passes(batches)

    def make() -> DataLoader[dict[str, Any]]:
        return DataLoader(
            _Fetching(rows),  # pyright: ignore[reportArgumentType]  torch needs no base class
            batch_sampler=passes,
            collate_fn=_Collating(collate),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device == "cuda",
            timeout=timeout if num_workers else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),
        )

    return Batches(make, passes.handed, num_workers, timeout)


def default_workers(modality: str, device: str, processes: int) -> int:
    """Returns how many loader processes pay off: on a CPU the cores are busy with the model."""
    if device == "cpu" or modality == "text":
        return 0
    return min(8, (os.cpu_count() or 1) // processes)


class _Collating:
    """The task's collate, with row numbers and weights added; a class, because workers may have to be sent it."""

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


class _Passes:
    """A batch sampler that asks for its batches anew on every pass, and notes the rows that go out."""

    def __init__(self, batches: Callable[[], Iterator[list[Key]]]) -> None:
        self.batches = batches
        self.handed: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[Key]]:
        for keys in self.batches():
            self.handed.append([row for _, row, _ in keys])
            yield keys


class _Fetching:
    """Map-style view of `Examples` that fetches a whole batch at once (torch calls `__getitems__`)."""

    def __init__(self, rows: Examples) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[Key]) -> list[tuple[Key, Example]] | HftlError:
        try:
            return list(zip(keys, self.rows.fetch([row for _, row, _ in keys], keys[0][0]), strict=True))
        except HftlError as error:
            return error  # sent like a batch, and raised by `Batches`: torch would bury it in a worker's traceback
