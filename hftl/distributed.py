"""The processes of one run: one that works while the others wait, and what is said when one is lost.

A collective gives up after `train.timeout_minutes`. Between steps that is right: who is late is dead or hangs.
Where processes work for an unknown time (tokenizing, saving, pushing) they use `heartbeat_barrier`: each one says
again and again, in the group's store, that it is alive, and the others wait as long as it does.
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
"""Seconds between two signs of life, at most."""
LIMIT_H = 12
"""Hours after which one stops to wait for a process, alive or not."""
_BUSY, _DONE, _FAILED = b"busy", b"done", b"failed"
_timeout = timedelta(minutes=10)
_rounds = count()


def group_options(timeout_minutes: float) -> InitProcessGroupKwargs:
    """Returns how Accelerate is to build the process group; the timeout holds for `heartbeat_barrier` too."""
    from accelerate.utils import InitProcessGroupKwargs

    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    return InitProcessGroupKwargs(timeout=_timeout)


def number_of_processes() -> int:
    """Returns how many processes have formed a group; 1 before they have."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


@contextmanager
def heartbeat_barrier(what: str) -> Iterator[None]:
    """Every process enters, works as long as it needs, or not at all, and leaves when all have.

    Args:
        what: The work, for the message; the same on all processes.

    Raises:
        PeerError: Another process failed inside, died, or came or said nothing for the timeout of the group.
    """
    if number_of_processes() == 1:
        yield
        return
    import torch

    store, rank = _store(), torch.distributed.get_rank()
    peers = [peer for peer in range(torch.distributed.get_world_size()) if peer != rank]
    keys = f"hftl/{next(_rounds)}/{what}"
    with _alive(store, f"{keys}/{rank}"):
        yield
    try:
        for peer in peers:
            _wait_for(store, f"{keys}/{peer}", peer, what)
        if rank == 0:  # it may be the one that serves the store, so it stays until the others have read
            for peer in peers:
                _read(store, f"{keys}/{peer}/left", peer, what)
            return
    except KeyboardInterrupt:
        with suppress(RuntimeError):
            store.set(f"{keys}/{rank}/left", _FAILED)  # or the main process would wait for one that has gone
        raise
    store.set(f"{keys}/{rank}/left", _DONE)


@contextmanager
def main_process_first(what: str) -> Iterator[None]:
    """The main process works first, then the first one of each machine, then the others, which find it done.

    Raises:
        PeerError: As in `heartbeat_barrier`.
    """
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), number_of_processes()  # 0: the launcher does not say
    rank = int(os.environ.get("RANK", "0"))
    turn = 0 if rank == 0 else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    if world == 1:
        yield
        return
    for number in range(3):
        if (number == 1 and local == world) or (number == 2 and local == 1):
            continue  # nobody's turn
        with heartbeat_barrier(f"{what}, turn {number + 1}"):
            if number == turn:
                yield


def shared_row_error(mine: Sequence[RowError]) -> RowError | None:
    """Returns one error for the rows that any process cannot use, the same on all; None if there is no such row.

    Args:
        mine: The errors of this process; all processes call it together.
    """
    found = list(mine)
    if number_of_processes() > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    if not found:
        return None
    error = RowError(*(problem for each in found for problem in each.problems))
    error.agreed = True
    return error


def readable(error: Exception) -> HftlError | None:
    """Returns the error of ours that `error` is, or stands for; None where it is neither."""
    return error if isinstance(error, HftlError) else as_peer_error(error)


