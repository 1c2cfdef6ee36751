"""How a recipe is run from the command line: imported before torch, so that `--help` answers at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from hftl.config.parse import parse_config
from hftl.config.schema import RunConfig
from hftl.distributed import readable
from hftl.errors import HftlError, RunComplete, Stopped, disk_error
from hftl.logging import is_main_process, leave_process_group, log


def run_recipe(main: Callable[[RunConfig], Any], defaults: RunConfig, description: str | None = None) -> None:
    """Runs a recipe's `main` with the configuration from the command line.

    A problem ends it with a message and the error's `exit_code` (2 as a rule, 75 after a stop that was asked for),
    without a traceback. A run that is complete already is said to be so, with status 0.
    """
    folder = "the run folder"
    try:
        with _stopping():
            run = parse_config(defaults, description=description or "", defer=True)
            folder = run.output_dir or folder
            main(run)
    except RunComplete as complete:
        values = ", ".join(f"{name} {value}" for name, value in complete.metrics.items())
        log(f"{complete}; nothing to do ({values})")
    except KeyboardInterrupt as interrupt:
        asked = interrupt.args[0] if interrupt.args else "SIGINT"
        _end(Stopped(f"stopped ({asked}) outside of training; the same command with --resume auto goes on."))
    except Exception as error:
        problem = readable(error) or disk_error(error, folder)
        if problem is None:
            raise
        _end(problem)
    finally:
        leave_process_group()


def _end(error: HftlError) -> NoReturn:
    if is_main_process() or not error.agreed:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


@contextmanager
def _stopping() -> Iterator[None]:
    """Makes SIGTERM and SIGINT a KeyboardInterrupt once; the next one ends the process. `fit` has its own ways."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
