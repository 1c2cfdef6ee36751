"""From sections to one file. What comes from data is escaped, and the page may load nothing (its policy says so)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftl.atomic_files import write_text
from hftl.errors import ConfigError
from hftl.html.blocks import Measured, Quantity, Section
from hftl.redaction import sanitize
from hftl.version import __version__


def page_path(output: str | Path) -> Path:
    """Returns `output` as a path.

    Raises:
        ConfigError: It does not end in .html, or its folder does not exist.
    """
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
    import jinja2

    target = page_path(output)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.tests["measured"] = lambda value: isinstance(value, Measured)
    environment.tests["quantity"] = lambda value: isinstance(value, Quantity)
    page = environment.get_template("page.html.jinja").render(
        title=title,
        about=about,
        sections=sections,
        style=(here / "page.css").read_text(encoding="utf-8"),
        version=__version__,
    )
    try:
        write_text(target, sanitize(page))
    except OSError as error:
        raise ConfigError(f"--output: '{target}' cannot be written: {error.strerror}.") from error
    return target


def format_number(value: Any) -> str:
    """Returns a number as tables show it: integers with separators, others with four digits, a dash for none."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
