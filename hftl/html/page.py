"""Rendering of sections to one HTML file: values are escaped, and the page's policy blocks external resources."""

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
        ConfigError: The suffix is not .html or .htm, or the parent folder does not exist.
    """
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: '{output}' has an invalid suffix; allowed: .html.")
    if not target.parent.is_dir():
        raise ConfigError(f"--output: folder '{target.parent}' does not exist.")
    return target


def write_page(output: str | Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> Path:
    """Writes sections as one HTML page.

    Args:
        output: Output file (.html).
        title: Heading of the page.
        about: Facts listed below the heading.
        sections: Sections, in order.

    Returns:
        The path of the page.

    Raises:
        ConfigError: `output` cannot be written.
    """
    import jinja2

    target = page_path(output)
    package = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(package),
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
        style=(package / "page.css").read_text(encoding="utf-8"),
        version=__version__,
    )
    try:
        write_text(target, sanitize(page))
    except OSError as error:
        raise ConfigError(f"--output: '{target}' cannot be written: {error.strerror}.") from error
    return target


def format_number(value: Any) -> str:
    """Returns a formatted number: integers with separators, floats with four decimals, None and NaN as a dash."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
