"""Suppression of library messages that hftl replaces."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' loading report and progress bars, and deprecation warnings addressed to library authors."""
    from transformers.utils import logging as hf_logging

    level, shows_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if shows_bar:
            hf_logging.enable_progress_bar()
