"""Graceful shutdown on SIGTERM or SIGINT, after the current step."""

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
"""Seconds within which a signal forwarded by the launcher counts as the same request."""


class StopSignal:
    """Context in which SIGTERM or SIGINT requests a stop; a second signal ends the process immediately.

    Under `torchrun`, a signal to the process group arrives twice, since the launcher forwards it: signals within
    `ECHO_S` count as one request.

    The end of the launcher requests a stop too: `accelerate launch` with one process ends on SIGTERM without
    forwarding it.

    Args:
        accelerator: From `create_accelerator`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}
        self._received_at = 0.0
        self._forwarded = "TORCHELASTIC_RUN_ID" in os.environ
        launched = self._forwarded or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._parent = os.getppid() if launched else None

    @property
    def received(self) -> bool:
        """Whether this process has received a stop signal."""
        if self.reason is None and self._parent not in (None, os.getppid()):
            self.reason = "the launcher ended"
        return self.reason is not None

    def any_received(self) -> bool:
        """Whether any process has received a stop signal; all processes must call it."""
        zero = torch.zeros((), device=self._accelerator.device)
        return all_reduce_sum(self._accelerator, zero, self.received)[1] > 0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler set in C, which Python cannot restore

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason in SIGNALS:
            if now - self._received_at > ECHO_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.reason, self._received_at = signal.Signals(number).name, now
        if not self._forwarded:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)  # Python handlers wait for the end of a native call
        # print is not reentrant
        os.write(
            2, f"\n{self.reason}: saving a checkpoint after this step; a second signal stops immediately\n".encode()
        )
