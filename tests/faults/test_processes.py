"""Processes of one run: who waits for whom and how long; what is said, and when, if one of them is lost."""

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
"""What starting takes at most, on a machine that is busy with other things."""


@pytest.fixture
def mark(tmp_path):
    name = f"{os.getpid()}-{tmp_path.name}"
    yield name
    end_all(name)


@pytest.fixture
def group(tmp_path, mark):
    """Returns a function that starts the processes of a group, as many to a machine as `local` says."""

    def start(ranks: list[int], world: int, *arguments: str, local: int = 1) -> list[Job]:
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        jobs = []
        for rank in ranks:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
            jobs.append(Job([sys.executable, GROUP, *arguments], tmp_path / str(rank), mark, **shared, **own))
        return jobs

    return start


def told(job: Job) -> list[dict]:
    return [json.loads(line) for line in job.out.splitlines()]


@pytest.mark.slow
def test_turns_are_taken_patiently_and_a_failure_is_everybodys(group, mark):
    """Two processes on one machine, one on another; the main one works for twice the timeout of the group."""
    jobs = group([0, 1, 2], 3, "turns", local=2)
    for job in jobs:
        job.end(START_S)
        assert job.process.returncode == 0, job.out + job.err[-2000:]
    at = {(line["rank"], line["event"]): line["at"] for job in jobs for line in told(job)}
    assert at[0, "out"] - at[0, "in"] >= 2 * TIMEOUT_S
    assert at[0, "out"] <= at[2, "in"] < at[2, "out"] <= at[1, "in"]
    failed = {line["rank"]: line for job in jobs for line in told(job) if line["event"] == "failed"}
    assert failed[2]["error"] == "ValueError" and failed[2]["said"] == "mine"
    for rank in (0, 1):
        assert failed[rank]["error"] == "PeerError" and "process 2 failed (fail)" in failed[rank]["said"]
    assert all((rank, "through") in at for rank in range(3)), "a failure that is caught leaves the group in step"


@pytest.mark.parametrize(
    ("how", "where", "words"),
    [
        ("killed", "together", "has not heard of process 1"),
        pytest.param("stopped", "together", "has not heard of process 1", marks=pytest.mark.slow),
        pytest.param("killed", "collective", "has ended or was killed", marks=pytest.mark.slow),
        pytest.param("stopped", "collective", "did not answer", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_is_one_sentence_in_bounded_time(how, where, words, group, mark):
    jobs = group([0, 1], 2, how, where)
    jobs[0].until("begin", START_S)
    began = time.monotonic()
    jobs[0].end(TIMEOUT_S + 10)
    print(f"process {how} ({where}), timeout {TIMEOUT_S} s: noticed within {time.monotonic() - began:.1f} s")
    (line,) = (line for line in told(jobs[0]) if line["event"] == "lost")
    assert words in line["said"] and "Process 0 of 2" in line["said"] and "--resume auto" in line["said"]
    assert jobs[0].process.returncode == EXIT_PEER_LOST and "Traceback" not in jobs[0].err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_one_sentence(rank, group, mark):
    (job,) = group([rank], 2, "killed", "together")
    print(f"process {1 - rank} missing: process {rank} ended after {job.end(START_S):.1f} s in all")
    (line,) = told(job)
    assert "did not find the other processes" in line["said"] and "meet at 127.0.0.1" in line["said"]
    assert job.process.returncode == EXIT_PEER_LOST


def test_alone_nothing_is_waited_for_and_errors_of_other_kinds_are_not_explained_away():
    with heartbeat_barrier("work"), main_process_first("work"):
        pass
    for error in (RuntimeError("CUDA error: out of memory"), ValueError("gloo/"), RuntimeError("Timed out")):
        assert as_peer_error(error) is None


def test_tokenizing_leaves_it_to_start_to_form_the_group(text_run):
    """Accelerate's state is made once: made by tokenizing, it would have no timeout, and be of one process on CPUs."""
    from accelerate import PartialState

    run, splits, task = hftl.setup_run(text_run(), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    assert len(task.encode(splits["train"], model.processor, 0, None)) == 60
    assert not PartialState._shared_state
    accelerator = hftl.create_accelerator(run)
    assert accelerator.init_handler.timeout.total_seconds() == run.train.timeout_minutes * 60


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_launcher(rank, texts, tiny_bert, tmp_path, mark):
    """At a random moment of training, on one machine: one of the two processes is killed."""
    long = {"train__num_epochs": 10_000, "train__logging_steps": 5, "train__eval_steps": 40}
    command = recipe(texts, tiny_bert, "run", train__timeout_minutes=0.3, **long)
    job = Job(torchrun("--nproc_per_node", "2", "--master_port", free_port(), *command), tmp_path / "job", mark)
    job.until("step 10/", START_S)
    time.sleep(random.SystemRandom().uniform(0, 3))  # the fixtures seed the usual one
    os.kill(rank_of_job(mark, rank), signal.SIGKILL)
    took = job.end(40)
    own = "PeerError: " in job.err
    print(f"rank {rank} killed: the launcher ended after {took:.1f} s; the other one left its sentence: {own}")
    assert job.process.returncode != 0
    assert own or "Signal 9 (SIGKILL)" in job.err, job.err[-3000:]
    assert job.err.count("PeerError: ") <= 1 and 'text_classification.py", line' not in job.err
    assert gone(mark), alive(mark)
