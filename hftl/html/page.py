"""From sections to one file. What comes from data is escaped, and the page may load nothing (its policy says so)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.atomic_files import write_text
from hftl.errors import ConfigError
from hftl.html.blocks import Measured, Quantity, Section
from hftl.redaction import shown
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
    from hftl.reporting.examples import Rows
    from hftl.reporting.run_view import Run
    from hftl.reporting.sections import SECTIONS

    record = RunRecord(folder)
    target = _target(output or record.folder / REPORT)
    run = Run(record, Rows(record, splits, show_rows))
    sections = [section for make in SECTIONS if (section := make(run))]
    chosen = [record.settings.get(name) for name in ("model.name", "adapt.method", "data.source")]
    about = [record.task.replace("_", " "), *chosen, f"seed {record.settings.get('train.seed')}"]
    return _write(target, record.name, [str(part) for part in about if part], sections)


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
    from hftl.reporting.comparison_section import verdict_section

    target = _target(output)
    records = [RunRecord(folder) for folder in folders]
    first = [verdict_section(comparison)] if comparison else []
    about = [f"{comparison['model']} on {comparison['data']}"] if comparison else _names(records)
    return _write(target, f"{len(records)} runs compared", about, [*first, *compare_sections(records)])


def _target(output: str | Path) -> Path:
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: '{output}' must end in .html.")
    if not target.parent.is_dir():
        raise ConfigError(f"--output: there is no folder '{target.parent}'.")
    return target


def write_page(output: str | Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> Path:
    """Writes any sections as one page, and returns where.

    Raises:
        ConfigError: `output` cannot be written.
    """
    return _write(_target(output), title, about, sections)


def _names(records: Sequence[RunRecord]) -> list[str]:
    return [record.name for record in records]


def _write(target: Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> Path:
    import jinja2

    import hftl

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.tests["measured"] = lambda value: isinstance(value, Measured)
    environment.tests["quantity"] = lambda value: isinstance(value, Quantity)
    page = environment.get_template("page.html.jinja").render(
        title=title,
        about=about,
        sections=sections,
        style=(here / "page.css").read_text(encoding="utf-8"),
        version=hftl.__version__,
    )
    try:
        write_text(target, shown(page))
    except OSError as error:
        raise ConfigError(f"--output: '{target}' cannot be written: {error.strerror}.") from error
    return target


def number(value: Any) -> str:
    """Returns a number as tables show it: integers with separators, others with four digits, a dash for none."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
