"""Work in a process of its own: its memory can be measured, and when it is killed nothing else is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftl import errors
from hftl.errors import HftlError, RunComplete, first_line

_IMPORTS = (
    "hftl.run.setup", "hftl.training.fit", "hftl.evaluation.evaluate", "hftl.artifacts.save_run",
    "hftl.tasks.auto_task", "hftl.models.timm_model", "hftl.models.text_model", "timm", "transformers", "datasets",
    "peft", "safetensors.torch", "torch._dynamo", "torch.utils.data", "jsonargparse", "sklearn.datasets",
    "sklearn.model_selection", "scipy.stats", "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "transformers.models.bert.modeling_bert",
)  # fmt: skip
"""What every training imports; the server does it once for all of them. A name that is missing is passed over."""


class ChildFailedError(HftlError):
    """A child process that ended without an answer, or with an error that is not hftl's."""


def run_in_child(work: Callable[..., Any], *arguments: Any, log: Path | None = None) -> Any:
    """Returns `work(*arguments)`, computed in a new process.

    The process is forked from a server that has imported everything and computed nothing (`forkserver`; started anew,
    `spawn`, where the system cannot fork), so that starting it costs milliseconds, threads and CUDA are safe, and its
    peak memory is its own.

    Args:
        work: A function that can be imported.
        arguments: Its arguments; they and what it returns must be picklable (multiprocessing sends them so).
        log: File that gets what the process prints; None leaves it here.

    Raises:
        HftlError: What `work` raised, of the same class.
        Failed: It raised something else, or the process was killed.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([work.__module__, *_IMPORTS])
    mine, theirs = context.Pipe(duplex=False)
    job = (work, arguments, dict(os.environ), str(log) if log else None)
    process = context.Process(target=_child, args=(theirs, *job))
    with _script_hidden():
        process.start()
    theirs.close()
    try:
        answer = mine.recv()
    except EOFError:
        answer = None
    except BaseException:
        _end(process)
        raise
    finally:
        mine.close()
    process.join()
    if answer is None:
        raise ChildFailedError(_how_it_ended(process.exitcode, log))
    kind, value = answer
    if kind == "returned":
        return value
    if kind == "complete":
        raise RunComplete(*value)
    raise getattr(errors, kind, ChildFailedError)(*value)


def _child(connection: Any, work: Callable[..., Any], arguments: Any, environment: Mapping, log: str | None) -> None:
    os.environ.update(environment)  # the server's own is that of the first call
    if log:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    try:
        answer = "returned", work(*arguments)
    except RunComplete as complete:
        answer = "complete", (complete.folder, complete.metrics)
    except KeyboardInterrupt:
        answer = "Stopped", ("interrupted before training began.",)
    except HftlError as error:
        if log:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        answer = type(error).__name__, error.problems
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer = "Failed", (f"{type(error).__name__}: {first_line(error)}",)
    sys.stdout.flush()
    connection.send(answer)


@contextmanager
def _script_hidden() -> Iterator[None]:
    """Keeps multiprocessing from running the caller's script again in the child, as it does to find functions in it.

    What is sent is found by import, and a script without `if __name__ == "__main__":` would start all over.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _end(process: Any) -> None:
    """Asks a process to end, and waits: a training saves its state first."""
    process.join(0.2)
    if process.is_alive():
        process.terminate()
    process.join()


def _how_it_ended(status: int | None, log: Path | None) -> str:
    said = f"; the end of {log} may say why" if log else ""
    if status == -getattr(signal, "SIGKILL", 9):
        return f"its process was killed (by the system where memory was short, or by somebody){said}."
    if status is not None and status < 0:
        return f"its process was ended by signal {-status} ({signal.Signals(-status).name}){said}."
    return f"its process ended with status {status} and no answer{said}."
