"""Sphinx configuration: Markdown pages (MyST), furo theme, API reference from docstrings. Builds without a network."""

from __future__ import annotations

from hftl.version import __version__

project = "hftl"
author = "the hftl authors"
project_copyright = "the hftl authors, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hftl {release}"
myst_heading_anchors = 3  # pages link to headings of other pages

default_role = "code"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

nitpicky = True  # every reference that does not resolve is a warning, and an error with -W, except:
nitpick_ignore_regex = [
    # other libraries: their inventories are on the network
    (r"py:.*", r"(accelerate|collections|datasets|numpy|pathlib|PIL|torch|transformers|typing)\..*"),
    # annotations of names that only type checkers import: they stay unqualified
    (r"py:class", r"\w+|np\.ndarray|nn\.Module"),
    # generic types, which autodoc cuts at the first comma
    (r"py:class", r"(dict|list|tuple|Mapping|Sequence)\[.*"),
    # internal types in public signatures: users pass them on, and never create them
    (r"py:class", r"hftl\..+\..+"),
    # an error that callers catch as its base class
    (r"py:exc", r"RowError"),
]

_FIELDS = ("attribute", "data", "property")
_kept: list[list[str]] = []


def _keep(app, what, name, obj, options, lines) -> None:
    _kept[:] = [list(lines)]


def _restore(app, what, name, obj, options, lines) -> None:
    if what in _FIELDS:
        lines[:] = _kept[0]


def setup(app) -> None:
    """Shows docstrings of fields as written: napoleon takes the words before a colon for a type."""
    app.connect("autodoc-process-docstring", _keep, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _restore, priority=600)
