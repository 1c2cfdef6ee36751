"""Batches prepared by other processes, and what is said when one of these dies or hangs: which rows it had."""

from __future__ import annotations

import atexit
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hftl.errors import DataError, HftlError, shorten

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

GRACE_S = 1.5
"""Seconds that a worker has to leave by itself before it is killed."""
_LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_LATE = "DataLoader timed out after"
_NAMED = 64
"""Rows that a message names, at most."""
_started: WeakSet[BaseProcess] = WeakSet()


class Batches:
    """The batches of one split, as often as they are iterated; `with` it, its worker processes end when the block does.

    A worker that dies, or that hangs longer than `timeout`, is a `DataError` that names the rows it had. torch notices
    a death wherever the main process is at that moment (it raises from a signal handler), so the error of ours comes
    out of the `with` block, not only out of the iteration. Without `with`, workers live until this object is gone.

    Args:
        make: Returns a new DataLoader that delivers in order. Called when there is none.
        handed: Rows of each batch of the running pass that was handed out, in order; delivered ones are taken off here.
        workers: Their number; 0 when batches are made in this process.
        timeout: Seconds without a batch after which a worker is taken for hung; 0 when never.
    """

    def __init__(
        self, make: Callable[[], DataLoader[Any]], handed: deque[list[int]], workers: int, timeout: float
    ) -> None:
        self._make, self._handed, self._count, self._timeout = make, handed, workers, timeout
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None
        self._workers: Sequence[BaseProcess] = ()
        """In the order in which batches go to them; kept when they have ended, to tell how."""
        self._delivered = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader is None:
            self._loader = self._make()
        self._delivered = 0
        self._handed.clear()
        try:
            with _killed_at_exit():
                self._running = iter(self._loader)
                self._workers = getattr(self._running, "_workers", ())  # torch keeps them to itself
            for batch in self._running:
                self._delivered += 1
                self._handed.popleft()
                if isinstance(batch, HftlError):  # a worker sends it like a batch: torch would bury it in a traceback
                    raise batch
                yield batch
        except Exception as error:
            try:
                self._explain(error, self._cut_off(error))
            finally:
                self.close()
            raise

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._explain(error)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers: they are asked to leave, and killed when they have not after `GRACE_S` seconds."""
        running = self._running
        self._running = self._loader = None
        if running is None or not self._workers:
            return
        # in a thread, because it waits for each worker in turn, and for the one that pins memory without a limit
        leaving = Thread(target=running._shutdown_workers, daemon=True)
        with suppress(RuntimeError):  # torch may tell of a worker at any moment
            leaving.start()
        for _ in range(3):
            with suppress(RuntimeError):  # torch tells of each worker that is killed now
                leaving.join(GRACE_S)
                _kill(self._workers)

    def _cut_off(self, error: Exception) -> list[int]:
        """Returns the workers that died where a batch did not arrive whole: tensors are fetched from their maker."""
        if not isinstance(error, (OSError, EOFError)):
            return []
        ended = wait([worker.sentinel for worker in self._workers], GRACE_S)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(GRACE_S)  # a process closes its files a moment before it has ended
        return [worker.pid for worker in self._workers if worker.exitcode and worker.pid]

    def _explain(self, error: BaseException | None, pids: Sequence[int] = ()) -> None:
        """Raises the `DataError` that `error` stands for, where it tells of a worker or of `pids`, which died."""
        said = str(error) if isinstance(error, RuntimeError) else ""
        lost = _LOST.search(said)
        if lost:
            pids = [int(pid) for pid in lost[1].split(",")]
        processes, handed = self._workers, list(self._handed)
        if said.startswith(_LATE):
            pid = processes[self._delivered % self._count].pid
            raise DataError(
                f"data.worker_timeout: no batch for {self._timeout:g} s. Worker process {pid} hangs at "
                f"{_rows(handed[:1])}: look at these rows (files on a disk that is gone, a decoder without an end), or "
                "raise --data.worker_timeout where a batch may take as long."
            ) from error
        if not pids:
            return
        dead = [number for number, process in enumerate(processes) if process.pid in pids]
        if not dead and (processes or not handed):
            return  # a worker of other batches; where processes are not known yet, it died while they were started
        # batch n goes to worker n modulo their number
        had = [rows for n, rows in enumerate(handed, self._delivered) if not dead or n % self._count in dead]
        ends = ", ".join(f"process {pid} {_end(processes, pid, said)}" for pid in pids)
        raise DataError(
            f"data.num_workers: a worker that prepares batches died: {ends}. It had {_rows(had)}; begin with the first "
            f"ones. {_ADVICE}"
        ) from error


_ADVICE = (
    "SIGKILL is what a system short of memory sends (see dmesg): take fewer workers (--data.num_workers) or smaller "
    "images; SIGBUS means that /dev/shm is full; SIGSEGV is a crash in the library that decodes."
)


def start_worker(_: int) -> None:
    """Runs first in every worker: signals to all processes of a terminal or a job are for the main one to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # torch's own check of the parent runs between batches only, so never in a hung one
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    sys.excepthook = _without_lost_connections


def _without_lost_connections(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Says what nobody caught, but not that the main process has gone.

    The thread of multiprocessing that hands tensors over would print a traceback for that.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end(processes: Sequence[BaseProcess], pid: int, said: str) -> str:
    code = next((process.exitcode for process in processes if process.pid == pid), None)
    if code is None:  # the signal came before the process was waited for
        return said.partition("is killed by signal: ")[2].split(". ")[0].strip(" .") or "ended"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _rows(batches: list[list[int]]) -> str:
    names = [str(row) for batch in batches for row in batch]
    return f"row(s) {shorten(names, _NAMED)}" if names else "no rows"


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join(GRACE_S)


@contextmanager
def _killed_at_exit() -> Iterator[None]:
    """Workers started inside do not keep the interpreter from ending; multiprocessing would wait for them."""
    before = set(active_children())
    try:
        yield
    finally:
        _started.update(set(active_children()) - before)
        atexit.unregister(_kill_started)
        atexit.register(_kill_started)  # anew: the last registered comes first, before torch's and multiprocessing's


def _kill_started() -> None:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _kill(list(_started))
