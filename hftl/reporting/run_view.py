"""A run folder as the sections of a page read it."""

from __future__ import annotations

from functools import cached_property

from hftl.html.blocks import Measured
from hftl.reporting.examples import ReportRows
from hftl.reporting.run_record import RunRecord
from hftl.tasks.capabilities import Capability

CLASSES_LISTED = 200
"""Classes in a table; of more, the ones that matter most to it."""


class Run:
    """A run folder, and what several sections compute from it."""

    def __init__(self, record: RunRecord, rows: ReportRows) -> None:
        self.record = record
        self.rows = rows

    @cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Intervals of metrics by split; only of metrics whose value the predictions confirm."""
        splits = self.record.answers if self.record.supports(Capability.INTERVALS) else ()
        return {split: self.record.intervals(split) for split in splits}

    def measured(self, name: str) -> Measured:
        """Returns a metric as `test/accuracy` with its interval."""
        split, _, metric = name.partition("/")
        return Measured(self.record.metrics.get(name), self.intervals.get(split, {}).get(metric))
