"""Worker processes of the data loader: crashes and hangs become errors that list the affected rows."""

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
"""Seconds for a worker to shut down before it is killed."""
_DEATH_MESSAGE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_TIMEOUT_MESSAGE = "DataLoader timed out after"
_MAX_LISTED_ROWS = 64
_started: WeakSet[BaseProcess] = WeakSet()


class Batches:
    """Batches of one split; iterable several times. As a context manager, it stops its worker processes on exit.

    A worker that dies, or hangs longer than `timeout`, raises a `DataError` with its rows. torch raises worker deaths
    from a signal handler at any point of the main process, so the `DataError` is raised at the end of the `with` block
    too. Without `with`, workers run until this object is garbage-collected.

    Args:
        create_loader: Creates a DataLoader with in-order delivery.
        in_flight: Row numbers of the batches sent to workers in the current pass, in order; delivered batches are
            removed here.
        workers: Number of worker processes; 0 loads in this process.
        timeout: Seconds without a batch after which a worker counts as hung; 0 disables it.
    """

    def __init__(
        self, create_loader: Callable[[], DataLoader[Any]], in_flight: deque[list[int]], workers: int, timeout: float
    ) -> None:
        self._create_loader, self._in_flight, self._count, self._timeout = create_loader, in_flight, workers, timeout
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None
        self._workers: Sequence[BaseProcess] = ()
        """In dispatch order; kept after they exit, for their exit codes."""
        self._delivered = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader is None:
            self._loader = self._create_loader()
        self._delivered = 0
        self._in_flight.clear()
        try:
            with _kill_workers_at_exit():
                self._running = iter(self._loader)
                self._workers = getattr(self._running, "_workers", ())  # private in torch
            for batch in self._running:
                self._delivered += 1
                self._in_flight.popleft()
                if isinstance(batch, HftlError):  # workers return errors as batches, without a worker traceback
                    raise batch
                yield batch
        except Exception as error:
            try:
                self._raise_worker_error(error, self._dead_workers(error))
            finally:
                self.close()
            raise

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._raise_worker_error(error)
        finally:
            self.close()

    def close(self) -> None:
        """Shuts the workers down; kills those that still run after `GRACE_S` seconds."""
        running = self._running
        self._running = self._loader = None
        if running is None or not self._workers:
            return
        # in a thread: the shutdown joins worker after worker, and the pin-memory thread without a timeout
        shutdown = Thread(target=running._shutdown_workers, daemon=True)
        with suppress(RuntimeError):  # torch may raise a worker death at any time
            shutdown.start()
        for _ in range(3):
            with suppress(RuntimeError):  # torch raises for each killed worker
                shutdown.join(GRACE_S)
                _kill(self._workers)

    def _dead_workers(self, error: Exception) -> list[int]:
        """Returns the pids of dead workers if `error` is a broken connection; they own the tensors of a batch."""
        if not isinstance(error, (OSError, EOFError)):
            return []
        ended = wait([worker.sentinel for worker in self._workers], GRACE_S)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(GRACE_S)  # a process closes its files shortly before it exits
        return [worker.pid for worker in self._workers if worker.exitcode and worker.pid]

    def _raise_worker_error(self, error: BaseException | None, pids: Sequence[int] = ()) -> None:
        """Raises a `DataError` if `error` reports a dead or hung worker, or if `pids` of dead workers are passed."""
        message = str(error) if isinstance(error, RuntimeError) else ""
        death = _DEATH_MESSAGE.search(message)
        if death:
            pids = [int(pid) for pid in death[1].split(",")]
        processes, in_flight = self._workers, list(self._in_flight)
        if message.startswith(_TIMEOUT_MESSAGE):
            pid = processes[self._delivered % self._count].pid
            raise DataError(
                f"data.worker_timeout: no batch for {self._timeout:g} s. Worker process {pid} hangs at "
                f"{_format_rows(in_flight[:1])}. Check these rows (disconnected disk, endless decoding), or increase "
                "--data.worker_timeout."
            ) from error
        if not pids:
            return
        dead = [number for number, process in enumerate(processes) if process.pid in pids]
        if not dead and (processes or not in_flight):
            return  # a worker of another loader; before processes are known, one that died during startup
        # batch n goes to worker n modulo their number
        rows = [batch for n, batch in enumerate(in_flight, self._delivered) if not dead or n % self._count in dead]
        exits = ", ".join(f"process {pid} {_describe_exit(processes, pid, message)}" for pid in pids)
        raise DataError(
            f"data.num_workers: a loader worker died: {exits}. It was loading {_format_rows(rows)}; check the first "
            f"ones. {_ADVICE}"
        ) from error


_ADVICE = (
    "SIGKILL: out of memory (see dmesg), set a lower --data.num_workers or use smaller images. SIGBUS: /dev/shm is "
    "full. SIGSEGV: a crash in the decoding library."
)


def start_worker(_: int) -> None:
    """Initializes a worker: ignores SIGINT and SIGTERM (left to the main process); exits with its parent on Linux."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # torch checks the parent only between batches, never in a hung worker
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    sys.excepthook = _hide_connection_errors


def _hide_connection_errors(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints uncaught exceptions, except connection errors after the main process exited.

    Otherwise the multiprocessing thread that sends tensors prints a traceback.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _describe_exit(processes: Sequence[BaseProcess], pid: int, message: str) -> str:
    code = next((process.exitcode for process in processes if process.pid == pid), None)
    if code is None:  # the signal arrived before the process was joined
        return message.partition("is killed by signal: ")[2].split(". ")[0].strip(" .") or "ended"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _format_rows(batches: list[list[int]]) -> str:
    numbers = [str(row) for batch in batches for row in batch]
    return f"row(s) {shorten(numbers, _MAX_LISTED_ROWS)}" if numbers else "no rows"


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join(GRACE_S)


@contextmanager
def _kill_workers_at_exit() -> Iterator[None]:
    """Kills workers started in the block at interpreter exit; multiprocessing would join them."""
    before = set(active_children())
    try:
        yield
    finally:
        _started.update(set(active_children()) - before)
        atexit.unregister(_kill_started)
        atexit.register(_kill_started)  # again: the last registered runs first, before torch and multiprocessing


def _kill_started() -> None:
    with suppress(ValueError):  # raised outside of the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _kill(list(_started))
