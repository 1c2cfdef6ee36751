"""Log lines, printed by the main process only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hftl.redaction import sanitize

_suppressed = 0


def is_main_process() -> bool:
    """Whether this process has rank 0, or is the only one.

    The rank is read from the environment because lines are logged before the process group is initialized.
    """
    return os.environ.get("RANK", "0") == "0"


def log(message: str = "") -> None:
    """Prints `message` on the main process and flushes the stream."""
    if is_main_process() and not _suppressed:
        print(sanitize(message), flush=True)


@contextmanager
def suppress_logs() -> Iterator[None]:
    """Suppresses log lines inside the block, such as those of many small runs in one process."""
    global _suppressed
    _suppressed += 1
    try:
        yield
    finally:
        _suppressed -= 1


def leave_process_group() -> None:
    """Destroys the process group if it is initialized; torch warns at exit otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