def as_peer_error(error: Exception) -> PeerError | None:
    """Returns the `PeerError` that an error of torch's communication stands for; None when it is something else.

    Gloo raises `RuntimeError` with the place in its source; the store, and the start of a group, raise `DistError`
    (seen on torch 2.15). NCCL raises `DistBackendError`, which is one too, unless its watchdog ends the process first.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    said = str(error)
    gloo = "gloo/" in said or "Gloo " in said
    if not gloo and not isinstance(error, torch.distributed.DistError):
        return None
    if number_of_processes() == 1 or "connectFullMesh" in said or "clients joined" in said:
        host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
        return PeerError(
            f"Process {_me()} did not find the other processes of the run within {_limit()}: they meet at {host}, port "
            f"{port}. Look whether all were started, whether one ended before (its own message says why), and whether "
            f"machines reach each other on all ports (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network "
            f"device where a machine's own name does not lead to its address). {first_line(error)}"
        )
    where = f" ({_address(said)})" if _address(said) else ""
    if "imed out" in said or "imeout" in said:
        return PeerError(
            _sentence(
                f"waited {_limit()} for another one{where}, which did not answer: it hangs, its machine is gone, or "
                "the network between them is cut"
            )
        )
    return PeerError(_sentence(f"lost its connection to another one{where}, which has ended or was killed"))


def _sentence(happened: str) -> str:
    return (
        f"Process {_me()} {happened}. The message of the process that failed first, if it left one, stands in its own "
        "log. Start the run again with --resume auto: it goes on from its last checkpoint."
    )


def _limit() -> str:
    return f"{_timeout.total_seconds() / 60:.3g} min (train.timeout_minutes)"


def _me() -> str:
    return f"{os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} (host {socket.gethostname()})"


def _address(said: str) -> str:
    """Returns the address of the other process, where gloo names it: "… [10.0.0.2]:4711: …"."""
    import re

    found = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", said)
    return found[1] if found else ""


def _store() -> Any:
    """Returns the key-value store through which the group was formed (torch has no public name for it)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


@contextmanager
def _alive(store: Any, key: str) -> Iterator[None]:
    """Writes `key/0`, `key/1`, … while the block runs, and how it ended."""
    over, number = Event(), count()
    pause = min(BEAT_S, _timeout.total_seconds() / 4)

    def say(state: bytes) -> None:
        store.set(f"{key}/{next(number)}", state)

    def beat() -> None:
        with suppress(RuntimeError):  # a store that is gone is noticed where it is needed
            while not over.wait(pause):
                say(_BUSY)

    thread = Thread(target=beat, daemon=True)
    say(_BUSY)  # it has come
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        thread.join()
        with suppress(RuntimeError):
            say(_FAILED)
        raise
    over.set()
    thread.join()
    say(_DONE)


def _wait_for(store: Any, key: str, peer: int, what: str) -> None:
    for number in range(int(LIMIT_H * 3600 / BEAT_S)):
        state = _read(store, f"{key}/{number}", peer, what)
        if state == _DONE:
            return
        if state == _FAILED:
            raise PeerError(_sentence(f"stops because process {peer} failed ({what})"))
    raise PeerError(_sentence(f"has waited {LIMIT_H} h for process {peer} ({what})"))


def _read(store: Any, key: str, peer: int, what: str) -> bytes:
    """Waits for a key and returns its value.

    In a thread, because on a cut line torch's store notices the timeout and then waits, without one, for the server to
    confirm that it has (torch 2.15, TCPStore).
    """
    import torch

    found: list[bytes | RuntimeError] = []

    def ask() -> None:
        try:
            store.wait([key], _timeout)
            found.append(store.get(key))
        except RuntimeError as error:
            found.append(error)

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_timeout.total_seconds() + BEAT_S)
    answer = found[0] if found else None
    if isinstance(answer, bytes):
        return answer
    if isinstance(answer, torch.distributed.DistNetworkError):
        raise PeerError(_sentence(f"lost its connection to the main process while it waited ({what})")) from answer
    raise PeerError(_sentence(f"has not heard of process {peer} for {_limit()} ({what})")) from answer


T = TypeVar("T")


def run_on_main(accelerator: Accelerator, action: Callable[[], T], folder: object = "the run folder") -> T:
    """Returns, on all processes, what `action` returns on the main one.

    Without this a disk that fails there would leave the others waiting.

    Args:
        accelerator: From `start`.
        action: Reads or writes files; what it returns is sent to all.
        folder: Where it writes, for an error that does not say it.

    Raises:
        HftlError: The one that `action` raised, or for the disk's failure; on all processes.
    """
    from accelerate.utils import broadcast_object_list

    done: list[Any] = [None, None]
    with heartbeat_barrier("work of the main process"):
        if accelerator.is_main_process:
            try:
                done[0] = action()
            except HftlError as error:
                done[1] = error
            except Exception as error:
                done[1] = disk_error(error, folder)
                if done[1] is None:
                    raise
    if accelerator.num_processes > 1:
        done = broadcast_object_list(done)
    if done[1] is not None:
        done[1].agreed = True
        raise done[1]
    return done[0]
