"""A finished run as one HTML page that needs no network, and several runs side by side."""

from hftl.reporting.report import REPORT, compare_reports, write_report

__all__ = ["REPORT", "compare_reports", "write_report"]
