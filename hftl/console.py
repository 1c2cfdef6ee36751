"""Lines for a person, printed once however many processes run."""

from __future__ import annotations

import os
import sys


def is_main_process() -> bool:
    """Whether this process prints: the launcher's rank 0, or the only one.

    Read from the environment, because lines are printed before any process group exists.
    """
    return os.environ.get("RANK", "0") == "0"


def say(message: str = "") -> None:
    """Prints `message` on the main process, at once (log files must not lag behind)."""
    if is_main_process():
        print(message, file=sys.stdout, flush=True)
