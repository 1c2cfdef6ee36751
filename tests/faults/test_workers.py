"""Data workers that die, hang or raise: one error that names the rows, in bounded time, and no process left behind."""

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
from worker_job import Faulty, opened

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


def ended(job: subprocess.Popen, limit: float = 60) -> list[dict]:
    out, err = job.communicate(timeout=limit)
    assert "Traceback" not in err, err[-3000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def mark(tmp_path):
    name = f"{os.getpid()}-{tmp_path.name}"
    yield name
    end_all(name)


def rows_named(message: str) -> list[int]:
    return [int(row) for row in re.search(r"row\(s\) ([\d, ]+)", message)[1].rstrip(", ").split(",")]


@pytest.mark.parametrize("entered", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with", "plain"])
def test_a_hung_worker_ends_the_run_and_names_the_rows_that_are_waited_for(entered, mark):
    began = time.monotonic()
    job = start(mark, fault="hang", row=11, timeout=2.0, **{"with": entered})
    told = ended(job)
    whole = time.monotonic() - began
    (error,) = (line for line in told if "error" in line)
    last = [line["seconds"] for line in told if "delivered" in line][-1]
    print(f"hung worker: error {error['seconds'] - last:.1f} s after the last batch (limit 2 s), process {whole:.1f} s")
    assert error["error"] == "DataError" and job.returncode == 2
    assert rows_named(error["problems"][0]) == [10, 11]
    assert "hangs" in error["problems"][0] and "worker_timeout" in error["problems"][0]
    assert error["seconds"] - last < 2 + 2.5  # with `with`, workers have been ended by then
    assert gone(mark)


@pytest.mark.parametrize(
    ("fault", "word", "work"),
    [("die", "SIGKILL", 0.4), ("exit", "exited with status 3", 0.0)],
    ids=["killed while the model works", "exited while it is waited for"],
)
def test_a_dead_worker_ends_the_run_and_names_the_rows_that_it_had(fault, word, work, mark):
    """Row 13 is in batch 6, so of worker 0 of 2; which of its batches were delivered depends on the moment."""
    job = start(mark, fault=fault, row=13, timeout=30.0, work=work)
    told = ended(job)
    (error,) = (line for line in told if "error" in line)
    print(f"dead worker ({fault}, main process {work} s a batch): error after {error['seconds']:.1f} s")
    assert error["error"] == "DataError" and job.returncode == 2
    message, named = error["problems"][0], rows_named(error["problems"][0])
    assert 13 in named and all(row // 2 % 2 == 0 for row in named), message
    assert min(named) >= max(line["delivered"] for line in told if "delivered" in line) - 2
    assert word in message or "Killed" in message, message
    assert error["seconds"] < 8 and gone(mark)


def test_a_batch_that_breaks_off_names_its_dead_worker(monkeypatch):
    """The connection that a batch comes over may break before torch knows that its maker is dead."""
    import torch

    with (
        opened(Faulty("none", -1), 2) as batches,
        pytest.raises(HftlError, match="died: .* killed by SIGKILL") as caught,
    ):
        running = iter(batches)
        next(running)
        torch._C._remove_worker_pids(id(batches._running))  # so that torch does not tell
        batches._running._worker_pids_set = False

        def broken():
            os.kill(batches._workers[1].pid, signal.SIGKILL)
            raise ConnectionResetError

        monkeypatch.setattr(batches._running, "_next_data", broken)
        next(running)
    assert all(row // 2 % 2 == 1 for row in rows_named(str(caught.value)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_ours_arrives_whole_from_a_worker(workers):
    rows, seen = Faulty("raise", 7), []
    with pytest.raises(HftlError) as caught, opened(rows, workers) as batches:
        for batch in batches:
            seen += batch["index"].tolist()
    assert caught.value.problems == ["row 7: not an image", "second problem"]
    assert seen == list(range(6)) and not active_children()


def test_every_pass_is_the_same_and_the_block_ends_the_workers():
    rows, began = Faulty("none", -1), 0.0
    with opened(rows, 2, timeout=20) as batches:
        passes = [[batch["index"].tolist() for batch in batches] for _ in range(3)]
        began = time.monotonic()
    over = time.monotonic() - began
    print(f"workers that are well leave in {over:.2f} s")
    assert passes == [[[row, row + 1] for row in range(0, 30, 2)]] * 3
    assert over < 1.4 and not active_children()
    assert [batch["index"].tolist() for batch in batches] == passes[0], "used again after the block: new workers"
    batches.close()


def test_signals_to_the_whole_group_are_for_the_main_process(mark):
    """A terminal and a job scheduler send SIGINT and SIGTERM to all; workers must go on until they are ended."""
    job = start(mark, fault="none", work=0.1)
    for line in job.stdout:
        if json.loads(line).get("delivered") == 4:
            break
    workers = [pid for pid in alive(mark) if pid != job.pid]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    told = ended(job)
    assert any(line.get("complete") for line in told) and job.returncode == 0 and gone(mark)


def test_workers_die_with_their_parent_even_when_they_hang(mark):
    job = start(mark, fault="hang", row=11)
    for line in job.stdout:
        if json.loads(line).get("delivered") == 10:
            break
    time.sleep(0.5)
    assert len(alive(mark)) == 3
    job.kill()
    began = time.monotonic()
    job.wait()
    assert gone(mark, within=10)
    print(f"parent killed: workers gone after {time.monotonic() - began:.2f} s")


def test_a_worker_does_not_say_that_the_main_process_has_gone():
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
