"""Training on two machines: two network namespaces with a virtual cable, each with the real `accelerate launch`, gloo.

On a CPU, `accelerate launch --cpu` starts one process and uses mpirun for several (accelerate 1.15, `launch_command`).
The tests therefore pass `--multi_gpu`, which selects torch's elastic agent, and set ACCELERATE_USE_CPU so that the
processes use CPU and gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watched import Job, alive, end_all, free_port, gone, rank_of_job, recipe, torchrun

from hftl.errors import EXIT_PEER_LOST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
GROUP = str(Path(__file__).with_name("group_job.py"))
TIMEOUT_S = 18
BOUND_S = TIMEOUT_S + 30
"""Timeout plus the time in which a launcher ends its processes."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Cable:
    """Two network namespaces connected by a virtual cable."""

    def __init__(self, name: str) -> None:
        self.spaces = [f"{name}{side}" for side in "ab"]
        self.ends = [f"{name}{side}v" for side in "ab"]  # at most 15 characters
        self.addresses = ["10.213.7.1", "10.213.7.2"]

    def connect(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for space, end, address in zip(self.spaces, self.ends, self.addresses, strict=True):
            ip("link", "set", end, "netns", space)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", end, "up")

    def cut(self) -> None:
        ip("-n", self.spaces[0], "link", "set", self.ends[0], "down")

    def slow(self) -> str:
        """Slows down both directions; returns the queueing discipline."""
        for discipline in ("netem delay 100ms rate 1mbit", "tbf rate 1mbit burst 16kbit latency 1s"):
            commands = [
                ["tc", "-n", space, "qdisc", "replace", "dev", end, "root", *discipline.split()]
                for space, end in zip(self.spaces, self.ends, strict=True)
            ]
            results = [subprocess.run(command, capture_output=True) for command in commands]
            if all(result.returncode == 0 for result in results):
                return discipline
        pytest.skip("this kernel has neither netem nor tbf")

    def remove(self) -> None:
        for space in self.spaces:  # also deletes the cable
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@pytest.fixture
def mark(tmp_path):
    name = f"{os.getpid()}-{tmp_path.name}"
    yield name
    end_all(name)


@pytest.fixture
def cable(mark):
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root, and ip and tc (iproute2)")
    cable = Cable(f"hftl{os.getpid()}")
    try:
        try:
            cable.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield cable
    finally:
        end_all(mark)
        cable.remove()


@pytest.fixture
def machines(cable, texts, tiny_bert, tmp_path, mark):
    """Returns a function that starts the text recipe on both machines; they share the folder of the model only."""

    def start(launcher: str = "accelerate", **settings) -> list[Job]:
        port, jobs = free_port(), []
        for rank, (space, end) in enumerate(zip(cable.spaces, cable.ends, strict=True)):
            folder = tmp_path / f"machine{rank}"
            shutil.copytree(texts, folder / "data")
            launch = {
                "accelerate": [
                    *("-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"),
                    *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
                    *("--main_process_ip", cable.addresses[0], "--main_process_port", port),
                ],
                "torchrun": [
                    *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
                    *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{cable.addresses[0]}:{port}", "--rdzv_id", mark),
                    *("--local_addr", cable.addresses[rank], "--rdzv_conf", f"is_host={1 - rank}"),
                ],
            }[launcher]
            command = [
                "ip",
                "netns",
                "exec",
                space,
                sys.executable,
                *launch,
                *recipe("data", tiny_bert, "run", **settings),
            ]
            # the host name does not resolve to either address
            environment = {"HF_HOME": str(folder / "home"), "GLOO_SOCKET_IFNAME": end}
            jobs.append(Job(command, folder, mark, **environment))
        return jobs

    return start


def errors(jobs: list[Job]) -> list[str]:
    """Returns the messages of `PeerError` in the logs, which must not contain a traceback of the recipe."""
    lines = [line for job in jobs for line in job.err.splitlines()]
    assert not any('text_classification.py", line' in line for line in lines), "\n".join(lines)
    return [line.partition("PeerError: ")[2] for line in lines if "PeerError: " in line]


LONG = {"train__num_epochs": 10_000, "train__logging_steps": 5, "train__eval_steps": 10_000_000}


def test_two_machines_match_one(machines, texts, tiny_bert, tmp_path, mark):
    settings = {"train__num_epochs": 3, "train__logging_steps": 1}
    jobs = machines(**settings)
    seconds = [job.end(150) for job in jobs]
    assert [job.process.returncode for job in jobs] == [0, 0], jobs[0].err[-3000:] + jobs[1].err[-3000:]
    one = Job(
        torchrun("--nproc_per_node", "2", "--master_port", free_port(), *recipe(texts, tiny_bert, "run", **settings)),
        tmp_path / "one",
        mark,
    )
    one_seconds = one.end(150)
    assert one.process.returncode == 0, one.err[-3000:]
    runs = [job.folder / "run" for job in (jobs[0], one)]
    two_metrics, one_metrics = (json.loads((run / "metrics.json").read_text()) for run in runs)
    histories = [[json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()] for run in runs]
    numbers = [[{k: v for k, v in line.items() if "seconds" not in k} for line in lines] for lines in histories]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    equal = weights[0] == weights[1]
    print(f"two machines {max(seconds):.0f} s, one machine {one_seconds:.0f} s; weights equal: {equal}")
    assert two_metrics == one_metrics
    assert numbers[0] == numbers[1] and weights[0] == weights[1]
    assert not (jobs[1].folder / "run").exists(), "only the main process writes"
    assert jobs[1].out == "", "only the main process logs"


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_cut_cable_ends_both_machines_with_peer_error(launcher, machines, cable, mark):
    jobs = machines(launcher, train__timeout_minutes=TIMEOUT_S / 60, **LONG)
    jobs[0].until("step 20/")
    cable.cut()
    started = time.monotonic()
    seconds = []
    # the c10d agent on machine 1 waits for the store on machine 0 until the TCP timeout (930 s, measured)
    for job in jobs if launcher == "accelerate" else jobs[:1]:
        job.end(BOUND_S - (time.monotonic() - started))
        seconds.append(time.monotonic() - started)
        assert job.process.returncode != 0
    while any("RANK" in environment for environment in alive(mark).values()):
        assert time.monotonic() - started < BOUND_S, "a process of the run is alive"
        time.sleep(0.1)
    print(
        f"cable cut ({launcher}), timeout {TIMEOUT_S} s: all processes of the run ended after "
        f"{time.monotonic() - started:.1f} s, launchers after " + ", ".join(f"{s:.1f} s" for s in seconds)
    )
    for job in jobs:
        (message,) = errors([job])
        assert "--resume auto" in message and "train.timeout_minutes" in message
    print(message)
    assert launcher == "torchrun" or gone(mark)


def test_cut_cable_ends_process_waiting_in_barrier(cable, tmp_path, mark):
    """In a barrier: process 1 waits for process 0, which works for four times the timeout of 2 s."""
    port, jobs = free_port(), []
    for rank, (space, end) in enumerate(zip(cable.spaces, cable.ends, strict=True)):
        rank_variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": end}
        command = ["ip", "netns", "exec", space, sys.executable, GROUP, "cut", "wait"]
        rendezvous = {"MASTER_ADDR": cable.addresses[0], "MASTER_PORT": port}
        jobs.append(Job(command, tmp_path / str(rank), mark, **rank_variables, **rendezvous))
    jobs[0].until('"enter"')
    time.sleep(0.5)
    cable.cut()
    waited, worked = jobs[1].end(20), jobs[0].end(20)
    print(f"cable cut while one waits, timeout 2 s: it ended after {waited:.1f} s, the other {worked:.1f} s later")
    for job in jobs:
        assert job.process.returncode == EXIT_PEER_LOST and "Traceback" not in job.err, job.err[-2000:]
        assert "received no heartbeat from process" in job.out


def test_slow_cable_preserves_training(machines, cable, mark):
    print(f"cable: {cable.slow()}")
    jobs = machines(train__max_steps=6, train__timeout_minutes=2)
    seconds = [job.end(200) for job in jobs]
    assert [job.process.returncode for job in jobs] == [0, 0], jobs[0].err[-3000:] + jobs[1].err[-3000:]
    report = json.loads((jobs[0].folder / "run" / "report.json").read_text())
    print(f"6 steps in {report['training']['seconds']} s, all in {max(seconds):.0f} s")
    assert json.loads((jobs[0].folder / "run" / "metrics.json").read_text())["test/loss"] < 2


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_killed_process_ends_other_machine(launcher, machines, cable, mark):
    jobs = machines(launcher, train__timeout_minutes=TIMEOUT_S / 60, **LONG)
    jobs[0].until("step 20/")
    os.kill(rank_of_job(mark, 1), signal.SIGKILL)
    started = time.monotonic()
    seconds = []
    for job in jobs:
        job.end(BOUND_S - (time.monotonic() - started))
        seconds.append(time.monotonic() - started)
    print(
        f"rank 1 killed ({launcher}): " + ", ".join(f"machine {i} ended after {s:.1f} s" for i, s in enumerate(seconds))
    )
    assert all(job.process.returncode != 0 for job in jobs)
    (message,) = errors(jobs)
    print(message)
    assert "Process 0 of 2" in message and cable.addresses[1] in message
    assert gone(mark)
