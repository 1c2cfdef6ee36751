"""Data loader workers that die, hang or raise: one error with row numbers in bounded time, no process left over."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from conftest import ROOT
from watched import alive, end_all, gone
from worker_job import Faulty, open_loader

from hftl.errors import HftlError

JOB = Path(__file__).with_name("worker_job.py")


def start(mark: str, **spec) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(JOB), json.dumps(spec)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HFTL_TEST": mark},
    )


def events_of(job: subprocess.Popen, limit: float = 60) -> list[dict]:
    out, err = job.communicate(timeout=limit)
    assert "Traceback" not in err, err[-3000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def mark(tmp_path):
    name = f"{os.getpid()}-{tmp_path.name}"
    yield name
    end_all(name)


def row_numbers(message: str) -> list[int]:
    """Returns the row numbers in an error message."""
    return [int(row) for row in re.search(r"row\(s\) ([\d, ]+)", message)[1].rstrip(", ").split(",")]


@pytest.mark.parametrize("entered", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with", "plain"])
def test_hung_worker_raises_with_row_numbers(entered, mark):
    started = time.monotonic()
    job = start(mark, fault="hang", row=11, timeout=2.0, **{"with": entered})
    events = events_of(job)
    seconds = time.monotonic() - started
    (error,) = (line for line in events if "error" in line)
    last = [line["seconds"] for line in events if "delivered" in line][-1]
    print(f"hung worker: error {error['seconds'] - last:.1f} s after the last batch (limit 2 s), exit {seconds:.1f} s")
    assert error["error"] == "DataError" and job.returncode == 2
    assert row_numbers(error["problems"][0]) == [10, 11]
    assert "hangs" in error["problems"][0] and "worker_timeout" in error["problems"][0]
    assert error["seconds"] - last < 2 + 2.5  # `with` has already ended the workers
    assert gone(mark)


@pytest.mark.parametrize(
    ("fault", "word", "work"),
    [("die", "SIGKILL", 0.4), ("exit", "exited with status 3", 0.0)],
    ids=["killed during computation", "exited while waited for"],
)
def test_dead_worker_raises_with_row_numbers(fault, word, work, mark):
    """Row 13 is in batch 6, of worker 0 of 2; the number of delivered batches depends on timing."""
    job = start(mark, fault=fault, row=13, timeout=30.0, work=work)
    events = events_of(job)
    (error,) = (line for line in events if "error" in line)
    print(f"dead worker ({fault}, main process {work} s per batch): error after {error['seconds']:.1f} s")
    assert error["error"] == "DataError" and job.returncode == 2
    message, rows = error["problems"][0], row_numbers(error["problems"][0])
    assert 13 in rows and all(row // 2 % 2 == 0 for row in rows), message
    assert min(rows) >= max(line["delivered"] for line in events if "delivered" in line) - 2
    assert word in message or "Killed" in message, message
    assert error["seconds"] < 8 and gone(mark)


def test_broken_connection_raises_with_dead_worker(monkeypatch):
    """The connection of a batch may break before torch detects that its worker is dead."""
    import torch

    with (
        open_loader(Faulty("none", -1), 2) as batches,
        pytest.raises(HftlError, match="died: .* killed by SIGKILL") as caught,
    ):
        running = iter(batches)
        next(running)
        torch._C._remove_worker_pids(id(batches._running))  # torch does not raise first
        batches._running._worker_pids_set = False

        def broken():
            os.kill(batches._workers[1].pid, signal.SIGKILL)
            raise ConnectionResetError

        monkeypatch.setattr(batches._running, "_next_data", broken)
        next(running)
    assert all(row // 2 % 2 == 1 for row in row_numbers(str(caught.value)))


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_error_preserves_problems(workers):
    rows, indices = Faulty("raise", 7), []
    with pytest.raises(HftlError) as caught, open_loader(rows, workers) as batches:
        for batch in batches:
            indices += batch["index"].tolist()
    assert caught.value.problems == ["row 7: not an image", "second problem"]
    assert indices == list(range(6)) and not active_children()


def test_epochs_match_and_exit_ends_workers():
    rows, finished = Faulty("none", -1), 0.0
    with open_loader(rows, 2, timeout=20) as batches:
        epochs = [[batch["index"].tolist() for batch in batches] for _ in range(3)]
        finished = time.monotonic()
    seconds = time.monotonic() - finished
    print(f"workers end in {seconds:.2f} s")
    assert epochs == [[[row, row + 1] for row in range(0, 30, 2)]] * 3
    assert seconds < 1.4 and not active_children()
    assert [batch["index"].tolist() for batch in batches] == epochs[0], (
        "a loader used after the block starts new workers"
    )
    batches.close()


def test_workers_ignore_signals_to_process_group(mark):
    """Terminals and job schedulers send SIGINT and SIGTERM to the whole group; only the main process ends workers."""
    job = start(mark, fault="none", work=0.1)
    for line in job.stdout:
        if json.loads(line).get("delivered") == 4:
            break
    workers = [pid for pid in alive(mark) if pid != job.pid]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    events = events_of(job)
    assert any(line.get("complete") for line in events) and job.returncode == 0 and gone(mark)


def test_hung_workers_end_with_parent(mark):
    job = start(mark, fault="hang", row=11)
    for line in job.stdout:
        if json.loads(line).get("delivered") == 10:
            break
    time.sleep(0.5)
    assert len(alive(mark)) == 3
    job.kill()
    killed = time.monotonic()
    job.wait()
    assert gone(mark, within=10)
    print(f"parent killed: workers ended after {time.monotonic() - killed:.2f} s")


def test_worker_suppresses_lost_connection_traceback():
    code = (
        "import sys\n"
        "from hftl.loading.workers import start_worker\n"
        "start_worker(0)\n"
        "for kind in (ConnectionResetError, EOFError, ValueError):\n"
        "    try: raise kind(kind.__name__)\n"
        "    except kind: sys.excepthook(*sys.exc_info())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("Traceback") == 1 and "ValueError: ValueError" in done.stderr
