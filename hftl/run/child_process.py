"""Function calls in a separate process, which isolates memory use and crashes."""

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
"""Modules that every run imports; the fork server imports them once. Missing modules are skipped."""


class ChildFailedError(HftlError):
    """Child process that ended without a result, or with an error other than `HftlError`."""


def run_in_child(work: Callable[..., Any], *arguments: Any, log: Path | None = None) -> Any:
    """Returns `work(*arguments)`, computed in a new process.

    The process is forked from a server that has only imported modules (`forkserver`; `spawn` if the system cannot
    fork). It therefore starts in milliseconds, is safe with threads and CUDA, and its peak memory is its own.

    Args:
        work: A function that can be imported.
        arguments: Arguments of `work`; they and its result must be picklable.
        log: File for the output of the process; None inherits stdout and stderr.

    Raises:
        HftlError: The error of `work`, with the same class.
        ChildFailedError: `work` raised another error, or the process was killed.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([work.__module__, *_IMPORTS])
    receiver, sender = context.Pipe(duplex=False)
    job = (work, arguments, dict(os.environ), str(log) if log else None)
    process = context.Process(target=_child, args=(sender, *job))
    with _hidden_main_module():
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    except BaseException:
        _end(process)
        raise
    finally:
        receiver.close()
    process.join()
    if result is None:
        raise ChildFailedError(_exit_message(process.exitcode, log))
    kind, value = result
    if kind == "returned":
        return value
    if kind == "complete":
        raise RunComplete(*value)
    raise getattr(errors, kind, ChildFailedError)(*value)


def _child(connection: Any, work: Callable[..., Any], arguments: Any, environment: Mapping, log: str | None) -> None:
    os.environ.update(environment)  # the fork server has the environment of the first call
    if log:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    try:
        result = "returned", work(*arguments)
    except RunComplete as complete:
        result = "complete", (complete.folder, complete.metrics)
    except KeyboardInterrupt:
        result = "Stopped", ("interrupted before training started.",)
    except HftlError as error:
        if log:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        result = type(error).__name__, error.problems
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = "ChildFailedError", (f"{type(error).__name__}: {first_line(error)}",)
    sys.stdout.flush()
    connection.send(result)


@contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Prevents multiprocessing from running the script of the caller in the child to find its functions.

    Functions are found by import, and a script without `if __name__ == "__main__":` would run again.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _end(process: Any) -> None:
    """Terminates a process and waits until it has ended; a training saves a checkpoint first."""
    process.join(0.2)
    if process.is_alive():
        process.terminate()
    process.join()


def _exit_message(status: int | None, log: Path | None) -> str:
    hint = f". See the end of {log}" if log else ""
    if status == -getattr(signal, "SIGKILL", 9):
        return f"its process was killed with SIGKILL, possibly by the system when out of memory{hint}."
    if status is not None and status < 0:
        return f"its process was ended by signal {-status} ({signal.Signals(-status).name}){hint}."
    return f"its process ended with exit status {status} and no result{hint}."
