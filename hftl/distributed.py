"""Synchronization of the processes of a run, and errors for processes that fail.

A collective times out after `train.timeout_minutes`, which suits training steps: a later process is dead or hangs.
Work of unknown duration (tokenizing, saving, pushing) uses `heartbeat_barrier`: each process writes heartbeats to the
store of the process group, and the others wait as long as they arrive.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from hftl.errors import HftlError, PeerError, RowError, disk_error, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

BEAT_S = 2.0
"""Maximum seconds between two heartbeats."""
LIMIT_H = 12
"""Maximum hours of waiting for a process, with or without heartbeats."""
_BUSY, _DONE, _FAILED = b"busy", b"done", b"failed"
_timeout = timedelta(minutes=10)
_barriers = count()


def group_options(timeout_minutes: float) -> InitProcessGroupKwargs:
    """Returns the options of the process group; the timeout applies to `heartbeat_barrier` too."""
    from accelerate.utils import InitProcessGroupKwargs

    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    return InitProcessGroupKwargs(timeout=_timeout)


def number_of_processes() -> int:
    """Returns the size of the process group, or 1 before it is initialized."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


@contextmanager
def heartbeat_barrier(description: str) -> Iterator[None]:
    """Runs the block on every process, and leaves it when all processes have finished.

    Args:
        description: The work, for the error message; the same on all processes.

    Raises:
        PeerError: Another process failed in the block, died, or sent no heartbeat within the timeout of the group.
    """
    if number_of_processes() == 1:
        yield
        return
    import torch

    store, rank = _store(), torch.distributed.get_rank()
    peers = [peer for peer in range(torch.distributed.get_world_size()) if peer != rank]
    keys = f"hftl/{next(_barriers)}/{description}"
    with _heartbeats(store, f"{keys}/{rank}"):
        yield
    try:
        for peer in peers:
            _wait_for(store, f"{keys}/{peer}", peer, description)
        if rank == 0:  # rank 0 may host the store: leave last
            for peer in peers:
                _read(store, f"{keys}/{peer}/left", peer, description)
            return
    except KeyboardInterrupt:
        with suppress(RuntimeError):
            store.set(f"{keys}/{rank}/left", _FAILED)  # or the main process would wait for this one
        raise
    store.set(f"{keys}/{rank}/left", _DONE)


@contextmanager
def main_process_first(description: str) -> Iterator[None]:
    """Runs the block on the main process, then on the first one of each machine, then on the others.

    The later processes reuse the files that the earlier ones have written.

    Raises:
        PeerError: As in `heartbeat_barrier`.
    """
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), number_of_processes()  # 0: unknown
    rank = int(os.environ.get("RANK", "0"))
    own_turn = 0 if rank == 0 else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    if world == 1:
        yield
        return
    for turn in range(3):
        if (turn == 1 and local == world) or (turn == 2 and local == 1):
            continue  # no process has this turn
        with heartbeat_barrier(f"{description}, turn {turn + 1}"):
            if turn == own_turn:
                yield


def shared_row_error(local_errors: Sequence[RowError]) -> RowError | None:
    """Returns one error for the invalid rows of all processes, the same on all; None if there are none.

    All processes must call it.

    Args:
        local_errors: The errors of this process.
    """
    errors = list(local_errors)
    if number_of_processes() > 1:
        from accelerate.utils import gather_object

        errors = gather_object(errors)
    if not errors:
        return None
    error = RowError(*(problem for each in errors for problem in each.problems))
    error.agreed = True
    return error


def readable(error: Exception) -> HftlError | None:
    """Returns `error` as an `HftlError` if it is one or can be converted to a `PeerError`, else None."""
    return error if isinstance(error, HftlError) else as_peer_error(error)


