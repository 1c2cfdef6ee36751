"""What a page is made of. A section is a title and blocks; the template knows how each kind looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Measured:
    """A number with its interval, or without one where nothing is known about it."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quantity:
    """A number as it is to be written, with its unit."""

    text: str


Cell = str | int | float | Measured | Quantity | None
"""Numbers are right-aligned: integers with separators, others with four digits; None is a dash."""


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Tiles:
    """The few numbers to see first: label, number, and a line below it."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, Cell, str]]


@dataclass(frozen=True)
class Figure:
    """A drawing."""

    svg: str
    """As written by matplotlib, with the alternative text inside."""
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Figures:
    """Drawings beside each other where there is room."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Note:
    """A sentence; a warning stands out."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is, folded away under its title."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """One row of the data beside what the model said about it."""

    row: int
    label: str
    prediction: str
    confidence: float | None
    image: str | None = None
    """A data URI."""
    texts: Sequence[tuple[str, str]] = ()
    """Column and content."""


@dataclass(frozen=True)
class Gallery:
    """Rows of the data, shown."""

    kind: ClassVar[str] = "gallery"
    examples: Sequence[Example]


@dataclass(frozen=True)
class Card:
    """A row of the data by itself, with where it stands."""

    where: str
    image: str | None = None
    """A data URI."""
    texts: Sequence[tuple[str, str]] = ()
    """Column and content."""


@dataclass(frozen=True)
class ExampleGroup:
    """A few rows beside each other, and what is said about them."""

    cards: Sequence[Card]
    caption: str


@dataclass(frozen=True)
class ExampleGroups:
    """Rows that belong together, shown together."""

    kind: ClassVar[str] = "comparisons"
    comparisons: Sequence[ExampleGroup]


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    blocks: Sequence[Any] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its name in links within the page."""
        return "-".join(self.title.lower().split())
