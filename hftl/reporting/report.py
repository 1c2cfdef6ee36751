"""Report of one run, and comparison page of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.html.page import page_path, write_page
from hftl.reporting.run_record import RunRecord

if TYPE_CHECKING:
    from datasets import Dataset


REPORT = "report.html"


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    splits: Mapping[str, Dataset] | None = None,
    show_rows: bool = True,
) -> Path:
    """Writes the report of one run from its run folder.

    The task and the files of the run determine the sections. Examples are loaded from the data source of the run; if
    it is missing or has changed, the report contains a warning instead.

    Args:
        folder: The run folder.
        output: Output file; default report.html in the run folder.
        splits: Rows by split, if already loaded.
        show_rows: Whether rows of the data are displayed; False for a page that is published.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: The folder is not a finished run.
        ConfigError: `output` cannot be written.
    """
    from hftl.reporting.examples import ReportRows
    from hftl.reporting.run_view import Run
    from hftl.reporting.sections import SECTIONS

    record = RunRecord(folder)
    target = page_path(output or record.folder / REPORT)
    run = Run(record, ReportRows(record, splits, show_rows))
    sections = [section for build in SECTIONS if (section := build(run))]
    settings = [record.settings.get(name) for name in ("model.name", "adapt.method", "data.source")]
    about = [record.task.replace("_", " "), *settings, f"seed {record.settings.get('train.seed')}"]
    return write_page(target, record.name, [str(value) for value in about if value], sections)


def compare_reports(
    folders: Sequence[str | Path], output: str | Path, comparison: Mapping[str, Any] | None = None
) -> Path:
    """Writes one page that compares several runs.

    Args:
        folders: The run folders.
        output: Output file.
        comparison: Content of compare.json, if `hftl compare` made the runs; its conclusion is the first section.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: A folder is not a finished run.
        ConfigError: `output` cannot be written.
    """
    from hftl.reporting.compare import compare_sections
    from hftl.reporting.comparison_section import transfer_gain_section

    target = page_path(output)
    records = [RunRecord(folder) for folder in folders]
    sections = [transfer_gain_section(comparison)] if comparison else []
    names = [record.name for record in records]
    about = [f"{comparison['model']} on {comparison['data']}"] if comparison else names
    return write_page(target, f"Comparison of {len(records)} runs", about, [*sections, *compare_sections(records)])
