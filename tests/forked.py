"""Fork server: starts recipes and commands in separate processes that share imported modules.

`python tests/forked.py FOLDER` is the server; `Forks` starts it and sends requests. Each request has its own connection
and its own server process, so a late response cannot be mistaken for another one.
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
HFTL_MODULES = (
    "hftl.run.setup", "hftl.config.parse", "hftl.reporting", "hftl.cli.main", "hftl.inference.batch_inference",
    "hftl.artifacts.push",
)  # fmt: skip
"""Modules that recipes and commands import lazily; preloading them only saves time."""


START_S = 280.0
"""Maximum seconds for the imports of the server: 10 on an idle machine; below the timeout of a test."""
ANSWER_S = 120.0
"""Maximum seconds for a fork, and for detecting the end of a killed process."""
FULL, BARE = "full", "bare"
"""Sockets of the server and of its second process, which has never imported hftl."""
NO_REPORT = [("skip_report", [])]
"""Fault of most fault tests: skips report.html."""


class Forks:
    """Client of the fork server; runs one request at a time."""

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
        """Waits until a new server is ready; the next request replaces a server that fails."""
        if self.ready:
            return
        readable = select.select([self.server.stdout], [], [], START_S)[0]
        if not readable or self.server.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"the fork server did not start within {START_S:.0f} s: status {self.server.returncode}")
        self.ready = True

    def _request(self, request: dict[str, Any]) -> tuple[Connection, list[int]]:
        """Sends a request, and again if the server was lost; returns its connection and the process ids."""
        for is_last in (False, True):
            if self.server.poll() is not None:
                self.close()
                self._start_server()
            self._wait_until_ready()
            try:
                return self._send(request)
            except (EOFError, ConnectionError):
                if is_last:
                    raise
                self.server.kill()  # its second process is lost, or it is ending
                self.server.wait()
        raise AssertionError("unreachable")

    def _send(self, request: dict[str, Any]) -> tuple[Connection, list[int]]:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(Path(self.folder.name, BARE if request.get("without_hftl") else FULL)))
            connection = Connection(client.detach())
        finally:
            client.close()
        try:
            connection.send(request)
            return connection, receive(connection, ANSWER_S)
        except BaseException:
            connection.close()
            raise

    def start(self, flags, logs, processes=1, faults=(), recipe="text_classification", environment=None) -> Attempt:
        """Starts `recipe` on one or more processes, which form a gloo group.

        Args:
            flags: Command-line flags.
            logs: Folder for the output of each process.
            processes: Number of processes.
            faults: Pairs of a function name in fault_injection.py and its arguments, injected on rank 0.
            recipe: File name without extension.
            environment: Environment variables of all processes.
        """
        return self._start({"recipe": recipe, "flags": flags, "faults": list(faults)}, logs, processes, environment)

    def _start(self, request, logs, processes, environment) -> Attempt:
        from launch import free_port

        if self.running is not None:  # left by a failed test
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
        request |= {"ranks": ranks, "logs": [*map(str, files)]}
        connection, pids = self._request(request)
        self.running = Attempt(self, connection, pids, files)
        return self.running

    def run(self, flags, logs, timeout=120, **options) -> tuple[list[int], str]:
        """Returns the exit statuses (-9 for SIGKILL) and the output of rank 0."""
        attempt = self.start(flags, logs, **options)
        statuses = attempt.wait(timeout)
        return statuses, attempt.output()

    def command(
        self, words, logs, timeout=120, processes=1, cwd=TESTS.parent, without_hftl=False, **environment
    ) -> tuple[list[int], str]:
        """Runs `python …` or an installed program with the environment of this process; returns the same as `run`.

        With `without_hftl`, hftl has never been imported in the process and cannot be.
        """
        attempt = self.start_command(words, logs, processes, cwd, without_hftl, **environment)
        statuses = attempt.wait(timeout)
        return statuses, attempt.output()

    def start_command(self, words, logs, processes=1, cwd=TESTS.parent, without_hftl=False, **environment) -> Attempt:
        """Starts a command without waiting for its end."""
        request = {"command": [*map(str, words)], "cwd": str(cwd), "without_hftl": without_hftl}
        return self._start(request, logs, processes, {**os.environ, **environment})

    def close(self) -> None:
        """Ends both server processes by closing their standard input."""
        self.server.stdin.close()
        try:
            self.server.wait(30)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()


def receive(connection: Connection, timeout: float) -> Any:
    """Returns the next response to a request."""
    if not connection.poll(timeout):
        raise TimeoutError(f"no response from the fork server for {timeout:.0f} s")
    return connection.recv()


class Attempt:
    """Processes of one request."""

    def __init__(self, forks: Forks, connection: Connection, pids: list[int], files: list[Path]) -> None:
        self.forks, self.connection, self.pids, self.files = forks, connection, pids, files
        self.started = time.monotonic()

    def send(self, number: int, rank: int | None = None, group: bool = False) -> None:
        """Sends a signal to one process or to all; with `group`, also to their children, as Ctrl-C does."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(pid, number)

    def until(self, *words: str, timeout: float = 60) -> None:
        """Waits until the output of rank 0 contains one of `words`."""
        end = time.monotonic() + timeout
        while not any(word in self.output() for word in words):
            assert time.monotonic() < end, (words, self.output())
            time.sleep(0.005)

    def until_exists(self, file: Path, timeout: float = 60) -> None:
        """Waits until a file exists."""
        end = time.monotonic() + timeout
        while not file.exists():
            assert time.monotonic() < end, (file, self.output())
            time.sleep(0.005)

    def wait(self, timeout: float = 120) -> list[int]:
        """Waits for all processes and returns their exit statuses."""
        try:
            statuses = receive(self.connection, timeout)
        except TimeoutError:
            self.end()
            output = "\n".join(map(self.output, range(len(self.pids))))
            raise AssertionError(f"still running after {timeout} s:\n{output}") from None
        except BaseException:
            self.end()
            raise
        self._close()
        return statuses

    def end(self) -> None:
        """Kills the remaining processes."""
        self.send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError, EOFError, OSError):
            receive(self.connection, ANSWER_S)
        self._close()

    def _close(self) -> None:
        self.connection.close()
        self.forks.running = None

    def output(self, rank: int = 0) -> str:
        """Returns the output of a process so far."""
        return self.files[rank].read_text(errors="replace")


