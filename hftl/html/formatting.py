"""Formatting of durations and sizes."""

from __future__ import annotations

from hftl.html.blocks import Quantity


def duration(seconds: float) -> Quantity:
    """Returns a duration as `3.2 s`, `4 min 05 s` or `1 h 07 min`."""
    if seconds < 60:
        return Quantity(f"{seconds:.1f} s")
    minutes, remaining = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return Quantity(f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {remaining:02d} s")


def mebibytes(count: int) -> Quantity:
    """Returns a number of bytes in MiB."""
    return Quantity(f"{count / 2**20:,.0f} MiB")
