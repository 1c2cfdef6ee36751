"""Running out of memory: the same rows again, fewer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from hftl.errors import HftlError, first_line

T = TypeVar("T")
Batch = dict[str, Any]


class MicroBatchLimit:
    """The most rows that go through the model at once, as far as is known by now; it only ever shrinks.

    Args:
        purpose: What the rows are for, in messages.
        enabled: Whether to try with fewer rows; otherwise being out of memory is an error at once.
        whole: Whether rows are compared with each other, over all processes: fewer of them would be another loss, and
            a process that tries again would leave the others waiting for its rows. So none does.
    """

    def __init__(self, purpose: str, enabled: bool = True, whole: bool = False) -> None:
        self.purpose = purpose
        self.enabled = enabled and not whole
        self.whole = whole
        self.rows: int | None = None

    def cut(self, batch: Batch) -> Iterator[Batch]:
        """Yields `batch` in pieces of equal size within the limit; whatever has one entry per row is cut."""
        count = len(batch["index"])
        pieces = 1 if self.rows is None else -(-count // self.rows)
        edges = [count * i // pieces for i in range(pieces + 1)]
        for first, end in zip(edges, edges[1:], strict=False):
            yield batch if pieces == 1 else rows_of(batch, slice(first, end), count)

    def retrying(
        self, attempt: Callable[[], T], largest: Callable[[], int], undo: Callable[[], None] = lambda: None
    ) -> T:
        """Returns what `attempt` returns, calling it again with the limit halved for as long as memory is short.

        Args:
            attempt: Works from the beginning on each call, in pieces from `cut`.
            largest: Returns the rows of the largest batch that it has met.
            undo: Takes back what an attempt that failed has left.

        Raises:
            HftlError: A single row does not fit, or trying again is switched off.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = first_line(error)
            # here and not above: the error's traceback holds the tensors of the attempt
            undo()
            self._halve(largest(), said)

    def _halve(self, largest: int, said: str) -> None:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        tried = min(self.rows or largest, largest)
        if tried == 1 or not self.enabled:
            why = " The loss compares the rows of a batch, so they are not taken fewer at a time." if self.whole else ""
            raise HftlError(
                f"out of memory in {self.purpose} with {tried} row(s) at once: {said}.{why} Make "
                "train.batch_size_per_device, data.max_length or model.image_size smaller, use adapt.method lora or "
                "frozen, a smaller model, or mixed precision (accelerate_config.yaml)."
            )
        self.rows = tried // 2
        rank = os.environ.get("RANK")
        who = f"process {rank}: " if rank else ""
        print(
            f"{who}out of memory in {self.purpose} with {tried} rows at once; the same rows again, at most {self.rows} "
            "at once from here on",
            flush=True,
        )


def joined(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the outputs of the pieces of a batch as those of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    return {name: torch.cat([piece[name] for piece in outputs]) for name in outputs[0]}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, did not suffice."""
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or isinstance(error, Exception) and should_reduce_batch_size(error)


def rows_of(value: Any, rows: slice, count: int) -> Any:
    """Returns some rows of a batch of `count`: of tensors [count, …] and lists of that length, also in mappings."""
    if isinstance(value, Mapping):
        return {name: rows_of(inner, rows, count) for name, inner in value.items()}
    per_row = isinstance(value, torch.Tensor) and value.shape[:1] == (count,)
    return value[rows] if per_row or isinstance(value, list) and len(value) == count else value
