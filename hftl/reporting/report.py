"""Report of one run and comparison page of several."""

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
    """Writes the page of one run from what it left on disk, and returns where.

    Sections appear where the run has what they show. Rows are shown from the run's own data source; where that is
    gone or has changed, the page says so.

    Args:
        folder: The run folder.
        output: File to write; report.html in the run folder by default.
        splits: The rows by split, where they are open already.
        show_rows: Whether rows of the data appear; False for a page that others will read.

    Raises:
        ArtifactError: The folder holds no finished run.
        ConfigError: `output` cannot be written.
    """
    from hftl.reporting.examples import ReportRows
    from hftl.reporting.run_view import Run
    from hftl.reporting.sections import SECTIONS

    record = RunRecord(folder)
    target = page_path(output or record.folder / REPORT)
    run = Run(record, ReportRows(record, splits, show_rows))
    sections = [section for make in SECTIONS if (section := make(run))]
    chosen = [record.settings.get(name) for name in ("model.name", "adapt.method", "data.source")]
    about = [record.task.replace("_", " "), *chosen, f"seed {record.settings.get('train.seed')}"]
    return write_page(target, record.name, [str(part) for part in about if part], sections)


def compare_reports(
    folders: Sequence[str | Path], output: str | Path, comparison: Mapping[str, Any] | None = None
) -> Path:
    """Writes one page with several runs side by side, and returns where.

    Args:
        folders: The run folders.
        output: File to write.
        comparison: What `hftl compare` found about these runs, as in compare.json; its verdict comes first then.

    Raises:
        ArtifactError: A folder holds no finished run.
        ConfigError: `output` cannot be written.
    """
    from hftl.reporting.compare import compare_sections
    from hftl.reporting.comparison_section import conclusion_section

    target = page_path(output)
    records = [RunRecord(folder) for folder in folders]
    first = [conclusion_section(comparison)] if comparison else []
    about = [f"{comparison['model']} on {comparison['data']}"] if comparison else _names(records)
    return write_page(target, f"{len(records)} runs compared", about, [*first, *compare_sections(records)])


def _names(records: Sequence[RunRecord]) -> list[str]:
    return [record.name for record in records]
