"""One process of a group, started by hand: `RANK=0 WORLD_SIZE=2 … group_job.py CASE`. Prints JSON lines."""

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


def tell(**what) -> None:
    print(json.dumps(what | {"rank": RANK, "at": round(time.monotonic(), 3)}), flush=True)


def turns() -> None:
    """The main process works for longer than the timeout; then one fails; then everything goes on."""
    with main_process_first("work"):
        tell(event="in")
        time.sleep(2 * TIMEOUT_S if RANK == 0 else 0.1)
        tell(event="out")
    try:
        with heartbeat_barrier("fail"):
            if RANK == 2:
                raise ValueError("mine")
            time.sleep(0.1)
    except (PeerError, ValueError) as error:
        tell(event="failed", error=type(error).__name__, said=str(error))
    with heartbeat_barrier("end"):
        pass
    tell(event="through", processes=number_of_processes())


def lose(how: str, where: str) -> None:
    def go() -> None:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    if where == "wait":  # for the test, to cut the cable
        with heartbeat_barrier("work"):
            tell(event="in")
            time.sleep(4 * TIMEOUT_S if RANK == 0 else 0)
    elif where == "together":
        with heartbeat_barrier("work"):
            if RANK == 1:
                time.sleep(0.5)
                go()
    else:
        torch.distributed.all_reduce(torch.ones(2))
        if RANK == 1:
            go()
        torch.distributed.all_reduce(torch.ones(2))


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    try:
        Accelerator(cpu=True, kwargs_handlers=[group_options(TIMEOUT_S / 60)])
        tell(event="begin")
        turns() if case == "turns" else lose(case, *arguments)
    except Exception as raised:
        error = raised if isinstance(raised, PeerError) else as_peer_error(raised)
        if error is None:
            raise
        tell(event="lost", said=str(error))
        sys.exit(error.exit_code)
