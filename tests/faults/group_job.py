"""One process of a process group: `RANK=0 WORLD_SIZE=2 … group_job.py CASE`. Prints events as JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
from accelerate import Accelerator

from hftl.distributed import as_peer_error, group_options, heartbeat_barrier, main_process_first, number_of_processes
from hftl.errors import PeerError

RANK = int(os.environ["RANK"])
TIMEOUT_S = 2.0


def emit(**event) -> None:
    print(json.dumps(event | {"rank": RANK, "at": round(time.monotonic(), 3)}), flush=True)


def turns() -> None:
    """The main process works for longer than the timeout; then one process fails; then all continue."""
    with main_process_first("work"):
        emit(event="enter")
        time.sleep(2 * TIMEOUT_S if RANK == 0 else 0.1)
        emit(event="leave")
    try:
        with heartbeat_barrier("fail"):
            if RANK == 2:
                raise ValueError("mine")
            time.sleep(0.1)
    except (PeerError, ValueError) as error:
        emit(event="failed", error=type(error).__name__, message=str(error))
    with heartbeat_barrier("end"):
        pass
    emit(event="finished", processes=number_of_processes())


def lose(signal_name: str, place: str) -> None:
    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL if signal_name == "killed" else signal.SIGSTOP)

    if place == "wait":  # the test cuts the cable
        with heartbeat_barrier("work"):
            emit(event="enter")
            time.sleep(4 * TIMEOUT_S if RANK == 0 else 0)
    elif place == "barrier":
        with heartbeat_barrier("work"):
            if RANK == 1:
                time.sleep(0.5)
                end()
    else:
        torch.distributed.all_reduce(torch.ones(2))
        if RANK == 1:
            end()
        torch.distributed.all_reduce(torch.ones(2))


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    try:
        Accelerator(cpu=True, kwargs_handlers=[group_options(TIMEOUT_S / 60)])
        emit(event="begin")
        turns() if case == "turns" else lose(case, *arguments)
    except Exception as error:
        peer_error = error if isinstance(error, PeerError) else as_peer_error(error)
        if peer_error is None:
            raise
        emit(event="lost", message=str(peer_error))
        sys.exit(peer_error.exit_code)
