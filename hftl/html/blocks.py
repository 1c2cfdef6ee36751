"""Building blocks of a page: sections with a title and blocks, rendered by the template by their `kind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Measured:
    """Number with its confidence interval; None if unknown."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quantity:
    """Formatted number with its unit."""

    text: str


Cell = str | int | float | Measured | Quantity | None
"""Table cell. Numbers are right-aligned: integers with separators, floats with four decimals; None is a dash."""


@dataclass(frozen=True)
class Table:
    """Table with caption and header; the first column is the row header."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Tiles:
    """Key figures, each as (label, number, subtitle)."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, Cell, str]]


@dataclass(frozen=True)
class Figure:
    """Figure with caption."""

    svg: str
    """SVG element from `hftl.html.figures`, with alternative text."""
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Figures:
    """Figures, side by side if the page is wide enough."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Note:
    """Paragraph of text, optionally highlighted as a warning."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """Preformatted text, collapsed under its title."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """Row of the data with target and prediction."""

    row: int
    label: str
    prediction: str
    confidence: float | None
    image: str | None = None
    """Image as a data URI."""
    texts: Sequence[tuple[str, str]] = ()
    """Pairs of column name and text."""


@dataclass(frozen=True)
class Gallery:
    """Grid of examples."""

    kind: ClassVar[str] = "gallery"
    examples: Sequence[Example]


@dataclass(frozen=True)
class Card:
    """Row of the data, or an image, with its position as caption."""

    where: str
    """Position or caption, such as `row 7`."""
    image: str | None = None
    """Image as a data URI."""
    texts: Sequence[tuple[str, str]] = ()
    """Pairs of column name and text."""


@dataclass(frozen=True)
class ExampleGroup:
    """Cards side by side with a common caption."""

    cards: Sequence[Card]
    caption: str


@dataclass(frozen=True)
class ExampleGroups:
    """Grid of example groups."""

    kind: ClassVar[str] = "example_groups"
    groups: Sequence[ExampleGroup]


@dataclass(frozen=True)
class Section:
    """Titled section of a page."""

    title: str
    blocks: Sequence[Any] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Fragment identifier of links within the page."""
        return "-".join(self.title.lower().split())
