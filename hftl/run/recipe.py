"""Command-line entry point of recipes, imported before torch so that `--help` is fast."""

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

    An `HftlError` ends the process with its message and `exit_code` (usually 2; 75 after a stop signal), without a
    traceback. A run that is already complete is logged, with exit status 0.

    Args:
        main: Main function of the recipe.
        defaults: Default configuration of the recipe.
        description: Description for `--help`.
    """
    folder = "the run folder"
    try:
        with _interruptible():
            run = parse_config(defaults, description=description or "", defer=True)
            folder = run.output_dir or folder
            main(run)
    except RunComplete as complete:
        values = ", ".join(f"{name} {value}" for name, value in complete.metrics.items())
        log(f"resume: {complete}; nothing to do ({values})")
    except KeyboardInterrupt as interrupt:
        name = interrupt.args[0] if interrupt.args else "SIGINT"
        _end(Stopped(f"stopped ({name}) outside of training. Run the same command with --resume auto."))
    except Exception as error:
        known = readable(error) or disk_error(error, folder)
        if known is None:
            raise
        _end(known)
    finally:
        leave_process_group()


def _end(error: HftlError) -> NoReturn:
    if is_main_process() or not error.agreed:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt on the first SIGTERM or SIGINT; a second one ends the process.

    `fit` replaces these handlers by `StopSignal`.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
        before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
