"""HTML reports of one run, and comparison pages of several runs."""

from hftl.reporting.report import REPORT, compare_reports, write_report

__all__ = ["REPORT", "compare_reports", "write_report"]
