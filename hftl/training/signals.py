"""Stopping in order: a signal asks, the loop answers at the end of its step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from hftl.training.sync import all_reduce_sum

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = ("SIGTERM", "SIGINT")
ECHO_S = 3.0
"""Seconds within which signals that a launcher passes on count as one."""


class StopSignal:
    """While open, SIGTERM and SIGINT ask for a stop instead of ending the process; a second signal ends it at once.

    Signals that several processes of `torchrun` are sent come twice, from who asks and from the launcher, which passes
    them on: there, what follows within `ECHO_S` is the same request.

    A launcher that is gone asks too: `accelerate launch` with one process dies of a SIGTERM without passing it on.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reason: str | None = None
        self._before: dict[int, Any] = {}
        self._received_at = 0.0
        self._passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        launched = self._passed_on or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._parent = os.getppid() if launched else None

    @property
    def received(self) -> bool:
        """Whether a stop was asked of this process."""
        if self.reason is None and self._parent not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        return self.reason is not None

    def any_received(self) -> bool:
        """Whether a stop was asked of any process; all call it together."""
        nothing = torch.zeros((), device=self._accelerator.device)
        return all_reduce_sum(self._accelerator, nothing, self.received)[1] > 0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code, which Python cannot put back

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason in SIGNALS:
            if now - self._received_at > ECHO_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.reason, self._received_at = signal.Signals(number).name, now
        if not self._passed_on:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)  # works in the middle of a computation, as no handler does
        # not print: a handler may run inside another print
        os.write(2, f"\n{self.reason}: saving after this step; a second signal stops at once\n".encode())
