"""Passes over rows prepared by worker processes, one of which may misbehave: `worker_job.py '{"fault": …, "row": …}'`.

Prints a JSON line for everything that happens, with the time since the pass began.
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
    """30 rows; fetching row `row` hangs, dies or raises."""

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
                time.sleep(0.3)  # so that the main process is somewhere in its own work by then
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "exit":
                os._exit(3)
            elif self.fault == "raise":
                raise HftlError(f"row {self.row}: not an image", "second problem")
        return [{"value": row} for row in rows]


def collate(examples):
    return {"value": torch.tensor([example["value"] for example in examples])}


def tell(**what) -> None:
    print(json.dumps(what | {"seconds": round(time.monotonic() - BEGAN, 2)}), flush=True)


def opened(rows: Faulty, workers: int, timeout: float = 0) -> Batches:
    share = Share(0, 1, 2)
    batches = lambda: eval_batches(len(rows), None, share)  # noqa: E731
    return make_loader(rows, batches, collate, device="cpu", num_workers=workers, timeout=timeout)


def passes(spec: dict) -> None:
    loader = opened(Faulty(spec["fault"], spec.get("row", -1)), 2, spec.get("timeout", 0))
    if not spec.get("with", True):
        return go_through(loader, spec)
    with loader as batches:
        go_through(batches, spec)


def go_through(batches, spec: dict) -> None:
    seen = []
    for batch in batches:
        seen += batch["index"].tolist()
        assert batch["value"].tolist() == batch["index"].tolist()
        tell(delivered=len(seen))
        ends = time.monotonic() + spec.get("work", 0)
        while time.monotonic() < ends:  # a model at work
            pass
    tell(complete=seen == list(range(30)))


if __name__ == "__main__":
    SPEC = json.loads(sys.argv[1])
    BEGAN = time.monotonic()
    try:
        passes(SPEC)
    except HftlError as error:
        tell(error=type(error).__name__, problems=error.problems)
        sys.exit(error.exit_code)
    finally:
        tell(over=True)