def as_peer_error(error: Exception) -> PeerError | None:
    """Returns the `PeerError` for an error of torch.distributed, or None for other errors.

    Gloo raises `RuntimeError` with a location in its source; the store and the initialization of a group raise
    `DistError` (observed with torch 2.15). NCCL raises its subclass `DistBackendError`, unless its watchdog ends the
    process first.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    text = str(error)
    gloo = "gloo/" in text or "Gloo " in text
    if not gloo and not isinstance(error, torch.distributed.DistError):
        return None
    if number_of_processes() == 1 or "connectFullMesh" in text or "clients joined" in text:
        host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
        return PeerError(
            f"Process {_rank_and_host()} did not find the other processes within {_timeout_text()}; rendezvous at "
            f"{host}, port {port}. Check that all processes were started, that none ended earlier (its own log has the "
            "reason), and that machines reach each other on all ports. Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to "
            f"the network interface if the host name does not resolve to its address. {first_line(error)}"
        )
    address = f" ({_peer_address(text)})" if _peer_address(text) else ""
    if "imed out" in text or "imeout" in text:
        return PeerError(
            _with_advice(
                f"waited {_timeout_text()} for another process{address}, which did not respond: it hangs, its machine "
                "is down, or the network is interrupted"
            )
        )
    return PeerError(_with_advice(f"lost the connection to another process{address}, which has ended or was killed"))


def _with_advice(event: str) -> str:
    return (
        f"Process {_rank_and_host()} {event}. The log of the process that failed first has the cause, if it left a "
        "message. Run the same command with --resume auto to resume from the last checkpoint."
    )


def _timeout_text() -> str:
    return f"{_timeout.total_seconds() / 60:.3g} min (train.timeout_minutes)"


def _rank_and_host() -> str:
    return f"{os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} (host {socket.gethostname()})"


def _peer_address(text: str) -> str:
    """Returns the address of the other process in a message of gloo ("… [10.0.0.2]:4711: …"), or an empty string."""
    import re

    match = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text)
    return match[1] if match else ""


def _store() -> Any:
    """Returns the key-value store of the process group (private in torch)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


@contextmanager
def _heartbeats(store: Any, key: str) -> Iterator[None]:
    """Writes heartbeats to `key/0`, `key/1`, … while the block runs, then how it ended."""
    ended, number = Event(), count()
    interval = min(BEAT_S, _timeout.total_seconds() / 4)

    def write(state: bytes) -> None:
        store.set(f"{key}/{next(number)}", state)

    def beat() -> None:
        with suppress(RuntimeError):  # the next read reports a lost store
            while not ended.wait(interval):
                write(_BUSY)

    thread = Thread(target=beat, daemon=True)
    write(_BUSY)  # this process has entered
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        with suppress(RuntimeError):
            write(_FAILED)
        raise
    ended.set()
    thread.join()
    write(_DONE)


def _wait_for(store: Any, key: str, peer: int, description: str) -> None:
    for number in range(int(LIMIT_H * 3600 / BEAT_S)):
        state = _read(store, f"{key}/{number}", peer, description)
        if state == _DONE:
            return
        if state == _FAILED:
            raise PeerError(_with_advice(f"stops because process {peer} failed ({description})"))
    raise PeerError(_with_advice(f"waited {LIMIT_H} h for process {peer} ({description})"))


def _read(store: Any, key: str, peer: int, description: str) -> bytes:
    """Waits for a key and returns its value.

    It reads in a thread: with an interrupted network, torch's store times out and then waits without a timeout for
    the server to confirm the cancellation (torch 2.15, TCPStore).
    """
    import torch

    results: list[bytes | RuntimeError] = []

    def read() -> None:
        try:
            store.wait([key], _timeout)
            results.append(store.get(key))
        except RuntimeError as error:
            results.append(error)

    thread = Thread(target=read, daemon=True)
    thread.start()
    thread.join(_timeout.total_seconds() + BEAT_S)
    result = results[0] if results else None
    if isinstance(result, bytes):
        return result
    if isinstance(result, torch.distributed.DistNetworkError):
        raise PeerError(_with_advice(f"lost the connection to the main process ({description})")) from result
    no_heartbeat = f"received no heartbeat from process {peer} for {_timeout_text()} ({description})"
    raise PeerError(_with_advice(no_heartbeat)) from result


T = TypeVar("T")


def run_on_main(accelerator: Accelerator, action: Callable[[], T], folder: object = "the run folder") -> T:
    """Runs `action` on the main process and returns its result on all processes.

    Its errors are raised on all processes too; otherwise a disk failure would leave the others waiting.

    Args:
        accelerator: From `create_accelerator`.
        action: Reads or writes files; its result must be picklable.
        folder: The folder it writes to, for errors without a file name.

    Raises:
        HftlError: The error of `action`, or a `DiskError`; on all processes.
    """
    from accelerate.utils import broadcast_object_list

    result_and_error: list[Any] = [None, None]
    with heartbeat_barrier("work of the main process"):
        if accelerator.is_main_process:
            try:
                result_and_error[0] = action()
            except HftlError as error:
                result_and_error[1] = error
            except Exception as error:
                result_and_error[1] = disk_error(error, folder)
                if result_and_error[1] is None:
                    raise
    if accelerator.num_processes > 1:
        result_and_error = broadcast_object_list(result_and_error)
    if result_and_error[1] is not None:
        result_and_error[1].agreed = True
        raise result_and_error[1]
    return result_and_error[0]
