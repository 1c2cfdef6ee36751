"""Epoch over rows from data loader workers with an injected fault: `worker_job.py '{"fault": …, "row": …}'`.

Prints events as JSON lines, with the seconds since the start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from hftl.errors import HftlError
from hftl.loading.loader import Share, eval_batches, make_loader
from hftl.loading.workers import Batches


class Faulty:
    """30 rows; fetching `row` hangs, kills the worker or raises."""

    lengths = None

    def __init__(self, fault: str, row: int) -> None:
        self.fault, self.row = fault, row

    def __len__(self) -> int:
        return 30

    def fetch(self, rows, epoch):
        if self.row in rows:
            if self.fault == "hang":
                time.sleep(10_000)
            elif self.fault == "die":
                time.sleep(0.3)  # so that the main process is busy
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "exit":
                os._exit(3)
            elif self.fault == "raise":
                raise HftlError(f"row {self.row}: not an image", "second problem")
        return [{"value": row} for row in rows]


def collate(examples):
    return {"value": torch.tensor([example["value"] for example in examples])}


def emit(**event) -> None:
    print(json.dumps(event | {"seconds": round(time.monotonic() - STARTED, 2)}), flush=True)


def open_loader(rows: Faulty, workers: int, timeout: float = 0) -> Batches:
    share = Share(0, 1, 2)
    batches = lambda: eval_batches(len(rows), None, share)  # noqa: E731
    return make_loader(rows, batches, collate, device="cpu", num_workers=workers, timeout=timeout)


def run(spec: dict) -> None:
    loader = open_loader(Faulty(spec["fault"], spec.get("row", -1)), 2, spec.get("timeout", 0))
    if not spec.get("with", True):
        return iterate(loader, spec)
    with loader as batches:
        iterate(batches, spec)


def iterate(batches, spec: dict) -> None:
    indices = []
    for batch in batches:
        indices += batch["index"].tolist()
        assert batch["value"].tolist() == batch["index"].tolist()
        emit(delivered=len(indices))
        end = time.monotonic() + spec.get("work", 0)
        while time.monotonic() < end:  # computation of the model
            pass
    emit(complete=indices == list(range(30)))


if __name__ == "__main__":
    SPEC = json.loads(sys.argv[1])
    STARTED = time.monotonic()
    try:
        run(SPEC)
    except HftlError as error:
        emit(error=type(error).__name__, problems=error.problems)
        sys.exit(error.exit_code)
    finally:
        emit(over=True)
