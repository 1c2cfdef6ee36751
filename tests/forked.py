"""Recipes and commands in real processes of their own that cost no imports: a server imports everything once and forks.

`python tests/forked.py FOLDER` is the server; `Forks` starts it and sends requests. Each request has a connection and a
process of its own that answers it: no answer can be taken for another one, however late it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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


START_S = 280.0
"""Seconds that the server may take to import everything: 10 on an idle machine; below the time limit of a test."""
ANSWER_S = 120.0
"""Seconds that it may take to fork, or to notice that a killed process has ended."""
FULL, BARE = "full", "bare"
"""Sockets of the server and of its twin that has never imported hftl."""
QUIET = [("no_pictures", [])]
"""Most runs of the fault tests draw no report."""


class Forks:
    """Starts recipes as forked processes. One at a time."""

    def __init__(self, preload: bool = True) -> None:
        self.preload = preload
        self.number = 0
        self.running: Attempt | None = None
        self._start_server()

    def _start_server(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(TESTS.parent)
        self.ready = False
        self.folder = tempfile.TemporaryDirectory(prefix="forks_")
        self.server = subprocess.Popen(
            [sys.executable, __file__, self.folder.name, *([] if self.preload else ["--bare"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def _wait_until_ready(self) -> None:
        """Waits for the message of a server that has just been started; one that fails is replaced next time."""
        if self.ready:
            return
        arrived = select.select([self.server.stdout], [], [], START_S)[0]
        if not arrived or self.server.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"the fork server did not start within {START_S:.0f} s: status {self.server.returncode}")
        self.ready = True

    def _request(self, wanted: dict[str, Any]) -> tuple[Connection, list[int]]:
        """Sends a request, once more if the server was lost; returns its connection and the process ids."""
        for last in (False, True):
            if self.server.poll() is not None:
                self.close()
                self._start_server()
            self._wait_until_ready()
            try:
                return self._ask(wanted)
            except (EOFError, ConnectionError):
                if last:
                    raise
                self.server.kill()  # its twin is lost, or it is ending
                self.server.wait()
        raise AssertionError("unreachable")

    def _ask(self, wanted: dict[str, Any]) -> tuple[Connection, list[int]]:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(Path(self.folder.name, BARE if wanted.get("without_hftl") else FULL)))
            connection = Connection(client.detach())
        finally:
            client.close()
        try:
            connection.send(wanted)
            return connection, receive(connection, ANSWER_S)
        except BaseException:
            connection.close()
            raise

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
        connection, pids = self._request(wanted)
        self.running = Attempt(self, connection, pids, files)
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
        attempt = self.start_command(words, logs, processes, cwd, without_hftl, **environment)
        statuses = attempt.wait(timeout)
        return statuses, attempt.said()

    def start_command(self, words, logs, processes=1, cwd=TESTS.parent, without_hftl=False, **environment) -> Attempt:
        """Begins what `command` runs."""
        wanted = {"command": [*map(str, words)], "cwd": str(cwd), "without_hftl": without_hftl}
        return self._begin(wanted, logs, processes, {**os.environ, **environment})

    def close(self) -> None:
        """Ends the server and its twin, which see that their standard input is closed."""
        self.server.stdin.close()
        try:
            self.server.wait(30)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()


def receive(connection: Connection, timeout: float) -> Any:
    """Returns the next answer to a request."""
    if not connection.poll(timeout):
        raise TimeoutError(f"no answer from the fork server for {timeout:.0f} s")
    return connection.recv()


class Attempt:
    """Processes that were started together."""

    def __init__(self, forks: Forks, connection: Connection, pids: list[int], files: list[Path]) -> None:
        self.forks, self.connection, self.pids, self.files = forks, connection, pids, files
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
            statuses = receive(self.connection, timeout)
        except TimeoutError:
            self.end()
            said = "\n".join(map(self.said, range(len(self.pids))))
            raise AssertionError(f"still running after {timeout} s:\n{said}") from None
        except BaseException:
            self.end()
            raise
        self._leave()
        return statuses

    def end(self) -> None:
        """Kills what is left of it."""
        self.send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError, EOFError, OSError):
            receive(self.connection, ANSWER_S)
        self._leave()

    def _leave(self) -> None:
        self.connection.close()
        self.forks.running = None

    def said(self, rank: int = 0) -> str:
        return self.files[rank].read_text(errors="replace")


def serve(folder: str, preload: bool) -> None:
    """Imports everything, says so, and answers requests: for processes without hftl in a twin that has not seen it."""
    listeners = {}
    for name in (FULL, BARE):
        listeners[name] = socket.socket(socket.AF_UNIX)
        listeners[name].bind(str(Path(folder, name)))
        listeners[name].listen()
    if preload:
        import torch

        torch.set_num_threads(1)
        for name in LIBRARIES:
            importlib.import_module(name)
        import matplotlib

        matplotlib.use("svg")
    if os.fork() == 0:
        listeners[FULL].close()
        sys.modules["hftl"] = None
        return answer_requests(listeners[BARE])
    listeners[BARE].close()
    if preload:
        import hftl

        for name in hftl.__all__:
            getattr(hftl, name)
        for name in OURS:
            importlib.import_module(name)
    print("ready", flush=True)
    answer_requests(listeners[FULL])


def answer_requests(listener: socket.socket) -> None:
    """Forks a process for each request until the tests have ended; returns in the processes that were asked for."""
    gc.collect()
    gc.freeze()  # or each process would walk through all that was imported
    while True:
        arrived, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in arrived:
            os._exit(0)  # the libraries' complaints at exit say nothing of the tests
        client, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # those that have answered
        if os.fork() == 0:
            listener.close()
            return answer(Connection(client.detach()))
        client.close()


def answer(connection: Connection) -> None:
    """Forks what a request asks for, and sends the process ids and then their exit statuses."""
    wish = connection.recv()
    pids = []
    for rank, (environment, log) in enumerate(zip(wish["ranks"], wish["logs"], strict=True)):
        pid = os.fork()
        if pid == 0:
            connection.close()
            return play(wish, rank, environment, log)
        pids.append(pid)
    with contextlib.suppress(OSError):  # who asked may have left
        connection.send(pids)
        connection.send([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    os._exit(0)


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
    serve(sys.argv[1], preload="--bare" not in sys.argv)
