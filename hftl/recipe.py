"""How a recipe is run from the command line: imported before torch, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hftl.config.parse import parse
from hftl.config.schema import RunConfig
from hftl.console import is_main_process, leave_process_group, say
from hftl.errors import RunComplete
from hftl.processes import readable


def run_recipe(main: Callable[[RunConfig], Any], defaults: RunConfig, description: str | None = None) -> None:
    """Runs a recipe's `main` with the configuration from the command line.

    A problem ends it with a message and the error's `exit_code` (2 as a rule, 75 after a stop that was asked for),
    without a traceback. A run that is complete already is said to be so, with status 0.
    """
    try:
        main(parse(defaults, description=description or "", defer=True))
    except RunComplete as complete:
        values = ", ".join(f"{name} {value}" for name, value in complete.metrics.items())
        say(f"{complete}; nothing to do ({values})")
    except Exception as raised:
        error = readable(raised)
        if error is None:
            raise
        if is_main_process() or not error.agreed:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    finally:
        leave_process_group()
