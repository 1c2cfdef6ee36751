"""Child processes of fault tests: start with captured output, search by environment variable, and cleanup."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Job:
    """Child process with its output in files of `folder`; its descendants inherit `mark` as HFTL_TEST."""

    def __init__(self, command: list[str], folder: Path, mark: str, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, **ENVIRONMENT, "HFTL_TEST": mark, **environment},
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text()

    def until(self, text: str, limit: float = 120) -> None:
        """Waits until the output contains `text`; fails after `limit` seconds."""
        deadline = time.monotonic() + limit
        while text not in self.out:
            assert self.process.poll() is None, f"status {self.process.returncode}: {self.out}\n{self.err[-3000:]}"
            assert time.monotonic() < deadline, f"no '{text}' in {limit} s: {self.out}\n{self.err[-3000:]}"
            time.sleep(0.05)

    def end(self, limit: float) -> float:
        """Waits for the end of the process and returns the elapsed seconds; fails after `limit` seconds."""
        start = time.monotonic()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"alive after {limit} s: {self.out[-1500:]}\n{self.err[-3000:]}") from None
        return time.monotonic() - start


def alive(mark: str) -> dict[int, dict[str, str]]:
    """Returns the environment of running processes with HFTL_TEST equal to `mark`, by pid."""
    environments = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if f"HFTL_TEST={mark}" in pairs and state != "Z":
            environments[int(folder.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return environments


def rank_of_job(mark: str, rank: int) -> int:
    """Returns the pid of the launched process with a rank."""
    (pid,) = (pid for pid, environment in alive(mark).items() if environment.get("RANK") == str(rank))
    return pid


def gone(mark: str, within: float = 3) -> bool:
    """Whether all processes with `mark` end within a number of seconds."""
    deadline = time.monotonic() + within
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(mark)


def end_all(mark: str) -> None:
    for pid in alive(mark):
        os.kill(pid, signal.SIGKILL)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def recipe(source: object, model: str, output: str, **settings: object) -> list[str]:
    """Returns the path of the text recipe, followed by flags; `__` in setting names stands for a dot."""
    options = {
        "data.source": source,
        "model.name": model,
        "output_dir": output,
        "train.batch_size_per_device": 4,
        "train.trackers": "[]",
        "train.lr": 1e-3,
    } | {name.replace("__", "."): value for name, value in settings.items()}
    flags = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
    return [str(ROOT / "recipes" / "text_classification.py"), *flags]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]
