"""Lines for a person, printed once however many processes run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hftl.redaction import sanitize

_muted = 0


def is_main_process() -> bool:
    """Whether this process prints: the launcher's rank 0, or the only one.

    Read from the environment, because lines are printed before any process group exists.
    """
    return os.environ.get("RANK", "0") == "0"


def log(message: str = "") -> None:
    """Prints `message` on the main process, at once (log files must not lag behind)."""
    if is_main_process() and not _muted:
        print(sanitize(message), flush=True)


@contextmanager
def suppress_logs() -> Iterator[None]:
    """Drops the lines said inside: for many small runs in one process, which report as a table."""
    global _muted
    _muted += 1
    try:
        yield
    finally:
        _muted -= 1


def leave_process_group() -> None:
    """Ends what a launcher's processes share, where one was begun; torch complains at exit otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
