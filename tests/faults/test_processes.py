"""`hftl.distributed`: barriers with heartbeats, and errors and exit times after the loss of a process."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from watched import Job, alive, end_all, free_port, gone, rank_of_job, recipe, torchrun

import hftl
from hftl.distributed import as_peer_error, heartbeat_barrier, main_process_first
from hftl.errors import EXIT_PEER_LOST

GROUP = str(Path(__file__).with_name("group_job.py"))
TIMEOUT_S = 2.0
START_S = 60
"""Maximum seconds of startup on a busy machine."""


@pytest.fixture
def mark(tmp_path):
    name = f"{os.getpid()}-{tmp_path.name}"
    yield name
    end_all(name)


@pytest.fixture
def group(tmp_path, mark):
    """Returns a function that starts the processes of a group, with `local` processes per machine."""

    def start(ranks: list[int], world: int, *arguments: str, local: int = 1) -> list[Job]:
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        jobs = []
        for rank in ranks:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
            jobs.append(Job([sys.executable, GROUP, *arguments], tmp_path / str(rank), mark, **shared, **own))
        return jobs

    return start


def events(job: Job) -> list[dict]:
    return [json.loads(line) for line in job.out.splitlines()]


@pytest.mark.slow
def test_barrier_waits_beyond_timeout_and_shares_failure(group, mark):
    """Two processes on one machine and one on another; the main process works for twice the timeout."""
    jobs = group([0, 1, 2], 3, "turns", local=2)
    for job in jobs:
        job.end(START_S)
        assert job.process.returncode == 0, job.out + job.err[-2000:]
    times = {(line["rank"], line["event"]): line["at"] for job in jobs for line in events(job)}
    assert times[0, "leave"] - times[0, "enter"] >= 2 * TIMEOUT_S
    assert times[0, "leave"] <= times[2, "enter"] < times[2, "leave"] <= times[1, "enter"]
    failed = {line["rank"]: line for job in jobs for line in events(job) if line["event"] == "failed"}
    assert failed[2]["error"] == "ValueError" and failed[2]["message"] == "mine"
    for rank in (0, 1):
        assert failed[rank]["error"] == "PeerError" and "process 2 failed (fail)" in failed[rank]["message"]
    assert all((rank, "finished") in times for rank in range(3)), "processes stay synchronized after a caught failure"


@pytest.mark.parametrize(
    ("how", "place", "words"),
    [
        ("killed", "barrier", "received no heartbeat from process 1"),
        pytest.param("stopped", "barrier", "received no heartbeat from process 1", marks=pytest.mark.slow),
        pytest.param("killed", "collective", "has ended or was killed", marks=pytest.mark.slow),
        pytest.param("stopped", "collective", "did not respond", marks=pytest.mark.slow),
    ],
)
def test_lost_process_raises_peer_error_in_bounded_time(how, place, words, group, mark):
    jobs = group([0, 1], 2, how, place)
    jobs[0].until("begin", START_S)
    started = time.monotonic()
    jobs[0].end(TIMEOUT_S + 10)
    print(f"process {how} ({place}), timeout {TIMEOUT_S} s: noticed within {time.monotonic() - started:.1f} s")
    (line,) = (line for line in events(jobs[0]) if line["event"] == "lost")
    assert words in line["message"] and "Process 0 of 2" in line["message"] and "--resume auto" in line["message"]
    assert jobs[0].process.returncode == EXIT_PEER_LOST and "Traceback" not in jobs[0].err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_process_raises_peer_error(rank, group, mark):
    (job,) = group([rank], 2, "killed", "barrier")
    print(f"process {1 - rank} missing: process {rank} ended after {job.end(START_S):.1f} s in all")
    (line,) = events(job)
    assert "did not find the other processes" in line["message"] and "rendezvous at 127.0.0.1" in line["message"]
    assert job.process.returncode == EXIT_PEER_LOST


def test_as_peer_error_returns_none_for_other_errors():
    with heartbeat_barrier("work"), main_process_first("work"):
        pass
    for error in (RuntimeError("CUDA error: out of memory"), ValueError("gloo/"), RuntimeError("Timed out")):
        assert as_peer_error(error) is None


def test_encode_initializes_no_accelerate_state(text_run):
    """Accelerate's state is created once; created by tokenization, it would lack the timeout and the group."""
    from accelerate import PartialState

    run, splits, task = hftl.setup_run(text_run(), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    assert len(task.encode(splits["train"], model.processor, 0, None)) == 60
    assert not PartialState._shared_state
    accelerator = hftl.create_accelerator(run)
    assert accelerator.init_handler.timeout.total_seconds() == run.train.timeout_minutes * 60


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_launcher(rank, texts, tiny_bert, tmp_path, mark):
    """One of two processes on one machine is killed at a random moment of training."""
    settings = {"train__num_epochs": 10_000, "train__logging_steps": 5, "train__eval_steps": 40}
    command = recipe(texts, tiny_bert, "run", train__timeout_minutes=0.3, **settings)
    job = Job(torchrun("--nproc_per_node", "2", "--master_port", free_port(), *command), tmp_path / "job", mark)
    job.until("step 10/", START_S)
    time.sleep(random.SystemRandom().uniform(0, 3))  # fixtures seed the global generator
    os.kill(rank_of_job(mark, rank), signal.SIGKILL)
    seconds = job.end(40)
    has_message = "PeerError: " in job.err
    print(f"rank {rank} killed: the launcher ended after {seconds:.1f} s; message of the other process: {has_message}")
    assert job.process.returncode != 0
    assert has_message or "Signal 9 (SIGKILL)" in job.err, job.err[-3000:]
    assert job.err.count("PeerError: ") <= 1 and 'text_classification.py", line' not in job.err
    assert gone(mark), alive(mark)
