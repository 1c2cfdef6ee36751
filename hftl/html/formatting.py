"""Times and sizes as people say them."""

from __future__ import annotations

from hftl.html.blocks import Quantity


def duration(seconds: float) -> Quantity:
    """Returns a time as people say it."""
    if seconds < 60:
        return Quantity(f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return Quantity(f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s")


def mebibytes(count: int) -> Quantity:
    """Returns bytes as MiB."""
    return Quantity(f"{count / 2**20:,.0f} MiB")
