"""Retry after out-of-memory errors with smaller micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from hftl.errors import HftlError, first_line

T = TypeVar("T")
Batch = dict[str, Any]


class MicroBatchLimit:
    """Upper bound on the rows per forward pass, halved after each out-of-memory error.

    Attribute `rows` is the current bound; None before the first error.

    Args:
        purpose: Phase named in messages, such as `training`.
        enabled: Whether to retry with fewer rows; False: an out-of-memory error is raised immediately.
        whole: Whether the loss compares the rows of a batch across all processes. Fewer rows would change the loss, and
            a retry on one process would block the others, so there is no retry.
    """

    def __init__(self, purpose: str, enabled: bool = True, whole: bool = False) -> None:
        self.purpose = purpose
        self.enabled = enabled and not whole
        self.whole = whole
        self.rows: int | None = None

    def cut(self, batch: Batch) -> Iterator[Batch]:
        """Yields `batch` as micro-batches of nearly equal size within the limit, splitting all per-row values."""
        count = len(batch["index"])
        micro_batches = 1 if self.rows is None else -(-count // self.rows)
        bounds = [count * i // micro_batches for i in range(micro_batches + 1)]
        for start, end in zip(bounds, bounds[1:], strict=False):
            yield batch if micro_batches == 1 else rows_of(batch, slice(start, end), count)

    def retrying(
        self, attempt: Callable[[], T], largest: Callable[[], int], undo: Callable[[], None] = lambda: None
    ) -> T:
        """Calls `attempt` and returns its result; after an out-of-memory error, halves the limit and retries.

        Args:
            attempt: Processes all rows on each call, in micro-batches from `cut`.
            largest: Returns the size in rows of the largest batch so far.
            undo: Reverts side effects of a failed attempt.

        Raises:
            HftlError: A single row does not fit into memory, or retries are disabled.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error)
            # outside the except block: the traceback keeps the tensors of the attempt alive
            undo()
            self._halve(largest(), message)

    def _halve(self, largest: int, message: str) -> None:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        current = min(self.rows or largest, largest)
        if current == 1 or not self.enabled:
            reason = " The loss compares the rows of a batch, so it cannot be split." if self.whole else ""
            raise HftlError(
                f"out of memory in {self.purpose} with {current} row(s) per forward pass: {message}.{reason} Reduce "
                "train.batch_size_per_device, data.max_length or model.image_size, or use adapt.method lora or frozen, "
                "a smaller model, or mixed precision (accelerate_config.yaml)."
            )
        self.rows = current // 2
        rank = os.environ.get("RANK")
        prefix = f"process {rank}: " if rank else ""
        print(
            f"{prefix}out of memory in {self.purpose} with {current} rows per forward pass; retrying with at most "
            f"{self.rows}",
            flush=True,
        )


def joined(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenates the outputs of micro-batches along the first dimension."""
    if len(outputs) == 1:
        return outputs[0]
    return {name: torch.cat([micro_batch[name] for micro_batch in outputs]) for name in outputs[0]}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of a device or of the host."""
    from accelerate.utils.memory import should_reduce_batch_size

    has_known_type = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return has_known_type or isinstance(error, Exception) and should_reduce_batch_size(error)


def rows_of(value: Any, rows: slice, count: int) -> Any:
    """Slices a batch of `count` rows: tensors [count, …] and lists of that length, also nested in mappings."""
    if isinstance(value, Mapping):
        return {name: rows_of(item, rows, count) for name, item in value.items()}
    is_per_row = isinstance(value, torch.Tensor) and value.shape[:1] == (count,)
    return value[rows] if is_per_row or isinstance(value, list) and len(value) == count else value
