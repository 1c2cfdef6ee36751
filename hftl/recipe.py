"""How a recipe is run from the command line: imported before torch, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hftl.config.parse import parse
from hftl.config.schema import RunConfig
from hftl.console import is_main_process, leave_process_group
from hftl.errors import ConfigError, HftlError, PushError


def run_recipe(main: Callable[[RunConfig], Any], defaults: RunConfig, description: str | None = None) -> None:
    """Runs a recipe's `main` with the configuration from the command line.

    A problem ends it with a message and exit status 2, without a traceback.
    """
    try:
        main(parse(defaults, description=description or "", defer=True))
    except HftlError as error:
        # what prepare() refuses and push() reports is the same on all processes; anything else may be of one alone
        if is_main_process() or not isinstance(error, (ConfigError, PushError)):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_process_group()