def serve(folder: str, preload: bool) -> None:
    """Preloads modules and serves requests; a second process serves those without hftl."""
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
        for name in HFTL_MODULES:
            importlib.import_module(name)
    print("ready", flush=True)
    answer_requests(listeners[FULL])


def answer_requests(listener: socket.socket) -> None:
    """Forks a process per request until the tests end; returns in the requested processes only."""
    gc.collect()
    gc.freeze()  # or every fork would traverse all imported objects
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            os._exit(0)  # skips warnings of libraries at exit
        client, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # reap finished request processes
        if os.fork() == 0:
            listener.close()
            return answer(Connection(client.detach()))
        client.close()


def answer(connection: Connection) -> None:
    """Forks the requested processes, and sends their process ids and then their exit statuses."""
    request = connection.recv()
    pids = []
    for rank, (environment, log) in enumerate(zip(request["ranks"], request["logs"], strict=True)):
        pid = os.fork()
        if pid == 0:
            connection.close()
            return run_request(request, rank, environment, log)
        pids.append(pid)
    with contextlib.suppress(OSError):  # the client may have closed the connection
        connection.send(pids)
        connection.send([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    os._exit(0)


def run_request(request, rank: int, environment: dict[str, str], log: str) -> None:
    """Runs the recipe or command in the forked process, as if started from a shell."""
    os.setsid()  # a new process group, as in a shell
    output_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    empty_input = os.open(os.devnull, os.O_RDONLY)
    os.dup2(output_file, 1)
    os.dup2(output_file, 2)
    os.dup2(empty_input, 0)
    if "command" in request:
        os.environ.clear()
    os.environ.update(environment)
    if "command" in request:
        os.chdir(request["cwd"])
        return execute(request["command"])
    sys.argv = [request["recipe"] + ".py", *request["flags"]]
    import fault_injection
    from conftest import load_recipe

    import hftl

    os.environ.update(environment)  # conftest.py has set another cache
    recipe = load_recipe(request["recipe"])
    for name, arguments in request["faults"] if rank == 0 else ():
        getattr(fault_injection, name)(*arguments)
    hftl.run_recipe(recipe.main, recipe.DEFAULTS, recipe.__doc__)


def execute(words: list[str]) -> None:
    """Runs a Python program with its arguments, as a shell does."""
    from huggingface_hub import constants

    importlib.reload(constants)  # it reads the environment at import
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
