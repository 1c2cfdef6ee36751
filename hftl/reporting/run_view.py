"""Run folder with cached values for report sections."""

from __future__ import annotations

from functools import cached_property

from hftl.html.blocks import Measured
from hftl.reporting.examples import ReportRows
from hftl.reporting.run_record import RunRecord
from hftl.tasks.capabilities import Capability

MAX_LISTED_CLASSES = 200
"""Maximum number of classes in a table."""


class Run:
    """Record and rows of a run, with values shared by several sections."""

    def __init__(self, record: RunRecord, rows: ReportRows) -> None:
        self.record = record
        self.rows = rows

    @cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Confidence intervals of metrics by split; only of metrics that the predictions reproduce."""
        splits = self.record.answers if self.record.supports(Capability.INTERVALS) else ()
        return {split: self.record.intervals(split) for split in splits}

    def measured(self, name: str) -> Measured:
        """Returns a metric, such as `test/accuracy`, with its confidence interval."""
        split, _, metric = name.partition("/")
        return Measured(self.record.metrics.get(name), self.intervals.get(split, {}).get(metric))
