"""Recipes and commands in real processes of their own that cost no imports: a server imports everything once and forks.

`python tests/forked.py` is the server; `Forks` starts it and asks it for processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
LIBRARIES = (
    "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert", "torch._dynamo",
    "sklearn.metrics", "scipy.stats", "scipy.optimize", "matplotlib.pyplot", "matplotlib.backends.backend_svg",
    "pyarrow.parquet", "accelerate.tracking", "torch.distributed.tensor", "torch.utils.data", "jinja2",
    "datasets.packaged_modules.csv.csv", "jsonargparse", "safetensors.torch", "timm", "peft", "accelerate",
)  # fmt: skip
OURS = (
    "hftl.run.setup", "hftl.config.parse", "hftl.reporting", "hftl.cli.main", "hftl.inference.batch_inference",
    "hftl.artifacts.push",
)  # fmt: skip
"""What a recipe or command imports on its way; without it a process begins slower, nothing else."""


QUIET = [("no_pictures", [])]
"""Most runs of the fault tests draw no report."""


class Forks:
    """Starts recipes as forked processes. One at a time."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(TESTS.parent)
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.number = 0
        self.running: Attempt | None = None

    def start(self, flags, logs, processes=1, faults=(), recipe="text_classification", environment=None) -> Attempt:
        """Begins `recipe` with command-line flags on some processes, which share a gloo group.

        Args:
            flags: The command line.
            logs: Folder that gets what each process prints.
            processes: How many.
            faults: Pairs of a name in breaks.py and its arguments, in force on rank 0.
            recipe: File name without ending.
            environment: Variables for all of them.
        """
        return self._begin({"recipe": recipe, "flags": flags, "faults": list(faults)}, logs, processes, environment)

    def _begin(self, wanted, logs, processes, environment) -> Attempt:
        from launch import free_port

        if self.running is not None:  # a test that failed has left it
            self.running.end()
        self.number += 1
        shared = {**(environment or {})}
        if processes > 1:
            port = free_port()
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(processes)}
        logs.mkdir(parents=True, exist_ok=True)
        files = [logs / f"{self.number:03d}-{rank}.txt" for rank in range(processes)]
        for file in files:
            file.touch()
        ranks = [
            {**shared, **({"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {})} for r in range(processes)
        ]
        wanted |= {"ranks": ranks, "logs": [*map(str, files)]}
        self.server.stdin.write(json.dumps(wanted) + "\n")
        self.server.stdin.flush()
        self.running = Attempt(self, self.answer("pids", 60), files)
        return self.running

    def run(self, flags, logs, timeout=120, **options) -> tuple[list[int], str]:
        """Returns the exit statuses (-9 for a kill) and what rank 0 printed."""
        attempt = self.start(flags, logs, **options)
        statuses = attempt.wait(timeout)
        return statuses, attempt.said()

    def command(
        self, words, logs, timeout=120, processes=1, cwd=TESTS.parent, without_hftl=False, **environment
    ) -> tuple[list[int], str]:
        """Runs `python …` or an installed program with this process's environment; returns what `run` does.

        `without_hftl`: in a process that has never imported hftl and cannot.
        """
        wanted = {"command": [*map(str, words)], "cwd": str(cwd), "without_hftl": without_hftl}
        attempt = self._begin(wanted, logs, processes, {**os.environ, **environment})
        statuses = attempt.wait(timeout)
        return statuses, attempt.said()

    def answer(self, name: str, timeout: float) -> list[int]:
        """Returns what the server says next."""
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            raise TimeoutError(name)
        return json.loads(self.server.stdout.readline())[name]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(30)


class Attempt:
    """Processes that were started together."""

    def __init__(self, forks: Forks, pids: list[int], files: list[Path]) -> None:
        self.forks, self.pids, self.files = forks, pids, files
        self.started = time.monotonic()

    def send(self, number: int, rank: int | None = None, group: bool = False) -> None:
        """Sends a signal to one process or to all; `group`: to what they have started too, as Ctrl-C does."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(pid, number)

    def until(self, *words: str, timeout: float = 60) -> None:
        """Waits until rank 0 has printed one of several words."""
        end = time.monotonic() + timeout
        while not any(word in self.said() for word in words):
            assert time.monotonic() < end, (words, self.said())
            time.sleep(0.005)

    def until_exists(self, file: Path, timeout: float = 60) -> None:
        """Waits until a file is there."""
        end = time.monotonic() + timeout
        while not file.exists():
            assert time.monotonic() < end, (file, self.said())
            time.sleep(0.005)

    def wait(self, timeout: float = 120) -> list[int]:
        """Returns the exit statuses when all have ended."""
        try:
            statuses = self.forks.answer("statuses", timeout)
        except TimeoutError:
            self.end()
            said = "\n".join(map(self.said, range(len(self.pids))))
            raise AssertionError(f"still running after {timeout} s:\n{said}") from None
        self.forks.running = None
        return statuses

    def end(self) -> None:
        """Kills what is left of it."""
        self.send(signal.SIGKILL)
        self.forks.answer("statuses", 20)
        self.forks.running = None

    def said(self, rank: int = 0) -> str:
        return self.files[rank].read_text(errors="replace")


def serve() -> None:
    """Reads wishes, forks, answers with the process ids and then with their exit statuses.

    A second server, forked before hftl is imported, fulfils the wishes for processes without it.
    """
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    import matplotlib

    matplotlib.use("svg")
    source, sink = os.pipe()
    if os.fork() == 0:
        os.close(sink)
        sys.modules["hftl"] = None
        return fulfil(os.fdopen(source))
    os.close(source)
    import hftl

    for name in hftl.__all__:
        getattr(hftl, name)
    for name in OURS:
        importlib.import_module(name)
    fulfil(sys.stdin, os.fdopen(sink, "w"))


def fulfil(wishes, without_hftl=None) -> None:
    """Forks what each line of `wishes` asks for, or hands the line on to the server without hftl."""
    gc.collect()
    gc.freeze()  # or each process would walk through all that was imported
    for line in wishes:
        wish = json.loads(line)
        if wish.get("without_hftl") and without_hftl is not None:
            print(line, end="", file=without_hftl, flush=True)
            continue
        pids = []
        for rank, (environment, log) in enumerate(zip(wish["ranks"], wish["logs"], strict=True)):
            pid = os.fork()
            if pid == 0:
                return play(wish, rank, environment, log)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses}), flush=True)
    os._exit(0)  # the libraries' complaints at exit say nothing of the tests


def play(wish, rank: int, environment: dict[str, str], log: str) -> None:
    """Is the forked process: as if the recipe or command had been started from a shell."""
    os.setsid()  # a process group of its own, as a shell gives it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(nothing, 0)
    if "command" in wish:
        os.environ.clear()
    os.environ.update(environment)
    if "command" in wish:
        os.chdir(wish["cwd"])
        return execute(wish["command"])
    sys.argv = [wish["recipe"] + ".py", *wish["flags"]]
    import breaks
    from conftest import load_recipe

    import hftl

    os.environ.update(environment)  # conftest.py has given this process a cache of its own
    recipe = load_recipe(wish["recipe"])
    for name, arguments in wish["faults"] if rank == 0 else ():
        getattr(breaks, name)(*arguments)
    hftl.run_recipe(recipe.main, recipe.DEFAULTS, recipe.__doc__)


def execute(words: list[str]) -> None:
    """Does what a shell would with a program that is written in Python."""
    from huggingface_hub import constants

    importlib.reload(constants)  # it reads the environment when it is imported
    program, *arguments = words
    if program == "python" and arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = arguments if program == "python" else [shutil.which(program), *arguments]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
