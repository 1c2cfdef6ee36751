"""Stopping in order: a signal asks, the loop answers at the end of its step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While open, SIGTERM and SIGINT ask for a stop instead of ending the process; a second signal ends it at once.

    A launcher that is gone asks too: `accelerate launch` with one process dies of a SIGTERM without passing it on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid() if launched else None

    @property
    def asked(self) -> bool:
        """Whether a stop was asked of this process."""
        if self.reason is None and self._parent not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code, which Python cannot put back

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # not print: a handler may run inside another print
        os.write(2, f"\n{self.reason}: saving after this step; a second signal stops at once\n".encode())
